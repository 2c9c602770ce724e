"""The scheduler of pytest-xdist in `conftest.py`: a process that dies costs one test, and the run ends."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.paths import ROOT

MANY = """
import os
import pytest

@pytest.mark.parametrize("number", range(6))
def test_one(number):
    if number == 3:
        os._exit(11)
"""
SINGLE = "import os\n\ndef test_one():\n    os._exit(11)\n"
HARMLESS = "import pytest\n\n@pytest.mark.parametrize('number', range(3))\ndef test_one(number):\n    pass\n"


@pytest.mark.parametrize(("deadly", "passed"), [(MANY, 5 + 9), (SINGLE, 9)], ids=["in the middle", "only test"])
def test_run_with_a_dying_process_ends_and_loses_one_test(tmp_path: Path, deadly: str, passed: int) -> None:
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    for name, text in {"a": HARMLESS, "b": HARMLESS, "c": deadly, "d": HARMLESS}.items():
        (tmp_path / f"test_{name}.py").write_text(text)
    options = ["-q", "-n", "2", "--dist", "loadscope", "--no-loadscope-reorder", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *options]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert re.search(rf"1 failed, {passed} passed", ended.stdout), ended.stdout
