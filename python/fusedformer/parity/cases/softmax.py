"""List cases of softmax and log_softmax."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from fusedformer import functional, reference
from fusedformer.parity.cases.case import Case, Op, normal
from fusedformer.parity.criterion import Function


def _stock_scores(input: Tensor, scale: float, mask: Tensor | None, is_causal: bool) -> Tensor:
    scores = input * scale
    if mask is not None:
        keep = mask.dtype == torch.bool
        scores = scores.masked_fill(~mask, -torch.inf) if keep else scores + mask
    if is_causal:
        ones = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device)
        scores = scores.masked_fill(ones.triu(1), -torch.inf)
    return scores


def _stock_softmax(function: Function) -> Function:
    def stock(
        input: Tensor,
        dim: int,
        scale: float = 1.0,
        mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Any:
        return function(_stock_scores(input, scale, mask, is_causal), dim)

    return stock


def softmax_cases() -> Iterator[Case]:
    for name in ("softmax", "log_softmax"):
        op = Op(
            name,
            getattr(functional, name),
            _stock_softmax(getattr(F, name)),
            getattr(reference, name),
        )
        last = {"dim": -1}
        yield Case(op, "prime row", normal(input=(7, 127)), last, quick=True)
        yield Case(op, "one past a tile", normal(input=(3, 1025)), last)
        yield Case(op, "strided dimension", normal(input=(5, 9, 6)), {"dim": 1})
        yield Case(
            op,
            "broadcast additive mask, scaled",
            normal(input=(2, 3, 5, 17), mask=(1, 3, 1, 17)),
            {**last, "scale": 0.3},
        )
        if name == "softmax":  # a masked logarithm is -inf, which has no error to measure
            yield Case(op, "boolean mask", _boolean_mask, last)
            yield Case(op, "causal", normal(input=(2, 19, 19)), {**last, "is_causal": True})


def _boolean_mask(generator: Generator) -> dict[str, Tensor]:
    mask = torch.rand(4, 1, 33, generator=generator) < 0.7
    mask[..., 0] = True
    return {"input": torch.randn(4, 6, 33, generator=generator), "mask": mask}
