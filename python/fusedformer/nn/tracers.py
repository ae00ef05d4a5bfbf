"""Support for torch.fx, and a refusal for torch.jit.script, of this library's modules."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any, NoReturn

from torch import nn
from torch.fx import Tracer

_torch_says_leaf: Any = Tracer.is_leaf_module


@functools.wraps(_torch_says_leaf)
def _is_leaf_module(self: Tracer, m: nn.Module, module_qualified_name: str) -> bool:
    # Torch's function only knows classes in torch.nn.
    return _torch_says_leaf(self, m, module_qualified_name) or computes_by_ours(m)


def computes_by_ours(module: nn.Module) -> bool:
    """Return whether its forward is this library's; its class may be one that ``fuse`` made."""
    module_of_forward: str = getattr(type(module).forward, "__module__", "")
    return module_of_forward.startswith("fusedformer.")


def _refuse_script(module: nn.Module) -> NoReturn:
    raise TypeError(
        f"torch.jit.script(): this {type(module).__name__} is computed by fusedformer, whose "
        f"modules cannot be scripted: use torch.export, torch.jit.trace or torch.compile, or "
        f"script the model after fusedformer.unfuse(model)"
    )


def introduce(modules: Iterable[type[Any]]) -> None:
    """Register these types and their subclasses with torch.fx and torch.jit.script."""
    Tracer.is_leaf_module = _is_leaf_module  # type: ignore[method-assign]
    for cls in modules:
        cls.__prepare_scriptable__ = _refuse_script
