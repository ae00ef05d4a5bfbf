"""Record the output of every named submodule, one level of the tree at a time.

A hook on a child of a fused layer makes the layer call its children one by one, so hooks on all
modules at once would show another computation than the one under test. With those of one level
alone, everything below them stays fused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fusedformer._internal.outputs import first_tensor
from fusedformer.parity.calls import Arguments

Outputs = dict[str, Tensor]


def levels(model: nn.Module) -> list[list[str]]:
    """List the names of all submodules by their depth in the tree."""
    found: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        if name and not isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            found.setdefault(name.count("."), []).append(name)
    return [found[depth] for depth in sorted(found)]


def order_of_calls(model: nn.Module, given: Arguments) -> list[str]:
    """List submodules as they finish; the second call of a module is ``name (call 2)``."""
    finished: list[str] = []
    names = [name for level in levels(model) for name in level]
    with torch.no_grad(), _hooked(model, names, lambda name, _: finished.append(name)):
        model(*given.args, **given.kwargs)
    return finished


def outputs_of(model: nn.Module, names: list[str], given: Arguments) -> Outputs:
    """Return the first tensor of each of ``names`` that is called."""
    seen: Outputs = {}

    def keep(name: str, returned: Any) -> None:
        tensor = first_tensor(returned)
        if tensor is not None:
            seen[name] = tensor.detach().clone()

    with torch.no_grad(), _hooked(model, names, keep):
        model(*given.args, **given.kwargs)
    return seen


@contextmanager
def _hooked(model: nn.Module, names: list[str], act: Callable[[str, Any], None]) -> Iterator[None]:
    calls: dict[str, int] = {}

    def hook_for(name: str) -> Any:
        def hook(module: nn.Module, args: Any, returned: Any) -> None:
            calls[name] = calls.get(name, 0) + 1
            act(name if calls[name] == 1 else f"{name} (call {calls[name]})", returned)

        return hook

    modules = dict(model.named_modules())
    handles = [
        modules[name].register_forward_hook(hook_for(name)) for name in names if name in modules
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
