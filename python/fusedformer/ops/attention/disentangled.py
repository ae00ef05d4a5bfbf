"""Disentangled attention: the op of the kernels, its autograd, its backends.

The position terms of scores are products of each query (key) with one vector for each bucket of
distances, which are torch's. Kernels read them by the bucket of each distance. They are computed
again in the backward, as they are larger than what they come from.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusedformer._internal.autocast import autocast_off
from fusedformer._internal.backend import chosen_backend
from fusedformer._internal.tracing import is_traced_by_jit
from fusedformer.ops._registered import nothing, registered
from fusedformer.ops._shared import draw_seed, is_transformed, no_double_backward
from fusedformer.ops.attention.calls import check_for_kernels
from fusedformer.ops.attention.disentangled_aten import (
    INPUTS,
    SETTINGS,
    Inputs,
    Settings,
    composed,
    disentangled_attention_aten,
    load,
    output_like,
    save,
    wanted_gradients,
)
from fusedformer.ops.attention.registered import laid_out_like
from fusedformer.ops.attention.terms import AttentionTerms, PositionTerms
from fusedformer.ops.relative_position import distance_buckets


def disentangled_attention(inputs: Inputs, settings: Settings) -> Tensor:
    """See :func:`fusedformer.functional.disentangled_attention`; without a seed."""
    by_kernels = chosen_backend(inputs.query) == "triton"
    if by_kernels:
        check_for_kernels("disentangled_attention", inputs.query, inputs.value)
    elif is_traced_by_jit() or is_transformed():
        return composed(inputs, settings)
    settings = settings._replace(seed=draw_seed(settings.p, inputs.query.device))
    found: Tensor
    if by_kernels:
        found, _ = _disentangled(*inputs, *settings)
    else:
        found = disentangled_attention_aten(*inputs, *settings)
    return found


def _attention_terms(settings: Settings) -> AttentionTerms:
    return AttentionTerms(
        key_mask=settings.key_mask,
        starts_q=settings.starts_q,
        starts_k=settings.starts_k,
        seed=settings.seed,
        p=settings.p,
        scale=settings.scale,
        max_queries=settings.max_queries,
        max_keys=settings.max_keys,
    )


def _position_terms(inputs: Inputs, settings: Settings) -> tuple[PositionTerms, Tensor]:
    """Return the terms, and the first distance of each bucket."""
    query, key, _, position_key, position_query = inputs
    table = position_query if position_key is None else position_key
    buckets, firsts = distance_buckets(table.shape[1] // 2, settings.max_distance, table.device)
    terms = _products(query, position_key), _products(key, position_query)
    return PositionTerms(buckets, *terms), firsts


def _products(rows: Tensor, table: Tensor | None) -> Tensor | None:
    """Multiply rows ``[B, H, L, E]`` by a table ``[H, W, E]``: ``[B, H, L, W]``."""
    if table is None:
        return None
    found = torch.bmm(_by_heads(rows), table.transpose(1, 2))
    return torch.unflatten(found, 1, (rows.shape[0], rows.shape[2])).transpose(0, 1)


def _by_heads(rows: Tensor) -> Tensor:
    """``[B, H, L, E]`` as ``[H, B * L, E]``; a view where heads of a token lie together."""
    return rows.transpose(1, 2).flatten(0, 1).transpose(0, 1)


@registered(
    "disentangled_attention",
    schema="(Tensor query, Tensor key, Tensor value, Tensor? position_key, "
    f"Tensor? position_query, {SETTINGS}) -> (Tensor, Tensor)",
)  # fmt: skip
def _disentangled(*given: Any) -> tuple[Tensor, Tensor]:
    """(output, statistics ``[2, B, H, L]`` of each query's softmax)."""
    from fusedformer_kernels.attention.forward import attention_forward

    inputs, settings = Inputs(*given[:INPUTS]), Settings(*given[INPUTS:])
    with autocast_off(inputs.query):
        positions, _ = _position_terms(inputs, settings)
        output, _, statistics = attention_forward(
            *inputs[:3], _attention_terms(settings), False, positions
        )
    return output, statistics


@_disentangled.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    statistics = query.new_empty(2, *query.shape[:3], dtype=torch.float32)
    return output_like(query, value), statistics


@registered(
    "disentangled_attention_backward",
    schema="(Tensor grad, Tensor output, Tensor statistics, Tensor query, Tensor key, "
    f"Tensor value, Tensor? position_key, Tensor? position_query, {SETTINGS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)  # fmt: skip
def _disentangled_backward(
    grad: Tensor, output: Tensor, statistics: Tensor, *given: Any
) -> tuple[Tensor | None, ...]:
    """Gradients of the inputs."""
    from fusedformer_kernels.attention.disentangled import disentangled_backward

    inputs, settings = Inputs(*given[:INPUTS]), Settings(*given[INPUTS:])
    with autocast_off(grad):
        positions, firsts = _position_terms(inputs, settings)
        dq, dk, dv, *sums = disentangled_backward(
            grad, *inputs[:3], output, statistics, _attention_terms(settings), positions, firsts
        )
        of_key = _add_gradients(dq, sums[0], inputs.query, inputs.position_key)
        of_query = _add_gradients(dk, sums[1], inputs.key, inputs.position_query)
        return dq, dk, dv, of_key, of_query


def _add_gradients(
    drows: Any, sums: Tensor | None, rows: Tensor, table: Tensor | None
) -> Tensor | None:
    """Add to the gradient of ``rows`` that of their products; return that of the table."""
    if sums is None or table is None:
        return None
    flat = sums.transpose(0, 1).flatten(1, 2)
    _by_heads(drows).baddbmm_(flat, table)
    return torch.bmm(flat.transpose(1, 2), _by_heads(rows))


@_disentangled_backward.register_fake
def _(grad: Tensor, output: Tensor, statistics: Tensor, *given: Any) -> tuple[Tensor, ...]:
    tables = (nothing(grad) if x is None else x.new_empty(x.shape) for x in given[3:INPUTS])
    return (*(laid_out_like(x, True) for x in given[:3]), *tables)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    save(ctx, inputs, *output)
    ctx.mark_non_differentiable(output[1])


def _autograd(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    inputs, settings, (output, statistics) = load(ctx)
    found = _disentangled_backward(grad, output, statistics, *inputs, *settings)
    return wanted_gradients(ctx, found)


_disentangled.register_autograd(_autograd, setup_context=_setup)
_disentangled_backward.register_autograd(no_double_backward("disentangled_attention"))
