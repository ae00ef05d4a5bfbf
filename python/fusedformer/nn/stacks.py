"""What the stacks of layers share: their checks, and how padded batches are packed at the entry."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fusedformer._internal import checks
from fusedformer._internal.backend import chosen_backend
from fusedformer._internal.onlookers import is_traced_by_jit, stands_for_many
from fusedformer.errors import BadTypeError, BadValueError
from fusedformer.functional import Packing, Selection
from fusedformer.functional.packing import whole_packing
from fusedformer.functional.selection import packing_and_selection
from fusedformer.nn.children import Pending, is_plain, is_sharded
from fusedformer.nn.layer_norm import LayerNorm
from fusedformer.nn.masks import check_sequence, padded_positions

_CPU_ROWS = 16  # oneDNN's large products are a tenth faster on multiples of this


def check_stack(function: str, name: str, layer: object, num_layers: int, norm: object) -> None:
    """Raise unless the arguments of a stack's constructor are what they must be."""
    for argument, module in ((name, layer), ("norm", norm)):
        if not isinstance(module, nn.Module) and not (argument == "norm" and module is None):
            raise BadTypeError(
                f"{function}(): expected '{argument}' to be a Module, "
                f"but got {type(module).__name__}"
            )
    if num_layers < 0:
        raise BadValueError(
            f"{function}(): expected 'num_layers' to be at least 0, but got {num_layers}"
        )


def is_fused(stack: Any, layer: type[Any]) -> bool:
    """Whether layers and norm of ``stack`` are what its ``_run`` may take apart."""
    norm = stack.norm
    return all(isinstance(one, layer) and one._can_pack() for one in stack.layers) and (
        norm is None
        or (is_plain(norm, LayerNorm, nn.LayerNorm) and len(norm.normalized_shape) == 1)
    )


def check_is_fused(function: str, stack: Any, layer: type[Any]) -> None:
    """Raise unless :func:`is_fused`."""
    if not is_fused(stack, layer):
        raise BadValueError(
            f"{function}(): needs layers and a norm of this library, without hooks or replaced "
            f"children"
        )


def is_batch_first(stack: Any) -> bool:
    """What the first layer says."""
    attention = getattr(stack.layers[0], "self_attn", None) if len(stack.layers) else None
    return bool(getattr(attention, "batch_first", False))


def heads_in_stack(stack: Any) -> int:
    """Attention heads of the first layer, which :func:`is_fused`; 1 without layers."""
    return stack.layers[0].self_attn.num_heads if len(stack.layers) else 1


def layer_input(x: Tensor, pending: Pending | None) -> Tensor:
    """What a layer starts from: ``x``, or the sum that the layer before left."""
    return x if pending is None else pending.added()


def stack_output(x: Tensor, pending: Pending | None, norm: Any) -> Tensor:
    """The end of a stack: the norm, if any, of ``x`` or of the sum that its last layer left."""
    if pending is not None:
        return pending.added() if norm is None else pending.normed(norm)
    output: Tensor = x if norm is None else norm(x)
    return output


def check_sequences(function: str, stack: Any, sequences: Mapping[str, Tensor]) -> None:
    """Raise unless they fit the parameters of the first layer, which :func:`is_fused`.

    Those of a sharded layer get device and dtype when it is called.
    """
    for layer in stack.layers[:1]:
        attention = layer.self_attn
        for name, x in sequences.items():
            weight = x if is_sharded(layer) else attention.out_proj.weight
            check_sequence(function, name, x, attention.embed_dim, weight)


def zeros_at_padding(stack: Any, output: Tensor, padding: Tensor | None) -> Tensor:
    """``output`` with zeros at positions that ``padding`` ``[N, L]`` removes."""
    if padding is None:
        return output
    padded = padded_positions(padding)
    if output.dim() == 3 and not is_batch_first(stack):
        padded = padded.transpose(0, 1)
    return output.masked_fill(padded[..., None], 0.0)


def can_pack(x: Tensor, static_shapes: bool, *paddings: Tensor | None) -> bool:
    """Whether batches on the device of ``x`` are packed; the torch backend cannot statically.

    Nobody can by ``paddings`` that torch.vmap maps, each with numbers of tokens of its own; and
    torch.jit.trace, whose sizes are tensors, gets the padded form.
    """
    if is_traced_by_jit() or stands_for_many(x, *paddings):
        return False
    static = static_shapes or not checks.has_values(x)
    return not static or chosen_backend(x) == "triton"


def only_causal(mask: Tensor | None, is_causal: bool) -> bool:
    """Whether ``mask`` need not be looked at, but for causality."""
    return mask is None or (is_causal and not mask.requires_grad)


def packing_of(keep: Tensor, static_shapes: bool, lengths: Sequence[int] | None = None) -> Packing:
    """The packing of ``keep`` ``[N, S]``, True = real; with its lengths where they are known."""
    settings = _pack_settings(keep, static_shapes)
    if lengths is not None:  # then nothing has to be looked up
        settings["static_shapes"] = False
    return Packing.of(keep, lengths, **settings)


def _pack_settings(keep: Tensor, static_shapes: bool) -> dict[str, Any]:
    """Arguments of :meth:`Packing.of`; where values are unknown, they decide no shape."""
    static = static_shapes or not checks.has_values(keep)
    large = keep.device.type == "cpu" and keep.numel() >= 64 * _CPU_ROWS
    return {"static_shapes": static, "multiple_of": _CPU_ROWS if large else 1}


def packing_for(
    function: str, keep: Tensor, output_rows: Tensor | None, static_shapes: bool
) -> tuple[Packing, Selection | None]:
    """The packing of ``keep`` ``[N, S]``, and which rows of it ``output_rows`` asks for."""
    if output_rows is None:
        return packing_of(keep, static_shapes), None
    settings = _pack_settings(keep, static_shapes)
    if settings["static_shapes"] and output_rows.dtype == torch.bool:
        raise BadValueError(
            f"{function}(): expected 'output_rows' to be int64 columns [{keep.shape[0]}, rows] "
            f"with static shapes, but got a boolean mask, whose count decides a shape"
        )
    return packing_and_selection(keep, output_rows, **settings)


def packing_of_padding(x: Tensor, padding: Tensor | None, static_shapes: bool) -> Packing:
    """The packing of ``x`` ``[N, S, *]`` with boolean ``padding`` ``[N, S]``, True = masked."""
    if padding is not None:
        return packing_of(~padding, static_shapes)
    return whole_packing(x.shape[0], x.shape[1], x.device)


def check_rows(function: str, name: str, rows: Tensor, packing: Packing) -> None:
    """Raise unless ``rows`` are ``[total, width]`` of ``packing``."""
    if rows.dim() != 2 or rows.shape[0] != packing.total:
        raise BadValueError(
            f"{function}(): expected '{name}' to have shape [{packing.total}, width], "
            f"but got {tuple(rows.shape)}"
        )
