"""Layers of WavLM, whose biases by distance are gated by what each head of a token reads.

The first layer has the table of biases by distance, which it hands on to the next layers. Each
gates them anew, within its attention. A layer's own forward hands on ``[batch * heads, length,
length]`` in their place.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusedformer.fusion._biases import dense_biases
from fusedformer.fusion._forms import Parts, is_table
from fusedformer.fusion._layers import Call, FusedLayer
from fusedformer.nn.children import is_plain


class GatedBiasLayer(FusedLayer):
    """A base of layers that gate the biases of their attention."""

    def _attends(
        self: Any, parts: Parts, call: Call, source: Tensor, fork: bool
    ) -> tuple[Tensor, Tensor]:
        gate, biases = _gate(parts.attention, source), call.others["position_bias"]
        others = {**call.others, "relative_bias_gate": gate}
        if biases.dim() == 3:  # by a layer's own forward
            biases = gate[..., None] * biases.view(*gate.shape[:2], *biases.shape[1:])
            others = {"position_bias": biases}
        keys = None if call.mask is None else call.mask == 1
        return super()._attends(parts, call._replace(mask=keys, others=others), source, fork)

    @classmethod
    def are_plain(cls, parts: Parts) -> bool:
        """Return whether the fused steps do exactly what calling the children would do."""
        return (
            super().are_plain(parts)
            and is_plain(parts.attention.gru_rel_pos_linear, nn.Linear)
            and (parts.buckets is None or is_table(parts.buckets))
        )

    def _own(self: Any, given: dict[str, Any]) -> Any:
        biases, (batch, length, _) = given.get("position_bias"), given["hidden_states"].shape
        if biases is not None and biases.dim() == 2:  # of a layer before
            biases = dense_biases(biases, length)[0].repeat(batch, 1, 1)
            given = {**given, "position_bias": biases}
        return super()._own(given)

    def _returned(self, found: Tensor, call: Call) -> Any:
        return found, call.others["position_bias"]

    def _one_node(self, parts: Parts, call: Call) -> Tensor | None:
        return None

    @classmethod
    def calls_children(cls) -> bool:
        """Return False: the layer's own forward reads the weights of its products."""
        return False


def _gate(attention: Any, x: Tensor) -> Tensor:
    """Return the factors ``[batch, heads, length]`` on the biases of each query."""
    product = attention.gru_rel_pos_linear
    weight = product.weight.view(2, 4, -1).sum(1)  # four results of each gate are summed
    bias = None if product.bias is None else product.bias.view(2, 4).sum(1)
    heads = x.view(*x.shape[:2], attention.num_heads, -1)
    first, second = torch.sigmoid(F.linear(heads, weight, bias)).unbind(-1)
    gate: Tensor = first * (second * attention.gru_rel_pos_const.flatten() - 1.0) + 2.0
    return gate.transpose(1, 2).contiguous()  # as kernels read it fastest
