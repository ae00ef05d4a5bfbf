"""Compute embeddings with norm and dropout: registration, autograd and choice of backend."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedformer._internal import checks
from fusedformer._internal.backend import chosen_backend
from fusedformer.errors import BadValueError
from fusedformer.ops._registered import registered
from fusedformer.ops._shared import common_dtype, draw_seed, no_double_backward
from fusedformer.ops.dropout_aten import dropout_aten
from fusedformer.ops.norm_aten import norm_aten
from fusedformer.ops.wide_sums import embedding, summed_by_id

_LONGEST = 8192  # columns; the kernels keep a row in registers


def embedding_layer_norm(
    input: Tensor,
    weight: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    *,
    position_ids: Tensor | None,
    position_weight: Tensor | None,
    token_type_ids: Tensor | None,
    token_type_weight: Tensor | None,
    padding_idx: int | None,
    p: float,
    dtype: torch.dtype | None,
) -> Tensor:
    """Compute :func:`fusedformer.functional.embedding_layer_norm`, with the norm in ``dtype``."""
    width = weight.shape[1]
    if chosen_backend(weight) == "torch":
        total = embedding(input, weight, padding_idx)
        if token_type_weight is not None:
            types = token_type_weight[0]
            if token_type_ids is not None:
                types = embedding(token_type_ids, token_type_weight)
            total = total + types
        if position_weight is not None and position_ids is not None:
            total = total + embedding(position_ids, position_weight)
        normed = norm_aten("layer", total, (width,), norm_weight, norm_bias, eps, dtype)
        return dropout_aten(normed, p)
    checks.check_kernel_dtype("embedding_layer_norm", "weight", weight)
    if width > _LONGEST:
        raise BadValueError(
            f"embedding_layer_norm(): the triton backend supports up to {_LONGEST} columns, but "
            f"'weight' has {width}; run it under fusedformer.backend('torch')"
        )
    # As the kernels read them: rows of contiguous columns, ids one after another.
    input_ids = input.contiguous().view(-1)
    position_ids, token_type_ids = (
        None if t is None else t.contiguous().view(-1) for t in (position_ids, token_type_ids)
    )
    tables = (
        None if t is None else t if t.stride(-1) == 1 else t.contiguous()
        for t in (weight, position_weight, token_type_weight)
    )  # fmt: skip
    weight, position_weight, token_type_weight = tables  # type: ignore[assignment]
    norm_weight, norm_bias = (
        None if t is None else t.contiguous() for t in (norm_weight, norm_bias)
    )
    output, _, _ = _embedding_norm(
        input_ids, weight, position_ids, position_weight, token_type_ids, token_type_weight,
        norm_weight, norm_bias, draw_seed(p, weight.device), p, eps,
        -1 if padding_idx is None else padding_idx, dtype,
    )  # fmt: skip
    return output.view(*input.shape, width)


@registered("embedding_norm")
def _embedding_norm(
    ids: Tensor,
    tokens: Tensor,
    position_ids: Tensor | None,
    positions: Tensor | None,
    type_ids: Tensor | None,
    types: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    p: float,
    eps: float,
    padding_idx: int,
    dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute (output ``[rows, E]`` in ``dtype`` or the tables', mean, rstd).

    A ``padding_idx`` of -1 stands for none.
    """
    from fusedformer_kernels.rows.embedding import Tables, embedding_forward

    tables = Tables(ids, tokens, position_ids, positions, type_ids, types)
    return embedding_forward(tables, weight, bias, seed, p, eps, dtype)


@_embedding_norm.register_fake
def _embedding_norm_fake(
    ids: Tensor, tokens: Tensor, *others: Any
) -> tuple[Tensor, Tensor, Tensor]:
    rows, dtype = ids.shape[0], others[-1]
    mean = tokens.new_empty(rows, dtype=torch.float32)
    return tokens.new_empty(rows, tokens.shape[1], dtype=dtype), mean, mean.clone()


@registered(
    "embedding_norm_backward",
    schema="(Tensor grad, Tensor ids, Tensor tokens, Tensor? position_ids, Tensor? positions, "
    "Tensor? type_ids, Tensor? types, Tensor mean, Tensor rstd, Tensor? weight, Tensor? seed, "
    "float p, bool[] needs, ScalarType parameter_dtype) -> (Tensor, Tensor, Tensor)",
)
def _embedding_norm_backward(
    grad: Tensor,
    ids: Tensor,
    tokens: Tensor,
    position_ids: Tensor | None,
    positions: Tensor | None,
    type_ids: Tensor | None,
    types: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    seed: Tensor | None,
    p: float,
    needs: list[bool],
    parameter_dtype: torch.dtype,
) -> tuple[Tensor | None, ...]:
    """Compute gradients of the sum ``[rows, E]``, weight and bias; ``needs`` says which."""
    from fusedformer_kernels.rows.embedding import Tables, embedding_backward

    tables = Tables(ids, tokens, position_ids, positions, type_ids, types)
    needs_tables, needs_weight, needs_bias = needs
    return embedding_backward(
        grad,
        tables,
        mean,
        rstd,
        weight,
        seed,
        p,
        needs_tables,
        needs_weight,
        needs_bias,
        parameter_dtype,
    )


@_embedding_norm_backward.register_fake
def _embedding_norm_backward_fake(
    grad: Tensor, ids: Tensor, tokens: Tensor, *others: Any
) -> tuple[Tensor | None, ...]:
    needs, dtype = others[-2:]
    width = tokens.shape[1]

    def parameter_grad(wanted: bool) -> Tensor | None:
        return tokens.new_empty(width, dtype=dtype) if wanted else None

    rows = tokens.new_empty(ids.shape[0], width) if needs[0] else None
    return rows, parameter_grad(needs[1]), parameter_grad(needs[2])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tables, weight, bias, seed, ctx.p, _, ctx.padding_idx, _ = inputs
    _, mean, rstd = output
    ctx.dtypes = [None if t is None else t.dtype for t in (weight, bias)]
    ctx.save_for_backward(*tables, mean, rstd, weight, seed)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 13
    *tables, mean, rstd, weight, seed = ctx.saved_tensors
    needs = ctx.needs_input_grad
    wanted = [needs[1] or needs[3] or needs[5], needs[6], needs[7]]
    total_grad, weight_grad, bias_grad = _embedding_norm_backward(
        grad,
        *tables,
        mean,
        rstd,
        weight,
        seed,
        ctx.p,
        wanted,
        common_dtype(ctx.dtypes),
    )
    grads: list[Tensor | None] = []
    for ids, table, padding_idx, needed in zip(
        tables[::2], tables[1::2], (ctx.padding_idx, -1, -1), needs[1:6:2], strict=True
    ):
        grads += [None, _table_grad(total_grad, ids, table, padding_idx) if needed else None]
    weight_dtype, bias_dtype = ctx.dtypes
    return (
        *grads,
        weight_grad.to(weight_dtype) if needs[6] else None,
        bias_grad.to(bias_dtype) if needs[7] else None,
        *(None,) * 5,
    )


def _table_grad(grad: Tensor, ids: Tensor | None, table: Tensor, padding_idx: int) -> Tensor:
    """Sum ``grad``'s rows over equal ids; without ids all are 0."""
    count = table.shape[0]
    if ids is None:
        first = grad.sum(0, dtype=torch.float32).to(grad.dtype)
        return F.pad(first[None], (0, 0, 0, count - 1))
    # ATen writes wherever ids say; those outside are not to be (their gradient is NaN).
    ids = ids.clamp(0, count - 1)
    return summed_by_id(grad, ids, count, padding_idx)


_embedding_norm.register_autograd(_backward, setup_context=_save)
_embedding_norm_backward.register_autograd(no_double_backward("embeddings"))
