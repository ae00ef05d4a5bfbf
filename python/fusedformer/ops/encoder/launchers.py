"""The launchers of a layer, imported when they are first needed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedformer.ops.attention.terms import OF_HEADS_ALONE, AttentionTerms


class Launchers(NamedTuple):
    """Those of one way to the kernels."""

    attention: Callable[..., Any]
    attention_backward: Callable[..., Any]
    norm: Callable[..., Any]
    norm_backward: Callable[..., Any]
    activation: Callable[..., Any]
    activation_backward: Callable[..., Any]
    gated: Callable[..., Any]
    gated_backward: Callable[..., Any]
    rotary: Callable[..., Any]
    rotary_backward: Callable[..., Any]


@functools.cache
def launchers() -> Launchers:
    """Return the launchers themselves."""
    from fusedformer_kernels.attention.self_attention import (
        self_attention_backward,
        self_attention_forward,
    )
    from fusedformer_kernels.rows.activation import (
        bias_activation_backward,
        bias_activation_forward,
    )
    from fusedformer_kernels.rows.gated import gated_activation_backward, gated_activation_forward
    from fusedformer_kernels.rows.norm import norm_forward
    from fusedformer_kernels.rows.norm_backward import norm_backward
    from fusedformer_kernels.rows.rotary import rotary_backward, rotary_forward

    return Launchers(
        self_attention_forward,
        self_attention_backward,
        norm_forward,
        norm_backward,
        bias_activation_forward,
        bias_activation_backward,
        gated_activation_forward,
        gated_activation_backward,
        rotary_forward,
        rotary_backward,
    )


def by_dispatcher() -> Launchers:
    """Return what calls the kernels for each of a batch of gradients, by the dispatcher."""
    from fusedformer.ops import activation, gated, norm, rotary
    from fusedformer.ops.attention import registered

    def attention_backward(
        grad: Tensor,
        projected: tuple[Tensor, ...],
        merged: Tensor,
        statistics: Tensor,
        batch: int,
        heads: int,
        terms: AttentionTerms,
    ) -> tuple[Tensor, ...]:
        dim = merged.shape[1] // heads
        output, output_grad = (
            t.reshape(batch, -1, heads, dim).transpose(1, 2) for t in (merged, grad)
        )
        if len(projected) == 1:
            qkv = projected[0].view(batch, -1, 3, heads, dim)
            found = registered.self_attention_backward(output_grad, qkv, output, statistics, *terms)
            return (found.reshape(projected[0].shape),)
        parts = projected
        if len(projected) == 2:  # keys and values are one product's
            parts = projected[0], *projected[1].chunk(2, -1)
        views = (rows.view(batch, -1, heads, dim).transpose(1, 2) for rows in parts)
        grads = registered.attention_backward(
            output_grad, None, *views, output, statistics, OF_HEADS_ALONE, *terms
        )
        found = [
            g.transpose(1, 2).reshape(rows.shape) for g, rows in zip(grads, parts, strict=False)
        ]
        return tuple(found) if len(projected) == 3 else (found[0], torch.cat(found[1:], -1))

    def rotary_backward(*args: Any) -> Any:
        tensors, (weights, name, eps, interleaved, needs_weights, *in_place) = args[:7], args[7:]
        found = rotary._rotary_backward(*tensors, *weights, name, eps, interleaved, needs_weights)
        if in_place:
            for grad, turned in zip(tensors, found[:2], strict=False):
                grad.copy_(turned)
        return found

    return launchers()._replace(
        attention_backward=attention_backward,
        norm_backward=norm._norm_backward,
        activation=activation._bias_activation,
        activation_backward=activation._bias_activation_backward,
        gated=gated._gated_activation,
        gated_backward=gated._gated_activation_backward,
        rotary_backward=rotary_backward,
    )
