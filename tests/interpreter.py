"""Triton's interpreter without the work it throws away: more than half of the suite's time."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import math
from collections.abc import Iterator
from typing import Any
from unittest import mock


@contextlib.contextmanager
def thrifty_interpreter() -> Iterator[None]:
    """Kernels interpreted inside compute the same, sooner.

    - A launch puts interpreted functions in the place of those of ``triton.language`` until it
      ends. Each call of one device function by another does so again, though what it replaces
      depends on nothing but the function's module: here, once for each module in a launch.
    - Integer arithmetic is repeated in int64 to see whether it overflows, but what comes out is
      looked at in debug mode alone: here, not otherwise.
    - What follows from a type or a shape is made anew for each value: here, once (``_remembered``).
    """
    from triton.runtime import interpreter

    replace, options = interpreter._patch_lang, interpreter.interpreter_builder.options
    replaced: set[str] = set()

    class Scope:
        """What a launch restores when it ends; that of a call within it never is."""

        def __init__(self, scope: Any) -> None:
            self.scope = scope

        def restore(self) -> None:
            replaced.clear()
            self.scope.restore()

    def replace_once(function: Any) -> Scope | None:
        if function.__module__ in replaced:
            return None
        replaced.add(function.__module__)
        return Scope(replace(function))

    interpreter._patch_lang = replace_once
    interpreter.interpreter_builder.options = dataclasses.replace(
        options, sanitize_overflow=options.debug
    )
    try:
        with _remembered():
            yield
    finally:
        interpreter._patch_lang = replace
        interpreter.interpreter_builder.options = options


@contextlib.contextmanager
def _remembered() -> Iterator[None]:
    """Types and shapes of values, and the names that a launch replaces, are found out once."""
    from triton.language import core
    from triton.runtime import interpreter

    make_block = core.block_type.__init__
    blocks: dict[tuple[str, tuple[int, ...]], dict[str, Any]] = {}

    def init_block(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = tuple(one.value if type(one) is core.constexpr else one for one in shape)
        found = blocks.get((element_ty.name, sizes))
        if found is None:
            make_block(self, element_ty, list(sizes))
            blocks[element_ty.name, sizes] = dict(self.__dict__)
        else:
            self.__dict__.update(found, element_ty=element_ty)

    @functools.cache
    def of_tensor(shape: tuple[int, ...]) -> tuple[Any, Any]:
        return core.tuple([core.constexpr(s) for s in shape]), core.constexpr(math.prod(shape))

    def init_tensor(self: Any, handle: Any, type: Any) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = of_tensor(tuple(type.shape) if type.is_block() else ())

    numpy_dtype = interpreter._get_np_dtype

    @functools.cache
    def of_scalar(dtype: Any) -> Any:
        return numpy_dtype(dtype)

    pointer = numpy_dtype(core.pointer_type(core.int8))

    def numpy_dtype_of(dtype: Any) -> Any:
        scalar = dtype.scalar
        return pointer if scalar.is_ptr() else of_scalar(scalar)

    @functools.cache
    def names(package: Any) -> list[str]:
        return [name for name, one in inspect.getmembers(package) if core.is_builtin(one)]

    def replace_builtins(package: Any, builder: Any, scope: Any) -> None:
        for name in names(package):
            member = getattr(package, name)
            if core.is_builtin(member):  # it is not replaced by then
                interpreter._patch_attr(package, name, member, builder, scope)

    unwrap = core._unwrap_if_constexpr

    def unwrapped(value: Any) -> Any:
        if type(value) is core.constexpr:
            return value.value
        return unwrap(value) if isinstance(value, (list, tuple, core.tuple)) else value

    def same_type(self: Any, other: Any) -> bool:
        if self is other:
            return True
        other = unwrapped(other)
        return isinstance(other, core.dtype) and self.name == other.name

    with (
        mock.patch.object(core, "_unwrap_if_constexpr", unwrapped),
        mock.patch.object(core.dtype, "__eq__", same_type),
        mock.patch.object(core.block_type, "__init__", init_block),
        mock.patch.object(core.tensor, "__init__", init_tensor),
        mock.patch.object(interpreter, "_get_np_dtype", numpy_dtype_of),
        mock.patch.object(interpreter, "_patch_builtin", replace_builtins),
    ):
        yield
