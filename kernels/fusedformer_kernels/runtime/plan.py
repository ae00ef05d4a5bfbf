"""Hold the memory, launches and steps of one kind of call, and do them for other addresses."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedformer_kernels.runtime import launch as launches
from fusedformer_kernels.runtime.boxes import Boxes
from fusedformer_kernels.runtime.written import Written, sequence

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


class Plan:
    """Does what a call of one kind does, by a function that is written once.

    Memory is allocated before its first use and let go after its last; what no step and no result
    sees as a tensor is one piece of scratch memory.
    """

    def __init__(
        self,
        tensors: list[Tensor],
        whole: dict[int, Place],
        done: list[Launched | Stepped],
        memories: list[Memory],
        result: Any,
    ) -> None:
        self._device = tensors[0].device
        self._on_gpu = self._device.type == "cuda"
        self.followers: dict[Any, Plan | None] = {}  # of calls on what this one returns
        self._do = _Writer(tensors, whole, done, memories, result).written()

    def run(self, tensors: Iterable[Tensor], pointers: Iterable[int]) -> Any:
        """Do it for a call's tensors, which are of the kinds that were recorded."""
        if self._on_gpu and self._device.index != torch.cuda.current_device():
            with torch.cuda.device(self._device):
                return self._do(tensors, pointers)
        return self._do(tensors, pointers)


class _Writer:
    """Writes a plan's function, of tensors ``t0``, ``t1``, ... and their pointers ``p0``, ..."""

    def __init__(
        self,
        tensors: list[Tensor],
        whole: dict[int, Place],
        done: list[Launched | Stepped],
        memories: list[Memory],
        result: Any,
    ) -> None:
        self._arguments = len(tensors)
        self._device = tensors[0].device
        self._whole = dict(whole)
        self._done = done
        self._memories = memories
        self._result = result
        self._scratch: dict[int, int] = {}  # by slot, where in the scratch memory it begins
        self._text = Written("tensors, pointers")
        # Whose pointers launches want; under the interpreter they want tensors.
        self._pointers = {
            place.slot
            for one in done
            if isinstance(one, Launched) and one.compiled is not None
            for place in _places(one.args)
        }
        launched = [one.compiled for one in done if isinstance(one, Launched)]
        self._enqueues = bool(launched) and None not in launched

    def written(self) -> Callable[..., Any]:
        """Return the function."""
        text = self._text
        text.unpack("t", self._arguments, "tensors")
        text.unpack("p", self._arguments, "pointers")
        if self._enqueues:
            current, device = text.value(launches.current_stream), text.value(self._device)
            text.line(f"stream = {current}({device})")
        allocations = self._allocations()
        firsts: dict[int, int] = {}
        lasts: dict[int, int] = {}
        for index, one in enumerate(self._done):
            for place in _places(one.args):
                firsts.setdefault(place.slot, index)
                lasts[place.slot] = index
        kept = {place.slot for place in _places(self._result)} | set(self._scratch)
        kept.update(range(self._arguments))  # which the caller holds
        for index, one in enumerate(self._done):
            for slot in [slot for slot in allocations if firsts.get(slot) == index]:
                self._allocate(slot, allocations.pop(slot))
            if isinstance(one, Stepped):
                function = text.value(one.function)
                text.line(f"t{one.slot} = {function}({self._list(one.args)})")
                self._note_pointer(one.slot)
            elif one.compiled is None:
                self._interpret(one)
            else:
                self._enqueue(one, one.compiled)
            for slot in [slot for slot, last in lasts.items() if last == index]:
                if slot not in kept:
                    text.line(f"t{slot} = None")
        for slot, how in allocations.items():  # which nothing uses
            self._allocate(slot, how)
        text.line(f"return {self._value(self._result)}")
        return text.function()

    def _allocations(self) -> dict[int, str]:
        """Return how memory is allocated, by slot; begin with what is scratch memory."""
        text = self._text
        seen: dict[int, set[Place]] = {}  # by slot, as what it is seen
        as_tensors = [self._result, *(one.args for one in self._done if isinstance(one, Stepped))]
        for place in _places(as_tensors):
            seen.setdefault(place.slot, set()).add(place)
        found: dict[int, str] = {}
        total = 0
        for slot, size in self._memories:
            places = seen.get(slot, set())
            if not places:
                self._scratch[slot] = total
                total += -(-size // _ALIGNMENT) * _ALIGNMENT
                continue
            one = next(iter(places))
            if len(places) == 1 and math.prod(one.size) * one.dtype.itemsize == size:
                self._whole[slot] = one
                found[slot] = self._like(one)
            else:
                found[slot] = self._empty(torch.uint8, (size,), (1,))
        if self._scratch:
            text.line(f"scratch = {self._empty(torch.uint8, (total,), (1,))}")
            begin = [slot for slot in self._scratch if slot in self._pointers]
            if begin:
                text.line("begin = scratch.data_ptr()")
            for slot in begin:
                text.line(f"p{slot} = begin + {text.value(self._scratch[slot])}")
        return found

    def _like(self, place: Place) -> str:
        """Return how to allocate ``place``; like an argument is the fastest way there is."""
        if place.stride == _row_by_row(place.size):
            for index in range(self._arguments):
                if self._whole[index][2:] == place[2:]:
                    return f"{self._text.value(torch.empty_like)}(t{index})"
        return self._empty(place.dtype, place.size, place.stride)

    def _empty(self, dtype: torch.dtype, size: tuple[int, ...], stride: tuple[int, ...]) -> str:
        text, like = self._text, torch.empty(0, dtype=dtype, device=self._device)
        return f"{text.value(like.new_empty_strided)}({text.value(size)}, {text.value(stride)})"

    def _allocate(self, slot: int, how: str) -> None:
        self._text.line(f"t{slot} = {how}")
        self._note_pointer(slot)

    def _note_pointer(self, slot: int) -> None:
        if slot in self._pointers:
            self._text.line(f"p{slot} = t{slot}.data_ptr()")

    def _enqueue(self, one: Launched, compiled: launches.Compiled) -> None:
        """Launch what is compiled."""
        text, grid = self._text, one.grid
        grid = grid if len(grid) == 3 else (*grid, 1, 1)[:3]
        run, function, metadata, _ = compiled
        parts = [text.value(value) for value in grid]
        parts += ["stream", text.value(function), text.value(metadata), "None", "None", "None"]
        parts += [self._pointer(value) for value in (*one.args, *one.constants.values())]
        text.line(f"{text.value(run)}({', '.join(parts)})")

    def _interpret(self, one: Launched) -> None:
        """Launch by way of the interpreter, which wants tensors."""
        text = self._text
        start = [text.value(value) for value in (one.kernel, one.grid, one.config)]
        parts = ", ".join([*start, self._list(one.args), f"**{text.value(one.constants)}"])
        text.line(f"{text.value(launches)}.launch({parts})")

    def _pointer(self, value: Any) -> str:
        """Return the text of an argument of a launch, addresses for tensors."""
        if type(value) is Place:
            if value.slot == NOWHERE:
                return "0"
            offset = f" + {self._text.value(value.offset)}" if value.offset else ""
            return f"p{value.slot}{offset}"
        if type(value) is Boxes:
            return f"{self._text.value(value.at)}({self._pointer(value.base)})"
        if _holds_place(value):
            return sequence([self._pointer(inner) for inner in value])
        return self._text.value(value)

    def _list(self, values: tuple[Any, ...]) -> str:
        return ", ".join(self._value(value) for value in values)

    def _value(self, value: Any) -> str:
        """Return the text of a value: tensors for places, tuples as they were."""
        text = self._text
        if type(value) is Place:
            if value.slot == NOWHERE:
                empty = self._empty(value.dtype, (0,), (1,))
                return f"{empty}.as_strided({text.value(value.size)}, {text.value(value.stride)})"
            if value.slot in self._scratch:
                return f"{text.value(value.tensor)}(scratch, {self._scratch[value.slot]})"
            if self._whole.get(value.slot) == value:
                return f"t{value.slot}"
            return f"{text.value(value.tensor)}(t{value.slot})"
        if _holds_place(value):
            parts = [self._value(one) for one in value]
            if hasattr(value, "_fields"):
                return f"{text.value(type(value))}({', '.join(parts)})"
            return sequence(parts)
        return "None" if value is None else text.value(value)


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
    elif type(value) is Boxes:
        yield value.base
    elif isinstance(value, tuple | list):
        for one in value:
            if isinstance(one, tuple | list | Boxes):
                yield from _places(one)


def _holds_place(value: Any) -> bool:
    """Return whether there is a place in a tuple, be it of a tensor without elements."""
    return isinstance(value, tuple) and any(
        type(one) is Place or _holds_place(one) for one in value
    )
