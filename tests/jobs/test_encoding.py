"""Files are read and written as UTF-8 whatever the locale is, and no text that cannot be printed ends a command."""

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from support.paths import ROOT

FILES = [
    path for folder in ("pipeline", "jobs", "tune", "benchmarks") for path in sorted((ROOT / folder).rglob("*.py"))
]
ASCII = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}  # then Python's default encoding is ASCII


def calls_without_encoding(tree: ast.AST) -> Iterator[int]:
    """Lines that read or write text in the locale's encoding."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or any(keyword.arg == "encoding" for keyword in node.keywords):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        owner = getattr(getattr(node.func, "value", None), "id", "")
        if name == "open" and owner not in ("os", "Image", "webbrowser"):
            modes = [
                each.value for each in [*node.args, *(k.value for k in node.keywords)] if isinstance(each, ast.Constant)
            ]
            if not any(isinstance(mode, str) and "b" in mode and len(mode) <= 3 for mode in modes):
                yield node.lineno
        elif (name == "read_text" and not node.args) or (name == "write_text" and len(node.args) == 1):
            yield node.lineno


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_text_files_have_an_encoding(path: Path) -> None:
    lines = list(calls_without_encoding(ast.parse(path.read_text(encoding="utf-8"))))
    assert not lines, f"{path}: encoding='utf-8' is missing in lines {lines}"


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("path.read_text()", 1),
        ("path.read_text(encoding='utf-8')", 0),
        ("path.write_text(text)", 1),
        ("open(path)", 1),
        ("path.open('a')", 1),
        ("path.open('rb')", 0),
        ("fsspec.open(path, mode='wb')", 0),
        ("fsspec.open(path, 'wt')", 1),
        ("os.open(path, flags)", 0),
    ],
)
def test_calls_without_encoding_are_found(code: str, found: int) -> None:
    assert len(list(calls_without_encoding(ast.parse(code)))) == found


@pytest.fixture
def export(tmp_path: Path) -> list[str]:
    """Annotations that hold raw UTF-8."""
    tree = {
        "images": [{"id": 1, "file_name": "a.png", "width": 8, "height": 8}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 4, 4]}],
        "categories": [{"id": 1, "name": "Äpfel 🍎"}],
    }
    (tmp_path / "images").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "a.png")
    (tmp_path / "a.json").write_text(json.dumps(tree, ensure_ascii=False), encoding="utf-8")
    return [str(tmp_path / "a.json"), str(tmp_path / "images")]


def run(*arguments: str) -> str:
    """The standard output of a command that succeeded in an ASCII locale."""
    command = [sys.executable, "-m", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | ASCII, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode("ascii")
    return done.stdout.decode("ascii")


def test_commands_in_an_ascii_locale_read_utf_8_and_print_what_they_can(export: list[str], tmp_path: Path) -> None:
    out = str(tmp_path / "shards")
    run("jobs.shard", "build", *export, out)
    assert r"\xc4pfel \U0001f34e" in run("jobs.shard", "info", out)


def test_file_name_that_an_ascii_locale_does_not_have_is_a_finding(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "größe.png")
    tree = {
        "images": [{"id": 1, "file_name": "größe.png", "width": 8, "height": 8}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 4, 4]}],
        "categories": [{"id": 1, "name": "a"}],
    }
    (tmp_path / "a.json").write_text(json.dumps(tree), encoding="utf-8")
    command = [sys.executable, "-m", "jobs.lint", str(tmp_path / "a.json"), str(tmp_path / "images")]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | ASCII, capture_output=True, check=False)
    assert done.returncode == 1
    assert b"is not a file name on this machine" in done.stdout
    assert b"Traceback" not in done.stderr
