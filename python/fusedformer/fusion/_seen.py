"""What a module was found to be made of, for as long as nothing below it changes.

A short text takes as long to look at a layer's children as to compute them. So what was found is
kept with all by which a change would show: other children or classes, hooks, a forward put on the
instance, another value of a setting. Dtypes, devices and modes are not kept: they are read anew.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from fusedformer.nn.children import is_hooked

SEEN = "_fusedformer_seen"  # where a module keeps it


class Seen:
    """What was found of a module; copies and pickles of it are None."""

    def __init__(
        self, module: nn.Module, found: Any, settings: Iterable[tuple[dict[str, Any], str, Any]]
    ) -> None:
        """Note down all modules below ``module``, and ``settings``: where, name and value."""
        self.found = found
        self._modules = [
            (one, one.__dict__, type(one), {**one._modules}) for one in module.modules()
        ]
        self._settings = [*settings]

    @classmethod
    def of(
        cls,
        module: nn.Module,
        found: Any,
        settings: Iterable[tuple[dict[str, Any], str, Any]] = (),
    ) -> Seen | None:
        """Return what was found; None if it never :meth:`holds_for` the module, for a hook."""
        return None if any(map(is_hooked, module.modules())) else cls(module, found, settings)

    def holds_for(self, module: nn.Module) -> bool:
        """Return whether ``module`` is the one that was looked at, with nothing changed."""
        if self._modules[0][0] is not module or _has_any_global_hook():  # type: ignore[no-untyped-call]
            return False
        for one, own, cls, children in self._modules:
            if (
                own["_forward_hooks"]
                or own["_forward_pre_hooks"]
                or own["_backward_hooks"]
                or own["_backward_pre_hooks"]
                or "forward" in own
                or type(one) is not cls
                or own["_modules"] != children
            ):
                return False
        return all(place.get(name) is value for place, name, value in self._settings)

    def __deepcopy__(self, memo: Any) -> None:
        """Copy nothing: a copy's modules are others."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as None, for readers without this library too."""
        return type(None), ()
