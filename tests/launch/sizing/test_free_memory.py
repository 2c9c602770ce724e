"""Free memory inside of a container with a limit and outside of one."""

from pathlib import Path

import psutil
import pytest

from pipeline.launch.sizing.free_memory import free_memory

MIB = 2**20


def write_group(folder: Path, limit: str) -> Path:
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{60 * MIB}\n")
    (folder / "memory.stat").write_text(f"anon {20 * MIB}\nfile {40 * MIB}\ninactive_file {30 * MIB}\n")
    return folder


def test_free_memory_in_a_container_is_what_its_limit_leaves(tmp_path: Path) -> None:
    assert free_memory(write_group(tmp_path, str(100 * MIB))) == 70 * MIB
    assert free_memory(write_group(tmp_path, str(10 * MIB))) == 0


@pytest.mark.parametrize("limit", ["max", str(2**62), ""])
def test_free_memory_without_a_limit_is_that_of_the_machine(tmp_path: Path, limit: str) -> None:
    found = free_memory(write_group(tmp_path, limit))
    assert found == pytest.approx(psutil.virtual_memory().available, rel=0.2)


def test_free_memory_without_a_control_group_is_that_of_the_machine(tmp_path: Path) -> None:
    assert free_memory(tmp_path / "none") > 0
