"""Call functions and modules alike: copy arguments, and name what is returned."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fusedformer._internal.outputs import tensors_of
from fusedformer.parity.criterion import Function, copied


class Arguments(NamedTuple):
    """The positional and keyword arguments of a call."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @staticmethod
    def of(function: str, inputs: Any) -> Arguments:
        """Read a mapping as keyword arguments, a sequence as positional ones, a tensor as one."""
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
        """Copy to new leaves of the same strides; floating-point tensors to ``dtype`` if given."""
        return self.mapped(lambda x: copied(x, dtype))

    def mapped(self, change: Callable[[Any], Any]) -> Arguments:
        """Apply ``change`` to each argument."""
        return Arguments(
            tuple(map(change, self.args)), {n: change(x) for n, x in self.kwargs.items()}
        )

    def named(self) -> dict[str, Any]:
        """Return all arguments, by name or by place."""
        return {**{f"argument {i}": x for i, x in enumerate(self.args)}, **self.kwargs}

    def leaves(self) -> dict[str, Tensor]:
        """Return the tensors that require a gradient, by name."""
        return {
            name: value
            for name, value in self.named().items()
            if isinstance(value, Tensor) and value.requires_grad
        }


def call(function: Function, given: Arguments) -> dict[str, Tensor]:
    """Call ``function``; return its floating-point tensors, by their place in the result."""
    return tensors_of(function(*given.args, **given.kwargs))


def parameters(function: Function) -> dict[str, nn.Parameter]:
    """Return the parameters that are trained; none of a function."""
    if not isinstance(function, nn.Module):
        return {}
    return {n: p for n, p in function.named_parameters() if p.requires_grad}


def truth_function(baseline: Function, truth: Function | str, function: str) -> Function:
    """Return ``truth`` itself, or for "float64" the baseline with its parameters in float64."""
    if callable(truth):
        return truth
    if truth != "float64":
        raise ValueError(
            f"{function}(): expected 'truth' to be 'float64' or a function or module that takes "
            f"float64, but got {truth!r}"
        )
    return copy.deepcopy(baseline).double() if isinstance(baseline, nn.Module) else baseline


def check_callable(function: str, /, **given: Any) -> None:
    """Raise unless each of ``given`` can be called."""
    for name, one in given.items():
        if not callable(one):
            raise TypeError(
                f"{function}(): expected '{name}' to be a function or a Module, "
                f"but got {type(one).__name__}"
            )


def check_same_parameters(function: str, candidate: Function, baseline: Function) -> None:
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


def check_deterministic(function: str, name: str, called: Function, given: Arguments) -> None:
    """Raise if results depend on the random generator, which leaves nothing to compare."""
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
