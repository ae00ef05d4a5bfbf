"""List cases of the norms, and of the sums that are fused with them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedformer import functional, reference
from fusedformer.parity.cases.case import Case, Op, normal
from fusedformer.parity.criterion import Function


def _stock_dropout_add(
    input: Tensor, residual: Tensor, *, input_bias: Tensor | None = None
) -> Tensor:
    return (input if input_bias is None else input + input_bias) + residual


def _stock_added_norm(norm: Function) -> Function:
    def stock(
        input: Tensor,
        residual: Tensor,
        normalized_shape: tuple[int, ...],
        *args: Any,
        input_bias: Tensor | None = None,
        return_sum: bool = False,
        **settings: Any,
    ) -> Any:
        total = _stock_dropout_add(input, residual, input_bias=input_bias)
        normed = norm(total, normalized_shape, *args, **settings)
        return (normed, total) if return_sum else normed

    return stock


def _true_added_norm(function: Function) -> Function:
    """Drop the sum, which the definition always returns, unless it is asked for."""

    def truth(*args: Any, return_sum: bool = False, **settings: Any) -> Any:
        both = function(*args, **settings)
        return both if return_sum else both[0]

    return truth


def _stock_scale_add(
    input: Tensor, residual: Tensor, scale: Tensor, sample_scale: Tensor, *, input_bias: Tensor
) -> Tensor:
    return (input + input_bias) * scale * sample_scale[:, None, None] + residual


def _for_drawn_samples(function: Function) -> Function:
    """Give the factors of samples, which are drawn and not learned."""

    def call(input: Tensor, **others: Any) -> Any:
        samples = torch.arange(input.shape[0], device=input.device) % 2 * 1.25
        return function(input, sample_scale=samples.to(input.dtype), **others)

    return call


def norm_cases() -> Iterator[Case]:
    for name, biased in (("layer_norm", True), ("rms_norm", False)):
        op = Op(name, getattr(functional, name), getattr(F, name), getattr(reference, name))
        for case, rows, width, quick in (
            ("width of MiniLM", 9, 384, True),
            ("prime width", 6, 131, False),
            ("one past a tile", 3, 1025, False),
        ):
            affine = {"weight": (width,), **({"bias": (width,)} if biased else {})}
            tensors = normal(input=(rows, width), **affine)
            yield Case(op, case, tensors, {"normalized_shape": (width,)}, quick)
        plain = {"normalized_shape": (3, 20), "eps": 1e-3}
        yield Case(op, "two dimensions, no weight", normal(input=(4, 3, 20)), plain)

        fused = f"dropout_add_{name}"
        op = Op(
            fused,
            getattr(functional, fused),
            _stock_added_norm(getattr(F, name)),
            _true_added_norm(getattr(reference, fused)),
        )
        settings: dict[str, Any] = {"normalized_shape": (96,)}
        affine = {"weight": (96,), **({"bias": (96,)} if biased else {})}
        both = {"input": (2, 7, 96), "residual": (2, 7, 96)}
        yield Case(
            op,
            "bias and residual",
            normal(**both, input_bias=(96,), **affine),
            settings,
            quick=True,
        )
        yield Case(op, "sum returned", normal(**both, **affine), {**settings, "return_sum": True})
    op = Op("dropout_add", functional.dropout_add, _stock_dropout_add, reference.dropout_add)
    shapes = normal(input=(5, 77), residual=(5, 77), input_bias=(77,))
    yield Case(op, "bias and residual", shapes, quick=True)
    functions = functional.dropout_scale_add, _stock_scale_add, reference.dropout_scale_add
    op = Op("dropout_scale_add", *map(_for_drawn_samples, functions))
    shapes = normal(input=(3, 5, 77), residual=(3, 5, 77), scale=(77,), input_bias=(77,))
    yield Case(op, "columns and samples", shapes, quick=True)
