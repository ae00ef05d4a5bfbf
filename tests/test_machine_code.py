"""What is read from machine code, on made-up listings, and the predictions made of it."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from fusedformer_kernels.compiler import ahead_of_time
from fusedformer_kernels.compiler.ahead_of_time import Compiled
from fusedformer_kernels.compiler.machine_code import (
    main_loop,
    mix_outside,
    programs_per_multiprocessor,
)
from fusedformer_kernels.compiler.prediction import Gpu, predict
from fusedformer_kernels.rows.contrastive import row_and_column_lse
from fusedformer_kernels.rows.norm import norm_forward
from fusedformer_kernels.rows.softmax import softmax_forward
from fusedformer_kernels.runtime.configs import TARGETS, assume_target
from fusedformer_kernels.runtime.launch import Launch, recorded_launches

LISTING = """
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
.L_x_0:
        /*0020*/                   HGMMA.64x128x16.F32 R24, gdesc[UR8], RZ, !UPT ;
        /*0030*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0040*/              @!P0 MUFU.EX2 R5, R5 ;
        /*0050*/                   FFMA R5, R5, R6, R7 ;
        /*0060*/                   FMNMX R5, R5, R6, !PT ;
        /*0070*/                   LDGSTS.E.BYPASS.128 [R4], desc[UR4][R2.64] ;
        /*0080*/               @P0 BRA `(.L_x_0) ;
.L_x_1:
        /*0090*/                   HGMMA.64x128x16.F32 R24, gdesc[UR8], RZ, !UPT ;
        /*00a0*/                   FSEL R5, R5, R6, P1 ;
        /*00b0*/                   FSEL R6, R5, R6, P1 ;
        /*00c0*/                   ISETP.GE.AND P1, PT, R5, R6, PT ;
        /*00d0*/                   F2FP.BF16.F32.PACK_AB R5, R5, R6 ;
        /*00e0*/                   STG.E.128 desc[UR4][R2.64], R4 ;
        /*00f0*/                   IMAD R5, R5, R6, R7 ;
        /*0100*/               @P1 BRA `(.L_x_1) ;
.L_x_2:
        /*0110*/                   BRA `(.L_x_2);
"""


def test_the_main_loop_is_the_shortest_with_most_products() -> None:
    mix = main_loop(LISTING)
    assert mix.in_loop
    assert mix.counts == {
        "product": 1, "exp2": 1, "fma": 1, "alu": 1, "load": 1, "wait": 1, "control": 1,
    }  # fmt: skip
    assert mix.product_flops == 2 * 64 * 128 * 16
    assert mix.loaded_bytes == 16 * 32
    cycles = mix.cycles(num_warps=8)
    assert cycles["product"] == 2 * 64  # two warp groups, 64 clocks each
    assert cycles["exp2"] == 16  # 8 warps of 32 over 16 lanes
    assert cycles["issue"] == 14


def test_around_the_main_loop_is_all_else() -> None:
    mix = mix_outside(LISTING, main_loop(LISTING))
    assert {name: n for name, n in mix.counts.items() if n} == {
        "load": 1, "product": 1, "alu": 3, "convert": 1, "store": 1, "fma": 1, "control": 2,
    }  # fmt: skip
    assert mix.loaded_bytes == 16 * 32
    assert mix.cycles(num_warps=8)["alu"] == 12


def test_without_a_loop_all_the_code_counts() -> None:
    mix = main_loop(LISTING.splitlines()[1])
    assert not mix.in_loop
    assert mix.counts == {"load": 1}


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "programs"),
    [(128, 65536, 8, 2), (129, 0, 8, 1), (32, 0, 4, 16), (16, 0, 1, 32), (40, 112 * 1024, 4, 2)],
)
def test_programs_of_an_sm(registers: int, shared: int, warps: int, programs: int) -> None:
    assert programs_per_multiprocessor(registers, shared, warps) == programs


def _softmax_launch() -> Launch:
    x = torch.empty(32768, 1024, dtype=torch.bfloat16, device="meta")
    with assume_target(TARGETS["sm_90"]), recorded_launches(run=False) as launches:
        softmax_forward(x, None, 1.0, False, x.dtype, False)
    return launches[0]


def test_a_prediction_names_its_limit() -> None:
    launch = _softmax_launch()
    compiled = Compiled(
        40, 0, 0, "", 0, 0, 0, 0, 0.0, programs=10, cycles={"issue": 100.0}, loaded_bytes=8192
    )
    found = predict(launch, compiled)
    assert found.limit == "memory"
    assert found.microseconds == pytest.approx(2 * 32768 * 1024 * 2 / 4.3e12 * 1e6)
    busy = predict(launch, dataclasses.replace(compiled, cycles={"issue": 1000.0}))
    assert busy.limit == "issue"
    assert busy.microseconds == pytest.approx(8192 / 132 * 1000 / 1.755e3)
    assert predict(launch, dataclasses.replace(compiled, programs=1)).limit == "latency"
    assert predict(launch, compiled, Gpu(l2_bytes=1e12)).limit == "L2"


def test_a_prediction_counts_tensors_that_kernels_get_in_tuples() -> None:
    x = torch.empty(32768, 1024, dtype=torch.bfloat16, device="meta")
    with assume_target(TARGETS["sm_90"]), recorded_launches(run=False) as launches:
        norm_forward(x, None, None, x[0], x[0].clone(), None, 0.0, 1e-5, "layer", 1, False, False)
    compiled = Compiled(40, 0, 0, "", 0, 0, 0, 0, 0.0, programs=10, cycles={"issue": 1.0})
    moved = 2 * (2 * x.numel() + 2 * 1024)
    assert predict(launches[0], compiled).memory == pytest.approx(moved / 4.3e12 * 1e6)


def test_a_lone_program_multiplies_and_then_takes_exponents() -> None:
    launch = _softmax_launch()
    cycles = {"product": 830.0, "exp2": 1000.0}
    compiled = Compiled(40, 0, 0, "", 0, 0, 0, 0, 0.0, programs=1, cycles=cycles)
    alone = predict(launch, compiled)
    two = predict(launch, dataclasses.replace(compiled, programs=2))
    assert alone.limit == "products then softmax"
    assert alone.units == pytest.approx(2 * two.units)


def test_what_is_compiled_once_is_one_kernel_of_one_target_and_launch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done: list[object] = []
    names = iter("aaaab")
    monkeypatch.setattr(ahead_of_time, "_compiled", {})

    def compile(*given: object) -> int:
        done.append(given)
        return len(done)

    monkeypatch.setattr(ahead_of_time, "_compile", compile)
    monkeypatch.setattr(
        ahead_of_time, "ast_source", lambda launch: SimpleNamespace(hash=lambda: next(names))
    )
    launch, wider = _softmax_launch(), dataclasses.replace(_softmax_launch().config, num_warps=16)
    calls = [(launch, "sm_90"), (launch, "sm_90"), (launch, "sm_80")]
    calls += [(dataclasses.replace(launch, config=wider), "sm_90"), (launch, "sm_90")]
    found: list[Any] = [
        ahead_of_time.compile_launch(call, TARGETS[target]) for call, target in calls
    ]
    assert found == [1, 1, 2, 3, 4]


def test_a_tile_of_pairs_is_its_products_and_then_what_is_done_with_them() -> None:
    x, scale = torch.empty(8192, 512, device="meta").bfloat16(), torch.empty((), device="meta")
    with assume_target(TARGETS["sm_90"]), recorded_launches(run=False) as launches:
        row_and_column_lse(x, x, scale, 0)
    tiles, passes = 32 * 64, 8  # of 256 x 128 scores, 64 dimensions at a time
    given: dict[str, Any] = {
        "cycles": {"product": 830.0, "issue": 100.0}, "outside": {"issue": 4000.0},
    }  # fmt: skip
    compiled = Compiled(255, 0, 0, "", 0, 0, 0, 0, 0.0, programs=1, loops=True, **given)
    alone = predict(launches[0], compiled)
    assert alone.units == pytest.approx(tiles / 132 * (1000 * passes + 4000) / 1.755e3)
    assert alone.limit == "products then issue"
    two = predict(launches[0], dataclasses.replace(compiled, programs=2))
    assert two.units == pytest.approx(tiles / 132 * 1000 * passes / 1.755e3)


@pytest.mark.parametrize("case", ["softmax masked softmax", "relative bias B=128 H=8 S=128 d=128"])
def test_predictions_of_the_benchmark_are_near_above_its_floors(case: str) -> None:
    script = Path(__file__).parents[1] / "benchmarks/model/predictions.py"
    compiling = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    ran = subprocess.run(
        [sys.executable, script, "--case", case], capture_output=True, text=True, check=True,
        env=compiling,
    )  # fmt: skip
    rows = ran.stdout.splitlines()
    assert [row.split(" | ")[2] for row in rows] == ["forward", "backward"]
    for row in rows:
        assert 1.0 <= float(row.split(" | ")[4]) < 6.0, row
