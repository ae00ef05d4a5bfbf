"""Name the tensors that a function or module returned."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def tensors_of(returned: Any) -> dict[str, Tensor]:
    """Return the floating-point tensors in ``returned``, by their place in it."""
    found: dict[str, Tensor] = {}
    _collect("output", returned, found)
    return found


def first_tensor(returned: Any) -> Tensor | None:
    """Return the first floating-point tensor in ``returned``, if there is one."""
    return next(iter(tensors_of(returned).values()), None)


def _collect(name: str, value: Any, found: dict[str, Tensor]) -> None:
    if isinstance(value, Tensor):
        if value.is_nested:  # padded with zeros; or, if jagged, its packed rows
            strided = value.layout == torch.strided
            value = value.to_padded_tensor(0.0) if strided else value.values()
        if value.is_floating_point():
            found[name] = value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            _collect(f"{name}.{key}", item, found)
    elif isinstance(value, (list, tuple)):
        names = getattr(value, "_fields", range(len(value)))
        for key, item in zip(names, value, strict=True):
            _collect(f"{name}.{key}" if isinstance(key, str) else f"{name}[{key}]", item, found)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            _collect(f"{name}.{field.name}", getattr(value, field.name), found)
