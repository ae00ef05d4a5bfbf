"""List cases of cross entropy, of logits and of a product."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from fusedformer import functional, reference
from fusedformer.parity.cases.case import Case, Op, normal


def _stock_linear_cross_entropy(
    input: Tensor, linear_weight: Tensor, target: Tensor, linear_bias: Tensor, **settings: Any
) -> Tensor:
    return F.cross_entropy(F.linear(input, linear_weight, linear_bias), target, **settings)


def cross_entropy_cases() -> Iterator[Case]:
    def classes(generator: Generator, rows: int, count: int) -> dict[str, Tensor]:
        target = torch.randint(count, (rows,), generator=generator)
        return {"target": target.masked_fill(torch.arange(rows) % 5 == 1, -100)}

    def logits(rows: int, count: int) -> Callable[[Generator], dict[str, Tensor]]:
        tensors = normal(input=(rows, count))
        return lambda generator: {**tensors(generator), **classes(generator, rows, count)}

    def hidden(rows: int, count: int, width: int) -> Callable[[Generator], dict[str, Tensor]]:
        tensors = normal(input=(rows, width), linear_weight=(count, width), linear_bias=(count,))
        return lambda generator: {**tensors(generator), **classes(generator, rows, count)}

    op = Op("cross_entropy", functional.cross_entropy, F.cross_entropy, reference.cross_entropy)
    yield Case(op, "prime row", logits(7, 127), quick=True)
    yield Case(op, "one past a tile", logits(3, 4097), {"reduction": "none"})
    yield Case(op, "label smoothing", logits(9, 50), {"label_smoothing": 0.1})
    name = "linear_cross_entropy"
    op = Op(name, getattr(functional, name), _stock_linear_cross_entropy, getattr(reference, name))
    yield Case(op, "chunks of rows", hidden(150, 70, 16), quick=True)
    yield Case(op, "blocks of classes", hidden(30, 200, 16), {"reduction": "none"}, quick=True)
    yield Case(op, "label smoothing", hidden(11, 90, 24), {"label_smoothing": 0.1})
