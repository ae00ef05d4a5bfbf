"""A suite is a list of cases and, for each case, the providers that compute it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from harness.counting import Costs

Inputs = dict[str, Any]  # names to tensors; passed to programs as keyword arguments
Part = Callable[[Tensor], Tensor]

REFERENCE = "torch eager"  # the provider whose error is the yardstick, and whose float64 the truth


class Unsupported(Exception):
    """Raised by a provider that cannot compute a case; its message is recorded as the reason."""


class NotApplicable(Unsupported):
    """Raised by a provider that is there for other cases alone: nothing is recorded."""


def whole(tensor: Tensor) -> Tensor:
    """Take all of a tensor to compare it with the truth."""
    return tensor


@dataclass(frozen=True)
class Sizes:
    """How large the cases are: those of the goals on a GPU, smaller on CPU, tiny for a dry run."""

    name: str
    elements: int  # of a softmax input
    tokens: int  # of everything else

    @staticmethod
    def of(name: str) -> Sizes:
        """Look up ``"full"``, ``"cpu"`` or ``"tiny"``."""
        return {
            "full": Sizes("full", 2**25, 2**14),
            "cpu": Sizes("cpu", 2**20, 2**9),
            "tiny": Sizes("tiny", 2**13, 2**6),
        }[name]


@dataclass(frozen=True)
class Case:
    """One problem: how to make its inputs, what it costs, how it is checked.

    ``make(device)`` draws the inputs from torch's generator; those that require a gradient get one
    in the backward. ``part`` picks of each input, output and gradient what is compared with the
    truth, where all of it would not fit (attention: some heads of one sequence). ``before`` are
    checks that the parity criterion cannot make, such as a dropout's. ``tokens`` are the real ones
    of a call, where their rate is what is asked for.
    """

    suite: str
    name: str
    dtype: torch.dtype
    make: Callable[[torch.device], Inputs]
    costs: Costs
    options: dict[str, Any] = field(default_factory=dict)
    headline: bool = False
    part: Part = whole
    before: Callable[[Program, Inputs], None] | None = None
    tokens: int | None = None


@dataclass(frozen=True)
class Layout:
    """How a provider holds tensors that the case gives in another form: padded, materialized.

    Both functions take a name, that of an input or ``"output"``, and a tensor. ``own`` turns the
    case's form into the provider's, before the clock starts; ``back`` outputs and gradients into
    the case's, for the comparison.
    """

    own: Callable[[str, Tensor], Tensor]
    back: Callable[[str, Tensor], Tensor]


@dataclass
class Program:
    """One provider's way to compute a case: a function of the inputs, or a module with parameters.

    ``checked`` is the function that the parity criterion sees, where that must differ from what is
    timed (without dropout); the same code path otherwise. The methods take inputs in the program's
    own form, which ``own`` makes.
    """

    function: Callable[..., Any]
    module: torch.nn.Module | None = None
    optimizer: torch.optim.Optimizer | None = None
    checked: Callable[..., Any] | None = None
    layout: Layout | None = None
    merged: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None  # see ``gradients``

    def gradients(self, found: dict[str, Tensor]) -> dict[str, Tensor]:
        """Name the gradients of ``leaves`` as the reference does, in the same pieces."""
        return found if self.merged is None else self.merged(found)

    def own(self, inputs: Inputs) -> Inputs:
        """Bring the case's inputs into the form that this program takes; leaves where those are."""
        if self.layout is None:
            return inputs
        return {
            name: self.layout.own(name, value.detach()).requires_grad_(value.requires_grad)
            for name, value in inputs.items()
        }

    def back(self, name: str, tensor: Tensor) -> Tensor:
        """Bring an output or a gradient back into the case's form."""
        return tensor if self.layout is None else self.layout.back(name, tensor)

    def outputs(self, inputs: Inputs, function: Callable[..., Any] | None = None) -> list[Tensor]:
        """Compute the outputs, as a list."""
        found = (function or self.function)(**inputs)
        return [found] if isinstance(found, Tensor) else list(found)

    def leaves(self, inputs: Inputs) -> dict[str, Tensor]:
        """Name what gets a gradient: inputs that require one, and the module's parameters."""
        named = {
            name: value
            for name, value in inputs.items()
            if isinstance(value, Tensor) and value.requires_grad
        }
        if self.module is not None:
            named |= dict(self.module.named_parameters())
        return named

    def call(self, direction: str, inputs: Inputs, grads: Sequence[Tensor]) -> Callable[[], object]:
        """Make the zero-argument call that is timed for ``direction``."""
        if self.module is not None:
            self.module.train(direction == "step")
        leaves = list(self.leaves(inputs).values())

        def forward() -> object:
            with torch.no_grad():
                return self.outputs(inputs)

        def both() -> object:
            return torch.autograd.grad(self.outputs(inputs), leaves, grads)

        def step() -> None:
            assert self.optimizer is not None, "only a module with an optimizer takes steps"
            torch.autograd.backward(self.outputs(inputs), grads)
            self.optimizer.step()
            self.optimizer.zero_grad()

        if direction == "backward":
            outputs = self.outputs(inputs)
            return lambda: torch.autograd.grad(outputs, leaves, grads, retain_graph=True)
        return {"forward": forward, "both": both, "step": step}[direction]


# A provider builds its program for a case, or raises Unsupported.
Provider = Callable[[Case], Program]


@dataclass(frozen=True)
class Suite:
    """``cases(sizes, dtype)``, and the providers in the order in which tables show them.

    ``clock`` says what is timed: ``"device"``, how long the device takes; ``"host"``, what a call
    costs the host, whatever the device then does; ``"latency"``, from the call until the device is
    idle.
    """

    name: str
    cases: Callable[[Sizes, torch.dtype], list[Case]]
    providers: Callable[[torch.device, str], dict[str, Provider]]
    truth: Callable[[Case, torch.device], Program]  # given its inputs in float64
    clock: Literal["device", "host", "latency"] = "device"
