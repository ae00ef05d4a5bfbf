"""Who looks on while functions of this library run: tracers, and those who map over tensors.

To a tracer the values of tensors are an example's: what is decided by them holds for no other
input. A tensor that torch.vmap maps stands for many, and has no values to decide by.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C import _functorch

_Mode = torch._C._TorchDispatchModeKey
_PRE_DISPATCH = torch._C.DispatchKey.PreDispatch
# Of autograd's batches of gradients (is_grads_batched), which are not torch.vmap's.
_VMAP_MODE = torch._C._dispatch_key_parse("VmapMode")
_is_included = torch._C._dispatch_tls_is_dispatch_key_included


def is_traced() -> bool:
    """Whether calls are recorded for other inputs: compiled, exported, torch.jit's or make_fx's."""
    if torch.compiler.is_compiling() or is_traced_by_jit() or _is_included(_PRE_DISPATCH):
        return True
    return bool(torch._C._len_torch_dispatch_stack()) and (
        torch._C._get_dispatch_mode(_Mode.PROXY) is not None
        or torch._C._get_dispatch_mode(_Mode.FUNCTIONAL) is not None
    )


def is_traced_by_jit() -> bool:
    """Whether torch.jit.trace looks on, to which sizes are tensors."""
    return not torch.compiler.is_compiling() and torch._C._get_tracing_state() is not None


def has_modes() -> bool:
    """Whether modes of dispatch look on."""
    return bool(torch._C._len_torch_dispatch_stack()) or _is_included(_PRE_DISPATCH)


def is_mapped() -> bool:
    """Whether tensors may stand for many: torch.func looks on, or there is a batch of gradients."""
    return (
        torch._C._are_functorch_transforms_active()
        or _is_included(_VMAP_MODE)
    )


def stands_for_many(*tensors: Tensor | None) -> bool:
    """Whether torch.vmap maps over one of them."""
    if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
        return False
    return any(tensor is not None and _is_batched(tensor) for tensor in tensors)


def _is_batched(tensor: Tensor) -> bool:
    while _functorch.is_functorch_wrapped_tensor(tensor):
        if _functorch.is_batchedtensor(tensor):
            return True
        tensor = _functorch.get_unwrapped(tensor)
    return False
