"""Imports go one way, light modules stay light, and importing touches no device."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in ("pipeline", "jobs", "tune")
    for path in sorted((ROOT / package).rglob("*.py"))
}
# From the ground up, one line a folder. A module may import from its own line (without cycles) and from those above it.
# A folder stands for its modules and for its sub-folders that have no line of their own.
LAYERS = (
    "pipeline pipeline.errors pipeline.logs pipeline.progress pipeline.runtime pipeline.signals",
    "pipeline.files",
    "pipeline.pages",
    "pipeline.runs",
    "pipeline.config",
    "pipeline.csrc",
    "pipeline.data",
    "pipeline.data.sharding",
    "pipeline.data.importing",
    "pipeline.model",
    "pipeline.checkpoint",
    "pipeline.tracking",
    "pipeline.engine",
    "pipeline.evaluation",
    "pipeline.training",
    "pipeline.inference",
    "pipeline.registry",
    "pipeline.launch",
    "pipeline.serving",
    "pipeline.presets",
    "jobs tune",
)
INDEPENDENT = (
    ("pipeline.data", "pipeline.model"),
    ("pipeline.model", "pipeline.data"),
    ("pipeline.training", "pipeline.launch"),
    ("pipeline.inference", "pipeline.training"),
    ("jobs", "tune"),
)
LIGHT = (
    "pipeline",
    "pipeline.config",
    "pipeline.errors",
    "pipeline.runs.record",
    "pipeline.files.storage",
    "pipeline.files.outputs",
    "pipeline.config.suggest",
    "jobs.cli",
)
HEAVY = ("torch", "torchvision", "ray", "deepspeed", "mlflow", "numpy", "scipy", "pycocotools")


def layer(module: str) -> int | None:
    """Position of the longest listed prefix of `module`; the bare `pipeline` stands for itself only."""
    lines = {name: place for place, names in enumerate(LAYERS) for name in names.split()}
    while module != "pipeline" and module not in lines and "." in module:
        module = module.rpartition(".")[0]
        if module == "pipeline":
            return None
    return lines.get(module)


def imported(path: Path, *, top_level: bool) -> set[str]:
    """The project's modules that `path` imports, at its top level only or anywhere in it."""
    tree = ast.parse(path.read_text())
    found = set()
    for node in tree.body if top_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            children = {f"{node.module}.{alias.name}" for alias in node.names}
            # The parent package counts only where a name comes out of its own __init__.
            found |= {child for child in children if child in FILES} or {node.module}
    return {name for name in found if name in FILES}


@pytest.mark.parametrize("module", FILES)
def test_imports_go_one_way(module: str) -> None:
    own = layer(module)
    assert own is not None, f"{module} has no place in LAYERS of {Path(__file__).name}; give it one"
    # `pipeline` itself names its public functions for type checkers and loads their modules on first use.
    for other in imported(FILES[module], top_level=module == "pipeline"):
        its = layer(other)
        assert its is not None
        assert its <= own, f"{module} imports {other}, which is above it"
        for here, there in INDEPENDENT:
            crosses = module.startswith(f"{here}.") and (other == there or other.startswith(f"{there}."))
            assert not crosses, f"{module} imports {other}: {here} knows nothing of {there}"


def test_there_is_no_cycle() -> None:
    graph = {module: imported(path, top_level=True) - {module} for module, path in FILES.items()}
    assert len(list(TopologicalSorter(graph).static_order())) == len(FILES)


def test_every_place_in_the_list_is_taken() -> None:
    assert {name for names in LAYERS for name in names.split()} <= set(FILES)


def test_names_of_test_files_outside_of_packages_are_unique() -> None:
    """Pytest imports such a file by its base name, so of two with one name the second cannot be collected."""
    files = [path for path in (ROOT / "tests").rglob("test_*.py") if not (path.parent / "__init__.py").exists()]
    twice = [path for path in files if sum(path.name == other.name for other in files) > 1]
    assert not twice, twice


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_light_modules_load_no_heavy_package() -> None:
    code = f"import sys\nfor name in {LIGHT!r}: __import__(name)\nprint(sorted(set({HEAVY!r}) & set(sys.modules)))"
    assert python(code).strip() == "[]"


def test_importing_everything_touches_no_cuda_device() -> None:
    code = (
        "import importlib, torch\n"
        "def touched(*args, **kwargs): raise AssertionError('CUDA was initialised by an import')\n"
        "torch.cuda._lazy_init = touched\n"
        f"for name in {list(FILES)!r}: importlib.import_module(name)\n"
        "print(torch.cuda.is_initialized(), torch.distributed.is_initialized())"
    )
    assert python(code).splitlines()[-1] == "False False"
