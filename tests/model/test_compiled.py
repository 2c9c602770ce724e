"""`train.compile`: the numbers of eager mode, the same names, and few programs over many sizes of pad groups."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.model import VARIANTS, padded_images, random_targets, small_config
from torch import Tensor

from pipeline.config import LossConfig
from pipeline.model import Detector, build_criterion, build_model
from pipeline.model.compiled import compile_regions, regions

# torch's tracer reads .grad of every tensor it meets
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
PAIRS = ((96, 128), (96, 100)), ((70, 110), (64, 64)), ((200, 160), (64, 64)), ((130, 131), (97, 99)), ((64, 300),) * 2


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def programs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def build(**changes: Any) -> Detector:
    torch.manual_seed(0)
    return build_model(small_config(**{"dropout": 0.1, "enc_layers": 3, "dec_layers": 4, **changes})).train()


def step(model: Detector, sizes: tuple[tuple[int, int], ...]) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of one batch and its gradients."""
    criterion = build_criterion(LossConfig())
    torch.manual_seed(7)  # of dropout
    loss = criterion.total(criterion(model(*padded_images(*sizes)), random_targets(*[2] * len(sizes)), 5.0))
    model.zero_grad()
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(
    compiled: tuple[Tensor, dict[str, Tensor]], eager: tuple[Tensor, dict[str, Tensor]], tolerance: float
) -> None:
    torch.testing.assert_close(compiled[0], eager[0], rtol=tolerance, atol=0)
    assert compiled[1].keys() == eager[1].keys()
    for name, gradient in eager[1].items():
        scale = max(float(gradient.abs().max()), 1e-4)
        torch.testing.assert_close(compiled[1][name], gradient, rtol=0, atol=100 * tolerance * scale, msg=name)


def test_regions_contain_every_layer() -> None:
    model = build(refine=True)
    assert len(regions(model)) == 1 + 3 + 4
    names = list(model.state_dict())
    compile_regions(model, "eager")
    assert list(model.state_dict()) == names
    assert [name for name, _ in model.named_modules() if "orig" in name] == []


@pytest.mark.parametrize("norm_valid", [False, True])
def test_compile_regions_sizes_share_programs(norm_valid: bool) -> None:
    """One for the backbone, one for encoder layers, two for decoder layers: the first one's queries are broadcast."""
    model, plain = build(op="torch", norm_valid=norm_valid), build(op="torch", norm_valid=norm_valid)
    compile_regions(model, "eager")
    for sizes in PAIRS:
        assert_same(step(model, sizes), step(plain, sizes), 1e-6)
    assert programs() == 4 - norm_valid  # whose backbone stays eager
    assert not torch._dynamo.utils.counters["graph_break"]
    for size in ((256, 250), (240, 256), (251, 254)):  # a group of one image has programs of its own
        step(model, (size,))
    assert programs() == 2 * (4 - norm_valid)


def test_compile_regions_evaluation_is_eager() -> None:
    model, plain = build(op="torch").eval(), build(op="torch").eval()
    compile_regions(model, "eager")
    images = padded_images(*PAIRS[0])
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        assert torch.equal(model(*images)["pred_logits"], plain(*images)["pred_logits"])
    assert programs() == 0


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("variant", [*VARIANTS, "norm_valid"])
def test_compile_regions_gives_same_losses_and_gradients(variant: str, recompute: bool) -> None:
    """With the operator's kernels and dropout."""
    changes = VARIANTS.get(variant, {"norm_valid": True})
    model, plain = (build(checkpoint_encoder=recompute, **changes) for _ in range(2))
    compile_regions(model)
    for sizes in PAIRS:
        assert_same(step(model, sizes), step(plain, sizes), 1e-5)
    assert programs() <= 9  # generated code has limits of its own, where loops are cut otherwise
