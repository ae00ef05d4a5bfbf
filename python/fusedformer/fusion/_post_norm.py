"""Layers and encoders of transformers' BERT, and of models that differ in the names of children.

A layer whose children were replaced since (by an adapter, say) or have hooks, and a call with a
cache or a memory, are computed by the layer's own forward. Attention and norms are still the
library's then.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from fusedformer import functional
from fusedformer.functional.steps import (
    EncoderParameters,
    EncoderSettings,
    FeedForward,
    encoder_layer,
    encoder_layer_is_one_node,
    feed_forward,
    linear,
)
from fusedformer.fusion._activations import activation_name
from fusedformer.fusion._attention import attention, captured, key_mask_of
from fusedformer.fusion._configs import NAMES, named
from fusedformer.fusion._kept_rows import has_no_rows, unpacked, wants_padding, zeroed
from fusedformer.fusion._rows import is_untouched, needs_batch
from fusedformer.fusion._terms import terms_of_call
from fusedformer.nn.children import (
    Pending,
    are_plain,
    dropout_probability,
    project,
    weights_and_biases,
)
from fusedformer.nn.stacks import can_pack, packing_of

_NO_DROPOUT = nn.Dropout(0.0)


class Parts(NamedTuple):
    """Children and settings of a post-norm layer, by one set of names."""

    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    out: nn.Linear
    norm1: nn.LayerNorm
    linear1: nn.Linear
    activation: Any
    linear2: nn.Linear
    norm2: nn.LayerNorm
    attention_dropout: nn.Dropout
    dropout1: nn.Dropout | None
    dropout2: nn.Dropout | None

    def are_plain(self) -> bool:
        """Return whether the fused steps do exactly what calling these children would do."""
        linears = self.query, self.key, self.value, self.out, self.linear1, self.linear2
        dropouts = self.attention_dropout, self.dropout1, self.dropout2
        return are_plain(
            linears, (self.norm1, self.norm2), [one for one in dropouts if one is not None]
        ) and (not isinstance(self.activation, nn.Module) or is_untouched(self.activation))

    def feed_forward_block(self) -> FeedForward:
        """Return the parameters and settings of the feed-forward block."""
        name = activation_name(self.activation)
        return FeedForward(
            self.linear1.weight,
            self.linear1.bias,
            self.linear2.weight,
            self.linear2.bias,
            self.activation if name is None else name,
            0.0,
        )


class PostNormLayer:
    """A base of layers whose forward is four fused steps and six products.

    The gradient of the input, which comes from the residual, query, key and value, is added up
    within the products that compute its parts.
    """

    FUSED = "four fused steps"

    def forward(
        self: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """Compute what the class behind this one computes, by the fused steps if they fit."""
        given = [*args, *(kwargs.get(n) for n in ("past_key_values", "encoder_hidden_states"))]
        parts = None if any(one is not None for one in given) else self._parts()
        if parts is None or "attentions" in captured():
            own: Tensor = super().forward(hidden_states, attention_mask, *args, **kwargs)  # type: ignore[misc]
            return own
        found: Tensor | None = self._one_node(parts, hidden_states, attention_mask, kwargs)
        if found is not None:
            return found
        query, x = linear(hidden_states, parts.query.weight, parts.query.bias, fork=True)
        key, x = linear(x, parts.key.weight, parts.key.bias, fork=True)
        value, x = linear(x, parts.value.weight, parts.value.bias, fork=True)
        module = self.attention_of(self)
        shape = *x.shape[:-1], -1, module.attention_head_size
        q, k, v = (part.view(shape).transpose(1, 2) for part in (query, key, value))
        heads, _ = attention(
            module,
            q,
            k,
            v,
            attention_mask,
            dropout=dropout_probability(parts.attention_dropout),
            scaling=module.scaling,
            **kwargs,
        )
        inner, bias = project(heads.flatten(-2), parts.out)
        x = Pending(inner, bias, parts.dropout1 or _NO_DROPOUT, x).normed(parts.norm1)
        inner, bias, x = feed_forward(x, parts.feed_forward_block(), fork=True)
        return Pending(inner, bias, parts.dropout2 or _NO_DROPOUT, x).normed(parts.norm2)

    def _one_node(
        self, parts: Parts, x: Tensor, mask: Tensor | None, kwargs: dict[str, Any]
    ) -> Tensor | None:
        """Compute the steps as one node of autograd; return None where that cannot be."""
        module, name = self.attention_of(self), activation_name(parts.activation)
        if name is None or not encoder_layer_is_one_node(x, None, module.attention_head_size):
            return None
        terms = terms_of_call(
            module,
            x,
            mask,
            kwargs,
            head_dim=module.attention_head_size,
            dropout=dropout_probability(parts.attention_dropout),
        )
        if terms is None:
            return None
        settings = EncoderSettings(
            heads=parts.query.weight.shape[0] // module.attention_head_size,
            activation=name,
            middle_eps=parts.norm1.eps,
            last_eps=parts.norm2.eps,
            hidden_p=0.0,
            middle_p=dropout_probability(parts.dropout1 or _NO_DROPOUT),
            last_p=dropout_probability(parts.dropout2 or _NO_DROPOUT),
            checkpoint_activation=False,
        )
        parameters = EncoderParameters(
            *weights_and_biases(
                parts.query,
                parts.key,
                parts.value,
                parts.out,
                parts.norm1,
                parts.linear1,
                parts.linear2,
                parts.norm2,
            )
        )
        terms = terms._replace(scale=float(module.scaling))
        found = encoder_layer(x, None, parameters, settings, terms)
        return None if found is None else found[0]

    @classmethod
    def refuses(cls, layer: Any) -> str:
        """Say why ``layer`` cannot be fused; empty if it can."""
        config = getattr(layer, "config", None) or getattr(cls.attention_of(layer), "config", None)
        if getattr(config, "is_decoder", False) or getattr(config, "add_cross_attention", False):
            return "it is a decoder's; its attention and norms are fused"
        if getattr(layer, "chunk_size_feed_forward", 0):
            return "chunk_size_feed_forward is set"
        return ""

    @staticmethod
    def attention_of(layer: Any) -> Any:
        """Return the module that has the settings of attention."""
        raise NotImplementedError

    @staticmethod
    def parts_of(layer: Any) -> tuple[Parts, list[nn.Module]]:
        """Return the parts, and the modules that hold them, which are not called."""
        raise NotImplementedError

    @classmethod
    def plain_parts(cls, layer: Any) -> Parts | None:
        """Return the parts, if calling them is all that the forward of ``layer`` does."""
        parts, holders = cls.parts_of(layer)
        return parts if parts.are_plain() and all(map(is_untouched, holders)) else None

    def _parts(self) -> Parts | None:
        """Return the parts if the fused steps compute what the layer's own forward would."""
        if named(self.attention_of(self).config) not in NAMES:  # its attention was changed since
            return None
        return self.plain_parts(self)


class BertLayers(PostNormLayer):
    """BERT, RoBERTa, XLM-R, CamemBERT, ELECTRA."""

    @staticmethod
    def attention_of(layer: Any) -> Any:
        return layer.attention.self

    @staticmethod
    def parts_of(layer: Any) -> tuple[Parts, list[nn.Module]]:
        attention, own, out = layer.attention, layer.attention.self, layer.attention.output
        inner, output = layer.intermediate, layer.output
        parts = Parts(
            own.query,
            own.key,
            own.value,
            out.dense,
            out.LayerNorm,
            inner.dense,
            inner.intermediate_act_fn,
            output.dense,
            output.LayerNorm,
            own.dropout,
            out.dropout,
            output.dropout,
        )
        return parts, [attention, own, out, inner, output]


class DistilBertLayers(PostNormLayer):
    """DistilBERT."""

    @staticmethod
    def attention_of(layer: Any) -> Any:
        return layer.attention

    @staticmethod
    def parts_of(layer: Any) -> tuple[Parts, list[nn.Module]]:
        own, ffn = layer.attention, layer.ffn
        parts = Parts(
            own.q_lin,
            own.k_lin,
            own.v_lin,
            own.out_lin,
            layer.sa_layer_norm,
            ffn.lin1,
            ffn.activation,
            ffn.lin2,
            layer.output_layer_norm,
            own.dropout,
            None,
            ffn.dropout,
        )
        return parts, [own, ffn]


class AlbertLayers(PostNormLayer):
    """ALBERT, whose layers are one module called many times."""

    @staticmethod
    def attention_of(layer: Any) -> Any:
        return layer.attention

    @staticmethod
    def parts_of(layer: Any) -> tuple[Parts, list[nn.Module]]:
        own = layer.attention
        parts = Parts(
            own.query,
            own.key,
            own.value,
            own.dense,
            own.LayerNorm,
            layer.ffn,
            layer.activation,
            layer.ffn_output,
            layer.full_layer_layer_norm,
            own.attention_dropout,
            own.output_dropout,
            None,
        )
        return parts, [own]


class PackedEncoder:
    """A base of encoders that compute only the real tokens of a padded batch.

    They go through the layers as one long sequence, in which attention keeps to each token's own.
    """

    static_shapes = False  # as in TransformerEncoder

    def forward(
        self: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Compute what the class behind this one computes; packed, with zeros at padding."""
        others = [*args, *(kwargs.get(n) for n in ("past_key_values", "encoder_hidden_states"))]
        keep = key_mask_of(attention_mask)
        if (
            keep is None
            or keep.shape != hidden_states.shape[:2]
            or any(one is not None for one in others)
            or kwargs.get("cu_seq_lens_q") is not None
            or captured()
            or wants_padding()
            or not can_pack(hidden_states, self.static_shapes, keep)
            or needs_batch(self)
        ):
            return super().forward(hidden_states, attention_mask, *args, **kwargs)  # type: ignore[misc]
        packing = packing_of(keep, self.static_shapes)
        if has_no_rows(packing):
            output = super().forward(hidden_states, attention_mask, *args, **kwargs)  # type: ignore[misc]
            output.last_hidden_state = zeroed(output.last_hidden_state, keep)
            return output
        rows = functional.pack(hidden_states, packing)
        output = super().forward(  # type: ignore[misc]
            rows[None],
            None,
            *args,
            **kwargs,
            cu_seq_lens_q=packing.cu_seqlens_q,
            cu_seq_lens_k=packing.cu_seqlens_k,
            max_length_q=packing.max_seqlen,
            max_length_k=packing.max_seqlen,
        )
        output.last_hidden_state = unpacked(output.last_hidden_state[0], packing)
        return output


_FAMILIES = {"bert": "Bert", "roberta": "Roberta", "xlm_roberta": "XLMRoberta",
             "camembert": "Camembert", "electra": "Electra"}  # fmt: skip
LAYERS: dict[str, Any] = {
    **{f"{module}.modeling_{module}.{name}Layer": BertLayers for module, name in _FAMILIES.items()},
    "distilbert.modeling_distilbert.TransformerBlock": DistilBertLayers,
    "albert.modeling_albert.AlbertLayer": AlbertLayers,
}
ENCODERS = {
    *(f"{module}.modeling_{module}.{name}Encoder" for module, name in _FAMILIES.items()),
    "distilbert.modeling_distilbert.Transformer",
    "albert.modeling_albert.AlbertTransformer",
}
