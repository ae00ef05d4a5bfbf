"""Attention of whole sequences on the CPU, which without gradients is the C++ of packed ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.ops.test_compiled_attention import DTYPES, calls_aten, starts_of
from torch import Tensor

from fusedformer import functional
from fusedformer.ops.attention.calls import self_attention
from fusedformer.ops.attention.terms import self_attention_terms
from fusedformer.testing import compare_tensors

pytestmark = pytest.mark.usefixtures("by_compiled_torch")


def attend(*tensors: Tensor, **settings: Any) -> Tensor:
    function: Any = functional.scaled_dot_product_attention
    found: Tensor = function(*tensors, **settings)
    return found


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The values of ``x`` ``[B, H, L, E]``, otherwise in memory."""
    if layout == "rows":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "heads":
        return x.contiguous()
    if layout == "batch last":
        return x.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)
    wide = x.new_full((*x.shape[:3], 2 * x.shape[3]), torch.nan)
    if layout == "every other column":
        wide[..., ::2] = x
        return wide[..., ::2]
    wide[..., 1 : 1 + x.shape[3]] = x
    return wide[..., 1 : 1 + x.shape[3]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("batch", "queries", "keys", "dim", "value_dim"),
    [
        (3, 17, 17, 32, 32),
        (1, 1, 65, 7, 5),
        (2, 241, 3, 64, 80),
        (3, 1, 9, 16, 16),
        (2, 6, 1, 16, 8),
        (3, 1, 1, 8, 8),  # a row's step to the next means nothing
    ],
)
def test_values_are_attentions_in_any_layout(
    dtype: torch.dtype, batch: int, queries: int, keys: int, dim: int, value_dim: int
) -> None:
    q = (torch.randn(batch, 3, queries, dim) * 8).to(dtype)
    k = torch.randn(batch, 3, keys, dim).to(dtype)
    v = torch.randn(batch, 3, keys, value_dim).to(dtype)
    truth = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    stock = F.scaled_dot_product_attention(q, k, v)
    wanted = attend(q, k, v)
    assert not calls_aten(lambda: attend(q, k, v))
    comparison = compare_tensors("output", wanted, stock, truth)
    assert comparison.passed, comparison
    for layout in ("rows", "heads", "batch last", "part of a row"):
        assert torch.equal(attend(*(laid_out(t, layout) for t in (q, k, v))), wanted), layout
    shared = attend(*(t[:1].expand(4, -1, -1, -1) for t in (q, k, v)))
    assert all(torch.equal(one, wanted[0]) for one in shared)
    spread = attend(*(laid_out(t, "every other column") for t in (q, k, v)))  # by ATen
    assert compare_tensors("columns", spread, stock, truth).passed


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_alone_whole_and_packed_have_the_same_bits(dtype: torch.dtype) -> None:
    qkv = torch.randn(3, 21, 3, 2, 32).to(dtype)
    q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
    found = attend(q, k, v)
    assert torch.equal(attend(q[1:2], k[1:2], v[1:2])[0], found[1])
    rows, starts = qkv.flatten(0, 1), starts_of([21] * 3)
    of_rows = rows[:, 0], rows[:, 1], rows[:, 2]
    packed = functional.varlen_attention(*of_rows, starts, starts, 21, 21)
    assert torch.equal(packed, found.transpose(1, 2).flatten(0, 1))
    terms = self_attention_terms(
        32, 0.0, attn_mask=None, key_mask=None, is_causal=False, cu_seqlens_q=None,
        cu_seqlens_k=None, max_seqlen_q=21, max_seqlen_k=21,
    )  # fmt: skip
    assert torch.equal(self_attention(qkv, terms), found.transpose(1, 2))
    flat = attend(q[0], k[0], v[0])  # heads alone, and two dimensions of a batch
    assert torch.equal(flat, found[0])
    assert torch.equal(attend(q[None], k[None], v[None]), found[None])


@pytest.mark.parametrize(
    "settings",
    [
        {"is_causal": True}, {"attn_mask": torch.rand(2, 1, 9, 9) > 0.2}, {"softcap": 2.0},
        {"scale": -1.0}, {"dropout_p": 0.5}, {"window": (2, 2)},
    ],
    ids=lambda given: next(iter(given)),
)  # fmt: skip
def test_what_has_more_terms_is_left_to_aten(settings: dict[str, Any]) -> None:
    q, k, v = torch.randn(3, 2, 4, 9, 16)
    assert calls_aten(lambda: attend(q, k, v, **settings))
    assert calls_aten(lambda: attend(q.double(), k.double(), v.double()))
    assert calls_aten(lambda: attend(q, k[:, :2], v[:, :2], enable_gqa=True))
    assert torch.equal(attend(q, k[:, :, :0], v[:, :, :0]), torch.zeros_like(q))
    assert attend(q[:0], k[:0], v[:0]).shape == (0, 4, 9, 16)


def test_gradients_come_where_they_are_wanted() -> None:
    q, k, v = torch.randn(3, 2, 4, 9, 16)
    dy = torch.randn(2, 4, 9, 16)
    with torch.enable_grad():
        tensors = [x.clone().requires_grad_() for x in (q, k, v)]
        found = torch.autograd.grad(attend(*tensors), tensors, dy)
        wide = [x.double().requires_grad_() for x in (q, k, v)]
        truth = torch.autograd.grad(F.scaled_dot_product_attention(*wide), wide, dy.double())
    for one, wanted in zip(found, truth, strict=True):
        torch.testing.assert_close(one.double(), wanted, rtol=1e-4, atol=1e-5)
