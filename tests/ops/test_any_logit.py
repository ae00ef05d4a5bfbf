"""Attention where scores are large, or all keys of a query have a mask that is large but finite."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as stock
from tests.ops.judge import check, first
from torch import Tensor

from fusedformer import backend, nn, reference
from fusedformer import functional as F
from fusedformer.testing import Comparison, compare_tensors, copied

NAME = "scaled_dot_product_attention"
BACKENDS: Any = pytest.mark.parametrize("name", ["triton", "torch"])
LOWEST = torch.finfo(torch.float32).min


def qkv(scale: float, device: str, length: int = 70, dim: int = 64) -> dict[str, Any]:
    inputs = {n: torch.randn(1, 2, length, dim, device=device) for n in ("query", "key", "value")}
    inputs["query"] *= scale
    return {n: t.requires_grad_() for n, t in inputs.items()}


def unfused(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    scores = query @ key.mT * (1 / math.sqrt(query.shape[-1]))
    return (scores if mask is None else scores + mask).softmax(-1) @ value


@pytest.mark.parametrize("scale", [1.0, 10.0, 100.0, 1000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_the_criterion_at_any_scale(
    causal: bool, dtype: torch.dtype, scale: float, device: str
) -> None:
    inputs = qkv(scale, device)
    check(NAME, dtype, return_lse=True, is_causal=causal, **inputs)


@BACKENDS
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("scale", [1.0, 20.0, 100.0, 1e3, 1e4])
def test_float32_gradients_are_those_of_the_unfused_form(
    scale: float, causal: bool, name: Any, device: str
) -> None:
    """By RMS error over all draws, within 1.1 times; with one log-sum-exp up to 3 times.

    A GPU's exponential errs by two units, and where scores are large a single row decides a draw.
    """
    if name == "torch" and device != "cpu":
        pytest.skip("on a GPU the torch backend is ATen's attention, with one log-sum-exp")
    draws, limit = (4, 1.1) if device == "cpu" else (12, 1.25)
    squares = {"ours": torch.zeros(4), "unfused": torch.zeros(4)}
    hidden = torch.full((70, 70), -torch.inf, device=device).triu(1) if causal else None
    for seed in range(draws):
        torch.manual_seed(seed)
        inputs = qkv(scale, device)
        dy = torch.randn_like(inputs["value"])
        wide = {n: copied(t, torch.float64) for n, t in inputs.items()}
        truth = unfused(**wide, mask=None if hidden is None else hidden.double())
        truth_of = [truth, *torch.autograd.grad(truth, list(wide.values()), dy.double())]
        with backend(name):
            ours = F.scaled_dot_product_attention(**inputs, is_causal=causal)
        for key, output in (("ours", ours), ("unfused", unfused(**inputs, mask=hidden))):
            found = [output, *torch.autograd.grad(output, tuple(inputs.values()), dy)]
            errors = [(a - b).pow(2).mean() for a, b in zip(found, truth_of, strict=True)]
            squares[key] += torch.stack(errors).detach().float().cpu()
    ratios = (squares["ours"] / squares["unfused"]).sqrt()
    assert (ratios <= limit).all(), ratios


def finite_mask(value: float, length: int, device: str) -> Tensor:
    """Two rows of it, one with a smaller number in it, one with -inf as well."""
    mask = torch.zeros(length, length, device=device)
    mask[3] = mask[5] = mask[7] = value
    mask[5, 4] = value / 2
    mask[7, 2:] = -torch.inf
    return mask


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", [-1e4, -1e9, LOWEST], ids=str)
@pytest.mark.parametrize("average", ["per_head", "averaged"])
def test_weights_add_up_to_one_for_any_finite_mask(
    average: Any, value: float, dtype: torch.dtype, name: Any, device: str
) -> None:
    inputs: dict[str, Any] = {n: t.detach().to(dtype) for n, t in qkv(1.0, device).items()}
    mask = finite_mask(value, 70, device)
    with backend(name):
        _, weights = F.scaled_dot_product_attention(
            **inputs, attn_mask=mask, return_weights=average
        )
    sums = weights.double().sum(-1)
    assert (sums - 1).abs().max() <= 4 * torch.finfo(dtype).eps
    row = weights[..., 3, :]
    assert row.max() <= 1.001 * row.min() or abs(value) < 1e9  # all keys are as far away


@pytest.mark.parametrize(
    ("value", "also"),
    [
        *itertools.product((-1e4, -1e9, LOWEST), ({}, {"softcap": 30.0})),
        # At the others the order of three terms decides what is left of two.
        (LOWEST, {"alibi": True}), (LOWEST, {"table": True}),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_queries_whose_keys_all_have_a_finite_mask(
    dtype: torch.dtype, also: dict[str, Any], value: float, device: str
) -> None:
    """Against the unfused form in float32, not the definition: in float64 -1e9 forgets nothing."""
    inputs = {n: t.detach().to(dtype).float() for n, t in qkv(1.0, device).items()}
    mask, terms = finite_mask(value, 70, device), dict(also)
    distance = torch.arange(70, device=device)[None] - torch.arange(70, device=device)[:, None]
    added = mask
    if terms.pop("alibi", None):
        terms["alibi_slopes"] = torch.tensor([0.5, 0.25], device=device)
        added = mask - terms["alibi_slopes"][:, None, None] * distance.abs()
    if terms.pop("table", None):
        terms["relative_bias"] = torch.randn(2, 5, device=device)
        added = mask + terms["relative_bias"][:, distance.clamp(-2, 2) + 2]
    leaves = {n: t.clone().requires_grad_() for n, t in inputs.items()}
    scores = leaves["query"] @ leaves["key"].mT * 0.125
    if "softcap" in terms:
        scores = terms["softcap"] * torch.tanh(scores / terms["softcap"])
    want = (scores + added).softmax(-1) @ leaves["value"]
    dy = torch.randn_like(want)
    wanted = [want, *torch.autograd.grad(want, tuple(leaves.values()), dy)]
    for name in ("triton", "torch"):
        own = {n: t.to(dtype).requires_grad_() for n, t in inputs.items()}
        with backend(name):
            output = F.scaled_dot_product_attention(**own, attn_mask=mask, **terms)
        found = [output, *torch.autograd.grad(output, tuple(own.values()), dy.to(dtype))]
        eps = torch.finfo(dtype).eps
        for ours, theirs in zip(found, wanted, strict=True):
            assert (ours - theirs).abs().max() <= 16 * eps * theirs.abs().max()


def test_a_row_at_the_lowest_number_is_no_row_without_keys(device: str) -> None:
    inputs = {n: t.detach() for n, t in qkv(1.0, device, length=20).items()}
    mask = torch.zeros(20, 20, device=device)
    mask[4], mask[6] = LOWEST, -torch.inf
    output, lse = F.scaled_dot_product_attention(**inputs, attn_mask=mask, return_lse=True)
    torch.testing.assert_close(output[:, :, 4], inputs["value"].mean(2))
    assert not output[:, :, 6].any()
    assert (lse[:, :, 4] == LOWEST).all()
    assert (lse[:, :, 6] == -torch.inf).all()


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_multihead_attention_with_a_row_at_minus_a_billion(
    dtype: torch.dtype, name: Any, device: str
) -> None:
    """With torch's default, need_weights=True: weights summed to the number of keys once."""
    module = nn.MultiheadAttention(16, 2, batch_first=True).to(device, dtype)
    x = torch.randn(2, 6, 16, device=device, dtype=dtype)
    mask = torch.zeros(6, 6, device=device, dtype=dtype)
    mask[3] = -1e9
    with backend(name):
        output, weights = module(x, x, x, attn_mask=mask)
        without, _ = module(x, x, x, attn_mask=mask, need_weights=False)
    tolerance = 4 * torch.finfo(dtype).eps
    assert (weights.sum(-1) - 1).abs().max() <= tolerance
    want, _ = torch.nn.MultiheadAttention.forward(module.double(), x.double(), x.double(),
                                                  x.double(), attn_mask=mask.double())  # fmt: skip
    rows = [i for i in range(6) if i != 3]  # in float64 the masked row is no uniform one
    for found in (output, without):
        assert (found[:, rows] - want[:, rows]).abs().max() <= 8 * tolerance * want.abs().max()
        assert found.isfinite().all()


@BACKENDS
@pytest.mark.parametrize("queries", [1, 5])
def test_few_queries_merge_parts_of_finite_masks(queries: int, name: Any, device: str) -> None:
    """Three parts of the keys, with other numbers of visible ones in each."""
    inputs = {n: t.detach() for n, t in qkv(1.0, device, length=1300, dim=16).items()}
    inputs["query"] = inputs["query"][:, :, :queries]
    mask = torch.full((queries, 1300), -1e9, device=device)
    mask[:, 100:900] = -torch.inf
    with backend(name):
        output = F.scaled_dot_product_attention(**inputs, attn_mask=mask)
    seen = torch.cat((inputs["value"][:, :, :100], inputs["value"][:, :, 900:]), 2)
    torch.testing.assert_close(output, seen.mean(2, keepdim=True).expand_as(output))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_query_that_is_sure_gives_its_score_no_gradient(dtype: torch.dtype, device: str) -> None:
    """Its weight is exactly 1, and what it and delta get the same number."""
    inputs = qkv(1.0, device, length=33)
    sure = {n: (t.detach() * (30.0 if n != "value" else 1.0)).to(dtype) for n, t in inputs.items()}
    sure["key"] = sure["query"].clone()
    leaves: dict[str, Any] = {n: t.requires_grad_() for n, t in sure.items()}
    output = F.scaled_dot_product_attention(**leaves)
    assert torch.equal(output, leaves["value"])
    dq, dk, _ = torch.autograd.grad(output, tuple(leaves.values()), torch.randn_like(output))
    bound = 0.0 if dtype == torch.float32 else 1e-3 * float(leaves["query"].abs().max())
    assert dq.abs().max() <= bound
    assert dk.abs().max() <= bound


@BACKENDS
def test_samples_of_torch_are_as_near_to_float64_as_stock(name: Any, device: str) -> None:
    """Inputs of its own tests of MultiheadAttention, to +-9: all outputs and gradients.

    The torch backend meets the criterion everywhere. The kernels take delta from the output, which
    costs a few tensors of nine numbers their limit by luck: it ends with the draw.
    """
    common = pytest.importorskip("torch.testing._internal.common_modules")
    (info,) = (i for i in common.module_db if i.module_cls is torch.nn.MultiheadAttention)
    at_fault: dict[str, str] | None = None
    for seed in (1, 2, 3) if name == "triton" else (1,):
        torch.manual_seed(seed)
        samples = info.module_inputs_func(
            info, device=device, dtype=torch.float32, requires_grad=True, training=True
        )
        own, compared = {}, 0
        for number, sample in enumerate(samples):
            if not sample.constructor_input.kwargs.get("dropout"):
                for found in _compared(number, sample, name, device):
                    compared += 1
                    if found.fault and found.error > found.limit:
                        own[found.name] = found.fault
        assert compared > 500
        assert len(own) < compared / 10
        at_fault = own if at_fault is None else {n: own[n] for n in at_fault if n in own}
    assert not at_fault, at_fault


def _compared(number: int, sample: Any, name: Any, device: str) -> Iterator[Comparison]:
    built = sample.constructor_input
    ours = nn.MultiheadAttention(*built.args, **built.kwargs).to(device)
    theirs = torch.nn.MultiheadAttention(*built.args, **built.kwargs).to(device)
    theirs.load_state_dict(ours.state_dict())
    runs: list[dict[str, Tensor]] = []
    for model in (ours, theirs, copy.deepcopy(theirs).double()):
        dtype = next(model.parameters()).dtype
        args = [_as(v, dtype) for v in sample.forward_input.args]
        kwargs = {k: _as(v, dtype) for k, v in sample.forward_input.kwargs.items()}
        with backend(name):
            output = model(*args, **kwargs)[0]
        given = {**dict(enumerate(args)), **kwargs, **dict(model.named_parameters())}
        leaves = {n: v for n, v in given.items() if isinstance(v, Tensor) and v.requires_grad}
        dy = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output)
        grads = torch.autograd.grad(output, list(leaves.values()), dy, allow_unused=True)
        found = zip(leaves, grads, strict=True)
        runs.append({"output": output, **{str(n): g for n, g in found if g is not None}})
    for key in runs[0]:
        yield compare_tensors(f"{number} {key}", *(run[key] for run in runs))


def _as(value: Any, dtype: torch.dtype) -> Any:
    return copied(value, dtype) if isinstance(value, Tensor) else value


def test_a_query_without_keys_gets_zero_whatever_the_kernel_gives(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """cuDNN's, torch's default on Hopper, gave 0.49 for it on an H200."""
    given = stock.scaled_dot_product_attention

    def as_cudnn(q: Tensor, k: Tensor, v: Tensor, mask: Any, *args: Any, **kwargs: Any) -> Any:
        output = given(q, k, v, mask, *args, **kwargs)
        hidden = ~mask if mask.dtype == torch.bool else mask == -torch.inf
        return torch.where(hidden.all(-1, keepdim=True), 0.49, output)

    monkeypatch.setattr(stock, "scaled_dot_product_attention", as_cudnn)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        inputs = {n: t.detach().to(dtype) for n, t in qkv(1.0, "cpu", length=9).items()}
        keep = torch.rand(9, 9) > 0.3
        keep[4] = False
        additive = torch.zeros(9, 9, dtype=dtype).masked_fill(~keep, -torch.inf)
        lengths = torch.tensor([0])
        forms: list[dict[str, Any]] = [
            {"attn_mask": keep}, {"attn_mask": additive}, {"key_lengths": lengths},
        ]  # fmt: skip
        for masks in forms:
            with backend("torch"):
                output = F.scaled_dot_product_attention(**inputs, **masks)
            rows = output if "key_lengths" in masks else output[:, :, 4]
            assert not rows.any()
            assert output[:, :, 0].any() or "key_lengths" in masks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [-0.3, 0.0])
@pytest.mark.parametrize("masks", ["causal", "boolean", "none"])
@pytest.mark.parametrize("lse", [False, True], ids=["", "lse"])
def test_a_scale_that_is_not_positive(
    lse: bool, masks: str, scale: float, dtype: torch.dtype, device: str
) -> None:
    """Judged by the definition on both backends; ATen's kernel makes NaN of it where it masks."""
    inputs = {n: t.detach().to(dtype).requires_grad_() for n, t in qkv(1.0, device, 20).items()}
    keep = torch.rand(20, 20, device=device) > 0.3
    keep[:, 0] = True
    settings: dict[str, Any] = {"scale": scale, "is_causal": masks == "causal"}
    settings["attn_mask"] = keep if masks == "boolean" else None
    dy = torch.randn(1, 2, 20, 64, device=device)
    wide = {n: copied(t, torch.float64) for n, t in inputs.items()}
    want = reference.scaled_dot_product_attention(**wide, **settings)[0]
    wanted = [want, *torch.autograd.grad(want, tuple(wide.values()), dy.double())]
    for name in ("triton", "torch"):
        with backend(name):
            output = F.scaled_dot_product_attention(**inputs, **settings, return_lse=lse)
        output = output[0] if lse else output
        found = [output, *torch.autograd.grad(output, tuple(inputs.values()), dy.to(dtype))]
        for ours, truth in zip(found, wanted, strict=True):
            limit = 16 * torch.finfo(dtype).eps * float(truth.abs().max())
            assert (ours - truth).abs().max() <= limit, name


def test_the_first_output_alone(device: str) -> None:
    """The log-sum-exp is computed where it is asked for, and changes no bit of the output."""
    inputs = {n: t.detach() for n, t in qkv(1.0, device).items()}
    alone = F.scaled_dot_product_attention(**inputs)
    assert torch.equal(alone, F.scaled_dot_product_attention(**inputs, return_lse=True)[0])
    check(NAME, torch.float32, only=first, **qkv(1.0, device))
