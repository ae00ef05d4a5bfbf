"""Rotary position embedding of queries and keys, with the norm of each head before it."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from fusedformer import ops
from fusedformer._internal import checks
from fusedformer._internal.plans import planned
from fusedformer.errors import BadTypeError, BadValueError
from fusedformer.ops.rotary import HeadNorms

_FUNCTION = "rotary_embedding"
_MAX_HEAD_DIM = 512
_WEIGHTS = ("query_weight", "query_bias", "key_weight", "key_bias")


@planned
def rotary_embedding(
    query: Tensor,
    key: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None = None,
    *,
    interleaved: bool = False,
    norm: Literal["rms", "layer"] | None = None,
    query_weight: Tensor | None = None,
    query_bias: Tensor | None = None,
    key_weight: Tensor | None = None,
    key_bias: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """Rotate pairs of columns of queries and keys by the angles of their positions, in one kernel.

    A pair (a, b) becomes ``(a * cos - b * sin, b * cos + a * sin)``. With ``norm`` each head is
    normed first (QK-norm).

    Args:
        query: ``[batch, heads, length, dim]``, or packed ``[total, heads, dim]``; read by strides.
        key: the same but for the number of heads.
        cos, sin: ``[rows, pairs]`` or ``[batch, rows, pairs]``: of the first ``2 * pairs`` columns;
            those behind pass as they are. No gradient by the kernels.
        positions: integer ``[batch, length]``, packed ``[total]``: which row of the tables a token
            reads; None for the row of its place. On the CPU the values are checked.
        interleaved: pairs are neighbours (GPT-J, RoFormer) rather than the first half of the
            columns and the second (GPT-NeoX, Llama).
        norm: ``"rms"`` or ``"layer"``, over ``dim``; None for none.
        query_weight, query_bias, key_weight, key_bias: ``[dim]``, of that norm.
        eps: of that norm.

    Returns:
        The rotated query and key, in their shapes and dtype; heads of a token lie together.

    Raises:
        TypeError: dtypes that differ or are not floating-point, ``positions`` that are no integers.
        ValueError: shapes or devices that do not fit; a weight without a ``norm``; ``cos`` or
            ``sin`` that requires a gradient, on the kernels.
        IndexError: ``positions`` outside the tables.

    Source: Su et al., RoFormer, arXiv:2104.09864; QK-norm: Henry et al., arXiv:2010.04245.
    """
    norms = HeadNorms(norm or "none", query_weight, query_bias, key_weight, key_bias, eps)
    _check(query, key, cos, sin, positions, tuple(norms), interleaved)
    if positions is not None and positions.numel() and checks.has_values(positions):
        low, high = (int(value) for value in positions.aminmax())
        if low < 0 or high >= cos.shape[-2]:
            raise IndexError(
                f"{_FUNCTION}(): expected 'positions' to be rows of 'cos', 0 to "
                f"{cos.shape[-2] - 1}, but got {low} to {high}"
            )
    packed = query.dim() == 3
    tables = [table if table.dim() == 3 else table[None] for table in (cos, sin)]
    if packed:
        query, key = query[None], key[None]
        positions = None if positions is None else positions[None]
    else:
        query, key = query.transpose(1, 2), key.transpose(1, 2)
    if positions is not None and not positions.is_contiguous():
        positions = positions.contiguous()
    found = ops.rotary_embedding(
        query, key, tables[0], tables[1], positions, norms, interleaved=interleaved
    )
    if packed:
        return found[0][0], found[1][0]
    return found[0].transpose(1, 2), found[1].transpose(1, 2)


@checks.remembered
def _check(
    query: Tensor,
    key: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    norms: tuple[Any, ...],
    interleaved: bool,
) -> None:
    given = {"query": query, "key": key, "cos": cos, "sin": sin}
    heads = HeadNorms(*norms)
    weights = {name: getattr(heads, name) for name in _WEIGHTS}
    checks.check_same_device(_FUNCTION, {**given, "positions": positions, **weights})
    for name, tensor in given.items():
        checks.check_floating(_FUNCTION, name, tensor)
    if query.dim() not in (3, 4):
        raise BadValueError(
            f"{_FUNCTION}(): expected 'query' to be [batch, heads, length, dim] or packed "
            f"[total, heads, dim], but got shape {tuple(query.shape)}"
        )
    if (
        key.dim() != query.dim()
        or key.shape[0] != query.shape[0]
        or key.shape[2:] != query.shape[2:]
    ):
        raise BadValueError(
            f"{_FUNCTION}(): expected 'key' to have the shape of 'query' but for the heads, but "
            f"got shapes {tuple(key.shape)} and {tuple(query.shape)}"
        )
    if key.dtype != query.dtype:
        raise BadTypeError(
            f"{_FUNCTION}(): expected 'key' to have the dtype of 'query', {query.dtype}, but got "
            f"{key.dtype}"
        )
    batch, length = (1, query.shape[0]) if query.dim() == 3 else (query.shape[0], query.shape[2])
    dim = query.shape[-1]
    if cos.dim() not in (2, 3) or (cos.dim() == 3 and cos.shape[0] not in (1, batch)):
        raise BadValueError(
            f"{_FUNCTION}(): expected 'cos' to be [rows, pairs] or [batch, rows, pairs], but got "
            f"shape {tuple(cos.shape)} for a batch of {batch}"
        )
    if sin.shape != cos.shape or sin.dtype != cos.dtype:
        raise BadValueError(
            f"{_FUNCTION}(): expected 'sin' to have the shape and dtype of 'cos', but got "
            f"{tuple(sin.shape)}, {sin.dtype} and {tuple(cos.shape)}, {cos.dtype}"
        )
    if 2 * cos.shape[-1] > dim or dim > _MAX_HEAD_DIM:
        raise BadValueError(
            f"{_FUNCTION}(): expected 'query' to have 2 * {cos.shape[-1]} (pairs of 'cos') to "
            f"{_MAX_HEAD_DIM} columns, but got shape {tuple(query.shape)}"
        )
    if positions is None:
        if cos.shape[-2] < length:
            raise BadValueError(
                f"{_FUNCTION}(): expected 'cos' to have a row for each of {length} places, but got "
                f"shape {tuple(cos.shape)}; give 'positions'"
            )
    else:
        _check_positions(positions, (length,) if query.dim() == 3 else (batch, length))
    _check_norms(heads, dim)


def _check_positions(positions: Tensor, shape: tuple[int, ...]) -> None:
    checks.check_tensor(_FUNCTION, "positions", positions)
    if positions.dtype not in (torch.int32, torch.int64):
        raise BadTypeError(
            f"{_FUNCTION}(): expected 'positions' to be int32 or int64, but got {positions.dtype}"
        )
    if tuple(positions.shape) != shape:
        raise BadValueError(
            f"{_FUNCTION}(): expected 'positions' to have shape {shape}, but got "
            f"{tuple(positions.shape)}"
        )


def _check_norms(norms: HeadNorms, dim: int) -> None:
    if norms.norm not in ("none", "rms", "layer"):
        raise BadValueError(
            f"{_FUNCTION}(): expected 'norm' to be 'rms', 'layer' or None, but got {norms.norm!r}"
        )
    checks.check_number(_FUNCTION, "eps", norms.eps)
    for name in _WEIGHTS:
        weight = getattr(norms, name)
        if weight is None:
            continue
        checks.check_parameter(_FUNCTION, name, weight, (dim,), "the head dim of 'query'")
        if norms.norm == "none":
            raise BadValueError(
                f"{_FUNCTION}(): expected 'norm' to be 'rms' or 'layer' with {name!r}, but got None"
            )
