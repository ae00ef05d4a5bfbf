"""Check jagged ``torch.nested`` tensors, and make rows into one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusedformer._internal import checks
from fusedformer.errors import BadTypeError, BadValueError


def check_jagged(function: str, name: str, tensor: Tensor, shape: str) -> None:
    """Raise ``TypeError`` unless ``tensor`` is jagged as ``shape`` says, and without holes.

    ``shape`` names the dimensions, as in ``"batch, heads, jagged, dim"``.
    """
    sizes = shape.split(", ")
    expected = f"{function}(): expected a nested '{name}' to be jagged, [{shape}]"
    if tensor.layout != torch.jagged:
        raise BadTypeError(
            f"{expected}, but got {tensor.layout}; convert it by "
            f"torch.nested.as_nested_tensor(list({name}.unbind()), layout=torch.jagged)"
        )
    jagged: Any = tensor
    if tensor.dim() != len(sizes) or jagged._ragged_idx != sizes.index("jagged"):
        raise BadTypeError(
            f"{expected}, but got {tensor.dim()} dimensions, of which that at "
            f"{jagged._ragged_idx} is jagged"
        )
    if jagged.lengths() is not None:
        raise BadTypeError(
            f"{expected} and without holes, but got one with lengths(), as "
            f"torch.nested.narrow makes them; take '{name}.contiguous()'"
        )


def check_same_lengths(
    function: str, names: tuple[str, str], first: Tensor, second: Tensor
) -> None:
    """Raise ``ValueError`` unless both have sequences of the same lengths.

    Unless they share their offsets, this waits for a GPU.
    """
    one, other = (tensor.offsets() for tensor in (first, second))  # type: ignore[attr-defined]
    if one is other or not (checks.has_values(one) and checks.has_values(other)):
        return
    if not torch.equal(one, other):
        raise BadValueError(
            f"{function}(): expected nested '{names[0]}' and '{names[1]}' to have sequences of the "
            f"same lengths, but got offsets {one.tolist()} and {other.tolist()}"
        )


def jagged_like(rows: Tensor, like: Tensor) -> Tensor:
    """Make ``rows`` ``[total, *]`` the sequences of a tensor like ``[batch, jagged, *]``."""
    jagged: Any = like
    nested: Tensor = torch.nested.nested_tensor_from_jagged(
        rows, jagged.offsets(), min_seqlen=jagged._maybe_min_seqlen,
        max_seqlen=jagged._maybe_max_seqlen,
    )  # fmt: skip
    return nested
