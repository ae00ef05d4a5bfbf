"""Peers in attention: SDPA on each backend by name, FlexAttention, varlen_attn, other libraries.

Each takes the inputs that ``bench_attention`` makes. What a peer has no argument for it gets as a
mask, a padded batch or a materialized bias, made before the clock starts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from harness.case import Case, Layout, NotApplicable, Program, Provider, Unsupported

SDPA_BACKENDS = {
    "SDPA flash": SDPBackend.FLASH_ATTENTION,
    "SDPA cudnn": SDPBackend.CUDNN_ATTENTION,
    "SDPA efficient": SDPBackend.EFFICIENT_ATTENTION,
    "SDPA math": SDPBackend.MATH,
}
PLAIN = ("full", "causal", "dropout", "1 query", "16 queries")


def real_positions(lengths: Sequence[int], longest: int, device: torch.device) -> Tensor:
    """Make ``[batch, longest]``: True where a padded batch holds a real token."""
    ends = torch.tensor(lengths, device=device)
    return torch.arange(longest, device=device) < ends[:, None]


def within_window(length: int, window: int, device: torch.device) -> Tensor:
    """Make ``[length, length]``: True where a key is no further than ``window`` from a query."""
    positions = torch.arange(length, device=device)
    return (positions[:, None] - positions).abs() <= window


def padded(lengths: Sequence[int]) -> Layout:
    """Hold packed ``[tokens, heads, dim]`` as ``[batch, heads, longest, dim]``, padding zero."""
    real = functools.cache(lambda device: real_positions(lengths, max(lengths), device))

    def own(name: str, tensor: Tensor) -> Tensor:
        if name not in ("query", "key", "value", "output"):
            return tensor
        rows = tensor.new_zeros(len(lengths), max(lengths), *tensor.shape[1:])
        rows[real(tensor.device)] = tensor
        return rows.transpose(1, 2)

    return Layout(own, lambda name, tensor: tensor.transpose(1, 2)[real(tensor.device)])


def materialized(length: int, radius: int) -> Layout:
    """Hold ``relative_bias [heads, 2 radius + 1]`` as a bias ``[1, heads, length, length]``."""

    @functools.cache
    def entry(device: torch.device) -> Tensor:
        positions = torch.arange(length, device=device)
        return radius + (positions - positions[:, None]).clamp(-radius, radius)

    def own(name: str, tensor: Tensor) -> Tensor:
        return tensor[:, entry(tensor.device)][None] if name == "relative_bias" else tensor

    def back(name: str, tensor: Tensor) -> Tensor:
        if name != "relative_bias":
            return tensor
        places, size = entry(tensor.device).flatten(), 2 * radius + 1
        # Summed in float32, as a careful user would: in bfloat16 the sum would drown the matrix's
        # own error, in float64 it would be better than any peer's.
        wide = torch.promote_types(tensor.dtype, torch.float32)
        sums = [places.bincount(head.flatten().to(wide), size) for head in tensor[0]]
        return torch.stack(sums).to(tensor.dtype)

    return Layout(own, back)


def stock(backend: SDPBackend | None = None) -> Provider:
    """Call torch's attention on one backend alone, or on the one that torch picks."""

    def run(*args: Any) -> Tensor:
        if backend is None:
            return F.scaled_dot_product_attention(*args)
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(*args)

    def build(case: Case) -> Program:
        o = case.options
        layout = None
        if o["kind"] == "packed":
            layout = padded(o["lengths"])
        elif o["kind"].endswith("relative bias"):
            layout = materialized(o["length"], o["radius"])

        @functools.cache
        def known_mask(device: torch.device) -> Tensor | None:
            if o["kind"] == "windowed":
                return within_window(o["length"], o["window"], device)[None, None]
            if o["lengths"] is not None:
                return real_positions(o["lengths"], o["length"], device)[:, None, None, :]
            return None

        def attention(p: float) -> Callable[..., Tensor]:
            def call(
                query: Tensor,
                key: Tensor,
                value: Tensor,
                attn_mask: Tensor | None = None,
                relative_bias: Tensor | None = None,
                relative_bias_gate: Tensor | None = None,
                **_: Tensor,
            ) -> Tensor:
                mask = relative_bias if attn_mask is None else attn_mask
                if relative_bias is not None and relative_bias_gate is not None:
                    mask = relative_bias_gate[..., None] * relative_bias
                mask = known_mask(query.device) if mask is None else mask
                return run(query, key, value, mask, p, o["is_causal"])

            return call

        return Program(attention(o["p"]), checked=attention(0.0), layout=layout)

    return build


def flash_attn(case: Case) -> Program:
    """Call Dao's package; ``[batch, length, heads, dim]``, so the transposes below are views."""
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    o = case.options
    if o["kind"] not in (*PLAIN, "windowed", "packed"):
        raise Unsupported("flash_attn is timed here without masks and biases only")
    window = (-1, -1) if o["window"] is None else (o["window"], o["window"])

    def packed(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor) -> Any:
        longest = o["length"]
        return flash_attn_varlen_func(query, key, value, cu_seqlens, cu_seqlens, longest, longest)

    def attention(p: float) -> Callable[..., Any]:
        def call(query: Tensor, key: Tensor, value: Tensor) -> Any:
            q, k, v = (t.transpose(1, 2) for t in (query, key, value))
            return flash_attn_func(
                q, k, v, dropout_p=p, causal=o["is_causal"], window_size=window
            ).transpose(1, 2)

        return call

    if o["kind"] == "packed":
        return Program(packed)
    return Program(attention(o["p"]), checked=attention(0.0))


def torch_varlen(case: Case) -> Program:
    """Call torch's own attention of packed sequences."""
    if case.options["kind"] != "packed":
        raise NotApplicable("takes packed sequences only")
    from torch.nn.attention.varlen import varlen_attn

    longest = case.options["length"]
    return Program(
        lambda query, key, value, cu_seqlens: varlen_attn(
            query, key, value, cu_seqlens, cu_seqlens, longest, longest
        )
    )


def xformers_attention(case: Case) -> Program:
    """Call ``xformers.ops.memory_efficient_attention`` on the backend that it picks."""
    from xformers.ops import LowerTriangularMask, memory_efficient_attention

    if case.options["kind"] not in PLAIN:
        raise Unsupported("xformers is timed here without masks and biases only")
    bias = LowerTriangularMask() if case.options["is_causal"] else None

    def attention(p: float) -> Callable[..., Any]:
        def call(query: Tensor, key: Tensor, value: Tensor) -> Any:
            q, k, v = (t.transpose(1, 2) for t in (query, key, value))
            return memory_efficient_attention(q, k, v, attn_bias=bias, p=p).transpose(1, 2)

        return call

    return Program(attention(case.options["p"]), checked=attention(0.0))


def flex_attention(case: Case) -> Program:
    """Call torch's FlexAttention, compiled for the exact shapes, block masks made beforehand.

    It takes the table of relative biases as it is, and packed sequences as one with a mask.
    """
    from torch.nn.attention.flex_attention import create_block_mask
    from torch.nn.attention.flex_attention import flex_attention as flex

    o = case.options
    kind, window, radius = o["kind"], o["window"], o["radius"]
    if o["p"]:
        raise Unsupported("FlexAttention has no dropout")

    def attend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Any,
        bias: Tensor | None,
        table: Tensor | None,
        gate: Tensor | None,
    ) -> Any:
        added: Any = None
        if bias is not None:
            added = lambda score, b, h, i, j: score + bias[0, h, i, j]
        elif table is not None and gate is not None:
            added = lambda score, b, h, i, j: (
                score + gate[b, h, i] * table[h, radius + (j - i).clamp(-radius, radius)]
            )
        elif table is not None:
            added = lambda score, b, h, i, j: (
                score + table[h, radius + (j - i).clamp(-radius, radius)]
            )
        return flex(query, key, value, score_mod=added, block_mask=mask)

    run = torch.compile(attend, dynamic=False)

    def block_mask(key: Tensor, inputs: dict[str, Tensor]) -> Any:
        batch, length = None, key.shape[2]
        if kind == "causal":
            visible = lambda b, h, i, j: i >= j
        elif kind == "windowed":
            visible = lambda b, h, i, j: (i - j).abs() <= window
        elif kind == "key padding":
            batch, ends = key.shape[0], inputs["key_lengths"]
            visible = lambda b, h, i, j: j < ends[b]
        elif kind == "boolean mask":
            given = inputs["attn_mask"]
            visible = lambda b, h, i, j: given[0, 0, i, j]
        elif kind == "packed":
            counts = inputs["cu_seqlens"].diff()
            sequence = torch.arange(len(counts), device=key.device).repeat_interleave(counts)
            visible = lambda b, h, i, j: sequence[i] == sequence[j]
        else:
            return None
        return create_block_mask(visible, batch, None, length, length, device=key.device)

    made: list[Any] = []  # one mask: the visible pairs are the same in all sets of inputs

    def call(query: Tensor, key: Tensor, value: Tensor, **inputs: Tensor) -> Any:
        if kind == "packed":
            query, key, value = (t.transpose(0, 1)[None] for t in (query, key, value))
        if not made:
            made.append(block_mask(key, inputs))
        bias = inputs["attn_mask"] if kind == "biased" else None
        table, gate = inputs.get("relative_bias"), inputs.get("relative_bias_gate")
        found = run(query, key, value, made[0], bias, table, gate)
        return found[0].transpose(0, 1) if kind == "packed" else found

    return Program(call)
