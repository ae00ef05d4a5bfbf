"""Plan launches: do again what a launcher did for a call of the same kind.

A launcher allocates, makes views and launches kernels. All of it but addresses follows from the
kinds of its arguments: dtypes, shapes, strides, devices and alignment of tensors, and the numbers.
The second call of a kind is recorded as it runs: which launches it made, and for each pointer that
a kernel got, whether it lies in an argument, in what a :func:`~steps.step` gave, or in memory of
the call's own. Later calls of that kind allocate, and launch.

So a launcher may not read values, copy, or fill memory, but within a :func:`~steps.step`. Where one
has to, it says so by :func:`~steps.unplanned`, and that kind of call is worked out each time.
Under :func:`~recording.verified`, as in the tests, each recording looks at every operator of torch
that runs, and raises at one that a plan would leave out; so that none is missed, calls are then
recorded at first sight.
"""

from __future__ import annotations

import functools
import operator
import weakref
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from torch import Tensor

from fusedformer_kernels.runtime import launch as launches
from fusedformer_kernels.runtime import steps, tuned
from fusedformer_kernels.runtime.plan import Plan
from fusedformer_kernels.runtime.readers import Reader, classes_of, settings
from fusedformer_kernels.runtime.recording import Recorder, is_verified

F = TypeVar("F", bound=Callable[..., Any])

_MOST = 1024  # plans of one launcher
_planners: weakref.WeakSet[Planner] = weakref.WeakSet()


def planned(launcher: F) -> F:
    """Plan the calls of a launcher by their kinds; a decorator.

    Arguments are tensors, numbers, names, dtypes, None, and tuples or lists of these.
    Results are tensors or None, and tuples of them.
    """
    planner = Planner(launcher)

    @functools.wraps(launcher)
    def run(*args: Any, **named: Any) -> Any:
        return planner(args, named)

    run.planner = planner  # type: ignore[attr-defined]
    return run  # type: ignore[return-value]


class Planner:
    """Keeps the plans of one launcher, by kinds of arguments.

    Args:
        launcher: see :func:`planned`.
        with_gradients: given for a function that users call, whose arguments may be any tensors:
            it makes the recorder of a call whose result has a gradient, from the call's tensors.
    """

    def __init__(
        self,
        launcher: Callable[..., Any],
        with_gradients: Callable[[tuple[Tensor, ...]], Any] | None = None,
    ) -> None:
        self.plans: dict[Any, Any] = {}
        self._seen: dict[Any, object] = {}  # kinds that have no plan, or none yet
        self._launcher = launcher
        self._readers: dict[Any, Reader] = {}
        self._with_gradients = with_gradients
        _planners.add(self)

    def __call__(self, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """Return what ``launcher(*args, **named)`` returns."""
        return self.run(args, named)[0]

    def forget(self) -> None:
        """Forget all plans, and what has been seen."""
        self.plans.clear()
        self._seen.clear()

    def run(self, args: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, Any]:
        """Return the same, and the plan of calls of this kind, if there is one."""
        if _is_watched():
            return self._launcher(*args, **named), None
        values = (*args, *named.values()) if named else args
        classes = classes_of(values)
        reader = self._readers.get((classes, *named) if named else classes)
        if reader is None:
            reader = self._new_reader(classes, named)
        found = reader.read(values)
        if found is None:
            return self._launcher(*args, **named), None
        key, tensors, pointers, has_gradient = found
        plan = self.plans.get(key)
        if plan is not None:
            return plan.run(tensors, pointers), plan
        if not self._is_to_record(key):
            return self._launcher(*args, **named), None
        made = self._with_gradients if has_gradient else None
        recorder: Any = Recorder(tensors) if made is None else made(tensors)
        result = recorder.watch(self._launcher, args, named)
        plan = recorder.plan(result)
        if plan is None:
            self._seen[key] = _NEVER
        else:
            if len(self.plans) >= _MOST:
                self.plans.clear()
            self.plans[key] = plan
        return result, plan

    def _is_to_record(self, key: Any) -> bool:
        """Return whether to record this call of a kind without a plan: the second there is.

        Where shapes vary, as totals of packed tokens do, most kinds are seen once.
        """
        seen = self._seen.get(key)
        if seen is None:
            if len(self._seen) >= _MOST:
                self._seen.clear()
            self._seen[key] = _ONCE
        return seen is not _NEVER and (seen is _ONCE or is_verified())

    def _new_reader(self, classes: tuple[Any, ...], names: Iterable[str]) -> Reader:
        if len(self._readers) >= _MOST:
            self._readers.clear()
        reader = Reader(classes, is_public=self._with_gradients is not None)
        self._readers[(classes, *names) if names else classes] = reader
        return reader


def follow(
    before: Plan | None,
    kind: Any,
    first: Tensor,
    others: Iterable[Tensor | None],
    call: Callable[[], Any],
) -> Any:
    """Return what ``call()`` returns, by a plan if it follows a call that had one.

    Its tensors are ``first``, such as a gradient, and others that were arguments or results of that
    call, always in the same order, or that ``kind`` describes; what else it depends on is in
    ``kind``.
    """
    if before is None or _is_watched() or type(first) is not Tensor:
        return call()
    tensors = [first, *[tensor for tensor in others if tensor is not None]]
    same = None
    if len(set(map(id, tensors))) < len(tensors):
        given, tensors = tensors, list({id(tensor): tensor for tensor in tensors}.values())
        same = tuple([next(i for i, t in enumerate(tensors) if t is one) for one in given])
    pointers = list(map(Tensor.data_ptr, tensors))
    unaligned: Any = functools.reduce(operator.or_, pointers) & 15
    if unaligned:
        unaligned = tuple([pointer & 15 for pointer in pointers])
    key = kind, first.dtype, first.shape, first.stride(), same, unaligned, settings()
    plan = before.followers.get(key, _UNKNOWN)
    if plan is None:
        return call()
    if plan is not _UNKNOWN:
        return plan.run(tensors, pointers)
    recorder = Recorder(tensors)
    result = recorder.watch(call, (), {})
    if len(before.followers) >= _MOST:
        before.followers.clear()
    before.followers[key] = recorder.plan(result)
    return result


_UNKNOWN: Any = object()
_ONCE, _NEVER = object(), object()


def clear() -> None:
    """Forget all plans: a setting has changed that decides what launchers do."""
    for planner in list(_planners):
        planner.forget()


tuned.when_cleared(clear)


def _is_watched() -> bool:
    """Tell whether somebody looks at launches or forces configs, or records an outer call."""
    # Read where they are kept, since every planned call asks.
    return bool(
        not launches.can_be_repeated()
        or tuned._forced
        or steps._recording.recorder is not None
    )
