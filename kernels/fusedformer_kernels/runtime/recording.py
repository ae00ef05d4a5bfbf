"""What a launcher does, recorded call by call: see :mod:`plans`."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fusedformer_kernels.runtime import launch as launches

_NOWHERE = -1  # the slot of tensors without elements
_ALIGNMENT = 256  # bytes, of the parts of a call's scratch memory


class _Place(NamedTuple):
    """Where a pointer leads: ``offset`` bytes into a slot, and what a tensor there is like."""

    slot: int
    offset: int
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def tensor(self, owner: Tensor, shift: int = 0) -> Tensor:
        """The tensor there, if the slot begins ``shift`` bytes into ``owner``."""
        storage = owner.untyped_storage()
        start = owner.data_ptr() - storage.data_ptr() + shift + self.offset
        found = torch.empty(0, dtype=self.dtype, device=owner.device)
        return found.set_(storage, start // self.dtype.itemsize, self.size, self.stride)


class _Memory(NamedTuple):
    """What a call allocates for itself."""

    slot: int
    size: int  # bytes
    tensor: Tensor  # while recording, so that its address stays its own


class _Launch(NamedTuple):
    """One launch of a plan; tensors among ``args``, in tuples too, are places."""

    kernel: Any
    grid: tuple[int, ...]
    config: Any
    args: tuple[Any, ...]
    constants: dict[str, Any]
    compiled: launches.Compiled | None  # None under the interpreter


class _Step(NamedTuple):
    """One call of a :func:`plans.step`; arguments of the launcher among ``args`` are places."""

    function: Callable[..., Tensor]
    args: tuple[Any, ...]
    slot: int


class Recorder:
    """Notes what one call of a launcher on ``tensors`` does."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self.failed = False
        self._count = len(tensors)  # of slots; the arguments come first
        self._tensors = tensors
        self._by_pointer: dict[int, int] = {}
        self._in_storage: dict[int, int | None] = {}  # None: several arguments are views of it
        for slot, tensor in enumerate(tensors):
            pointer = tensor.data_ptr()
            # Two arguments at one address: a kernel's pointer does not say which it was.
            self.failed = self.failed or not pointer or pointer in self._by_pointer
            self._by_pointer[pointer] = slot
            storage = tensor.untyped_storage().data_ptr()
            self._in_storage[storage] = None if storage in self._in_storage else slot
        self._own: dict[int, _Memory] = {}  # by the address of its storage
        self._steps: list[_Launch | _Step] = []
        self._looker: _Looker | None = None

    def watch(
        self, launcher: Callable[..., Any], args: tuple[Any, ...], named: dict[str, Any], *,
        verify: bool,
    ) -> Any:  # fmt: skip
        """What ``launcher`` returns, recorded."""
        if self.failed:
            return launcher(*args, **named)
        if verify:
            self._looker = _Looker(self)
        with launches.recording(self), self._looker or contextlib.nullcontext():
            return launcher(*args, **named)

    def launched(
        self, kernel: Any, grid: tuple[int, ...], config: Any, args: tuple[Any, ...],
        constants: dict[str, Any], compiled: launches.Compiled | None,
    ) -> None:  # fmt: skip
        """Note a launch."""
        if compiled is None and not launches.is_interpreted(kernel):
            self.failed = True  # it was compiled for a profiler, say, and for this once
        if self.failed:
            return
        self._steps.append(
            _Launch(kernel, grid, config, self._placed(args), constants, compiled)
        )

    def called(self, function: Callable[..., Tensor], args: tuple[Any, ...], found: Tensor) -> None:
        """Note a call of a step that gave ``found``."""
        if self.failed:
            return
        places = self._placed(args)
        given = zip(places, args, strict=True)
        if any(isinstance(p, _Place) and not _is_whole(self, p, a) for p, a in given):
            self.failed = True
        self._steps.append(_Step(function, places, self._count))
        self._by_pointer[found.data_ptr()] = self._count
        self._in_storage[found.untyped_storage().data_ptr()] = self._count
        self._count += 1

    def plan(self, result: Any) -> Plan | None:
        """What was recorded, of a call that returned ``result``; None if it cannot be planned."""
        places = self._placed(result) if not self.failed else None
        if self.failed:
            return None
        return Plan(self._tensors, self._steps, list(self._own.values()), self._count, places)

    def _placed(self, value: Any) -> Any:
        """``value`` with places for tensors."""
        if isinstance(value, Tensor):
            return self._place_of(value)
        if isinstance(value, tuple | list):
            placed = tuple(map(self._placed, value))
            return type(value)(*placed) if hasattr(value, "_fields") else placed
        return value

    def _place_of(self, tensor: Tensor) -> _Place:
        like = tensor.dtype, tuple(tensor.shape), tensor.stride()
        pointer = tensor.data_ptr()
        if not tensor.numel():
            return _Place(_NOWHERE, 0, *like)
        slot: int | None = self._by_pointer.get(pointer)
        if slot is not None:
            return _Place(slot, 0, *like)
        storage = tensor.untyped_storage()
        base = storage.data_ptr()
        if base in self._in_storage:
            slot = self._in_storage[base]
            if slot is None or slot >= len(self._tensors):
                self.failed = True
                return _Place(0, 0, *like)
            return _Place(slot, pointer - self._tensors[slot].data_ptr(), *like)
        memory = self._own.get(base)
        if memory is None:
            memory = self._own[base] = _Memory(self._count, storage.nbytes(), tensor)
            self._count += 1
            if self._looker is not None:
                self._looker.check(base)
        return _Place(memory.slot, pointer - base, *like)


def _is_whole(recorder: Recorder, place: _Place, tensor: Tensor) -> bool:
    tensors = recorder._tensors
    return place.slot < len(tensors) and tensors[place.slot] is tensor


class Plan:
    """What a call of one kind does: memory, launches and steps, results."""

    def __init__(
        self,
        tensors: list[Tensor],
        steps: list[_Launch | _Step],
        memories: list[_Memory],
        count: int,
        result: Any,
    ) -> None:
        self._device = tensors[0].device
        self._later = [None] * (count + 1 - len(tensors))
        self._nowhere = [0] * (count + 1 - len(tensors))
        self._result = result
        own = {memory.slot: memory for memory in memories}
        returned: dict[int, list[_Place]] = {}
        for place in _places(result):
            returned.setdefault(place.slot, []).append(place)
        # Memory that is returned as one tensor is allocated as that tensor.
        self._outputs: list[tuple[int, Any, Any, Any]] = []  # slot, and what :meth:`_like` gives
        direct = set()
        self._scratch: list[tuple[int, int]] = []  # slot, offset
        self._scratch_size = 0
        for slot, memory in own.items():
            places = returned.get(slot, [])
            if not places:
                self._scratch.append((slot, self._scratch_size))
                self._scratch_size += -(-memory.size // _ALIGNMENT) * _ALIGNMENT
            elif len(places) == 1 and _fills(places[0], memory):
                self._outputs.append((slot, *self._like(places[0], tensors)))
                direct.add(slot)
            else:
                empty = torch.empty(0, dtype=torch.uint8, device=self._device)
                self._outputs.append((slot, empty, (memory.size,), (1,)))
        for slot, tensor in enumerate(tensors):
            if any(_is_all_of(place, tensor) for place in returned.get(slot, [])):
                direct.add(slot)
        self._direct = frozenset(direct)
        self._steps = [
            one if isinstance(one, _Step) else _Prepared(one) for one in steps
        ]
        self._is_interpreted = any(
            isinstance(one, _Launch) and one.compiled is None for one in steps
        )

    def _like(self, place: _Place, tensors: list[Tensor]) -> tuple[Any, Any, Any]:
        """How to allocate what is at ``place``: (argument, None, None), or (tensor, size, stride).

        ``torch.empty_like`` of an argument is the fastest way there is.
        """
        for index, tensor in enumerate(tensors):
            if _is_all_of(place, tensor) and place.stride == torch.empty_like(tensor).stride():
                return index, None, None
        empty = torch.empty(0, dtype=place.dtype, device=self._device)
        return empty, place.size, place.stride

    def run(self, tensors: list[Tensor], pointers: list[int]) -> Any:
        """Do it for a call's tensors, which are of the kinds that were recorded."""
        device = self._device
        # The last slot is the one of tensors without elements.
        owners: list[Any] = [*tensors, *self._later]
        pointers = [*pointers, *self._nowhere]
        for slot, like, size, stride in self._outputs:
            if size is None:
                owner = torch.empty_like(tensors[like])
            else:
                owner = like.new_empty_strided(size, stride)
            owners[slot] = owner
            pointers[slot] = owner.data_ptr()
        scratch = None
        if self._scratch:
            scratch = torch.empty(self._scratch_size, dtype=torch.uint8, device=device)
        if self._is_interpreted:
            self._interpret(owners, scratch)
        elif device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                self._enqueue(owners, pointers, scratch)
        else:
            self._enqueue(owners, pointers, scratch)
        return self._found(self._result, owners)

    def _enqueue(
        self, owners: list[Any], pointers: list[int], scratch: Tensor | None
    ) -> None:
        if scratch is not None:
            begin = scratch.data_ptr()
            for slot, offset in self._scratch:
                pointers[slot] = begin + offset
        stream = launches.current_stream(self._device)
        for one in self._steps:
            if isinstance(one, _Prepared):
                one.enqueue(pointers, stream)
            else:
                owners[one.slot] = _called(one, owners)
                pointers[one.slot] = owners[one.slot].data_ptr()

    def _interpret(self, owners: list[Any], scratch: Tensor | None) -> None:
        shifts = dict(self._scratch)
        for slot in shifts:
            owners[slot] = scratch
        for one in self._steps:
            if isinstance(one, _Step):
                owners[one.slot] = _called(one, owners)
            else:
                one.interpret(owners, shifts)

    def _found(self, value: Any, owners: list[Any]) -> Any:
        if type(value) is _Place:
            owner = owners[value.slot]
            if value.slot in self._direct:
                return owner
            return value.tensor(owner) if owner is not None else self._empty(value)
        if type(value) is tuple:
            return tuple([self._found(one, owners) for one in value])
        return value


    def _empty(self, place: _Place) -> Tensor:
        return torch.empty_strided(
            place.size, place.stride, dtype=place.dtype, device=self._device
        )


class _Prepared:
    """A launch whose arguments are a list to be filled with pointers."""

    def __init__(self, launch: _Launch) -> None:
        self._launch = launch
        self._flat = [*launch.args, *launch.constants.values()]
        self._pointers: list[tuple[int, int, int]] = []  # position, slot, offset
        self._tuples: list[tuple[int, Any]] = []
        for position, value in enumerate(launch.args):
            if isinstance(value, _Place):
                self._pointers.append((position, value.slot, value.offset))
            elif isinstance(value, tuple) and list(_places(value)):
                self._tuples.append((position, value))
        grid = launch.grid
        self._grid = grid if len(grid) == 3 else (*grid, 1, 1)[:3]

    def enqueue(self, pointers: list[int], stream: int) -> None:
        """Launch what is compiled."""
        flat = self._flat.copy()
        for position, slot, offset in self._pointers:
            flat[position] = pointers[slot] + offset
        for position, value in self._tuples:
            flat[position] = _with_pointers(value, pointers)
        compiled = self._launch.compiled
        assert compiled is not None
        compiled.run(
            *self._grid, stream, compiled.function, compiled.metadata, None, None, None, *flat
        )

    def interpret(self, owners: list[Any], shifts: dict[int, int]) -> None:
        """Launch by way of the interpreter, which wants tensors."""
        kernel, grid, config, args, constants, _ = self._launch
        tensors = _with_tensors(args, owners, shifts)
        launches.launch(kernel, grid, config, *tensors, **constants)


def _with_pointers(value: Any, pointers: list[int]) -> Any:
    if type(value) is _Place:
        return pointers[value.slot] + value.offset
    if isinstance(value, tuple):
        return tuple([_with_pointers(one, pointers) for one in value])
    return value


def _with_tensors(value: Any, owners: list[Any], shifts: dict[int, int]) -> Any:
    if type(value) is _Place:
        if value.slot == _NOWHERE:
            return torch.empty_strided(value.size, value.stride, dtype=value.dtype)
        return value.tensor(owners[value.slot], shifts.get(value.slot, 0))
    if isinstance(value, tuple):
        found = [_with_tensors(one, owners, shifts) for one in value]
        return type(value)(*found) if hasattr(value, "_fields") else tuple(found)
    return value


def _called(one: _Step, owners: list[Any]) -> Tensor:
    return one.function(*[owners[a.slot] if type(a) is _Place else a for a in one.args])


def _places(value: Any) -> list[_Place]:
    if type(value) is _Place:
        return [value]
    if isinstance(value, tuple):
        return [place for one in value for place in _places(one)]
    return []


def _is_all_of(place: _Place, tensor: Tensor) -> bool:
    """Whether what is at ``place`` is ``tensor``, an argument."""
    like = tensor.dtype, tuple(tensor.shape), tensor.stride()
    return place[1:] == (0, *like)


def _fills(place: _Place, memory: _Memory) -> bool:
    """Whether the tensor at ``place`` has each byte of its memory."""
    return math.prod(place.size) * place.dtype.itemsize == memory.size


class _Looker(TorchDispatchMode):
    """Sees every operator of torch that runs while a launcher is recorded."""

    only_looks = True  # to the library: calls take the way that they take without it

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder
        self._allocated: dict[int, Tensor] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        if launches.recorder() is not self._recorder or self._recorder.failed:
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
