"""Record what a launcher does, call by call: see :mod:`plans`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fusedformer_kernels.runtime import launch as launches
from fusedformer_kernels.runtime import steps
from fusedformer_kernels.runtime.boxes import Boxes
from fusedformer_kernels.runtime.plan import NOWHERE, Launched, Memory, Place, Plan, Stepped

_NUMBERS = frozenset({int, float, bool, type(None)})


_is_verified = False


@contextlib.contextmanager
def verified() -> Iterator[None]:
    """Look at what torch runs while calls are recorded, and raise where a plan would miss it."""
    global _is_verified
    previous, _is_verified = _is_verified, True
    try:
        yield
    finally:
        _is_verified = previous


def is_verified() -> bool:
    """Return whether :func:`verified` is in force."""
    return _is_verified


class Recorder:
    """Notes what one call of a launcher on ``tensors`` does."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.failed = False
        self._tensors = list(tensors)
        self._count = len(tensors)  # of slots; the arguments come first
        self._whole: dict[int, Place] = {}  # what a slot is as a tensor, of arguments and steps
        self._pointers: dict[int, int] = {}  # by slot, of arguments and steps
        self._by_pointer: dict[int, int] = {}
        self._in_storage: dict[int, int | None] = {}  # None: several slots are views of it
        self._own: dict[int, Memory] = {}  # by the address of its storage
        self._done: list[Launched | Stepped] = []
        self._looker: _Looker | None = None
        self._alive: list[Tensor] = []  # so that no address is given twice
        for slot, tensor in enumerate(tensors):
            # Two arguments at one address: a kernel's pointer does not say which it was.
            pointer = tensor.data_ptr()
            self.failed = self.failed or not pointer or pointer in self._by_pointer
            self._know(slot, tensor)

    def watch(
        self,
        launcher: Callable[..., Any],
        args: tuple[Any, ...],
        named: dict[str, Any],
    ) -> Any:
        """Return what ``launcher`` returns, and record the call."""
        if self.failed:
            return launcher(*args, **named)
        if _is_verified:
            self._looker = _Looker(self)
        with steps.recording(self), self._looker or contextlib.nullcontext():
            return launcher(*args, **named)

    def launched(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        config: Any,
        args: tuple[Any, ...],
        constants: dict[str, Any],
        compiled: launches.Compiled | None,
    ) -> None:
        """Note a launch."""
        if compiled is None and not launches.is_interpreted(kernel):
            self.failed = True  # it was compiled for a profiler, say, and for this once
        if any(isinstance(v, tuple) and any(isinstance(w, tuple) for w in v) for v in args):
            self.failed = True  # no kernel takes tuples of tuples, and plans look no deeper
        if self.failed:
            return
        self._done.append(Launched(kernel, grid, config, self._placed(args), constants, compiled))

    def called(self, function: Callable[..., Tensor], args: tuple[Any, ...], found: Tensor) -> None:
        """Note a call of a step that gave ``found``."""
        if self.failed:
            return
        self._done.append(Stepped(function, self._placed(args), self._count))
        self._know(self._count, found)
        self._count += 1

    def differentiated(self, apply: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """Call an op that is a node of autograd, which no plan of launches can hold."""
        self.failed = True
        return apply(*args, None)

    def plan(self, result: Any) -> Plan | None:
        """Make the plan of a call that returned ``result``; None if it cannot be planned."""
        places = None if self.failed else self._placed(result)
        self._looker = None  # which knows of this one: nothing is left that holds tensors
        if self.failed:
            return None
        return Plan(self._tensors, self._whole, self._done, list(self._own.values()), places)

    def _know(self, slot: int, tensor: Tensor) -> None:
        """Take note of a tensor that an argument is, or that a step has given."""
        self._alive.append(tensor)
        self._whole[slot] = Place.of(slot, 0, tensor)
        self._pointers[slot] = tensor.data_ptr()
        self._by_pointer[tensor.data_ptr()] = slot
        storage = tensor.untyped_storage().data_ptr()
        known = storage in self._in_storage or storage in self._own
        self._in_storage[storage] = None if known else slot

    def _placed(self, value: Any) -> Any:
        """Return ``value`` with places for tensors."""
        if isinstance(value, Tensor):
            return self._place_of(value)
        if type(value) is Boxes:
            return value.at(self._place_of(value.base))
        if not isinstance(value, tuple | list):
            return value
        placed = tuple([v if type(v) in _NUMBERS else self._placed(v) for v in value])
        return type(value)(*placed) if hasattr(value, "_fields") else placed

    def _place_of(self, tensor: Tensor) -> Place:
        if not tensor.numel():
            return Place.of(NOWHERE, 0, tensor)
        self._alive.append(tensor)
        pointer = tensor.data_ptr()
        slot: int | None = self._by_pointer.get(pointer)
        if slot is not None:
            return Place.of(slot, 0, tensor)
        storage = tensor.untyped_storage()
        base = storage.data_ptr()
        if base in self._in_storage:
            slot = self._in_storage[base]
            if slot is None:
                self.failed = True
                return Place.of(NOWHERE, 0, tensor)
            return Place.of(slot, pointer - self._pointers[slot], tensor)
        memory = self._own.get(base)
        if memory is None:
            memory = self._own[base] = Memory(self._count, storage.nbytes())
            self._count += 1
            if self._looker is not None:
                self._looker.check(base)
        return Place.of(memory.slot, pointer - base, tensor)


class _Looker(TorchDispatchMode):
    """Sees every operator of torch that runs while a launcher is recorded."""

    only_looks = True  # to the library: calls take the way that they take without it

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder
        self._allocated: dict[int, Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if steps.recorder() is not self._recorder or self._recorder.failed:
            return found  # within a step, or after the launcher has said that there is no plan
        name = func.overloadpacket.__name__
        if name in ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided"):
            self._allocated[found.untyped_storage().data_ptr()] = found
        elif not (func.is_view or name in ("detach", "set_", "promote_types")):
            raise AssertionError(f"{func} ran in a launcher that is planned and does not say so")
        return found

    def check(self, base: int) -> None:
        """Raise unless memory that is taken for the call's own was allocated by it."""
        if base not in self._allocated:
            raise AssertionError("a launcher that is planned uses a tensor of unknown origin")
