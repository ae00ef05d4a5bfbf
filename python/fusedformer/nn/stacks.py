"""Functions that encoder and decoder share: checks, packing at the entry, layers and norm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fusedformer._internal import checks
from fusedformer._internal.backend import chosen_backend
from fusedformer._internal.tracing import is_traced_by_jit, is_vmapped
from fusedformer.errors import BadTypeError, BadValueError
from fusedformer.functional import Packing, Selection
from fusedformer.functional.packing import packing_of_mask, whole_packing
from fusedformer.functional.selection import packing_and_selection
from fusedformer.nn.children import Pending, is_plain, is_sharded
from fusedformer.nn.layer_norm import LayerNorm
from fusedformer.nn.masks import Names, check_padding_mask, check_sequence, padded_positions

_CPU_ROWS = 16  # oneDNN's large products are a tenth faster on multiples of this


class FusedStack:
    """A base of encoder and decoder; it comes before torch's class."""

    static_shapes = False
    _always_packs = False  # also where there is no padding to leave out

    def _forward_padded(self: Any, x: Tensor, *memory: Tensor, **masks: Any) -> Tensor:
        """Call the layers and the norm as torch does."""
        for layer in self.layers:
            x = layer(x, *memory, **masks)
        return x if self.norm is None else self.norm(x)


def check_stack(function: str, name: str, layer: object, num_layers: int, norm: object) -> None:
    """Check the arguments of a stack's constructor."""
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
    """Return whether the fused steps may stand for the calls of a stack's layers and norm."""
    norm = stack.norm
    for one in stack.layers:
        if not (isinstance(one, layer) and one._can_pack()):
            return False
    return bool(
        norm is None
        or (is_plain(norm, LayerNorm, nn.LayerNorm) and len(norm.normalized_shape) == 1)
    )


def check_is_fused(function: str, stack: Any, layer: type[Any]) -> None:
    """Check that :func:`is_fused`."""
    if not is_fused(stack, layer):
        raise BadValueError(
            f"{function}(): needs layers and a norm of this library, without hooks or replaced "
            f"children"
        )


def is_batch_first(stack: Any) -> bool:
    """Return the setting ``batch_first`` of the first layer; False without layers."""
    attention = getattr(stack.layers[0], "self_attn", None) if len(stack.layers) else None
    return bool(getattr(attention, "batch_first", False))


def heads_in_stack(stack: Any) -> int:
    """Return the number of heads in the first layer, which :func:`is_fused`; 1 without layers."""
    return stack.layers[0].self_attn.num_heads if len(stack.layers) else 1


def swap_unless_batch_first(stack: Any, x: Tensor) -> Tensor:
    """Swap batch and length of a batch, from the stack's order to batch first or back."""
    return x if x.dim() == 2 or is_batch_first(stack) else x.transpose(0, 1)


def batch_and_length(stack: Any, x: Tensor) -> tuple[int, int]:
    """Return the sizes of a batch, or of one sequence as of a batch of 1."""
    if x.dim() == 2:
        return 1, x.shape[0]
    first, second = x.shape[:2]
    return (first, second) if is_batch_first(stack) else (second, first)


def check_padding(stack: Any, names: Names, x: Tensor, padding: Tensor | None) -> tuple[int, int]:
    """Check the padding mask of ``x``; return batch and length."""
    batch, length = batch_and_length(stack, x)
    if padding is not None:
        name = names.key_padding_mask
        check_padding_mask(names.function, name, padding, x.dim() == 3, batch, length)
    return batch, length


def check_sequences(function: str, stack: Any, sequences: Mapping[str, Tensor]) -> None:
    """Check that sequences fit the parameters of the first layer, which :func:`is_fused`.

    A sharded layer checks device and dtype itself, as it has no parameters before it is called.
    """
    for layer in stack.layers[:1]:
        attention = layer.self_attn
        for name, x in sequences.items():
            weight = x if is_sharded(layer) else attention.out_proj.weight
            check_sequence(function, name, x, attention.embed_dim, weight)


def zeros_at_padding(stack: Any, output: Tensor, padding: Tensor | None) -> Tensor:
    """Write zeros to ``output`` at positions that ``padding`` ``[N, L]`` removes."""
    if padding is None:
        return output
    padded = swap_unless_batch_first(stack, padded_positions(padding)[..., None])
    return output.masked_fill(padded, 0.0)


def start_layer(
    layer: Any, x: Tensor, pending: Pending | None, is_called: bool
) -> tuple[Tensor, Tensor | None]:
    """Compute the input of a layer: ``x``, or the sum that the layer before left.

    Returns:
        The input, and its norm if the layer is to start from it (see ``_pre_norm``). None where it
        is to be called as one (see ``_forward_fused``).
    """
    if is_called or not layer.norm_first:
        return (x if pending is None else pending.added()), None
    if pending is None:
        return x, layer.norm1(x)
    normed, x = pending.normed_and_sum(layer.norm1)
    return x, normed


def end_stack(x: Tensor, pending: Pending | None, norm: Any) -> Tensor:
    """Compute the norm, if any, of ``x`` or of the sum that the last layer left."""
    if pending is not None:
        return pending.added() if norm is None else pending.normed(norm)
    output: Tensor = x if norm is None else norm(x)
    return output


def can_pack(x: Tensor, static_shapes: bool, *paddings: Tensor | None) -> bool:
    """Return whether batches on the device of ``x`` are packed.

    The torch backend cannot pack with static shapes. Nothing is packed under torch.vmap, where each
    sample of ``paddings`` has another number of tokens, nor for torch.jit.trace, to which sizes are
    tensors.
    """
    if is_traced_by_jit() or is_vmapped(x, *paddings):
        return False
    static = static_shapes or not checks.has_values(x)
    return not static or chosen_backend(x) == "triton"


def are_boolean(*masks: Tensor | None) -> bool:
    """Return whether each mask is a boolean tensor or None."""
    return all(m is None or (isinstance(m, Tensor) and m.dtype == torch.bool) for m in masks)


def is_only_causal(mask: Tensor | None, is_causal: bool) -> bool:
    """Return whether ``mask`` says no more than ``is_causal``, and needs no gradient."""
    return mask is None or (is_causal and not mask.requires_grad)


def packing_of(
    mask: Tensor,
    static_shapes: bool,
    lengths: Sequence[int] | None = None,
    *,
    is_padding: bool = False,
) -> Packing:
    """Make the packing of a boolean mask ``[N, S]``, True = real token, or padding.

    ``lengths``, where the host knows them, save waiting for the device.
    """
    settings = _pack_settings(mask, static_shapes)
    if lengths is not None:
        settings["static_shapes"] = False
    return packing_of_mask(mask, lengths, **settings, is_padding=is_padding)


def _pack_settings(keep: Tensor, static_shapes: bool) -> dict[str, Any]:
    """Return arguments of :meth:`Packing.of`; shapes are static where ``keep`` has no values."""
    static = static_shapes or not checks.has_values(keep)
    large = keep.device.type == "cpu" and keep.numel() >= 64 * _CPU_ROWS
    return {"static_shapes": static, "multiple_of": _CPU_ROWS if large else 1}


def packing_for(
    function: str, keep: Tensor, output_rows: Tensor | None, static_shapes: bool
) -> tuple[Packing, Selection | None]:
    """Make the packing of ``keep`` ``[N, S]``, and the selection of ``output_rows`` from it."""
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
    """Make the packing of ``x`` ``[N, S, *]`` with ``padding`` ``[N, S]``, True = masked."""
    if padding is not None:
        return packing_of(padding, static_shapes, is_padding=True)
    return whole_packing(x.shape[0], x.shape[1], x.device)


def check_rows(function: str, name: str, rows: Tensor, packing: Packing) -> None:
    """Check that ``rows`` are ``[total, width]`` of ``packing``."""
    if rows.dim() != 2 or rows.shape[0] != packing.total:
        raise BadValueError(
            f"{function}(): expected '{name}' to have shape [{packing.total}, width], "
            f"but got {tuple(rows.shape)}"
        )
