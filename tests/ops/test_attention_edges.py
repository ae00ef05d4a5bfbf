"""Attention where several conditions meet: lengths of 0 and 1, groups, masks, layouts, extremes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.ops.features import CHOICES, Call
from tests.ops.judge import check, first, grad
from torch import Tensor

from fusedformer import backend, reference
from fusedformer import functional as F
from fusedformer.testing import assert_function_parity

NAME = "scaled_dot_product_attention"
QUERIES, KEYS = 20, 30


def qkv(device: str, *, heads: int = 2, key_heads: int = 2) -> dict[str, Any]:
    return {
        "query": grad(2, heads, QUERIES, 16, device=device),
        "key": grad(2, key_heads, KEYS, 16, device=device),
        "value": grad(2, key_heads, KEYS, 16, device=device),
    }


@pytest.mark.parametrize("lengths", [(0, 1), (1, 17), (30, 0), (0, 0)], ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_short_sequences_in_a_batch(lengths: tuple[int, int], causal: bool, device: str) -> None:
    """Of one key all weights are 1; of none the output and all gradients are 0."""
    inputs = qkv(device)
    given = torch.tensor(lengths, device=device)
    y, lse = F.scaled_dot_product_attention(
        **inputs, key_lengths=given, is_causal=causal, return_lse=True
    )
    dy = torch.randn_like(y)
    grads = torch.autograd.grad(y, tuple(inputs.values()), dy)
    for row, length in enumerate(lengths):
        assert all((g[row, :, length:] == 0).all() for g in grads[1:])
        if length == 0:
            assert (y[row] == 0).all()
            assert (lse[row] == -torch.inf).all()
            assert all((g[row] == 0).all() for g in grads)
        elif length == 1:
            assert torch.equal(y[row], inputs["value"][row, :, :1].expand_as(y[row]))
    if max(lengths) > 1:
        check(NAME, torch.float32, only=first, key_lengths=given, is_causal=causal, **inputs)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("kind", ["boolean", "additive"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_everything_at_once(kind: str, causal: bool, dtype: torch.dtype, device: str) -> None:
    """A mask by head, a key mask, lengths and grouped heads, with the log-sum-exp's gradient."""
    inputs = qkv(device, heads=4)
    hide = torch.rand(4, QUERIES, KEYS, device=device) < 0.3
    hide[1, 4] = True
    if kind == "boolean":
        inputs["attn_mask"] = ~hide
    else:
        inputs["attn_mask"] = torch.randn(hide.shape, device=device).masked_fill(hide, -torch.inf)
        inputs["attn_mask"].requires_grad_()
    inputs["key_mask"] = torch.rand(2, KEYS, device=device) > 0.3
    inputs["key_lengths"] = torch.tensor([11, 30], device=device)
    check(NAME, dtype, return_lse=True, enable_gqa=True, is_causal=causal, **inputs)


def test_mask_gradient_is_summed_over_what_broadcasts(device: str) -> None:
    """Dimensions of size 1, and a leading one left out."""
    for shape in ((1, 1, 1, KEYS), (1, 2, 1, KEYS), (1, QUERIES, KEYS)):
        check(NAME, torch.float32, only=first, attn_mask=grad(*shape, device=device), **qkv(device))


def test_mask_gradient_is_zero_where_it_hides(device: str) -> None:
    inputs = qkv(device)
    hide = torch.rand(QUERIES, KEYS, device=device) < 0.3
    mask = torch.randn(hide.shape, device=device).masked_fill(hide, -torch.inf).requires_grad_()
    y = F.scaled_dot_product_attention(**inputs, attn_mask=mask)
    (gradient,) = torch.autograd.grad(y, mask, torch.randn_like(y))
    assert (gradient[hide] == 0).all()
    assert gradient.isfinite().all()
    assert (gradient[~hide] != 0).all()


def test_expanded_keys_and_a_strided_gradient(device: str) -> None:
    """One sequence's keys for all, by a stride of 0; the output's gradient is transposed too."""
    inputs = qkv(device)
    inputs["key"] = torch.randn(1, 2, KEYS, 16, device=device).expand(2, -1, -1, -1)
    inputs["key"].requires_grad_()
    inputs["value"] = inputs["value"].detach()[..., ::2].requires_grad_()
    check(NAME, torch.float32, only=first, **inputs)
    y = F.scaled_dot_product_attention(**inputs)
    dy = torch.randn(*reversed(y.shape), device=device).permute(3, 2, 1, 0)
    grads = [torch.autograd.grad(y, inputs["query"], d, retain_graph=True)[0]
             for d in (dy, dy.contiguous())]  # fmt: skip
    assert torch.equal(*grads)


def test_large_scores_do_not_overflow(device: str) -> None:
    """Scores around 1e4: the running maximum keeps exp from overflowing, whatever the order."""
    inputs = {name: (20 * t.detach()).requires_grad_() for name, t in qkv(device).items()}
    y, lse = F.scaled_dot_product_attention(**inputs, return_lse=True, scale=3.0)
    truth, true_lse = reference.scaled_dot_product_attention(
        **{name: t.detach().double() for name, t in inputs.items()}, scale=3.0
    )
    assert true_lse.abs().max() > 1e4
    eps = torch.finfo(torch.float32).eps
    assert (lse - true_lse).abs().max() <= 16 * eps * true_lse.abs().max()
    assert y.isfinite().all()
    # Weights are within exp(error of a score): 16 products of float32 each.
    slack = torch.expm1(16 * eps * true_lse.abs().max())
    assert (y - truth).abs().max() <= 2 * slack * inputs["value"].abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scores_that_grow_along_the_keys(dtype: torch.dtype, device: str) -> None:
    """Each tile of keys raises the maximum, so what was summed before is rescaled every time."""
    inputs: dict[str, Any] = {"query": grad(1, 1, QUERIES, 16, device=device)}
    inputs |= {name: grad(1, 1, 300, 16, device=device) for name in ("key", "value")}
    ramp = torch.linspace(-3, 3, 300, device=device)
    check(NAME, dtype, return_lse=True, attn_mask=ramp, **inputs)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_stays_in_its_row(bad: float, device: str) -> None:
    """A query that is not a number spoils its own output, visibly, and no other."""
    inputs = {name: t.detach() for name, t in qkv(device).items()}
    clean = F.scaled_dot_product_attention(**inputs)
    inputs["query"][0, 1, 5, 2] = bad
    y = F.scaled_dot_product_attention(**inputs)
    assert y[0, 1, 5].isnan().all()
    y[0, 1, 5] = clean[0, 1, 5]
    assert torch.equal(y, clean)


def test_what_masks_hide_is_never_read_into_the_result(device: str) -> None:
    """Padding full of NaN behind key_lengths leaves output and gradients as they were."""
    inputs = {name: t.detach() for name, t in qkv(device).items()}
    lengths = torch.tensor([13, 30], device=device)
    results = []
    for filling in (0.0, torch.nan):
        own = {name: t.clone() for name, t in inputs.items()}
        for name in ("key", "value"):
            own[name][0, :, 13:] = filling
        leaves = [t.requires_grad_() for t in own.values()]
        y = F.scaled_dot_product_attention(*leaves, key_lengths=lengths)
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
        results.append([y, *torch.autograd.grad(y, leaves, dy)])
    for plain, poisoned in zip(*results, strict=True):
        assert torch.equal(plain, poisoned)


@pytest.mark.parametrize("key_heads", [1, 2])
def test_dropout_with_grouped_heads_and_lengths(key_heads: int, device: str) -> None:
    """Planes of the mask are numbered by query heads, not by key heads."""
    from fusedformer_kernels.rows.dropout import dropout_mask

    torch.manual_seed(7)
    seed = torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=device)
    keep = dropout_mask(seed, 0.3, 8, QUERIES, KEYS, True).reshape(2, 4, QUERIES, KEYS)
    common: dict[str, Any] = {
        "dropout_p": 0.3, "enable_gqa": True, "is_causal": True,
        "key_lengths": torch.tensor([11, 30], device=device),
    }  # fmt: skip

    def candidate(**inputs: Any) -> Any:
        torch.manual_seed(7)
        return F.scaled_dot_product_attention(return_lse=True, **common, **inputs)

    def truth(**inputs: Any) -> Any:
        return reference.scaled_dot_product_attention(keep=keep, **common, **inputs)

    assert_function_parity(candidate, truth, truth, qkv(device, heads=4, key_heads=key_heads))


@pytest.mark.parametrize("p", [0.99, 1.0])
def test_float16_gradients_where_almost_all_is_dropped(p: float, device: str) -> None:
    """As near as torch's composition: small gradients of scores are not rounded away.

    At p = 1 there are those of the log-sum-exp alone.
    """
    from fusedformer_kernels.rows.dropout import dropout_mask

    generator = torch.Generator().manual_seed(3)
    query, key, value, dy = torch.randn(4, 1, 2, 48, 16, generator=generator).half().to(device)
    dy *= 1e-4
    dlse = torch.randn(1, 2, 48, generator=generator).to(device) * 1e-4 * (p == 1.0)
    torch.manual_seed(8)
    seed = torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=device)
    keep = dropout_mask(seed, p, 2, 48, 48, True).reshape(1, 2, 48, 48)

    def composed(dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [x.to(dtype).requires_grad_() for x in (query, key, value)]
        scores = leaves[0] @ leaves[1].mT * 0.25
        weights = scores.softmax(-1) * (keep.to(dtype) / (1.0 - p if p < 1.0 else 1.0))
        results = weights @ leaves[2], scores.logsumexp(-1)
        return torch.autograd.grad(results, leaves, (dy.to(dtype), dlse.to(dtype)))

    leaves = [x.clone().requires_grad_() for x in (query, key, value)]
    torch.manual_seed(8)
    q, k, v = leaves
    results = F.scaled_dot_product_attention(q, k, v, dropout_p=p, return_lse=True)
    ours = torch.autograd.grad(results, leaves, (dy, dlse))
    for got, plain, true in zip(ours, composed(torch.half), composed(torch.double), strict=True):
        assert (got.double() - true).norm() <= (plain.double() - true).norm()
        assert true.any() or not got.any()


@pytest.mark.parametrize("wanted", ["query", "key", "value", "attn_mask"])
def test_one_gradient_alone_is_that_of_all(wanted: str, device: str) -> None:
    """What is frozen changes nothing in what is not."""
    inputs = qkv(device) | {"attn_mask": grad(2, 1, QUERIES, KEYS, device=device)}
    y = F.scaled_dot_product_attention(**inputs)
    dy = torch.randn_like(y)
    together = torch.autograd.grad(y, inputs[wanted], dy)[0]
    frozen: dict[str, Any] = {k: t if k == wanted else t.detach() for k, t in inputs.items()}
    alone = torch.autograd.grad(F.scaled_dot_product_attention(**frozen), frozen[wanted], dy)[0]
    assert torch.equal(together, alone)


def test_gradient_of_the_log_sum_exp_alone(device: str) -> None:
    inputs = {name: t for name, t in qkv(device).items() if name != "value"}
    value = torch.randn(2, 2, KEYS, 16, device=device)
    _, lse = F.scaled_dot_product_attention(**inputs, value=value, return_lse=True)
    dlse = torch.randn_like(lse)
    ours = torch.autograd.grad(lse, tuple(inputs.values()), dlse)
    wide = [t.detach().double().requires_grad_() for t in inputs.values()]
    direct = torch.logsumexp(wide[0] @ wide[1].mT / 4, -1)
    for a, b in zip(ours, torch.autograd.grad(direct, wide, dlse.double()), strict=True):
        torch.testing.assert_close(a, b.float())


def test_gradients_of_gradients_of_what_is_in_chunks() -> None:
    """The torch backend, with an added mask, one of whose queries sees nothing."""
    leaves = [torch.randn(1, 2, n, 4, dtype=torch.float64).requires_grad_() for n in (3, 4, 4)]
    mask = torch.randn(3, 4, dtype=torch.float64)
    mask[1] = -torch.inf

    def call(query: Tensor, key: Tensor, value: Tensor) -> Any:
        with backend("torch"):
            return F.scaled_dot_product_attention(query, key, value, mask)

    assert torch.autograd.gradgradcheck(call, leaves)


BEYOND: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "log-sum-exp": {"return_lse": True},
    "weights": {"return_weights": "per_head"},
    "added": {"attn_mask": torch.zeros(1, 1, 7, 9)},
    "cap": {"softcap": 5.0},
    "dropout": {"dropout_p": 0.3},
}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["torch", "triton"])
@pytest.mark.parametrize("form", BEYOND)
def test_what_is_beyond_key_lengths_is_not_read(
    form: str, name: Any, bad: float, device: str
) -> None:
    """Bits of output and gradients are those with anything else there."""
    q, k, v = (torch.randn(3, 2, n, 8, device=device) for n in (7, 9, 9))
    lengths = torch.tensor([9, 4, 0], device=device)
    beyond = (torch.arange(9, device=device) >= lengths[:, None])[:, None, :, None]
    settings: dict[str, Any] = {
        n: t.to(device) if isinstance(t, Tensor) else t for n, t in BEYOND[form].items()
    }
    found = []
    for key, value in ((k, v), (k.masked_fill(beyond, bad), v.masked_fill(beyond, bad))):
        leaves: list[Any] = [t.clone().requires_grad_() for t in (q, key, value)]
        torch.manual_seed(1)
        with backend(name):
            output = F.scaled_dot_product_attention(*leaves, key_lengths=lengths, **settings)
        output = output if isinstance(output, tuple) else (output,)
        assert output[0][0].any()
        grads = [torch.randn_like(each) for each in output]
        found.append([*output, *torch.autograd.grad(output, leaves, grads)])
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("form", ["padded", "key lengths", "packed"])
def test_many_tiles_of_large_heads(form: str, causal: bool, device: str) -> None:
    """More tiles than are loaded ahead, odd ends, and sequences that have fewer than that."""
    dtype = torch.float16 if causal else torch.bfloat16
    names = "query", "key", "value"
    given: dict[str, Any] = {"is_causal": causal}
    if form == "packed":
        starts = torch.tensor([0, 0, 5, 140], dtype=torch.int32, device=device)
        inputs = {name: grad(140, 1, 72, device=device) for name in names}
        given |= {"cu_seqlens_q": starts, "cu_seqlens_k": starts}
        given |= {"max_seqlen_q": 135, "max_seqlen_k": 135}
        check("varlen_attention", dtype, only=first, **inputs, **given)
        return
    if form == "key lengths":
        given["key_lengths"] = torch.tensor([131], device=device)
    inputs = {name: grad(1, 1, 135, 72, device=device) for name in names}
    check(NAME, dtype, only=first, **inputs, **given)


MASKED: dict[str, dict[str, Any]] = {
    "of keys": {"key_mask": True},
    "of pairs, grouped heads": {"mask": "boolean", "group": 2, "dims": (72, 72)},
}


@pytest.mark.parametrize("mask", MASKED)
def test_dropout_beside_a_mask_in_tiles_of_16(mask: str, device: str) -> None:
    """Compiled products of 16 rows once had each row twice, where bytes and a draw meet in them."""
    choice = {name: values[0] for name, values in CHOICES.items()}
    choice |= {"lengths": "few queries", "dropout": True, "dtype": torch.bfloat16}
    Call.draw(choice | MASKED[mask], device).check()
