"""The search space: reading a valid file, and reporting every fault before Ray starts."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from support.paths import ROOT

from pipeline.config import flatten
from pipeline.errors import ConfigError
from tune.load import SPACES, load_space
from tune.settings import Search
from tune.space import Space

SPACE = {
    "config": "base.yaml",
    "overrides": {"name": "sweep", "train.epochs": 4},
    "search": {"method": "asha", "samples": 6},
    "space": {
        "optim.lr": {"loguniform": ["1e-4", 1e-3]},
        "optim.drop_epochs": {"choice": [[2], [3, 4]]},
        "model.enc_points, model.dec_points": {"choice": [2, 4]},
    },
}
VALUES = {"optim.lr": 5e-4, "optim.drop_epochs": [3, 4], "model.enc_points, model.dec_points": 2}


def write(folder: Path, **changes: object) -> Path:
    (folder / "base.yaml").write_text("model: {refine: true}\ntracking: {register_as: detector}\n")
    path = folder / "space.yaml"
    path.write_text(yaml.safe_dump(SPACE | changes))
    return path


def load(folder: Path, overrides: list[str] | None = None, **changes: object) -> Space:
    return load_space(write(folder, **changes), overrides)


def faults(folder: Path, overrides: list[str] | None = None, **changes: object) -> str:
    with pytest.raises(ConfigError) as caught:
        load(folder, overrides, **changes)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_config_of_trial_has_its_values(tmp_path: Path) -> None:
    space = load(tmp_path)
    trial = space.config(VALUES, "sweep-0")
    changed = {key for key, value in flatten(trial).items() if value != flatten(space.base)[key]}
    assert changed == {
        "name",
        "optim.lr",
        "optim.drop_epochs",
        "model.enc_points",
        "model.dec_points",
        "tracking.register_as",
    }
    assert (trial.name, trial.optim.lr, trial.optim.drop_epochs) == ("sweep-0", 5e-4, (3, 4))
    assert trial.model.enc_points == trial.model.dec_points == 2
    assert space.base.name == "sweep"
    assert space.base.train.epochs == 4
    assert space.base.model.refine


def test_the_page_has_a_space_that_loads_and_every_search_setting_with_its_default(tmp_path: Path) -> None:
    page = (ROOT / "docs/sweeps.md").read_text()
    (example,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    (tmp_path / "space.yaml").write_text(example)
    space = load_space(tmp_path / "space.yaml")
    assert space.base.name == "demo-sweep"
    for name, field in Search.model_fields.items():
        (default,) = re.findall(rf"^\| `{name}` \| (.*?) \|", page, re.MULTILINE)
        assert field.default in (None, ()) or default == str(field.default), name


def test_config_of_trial_registers_no_model(tmp_path: Path) -> None:
    space = load(tmp_path)
    assert space.config(VALUES, "a").tracking.register_as == ""
    assert space.config(VALUES, "a", register=True).tracking.register_as == "detector"


def test_load_space_overrides_go_to_config_and_search(tmp_path: Path) -> None:
    space = load(tmp_path, ["train.epochs=2", "search.samples=3", "search.method=random"])
    assert (space.base.train.epochs, space.search.samples, space.search.early_stop) == (2, 3, "none")
    assert load(tmp_path, ["search.samples=3"], search={}).trials == 3


@pytest.mark.parametrize(
    ("search", "domain", "trials"),
    [
        ({"method": "asha", "samples": 6}, {"choice": [1, 2, 3]}, 6),
        ({"method": "random"}, {"choice": [1, 2, 3]}, 8),
        ({"method": "random", "samples": 2}, {"grid": [1, 2, 3]}, 6),
        ({"method": "grid"}, {"grid": [1, 2, 3]}, 3),
        ({"sampler": "grid", "repeats": 2}, {"grid": [1, 2, 3]}, 6),
        ({"sampler": "tpe", "points": [{"model.enc_points": 1}]}, {"choice": [1, 2]}, 9),
        ({"minutes": 5}, {"choice": [1, 2, 3]}, None),
        ({"epochs": 5, "samples": 2}, {"choice": [1, 2, 3]}, 2),
    ],
)
def test_trials_counts_draws_and_grid(tmp_path: Path, search: dict, domain: dict, trials: int) -> None:
    assert load(tmp_path, search=search, space={"model.enc_points": domain}).trials == trials


@pytest.mark.parametrize("kind", ["choice", "grid"])
def test_load_space_reads_values_like_the_config(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path)
    path.write_text(
        "config: base.yaml\noverrides: {name: on, data.val: 007}\nsearch: {method: random}\n"
        f"space:\n  data.train: {{{kind}: [007, 2024-05-01, no]}}\n  optim.lr: {{{kind}: [1e-4]}}\n"
    )
    space = load_space(path, ["tracking.experiment=1e-4 #2", "search.samples=3"])
    assert [axis.domain.values for axis in space.axes] == [("007", "2024-05-01", "no"), (1e-4,)]
    assert (space.base.name, space.base.data.val, space.base.tracking.experiment) == ("on", "007", "1e-4 #2")
    assert space.search.samples == 3


def test_load_space_of_a_config_says_what_a_space_file_is(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("model: {refine: true}\nseed: 1\n")
    with pytest.raises(ConfigError) as caught:
        load_space(tmp_path / "config.yaml", ["samples=2"])
    assert "config.yaml is no space file" in str(caught.value)
    assert "did you mean" not in str(caught.value)


def test_load_space_unknown_key_names_the_nearest(tmp_path: Path) -> None:
    message = faults(
        tmp_path,
        space={"optim.learning_rate": {"choice": [1]}, "model.enc_point": {"grid": [1]}, "optim": {"grid": [1]}},
    )
    assert "optim.learning_rate: unknown key; did you mean 'optim.lr'?" in message
    assert "model.enc_point: unknown key; did you mean 'model.enc_points'?" in message
    assert "'optim' is a section" in message


def test_load_space_override_of_the_search_without_its_section_names_it(tmp_path: Path) -> None:
    path = write(tmp_path)
    with pytest.raises(ConfigError) as caught:
        load_space(path, ["samples=2", "train.epochs=2", "sampler=tpe", "seed=3"])
    assert str(caught.value).splitlines()[1:] == [
        "  sampler: unknown key; did you mean 'search.sampler'?",
        "  samples: unknown key; did you mean 'search.samples'?",
    ]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"searches": {}}, "searches: unknown key; did you mean 'search'?"),
        ({"search": {"methods": "asha"}}, "search.methods: unknown key; did you mean 'search.method'?"),
        ({"search": {"metric": "val/ap"}}, "there is no 'val/ap'; did you mean 'val/AP'?"),
        ({"search": {"method": "grid", "samples": 2}}, "samples is for random and tpe"),
        ({"search": {"method": "grid"}}, "search.sampler grid crosses listed values"),
        ({"search": {"method": "hyperband"}}, "search.method: method is one of asha, random, grid"),
        ({"search": {"method": ["asha"]}}, "search.method: method is one of asha, random, grid"),
        ({"search": {"method": "asha", "sampler": "tpe"}}, "give either it or them"),
        ({"search": {"sampler": "bohb"}}, "search.sampler: Input should be 'random', 'grid' or 'tpe'"),
        ({"search": {"repeats": 2, "scheduler": "asha"}}, "scheduler asha stops some early; set scheduler: none"),
        ({"search": {"epochs": 3}}, "search.epochs 3 is less than one point needs: 4"),
        (
            {"search": {"epochs": 8, "scheduler": "none"}, "space": {"variant": {"a": {"train.epochs": 9}, "b": {}}}},
            "search.epochs 8 is less than one point needs: 9",
        ),
        ({"search": {"repeats": 2}, "overrides": {"seed": 2**64 - 1}}, "space: seed: Input should be less than"),
        ({"overrides": {"name": "n" * 196}}, "space: name: String should have at most 200 characters"),
        (
            {"search": {"points": [{"model.enc_points": 2, "model.dec_points": 4}]}},
            "model.enc_points, model.dec_points has one value, and 4 was given before",
        ),
        (
            {"search": {"sampler": "grid"}, "space": {"optim.lr": {"grid": [1e-3, 2e-3, 0.001]}}},
            "space: optim.lr: grid runs each value once, and 0.001 is listed twice",
        ),
        (
            {
                "search": {"scheduler": "none"},
                "overrides": {"optim.lr": 1e-3},
                "space": {"variant": {"a": {"optim.lr": 1e-4}, "b": {"optim.lr": 1e-5}}},
            },
            "optim.lr is both searched and fixed",
        ),
        ({"search": {"points": [{"optim.lrr": 1}]}}, "search.points.0.optim.lrr: is not searched; did you mean"),
        ({"search": {"points": [{}, {"optim.lr": 1}]}}, "search.points.1.optim.lr: 1 is not one of the space's"),
        ({"search": {"sampler": "tpe"}, "space": {"optim.lr": {"grid": [1e-3]}}}, "tpe chooses values"),
        ({"space": {"variant": {"a": {"optim.lrr": 1}}}}, "space.variant: optim.lrr: unknown key"),
        ({"space": {"variant": {"a": {"optim": {"lr": 1}}}}}, "space.variant: 'optim' is a section"),
        ({"space": {"variant": {"a": {"name": "x"}}}}, "space.variant: name cannot be searched"),
        ({"space": {"variant": {"a": {"train.epochs": 9}}}}, "scheduler asha compares trials of equal length"),
        ({"space": {"variant": {"choice": ["a"]}}}, "write variant: {NAME: {"),
        ({"space": {"variant": {}}}, "write variant: {NAME: {"),
        ({"space": {"variant": {"a": {"optim.lr": 1}}, "optim.lr": {"choice": [1]}}}, "optim.lr is searched twice"),
        ({"search": {"scheduler": "pbt"}}, "model.enc_points cannot be searched by pbt, which keeps the weights"),
        ({"search": {"scheduler": "pbt", "sampler": "tpe"}}, "scheduler pbt trains a population of samples"),
        ({"search": {"scheduler": "pbt", "grace": 4}}, "there would be no exchange"),
        (
            {"search": {"scheduler": "pbt"}, "space": {"optim.schedule": {"choice": ["step", "cosine"]}}},
            "optim.schedule=cosine depends on the length of a run",
        ),
        (
            {"search": {"scheduler": "pbt"}, "space": {"train.ema_decay": {"choice": [0, 0.9]}}},
            "train.ema_decay 0 has no average",
        ),
        ({"search": {"repeats": 2}, "space": {"seed": {"choice": [1]}}}, "seed cannot be searched"),
        ({"search": {"grace": 4}}, "search.grace 4 is not below train.epochs 4"),
        ({"space": {}}, "space:"),
        ({"space": {"optim.lr": [1e-4, 1e-3]}}, "space.optim.lr: write what to search as {choice: [...]}"),
        ({"space": {"optim.lr": {"loguniforms": [1, 2]}}}, "did you mean 'space.optim.lr.loguniform'?"),
        ({"space": {"optim.lr": {}}}, "give exactly one of choice, grid"),
        ({"space": {"optim.lr": {"choice": []}}}, "space.optim.lr.choice"),
        ({"space": {"optim.lr": {"uniform": [1, 2], "choice": [1]}}}, "give exactly one of choice, grid"),
        ({"space": {"optim.lr": {"uniform": [2, 1]}}}, "lowest < highest"),
        ({"space": {"optim.lr": {"loguniform": [0, 1]}}}, "loguniform needs bounds above 0"),
        ({"space": {"train.epochs": {"choice": [1]}}}, "train.epochs cannot be searched"),
        ({"space": {"scaling.num_workers": {"choice": [1]}}}, "scaling.num_workers cannot be searched"),
        ({"overrides": {"optim.lr": 1e-3}}, "optim.lr is both searched and fixed"),
        ({"overrides": {"train.eval_epochs": 2}}, "set train.eval_epochs=1"),
        ({"overrides": {"optim.rate": 1}}, "optim.rate: unknown key"),
        ({"config": "nowhere.yaml"}, "cannot read config"),
    ],
)
def test_load_space_faulty_file_raises(tmp_path: Path, changes: dict, text: str) -> None:
    assert text in faults(tmp_path, **changes)


@pytest.mark.parametrize(
    ("space", "text"),
    [
        ({"optim.lr": {"choice": [1e-4, "fast"]}}, "optim.lr"),
        ({"optim.lr": {"uniform": [-1, 1]}}, "optim.lr"),
        ({"model.enc_points": {"uniform": [1, 4]}}, "model.enc_points"),
        ({"model.enc_points": {"randint": [0, 4]}}, "model.enc_points"),
        ({"model.hidden_dim": {"choice": [256, 100]}}, "hidden_dim 100 is not a multiple of heads 8"),
        ({"train.micro_batch": {"grid": [2, 3]}}, "global_batch 32 is not a multiple of micro_batch 3"),
    ],
)
def test_load_space_invalid_combination_raises(tmp_path: Path, space: dict, text: str) -> None:
    assert text in faults(tmp_path, space=space)


def test_load_space_invalid_variant_raises(tmp_path: Path) -> None:
    space = {"variant": {"fits": {}, "too_narrow": {"model.hidden_dim": 100}}, "optim.lr": {"choice": [1e-4]}}
    assert "hidden_dim 100 is not a multiple of heads 8" in faults(tmp_path, space=space)


def test_load_space_override_is_the_value_of_variants_without_it(tmp_path: Path) -> None:
    bundles = {"plain": {}, "fast": {"optim.lr": 1e-3}}
    space = load(tmp_path, ["optim.lr=5e-4"], space={"variant": bundles})
    assert [space.config({"variant": name}, "a").optim.lr for name in bundles] == [5e-4, 1e-3]


def test_load_space_points_name_a_variant_by_its_text(tmp_path: Path) -> None:
    path = write(tmp_path)
    path.write_text(
        "config: base.yaml\nsearch: {points: [{variant: 1}, {variant: true}]}\n"
        "space: {variant: {1: {}, true: {optim.lr: 1e-3}}}\n"
    )
    assert load_space(path).search.points == ({"variant": "1"}, {"variant": "true"})


def test_longest_is_that_of_the_variants(tmp_path: Path) -> None:
    bundles: dict[str, dict[str, int]] = {"a": {"train.epochs": 2}, "b": {"train.epochs": 3}}
    for expected, added in ((3, {}), (50, {"c": {}})):
        path = write(tmp_path, overrides={}, search={"scheduler": "none"}, space={"variant": bundles | added})
        assert load_space(path).longest == expected


def test_load_space_variant_sets_its_bundle(tmp_path: Path) -> None:
    bundles = {"plain": {}, "long": {"train.epochs": "8", "optim.drop_epochs": [6], "data.val": "on"}}
    space = load(tmp_path, search={"scheduler": "none"}, space={"variant": bundles, "optim.lr": {"choice": [1e-4]}})
    plain, longer = (space.config({"variant": name, "optim.lr": 1e-4}, "a") for name in bundles)
    assert (plain.train.epochs, plain.optim.drop_epochs) == (4, space.base.optim.drop_epochs)
    assert (longer.train.epochs, longer.optim.drop_epochs, longer.data.val) == (8, (6,), "on")


def test_config_of_repeat_has_its_own_seed(tmp_path: Path) -> None:
    space = load(tmp_path, ["seed=7"], search={"repeats": 3})
    assert [space.config(VALUES, "a", repeat=number).seed for number in range(3)] == [7, 8, 9]


def test_load_space_points_are_read_like_the_config(tmp_path: Path) -> None:
    points = [{"optim.lr": "2e-4", "model.dec_points": 4}, {"optim.drop_epochs": [2]}]
    space = load(tmp_path, search={"points": points, "samples": 2})
    assert space.search.points == (
        {"optim.lr": 2e-4, "model.enc_points, model.dec_points": 4},
        {"optim.drop_epochs": [2]},
    )
    assert space.trials == 4


def test_load_space_command_line_replaces_the_files_method(tmp_path: Path) -> None:
    space = load(tmp_path, ["search.sampler=tpe", "search.scheduler=median"])  # the file says method: asha
    assert (space.search.sampler, space.search.early_stop) == ("tpe", "median")


def test_load_space_values_that_fit_only_together_pass(tmp_path: Path) -> None:
    space = {"model.heads, model.levels": {"choice": [4]}, "model.hidden_dim": {"choice": [100, 64]}}
    assert load(tmp_path, space=space).trials == 6


def test_load_space_huge_space_is_checked_by_value(tmp_path: Path) -> None:
    keys = ["optim.lr", "optim.backbone_lr", "optim.weight_decay", "optim.clip", "loss.bbox_weight"]
    space = {key: {"choice": list(range(1, 12))} for key in keys}
    assert load(tmp_path, space=space).trials == 6
    space["loss.bbox_weight"]["choice"].append(-1)
    assert "loss.bbox_weight" in faults(tmp_path, space=space)


def test_load_space_reports_all_faults_together(tmp_path: Path) -> None:
    message = faults(tmp_path, ["nonsense"], space={"optim.lrr": {"choice": [1]}, "name": {"choice": ["a"]}})
    assert message.count("\n") == 3
    for part in ("'nonsense'", "optim.lrr", "name cannot be searched"):
        assert part in message


@pytest.mark.parametrize("path", sorted(SPACES.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_space_loads(path: Path) -> None:
    space = load_space(path.stem)
    assert space.base.name == ("demo-sweep" if path.stem == "demo" else path.stem.replace("_", "-"))
    assert ("demo" in path.stem) == space.base.data.train.startswith("runs/demo")
    assert path.stem.endswith("demo") or path.with_name(f"{path.stem}_demo.yaml").exists()


@pytest.mark.parametrize("suffix", ["", "_demo"])
def test_sampling_points_are_the_rows_of_table_2(suffix: str) -> None:
    space = load_space(f"sampling_points{suffix}")
    (axis,) = space.axes
    rows = [space.config({"variant": name}, "a").model for name in axis.bundles]
    assert [(row.levels == 1, row.enc_points, row.cross_level, row.neck) for row in rows] == [
        (True, 1, True, "none"),
        (False, 1, False, "none"),
        (False, 4, False, "none"),
        (False, 4, True, "none"),
        (False, 4, True, "fpn"),
        (False, 4, True, "bifpn"),
    ]


def test_load_space_imports_no_ray(tmp_path: Path) -> None:
    code = "import sys; from tune.load import load_space; load_space(sys.argv[1]); sys.exit('ray' in sys.modules)"
    command = [sys.executable, "-c", code, str(write(tmp_path))]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize("key", ["model.num_classes", "train.micro_batch"])
def test_auto_is_refused_in_a_sweep(tmp_path: Path, key: str) -> None:
    assert f"{key}: auto" in faults(tmp_path, [f"{key}=auto"])
    space = SPACE["space"] | {key: {"choice": [2, "auto"]}}  # type: ignore[operator]
    assert f"{key}: auto" in faults(tmp_path, space=space)


@pytest.mark.parametrize("setting", ["train.patience=2", "train.max_minutes=5"])
def test_pbt_refuses_what_may_end_a_trial_early(tmp_path: Path, setting: str) -> None:
    search = {"scheduler": "pbt", "samples": 4}
    space = {"optim.lr": {"loguniform": [1e-4, 1e-3]}}
    assert setting.partition("=")[0] in faults(tmp_path, [setting], search=search, space=space)
