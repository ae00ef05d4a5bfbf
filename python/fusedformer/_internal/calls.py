"""Record calls of public functions whose result has a gradient, as calls of one op.

Such a call is checks, choices and one registered op, which is a node of autograd. The second of a
kind goes to that node directly, whose forward and backward are plans of their launches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from fusedformer_kernels.runtime.plan import Plan
from fusedformer_kernels.runtime.recording import Recorder
from fusedformer_kernels.runtime.steps import recording
from fusedformer_kernels.runtime.written import Written, sequence


class Call(NamedTuple):
    """Does what a call of one kind does; kept where a plan is where there is no gradient."""

    run: Callable[[tuple[Tensor, ...], tuple[int, ...]], Any]


class Forward:
    """Is the forward of an op in calls of one kind."""

    def __init__(self) -> None:
        self.plan: Plan | None = None
        self._is_recorded = False

    def run(
        self,
        implementation: Callable[..., Any],
        inputs: tuple[Any, ...],
        tensors: tuple[Tensor, ...],
        pointers: tuple[int, ...],
    ) -> Any:
        """Return what ``implementation`` returns of ``inputs``, whose tensors are ``tensors``."""
        if self.plan is not None:
            return self.plan.run(tensors, pointers)
        if self._is_recorded:
            return implementation(*inputs)
        recorder = Recorder(list(tensors))
        output = recorder.watch(implementation, inputs, {})
        self.plan, self._is_recorded = recorder.plan(output), True
        return output


class CallRecorder:
    """Notes what one call of a public function on ``tensors`` does."""

    def __init__(self, tensors: tuple[Tensor, ...]) -> None:
        self.failed = False
        self._names = {id(tensor): f"t{index}" for index, tensor in enumerate(tensors)}
        self._alive = list(tensors)  # so that no id is given twice
        self._text = Written("tensors, pointers")
        self._text.unpack("t", len(tensors), "tensors")
        self._found: Any = None  # what the op has returned

    def watch(
        self, function: Callable[..., Any], args: tuple[Any, ...], named: dict[str, Any]
    ) -> Any:
        """Return what ``function`` returns, and record the call."""
        with recording(self):
            return function(*args, **named)

    def launched(self, *_: Any) -> None:
        """Give up: something besides one op launches a kernel."""
        self.failed = True

    def called(self, function: Callable[..., Tensor], args: tuple[Any, ...], found: Tensor) -> None:
        """Note a call of a step that gave ``found``."""
        text, name = self._text, f"t{len(self._alive)}"
        text.line(f"{name} = {text.value(function)}({', '.join(map(self._value, args))})")
        text.line(f"tensors = *tensors, {name}")
        text.line(f"pointers = *pointers, {name}.data_ptr()")
        self._names[id(found)] = name
        self._alive.append(found)

    def differentiated(self, apply: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """Call an op by its node of autograd, and note it."""
        given = [self._value(value) for value in args]
        self.failed = self.failed or self._found is not None
        call = None
        if not self.failed:
            pointers = tuple([tensor.data_ptr() for tensor in self._alive])
            call = Forward(), tuple(self._alive), pointers
            text = self._text
            given.append(f"({text.value(call[0])}, tensors, pointers)")
            text.line(f"found = {text.value(apply)}({', '.join(given)})")
        with recording(None):
            self._found = apply(*args, call)
        return self._found

    def plan(self, result: Any) -> Call | None:
        """Return how to make another call of this kind; None if that takes more than its op."""
        returned = self._returned(result)
        if self.failed or self._found is None:
            return None
        self._text.line(f"return {returned}")
        call = Call(self._text.function())
        self._alive.clear()
        self._found = None
        return call

    def _returned(self, result: Any) -> str:
        """Return the text of a result: what the op has returned, or some of it."""
        if result is None:
            return "None"
        if result is self._found:
            return "found"
        if isinstance(self._found, tuple):
            for index, one in enumerate(self._found):
                if one is result:
                    return f"found[{index}]"
        if type(result) is tuple:
            return sequence([self._returned(one) for one in result])
        self.failed = True
        return ""

    def _value(self, value: Any) -> str:
        """Return the text of an argument; tensors are arguments of the call, or steps gave them."""
        if isinstance(value, Tensor):
            self.failed = self.failed or id(value) not in self._names
            return self._names.get(id(value), "")
        if isinstance(value, list):
            return f"[{', '.join(map(self._value, value))}]"
        return "None" if value is None else self._text.value(value)
