"""Private parts of Ray and DeepSpeed are used in few files, each of which names the version that it knows."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from support.paths import ROOT

RAY_FILES = {
    "pipeline/launch/ray_internals.py",
    "pipeline/training/ray_storage.py",
    "tests/support/ray_internals.py",
}
RAY = re.compile(
    r"ray\.[\w.]*_(private|internal)|ray\.train\.v2|__internal_head__|global_worker_stdstream_dispatcher"
    r"|_checkpoint_results\b|ray::(RayTrainWorker|TrainController)"
)
# Formats and attributes, which tests may write down to check them.
RAY_FORMATS = re.compile(
    r"health_check_failure|persist_current_checkpoint|build_checkpoint_path|[\"'](checkpoint_dir_name|checkpoint_results)[\"']"
)
DEEPSPEED_FILES = {"pipeline/engine/zero.py", "tests/engine/test_zero.py"}
DEEPSPEED = re.compile(
    r"^\s*(import|from) deepspeed|\bds_(tensor|id|numel)\b|bit16_groups|fp32_partitioned_groups|_of_fp32_groups"
    r"|__compatible_ops__|override_loss_scale|basic_optimizer"
)
THIS = Path(__file__).relative_to(ROOT).as_posix()


def sources() -> list[str]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return [name for name in listed.stdout.splitlines() if name != THIS]


def uses(pattern: re.Pattern[str], text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if pattern.search(line)]


@pytest.mark.parametrize(
    ("pattern", "allowed"), [(RAY, RAY_FILES), (DEEPSPEED, DEEPSPEED_FILES)], ids=["ray", "deepspeed"]
)
def test_private_parts_outside_their_files_are_not_used(pattern: re.Pattern[str], allowed: set[str]) -> None:
    found = {name: lines for name in sources() if (lines := uses(pattern, (ROOT / name).read_text(encoding="utf-8")))}
    assert {name: lines for name, lines in found.items() if name not in allowed} == {}
    assert found, "the pattern finds nothing, not even in the files that are allowed to use it"


def test_formats_of_ray_outside_their_files_are_not_used() -> None:
    names = [name for name in sources() if not name.startswith("tests/")]
    found = {name: lines for name in names if (lines := uses(RAY_FORMATS, (ROOT / name).read_text(encoding="utf-8")))}
    assert found.keys() == RAY_FILES - {"tests/support/ray_internals.py"}, found


def test_ray_files_name_the_version_that_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (pin,) = [line for line in project["dependencies"] if re.match(r"ray\b", line)]
    bounds = re.search(r">=(\d+\.\d+),<(\d+\.\d+)", pin)
    assert bounds is not None, f"{pin}: pin Ray to one minor version"
    for name in RAY_FILES:
        assert f"Ray {bounds[1]}" in (ROOT / name).read_text(encoding="utf-8").partition('"""\n')[0], name
