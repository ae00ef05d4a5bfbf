"""Define what a case is: an op, its inputs and its settings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Generator, Tensor

from fusedformer.parity.criterion import Function


@dataclass(frozen=True)
class Op:
    """An op as three functions; each takes the tensors and settings of a case by name."""

    name: str
    candidate: Function
    stock: Function
    truth: Function


@dataclass(frozen=True)
class Case:
    """One call of an op.

    Attributes:
        op: what is called.
        name: the regime that this case stands for.
        make: from a generator the tensors by argument name: float32, cast to the dtype under
            test and given a gradient; or boolean or integer, passed as they are.
        settings: further keyword arguments.
        quick: whether ``--quick`` keeps it.
    """

    op: Op
    name: str
    make: Callable[[Generator], dict[str, Tensor]]
    settings: dict[str, Any] = field(default_factory=dict)
    quick: bool = False


def normal(**sizes: tuple[int, ...]) -> Callable[[Generator], dict[str, Tensor]]:
    """Return a function that draws normal random tensors of these shapes, as ``Case.make``."""

    def make(generator: Generator) -> dict[str, Tensor]:
        return {name: torch.randn(shape, generator=generator) for name, shape in sizes.items()}

    return make
