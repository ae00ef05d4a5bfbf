"""Calling functions and modules alike: arguments copied, what they return by name."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fusedformer._internal.outputs import tensors_of
from fusedformer.parity import criterion

Called = Callable[..., Any]


class Arguments(NamedTuple):
    """Of a call."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @staticmethod
    def of(function: str, inputs: Any) -> Arguments:
        """Of a mapping to keyword arguments, a sequence of positional ones, or the only one."""
        if isinstance(inputs, Tensor):
            return Arguments((inputs,), {})
        if isinstance(inputs, Mapping):
            return Arguments((), dict(inputs))
        if isinstance(inputs, Sequence) and not isinstance(inputs, str):
            return Arguments(tuple(inputs), {})
        raise TypeError(
            f"{function}(): expected 'inputs' to be a Tensor, a sequence of positional or a "
            f"mapping of keyword arguments, but got {type(inputs).__name__}"
        )

    def copied(self, dtype: torch.dtype | None = None) -> Arguments:
        """Leaves of their own, strides kept; floating-point tensors in ``dtype`` if given."""
        return self.mapped(lambda x: criterion.copied(x, dtype))

    def mapped(self, change: Callable[[Any], Any]) -> Arguments:
        """Each argument through ``change``."""
        return Arguments(
            tuple(map(change, self.args)), {n: change(x) for n, x in self.kwargs.items()}
        )

    def named(self) -> dict[str, Any]:
        """All of them, by name or place."""
        return {**{f"argument {i}": x for i, x in enumerate(self.args)}, **self.kwargs}

    def leaves(self) -> dict[str, Tensor]:
        """Those that require a gradient."""
        return {
            name: value
            for name, value in self.named().items()
            if isinstance(value, Tensor) and value.requires_grad
        }


def call(function: Called, given: Arguments) -> dict[str, Tensor]:
    """The floating-point tensors that are returned, by their place in it."""
    return tensors_of(function(*given.args, **given.kwargs))


def parameters(function: Called) -> dict[str, nn.Parameter]:
    """Those that are trained, if it is a module."""
    if not isinstance(function, nn.Module):
        return {}
    return {n: p for n, p in function.named_parameters() if p.requires_grad}


def in_float64(baseline: Called, truth: Called | str, function: str) -> Called:
    """The truth: ``truth`` itself, or ``baseline`` with its parameters in float64."""
    if callable(truth):
        return truth
    if truth != "float64":
        raise ValueError(
            f"{function}(): expected 'truth' to be 'float64' or a function or module that takes "
            f"float64, but got {truth!r}"
        )
    return copy.deepcopy(baseline).double() if isinstance(baseline, nn.Module) else baseline


def check_called(function: str, /, **called: Any) -> None:
    """Raise unless they can be called."""
    for name, one in called.items():
        if not callable(one):
            raise TypeError(
                f"{function}(): expected '{name}' to be a function or a Module, "
                f"but got {type(one).__name__}"
            )


def check_same_parameters(function: str, candidate: Called, baseline: Called) -> None:
    """Raise unless both modules have the same parameters, equal in value."""
    if not (isinstance(candidate, nn.Module) and isinstance(baseline, nn.Module)):
        return
    ours, theirs = candidate.state_dict(), baseline.state_dict()
    if ours.keys() != theirs.keys():
        some = sorted(ours.keys() ^ theirs.keys())
        raise ValueError(
            f"{function}(): expected 'candidate' and 'baseline' to have the same parameters, but "
            f"{len(some)} are in one alone, such as {some[0]!r}"
        )
    for name, tensor in ours.items():
        if not torch.equal(tensor, theirs[name].to(tensor)):
            raise ValueError(
                f"{function}(): expected 'candidate' and 'baseline' to have equal parameters, but "
                f"{name!r} differs; load the state_dict of one into the other"
            )


def check_repeats(function: str, name: str, called: Called, given: Arguments) -> None:
    """Raise if two calls with other random numbers differ: then there is nothing to compare."""
    results = []
    with torch.random.fork_rng(), torch.no_grad():
        for seed in (1, 2):
            torch.manual_seed(seed)
            results.append(call(called, given.copied()))
    for key, first in results[0].items():
        if not torch.equal(first.nan_to_num(), results[1][key].nan_to_num()):
            raise ValueError(
                f"{function}(): expected '{name}' to give the same {key} for the same inputs, but "
                f"it draws random numbers; call eval() on it or set its dropout to 0"
            )
