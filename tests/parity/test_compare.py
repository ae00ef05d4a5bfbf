"""The parity tool on functions and modules, right ones and ones with a planted fault."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fusedformer
from fusedformer import backend, parity
from fusedformer.testing import ParityError

D = 16
KEEP = torch.arange(9) < torch.tensor([9, 3, 6])[:, None]


@pytest.fixture(autouse=True)
def _torch_backend() -> Any:
    with backend("torch"):
        yield


def _stack(norm_first: bool = False) -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(D, 2, 32, batch_first=True, norm_first=norm_first)
    stack = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).eval()
    with torch.no_grad():
        for parameter in stack.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return stack


def _inputs(**changes: Any) -> dict[str, Any]:
    src = torch.randn(*KEEP.shape, D, generator=torch.Generator().manual_seed(3))
    return {"src": src.requires_grad_(), "src_key_padding_mask": ~KEEP, **changes}


def _fused(stock: nn.Module) -> nn.Module:
    fused = copy.deepcopy(stock)
    fusedformer.fuse(fused)
    return fused


@pytest.mark.parametrize("norm_first", [False, True])
def test_a_fused_stack_passes(norm_first: bool, tmp_path: Path) -> None:
    stock = _stack(norm_first)
    report = parity.compare(_fused(stock), stock, _inputs(), where=KEEP)
    assert report.passed and report.first_drift is None, str(report)
    assert [row.name for row in report.of("output")] == ["output"]
    gradients = {row.name.partition(" (")[0] for row in report.of("gradient")}
    assert gradients == {"src", *dict(stock.named_parameters())}
    names = [row.name for row in report.of("submodule")]
    # In the order in which they finish: what is within a layer before the layer.
    assert names.index("layers.0.norm1") < names.index("layers.0") < names.index("layers.1.linear1")
    assert set(names) | set(report.not_called) >= {f"layers.{i}" for i in range(3)}
    assert "PASS: " in str(report) and "layers.2" in str(report)

    report.save(tmp_path / "parity.json")
    saved = json.loads((tmp_path / "parity.json").read_text())
    assert saved["passed"] is True and len(saved["rows"]) == len(report.rows)
    row = next(r for r in saved["rows"] if r["kind"] == "output")
    assert 0 < row["error"] < 1e-5 and row["max_ulp"] > 0 and 0 <= row["cosine_loss"] < 1e-10
    assert row["shape"] == [int(KEEP.sum()), D]  # real tokens alone
    pytest.importorskip("matplotlib")
    report.plot(tmp_path / "growth.svg")
    report.html(tmp_path / "parity.html")
    assert "<svg" in (tmp_path / "growth.svg").read_text()
    page = (tmp_path / "parity.html").read_text()
    assert "PASS" in page and "image/svg+xml" in page and "<script" not in page


def test_the_first_submodule_that_drifts_is_named() -> None:
    stock = _stack()
    wrong = _fused(stock)
    wrong.get_submodule("layers.1.norm1").eps = 1e-2  # type: ignore[assignment]
    report = parity.compare(wrong, stock, _inputs(), where=KEEP)
    assert not report.passed and report.first_drift is not None
    assert report.first_drift.name == "layers.1.norm1"
    assert "the first submodule that drifts faster" in str(report) and "FAILED" in str(report)
    with pytest.raises(ParityError) as raised:
        parity.assert_parity(wrong, stock, _inputs(), where=KEEP)
    said = str(raised.value)
    assert re.search(r"output\(\d+, \d+\): got [-\d.e]+, stock [-\d.e]+, truth", said)
    assert "times the limit" in said and "drifts is layers.1.norm1" in said


FAULTS: dict[str, Callable[[Tensor], Any]] = {
    "all zero": lambda x: x * 0.0,
    "half precision within": lambda x: F.gelu(x.half()).float(),
    "wrong gradient": lambda x: F.gelu(x.detach()) + 0.0 * x,
    "one element": lambda x: F.gelu(x) + 1e-3 * F.one_hot(torch.tensor(4), x.shape[-1]),
    "nothing returned": lambda x: {},
    "another shape": lambda x: F.gelu(x)[:1],
    "writes to its input": lambda x: (F.gelu(x), x.detach().zero_())[0],
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_function_with_a_fault_fails(fault: str) -> None:
    x = torch.randn(5, 16, requires_grad=True)
    assert parity.compare(lambda x: F.gelu(x), F.gelu, x).passed
    report = parity.compare(FAULTS[fault], lambda x: F.gelu(x), x)
    assert not report.passed and "FAIL" in str(report)


def test_outputs_of_every_form_and_a_truth_of_ones_own() -> None:
    def function(x: Tensor, scale: float) -> Any:
        return {"a": x * scale, "parts": (x.exp(), [x.sin()]), "ids": x.argmax()}

    def doubled(x: Tensor, scale: float) -> Any:
        assert x.dtype == torch.float64
        return function(x, scale)

    inputs = [torch.randn(4, 4, requires_grad=True), 3.0]
    report = parity.compare(function, function, inputs, truth=doubled)
    assert [r.name for r in report.of("output")] == [
        "output.a", "output.parts[0]", "output.parts[1][0]"
    ]  # fmt: skip
    assert [r.name for r in report.of("gradient")] == ["argument 0 (8 draws)"]
    assert report.passed and not parity.compare(function, function, inputs, gradients=False).of(
        "gradient"
    )


def test_what_has_no_gradient_but_rounding_is_not_judged() -> None:
    """A bias of all scores of a row cancels in softmax."""
    bias = torch.randn(6, 1, requires_grad=True)
    scores = torch.randn(6, 8)
    function = lambda bias: torch.softmax(scores.to(bias) + bias, 1)
    report = parity.compare(function, function, bias)
    assert report.passed and [r.judged for r in report.of("gradient")] == [False]
    assert "1 not judged" in str(report)


def test_bad_calls_say_what_is_wrong() -> None:
    stock, other = _stack(), _stack()
    with torch.no_grad():
        next(other.parameters()).add_(1.0)
    cases: list[tuple[type[Exception], str, Callable[[], object]]] = [
        (TypeError, "'candidate' to be a function or a Module, but got int",
         lambda: parity.compare(3, stock, _inputs())),  # type: ignore[arg-type]
        (TypeError, "'inputs' to be a Tensor", lambda: parity.compare(stock, stock, 3)),
        (ValueError, "equal parameters", lambda: parity.compare(stock, other, _inputs())),
        (ValueError, "in one alone", lambda: parity.compare(stock, nn.Linear(2, 2), _inputs())),
        (ValueError, "draws random numbers",
         lambda: parity.compare(stock, copy.deepcopy(stock).train(), _inputs())),
        (ValueError, "'truth' to be 'float64'",
         lambda: parity.compare(stock, stock, _inputs(), truth="float32")),
        (ValueError, "'draws' to be positive",
         lambda: parity.compare(stock, stock, _inputs(), draws=0)),
    ]  # fmt: skip
    for error, message, bad in cases:
        with pytest.raises(error, match=message):
            bad()


def test_the_models_are_left_as_they_were() -> None:
    stock = _stack()
    fused = _fused(stock)
    before = {n: t.clone() for n, t in fused.state_dict().items()}
    parity.compare(fused, stock, _inputs(), where=KEEP)
    assert all(torch.equal(t, before[n]) for n, t in fused.state_dict().items())
    assert not any(m._forward_hooks for m in (*fused.modules(), *stock.modules()))
    assert all(p.grad is None for p in fused.parameters())


def test_the_fixture_in_a_suite_of_a_user(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text('pytest_plugins = ["fusedformer.parity.fixtures"]\n')
    (tmp_path / "test_it.py").write_text(
        "import torch\n"
        "x = torch.randn(4, 9, requires_grad=True)\n"
        "def test_right(assert_parity):\n"
        "    assert_parity(lambda x: torch.softmax(x, -1), lambda x: x.softmax(-1), {'x': x})\n"
        "def test_wrong(assert_parity):\n"
        "    assert_parity(lambda x: x.sigmoid(), lambda x: x.softmax(-1), {'x': x})\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    path = os.pathsep.join(p for p in sys.path if p)
    env = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env)
    assert done.returncode == 1 and "1 failed, 1 passed" in done.stdout, done.stdout
    assert re.search(r"ParityError: output\(\d, \d\): got .* times the limit", done.stdout)
