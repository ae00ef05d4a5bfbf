"""What torch.fx and torch.jit.script are told of this library's modules."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any, NoReturn

from torch import nn
from torch.fx import Tracer

_torch_says_leaf: Any = Tracer.is_leaf_module


@functools.wraps(_torch_says_leaf)
def _is_leaf_module(self: Tracer, m: nn.Module, module_qualified_name: str) -> bool:
    # Torch's own knows torch.nn's modules by where their classes are.
    return _torch_says_leaf(self, m, module_qualified_name) or computes_by_ours(m)


def computes_by_ours(module: nn.Module) -> bool:
    """Whether its forward is this library's, whatever its class: fuse makes subclasses."""
    module_of_forward: str = getattr(type(module).forward, "__module__", "")
    return module_of_forward.startswith("fusedformer.")


def _refuse_script(module: nn.Module) -> NoReturn:
    raise TypeError(
        f"torch.jit.script(): this {type(module).__name__} is computed by fusedformer, whose "
        f"modules cannot be scripted: use torch.export, torch.jit.trace or torch.compile, or "
        f"script the model after fusedformer.unfuse(model)"
    )


def introduce(modules: Iterable[type[Any]]) -> None:
    """Make modules of these types, and of subclasses, known to torch.fx and torch.jit.script."""
    Tracer.is_leaf_module = _is_leaf_module  # type: ignore[method-assign]
    for cls in modules:
        cls.__prepare_scriptable__ = _refuse_script
