"""Read what decides the plan of a call from its arguments: see :mod:`plans`.

Arguments of the same classes are read by one function, which is written once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fusedformer_kernels.runtime.targets import assumed_target, precision_of_products
from fusedformer_kernels.runtime.written import Written, sequence

_NUMBERS = frozenset({type(None), bool, int, float, str, torch.dtype})
_SEQUENCES = (tuple, list)
_PLAIN: set[type] = {*_NUMBERS, Tensor}  # classes of values that hold no others


def settings() -> tuple[Any, ...]:
    """Return what else launchers depend on."""
    return assumed_target(), precision_of_products()


def classes_of(values: Any) -> tuple[Any, ...]:
    """Return the class of each value; for a tuple or list the classes of what is in it."""
    classes = tuple(map(type, values))
    if _PLAIN.issuperset(classes):
        return classes
    found: list[Any] = list(classes)
    for index, cls in enumerate(classes):
        if cls not in _PLAIN and issubclass(cls, _SEQUENCES):
            found[index] = classes_of(values[index])
    return tuple(found)


class Reader:
    """Reads arguments of some classes.

    Args:
        classes: see :func:`classes_of`.
        is_public: of a function that users call: its arguments may be any tensors, some of which
            no plan serves, and whether a gradient is wanted belongs to the kind of a call.
    """

    def __init__(self, classes: tuple[Any, ...], *, is_public: bool) -> None:
        self._classes = classes
        self._is_public = is_public
        self._is_known = all(_is_known(cls) for cls in _flat(classes))
        self._by_sameness: dict[Any, Any] = {}

    def read(self, values: tuple[Any, ...]) -> Any:
        """Return (key, tensors, pointers, whether a gradient is wanted), or None for no plan."""
        if not self._is_known:
            return None
        try:
            found = self._distinct(values)
            if found is None or found[0] is not _SAME:
                return found
            identities = list(map(id, found[1]))
            same = tuple(map(identities.index, identities))
            read = self._by_sameness.get(same)
            if read is None:
                read = self._by_sameness[same] = self._written(same)
            return read(values)
        except RuntimeError:  # nested, sparse, or what torch.func left behind
            return None

    @functools.cached_property
    def _distinct(self) -> Callable[[tuple[Any, ...]], Any]:
        """Read values, no tensor twice; return ``_SAME`` and the tensors where one may be."""
        return self._written(None)

    def _written(self, same: tuple[int, ...] | None) -> Callable[[tuple[Any, ...]], Any]:
        """Write the function; ``same`` says of each tensor which one it is, as the first of it."""
        text = Written("values")
        names = list(_unpack(text, self._classes, "a", "values"))
        every = [name for name, cls in names if cls not in _NUMBERS]
        if not every:
            return lambda values: None
        place = range(len(every)) if same is None else same
        tensors = [name for index, name in enumerate(every) if place[index] == index]
        pointers = [f"p{index}" for index in range(len(tensors))]
        for pointer, name in zip(pointers, tensors, strict=True):
            text.line(f"{pointer} = {name}.data_ptr()")
        if same is None and len(tensors) > 1:
            text.line(f"if len({{{', '.join(pointers)}}}) < {len(tensors)}:")
            text.line(f" return {text.value(_SAME)}, {sequence(tensors)}")
        key = [text.value((self, same)), f"{text.value(assumed_target)}()"]
        key.append(f"{text.value(precision_of_products)}()")
        wanted = "False"
        if self._is_public:
            text.line(f"if {' or '.join(f'{name}.is_neg()' for name in tensors)}:")
            text.line(" return None")
            asked = " or ".join(f"{name}.requires_grad" for name in tensors)
            flags = sequence([f"{name}.requires_grad" for name in tensors])
            text.line(f"wanted = {text.value(torch.is_grad_enabled)}() and ({asked})")
            wanted = "wanted"
            key.append(f"wanted and {flags}")
        for pointer, name in zip(pointers, tensors, strict=True):
            key += [f"{name}.{part}" for part in ("dtype", "shape", "stride()", "device")]
            key.append(f"{pointer} & 15")
        key += [name for name, cls in names if cls in _NUMBERS and cls is not type(None)]
        text.line(
            f"return {sequence(key)}, {sequence(tensors)}, {sequence(pointers)}, {wanted}"
        )
        return text.function()


_SAME: Any = object()


def _unpack(text: Written, classes: tuple[Any, ...], letter: str, of: str) -> Iterator[Any]:
    """Write how values are taken apart; give the name and the class of each."""
    text.unpack(letter, len(classes), of)
    for index, cls in enumerate(classes):
        if isinstance(cls, tuple):
            yield from _unpack(text, cls, f"{letter}{index}_", f"{letter}{index}")
        else:
            yield f"{letter}{index}", cls


def _flat(values: Any) -> Iterator[Any]:
    """Give what is in tuples and lists, however deep."""
    for value in values:
        if isinstance(value, tuple | list):
            yield from _flat(value)
        else:
            yield value


def _is_known(cls: type) -> bool:
    """Tell whether plans are made for values of a class: numbers, and tensors of torch's own."""
    if cls in _PLAIN:
        return True
    if not (
        issubclass(cls, Tensor)
        and cls.__torch_function__ is torch._C._disabled_torch_function_impl
        and cls.__torch_dispatch__ is Tensor.__torch_dispatch__
    ):
        return False
    _PLAIN.add(cls)
    return True
