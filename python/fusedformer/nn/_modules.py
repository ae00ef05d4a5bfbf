"""What the composite modules ask about their children: may they be fused, and how."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from fusedformer._backend import chosen_backend
from fusedformer.functional import Activation

M = TypeVar("M", bound=nn.Module)

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def adopt(module: nn.Module, cls: type[M]) -> M:
    """``module`` as an instance of ``cls``, a subclass of its type that adds no state.

    Parameters, hooks and settings are the same objects, so nothing is initialized a second time.
    """
    adopted = cls.__new__(cls)
    adopted.__dict__.update(module.__dict__)
    return adopted


def is_plain(module: object, *types: type[nn.Module]) -> bool:
    """Whether ``module`` does what the forward of one of ``types`` does, and nothing besides.

    A subclass, a hook or a replaced ``forward`` may do more; such a module must be called.
    """
    return (
        type(module) in types
        and "forward" not in module.__dict__
        and not any(module.__dict__[hooks] for hooks in _HOOKS)
        and not _has_any_global_hook()  # type: ignore[no-untyped-call]
    )


def product(x: Tensor, linear: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """``x @ weight.T``, and the bias that is still to be added, if any.

    The kernels add it on their way; ATen adds it for free within the product.
    """
    if chosen_backend(x) == "torch":
        return F.linear(x, linear.weight, linear.bias), None
    return F.linear(x, linear.weight), linear.bias


def fused_activation(activation: Any) -> Activation | None:
    """The name under which :func:`fusedformer.functional.bias_activation` knows a callable."""
    if activation is F.relu or activation is torch.relu or is_plain(activation, nn.ReLU):
        return "relu"
    if activation is F.silu or is_plain(activation, nn.SiLU):
        return "silu"
    if activation is F.gelu:
        return "gelu"
    if is_plain(activation, nn.GELU):
        return "gelu_tanh" if activation.approximate == "tanh" else "gelu"
    return None
