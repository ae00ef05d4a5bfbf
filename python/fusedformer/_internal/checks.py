"""Check arguments of the public functions; errors say what came and what was wanted."""

from __future__ import annotations

import functools
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from fusedformer._internal.plans import unplanned
from fusedformer._internal.tracing import is_batched, is_traced
from fusedformer.errors import BadTypeError, BadValueError

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FLOATING_DTYPES = (*KERNEL_DTYPES, torch.float64)  # not float8, which has no arithmetic


Check = TypeVar("Check", bound=Callable[..., Any])

_MOST = 4096  # kinds of calls that each check remembers
_UNKNOWN = object()


def remembered(check: Check) -> Check:
    """Remember the kinds of calls that passed a check, and skip it for them; a decorator.

    The check may depend on a tensor's dtype, shape, device and layout alone. Without this the
    checks of a small op would take longer than the op.
    """
    passed: dict[tuple[Any, ...], Any] = {}

    @functools.wraps(check)
    def run(*args: Any) -> Any:
        kinds = None if is_traced() else _kinds(args)
        if kinds is None:
            return check(*args)
        result = passed.get(kinds, _UNKNOWN)
        if result is not _UNKNOWN:
            return result
        if len(passed) >= _MOST:
            passed.clear()
        result = passed[kinds] = check(*args)
        return result

    return run  # type: ignore[return-value]


def _kinds(values: Any) -> tuple[Any, ...] | None:
    """Return all that a remembered check may depend on, hashable, or None if it is not."""
    found: list[Any] = []
    for value in values:
        kind = type(value)
        if kind is Tensor or kind is torch.nn.Parameter:
            if value.is_nested:
                return None
            found += (value.dtype, value.shape, value.device, value.layout)
        elif value is None or kind is str:
            found.append(value)
        elif kind is float or kind is int or kind is bool or kind is torch.dtype:
            found += (kind, value)
        elif kind is tuple or kind is list or kind is torch.Size or kind is dict:
            inner = _kinds(value.values() if kind is dict else value)
            if inner is None:
                return None
            found += (kind, inner)
        else:
            return None
    return tuple(found)


def check_tensor(function: str, name: str, value: object) -> None:
    """Raise ``TypeError`` unless ``value`` is a tensor, dense or jagged."""
    if not isinstance(value, Tensor):
        raise BadTypeError(
            f"{function}(): argument '{name}' must be Tensor, not {type(value).__name__}"
        )
    if value.layout not in (torch.strided, torch.jagged):
        raise BadTypeError(f"{function}(): expected '{name}' to be dense, but got {value.layout}")


def has_values(tensor: Tensor) -> bool:
    """Tell whether a tensor has values to check: not if traced, mapped, fake or on meta."""
    if (
        is_traced()
        or tensor.is_meta
        or isinstance(tensor, FakeTensor)
        or (torch._C._are_functorch_transforms_active() and is_batched(tensor))
    ):
        return False
    unplanned()  # they will be looked at
    return True


def check_floating(function: str, name: str, tensor: Tensor) -> None:
    """Raise ``TypeError`` unless ``tensor`` has a dtype of :data:`FLOATING_DTYPES`."""
    if tensor.dtype not in FLOATING_DTYPES:
        raise BadTypeError(
            f"{function}(): expected '{name}' to have a floating-point dtype, "
            f"but got {tensor.dtype}"
        )


def check_kernel_dtype(function: str, name: str, tensor: Tensor) -> None:
    """Raise ``TypeError`` unless the Triton kernels support the dtype and layout of ``tensor``."""
    if tensor.is_nested:
        raise BadTypeError(
            f"{function}(): the triton backend supports dense tensors, but '{name}' is nested; "
            f"run it under fusedformer.backend('torch')"
        )
    if tensor.dtype not in KERNEL_DTYPES:
        raise BadTypeError(
            f"{function}(): the triton backend supports float32, float16 and bfloat16, but "
            f"'{name}' has dtype {tensor.dtype}; run it under fusedformer.backend('torch')"
        )


def check_number(function: str, name: str, value: object) -> None:
    """Raise ``TypeError`` unless ``value`` is a real number; a tensor is not one."""
    if not isinstance(value, (int, float, torch.SymInt, torch.SymFloat, numbers.Real)):
        raise BadTypeError(
            f"{function}(): expected '{name}' to be a number, but got {type(value).__name__}"
        )


def check_probability(function: str, name: str, value: float) -> None:
    """Raise ``TypeError`` unless ``value`` is a number, ``ValueError`` unless it lies in [0, 1]."""
    check_number(function, name, value)
    if not 0.0 <= value <= 1.0:
        raise BadValueError(f"{function}(): expected '{name}' to be in [0, 1], but got {value}")


def check_same_device(function: str, tensors: Mapping[str, Tensor | None]) -> None:
    """Raise ``ValueError`` unless all given tensors, which must be tensors, live on one device."""
    for name, tensor in tensors.items():
        if tensor is not None:
            check_tensor(function, name, tensor)
    present = {name: t.device for name, t in tensors.items() if t is not None}
    if len(set(present.values())) > 1:
        found = ", ".join(f"'{name}' on {device}" for name, device in present.items())
        raise BadValueError(f"{function}(): expected all tensors on one device, but got {found}")


def check_shape(
    function: str, name: str, tensor: Tensor | None, shape: Sequence[int], of: str
) -> None:
    """Raise ``ValueError`` unless ``tensor`` is None or a tensor of exactly ``shape``."""
    if tensor is None:
        return
    check_tensor(function, name, tensor)
    if tuple(tensor.shape) != tuple(shape):
        raise BadValueError(
            f"{function}(): expected '{name}' to have shape {tuple(shape)} ({of}), "
            f"but got {tuple(tensor.shape)}"
        )


def check_mask(function: str, name: str, mask: Tensor, shape: Sequence[int]) -> None:
    """Raise unless ``mask`` is boolean or floating and broadcasts to ``shape`` (not beyond it)."""
    check_tensor(function, name, mask)
    if mask.dtype != torch.bool and mask.dtype not in FLOATING_DTYPES:
        raise BadTypeError(
            f"{function}(): expected '{name}' to be boolean (True = keep) or floating-point "
            f"(added to the scores), but got {mask.dtype}"
        )
    wanted = tuple(shape)
    fits = mask.dim() <= len(wanted) and all(
        size in (1, want)
        for size, want in zip(reversed(mask.shape), reversed(wanted), strict=False)
    )
    if not fits:
        raise BadValueError(
            f"{function}(): expected '{name}' to broadcast to {wanted}, "
            f"but got shape {tuple(mask.shape)}"
        )


def check_input(function: str, name: str, input: Tensor) -> None:
    """Raise unless ``input`` is a floating-point tensor of at least 1 dimension."""
    check_tensor(function, name, input)
    check_floating(function, name, input)
    if input.dim() == 0:
        raise BadValueError(
            f"{function}(): expected '{name}' to have at least 1 dimension, but got 0"
        )


def check_parameter(
    function: str, name: str, parameter: Tensor | None, shape: Sequence[int], of: str
) -> None:
    """Raise unless ``parameter`` is None or a floating-point tensor of exactly ``shape``."""
    check_shape(function, name, parameter, shape, of)
    if parameter is not None:
        check_floating(function, name, parameter)
