"""A layer as one node of autograd, where all its steps are among those that the node has."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fusedformer.functional.steps import (
    EncoderParameters,
    EncoderSettings,
    encoder_layer,
    encoder_layer_is_one_node,
)
from fusedformer.fusion._activations import activation_name
from fusedformer.fusion._forms import Parts, probability
from fusedformer.fusion._norms import epsilon, gain, is_rms
from fusedformer.fusion._rotary import turns
from fusedformer.fusion._terms import terms_of_call
from fusedformer.nn.children import weights_and_biases

if TYPE_CHECKING:
    from fusedformer.fusion._layers import Call, FusedLayer


def one_node(layer: FusedLayer, parts: Parts, call: Call) -> Tensor | None:
    """Compute the steps as one node of autograd; return None where that cannot be."""
    form, module, x = layer._form, parts.attention, call.x
    dim, name = getattr(module, form.head_dim), activation_name(parts.activation)
    tables: tuple[Any, ...] = call.rotary or (None, None)
    tables = tuple(one if one is None or one.dim() == 3 else one[None] for one in tables)
    if (
        name is None
        or parts.block is not None
        or not _has_steps(layer, parts)
        or not encoder_layer_is_one_node(x, None, dim)
        or any(one is not None and (type(one) is not Tensor or one.requires_grad)
               for one in tables)
    ):  # fmt: skip
        return None
    terms = terms_of_call(
        module,
        x,
        call.mask,
        layer._settings(module, call.others),
        head_dim=dim,
        dropout=form.weights_dropout(parts),
    )
    if terms is None:
        return None
    norms_first = layer._form.puts_norms_first(layer)
    has_first = norms_first and not isinstance(parts.norm1, nn.Identity)
    middle, last = (parts.norm2, None) if norms_first else (parts.norm1, parts.norm2)
    settings = EncoderSettings(
        heads=parts.out.weight.shape[1] // dim,
        activation=name,
        middle_eps=epsilon(middle),
        last_eps=None if last is None else epsilon(last),
        hidden_p=probability(parts.hidden_dropout, layer),
        middle_p=probability(parts.dropout1, layer),
        last_p=probability(parts.dropout2, layer),
        checkpoint_activation=False,
        first_eps=epsilon(parts.norm1) if has_first else None,
        adds_last=norms_first,
        is_gated=layer._gates(parts),
        norm="rms" if is_rms(middle) else "layer",
    )
    products = weights_and_biases(parts.query, parts.key, parts.value, parts.out)
    first = _gain_and_bias(parts.norm1 if has_first else None)
    others = *weights_and_biases(parts.linear2), *_gain_and_bias(last), *first
    parameters = EncoderParameters._make(
        (*products, *_gain_and_bias(middle), *joint(parts), *others, *tables, *[None] * 6)
    )
    terms = terms._replace(scale=layer._scaling(module))
    found = encoder_layer(x, None, parameters, settings, terms)
    return None if found is None else found[0]


def _has_steps(layer: FusedLayer, parts: Parts) -> bool:
    """Return whether all steps of the form are among those of one node of autograd."""
    kinds = {is_rms(norm) for norm in (parts.norm1, parts.norm2)}
    more = parts.out_norm, parts.block_norm, parts.query_norm, parts.depth
    scales = parts.scale1, parts.scale2
    closing = (parts.norm2,) if layer._form.puts_norms_first(layer) else (parts.norm1, parts.norm2)
    one_product = 3 * parts.out.weight.shape[1], parts.out.weight.shape[0]
    return (
        not layer._form.interleaved
        and layer._form.angles == "twice"
        and not layer._form.goes_by_head(parts.attention)
        and not layer._form.is_parallel(layer)
        and layer._form.query_scale is None
        and turns(layer._form, parts)
        and layer._form.own is None
        and layer._form.adapter is None
        and parts.divisor in (None, 1)
        and len(kinds) == 1
        and not any(isinstance(one, nn.Identity) for one in closing)
        and all(one is None for one in more)
        and not any(isinstance(one, Tensor) or one not in (None, 1) for one in scales)
        and parts.query.weight.shape
        == (one_product if parts.key is None else parts.key.weight.shape)
    )


def _gain_and_bias(norm: Any) -> list[Any]:
    return [gain(norm), None] if is_rms(norm) else weights_and_biases(norm)


def joint(parts: Parts) -> tuple[Tensor, Tensor | None]:
    """Return weight and bias of the block's first product, the activated half first."""
    weight, bias = weights_and_biases(parts.linear1)
    if parts.gate is None:
        return weight, bias
    gate_weight, gate_bias = weights_and_biases(parts.gate)
    both = None if bias is None else torch.cat((gate_bias, bias))
    return torch.cat((gate_weight, weight)), both
