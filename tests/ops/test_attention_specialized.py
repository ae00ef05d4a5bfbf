"""Attention by specialized warps where there is an sm_90, real or emulated: no table ships it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton

from fusedformer import functional as F
from fusedformer_kernels.runtime import tuned
from fusedformer_kernels.runtime.launch import recorded_launches

FIELDS = {"block_m": 128, "block_n": 64, "num_warps": 4, "num_stages": 2, "specialized": True}

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
        reason="needs an sm_90",
    ),
]


@pytest.fixture
def tma(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[bool]:
    """Let a user's table ask for it, with copies by TMA or not."""
    names = [f"attention_forward half {d} plain {c}" for d in (64, 128) for c in ("full", "causal")]
    entries = {name: {"config": {**FIELDS, "tma": request.param}} for name in names}
    path = tmp_path / "table.json"
    path.write_text(json.dumps({"schema": 1, "triton": triton.__version__, "entries": entries}))
    monkeypatch.setenv("FUSEDFORMER_TUNED_TABLE", str(path))
    monkeypatch.delenv("FUSEDFORMER_TUNED", raising=False)
    tuned.clear_caches()
    yield request.param
    monkeypatch.undo()
    tuned.clear_caches()


def _tensors(dim: int, dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(1, 2, 150, dim, device="cuda").to(dtype) for _ in range(3)]


@pytest.mark.parametrize(
    ("dim", "causal", "dtype", "tma"),
    [(64, False, torch.bfloat16, False), (128, True, torch.float16, True)],
    indirect=["tma"],
)
def test_launches_plans_and_graphs_of_specialized_warps(
    dim: int, causal: bool, dtype: torch.dtype, tma: bool
) -> None:
    torch.manual_seed(0)
    reference = torch.nn.functional.scaled_dot_product_attention

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

    given = _tensors(dim, dtype)
    with recorded_launches(run=True) as launches:
        first = call(*given)
    assert [launch.name for launch in launches] == ["_attention_forward_specialized"]
    assert launches[0].arguments["TMA"] is tma
    for _ in range(3):  # by Triton's way, cached, by a plan: of other tensors each time
        other = _tensors(dim, dtype)
        got = call(*other)
        q, k, v = (tensor.cpu() for tensor in other)
        stock = reference(q, k, v, is_causal=causal)
        want = reference(q.double(), k.double(), v.double(), is_causal=causal)
        limit = 2 * (stock - want).abs().max() + 2 * torch.finfo(dtype).eps * want.abs().max()
        assert (got.cpu() - want).abs().max() <= limit
    assert torch.equal(call(*given), first)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(*given)
    for tensor, new in zip(given, other, strict=True):
        tensor.copy_(new)
    graph.replay()
    assert torch.equal(out, got)
