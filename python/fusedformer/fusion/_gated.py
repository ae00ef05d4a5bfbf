"""Layers of transformers' ModernBERT: norms first, rotary embedding, gated feed-forward block.

A layer whose children were replaced since or have hooks is computed by its own forward. Attention
and norms are still the library's then.
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

from torch import Tensor, nn

from fusedformer import functional
from fusedformer.functional.steps import (
    EncoderParameters,
    EncoderSettings,
    encoder_layer,
    encoder_layer_is_one_node,
    linear,
    rotated,
)
from fusedformer.fusion._activations import activation_name
from fusedformer.fusion._attention import attention, captured
from fusedformer.fusion._configs import NAMES, named
from fusedformer.fusion._rows import is_untouched
from fusedformer.fusion._terms import terms_of_call
from fusedformer.nn.children import (
    Pending,
    are_plain,
    dropout_probability,
    is_plain,
    project,
    weights_and_biases,
)

_NO_DROPOUT = nn.Dropout(0.0)


class Parts(NamedTuple):
    """Children of a layer; the first norm and the dropouts may be ``nn.Identity``."""

    norm1: Any
    projection: nn.Linear  # of query, key and value
    out: nn.Linear
    dropout1: Any
    norm2: nn.LayerNorm
    linear1: nn.Linear
    activation: Any
    dropout: Any
    linear2: nn.Linear

    def are_plain(self) -> bool:
        """Return whether the fused steps do exactly what calling these children would do."""
        optional = self.norm1, self.dropout1, self.dropout
        norm1, dropout1, dropout = (() if is_plain(m, nn.Identity) else (m,) for m in optional)
        return are_plain(
            (self.projection, self.out, self.linear1, self.linear2),
            (*norm1, self.norm2),
            (*dropout1, *dropout),
        ) and (not isinstance(self.activation, nn.Module) or is_untouched(self.activation))

    def hidden(self, before: Tensor, bias: Tensor | None) -> Tensor:
        """Compute what the block's second product reads; ``bias`` is still to be added."""
        name = activation_name(self.activation)
        if name is None:
            first, gate = (before if bias is None else before + bias).chunk(2, -1)
            own: Tensor = self.dropout(self.activation(first) * gate)
            return own
        dropout = _dropout_of(self.dropout)
        return functional.gated_activation(
            before, bias, name, p=dropout.p, training=dropout.training
        )


class GatedLayer:
    """A base of layers whose forward is a norm, four products and the fused steps between them."""

    FUSED = "fused steps, norms first"

    def forward(
        self: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Compute what the class behind this one computes, by the fused steps if they fit."""
        parts = None if position_embeddings is None else self._parts()
        if parts is None or "attentions" in captured():
            own: Tensor = super().forward(  # type: ignore[misc]
                hidden_states, attention_mask, position_embeddings, **kwargs
            )
            return own
        x, module = hidden_states, self.attn
        assert position_embeddings is not None
        cos, sin = position_embeddings
        found: Tensor | None = self._one_node(parts, x, attention_mask, cos, sin, kwargs)
        if found is not None:
            return found
        is_first = isinstance(parts.norm1, nn.Identity)
        projected, forked = linear(
            parts.norm1(x), parts.projection.weight, parts.projection.bias, fork=is_first
        )
        x = forked if is_first else x
        qkv = projected.view(*x.shape[:-1], 3, -1, module.head_dim)
        query, key = (part.transpose(1, 2) for part in rotated(qkv[:, :, :2], cos, sin).unbind(2))
        heads, _ = attention(
            module,
            query,
            key,
            qkv[:, :, 2].transpose(1, 2),
            attention_mask,
            dropout=module.attention_dropout if module.training else 0.0,
            scaling=module.head_dim**-0.5,
            sliding_window=module.sliding_window,
            **kwargs,
        )
        inner, bias = project(heads.flatten(-2), parts.out)
        pending = Pending(inner, bias, _dropout_of(parts.dropout1), x)
        normed, x = pending.normed_and_sum(parts.norm2)
        before, bias = project(normed, parts.linear1)
        return Pending(*project(parts.hidden(before, bias), parts.linear2), _NO_DROPOUT, x).added()

    def _one_node(
        self: Any,
        parts: Parts,
        x: Tensor,
        mask: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        kwargs: dict[str, Any],
    ) -> Tensor | None:
        """Compute the steps as one node of autograd; return None where that cannot be."""
        module, name = self.attn, activation_name(parts.activation)
        if (
            name is None
            or not encoder_layer_is_one_node(x, None, module.head_dim)
            or not (type(cos) is type(sin) is Tensor)
            or cos.requires_grad
            or sin.requires_grad
        ):
            return None
        dropout = module.attention_dropout if module.training else 0.0
        terms = terms_of_call(
            module,
            x,
            mask,
            kwargs,
            head_dim=module.head_dim,
            dropout=dropout,
            window=module.sliding_window,
        )
        if terms is None:
            return None
        has_norm1 = not isinstance(parts.norm1, nn.Identity)
        settings = EncoderSettings(
            heads=x.shape[-1] // module.head_dim,
            activation=name,
            middle_eps=parts.norm2.eps,
            last_eps=None,
            hidden_p=dropout_probability(_dropout_of(parts.dropout)),
            middle_p=dropout_probability(_dropout_of(parts.dropout1)),
            last_p=0.0,
            checkpoint_activation=False,
            first_eps=parts.norm1.eps if has_norm1 else None,
            adds_last=True,
            is_gated=True,
        )
        parameters = EncoderParameters._make(
            (
                *weights_and_biases(parts.projection),
                *[None] * 4,
                *weights_and_biases(parts.out, parts.norm2, parts.linear1, parts.linear2, None),
                *weights_and_biases(parts.norm1 if has_norm1 else None),
                cos,
                sin,
                *[None] * 6,
            )
        )
        terms = terms._replace(scale=float(module.head_dim**-0.5))
        found = encoder_layer(x, None, parameters, settings, terms)
        return None if found is None else found[0]

    @classmethod
    def refuses(cls, layer: Any) -> str:
        """Say why ``layer`` cannot be fused; empty if it can."""
        names = list(inspect.signature(layer.forward).parameters)
        if names[:3] != ["hidden_states", "attention_mask", "position_embeddings"]:
            return "its forward takes other arguments than those of a transformers known here"
        return ""

    @classmethod
    def plain_parts(cls, layer: Any) -> Parts | None:
        """Return the parts, if calling them is all that the forward of ``layer`` does."""
        own, mlp = layer.attn, layer.mlp
        parts = Parts(
            layer.attn_norm,
            own.Wqkv,
            own.Wo,
            own.out_drop,
            layer.mlp_norm,
            mlp.Wi,
            mlp.act,
            mlp.drop,
            mlp.Wo,
        )
        return parts if parts.are_plain() and is_untouched(own) and is_untouched(mlp) else None

    def _parts(self: Any) -> Parts | None:
        """Return the parts if the fused steps compute what the layer's own forward would."""
        if named(self.attn.config) not in NAMES:  # its attention was changed since
            return None
        return self.plain_parts(self)  # type: ignore[no-any-return]


def _dropout_of(module: Any) -> nn.Dropout:
    return module if isinstance(module, nn.Dropout) else _NO_DROPOUT


LAYERS: dict[str, Any] = {"modernbert.modeling_modernbert.ModernBertEncoderLayer": GatedLayer}
