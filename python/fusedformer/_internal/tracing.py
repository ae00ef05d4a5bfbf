"""Ask whether a call is being traced, compiled, mapped or differentiated forward.

A tracer records a call for other inputs, so nothing may be decided by the values of its tensors.
A tensor that torch.vmap maps is a whole batch, and has no single value to decide by.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd import forward_ad

_Mode = torch._C._TorchDispatchModeKey
_PRE_DISPATCH = torch._C.DispatchKey.PreDispatch
# Set while autograd computes a batch of gradients (is_grads_batched), without torch.vmap.
_VMAP_MODE = torch._C._dispatch_key_parse("VmapMode")
# Bound to names here, and never calling each other, since every eager call asks them.
_is_compiling = torch.compiler.is_compiling
_is_included = torch._C._dispatch_tls_is_dispatch_key_included
_modes = torch._C._len_torch_dispatch_stack
_mode = torch._C._get_dispatch_mode
_are_transforms_active = torch._C._are_functorch_transforms_active
_tracing_state = torch._C._get_tracing_state


def is_traced() -> bool:
    """Tell whether calls are recorded by torch.compile, torch.export, torch.jit or make_fx."""
    return bool(
        _is_compiling()
        or _tracing_state()
        or _is_included(_PRE_DISPATCH)
        or (_modes() and (_mode(_Mode.PROXY) or _mode(_Mode.FUNCTIONAL)))
    )


def is_traced_by_jit() -> bool:
    """Tell whether torch.jit.trace records, for which sizes are tensors."""
    return not _is_compiling() and bool(_tracing_state())


def may_be_batched() -> bool:
    """Tell whether tensors may be batches: under torch.func, or in a batch of gradients."""
    return _are_transforms_active() or _is_included(_VMAP_MODE)


def is_vmapped(*tensors: Tensor | None) -> bool:
    """Tell whether torch.vmap maps over one of the tensors."""
    if _is_compiling() or not _are_transforms_active():
        return False
    return any(tensor is not None and is_batched(tensor) for tensor in tensors)


def is_batched(tensor: Tensor) -> bool:
    """Tell whether torch.vmap maps over a tensor; for eager calls."""
    while _functorch.is_functorch_wrapped_tensor(tensor):
        if _functorch.is_batchedtensor(tensor):
            return True
        tensor = _functorch.get_unwrapped(tensor)
    return False


def is_eager() -> bool:
    """Tell whether a call may go to its kernels directly: no mode, trace or transform is on."""
    return not (
        _is_compiling()
        or (_modes() and not _only_looks())
        or _is_included(_PRE_DISPATCH)
        or _are_transforms_active()
        or _is_included(_VMAP_MODE)
        or forward_ad._current_level >= 0
        or _tracing_state()
    )


def _only_looks() -> bool:
    """Whether the mode that there is says that it changes nothing."""
    only = _modes() == 1
    return only and getattr(torch._C._get_dispatch_stack_at(0), "only_looks", False)
