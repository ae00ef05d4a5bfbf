"""Argument checks shared by the public functions: errors that say what came and what was wanted."""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FLOATING_DTYPES = (*KERNEL_DTYPES, torch.float64)  # those that can be computed with: no float8


def check_tensor(function: str, name: str, value: object) -> None:
    """Raise ``TypeError`` unless ``value`` is a tensor, dense or jagged."""
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{function}(): argument '{name}' must be Tensor, not {type(value).__name__}"
        )
    if value.layout not in (torch.strided, torch.jagged):
        raise TypeError(f"{function}(): expected '{name}' to be dense, but got {value.layout}")


def check_floating(function: str, name: str, tensor: Tensor) -> None:
    """Raise ``TypeError`` unless ``tensor`` holds real numbers that can be computed with."""
    if tensor.dtype not in FLOATING_DTYPES:
        raise TypeError(
            f"{function}(): expected '{name}' to have a floating-point dtype, "
            f"but got {tensor.dtype}"
        )


def check_kernel_dtype(function: str, name: str, tensor: Tensor) -> None:
    """Raise ``TypeError`` unless the Triton kernels support the dtype and layout of ``tensor``."""
    if tensor.is_nested:
        raise TypeError(
            f"{function}(): the triton backend supports dense tensors, but '{name}' is nested; "
            f"run it under fusedformer.backend('torch')"
        )
    if tensor.dtype not in KERNEL_DTYPES:
        raise TypeError(
            f"{function}(): the triton backend supports float32, float16 and bfloat16, but "
            f"'{name}' has dtype {tensor.dtype}; run it under fusedformer.backend('torch')"
        )


def check_number(function: str, name: str, value: object) -> None:
    """Raise ``TypeError`` unless ``value`` is a real number; a tensor is not one."""
    if not isinstance(value, (int, float, torch.SymInt, torch.SymFloat, numbers.Real)):
        raise TypeError(
            f"{function}(): expected '{name}' to be a number, but got {type(value).__name__}"
        )


def check_probability(function: str, name: str, value: float) -> None:
    """Raise ``TypeError`` unless ``value`` is a number, ``ValueError`` unless it lies in [0, 1]."""
    check_number(function, name, value)
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{function}(): expected '{name}' to be in [0, 1], but got {value}")


def check_same_device(function: str, tensors: Mapping[str, Tensor | None]) -> None:
    """Raise ``ValueError`` unless all given tensors, which must be tensors, live on one device."""
    for name, tensor in tensors.items():
        if tensor is not None:
            check_tensor(function, name, tensor)
    present = {name: t.device for name, t in tensors.items() if t is not None}
    if len(set(present.values())) > 1:
        found = ", ".join(f"'{name}' on {device}" for name, device in present.items())
        raise ValueError(f"{function}(): expected all tensors on one device, but got {found}")


def check_shape(
    function: str, name: str, tensor: Tensor | None, shape: Sequence[int], of: str
) -> None:
    """Raise ``ValueError`` unless ``tensor`` is None or a tensor of exactly ``shape``."""
    if tensor is None:
        return
    check_tensor(function, name, tensor)
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(
            f"{function}(): expected '{name}' to have shape {tuple(shape)} ({of}), "
            f"but got {tuple(tensor.shape)}"
        )


def check_mask(function: str, name: str, mask: Tensor, shape: Sequence[int]) -> None:
    """Raise unless ``mask`` is boolean or floating and broadcasts to ``shape`` (not beyond it)."""
    check_tensor(function, name, mask)
    if mask.dtype != torch.bool and mask.dtype not in FLOATING_DTYPES:
        raise TypeError(
            f"{function}(): expected '{name}' to be boolean (True = keep) or floating-point "
            f"(added to the scores), but got {mask.dtype}"
        )
    wanted = tuple(shape)
    fits = mask.dim() <= len(wanted) and all(
        size in (1, want)
        for size, want in zip(reversed(mask.shape), reversed(wanted), strict=False)
    )
    if not fits:
        raise ValueError(
            f"{function}(): expected '{name}' to broadcast to {wanted}, "
            f"but got shape {tuple(mask.shape)}"
        )


def check_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    enable_gqa: bool,
    key_mask: Tensor | None,
    key_lengths: Tensor | None,
    scale: float | None,
) -> None:
    """Raise unless the arguments of ``scaled_dot_product_attention`` fit together."""
    function = "scaled_dot_product_attention"
    named = {"query": query, "key": key, "value": value}
    for name, tensor in named.items():
        check_tensor(function, name, tensor)
        check_floating(function, name, tensor)
        if tensor.is_nested:
            raise TypeError(f"{function}(): expected '{name}' to be dense, but it is nested")
        if tensor.dim() < 2:
            raise ValueError(
                f"{function}(): expected '{name}' to have at least 2 dimensions, "
                f"but got shape {tuple(tensor.shape)}"
            )
    if not query.dtype == key.dtype == value.dtype:
        raise TypeError(
            f"{function}(): expected 'query', 'key' and 'value' to have the same dtype, "
            f"but got {query.dtype}, {key.dtype} and {value.dtype}"
        )
    if not query.dim() == key.dim() == value.dim():
        raise ValueError(
            f"{function}(): expected 'query', 'key' and 'value' to have the same number of "
            f"dimensions, but got {query.dim()}, {key.dim()} and {value.dim()}"
        )
    check_same_device(
        function,
        {**named, "attn_mask": attn_mask, "key_mask": key_mask, "key_lengths": key_lengths},
    )
    check_probability(function, "dropout_p", dropout_p)
    if scale is not None:
        check_number(function, "scale", scale)
    if query.shape[-1] != key.shape[-1]:
        raise ValueError(
            f"{function}(): expected 'query' and 'key' to have the same last dimension, "
            f"but got {query.shape[-1]} and {key.shape[-1]}"
        )
    if key.shape[-2] != value.shape[-2]:
        raise ValueError(
            f"{function}(): expected 'key' and 'value' to have the same sequence length, "
            f"but got {key.shape[-2]} and {value.shape[-2]}"
        )
    batch = attention_batch_shape(query, key, value, enable_gqa)
    scores = (*batch, query.shape[-2], key.shape[-2])
    if attn_mask is not None:
        check_mask(function, "attn_mask", attn_mask, scores)
        if attn_mask.dtype not in (torch.bool, torch.float32, query.dtype):
            raise TypeError(
                f"{function}(): expected a floating-point 'attn_mask' to be float32 or of the "
                f"dtype of 'query', {query.dtype}, but got {attn_mask.dtype}"
            )
    sequences = batch[:-1] if len(batch) > 1 or enable_gqa else batch
    rows = 1
    for size in sequences:
        rows *= size
    if key_mask is not None:
        check_tensor(function, "key_mask", key_mask)
        check_shape(function, "key_mask", key_mask, (rows, key.shape[-2]), "batch, keys")
        if key_mask.dtype != torch.bool:
            raise TypeError(
                f"{function}(): expected 'key_mask' to be boolean (True = keep), "
                f"but got {key_mask.dtype}"
            )
    if key_lengths is not None:
        check_tensor(function, "key_lengths", key_lengths)
        check_shape(function, "key_lengths", key_lengths, (rows,), "batch")
        if key_lengths.dtype not in (torch.int32, torch.int64):
            raise TypeError(
                f"{function}(): expected 'key_lengths' to be int32 or int64, "
                f"but got {key_lengths.dtype}"
            )


def attention_batch_shape(
    query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool
) -> tuple[int, ...]:
    """``(*batch, heads)`` of the scores, the leading shapes of the three broadcast together."""
    function = "scaled_dot_product_attention"
    leading = [tuple(t.shape[:-2]) for t in (query, key, value)]
    if enable_gqa:
        if query.dim() < 3:
            raise ValueError(f"{function}(): enable_gqa=True needs a dimension of heads at -3")
        heads, key_heads, value_heads = (t.shape[-3] for t in (query, key, value))
        if key_heads != value_heads or key_heads == 0 or heads % key_heads:
            raise ValueError(
                f"{function}(): expected the number of heads of 'key' and 'value' to be equal and "
                f"to divide that of 'query', {heads}, but got {key_heads} and {value_heads}"
            )
        leading = [(*shape[:-1], heads) for shape in leading]
    try:
        return tuple(torch.broadcast_shapes(*leading))  # type: ignore[no-untyped-call]
    except RuntimeError:
        raise ValueError(
            f"{function}(): expected the batch and head dimensions to broadcast, but got query "
            f"{tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
            + ("" if enable_gqa else "; for fewer key heads than query heads set enable_gqa=True")
        ) from None
