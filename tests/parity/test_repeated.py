"""The same bits run to run, and in other company."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fusedformer import backend, functional, parity

LENGTHS = [9, 3, 6]
KEEP = torch.arange(9) < torch.tensor(LENGTHS)[:, None]


@pytest.fixture(autouse=True)
def _torch_backend() -> Any:
    with backend("torch"):
        yield


def test_determinism_with_dropout(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, 0.3, batch_first=True).train()
    x = torch.randn(2, 5, 16, requires_grad=True)
    report = parity.determinism(layer, x)
    assert report.passed and "PASS: run to run" in str(report)
    names = {row.name for row in report.rows}
    assert names == {
        "output",
        "grad of argument 0",
        *(f"grad of {n}" for n, _ in layer.named_parameters()),
    }
    report.save(tmp_path / "same.json")
    assert json.loads((tmp_path / "same.json").read_text())["passed"] is True


def test_what_differs_from_run_to_run_is_found() -> None:
    runs = iter(range(9))

    def unsteady(x: Tensor) -> Tensor:
        return x + (1e-6 if next(runs) == 1 else 0.0) * torch.eye(4)

    report = parity.determinism(unsteady, torch.ones(4, 4), gradients=False)
    assert not report.passed
    assert [(row.way, row.elements) for row in report.rows] == [("run 2", 4), ("run 3", 0)]
    assert 0 < report.rows[0].max_ulp < 20 and "differs" in str(report)
    with pytest.raises(ValueError, match="'runs' to be at least 2"):
        parity.determinism(unsteady, torch.ones(4, 4), runs=1)


def _attention(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor) -> Tensor:
    heads = [x.unflatten(-1, (2, -1)).transpose(1, 2) for x in (q, k, v)]
    return functional.scaled_dot_product_attention(*heads, key_mask=key_mask).transpose(1, 2)


def _packed(inputs: dict[str, Any], starts: Tensor, longest: int) -> Tensor:
    q, k, v = (inputs[n].unflatten(-1, (2, -1)) for n in "qkv")
    return functional.varlen_attention(q, k, v, starts, starts, longest, longest)


def test_attention_does_not_look_at_its_company(device: str) -> None:
    inputs: dict[str, Any] = {n: torch.randn(3, 9, 16, device=device) for n in "qkv"}
    inputs["key_mask"] = KEEP.to(device)
    with backend("triton"):
        report = parity.batch_invariance(_attention, inputs, LENGTHS, packed=_packed)
    assert report.passed, str(report)
    ways = {row.way for row in report.rows}
    assert ways == {"alone", "alone, padded", "reversed batch", "packed"}


@pytest.mark.parametrize("batch_first", [False, True])
def test_what_looks_at_its_company_is_found(batch_first: bool) -> None:
    def by_row(x: Tensor) -> Tensor:
        return torch.softmax(x, -1)

    def leaking(x: Tensor) -> Tensor:
        return x - x.mean((0, 1), keepdim=True)

    x = torch.randn(3, 9, 4) if batch_first else torch.randn(9, 3, 4)
    assert parity.batch_invariance(by_row, x, LENGTHS, batch_first=batch_first).passed
    report = parity.batch_invariance(leaking, x, LENGTHS, batch_first=batch_first)
    differ = {row.way for row in report.rows if not row.equal}
    assert {"alone", "alone, padded"} <= differ


def test_bad_calls_say_what_is_wrong() -> None:
    x = torch.randn(3, 9, 4)
    with pytest.raises(ValueError, match="of 2 sequences of length 9"):
        parity.batch_invariance(torch.sin, x, [9, 3])
    with pytest.raises(ValueError, match="'lengths' to be positive"):
        parity.batch_invariance(torch.sin, x, [9, 3, 0])
    with pytest.raises(ValueError, match="draws random numbers"):
        parity.batch_invariance(nn.Dropout(0.5), x, LENGTHS)
    with pytest.raises(TypeError, match="'function' to be a function or a Module"):
        parity.determinism(3, x)  # type: ignore[arg-type]
