"""benchmarks/machine_code.py: what it reads out of a disassembly; the real one is read in tests/csrc."""

from dataclasses import replace

import pytest

from benchmarks.machine_code import MachineCode, find_kernel, print_table, row_of

LINES = (
    (0x00, "STL.64 [R1], R8"),
    (0x10, "LDL.64 R4, [R1]"),  # the loop over rows begins
    (0x20, "LDG.E.128.CONSTANT R8, desc[UR4][R2.64]"),
    (0x30, "@P0 LDG.E.U16 R9, desc[UR4][R2.64]"),
    (0x40, "LDS.128 R4, [R5]"),  # the loop over points begins
    (0x50, "@!P1 REDG.E.ADD.F32x4.FTZ.RN.STRONG.GPU desc[UR4][R2.64+0x40], R4"),
    (0x60, "LDL R3, [R1+0x8]"),
    (0x70, "@P2 BRA 0x40"),
    (0x80, "STG.E.EF.128 desc[UR4][R2.64], R4"),
    (0x90, "RED.E.ADD.F32.FTZ.RN.STRONG.GPU [R2], R4"),
    (0xA0, "@P3 BRA 0x10"),
    (0xB0, "EXIT"),
    (0xC0, "BRA 0xc0"),
)
CODE = MachineCode("backward", "bf16", 32, "fused", "sectors", 80, 21504, 16, LINES)


def test_spills_are_counted_by_the_loops_around_them() -> None:
    assert CODE.spills() == [0, 1, 2]
    assert row_of("sm_90", CODE)["in_loops"] == 1


def test_accesses_are_counted_by_kind_and_width() -> None:
    assert CODE.accesses() == {"LDG 128": 1, "LDG 16": 1, "RED 32": 1, "RED 4x32": 1, "STG 128": 1}
    assert CODE.count("LDG.E.128") == 1
    assert CODE.count("REDG.E.ADD.F32x4") == 1  # with a predicate


@pytest.mark.parametrize(
    ("symbol", "name"),
    [
        (
            "_ZN4msda20fast_backward_kernelI13__nv_bfloat16Li4ENS_11FusedPointsIS1_EELb1EEEvNS_8GeometryE",
            "backward bf16 32 fused sectors",
        ),
        (
            "_ZN4msda20fast_backward_kernelIfLi16ENS_11PlainPointsIfEELb0EEEvNS_8GeometryE",
            "backward fp32 64 plain shipped",
        ),
        (
            "_ZN4msda19fast_forward_kernelI6__halfLi16ENS_11FusedPointsIS1_EEEEvNS_8GeometryE",
            "forward fp16 128 fused shipped",
        ),
        (
            "_ZN4msda26specialised_forward_kernelI6__halfLi4ELi512ELi4ELi4EEEvNS_8GeometryE",
            "forward fp16 32 fused specialised 512",
        ),
    ],
)
def test_find_kernel_reads_type_channels_and_variant_out_of_a_symbol(symbol: str, name: str) -> None:
    found = find_kernel(symbol)
    assert found is not None
    assert replace(CODE, **found).name == name


def test_find_kernel_ignores_others() -> None:
    assert find_kernel("_ZN4msda14forward_kernelIfLi8EEEvNS_8GeometryE") is None


def test_table_names_kernel_and_widths(capsys: pytest.CaptureFixture[str]) -> None:
    print_table([row_of("sm_90", CODE)])
    line = capsys.readouterr().out.splitlines()[-1]
    assert line == (
        "| backward bf16 32 fused sectors | sm_90 | 80 | 21504 | 16 | 3 (1) | 1 of 128, 1 of 16 | 1 of 128 "
        "| 1 of 32, 1 of 4x32 |"
    )
