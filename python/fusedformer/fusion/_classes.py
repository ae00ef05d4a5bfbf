"""Classes that a module gets in place of its own, and the plan of giving them."""

from __future__ import annotations

import types
from typing import Any

from torch import nn
from torch.nn.utils.parametrize import is_parametrized, type_before_parametrizations

from fusedformer.fusion._report import Left, Replaced

# Where a fused module keeps its former class, and a model the name of its former attention.
BEFORE = "_fusedformer_before"
ATTENTION_BEFORE = "_fusedformer_attention_before"


_made: dict[tuple[Any, Any], Any] = {}


def combined(ours: type[Any], theirs: type[nn.Module]) -> type[Any]:
    """A subclass of ``theirs`` that computes as ``ours``; the same one for the same arguments."""
    both: Any = (ours, theirs)
    if both not in _made:
        members: dict[str, Any] = {
            "__module__": theirs.__module__, "__doc__": theirs.__doc__, "__reduce_ex__": _reduce,
            "_made_of": both,
        }  # fmt: skip
        _made[both] = types.new_class(theirs.__name__, both, {}, lambda ns: ns.update(members))
    made: type[Any] = _made[both]
    return made


def change_class(module: Any, cls: type[Any]) -> None:
    """Make ``module`` a ``cls``, below the class that torch gave it if it is parametrized.

    That one holds the properties that compute parameters, and torch finds it and what it is to
    restore at the top.
    """
    if is_parametrized(module):
        members = {
            name: value for name, value in vars(type(module)).items()
            if name not in ("__dict__", "__weakref__")
        }  # fmt: skip
        cls = type(f"Parametrized{cls.__name__}", (cls,), members)
    module.__class__ = cls


def _reduce(module: Any, protocol: int) -> Any:
    # By its two classes, since pickle looks up a class by its name.
    return _rebuilt, type(module)._made_of, module.__getstate__()


def _rebuilt(ours: type[Any], theirs: type[nn.Module]) -> Any:
    return object.__new__(combined(ours, theirs))


def named(cls: type[Any]) -> str:
    """``torch.nn.LayerNorm``: where people import a class from."""
    module: str = cls.__module__
    for known in ("torch.nn", "fusedformer.nn"):
        if module.startswith(known + "."):
            module = known
    return f"{module.removeprefix('transformers.models.')}.{cls.__qualname__}"


class Plan:
    """What is to be done; nothing is changed before :meth:`apply`."""

    def __init__(self) -> None:
        self.replaced: list[Replaced] = []
        self.left: list[Left] = []
        self._classes: list[tuple[nn.Module, type[Any]]] = []
        self._attentions: list[tuple[Any, str]] = []

    def give(self, path: str, module: nn.Module, cls: type[Any], after: str) -> None:
        """``module`` becomes a ``cls``."""
        self.replaced.append(Replaced(path, named(type(module)), after))
        self._classes.append((module, cls))

    def set_attention(self, path: str, model: Any, before: str, after: str) -> None:
        """``model`` computes attention by the implementation of that name."""
        self.replaced.append(Replaced(path, f"{before} attention", "fusedformer.functional"))
        self._attentions.append((model, after))

    def leave(self, path: str, module: nn.Module, reason: str) -> None:
        """``module`` stays what it is."""
        self.left.append(Left(path, named(type(module)), reason))

    def apply(self) -> None:
        """All of it; if a model refuses its attention, nothing."""
        done: list[tuple[Any, str]] = []
        try:
            for model, name in self._attentions:
                before = model.config._attn_implementation
                model.set_attn_implementation(name)
                done.append((model, before))
        except Exception:
            for model, before in done:
                model.set_attn_implementation(before)
            raise
        for model, before in done:
            model.__dict__.setdefault(ATTENTION_BEFORE, before)
        for module, cls in self._classes:
            module.__dict__.setdefault(BEFORE, type_before_parametrizations(module))
            change_class(module, cls)
