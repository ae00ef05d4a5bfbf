"""Packing and unpacking against their definition, in every pattern of padding."""

from __future__ import annotations

import copy
import gc
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from fusedformer import backend, ops, reference
from fusedformer import functional as F
from fusedformer.functional import Packing
from fusedformer_kernels.attention import schedule
from fusedformer_kernels.runtime.launch import recorded_launches

PATTERNS: dict[str, Any] = {
    "right": lambda: torch.arange(70) < torch.tensor([[70], [1], [33], [0]]),
    "left": lambda: torch.arange(70) >= torch.tensor([[0], [69], [33], [70]]),
    "holes": lambda: torch.rand(4, 70) > 0.5,
    "nothing": lambda: torch.zeros(4, 70, dtype=torch.bool),
    "everything": lambda: torch.ones(4, 70, dtype=torch.bool),
    "no sequences": lambda: torch.zeros(0, 5, dtype=torch.bool),
}


@pytest.mark.parametrize("name", ["triton", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_both_ways(pattern: str, dtype: torch.dtype, name: Any, device: str) -> None:
    """Exactly, gradients too, of strided rows of more than one dimension."""
    keep = PATTERNS[pattern]().to(device)
    packing = Packing.of(keep)
    x = torch.randn(*keep.shape, 3, 20, device=device, dtype=dtype).transpose(2, 3)
    x.requires_grad_()
    with backend(name):
        packed = F.pack(x, packing)
        again = F.unpack(packed, packing)
    assert packed.is_contiguous()
    assert torch.equal(packed, reference.pack(x, keep))
    assert torch.equal(again, reference.unpack(packed, keep))
    for output in (packed, again):
        dy = torch.randn_like(output)
        (got,) = torch.autograd.grad(output, x, dy, retain_graph=True)
        want = dy if output is again else reference.unpack(dy, keep)
        assert torch.equal(got, torch.where(keep[..., None, None], want, 0.0))


def test_what_a_packing_says(device: str) -> None:
    keep = torch.tensor([[True, False, True], [False] * 3, [True] * 3], device=device)
    packing = Packing.of(keep)
    assert packing.cu_seqlens.tolist() == [0, 2, 2, 5]
    assert packing.cu_seqlens.dtype == torch.int32
    assert (packing.max_seqlen, packing.total, packing.batch, packing.length) == (3, 5, 3, 3)
    assert packing.indices.tolist() == [0, 2, 6, 7, 8]
    assert packing.inverse.tolist() == [0, -1, 1, -1, -1, -1, 2, 3, 4]
    for got, want in zip(Packing.of(keep, lengths=[2, 0, 3]), packing, strict=True):
        if isinstance(want, Tensor):
            assert isinstance(got, Tensor) and torch.equal(got, want)
        else:
            assert got == want


PLACES: dict[str, Any] = {
    **{name: make for name, make in PATTERNS.items() if name != "no sequences"},
    "rows longer than a block": lambda: torch.rand(3, 1100) > 0.4,
    "more sequences than a block": lambda: torch.rand(700, 3) > 0.4,
    "by other strides": lambda: (torch.rand(70, 4) > 0.4).t(),
    "of one value": lambda: torch.tensor([[True], [False], [True]]).expand(3, 9),
    "one token": lambda: torch.ones(1, 1, dtype=torch.bool),
}


@pytest.mark.parametrize("pattern", PLACES)
@pytest.mark.parametrize("form", ["static", "exact", "rounded", "fewer"])
def test_places_of_tokens_by_two_launches_and_by_torch(
    pattern: str, form: str, device: str
) -> None:
    keep = PLACES[pattern]().to(device)
    total = int(keep.sum())
    rows = {
        "static": keep.numel(), "exact": total, "rounded": -(-total // 16) * 16,
        "fewer": max(total - 2, 0),
    }[form]  # fmt: skip
    tail = form in ("static", "rounded")
    with backend("torch"):
        wanted = ops.token_places(ops.TokenMask.of(keep), rows, tail=tail)
    for is_padding in (False, True):
        with backend("triton"), recorded_launches(run=True) as launches:
            tokens = ops.TokenMask.of(~keep if is_padding else keep, is_padding)
            found = ops.token_places(tokens, rows, tail=tail)
        assert [one.name for one in launches] == ["_count_tokens", "_place_tokens"]
        for want, got in zip(wanted, found, strict=True):
            assert got.dtype == want.dtype
            assert torch.equal(got, want)


@pytest.mark.parametrize("name", ["triton", "torch"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_static_shapes(pattern: str, name: Any, device: str) -> None:
    """Tokens first and zeros behind them, from the shape of ``keep`` alone."""
    keep = PATTERNS[pattern]().to(device)
    packing = Packing.of(keep, static_shapes=True)
    count = int(keep.sum())
    assert packing.total == keep.numel() and packing.cu_seqlens.tolist()[-1] == count
    x = torch.randn(*keep.shape, 20, device=device, requires_grad=True)
    with backend(name):
        packed = F.pack(x, packing)
        again = F.unpack(packed, packing)
    assert torch.equal(packed[:count], x[keep]) and not packed[count:].any()
    assert torch.equal(again, x.masked_fill(~keep[..., None], 0.0))
    for output in (packed, again):
        dy = torch.randn_like(output)
        (got,) = torch.autograd.grad(output, x, dy, retain_graph=True)
        want = torch.zeros_like(got)
        want[keep] = dy[:count] if output is packed else dy[keep]
        assert torch.equal(got, want)


@pytest.mark.parametrize("name", ["triton", "torch"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_attention_spends_nothing_behind_the_last_token(
    pattern: str, name: Any, device: str
) -> None:
    """Zeros there, in output and gradients, whatever was in it; the bits of the rest.

    On a GPU the torch backend is ATen's attention, which has other sums for other shapes.
    """
    exactly = name == "triton" or device == "cpu"
    keep = PATTERNS[pattern]().to(device)
    static, exact = Packing.of(keep, static_shapes=True), Packing.of(keep)
    count, shape = exact.total, (keep.numel(), 2, 8)
    leaves = [torch.randn(shape, device=device, requires_grad=True) for _ in range(3)]
    parts = [t.detach()[:count].requires_grad_() for t in leaves]
    dy = torch.randn(shape, device=device)
    with backend(name):
        found, wanted = (
            F.varlen_attention(q, k, v, p.cu_seqlens_q, p.cu_seqlens_k, p.max_seqlen, p.max_seqlen)
            for (q, k, v), p in ((leaves, static), (parts, exact))
        )
        grads = torch.autograd.grad(found, leaves, dy)
        wanted_grads = torch.autograd.grad(wanted, parts, dy[:count])
    pairs = [(found, wanted), *zip(grads, wanted_grads, strict=True)]
    for got, want in pairs:
        if exactly:
            assert torch.equal(got[:count], want)
        else:
            torch.testing.assert_close(got[:count], want)
        assert not got[count:].any()


@pytest.mark.parametrize("name", ["triton", "torch"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_rows_rounded_up(pattern: str, name: Any, device: str) -> None:
    keep = PATTERNS[pattern]().to(device)
    exact, rounded = Packing.of(keep), Packing.of(keep, multiple_of=16)
    assert rounded.total == -(-exact.total // 16) * 16
    x = torch.randn(*keep.shape, 20, device=device, requires_grad=True)
    with backend(name):
        packed = F.pack(x, rounded)
        again = F.unpack(packed, rounded)
    assert torch.equal(packed[: exact.total], x[keep]) and not packed[exact.total :].any()
    assert torch.equal(again, x.masked_fill(~keep[..., None], 0.0))
    dy = torch.randn_like(again)
    (got,) = torch.autograd.grad(again, x, dy)
    assert torch.equal(got, dy.masked_fill(~keep[..., None], 0.0))


def test_rows_of_many_columns(device: str) -> None:
    keep = torch.rand(2, 9, device=device) > 0.3
    x = torch.randn(2, 9, 1100, device=device)
    assert torch.equal(F.pack(x, Packing.of(keep)), x[keep])


class Kept(torch.autograd.Function):
    """The identity of a tensor; nothing but its backward keeps the starts."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, starts: Tensor) -> Tensor:
        ctx.save_for_backward(starts)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (starts,) = ctx.saved_tensors
        assert list(schedule.shared_lists(starts) or ()) == [("a",)]
        return grad, None


def test_work_lists_live_as_long_as_their_starts(device: str) -> None:
    gc.collect()
    before = len(schedule._shared)
    packing = Packing.of(torch.rand(2, 9, device=device) > 0.3)
    lists = schedule.shared_lists(packing.cu_seqlens)
    assert lists == {} and schedule.shared_lists(packing.cu_seqlens.clone()) is None
    lists["a",] = None  # type: ignore[assignment]
    output = Kept.apply(torch.randn(3, device=device, requires_grad=True), packing.cu_seqlens)
    del packing
    gc.collect()
    assert len(schedule._shared) == before + 1
    output.backward(torch.randn_like(output))
    del output
    gc.collect()
    assert len(schedule._shared) == before


def test_a_copy_of_a_packing_shares_no_work_lists(device: str) -> None:
    packing = Packing.of(torch.rand(2, 9, device=device) > 0.3)
    for other in (copy.deepcopy(packing), pickle.loads(pickle.dumps(packing))):
        assert torch.equal(other.cu_seqlens, packing.cu_seqlens)
        assert not vars(other.cu_seqlens)  # nothing is hidden on tensors
        assert schedule.shared_lists(other.cu_seqlens) is None


def test_work_lists_of_one_tensor_are_bounded(device: str) -> None:
    starts = Packing.of(torch.ones(2, 9, dtype=torch.bool, device=device), [9, 9]).cu_seqlens
    for tokens in range(100, 100 + 2 * schedule.MOST_LISTS):
        first = schedule.work_list(starts, starts, tokens, 9, 16, False)
        assert schedule.work_list(starts, starts, tokens, 9, 16, False) is first
    lists = schedule.shared_lists(starts)
    assert lists is not None and 0 < len(lists) <= schedule.MOST_LISTS
