"""Which preset and settings a data set and a machine get."""

import pytest

from jobs.presets import find_config
from pipeline.config import load_config
from pipeline.launch.finetune.choice import EPOCHS, Machine, choose

CPU = Machine(2, 0, 0.0)
GPU = Machine(8, 2, 24.0)
MACHINES = (CPU, GPU, Machine(64, 0, 0.0), Machine(4, 1, 6.0))


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("images", [1, 3, 20, 160, 1000, 20_000])
def test_choose_gives_a_config_that_loads_with_work_for_every_worker(images: int, machine: Machine) -> None:
    chosen = choose(images, machine)
    config = load_config(find_config(chosen.preset), list(chosen.settings))
    batch, epochs = config.train.global_batch, config.train.epochs
    assert EPOCHS[0] <= epochs <= EPOCHS[1]
    assert 1 <= config.scaling.num_workers <= batch
    assert batch <= max(1, images)
    assert config.train.eval_epochs <= epochs


def test_choose_takes_the_large_model_only_with_a_gpu_of_enough_memory() -> None:
    assert choose(500, CPU).preset == choose(500, Machine(4, 1, 6)).preset == "finetune_small"
    assert choose(500, GPU).preset == "finetune_r50"
    assert "scaling.num_workers=2" in choose(500, GPU).settings


def test_choose_trains_a_similar_number_of_steps_whatever_the_data() -> None:
    steps = []
    for images in (160, 400):
        settings = dict(text.split("=") for text in choose(images, CPU).settings)
        steps.append(-(-images // int(settings["train.global_batch"])) * int(settings["train.epochs"]))
    assert max(steps) <= 1.1 * min(steps)


def test_choose_with_an_own_preset_sets_the_workers_alone() -> None:
    chosen = choose(500, CPU, "mine.yaml")
    assert (chosen.preset, chosen.settings) == ("mine.yaml", ("scaling.num_workers=2",))
