"""Attention: from the public arguments to the one form that kernels and ATen composition take."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fusedformer._internal import checks
from fusedformer._internal.backend import chosen_backend
from fusedformer._internal.plans import unplanned
from fusedformer.errors import BadValueError
from fusedformer.ops._shared import draw_seed
from fusedformer.ops.attention import packed, registered
from fusedformer.ops.attention.aten import (
    attention_aten,
    attention_weights_aten,
    merge_attention_states_aten,
)
from fusedformer.ops.attention.compiled import (
    packed_attention_compiled,
    self_attention_compiled,
    whole_attention_compiled,
)
from fusedformer.ops.attention.terms import AttentionTerms, scale_of

MAX_HEAD_DIM = 256


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    terms: AttentionTerms,
    batch: tuple[int, ...],
    *,
    enable_gqa: bool,
    return_lse: bool,
    return_weights: bool | str,
    weights_dtype: torch.dtype | None,
) -> Tensor | tuple[Tensor, ...]:
    """See :func:`fusedformer.functional.scaled_dot_product_attention`.

    ``batch`` is the shape before length and width that all three broadcast to, heads last.
    """
    if len(batch) != 2:
        unplanned()  # reshaping may copy
    squeeze = enable_gqa and query.dim() == 3  # the one leading dimension is that of the heads
    if squeeze:
        batch = (1, *batch)
        query, key, value = query[None], key[None], value[None]
    heads_of = key.shape[-3] if enable_gqa else None
    q = _as_4d(query, batch, None)
    k = _as_4d(key, batch, heads_of)
    v = _as_4d(value, batch, heads_of)
    if terms.mask is not None:
        terms = terms._replace(mask=_mask_4d(terms.mask, batch, query, key))
    if terms.gate is not None:
        terms = terms._replace(gate=_gate_3d(terms.gate, batch))
    average, dtype = return_weights == "averaged", weights_dtype or query.dtype
    lse: Tensor | None
    weights: Tensor | None = None
    if chosen_backend(query) == "torch":
        if return_weights:
            output, lse, weights = attention_weights_aten(
                q, k, v, terms, average, dtype, return_lse=return_lse
            )
        else:
            output, lse = _aten(q, k, v, terms, return_lse)
    else:
        check_for_kernels("scaled_dot_product_attention", query, value)
        if terms.p:
            terms = terms._replace(seed=draw_seed(terms.p, query.device))
        wants_lse = return_lse or bool(return_weights)
        output, lse, statistics = registered.attention(q, k, v, wants_lse, *terms)
        if return_weights:
            weights = registered.attention_weights(q, k, lse, statistics, average, dtype, *terms)
    if len(batch) == 2 and weights is None and not squeeze:
        return (output, lse) if return_lse and lse is not None else output
    results = [output.reshape(*batch, *output.shape[-2:])]
    if return_lse and lse is not None:
        results.append(lse.reshape(*batch, lse.shape[-1]))
    if weights is not None:
        planes = batch[:-1] if average and len(batch) > 1 else batch
        results.append(weights.reshape(*planes, *weights.shape[-2:]))
    if squeeze:
        results = [result[0] for result in results]
    return results[0] if len(results) == 1 else tuple(results)


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    terms: AttentionTerms,
    *,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """See :func:`fusedformer.functional.varlen_attention`; ``terms`` have the starts."""
    if terms.mask is not None:
        terms = terms._replace(mask=terms.mask[(None,) * (4 - terms.mask.dim())])
    if terms.gate is not None:
        terms = terms._replace(gate=terms.gate.t()[None])
    q, k, v = (tensor.transpose(0, 1)[None] for tensor in (query, key, value))
    lse: Tensor | None
    if chosen_backend(query) == "torch":
        output, lse = _packed_aten(q, k, v, terms, return_lse)
    else:
        check_for_kernels("varlen_attention", query, value)
        terms = terms._replace(seed=draw_seed(terms.p, query.device))
        output, lse, _ = registered.attention(q, k, v, return_lse, *terms)
    output = output[0].transpose(0, 1)
    return (output, lse[0]) if return_lse and lse is not None else output


def scaled_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts_q: Tensor,
    starts_k: Tensor,
    scale: float | None,
) -> Tensor | None:
    """``[1, tokens, H, Ev]`` of packed ``[1, H, tokens, E]``, whose scores have a scale alone.

    None where C++ is not to compute it: :func:`varlen_attention` does then, and checks arguments.
    """
    if chosen_backend(query) != "torch":
        return None
    scale = scale_of(scale, query)
    return packed_attention_compiled(query, key, value, starts_q, starts_k, scale)


def self_attention(qkv: Tensor, terms: AttentionTerms) -> Tensor:
    """``[B, L, H, D]`` of one projection ``[B, L, 3, H, D]``, whose gradient comes in one piece.

    ``terms`` are those of :func:`~fusedformer.ops.attention.terms.self_attention_terms`; with
    starts B is 1.
    """
    if chosen_backend(qkv) == "torch":
        compiled = self_attention_compiled(qkv, terms)
        if compiled is not None:
            return compiled
        attend = _aten if terms.starts_q is None else _packed_aten
        return attend(*registered.split_heads(qkv), terms, False)[0].transpose(1, 2)
    check_for_kernels("scaled_dot_product_attention", qkv, qkv)
    terms = terms._replace(seed=draw_seed(terms.p, qkv.device))
    if terms.mask is not None and terms.mask.requires_grad:
        output, *_ = registered.attention(*registered.split_heads(qkv), False, *terms)
    else:
        output, _ = registered.self_attention(qkv, *terms)
    merged: Tensor = output.transpose(1, 2)
    return merged


def merge_attention_states(
    output1: Tensor, lse1: Tensor, output2: Tensor, lse2: Tensor
) -> tuple[Tensor, Tensor]:
    """See :func:`fusedformer.functional.merge_attention_states`."""
    if chosen_backend(output1) == "torch":
        return merge_attention_states_aten(output1, lse1, output2, lse2)
    checks.check_kernel_dtype("merge_attention_states", "output1", output1)
    merged: tuple[Tensor, Tensor] = registered.merge_attention_states(output1, lse1, output2, lse2)
    return merged


def _aten(
    query: Tensor, key: Tensor, value: Tensor, terms: AttentionTerms, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """The torch backend on padded sequences; without padding and gradients it is C++."""
    if not return_lse:
        whole = whole_attention_compiled(query, key, value, terms)
        if whole is not None:
            return whole, None
    return attention_aten(query, key, value, terms, return_lse=return_lse)


def _packed_aten(
    query: Tensor, key: Tensor, value: Tensor, terms: AttentionTerms, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """The torch backend on packed sequences; their lengths are data, which may not be there."""
    if terms.starts_q is not None and checks.has_values(terms.starts_q):
        return attention_aten(query, key, value, terms, return_lse=return_lse)
    terms = terms._replace(seed=draw_seed(terms.p, query.device))
    output, lse = packed.packed_attention_aten(query, key, value, return_lse, *terms)
    return output, lse if return_lse else None


def _as_4d(tensor: Tensor, batch: tuple[int, ...], heads: int | None) -> Tensor:
    """``[batch, heads, sequence, dim]`` with broadcast batch dimensions, a view where possible."""
    leading = batch if heads is None else (*batch[:-1], heads)
    if len(leading) == 2 and tensor.shape[:-2] == leading:
        return tensor
    expanded = tensor.expand(*leading, *tensor.shape[-2:])
    if len(leading) == 2:
        return expanded
    if len(leading) < 2:
        return expanded.reshape(*(leading or (1,)), 1, *tensor.shape[-2:])
    return expanded.reshape(math.prod(leading[:-1]), leading[-1], *tensor.shape[-2:])


def _mask_4d(mask: Tensor, batch: tuple[int, ...], query: Tensor, key: Tensor) -> Tensor:
    """``[batch, heads, queries, keys]`` with size 1 where the mask broadcasts."""
    missing = len(batch) + 2 - mask.dim()
    padded = mask[(None,) * missing] if missing else mask
    if len(batch) == 2:  # size-1 dimensions stay: a gradient is reduced over them
        return padded
    if len(batch) < 2:
        padded = padded.reshape(*padded.shape[:-2], 1, *padded.shape[-2:])
        return padded if len(batch) else padded[None]
    return _as_4d(padded.expand(*batch, query.shape[-2], key.shape[-2]), batch, None)


def _gate_3d(gate: Tensor, batch: tuple[int, ...]) -> Tensor:
    """``[batch, heads, queries]``."""
    if gate.dim() == 3 and len(batch) == 2:
        return gate
    leading = (math.prod(batch[:-1]), batch[-1]) if len(batch) > 1 else (*(batch or (1,)), 1)
    return gate.reshape(*leading, gate.shape[-1])


def check_for_kernels(function: str, query: Tensor, value: Tensor) -> None:
    checks.check_kernel_dtype(function, "query", query)
    sizes: dict[str, Any] = {"query": query.shape[-1], "value": value.shape[-1]}
    for name, size in sizes.items():
        if not 1 <= size <= MAX_HEAD_DIM:
            raise BadValueError(
                f"{function}(): the triton backend supports head dims from 1 to {MAX_HEAD_DIM}, "
                f"but the last dimension of '{name}' is {size}; run it under "
                f"fusedformer.backend('torch')"
            )
