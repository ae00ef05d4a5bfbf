"""Whole calls of public functions as plans of their launches.

A call is checks, choices and a launcher, or a node of autograd where a gradient is wanted. All that
its kinds of arguments do not decide is addresses: the second of a kind is looked up.
``fusedformer_kernels.runtime.plans`` says what a plan holds, and :mod:`calls` what is kept of calls
with a gradient.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from fusedformer._internal.backend import kernels_run_on
from fusedformer._internal.tracing import is_eager
from fusedformer_kernels.runtime.steps import step as step
from fusedformer_kernels.runtime.steps import unplanned as unplanned

F = TypeVar("F", bound=Callable[..., Any])

_is_compiling = torch.compiler.is_compiling
_is_autocast = torch._C._is_any_autocast_enabled
_is_profiled = torch._C._autograd._profiler_enabled


def planned(function: F) -> F:
    """Plan the calls of ``function``, whose first argument is a tensor; a decorator."""
    planner: Any = None

    @functools.wraps(function)
    def call(*args: Any, **named: Any) -> Any:
        nonlocal planner
        if (
            _is_compiling()
            or not args
            or type(args[0]) is not Tensor
            or not kernels_run_on(args[0])
            or _is_autocast()
            or _is_profiled()
            or not is_eager()
        ):
            return function(*args, **named)
        if planner is None:
            from fusedformer._internal.calls import CallRecorder
            from fusedformer_kernels.runtime.plans import Planner

            planner = Planner(function, CallRecorder)
        return planner.run(args, named)[0]

    return call  # type: ignore[return-value]


def saved_as_they_are() -> bool:
    """Whether what a node of autograd saves comes back with the strides that it has."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is None
