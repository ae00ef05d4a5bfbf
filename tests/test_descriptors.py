"""The check that wgmma gets its descriptors: on listings, and on code that ptxas gets wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from fusedformer_kernels.compiler.descriptors import wrong_descriptors

ROOT = Path(__file__).parent.parent
PRODUCT = "HGMMA.64x16x16.F32.BF16 R56, R64, gdesc[UR24].tnspB, R56"
FROM_SHARED = "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR24], RZ, !UPT"


def listing(*lines: str) -> str:
    """What nvdisasm would write; a line that ends in a colon is a label."""
    return "\n".join(
        line if line.endswith(":") else f"        /*{at * 16:04x}*/                   {line} ;"
        for at, line in enumerate(lines)
    )


RIGHT = {
    "constant": ["UMOV UR27, 0xc0000010", PRODUCT],
    "step from a base": [
        "UMOV UR4, URZ", "USGXT.U32 UR34, UR21, 0xe", "UIADD3 UR26, UP0, UR34, 0x20, URZ",
        "UIADD3.X UR27, UR4, -0x3ffffff0, URZ, UP0, !UPT", PRODUCT,
    ],
    "64-bit step": ["UMOV UR11, 0x40000040", "UIADD3.64 UR26, UR10, 0x2, URZ", PRODUCT],
    "kept in vector registers": [
        "UMOV UR5, 0x80000020", "IMAD.U32 R161, RZ, RZ, UR5", "R2UR UR27, R161", PRODUCT,
    ],
    "swapped": [
        "UMOV UR26, 0xc0000010", "R2UR UR27, R3", "ULOP3.LUT UR27, UR27, UR26, URZ, 0x3c, !UPT",
        "ULOP3.LUT UR26, UR27, UR26, URZ, 0x3c, !UPT",
        "ULOP3.LUT UR27, UR27, UR26, URZ, 0x3c, !UPT", PRODUCT,
    ],
    "zeroed pair": ["CS2R R24, SRZ", "IADD3.X R25, R25, 0x40000040, RZ, P0, !PT", "R2UR UR27, R25",
                    PRODUCT],
    "round a loop": [
        "UMOV UR27, 0xc0000010", ".L_x_1:", PRODUCT, "UIADD3 UR26, UR26, 0x20, URZ",
        "@P0 BRA `(.L_x_1)", "EXIT",
    ],
    "either way": [
        "@P0 BRA `(.L_x_1)", "UMOV UR27, 0xc0000010", "BRA `(.L_x_2)", ".L_x_1:",
        "UMOV UR27, 0xc0000010", ".L_x_2:", PRODUCT,
    ],
    "both from shared memory": ["UMOV UR25, 0x40000040", "UMOV UR27, 0x40000040", FROM_SHARED],
}  # fmt: skip

WRONG = {
    "nobody wrote it": ["UIADD3.X UR27, UR27, -0x3ffffff0, URZ, UP0, !UPT", PRODUCT],
    "left by another loop": [
        "UMOV UR27, 0xc0000010", ".L_x_1:", PRODUCT, "R2UR UR27, R3", "UMOV UR27, 0xc0000010",
        "@P0 BRA `(.L_x_1)", "R2UR UR27, R3", "UIADD3.X UR27, UR27, -0x3ffffff0, URZ, UP0, !UPT",
        PRODUCT,
    ],
    "on one way alone": ["@P0 BRA `(.L_x_1)", "UMOV UR27, 0xc0000010", ".L_x_1:", PRODUCT],
    "by a predicate": ["@P0 UMOV UR27, 0xc0000010", PRODUCT],
    "overwritten": ["UMOV UR27, 0xc0000010", "ULDC.64 UR26, c[0x0][0x218]", PRODUCT],
    "in a register that a product writes": [
        "UMOV UR5, 0x80000020", "IMAD.U32 R60, RZ, RZ, UR5", "UMOV UR27, 0x80000020", PRODUCT,
        "R2UR UR27, R60", PRODUCT,
    ],
    "the first of two": ["UMOV UR27, 0x40000040", FROM_SHARED],
}  # fmt: skip


@pytest.mark.parametrize("name", RIGHT)
def test_what_is_right(name: str) -> None:
    assert wrong_descriptors(listing(*RIGHT[name])) == []


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong(name: str) -> None:
    found = wrong_descriptors(listing(*WRONG[name]))
    assert found and all("HGMMA" in text and "UR2" in text for text in found)


PROGRAM = """
import torch
from dataclasses import replace
from fusedformer_kernels.compiler import compile_cases
from fusedformer_kernels.compiler.ahead_of_time import compile_launch
from fusedformer_kernels.runtime.targets import TARGETS, assume_target
from fusedformer_kernels.runtime.launch import recorded_launches

target = TARGETS["sm_90"]
for case in compile_cases.compile_cases():
    if case.name in ("attention d=64 value dim 16", "attention d=128 value dim 32"):
        with assume_target(target), recorded_launches(run=False) as launches:
            case.call()
        forward = next(each for each in launches if each.name == "_attention_forward")
        narrow = int(case.name.split()[-1])
        for block_dv in (forward.arguments["BLOCK_DV"], narrow):
            arguments = {**forward.arguments, "BLOCK_DV": block_dv}
            found = compile_launch(replace(forward, arguments=arguments), target)
            print(case.name, block_dv == narrow, bool(found.wrong_descriptors))
"""


def test_tiles_of_two_swizzles_are_wrong_and_ours_are_right() -> None:
    """By the machine code; an H200 gave outputs 40 to 100% off for the narrow tiles."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT / "python", ROOT / "kernels")))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines() == [
        f"attention d={dims} {narrow} {narrow}"
        for dims in ("64 value dim 16", "128 value dim 32")
        for narrow in (False, True)
    ]
