"""The documents against the disk: the tree, the commands, the settings and the links that they name exist."""

import argparse
import importlib
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.config import Config, flatten

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def tracked() -> set[str]:
    """Tracked paths of the first two levels; a folder ends with a slash. Below tests/ only folders."""
    listing = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listing.returncode:
        pytest.skip("not a git checkout: the tracked files are not known")
    found: set[str] = set()
    for name in listing.stdout.splitlines():
        first, *rest = name.split("/")
        found.add(first + "/" * bool(rest))
        if rest and (first != "tests" or len(rest) > 1):
            found.add(f"{first}/{rest[0]}" + "/" * (len(rest) > 1))
    return found - {"tests/integration/__init__.py"}


def drawn() -> dict[str, str]:
    """Path -> remark, as the README draws the tree."""
    (tree,) = (block for block in blocks("text") if "pipeline/" in block and "LICENSE" in block)
    found: dict[str, str] = {}
    folder = ""
    for line in tree.splitlines():
        indent, name, remark = re.fullmatch(r"( *)(\S+) *(.*)", line).groups()  # type: ignore[union-attr]
        if not indent:
            folder = name if name.endswith("/") else ""
        path = folder + name if indent else name
        assert path not in found, f"{path} is drawn twice"
        found[path] = remark
    return found


def test_the_tree_is_the_one_on_disk() -> None:
    assert set(drawn()) == tracked()


def test_the_tree_is_sorted_and_annotated() -> None:
    paths = list(drawn())
    assert paths == sorted(paths, key=lambda path: path.rstrip("/").split("/"))
    plain = ("README.md", ".gitignore")
    assert not [path for path, remark in drawn().items() if not remark and path not in plain and "__init__" not in path]


def commands() -> Iterator[list[str]]:
    """Every `python -m ...` of the documents' shell blocks, up to a `;`, `&` or comment."""
    for document in DOCUMENTS:
        for block in blocks("bash", (ROOT / document).read_text()):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if "-m" in words and (words[words.index("-m") + 1].split(".")[0] in ("jobs", "tune", "pipeline")):
                    yield words[words.index("-m") + 1 :]


def inline_modules() -> set[str]:
    text = "".join((ROOT / document).read_text() for document in DOCUMENTS)
    return set(re.findall(r"\b((?:jobs|tune)\.[a-z]+)\b", text))


def test_every_command_parses() -> None:
    seen = set()
    for module, *words in commands():
        seen.add(module)
        if module == "pipeline.csrc.build":
            continue
        parser = importlib.import_module(module).build_parser()
        assert isinstance(parser, argparse.ArgumentParser)
        arguments = parser.parse_intermixed_args(words)  # exits, and so fails, at a wrong flag
        for name in ("config", "space"):
            path = getattr(arguments, name, None)
            assert path is None or path.startswith("runs/") or (ROOT / path).is_file(), path
    assert {"jobs.shard", "jobs.train", "jobs.predict", "jobs.register", "jobs.evaluate", "tune.sweep"} <= seen


def test_every_setting_exists() -> None:
    known = set(flatten(Config()))
    words = [word for command in commands() for word in command]
    given = {word.partition("=")[0] for word in words if re.match(r"[a-z_.]+=", word)}
    assert {"data.train", "scaling.num_workers", "name"} <= given
    assert given <= known
    named = set(re.findall(r"`((?:data|model|optim|train|scaling|tracking)\.[a-z_.]+)(?:=[^`]*)?`", README))
    assert {key for key in named if not any(k == key or k.startswith(f"{key.rstrip('.*')}.") for k in known)} == set()


def test_every_module_that_is_named_exists() -> None:
    for module in inline_modules():
        assert (ROOT / (module.replace(".", "/") + ".py")).is_file(), module


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    text = "".join((ROOT / document).read_text() for document in DOCUMENTS)
    targets = set(re.findall(r"(?:^|`)make ([a-z-]+)", text, re.MULTILINE))
    assert {"demo", "test", "test-all", "op"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_local_links_lead_somewhere() -> None:
    for document in DOCUMENTS:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", (ROOT / document).read_text()):
            assert (ROOT / target).exists(), f"{document}: {target}"


def test_the_licence_is_the_one_that_is_claimed() -> None:
    licence = (ROOT / "LICENSE").read_text()
    assert "Apache License" in licence
    assert "Version 2.0, January 2004" in licence
    assert "END OF TERMS AND CONDITIONS" in licence
