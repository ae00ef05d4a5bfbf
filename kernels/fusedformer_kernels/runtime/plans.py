"""Plan launches: do again what a launcher did for a call of the same kind.

A launcher allocates, makes views and launches kernels. All of it but addresses follows from the
kinds of its arguments: dtypes, shapes, strides, devices and alignment of tensors, and the numbers.
The first call of a kind is recorded as it runs: which launches it made, and for each pointer that a
kernel got, whether it lies in an argument, in what a :func:`~steps.step` gave, or in memory of the
call's own. Later calls of that kind allocate, and launch.

So a launcher may not read values, copy, or fill memory, but within a :func:`~steps.step`. Where one
has to, it says so by :func:`~steps.unplanned`, and that kind of call is worked out each time.
Under :func:`verified`, as in the tests, each recording looks at every operator of torch that runs,
and raises at one that a plan would leave out.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

from fusedformer_kernels.runtime import configs, steps, tuned
from fusedformer_kernels.runtime import launch as launches
from fusedformer_kernels.runtime.plan import Plan
from fusedformer_kernels.runtime.recording import Recorder

F = TypeVar("F", bound=Callable[..., Any])

_MOST = 1024  # plans of one launcher
_NUMBERS = frozenset({type(None), bool, int, float, str, torch.dtype})
_TENSORS: set[type] = {Tensor}
_planners: weakref.WeakSet[Planner] = weakref.WeakSet()
_is_verified = False


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
        is_public: whether it is the function that users call. Its arguments may be any tensors, and
            its calls have plans only where no gradient is wanted.
    """

    def __init__(self, launcher: Callable[..., Any], *, is_public: bool = False) -> None:
        self.plans: dict[Any, Plan | None] = {}
        self._launcher = launcher
        self._is_public = is_public
        _planners.add(self)

    def __call__(self, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """Return what ``launcher(*args, **named)`` returns."""
        return self.run(args, named)[0]

    def run(self, args: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, Plan | None]:
        """Return the same, and the plan of calls of this kind, if there is one."""
        if _is_watched():
            return self._launcher(*args, **named), None
        tensors: dict[int, Tensor] = {}
        pointers: list[int] = []
        kinds: list[Any] = [configs.assumed_target(), configs.precision_of_products()]
        values = (*args, *named.values(), *named) if named else args
        public = None
        if self._is_public:
            public = torch.is_grad_enabled()
        if not _append_kinds(values, kinds, tensors, pointers, public) or not tensors:
            return self._launcher(*args, **named), None
        key = tuple(kinds)
        plan = self.plans.get(key, _UNKNOWN)
        if plan is None:
            return self._launcher(*args, **named), None
        if plan is not _UNKNOWN:
            return plan.run(tensors.values(), pointers), plan
        recorder = Recorder(list(tensors.values()))
        result = recorder.watch(self._launcher, args, named, verify=_is_verified)
        if len(self.plans) >= _MOST:
            self.plans.clear()
        plan = self.plans[key] = recorder.plan(result)
        return result, plan

    def follow(
        self,
        before: Plan | None,
        first: Tensor,
        others: Iterable[Tensor | None],
        kind: Any,
        args: Callable[[], tuple[Any, ...]],
    ) -> Any:
        """Return what ``launcher(*args())`` returns; its tensors are ``first`` and ``others``.

        The others were arguments or results of a call of ``before``, in the order of ``args()``, so
        that its kind, that of ``first``, and ``kind`` for what else there is, decide. It may be a
        backward.
        """
        if before is None or _is_watched() or type(first) not in _TENSORS:
            return self(args(), {})
        tensors = list({id(t): t for t in (first, *others) if t is not None}.values())
        pointers = [tensor.data_ptr() for tensor in tensors]
        key = first.dtype, first.shape, first.stride(), kind
        plan = before.followers.get(key)
        if plan is not None and [p & 15 for p in pointers] == plan.alignments:
            return plan.run(tensors, pointers)
        result, plan = self.run(args(), {})
        if len(before.followers) < _MOST:
            before.followers[key] = plan
        return result


_UNKNOWN: Any = object()


def clear() -> None:
    """Forget all plans: a setting has changed that decides what launchers do."""
    for planner in list(_planners):
        planner.plans.clear()


@contextlib.contextmanager
def verified() -> Iterator[None]:
    """Look at what torch runs while calls are recorded, and raise where a plan would miss it."""
    global _is_verified
    previous, _is_verified = _is_verified, True
    try:
        yield
    finally:
        _is_verified = previous


tuned.when_cleared(clear)


def _is_watched() -> bool:
    """Tell whether somebody looks at launches or forces configs, or records an outer call."""
    return not launches.can_be_repeated() or tuned.is_forced() or steps.recorder() is not None


def _is_tensor(cls: type) -> bool:
    """Tell whether ``cls`` is a class of tensors that torch treats as its own."""
    if not (
        issubclass(cls, Tensor)
        and cls.__torch_function__ is torch._C._disabled_torch_function_impl
        and cls.__torch_dispatch__ is Tensor.__torch_dispatch__
    ):
        return False
    _TENSORS.add(cls)
    return True


def _append_kinds(
    values: Any,
    kinds: list[Any],
    tensors: dict[int, Tensor],
    pointers: list[int],
    public: bool | None,
) -> bool:
    """Append what decides the plan of a call; False if there is a value that none is made for.

    Args:
        values: arguments.
        kinds: what there is to hash.
        tensors: each once, by its ``id``.
        pointers: of the tensors.
        public: None for a launcher, to which numbers that are equal are one, whatever their type.
            Of a public function, which may check types, whether it may not be planned for tensors
            that require a gradient.
    """
    for value in values:
        cls = type(value)
        if cls in _NUMBERS:
            kinds.append(value if public is None else (cls, value))
        elif cls in _TENSORS or _is_tensor(cls):
            name = id(value)
            if name in tensors:
                kinds.append(list(tensors).index(name))
                continue
            try:
                pointer = value.data_ptr()
                kinds += (value.dtype, value.shape, value.stride(), value.device, pointer & 15)
            except RuntimeError:  # nested, sparse, or what torch.func left behind
                return False
            if public is not None and (value.is_neg() or (public and value.requires_grad)):
                return False
            tensors[name] = value
            pointers.append(pointer)
        elif isinstance(value, tuple | list):
            kinds.append(len(value))
            if not _append_kinds(value, kinds, tensors, pointers, public):
                return False
        else:
            return False
    return True
