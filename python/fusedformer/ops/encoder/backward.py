"""The backward of an encoder layer, from the gradient of its output to those that are asked for."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedformer._internal.tracing import may_be_batched
from fusedformer.ops._shared import common_dtype
from fusedformer.ops.attention.terms import AttentionTerms
from fusedformer.ops.encoder.arguments import EncoderParameters, EncoderSettings, Kept, Needs
from fusedformer.ops.encoder.forward import projections
from fusedformer.ops.encoder.launchers import Launchers, by_dispatcher, launchers
from fusedformer.ops.encoder.steps import bias_gradient, in_dtype, input_gradient, weight_gradient

_NAMES = "in", "key", "value"


def backward(
    grad: Tensor,
    sum_grad: Tensor | None,
    kept: Kept,
    own: EncoderParameters,
    how: EncoderSettings,
    terms: AttentionTerms,
    batch: int,
    needs: Needs,
) -> tuple[Tensor | None, ...]:
    """Compute the gradients of ``x``, ``residual`` and the parameters; None where not asked for."""
    run, opened = by_dispatcher() if may_be_batched() else launchers(), how.last_eps is None
    found: dict[str, Tensor | None] = dict.fromkeys(Needs._fields)
    needs_heads = needs.x or any(needs[2:8])
    needs_sum1 = (
        needs_heads
        or needs.residual
        or needs.out_weight
        or needs.out_bias
        or needs.middle_weight
        or needs.middle_bias
    )
    block_grad, through = grad, None
    if not opened:
        through, found["last_weight"], found["last_bias"], found["bias2"], block_grad = (
            _norm_gradients(
                run, grad, None, kept.sum2, kept.mean2, kept.rstd2, own.last_weight, own.last_bias,
                own.bias2, kept.seed2, how.last_p, needs.last_weight, needs.last_bias,
                needs.bias2, kept.before.dtype,
            )
        )  # fmt: skip
    if needs.weight2:
        hidden = kept.hidden
        if hidden is None:
            hidden = run.activation(
                kept.before, own.bias1, kept.hidden_seed, how.hidden_p, how.activation
            )
        found["weight2"] = weight_gradient(block_grad, hidden)
    if not (needs_sum1 or needs.weight1 or needs.bias1):
        return tuple(found.values())
    before_grad, found["bias1"] = run.activation_backward(
        input_gradient(block_grad, own.weight2, None),
        kept.before,
        own.bias1,
        kept.hidden_seed,
        how.hidden_p,
        how.activation,
        needs.bias1,
    )
    if not needs.bias1:
        found["bias1"] = None
    if needs.weight1 and kept.middle is not None:
        found["weight1"] = weight_gradient(before_grad, kept.middle)
    if not needs_sum1:
        return tuple(found.values())
    residual_grad, found["middle_weight"], found["middle_bias"], found["out_bias"], inner_grad = (
        _norm_gradients(
            run, input_gradient(before_grad, own.weight1, through), sum_grad, kept.sum1, kept.mean1,
            kept.rstd1, own.middle_weight, own.middle_bias, own.out_bias, kept.seed1,
            how.middle_p, needs.middle_weight, needs.middle_bias, needs.out_bias,
            kept.projected.dtype,
        )
    )  # fmt: skip
    if needs.residual:
        found["residual"] = residual_grad
    if needs.out_weight:
        found["out_weight"] = weight_gradient(inner_grad, kept.merged)
    if not needs_heads:
        return tuple(found.values())
    projected: tuple[Tensor, ...] = (kept.projected,)
    if kept.key is not None and kept.value is not None:
        projected = kept.projected, kept.key, kept.value
    grads = run.attention_backward(
        input_gradient(inner_grad, own.out_weight, None),
        projected,
        kept.merged,
        kept.statistics,
        batch,
        how.heads,
        terms._replace(seed=kept.seed),
    )
    x_grad = None if opened else residual_grad
    # The last first: what comes by the residual goes from one product to the one before.
    for name, (weight, _), grad in reversed(
        list(zip(_NAMES, projections(own), grads, strict=False))
    ):
        if getattr(needs, f"{name}_weight") and kept.source is not None:
            found[f"{name}_weight"] = weight_gradient(grad, kept.source)
        if getattr(needs, f"{name}_bias"):
            found[f"{name}_bias"] = bias_gradient(grad)
        if needs.x:
            x_grad = input_gradient(grad, weight, x_grad)
    if needs.x:
        found["x"] = x_grad
    return tuple(found.values())


def _norm_gradients(
    run: Launchers,
    grad: Tensor,
    sum_grad: Tensor | None,
    total: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    input_bias: Tensor | None,
    seed: Tensor | None,
    p: float,
    needs_weight: bool,
    needs_bias: bool,
    needs_input_bias: bool,
    input_dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor]:
    """Compute the gradients of residual, weight, bias, what is added to the input, and input."""
    parameters = weight, bias, input_bias
    dtype = common_dtype([None if t is None else t.dtype for t in parameters])
    needs = needs_weight, needs_bias, needs_input_bias
    residual_grad, input_grad, *grads = run.norm_backward(
        grad, sum_grad, total, mean, rstd, weight, seed, p, "layer", 1, *needs, input_dtype, dtype
    )
    # By the dispatcher, what is left out is an empty tensor.
    differs = seed is not None or input_dtype != residual_grad.dtype
    found = [
        in_dtype(t.dtype, g) if need and t is not None else None
        for g, t, need in zip(grads, parameters, needs, strict=True)
    ]
    return residual_grad, found[0], found[1], found[2], input_grad if differs else residual_grad
