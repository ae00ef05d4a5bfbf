"""Hold the memory, launches and steps of one kind of call, and do them for other addresses."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedformer_kernels.runtime import launch as launches

NOWHERE = -1  # the slot of tensors without elements
_ALIGNMENT = 256  # bytes, of the parts of a call's scratch memory


class Place(NamedTuple):
    """Says where a pointer leads, ``offset`` bytes into a slot, and what a tensor there is like."""

    slot: int
    offset: int
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]

    @staticmethod
    def of(slot: int, offset: int, tensor: Tensor) -> Place:
        """Describe a tensor."""
        return Place(slot, offset, tensor.dtype, tuple(tensor.shape), tensor.stride())

    def tensor(self, owner: Tensor, shift: int = 0) -> Tensor:
        """Make the tensor there, if the slot begins ``shift`` bytes into ``owner``."""
        storage = owner.untyped_storage()
        start = owner.data_ptr() - storage.data_ptr() + shift + self.offset
        found = torch.empty(0, dtype=self.dtype, device=owner.device)
        return found.set_(storage, start // self.dtype.itemsize, self.size, self.stride)


class Memory(NamedTuple):
    """Is a piece of memory that a call allocates."""

    slot: int
    size: int  # bytes


class Launched(NamedTuple):
    """Is a launch; tensors among ``args``, and in tuples among them, are places."""

    kernel: Any
    grid: tuple[int, ...]
    config: Any
    args: tuple[Any, ...]
    constants: dict[str, Any]
    compiled: launches.Compiled | None  # None under the interpreter


class Stepped(NamedTuple):
    """Is a call of a step; tensors among ``args`` are places."""

    function: Callable[..., Tensor]
    args: tuple[Any, ...]
    slot: int  # of what it gives


class _Slot(int):
    """Stands for the tensor that a slot is, in a template of arguments or results."""


class Plan:
    """Does what a call of one kind does.

    Memory is allocated before its first use and let go after its last; what no step and no result
    sees as a tensor is one piece of scratch memory.
    """

    def __init__(
        self,
        tensors: list[Tensor],
        whole: dict[int, Place],
        done: list[Launched | Stepped],
        memories: list[Memory],
        count: int,
        result: Any,
    ) -> None:
        self._device = tensors[0].device
        compiled = [one.compiled for one in done if isinstance(one, Launched)]
        self._interpreted = None in compiled
        self._enqueues = bool(compiled) and not self._interpreted
        self._more = [None] * (count + 1 - len(tensors))  # the last slot is NOWHERE
        self._nowhere = [0] * len(self._more)
        self.alignments = [tensor.data_ptr() & 15 for tensor in tensors]
        self.followers: dict[Any, Plan | None] = {}  # of calls on what this one returns

        seen: dict[int, set[Place]] = {}  # by slot, as what it is seen
        as_tensors = [result, *(one.args for one in done if isinstance(one, Stepped))]
        for place in _places(as_tensors):
            seen.setdefault(place.slot, set()).add(place)
        allocations: dict[int, tuple[Any, Any, Any]] = {}  # by slot, what :meth:`_like` gives
        self._scratch: list[tuple[int, int]] = []  # slot, offset
        self._scratch_size = 0
        for slot, size in memories:
            places = seen.get(slot, set())
            if not places:
                self._scratch.append((slot, self._scratch_size))
                self._scratch_size += -(-size // _ALIGNMENT) * _ALIGNMENT
                continue
            one = next(iter(places))
            if len(places) == 1 and math.prod(one.size) * one.dtype.itemsize == size:
                whole[slot] = one
                allocations[slot] = self._like(one, whole, len(tensors))
            else:
                empty = torch.empty(0, dtype=torch.uint8, device=self._device)
                allocations[slot] = empty, (size,), (1,)
        self._result = _settled(result, whole)
        firsts: dict[int, int] = {}
        lasts: dict[int, int] = {}
        for index, one_done in enumerate(done):
            for place in _places(one_done.args):
                firsts.setdefault(place.slot, index)
                lasts[place.slot] = index
        allocated: list[list[Any]] = [[] for _ in done]
        freed: list[list[int]] = [[] for _ in done]
        for slot, how in allocations.items():
            if slot in firsts:
                allocated[firsts[slot]].append((slot, *how))
        kept = {place.slot for place in _places(result)} | {slot for slot, _ in self._scratch}
        kept.update(range(len(tensors)))  # which the caller holds
        self._done: list[tuple[list[Any], _Prepared | Stepped, list[int]]] = []
        for slot, last in lasts.items():
            if slot not in kept:
                freed[last].append(slot)
        for one_done, *around in zip(done, allocated, freed, strict=True):
            if isinstance(one_done, Launched):
                self._done.append((around[0], _Prepared(one_done), around[1]))
            else:
                args = _settled(one_done.args, whole)
                self._done.append((around[0], one_done._replace(args=args), around[1]))
        self._never_used = [(s, *how) for s, how in allocations.items() if s not in firsts]

    def _like(
        self, place: Place, whole: dict[int, Place], arguments: int
    ) -> tuple[Any, Any, Any]:
        """Say how to allocate ``place``: (argument, None, None), or (tensor, size, stride).

        ``torch.empty_like`` of an argument is the fastest way there is.
        """
        if place.stride == _row_by_row(place.size):
            for index in range(arguments):
                if whole[index][2:] == place[2:]:
                    return index, None, None
        empty = torch.empty(0, dtype=place.dtype, device=self._device)
        return empty, place.size, place.stride

    def run(self, tensors: Iterable[Tensor], pointers: list[int]) -> Any:
        """Do it for a call's tensors, which are of the kinds that were recorded."""
        device = self._device
        owners: list[Any] = [*tensors, *self._more]
        pointers = [*pointers, *self._nowhere]
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                self._run(owners, pointers)
        else:
            self._run(owners, pointers)
        return _with_tensors(self._result, owners)

    def _run(self, owners: list[Any], pointers: list[int]) -> None:
        shifts: dict[int, int] = {}
        if self._scratch:
            scratch = torch.empty(self._scratch_size, dtype=torch.uint8, device=self._device)
            begin = scratch.data_ptr()
            for slot, offset in self._scratch:
                pointers[slot] = begin + offset
            if self._interpreted:
                shifts = dict(self._scratch)
                for slot in shifts:
                    owners[slot] = scratch
        stream = launches.current_stream(self._device) if self._enqueues else None
        for allocated, one, freed in self._done:
            if allocated:
                _allocate(allocated, owners, pointers)
            if isinstance(one, Stepped):
                owners[one.slot] = found = one.function(
                    *[owners[a] if type(a) is _Slot else _with_tensors(a, owners) for a in one.args]
                )
                pointers[one.slot] = found.data_ptr()
            elif stream is None:
                one.interpret(owners, shifts)
            else:
                one.enqueue(pointers, stream)
            for slot in freed:
                owners[slot] = None
        if self._never_used:
            _allocate(self._never_used, owners, pointers)


class _Prepared:
    """Is a launch whose arguments are a list to be filled with pointers."""

    def __init__(self, launched: Launched) -> None:
        self._launched = launched
        self._flat = [*launched.args, *launched.constants.values()]
        self._pointers: list[tuple[int, int, int]] = []  # position, slot, offset
        self._tuples: list[tuple[int, list[Any], list[tuple[int, int, int]]]] = []
        for position, value in enumerate(launched.args):
            if isinstance(value, Place):
                self._pointers.append((position, value.slot, value.offset))
            elif isinstance(value, tuple):
                within = [
                    (i, inner.slot, inner.offset)
                    for i, inner in enumerate(value)
                    if type(inner) is Place
                ]
                if within:
                    self._tuples.append((position, list(value), within))
        grid = launched.grid
        self._grid = grid if len(grid) == 3 else (*grid, 1, 1)[:3]

    def enqueue(self, pointers: list[int], stream: int) -> None:
        """Launch what is compiled."""
        flat = self._flat.copy()
        for position, slot, offset in self._pointers:
            flat[position] = pointers[slot] + offset
        for position, values, within in self._tuples:
            values = values.copy()
            for index, slot, offset in within:
                values[index] = pointers[slot] + offset
            flat[position] = tuple(values)
        compiled = self._launched.compiled
        assert compiled is not None
        compiled.run(
            *self._grid, stream, compiled.function, compiled.metadata, None, None, None, *flat
        )

    def interpret(self, owners: list[Any], shifts: dict[int, int]) -> None:
        """Launch by way of the interpreter, which wants tensors."""
        kernel, grid, config, args, constants, _ = self._launched
        launches.launch(kernel, grid, config, *_with_tensors(args, owners, shifts), **constants)


def _allocate(allocated: list[Any], owners: list[Any], pointers: list[int]) -> None:
    for slot, like, size, stride in allocated:
        if size is None:
            owner = torch.empty_like(owners[like])
        else:
            owner = like.new_empty_strided(size, stride)
        owners[slot] = owner
        pointers[slot] = owner.data_ptr()


def _with_tensors(value: Any, owners: list[Any], shifts: dict[int, int] | None = None) -> Any:
    """Fill a template: tensors for slots and places, tuples as they were."""
    kind = type(value)
    if kind is _Slot:
        return owners[value]
    if kind is Place:
        if value.slot == NOWHERE:
            like = next(owner for owner in owners if owner is not None)
            return like.new_empty(0, dtype=value.dtype).as_strided(value.size, value.stride)
        return value.tensor(owners[value.slot], shifts.get(value.slot, 0) if shifts else 0)
    if kind is tuple:
        return tuple([_with_tensors(one, owners, shifts) for one in value])
    if isinstance(value, tuple):
        return kind(*[_with_tensors(one, owners, shifts) for one in value])
    return value


def _settled(value: Any, whole: dict[int, Place]) -> Any:
    """Replace places that are all that their slots are by the slots."""
    if type(value) is Place:
        return _Slot(value.slot) if whole.get(value.slot) == value else value
    if isinstance(value, tuple):
        settled = tuple(_settled(one, whole) for one in value)
        return type(value)(*settled) if hasattr(value, "_fields") else settled
    return value


def _row_by_row(size: tuple[int, ...]) -> tuple[int, ...]:
    """Return the strides of a contiguous tensor."""
    strides, stride = [], 1
    for extent in reversed(size):
        strides.append(stride)
        stride *= max(extent, 1)
    return tuple(reversed(strides))


def _places(value: Any) -> Iterator[Place]:
    if type(value) is Place:
        if value.slot != NOWHERE:
            yield value
    elif isinstance(value, tuple | list):
        for one in value:
            if isinstance(one, tuple | list):
                yield from _places(one)
