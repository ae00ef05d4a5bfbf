"""Layers in inference by ATen, where nobody looks on: their steps without choices between them.

A short text takes as long to choose each step as to compute it. So it is chosen once for a layer:
no gradient, no tracer, no transform, no autocast, no dropout, and a form that only adds and norms.
The calls are those that ``_layers.py`` comes to in that case, with the same bits. Of many rows,
C++ computes what follows attention without rounding between.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from fusedformer._internal.backend import chosen_backend
from fusedformer._internal.tracing import is_eager
from fusedformer.functional.steps import (
    Block,
    add_norm_aten,
    block_compiled,
    enough_rows,
    norm_aten,
    product,
    product_activation,
    projections_compiled,
)
from fusedformer.fusion._activations import activation_name
from fusedformer.fusion._forms import Form, Parts, probability
from fusedformer.fusion._rotary import turned
from fusedformer.nn.children import weights_and_biases

# What a form has besides products, two norms, an activation and two sums.
_MORE = (
    "gate", "out_norm", "block_norm", "query_norm", "key_norm", "value_norm", "buckets", "scale1",
    "scale2", "depth", "divisor", "logit_scale", "position_bias", "adapter", "own",
    "block",
)  # fmt: skip
_FLAGS = "is_gated", "gates_bias", "is_windowed", "is_divided", "parallel"


def only_adds_and_norms(form: Form) -> bool:
    """Return whether layers of a form may be computed here."""
    has_more = any(getattr(form, name) is not None for name in _MORE)
    return not has_more and not any(getattr(form, name) for name in _FLAGS)


def is_unseen(x: Tensor) -> bool:
    """Return whether ATen computes on ``x``, without gradients, and nobody looks on."""
    return (
        not torch.is_grad_enabled()
        and type(x) in (Tensor, Parameter)
        and is_eager()
        and not torch._C._is_any_autocast_enabled()
        and chosen_backend(x) == "torch"
    )


def inferred(layer: Any, parts: Parts, call: Any) -> Tensor | None:
    """Compute a layer of a form that :func:`only_adds_and_norms` on what :func:`is_unseen`.

    None where a dropout drops, or a norm or an activation is not one of torch's.
    """
    norm1, norm2, name = parts.norm1, parts.norm2, activation_name(parts.activation)
    if (
        name is None
        or not isinstance(norm1, nn.LayerNorm)
        or not isinstance(norm2, nn.LayerNorm)
        or probability(parts.dropout1, layer)
        or probability(parts.hidden_dropout, layer)
        or probability(parts.dropout2, layer)
    ):
        return None
    x, norms_first = call.x, layer._form.puts_norms_first(layer)
    heads = _heads(layer, parts, call, _normed(x, norm1) if norms_first else x)
    if enough_rows(x):
        found = block_compiled(heads, x, _block_of(parts, name, norms_first))
        if found is not None:
            return found
    inner = product(heads, *weights_and_biases(parts.out))
    del heads  # memory that the next product may take
    if norms_first:
        source, x = _added_and_normed(inner, x, norm2, return_sum=True)
    else:
        source = _added_and_normed(inner, x, norm1)
    del inner
    inner = _between(parts, name, source)
    last: Tensor = inner + x if norms_first else _added_and_normed(inner, source, norm2)
    return last


def _heads(layer: Any, parts: Parts, call: Any, source: Tensor) -> Tensor:
    """Attend; query, key and value end before the next product begins."""
    products = [
        weights_and_biases(one) for one in (parts.query, parts.key, parts.value) if one is not None
    ]
    found = projections_compiled(source, products) if enough_rows(source) else None
    if found is None:
        found = [product(source, *one) for one in products]
    q, k, v = layer._split(parts, found, getattr(parts.attention, layer._form.head_dim))
    q, k = turned(layer._form, parts, q, k, call.rotary, call.others)
    heads: Tensor = layer._attended(parts, call, q, k, v)
    return heads


def _block_of(parts: Parts, name: str, norms_first: bool) -> Block:
    middle, end = (parts.norm2, None) if norms_first else (parts.norm1, parts.norm2)
    return Block(
        weights_and_biases(parts.out), weights_and_biases(middle), middle.eps,
        weights_and_biases(parts.linear1), weights_and_biases(parts.linear2),
        (None, None) if end is None else weights_and_biases(end),
        0.0 if end is None else end.eps,
        name, norms_first,
    )  # fmt: skip


def _between(parts: Parts, name: str, source: Tensor) -> Tensor:
    """Compute both products; what is between them ends with the second."""
    weight, bias = weights_and_biases(parts.linear1)
    hidden = product_activation(source, weight, bias, name)
    return product(hidden, *weights_and_biases(parts.linear2))


def _normed(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    weight, bias = weights_and_biases(norm)
    return norm_aten("layer", x, norm.normalized_shape, weight, bias, norm.eps, None)


def _added_and_normed(
    x: Tensor, residual: Tensor, norm: nn.LayerNorm, *, return_sum: bool = False
) -> Any:
    weight, bias = weights_and_biases(norm)
    return add_norm_aten(
        "layer", x, residual, norm.normalized_shape, weight, bias, norm.eps, None,
        input_bias=None, p=0.0, return_sum=return_sum,
    )  # fmt: skip
