"""Padded batches as a stack of layers packs them at its entry."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusedformer._backend import chosen_backend
from fusedformer.functional import Packing, Selection
from fusedformer.functional._selection import packing_and_selection

_CPU_ROWS = 16  # oneDNN's large products are a tenth faster on multiples of this


def can_pack(x: Tensor, static_shapes: bool) -> bool:
    """Whether batches on the device of ``x`` are packed; the torch backend cannot statically."""
    static = static_shapes or torch.compiler.is_compiling()
    return not static or chosen_backend(x) == "triton"


def only_causal(mask: Tensor | None, is_causal: bool) -> bool:
    """Whether ``mask`` need not be looked at, but for causality."""
    return mask is None or (is_causal and not mask.requires_grad)


def pack_settings(keep: Tensor, static_shapes: bool) -> dict[str, Any]:
    """Arguments of :meth:`Packing.of`: how many tokens there are decides no shape while tracing."""
    static = static_shapes or torch.compiler.is_compiling()
    large = keep.device.type == "cpu" and keep.numel() >= 64 * _CPU_ROWS
    return {"static_shapes": static, "multiple_of": _CPU_ROWS if large else 1}


def packing_for(
    function: str, keep: Tensor, output_rows: Tensor | None, static_shapes: bool
) -> tuple[Packing, Selection | None]:
    """The packing of ``keep`` ``[N, S]``, and which rows of it ``output_rows`` asks for."""
    settings = pack_settings(keep, static_shapes)
    if output_rows is None:
        return Packing.of(keep, **settings), None
    if settings["static_shapes"] and output_rows.dtype == torch.bool:
        raise ValueError(
            f"{function}(): expected 'output_rows' to be int64 columns [{keep.shape[0]}, rows] "
            f"with static shapes, but got a boolean mask, whose count decides a shape"
        )
    return packing_and_selection(keep, output_rows, **settings)


def packing_of_padding(x: Tensor, padding: Tensor | None, static_shapes: bool) -> Packing:
    """The packing of ``x`` ``[N, S, *]`` with boolean ``padding`` ``[N, S]``, True = masked."""
    if padding is not None:
        return packing_for("", ~padding, None, static_shapes)[0]
    batch, length = x.shape[:2]
    keep = torch.ones(batch, length, dtype=torch.bool, device=x.device)
    return Packing.of(keep, [length] * batch)


def check_rows(function: str, name: str, rows: Tensor, packing: Packing) -> None:
    """Raise unless ``rows`` are ``[total, width]`` of ``packing``."""
    if rows.dim() != 2 or rows.shape[0] != packing.total:
        raise ValueError(
            f"{function}(): expected '{name}' to have shape [{packing.total}, width], "
            f"but got {tuple(rows.shape)}"
        )
