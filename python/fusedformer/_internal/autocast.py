"""Follow autocast: ask torch for the dtype in which it runs what a function of ours replaces.

Torch's functions follow ``torch.autocast`` in one of three ways. Ours do as theirs, and a fused
form as the composition that it replaces; float64 is left as it is.

| | CUDA and ROCm | CPU |
| --- | --- | --- |
| linear, scaled_dot_product_attention | autocast's dtype | autocast's dtype |
| cross_entropy | float32 | float32 |
| layer_norm, softmax, log_softmax; rms_norm from torch 2.12 on | float32 | as without autocast |
| embedding, dropout, gelu, relu, silu, sums | as without autocast | as without autocast |

Ops of ``torch.library`` have no rule of their own: the public functions choose the dtypes, and the
ops compute in those.
"""

from __future__ import annotations

import contextlib
from typing import Any, Literal

import torch
from torch import Tensor

Op = Literal[
    "linear",
    "scaled_dot_product_attention",
    "layer_norm",
    "rms_norm",
    "softmax",
    "log_softmax",
    "cross_entropy",
]
_NARROW = ("linear", "scaled_dot_product_attention")
_OVERLOADS: dict[Op, str] = {
    "linear": "linear", "scaled_dot_product_attention": "scaled_dot_product_attention",
    "layer_norm": "layer_norm", "rms_norm": "rms_norm", "softmax": "softmax.int",
    "log_softmax": "log_softmax.int", "cross_entropy": "nll_loss",
}  # fmt: skip
_KEYS = {"cpu": "CPU", "cuda": "CUDA", "xpu": "XPU", "mps": "MPS"}
# The pairs of function and device for which the installed torch has a rule.
_RULES = frozenset(
    (op, device)
    for op, overload in _OVERLOADS.items()
    for device, key in _KEYS.items()
    if torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{overload}", f"Autocast{key}")
)


def autocast_dtype(op: Op, *inputs: Tensor) -> torch.dtype | None:
    """Return the dtype in which autocast runs torch's ``op``, or None if it casts nothing."""
    # First the check that needs no device, since every eager call comes by.
    if not torch._C._is_any_autocast_enabled():
        return None
    if not all(_is_cast(value) for value in inputs):
        return None
    device = inputs[0].device.type
    if (op, device) not in _RULES or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device) if op in _NARROW else torch.float32


def cast(value: Any, dtype: torch.dtype) -> Any:
    """Cast ``value`` to ``dtype`` if it is a tensor that autocast casts."""
    return value.to(dtype) if _is_cast(value) else value


def autocast_off(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Return a context without autocast on the device of ``tensor``."""
    if torch._C._is_any_autocast_enabled() and tensor.device.type in _KEYS:
        return torch.autocast(tensor.device.type, enabled=False)
    return contextlib.nullcontext()


def _is_cast(value: object) -> bool:
    # Other types pass through to the checks, which name them in an error.
    return isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64
