"""The parity command: what it runs, what it finds, how it ends."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fusedformer import functional, parity
from fusedformer._internal import backend as backends
from fusedformer.parity.cases import Case, all_cases

CPU = torch.device("cpu")
CASES = {f"{case.op.name}, {case.name}": case for case in all_cases()}


def test_every_public_op_is_there_also_with_quick() -> None:
    names = set(functional.__all__)
    assert {case.op.name for case in all_cases()} == names
    assert {case.op.name for case in all_cases() if case.quick} == names
    assert len(CASES) == len(all_cases())  # no two by one name


@pytest.mark.parametrize("name", CASES)
def test_the_aten_backend_passes(name: str) -> None:
    with backends.backend("torch"):
        for record in parity.run_case(CASES[name], torch.float32, CPU):
            assert record["passed"], record["fault"]


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.quick])
def test_a_result_that_is_off_fails(name: str) -> None:
    case = CASES[name]

    def off(**arguments: Any) -> Any:
        found = case.op.candidate(**arguments)
        off_by = 1 + 1e-3  # the gradients are off as well
        return tuple(t * off_by for t in found) if isinstance(found, tuple) else found * off_by

    op = dataclasses.replace(case.op, candidate=off)
    with backends.backend("torch"):
        records = parity.run_case(dataclasses.replace(case, op=op), torch.float32, CPU)
    assert not any(record["passed"] for record in records)
    assert parity.share_of_limit(records[0]) == math.inf


def test_each_gradient_is_compared() -> None:
    case = CASES["scaled_dot_product_attention, broadcast additive mask"]
    with backends.backend("torch"):
        found = [r["tensor"] for r in parity.run_case(case, torch.float32, CPU)]
    wanted = ("query", "key", "value", "attn_mask")
    assert found == ["output 0", *(f"grad of {name}" for name in wanted)]


def test_the_command_writes_its_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, page = tmp_path / "parity.json", tmp_path / "parity.html"
    options = ["--backend", "torch", "--quick", "--dtype", "float32", "bfloat16"]
    assert parity.main([*options, "--json", str(out), "--html", str(page)]) == 0
    assert "scaled_dot_product_attention" in page.read_text()
    result = json.loads(out.read_text())
    assert result["passed"]
    assert result["backend"] == "torch"
    records = result["records"]
    assert {record["dtype"] for record in records} == {"float32", "bfloat16"}
    assert f"{len(records)} of {len(records)} tensors pass" in capsys.readouterr().out
    worst = parity.worst_of(records)
    assert sum(group["tensors"] for group in worst) == len(records)
    assert all(group["passed"] == group["tensors"] for group in worst)


def test_a_failure_is_the_exit_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    case = CASES["dropout_add, bias and residual"]
    op = dataclasses.replace(case.op, candidate=lambda input, residual, input_bias: residual + 0.0
                             * (input + input_bias))  # fmt: skip
    broken: list[Case] = [dataclasses.replace(case, op=op)]
    monkeypatch.setattr("fusedformer.parity.run.all_cases", lambda: broken)
    assert parity.main(["--backend", "torch", "--dtype", "float32"]) == 1
    assert "FAILED dropout_add, bias and residual, float32" in capsys.readouterr().out


def test_without_a_gpu_the_kernels_run_interpreted_in_another_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[Any] = []

    class Done:
        returncode = 7

    def run(command: list[str], env: dict[str, str]) -> Done:
        seen.append((command, env["TRITON_INTERPRET"]))
        return Done()

    monkeypatch.setattr("fusedformer.parity.command.subprocess.run", run)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(backends, "INTERPRETER_IS_ON", False)
    monkeypatch.setattr(backends, "TRITON_IS_INSTALLED", True)
    assert parity.main(["--backend", "triton", "--quick"]) == 7
    command = [sys.executable, "-m", "fusedformer", "parity", "--backend", "triton", "--quick"]
    assert seen == [(command, "1")]
