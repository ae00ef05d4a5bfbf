"""Attention: plain, causal, padded, packed, windowed, biased, masked, with dropout, few queries."""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from harness import counting
from harness.attention_peers import (
    SDPA_BACKENDS,
    flash_attn,
    flex_attention,
    padded,
    real_positions,
    stock,
    torch_varlen,
    within_window,
    xformers_attention,
)
from harness.case import (
    REFERENCE,
    Case,
    Inputs,
    NotApplicable,
    Part,
    Program,
    Provider,
    Sizes,
    Suite,
)
from harness.check import check_kept_share
from harness.providers import present

WIDTH = 1024  # heads times head dim
P = 0.1
RADIUS = 128  # of relative biases: T5's largest distance
EVERY = (128, 512, 2048, 8192)
# kind: lengths of the sequences (of the longest, where they differ; of the keys, if few queries)
LENGTHS = {
    "full": EVERY,
    "causal": EVERY,
    "key padding": EVERY,
    "packed": EVERY,
    "windowed": EVERY,
    "biased": EVERY,
    "relative bias": EVERY,
    "gated relative bias": (512, 2048),
    "boolean mask": EVERY,
    "dropout": EVERY,
    "1 query": (8192,),
    "16 queries": (8192,),
}
HEADLINE = {
    ("full", 512, 64),
    ("full", 2048, 64),
    ("full", 2048, 128),
    ("causal", 2048, 64),
    ("key padding", 512, 64),
    ("packed", 512, 64),
    ("windowed", 2048, 64),
    ("biased", 512, 64),
    ("relative bias", 512, 64),
    ("boolean mask", 2048, 64),
    ("dropout", 2048, 64),
    ("1 query", 8192, 64),
}


def natural_lengths(tokens: int, longest: int) -> list[int]:
    """Draw log-normal lengths with about ``tokens`` real tokens, half of the batch padded.

    The first is the longest, as padded batches have one; the mean is half of it or, of a batch of
    two or so, a little more. The same for the same arguments.
    """
    draw = random.Random(0)
    count = max(2 * tokens // longest, 2)
    shares = [draw.lognormvariate(0.0, 0.6) for _ in range(count - 1)]
    rest = max(tokens - longest, (count - 1) * longest / 4)
    scaled = (round(share * rest / sum(shares)) for share in shares)
    return [longest, *(min(max(length, 1), longest) for length in scaled)]


def cases(sizes: Sizes, dtype: torch.dtype) -> list[Case]:
    """List about ``sizes.tokens`` real keys in sequences of each length, heads of 64 and of 128."""
    if sizes.name == "tiny":
        return [_case(kind, sizes.tokens, 32, 64, dtype, headline=True) for kind in LENGTHS]
    return [
        _case(kind, sizes.tokens, length, dim, dtype, headline=(kind, length, dim) in HEADLINE)
        for kind, lengths in LENGTHS.items()
        for dim in (64, 128)
        for length in lengths
        if length <= sizes.tokens
    ]


def _case(
    kind: str, tokens: int, length: int, dim: int, dtype: torch.dtype, *, headline: bool
) -> Case:
    heads = WIDTH // dim
    lengths = natural_lengths(tokens, length) if kind in ("key padding", "packed") else None
    batch = tokens // length if lengths is None else len(lengths)
    queries = int(kind.split()[0]) if kind.endswith(("query", "queries")) else length
    radius = min(RADIUS, length - 1)
    options: dict[str, Any] = {
        "kind": kind,
        "is_causal": kind == "causal",
        "p": P if kind == "dropout" else 0.0,
        "length": length,
        "lengths": lengths,
        "radius": radius,
        "window": length // 8 if kind == "windowed" else None,
    }

    def make(device: torch.device) -> Inputs:
        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, device=device, dtype=dtype)

        if kind == "packed":
            ends = torch.tensor([0, *itertools.accumulate(lengths or ())], device=device)
            rows = {
                name: draw(sum(lengths or ()), heads, dim).requires_grad_()
                for name in ("query", "key", "value")
            }
            return {**rows, "cu_seqlens": ends.int()}

        # As a projection leaves them: heads are strided, not contiguous.
        inputs = {
            name: draw(batch, count, heads, dim).transpose(1, 2).requires_grad_()
            for name, count in (("query", queries), ("key", length), ("value", length))
        }
        if lengths is not None:  # said in two ways; a provider takes one
            inputs["key_lengths"] = torch.tensor(lengths, device=device, dtype=torch.int32)
            inputs["key_mask"] = real_positions(lengths, length, device)
        elif kind == "boolean mask":
            inputs["attn_mask"] = within_window(length, length // 8, device)[None, None]
        elif kind == "biased":
            inputs["attn_mask"] = draw(1, heads, length, length).requires_grad_()
        elif kind.endswith("relative bias"):
            inputs["relative_bias"] = draw(heads, 2 * radius + 1).requires_grad_()
            if kind.startswith("gated"):
                inputs["relative_bias_gate"] = draw(batch, heads, length).requires_grad_()
        return inputs

    name = f"{kind} B={batch} H={heads} S={length} d={dim}"
    if lengths is not None:
        name += f" mean/max={sum(lengths) / batch / length:.2f}"
    return Case(
        "attention",
        name,
        dtype,
        make,
        _costs(options, batch, heads, queries, dim, dtype.itemsize),
        options,
        headline,
        part=_part(kind, lengths),
        before=_check_dropout if kind == "dropout" else None,
    )


def _costs(
    o: dict[str, Any], batch: int, heads: int, queries: int, dim: int, itemsize: int
) -> counting.Costs:
    kind, length, lengths = o["kind"], o["length"], o["lengths"]
    count = functools.partial(counting.attention, heads=heads, dim=dim, itemsize=itemsize)
    if kind == "packed":
        pairs = sum(own * own for own in lengths) * heads
        return count(batch=1, length=sum(lengths), pairs=pairs, mask_bytes=4 * (batch + 1))
    pairs, extra = batch * heads * queries * length, {}
    if kind == "causal":
        pairs = length * (length + 1) // 2 * batch * heads
    elif kind == "key padding":
        pairs = sum(lengths) * length * heads
        extra = {"real_keys": sum(lengths), "mask_bytes": 4 * batch}
    elif kind in ("windowed", "boolean mask"):
        near = length // 8
        row = (min(i, near) + min(length - 1 - i, near) + 1 for i in range(length))
        pairs = sum(row) * batch * heads
        extra = {"mask_bytes": length * length if kind == "boolean mask" else 0}
    elif kind == "biased":
        extra = {"bias_bytes": heads * length * length * itemsize}
    elif kind.endswith("relative bias"):
        gates = batch * length if kind.startswith("gated") else 0
        extra = {"bias_bytes": heads * (2 * o["radius"] + 1 + gates) * itemsize}
    return count(batch=batch, length=queries, keys=length, pairs=pairs, **extra)


def _part(kind: str, lengths: list[int] | None) -> Part:
    """Take what the truth is computed for: all scores of all heads in float64 would not fit."""
    if kind == "packed" and lengths is not None:
        return functools.partial(_last_two_sequences, tokens=sum(lengths[-2:]))
    return _all_sequences if kind.endswith(("biased", "relative bias")) else _last_sequence


def _last_sequence(tensor: Tensor) -> Tensor:
    """Take the first and last head of the last sequence.

    Masks that all sequences or heads share keep their size of 1.
    """
    heads = tensor.shape[1] if tensor.dim() == 4 else 1
    return tensor[-1:, :: heads - 1] if heads > 1 else tensor[-1:]


def _all_sequences(tensor: Tensor) -> Tensor:
    """Take the first and last head of all: the gradient of a bias is a sum over sequences."""
    return tensor[:, :: tensor.shape[1] - 1] if tensor.dim() > 2 else tensor[:: len(tensor) - 1]


def _last_two_sequences(tensor: Tensor, tokens: int) -> Tensor:
    """Take the first and last head of the last two packed ones, and where they begin."""
    if tensor.dim() == 1:
        return tensor[-3:] - tensor[-3]
    return tensor[-tokens:, :: tensor.shape[1] - 1]


def fused(case: Case) -> Program:
    """Call the library's ops, which take lengths, windows and tables of biases as they come."""
    from fusedformer import functional as F

    o = case.options
    if o["kind"] == "packed":
        longest = o["length"]
        return Program(
            lambda query, key, value, cu_seqlens: F.varlen_attention(
                query, key, value, cu_seqlens, cu_seqlens, longest, longest
            )
        )
    window = None if o["window"] is None else (o["window"], o["window"])

    def attention(p: float) -> Callable[..., Any]:
        def call(key_mask: Tensor | None = None, **inputs: Any) -> Any:  # key_lengths say it too
            return F.scaled_dot_product_attention(
                **inputs, dropout_p=p, is_causal=o["is_causal"], window=window
            )

        return call

    return Program(attention(o["p"]), checked=attention(0.0))


def fused_padded(case: Case) -> Program:
    """Call the library on packed sequences as a padded batch: what packing is worth."""
    from fusedformer import functional as F

    o = case.options
    if o["kind"] != "packed":
        raise NotApplicable("pads packed sequences")

    @functools.cache
    def ends(device: torch.device) -> Tensor:
        return torch.tensor(o["lengths"], device=device, dtype=torch.int32)

    return Program(
        lambda query, key, value, cu_seqlens: F.scaled_dot_product_attention(
            query, key, value, key_lengths=ends(query.device)
        ),
        layout=padded(o["lengths"]),
    )


def truth(case: Case, device: torch.device) -> Program:
    """Compute the library's definition, without dropout and without the log-sum-exp."""
    from fusedformer import reference

    o = case.options
    window = None if o["window"] is None else (o["window"], o["window"])

    def call(cu_seqlens: Tensor | None = None, **inputs: Any) -> Tensor:
        if cu_seqlens is not None:
            return reference.varlen_attention(
                **inputs,
                cu_seqlens_q=cu_seqlens,
                cu_seqlens_k=cu_seqlens,
                max_seqlen_q=o["length"],
                max_seqlen_k=o["length"],
            )[0]
        return reference.scaled_dot_product_attention(
            **inputs, is_causal=o["is_causal"], window=window
        )[0]

    return Program(call)


def _check_dropout(program: Program, inputs: Inputs) -> None:
    """Check that dropout drops the asked share, and the same in the backward.

    With zero queries every weight is 1/S. Values that are a row of the identity for some of the
    keys then show those keys' weights alone: 0 where dropped, 1/(S (1 - p)) where kept. And the
    output is linear in the values, hence <output, g> = <values, gradient of values> if, and only
    if, both directions used one mask.
    """
    query, key, value = (inputs[name] for name in ("query", "key", "value"))
    eps = torch.finfo(value.dtype).eps
    length, shown = key.shape[2], min(value.shape[2:])
    picks = torch.arange(shown, device=value.device)
    with torch.no_grad():
        one_hot = torch.zeros_like(value)
        one_hot[:, :, picks * (length // shown), picks] = 1.0
        weights = program.function(query=query * 0, key=key, value=one_hot)[..., :shown].double()
    kept = weights > 0
    check_kept_share(kept.double().mean().item(), kept.numel(), P)
    if (weights[kept] * length * (1 - P) - 1).abs().max() > 4 * eps:
        raise AssertionError(f"a kept weight is not scaled by 1 / {1 - P}")
    output = program.function(query=query, key=key, value=value)
    grad = torch.randn_like(output)
    (value_grad,) = torch.autograd.grad(output, [value], grad)
    left = output.detach().double() * grad
    right = value.detach().double() * value_grad
    # Both sums carry independent roundings of relative size eps.
    slack = 8 * eps * (left.norm() + right.norm())
    if not (left.sum() - right.sum()).abs() <= slack:
        raise AssertionError("the backward's dropout mask is not the forward's")


def providers(device: torch.device, compile: str) -> dict[str, Provider]:
    """List who computes it, those that are here; each of SDPA's backends by name."""
    found: dict[str, Any] = {
        "fusedformer": fused,
        "fusedformer padded": fused_padded,
        REFERENCE: stock(),
        **{name: stock(backend) for name, backend in SDPA_BACKENDS.items()},
        "FlexAttention": flex_attention,
        "torch varlen_attn": torch_varlen,
        "flash_attn": flash_attn,
        "xformers": xformers_attention,
    }
    return present(found, device, compile)


SUITE = Suite("attention", cases, providers, truth)


def test_attention(benchmark: Any, contest: Any) -> None:
    """Time one provider of one case in one direction; see conftest.py."""
    contest(benchmark)
