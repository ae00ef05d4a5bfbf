"""Classes that modules get in place of their own, and the plan of these changes."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.utils.parametrize import is_parametrized, type_before_parametrizations

from fusedformer.fusion._report import Left, Replaced

# Where a fused module keeps its former class.
BEFORE = "_fusedformer_before"

_made: dict[tuple[Any, Any], Any] = {}


def combined(ours: type[Any], theirs: type[nn.Module]) -> type[Any]:
    """Return a subclass of ``theirs`` that computes as ``ours``; made once for each pair."""
    both: Any = (ours, theirs)
    if both not in _made:
        members: dict[str, Any] = {
            "__module__": theirs.__module__, "__doc__": theirs.__doc__, "__reduce_ex__": _reduce,
            "_made_of": both,
        }  # fmt: skip
        if hasattr(ours, "forward"):
            members["forward"] = _signed(ours.forward, theirs)
        _made[both] = types.new_class(theirs.__name__, both, {}, lambda ns: ns.update(members))
    made: type[Any] = _made[both]
    return made


def _signed(forward: Any, theirs: Any) -> Any:
    """Return ``forward`` with the arguments of the class behind it, for those who look them up.

    Generation, export, adapters and data loaders do.
    """
    own = types.FunctionType(
        forward.__code__, forward.__globals__, "forward", forward.__defaults__, forward.__closure__
    )
    own.__kwdefaults__, own.__doc__ = forward.__kwdefaults__, forward.__doc__
    own.__signature__ = inspect.signature(theirs.forward)  # type: ignore[attr-defined]
    return own


def change_class(module: Any, cls: type[Any]) -> None:
    """Make ``module`` a ``cls``, below the class that torch gave it if it is parametrized.

    That class must stay at the top: torch looks there for the properties that compute parameters,
    and for the class to restore.
    """
    if is_parametrized(module):
        members = {
            name: value for name, value in vars(type(module)).items()
            if name not in ("__dict__", "__weakref__")
        }  # fmt: skip
        cls = type(f"Parametrized{cls.__name__}", (cls,), members)
    module.__class__ = cls


def _reduce(module: Any, protocol: int) -> Any:
    # By two classes that can be imported, as pickle looks classes up by name.
    return _rebuilt, type(module)._made_of, module.__getstate__()


def _rebuilt(ours: type[Any], theirs: type[nn.Module]) -> Any:
    return object.__new__(combined(ours, theirs))


def named(cls: type[Any]) -> str:
    """Return the name by which people import a class, as in ``torch.nn.LayerNorm``."""
    module: str = cls.__module__
    for known in ("torch.nn", "fusedformer.nn"):
        if module.startswith(known + "."):
            module = known
    return f"{module.removeprefix('transformers.models.')}.{cls.__qualname__}"


def arguments_of(cls: Any) -> tuple[str, ...]:
    """Return the names of the arguments of the ``forward`` of a class."""
    return tuple(inspect.signature(cls.forward).parameters)[1:]


class WithArguments:
    """A base of bases whose forward sorts its arguments by those of the class behind it."""

    _arguments: tuple[str, ...]  # of the forward of the class behind this one

    def __init_subclass__(cls) -> None:
        """Look up once what the class behind is."""
        made_of = getattr(cls, "_made_of", None)
        if made_of is not None:  # else a base too
            cls._arguments = arguments_of(made_of[1])


def is_asked(value: Any) -> bool:
    """Return whether an argument asks for more than its absence would."""
    return value is not None and value is not False


def is_asked_of(model: Any, given: dict[str, Any], name: str) -> bool:
    """Return whether a call of ``model`` asks for ``name``, or else its configuration does."""
    value = given.get(name)
    return bool(getattr(model.config, name, False) if value is None else value)


class Plan:
    """Changes to a model; none is made before :meth:`apply`."""

    def __init__(self) -> None:
        self.replaced: list[Replaced] = []
        self.left: list[Left] = []
        self._classes: list[tuple[nn.Module, type[Any]]] = []
        self._exchanges: list[Callable[[], None]] = []

    def give(self, path: str, module: nn.Module, cls: type[Any], after: str) -> None:
        """Plan to make ``module`` a ``cls``."""
        self.replaced.append(Replaced(path, named(type(module)), after))
        self._classes.append((module, cls))

    def class_of(self, module: nn.Module) -> type[Any]:
        """Return the class that ``module`` is going to have."""
        return next((cls for one, cls in self._classes if one is module), type(module))

    def attend(self, path: str, before: str) -> None:
        """Report that the model at ``path`` will attend by this library."""
        self.replaced.append(Replaced(path, f"{before} attention", "fusedformer.functional"))

    def do(self, exchange: Callable[[], None]) -> None:
        """Plan another change."""
        self._exchanges.append(exchange)

    def leave(self, path: str, module: nn.Module, reason: str) -> None:
        """Report that ``module`` stays as it is, and why."""
        left = Left(path, named(type(module)), reason)
        if left not in self.left:
            self.left.append(left)

    def apply(self) -> None:
        """Make all changes."""
        for exchange in self._exchanges:
            exchange()
        for module, cls in self._classes:
            module.__dict__.setdefault(BEFORE, type_before_parametrizations(module))
            change_class(module, cls)
