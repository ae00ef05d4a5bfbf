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

from fusedformer_kernels.attention.backward import attention_backward
from fusedformer_kernels.attention.forward import attention_forward
from fusedformer_kernels.attention.terms import OF_HEADS_ALONE, AttentionTerms
from fusedformer_kernels.compiler import ahead_of_time
from fusedformer_kernels.compiler.ahead_of_time import Compiled
from fusedformer_kernels.compiler.machine_code import (
    inner_loops,
    main_loop,
    programs_per_multiprocessor,
)
from fusedformer_kernels.compiler.prediction import Factors, demand_of, parts_us, predict
from fusedformer_kernels.compiler.waits import CAUSES, UNITS, Work, work_of
from fusedformer_kernels.rows.contrastive import row_and_column_lse
from fusedformer_kernels.rows.norm import norm_forward
from fusedformer_kernels.rows.softmax import softmax_forward
from fusedformer_kernels.runtime.launch import Launch, recorded_launches
from fusedformer_kernels.runtime.targets import TARGETS, assume_target

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


def test_without_a_loop_all_the_code_counts() -> None:
    mix = main_loop(LISTING.splitlines()[1])
    assert not mix.in_loop
    assert mix.counts == {"load": 1}


def test_a_wait_for_another_program_is_no_loop() -> None:
    """It is a part of the loop around it, and ends at once if that program is done."""
    wait = """
.L_x_3:
        /*0051*/                   LDG.E.STRONG.GPU R9, desc[UR4][R2.64] ;
        /*0052*/                   ISETP.GE.AND P2, PT, R9, R8, PT ;
        /*0053*/              @!P2 BRA `(.L_x_3) ;
"""
    around = LISTING.replace("        /*0060*/", f"{wait.strip(chr(10))}\n        /*0060*/", 1)
    found = [
        [lines[a] for a, _ in inner_loops(lines)]
        for lines in map(str.splitlines, (LISTING, around))
    ]
    assert found == [[".L_x_0:", ".L_x_1:"]] * 2


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


def _compiled(programs: int, *, loops: bool = False, **work: dict[str, float]) -> Compiled:
    """A kernel whose program does this once, or in each pass: clocks by cause, units of an SM."""
    clocks = {**dict.fromkeys(CAUSES, 0.0), **work.get("clocks", {})}
    found = Work(clocks, {**dict.fromkeys(UNITS, 0.0), **work.get("units", {})})
    a_pass, once = (found, Work()) if loops else (Work(), found)
    return Compiled(
        40, 0, 0, "", 0, 0, 0, 0, 0.0, programs=programs, loops=loops, a_pass=a_pass, once=once
    )


def test_a_prediction_is_the_larger_of_memory_and_running_and_names_it() -> None:
    launch, launching = _softmax_launch(), Factors().launch
    idle = predict(launch, _compiled(10))
    assert idle.limit == "memory"
    moved = 2 * 32768 * 1024 * 2
    assert idle.microseconds == pytest.approx(moved / 4.243e12 * 1e6 + launching, rel=1e-3)
    busy = predict(launch, _compiled(10, units={"issue": 10000.0}))
    assert busy.limit == "issue"
    assert busy.microseconds == pytest.approx(8192 / 132 * 10000 / 1.755e3 + launching, rel=1e-3)
    assert predict(launch, _compiled(1, clocks={"barrier": 1e5})).limit == "a program's barrier"


def test_programs_of_an_sm_wait_at_the_same_time() -> None:
    launch = _softmax_launch()
    alone, two = (
        parts_us(demand_of(launch, _compiled(n, clocks={"memory": 1e4})), Factors())[0]
        for n in (1, 2)
    )
    assert alone == pytest.approx(63 * Factors().memory * 1e4 / 1.755e3)  # 8192 programs, 132 SMs
    assert alone == pytest.approx(2 * two)


def test_a_prediction_counts_tensors_that_kernels_get_in_tuples() -> None:
    x = torch.empty(32768, 1024, dtype=torch.bfloat16, device="meta")
    with assume_target(TARGETS["sm_90"]), recorded_launches(run=False) as launches:
        norm_forward(x, None, None, x[0], x[0].clone(), None, 0.0, 1e-5, "layer", 1, False, False)
    assert demand_of(launches[0], _compiled(10)).bytes == 2 * (2 * x.numel() + 2 * 1024)


def test_passes_of_the_loop_are_those_of_one_program() -> None:
    x, scale = torch.empty(8192, 512, device="meta").bfloat16(), torch.empty((), device="meta")
    query = torch.empty(2, 16, 1, 64, device="meta").bfloat16()
    key = torch.empty(2, 16, 8192, 64, device="meta").bfloat16()
    long = torch.empty(256, 131072, device="meta").bfloat16()
    with assume_target(TARGETS["sm_90"]), recorded_launches(run=False) as launches:
        row_and_column_lse(x, x, scale, 0)  # 64 dimensions of 512 at a time
        attention_forward(query, key, key, AttentionTerms(scale=1.0))  # splits of 512 keys
        softmax_forward(long, None, 1.0, False, long.dtype, False)  # chunks of 16,384 columns
    compiled = _compiled(1, loops=True, clocks={"issue": 1.0})
    found = {each.name: demand_of(each, compiled).clocks["issue"] for each in launches}
    assert found["_score_parts"] == 8
    assert (found["_attention_forward"], found["_merge_splits"]) == (8, 16)
    assert found["_long_softmax_forward"] == 8
    (forward,) = (each for each in launches if each.name == "_attention_forward")
    pairs = 2.0 * 16 * 8192  # of one query each, whatever the tile's rows
    assert demand_of(forward, compiled, pairs).clocks["issue"] == 8


def test_passes_over_parts_of_dq_are_those_of_one_query() -> None:
    """Whether the pairs are known or not, and however few of a tile's rows are queries."""
    key = torch.empty(2, 16, 8192, 64, device="meta").bfloat16()
    for queries in (1, 16):
        query = torch.empty(2, 16, queries, 64, device="meta").bfloat16()
        terms = AttentionTerms(scale=1.0)
        with assume_target(TARGETS["sm_90"]), recorded_launches(run=False) as launches:
            output, _, statistics = attention_forward(query, key, key, terms)
            given = query, key, key, output, statistics, terms, OF_HEADS_ALONE
            attention_backward(output, None, *given)
        last = launches[-1]
        assert last.name == "_sum_query_parts"
        compiled = _compiled(1, loops=True, clocks={"issue": 1.0})
        for pairs in (None, 2.0 * 16 * 8192 * queries):
            found = demand_of(last, compiled, pairs).clocks["issue"]
            assert found * last.arguments["BLOCK_N"] * last.arguments["BLOCK_P"] == 8192


# Two lines an instruction, as nvdisasm writes with -hex: the second has ptxas' bits. Stalls of 4;
# the load, the exponential and the copy lower counter 0, for which the next instruction waits.
def _timed(*lines: tuple[str, int, int]) -> str:
    code = []
    for text, counter, waits in lines:
        bits = 4 | counter << 5 | 7 << 8 | waits << 11
        code += [f"        /*0000*/                   {text} ;  /* 0x{0:016x} */"]
        code += [f"                                                 /* 0x{bits << 41:016x} */"]
    return "\n".join([*code, ""])


def test_waits_are_put_down_to_what_was_waited_for() -> None:
    code = _timed(
        ("LDG.E.128 R4, desc[UR4][R2.64]", 0, 0), ("FADD R4, R4, R5", 7, 1),
        ("MUFU.EX2 R4, R4", 1, 0), ("FADD R4, R4, R5", 7, 2), ("BAR.SYNC 0x0", 7, 0),
        ("HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, gsb0", 7, 0),
        ("WARPGROUP.DEPBAR.LE gsb0, 0x0", 7, 0), ("EXIT", 7, 0),
    )  # fmt: skip
    loop, once = work_of(code, num_warps=4)
    assert not any(loop.clocks.values())
    assert once.clocks["memory"] == 600 - 4
    assert once.clocks["special"] == 8 + 24 - 4  # 32 lanes, 4 a clock
    assert once.clocks["barrier"] == 30
    assert once.clocks["product"] == 64 + 32 - 4  # of 128 columns two a clock
    assert once.clocks["issue"] == 8 * 4
    assert once.units["issue"] == 8 and once.loaded_bytes == 4 * 32 * 16
    wider = work_of(code, num_warps=32)[1]
    assert wider.clocks["issue"] == 8 * 8  # eight warps of a scheduler take turns


def test_copies_of_earlier_passes_are_there_by_now() -> None:
    """Two groups are in flight: two passes take the latency and the instructions of one."""
    body = [("LDGDEPBAR", 7, 0), ("DEPBAR.LE SB0, 0x1", 7, 0)]
    body += [("HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24", 7, 0)]
    work = [(f"FADD R{i}, R4, R5", 7, 0) for i in range(50)]
    start, end = ".L_x_0:\n", "        /*0010*/              @P0 BRA `(.L_x_0) ;\n"
    for rest in ([], work):
        issued = 4 * len(body + rest)
        loop, _ = work_of(start + _timed(*body, *rest) + end, num_warps=4)
        assert loop.clocks["cache"] == (600 - 4 - issued) / 2
        assert loop.clocks["memory"] == 0


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
        # Relative biases were measured at nine times the floor.
        assert 1.0 <= float(row.split(" | ")[4]) < 12.0, row
