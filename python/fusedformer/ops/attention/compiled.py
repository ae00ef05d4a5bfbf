"""Attention of packed sequences by C++ that was compiled for this CPU, in one parallel region.

ATen has no attention of packed sequences: they are copied into batches of near lengths, and each
batch is a call of its own that waits for all threads. This is what inference and training take
where they can; masks and all other terms are left to ATen. Dropout draws the numbers that ATen's
batches draw, so that a compiler that is not there changes nothing but roundings.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from fusedformer._internal.autocast import autocast_dtype
from fusedformer._internal.tracing import is_eager
from fusedformer.ops._registered import plain_apply
from fusedformer.ops._shared import must_see_operators
from fusedformer.ops.attention.groups import groups_of, stay_aligned
from fusedformer.ops.attention.terms import AttentionTerms
from fusedformer.ops.dropout_aten import draw_into, dropped_again, kept_factor
from fusedformer_kernels.cpu import attention as kernel
from fusedformer_kernels.cpu import build
from fusedformer_kernels.cpu.attention import Packed

_DTYPES = torch.float32, torch.bfloat16
_PLAIN = Tensor, Parameter
_INTEGERS = torch.int32, torch.int64
# With any of these, scores are more than products with a scale.
_MORE = (
    "mask", "key_mask", "key_lengths", "slopes", "table", "sinks", "left", "right", "softcap",
)  # fmt: skip


def attention_compiled(
    query: Tensor, key: Tensor, value: Tensor, terms: AttentionTerms
) -> Tensor | None:
    """Output ``[1, H, tokens, Ev]`` of the packed form; None where this is not to compute it."""
    if not _may((query, key, value), terms):
        return None
    output = _attend([t[0].transpose(0, 1) for t in (query, key, value)], terms)
    return None if output is None else output.transpose(0, 1)[None]


def self_attention_compiled(qkv: Tensor, terms: AttentionTerms) -> Tensor | None:
    """Output ``[1, tokens, H, D]`` of one projection ``[1, tokens, 3, H, D]``, or None."""
    if not _may((qkv,), terms):
        return None
    output = _attend([qkv[0]], terms)
    return None if output is None else output[None]


def packed_attention_compiled(
    query: Tensor, key: Tensor, value: Tensor, starts_q: Tensor, starts_k: Tensor, scale: float
) -> Tensor | None:
    """Output ``[1, tokens, H, Ev]``, contiguous, of ``[1, H, tokens, E]`` and no terms but a scale.

    In little of the caller's time, for inference alone. None where this is not to compute it,
    shapes that do not fit included.
    """
    if torch.is_grad_enabled() or not scale > 0 or not is_eager():
        return None
    dtype, (batch, heads, tokens, dim) = query.dtype, query.shape
    tokens_k = value.shape[2]
    if (
        not (dtype is torch.float32 or dtype is torch.bfloat16)
        or batch != 1
        or not query.numel()
        or key.shape != (1, heads, tokens_k, dim)
        or value.shape[:2] != (1, heads)
        or not (_is_read(query, dtype) and _is_read(key, dtype) and _is_read(value, dtype))
        or not (_are_starts(starts_q) and _are_starts(starts_k))
        or starts_q.shape != starts_k.shape
        or torch.is_autocast_enabled("cpu")
    ):
        return None
    if starts_q.dtype is not starts_k.dtype:
        starts_q, starts_k = starts_q.long(), starts_k.long()
    return _attended_at_once(query, key, value, starts_q, starts_k, tokens, tokens_k, scale)


def whole_attention_compiled(
    query: Tensor, key: Tensor, value: Tensor, terms: AttentionTerms
) -> Tensor | None:
    """Output ``[B, H, L, Ev]``, in memory by rows, of whole sequences and no terms but a scale.

    Each gets the bits that it gets packed. For inference alone; None where this is not to compute
    it.
    """
    tensors = query, key, value
    batch, heads, length, _ = query.shape
    keys, dtype = key.shape[2], query.dtype
    if (
        not (dtype is torch.float32 or dtype is torch.bfloat16)
        or terms.p
        or not terms.scale > 0
        or terms.starts_q is not None
        or any(getattr(terms, name) is not None for name in _MORE)
        or not all(_is_read(t, dtype) and t.shape[:2] == (batch, heads) for t in tensors)
        or not (query.numel() and value.numel())
        or torch.is_grad_enabled()  # frozen layers have the bits that they have while they learn
        or not is_eager()
        or torch.is_autocast_enabled("cpu")
    ):
        return None
    starts = _starts_of(batch, length), _starts_of(batch, keys)
    q, k, v = (_by_rows(t) for t in tensors)
    out = _attended_at_once(q, k, v, *starts, batch * length, batch * keys, terms.scale)
    return None if out is None else torch.unflatten(out[0], 0, (batch, length)).transpose(1, 2)


def _by_rows(tensor: Tensor) -> Tensor:
    """``[B, H, L, E]`` in which one step leads from each row to the next, over all of the batch."""
    batch, plane, row, element = tensor.stride()
    if tensor.shape[2] == 1:  # its own step to the next row may be any number
        return tensor.as_strided(tensor.shape, (batch, plane, batch, element))
    if tensor.shape[0] == 1 or batch == tensor.shape[2] * row:
        return tensor
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


@functools.lru_cache(maxsize=64)
def _starts_of(batch: int, length: int) -> Tensor:
    with torch.inference_mode(False):
        return torch.arange(batch + 1, device="cpu") * length


def _attended_at_once(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts_q: Tensor,
    starts_k: Tensor,
    tokens_q: int,
    tokens_k: int,
    scale: float,
) -> Tensor | None:
    """Output ``[1, tokens, H, Ev]``, contiguous; None without a compiler, or if starts don't fit.

    The first of a batch, its heads and rows tell where all of them are.
    """
    attend = kernel.attention_at_once()
    if attend is None:
        return None
    heads, dim, value_dim = query.shape[1], query.shape[3], value.shape[3]
    out = query.new_empty((1, tokens_q, heads, value_dim))
    (_, q_plane, q_row, _), (_, k_plane, k_row, _) = query.stride(), key.stride()
    _, v_plane, v_row, _ = value.stride()
    fits = attend(
        query.dtype is torch.bfloat16,
        query.data_ptr(), key.data_ptr(), value.data_ptr(), out.data_ptr(),
        starts_q.dtype is torch.int64, starts_q.data_ptr(), starts_k.data_ptr(),
        starts_q.shape[0] - 1, heads, tokens_q, tokens_k,
        q_row, q_plane, k_row, k_plane, v_row, v_plane,
        dim, value_dim, scale, torch.get_num_threads(),
    )  # fmt: skip
    return out if fits else None


def _is_read(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether C++ reads ``tensor``: a plain one on the CPU, its rows contiguous."""
    is_plain = type(tensor) in _PLAIN and tensor.is_cpu and tensor.dtype is dtype
    return is_plain and tensor.stride(3) == 1


def _are_starts(starts: Tensor) -> bool:
    is_plain = type(starts) in _PLAIN and starts.is_cpu and starts.dtype in _INTEGERS
    return is_plain and starts.dim() == 1 and starts.is_contiguous() and starts.shape[0] > 0


def _may(tensors: tuple[Tensor, ...], terms: AttentionTerms) -> bool:
    """Whether this is compiled: plain tensors, and of all terms a scale and dropout alone."""
    first = tensors[0]
    return (
        terms.starts_q is not None
        and terms.starts_k is not None
        and not torch.compiler.is_compiling()
        and first.dtype in _DTYPES
        and all(
            type(t) in _PLAIN
            and t.device.type == "cpu"
            and t.dtype == first.dtype
            and t.stride(-1) == 1
            for t in tensors
        )
        and first.numel() > 0
        and all(t.shape[1] == first.shape[1] for t in tensors)
        and terms.scale > 0
        and all(getattr(terms, name) is None for name in _MORE)
        and is_eager()
        and autocast_dtype("scaled_dot_product_attention", first) in (None, first.dtype)
        and build.library() is not None
    )


def _attend(tensors: list[Tensor], terms: AttentionTerms) -> Tensor | None:
    """Output ``[tokens, H, Ev]``; None if the starts are not those of the tensors."""
    assert terms.starts_q is not None and terms.starts_k is not None
    starts_q = terms.starts_q.long().contiguous()
    starts_k = starts_q
    if terms.starts_k is not terms.starts_q:
        starts_k = terms.starts_k.long().contiguous()
    packed, kept = Packed(starts_q, starts_k, terms.scale), None
    q, k, v = _split(tensors)
    if not kernel.fits(packed, q.shape[0], k.shape[0]):
        return None
    if terms.p:
        kept, places = _draw(packed, terms, q.shape[1])
        packed = packed._replace(places=places, factor=kept_factor(terms.p))
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        output: Tensor = _attention(packed, terms.p, kept, *tensors)
        return output
    return kernel.attention_forward(q, k, v, kept, packed)


def _split(tensors: Sequence[Any]) -> tuple[Any, Any, Any]:
    """Query, key and value, or those of one projection ``[tokens, 3, H, D]``."""
    q, k, v = tensors if len(tensors) == 3 else tensors[0].unbind(1)
    return q, k, v


def _draw(packed: Packed, terms: AttentionTerms, heads: int) -> tuple[Tensor, Tensor]:
    """Draw which scores dropout keeps, in the order of ATen's batches ``[n, H, queries, keys]``.

    And for each sequence, where it begins among them, and how far its next head and query are.
    """
    starts = packed.starts_q, packed.starts_k
    lengths = tuple(starts[0].diff().tolist()), tuple(starts[1].diff().tolist())
    groups = groups_of(*lengths, heads, may_pad=stay_aligned(terms, *lengths))
    sizes = [len(one.members) * heads * one.queries * one.keys for one in groups]
    kept = torch.empty(sum(sizes), dtype=torch.uint8, device="cpu")
    places, begin = [[0, 0, 0]] * len(lengths[0]), 0
    for one, part in zip(groups, torch.split(kept, sizes), strict=True):
        if len(part):
            draw_into(part, terms.p)
        plane = one.queries * one.keys
        for member in one.members:
            places[member] = [begin, plane, one.keys]
            begin += heads * plane
    return kept, torch.tensor(places, dtype=torch.int64, device="cpu")


class _Attention(torch.autograd.Function):
    """Attention of query, key and value, or of one projection, whose gradient is one tensor."""

    @staticmethod
    def forward(
        ctx: Any, packed: Packed, p: float, kept: Tensor | None, *tensors: Tensor
    ) -> Tensor:
        ctx.packed, ctx.p = packed, p
        ctx.save_for_backward(kept, *tensors)
        return kernel.attention_forward(*_split(tensors), kept, packed)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kept, *tensors = ctx.saved_tensors
        needs = ctx.needs_input_grad[3:]
        if torch.is_grad_enabled() or must_see_operators() or type(grad) is not Tensor:
            return None, None, None, *_differentiable_gradients(ctx, grad, kept, tensors, needs)
        grads = [
            t.new_empty(t.shape) if need else None for t, need in zip(tensors, needs, strict=True)
        ]
        if grad.stride(-1) != 1:
            grad = grad.contiguous()
        q, k, v = _split(tensors)
        kernel.attention_backward(grad, q, k, v, kept, ctx.packed, _split(grads))
        return None, None, None, *grads


_attention = plain_apply(_Attention)


def _differentiable_gradients(
    ctx: Any, grad: Tensor, kept: Tensor | None, tensors: list[Tensor], needs: tuple[bool, ...]
) -> list[Tensor | None]:
    """Gradients of the tensors that can be differentiated again, or of a batch of gradients."""
    wanted = [t for t, need in zip(tensors, needs, strict=True) if need]
    twice = torch.is_grad_enabled()
    with torch.enable_grad():
        output = _composed(_split(tensors), kept, ctx.packed, ctx.p)
        found = iter(torch.autograd.grad(output, wanted, grad, create_graph=twice))
    return [next(found) if need else None for need in needs]


def _composed(
    tensors: tuple[Tensor, Tensor, Tensor], kept: Tensor | None, packed: Packed, p: float
) -> Tensor:
    """The same by ATen, sequence by sequence."""
    queries, keys = (starts.diff().tolist() for starts in packed[:2])
    of_sequences = (
        torch.split(tensor, lengths)
        for tensor, lengths in zip(tensors, (queries, keys, keys), strict=True)
    )
    outputs = []
    for i, parts in enumerate(zip(*of_sequences, strict=True)):
        q, k, v = (part.transpose(0, 1).float() for part in parts)
        weights = (q @ k.mT * packed.scale).softmax(-1)
        if kept is not None and packed.places is not None:
            begin, head, row = packed.places[i].tolist()
            own = kept.as_strided(weights.shape, (head, row, 1), begin)
            weights = dropped_again(weights, own, p)
        outputs.append((weights @ v).transpose(0, 1))
    return torch.cat(outputs).to(tensors[0].dtype)
