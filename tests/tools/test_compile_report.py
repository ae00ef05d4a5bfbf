"""Every kernel, compiled ahead of time for four targets; no GPU is needed.

The compiler cannot run in a process whose triton interprets, so one subprocess compiles all.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parent.parent.parent
TARGETS = ["sm_80", "sm_90", "sm_100", "gfx942"]
KNOWN_SPILLS = {
    ("sm_80", "disentangled d=64 packed", "_attention_backward_keys"),
    ("sm_100", "attention d=64 all", "_attention_slope_gradient"),
    ("sm_100", "attention d=64 packed", "_attention_backward_queries"),
    ("sm_100", "attention d=128 value dim 32", "_attention_backward_keys"),
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    path = tmp_path_factory.mktemp("compile") / "rows.json"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    roots = [str(ROOT / "python"), str(ROOT / "kernels"), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(roots)
    command = [sys.executable, "-m", "fusedformer", "compile-report", "--quick"]
    result = subprocess.run(
        [*command, "--json", str(path)], env=environment, capture_output=True, text=True
    )
    assert path.exists(), result.stderr[-2000:]
    return list(json.loads(path.read_text()))


@pytest.mark.parametrize("target", TARGETS)
def test_nothing_falls_short(rows: list[dict[str, Any]], target: str) -> None:
    """All compile and fit in shared memory; on sm_90 nothing spills; products use tensor cores."""
    mine = [row for row in rows if row["target"] == target]
    assert mine
    short = [
        f"{row['case']} {row['dtype']} {row['kernel']}: {row['faults']}"
        for row in mine
        if row["faults"]
    ]
    assert not short, "\n".join(short)


def test_core_cases_spill_nowhere_else(rows: list[dict[str, Any]]) -> None:
    """On NVIDIA's other GPUs as on sm_90, but for what is known: a few instructions each."""
    spilling = {
        (row["target"], row["case"], row["kernel"]): row["facts"]["spills"]
        for row in rows
        if row["target"] in ("sm_80", "sm_100") and row["facts"]["spills"]
    }
    assert set(spilling) <= KNOWN_SPILLS, spilling
    assert max(spilling.values(), default=0) <= 10


@pytest.mark.parametrize("target", TARGETS)
def test_no_kernel_is_left_out(rows: list[dict[str, Any]], target: str) -> None:
    """Whatever is launched anywhere in the kernel package is in the report."""
    launched = set()
    for path in (ROOT / "kernels/fusedformer_kernels").rglob("*.py"):
        launched |= set(re.findall(r"launch\(\s*(_\w+)", path.read_text()))
    assert len(launched) > 8
    if target == "gfx942":
        launched -= {"_clear_query_sums", "_store_query_sums"}  # of one pass, on NVIDIA's alone
    if target != "sm_90":
        launched.remove("_attention_forward_specialized")
    assert launched <= {row["kernel"] for row in rows if row["target"] == target}


def test_attention_is_not_serialized_on_hopper(rows: list[dict[str, Any]]) -> None:
    """As many waits as products would mean that ptxas gave up overlapping them."""
    plain = [
        row["facts"]
        for row in rows
        if row["target"] == "sm_90"
        and re.fullmatch(
            r"attention d=(64|128)( causal| one pass| specialized(, causal)?)?", row["case"]
        )
        and row["dtype"] in ("bfloat16", "float16")
        and re.match(r"_attention_(forward|backward)", row["kernel"])
    ]
    assert len(plain) >= 13
    for facts in plain:
        assert facts["waits"] < facts["tensor_core_count"] / 2, facts
