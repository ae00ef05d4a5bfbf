"""``torch.nn.TransformerDecoderLayer`` on the fused kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fusedformer.functional.steps import (
    EncoderParameters,
    EncoderSettings,
    encoder_layer,
    encoder_layer_is_one_node,
    seeds_drawn_at_once,
)
from fusedformer.nn.children import (
    Pending,
    dropout_probability,
    fused_activation,
    project,
    weights_and_biases,
)
from fusedformer.nn.layers import FusedLayer, LayerParts
from fusedformer.nn.masks import AttentionMasks, Names, attention_masks

_FUNCTION = "TransformerDecoderLayer"
_SELF = Names(_FUNCTION, "tgt", "tgt", "tgt", "tgt_mask", "tgt_key_padding_mask")
_CROSS = Names(_FUNCTION, "tgt", "memory", "memory", "memory_mask", "memory_key_padding_mask")
_PARTS = LayerParts(
    stock=torch.nn.TransformerDecoderLayer,
    methods=("_sa_block", "_mha_block", "_ff_block"),
    attentions=("self_attn", "multihead_attn"),
    norms=("norm1", "norm2", "norm3"),
    dropouts=("dropout", "dropout1", "dropout2", "dropout3"),
)
DROPOUTS = _PARTS.number_of_dropouts()


class TransformerDecoderLayer(FusedLayer, torch.nn.TransformerDecoderLayer):
    """Self-attention, attention to a memory, and feed-forward, with residual and norm around each.

    A drop-in for :class:`torch.nn.TransformerDecoderLayer`: constructor, parameters,
    initialization and arguments are its own. The steps are those of
    :class:`TransformerEncoderLayer`; one product gives keys and values of the memory.

    A child that was replaced by another type, or that carries hooks, and a subclass that defines
    ``_sa_block``, ``_mha_block`` or ``_ff_block``, are called as torch would call them; the layer
    is then a composition of its modules.

    Args:
        d_model: width ``E``.
        nhead: number of attention heads; divides ``d_model``.
        dim_feedforward: width of the feed-forward block.
        dropout: probability of all six dropouts (of the weights of both attentions, ``dropout``,
            ``dropout1``, ``dropout2``, ``dropout3``), in [0, 1].
        activation, layer_norm_eps, batch_first, norm_first, bias, device, dtype,
            checkpoint_activation: as for :class:`TransformerEncoderLayer`.

    Raises:
        TypeError, ValueError: as :class:`TransformerEncoderLayer`.

    Source: Vaswani et al., arXiv:1706.03762; pre-norm: Xiong et al., arXiv:2002.04745.
    """

    _fused_parts = _PARTS
    self_attn: nn.MultiheadAttention
    multihead_attn: nn.MultiheadAttention

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """Pass ``tgt`` through the layer.

        Args:
            tgt: ``[N, T, E]`` with ``batch_first``, else ``[T, N, E]``; unbatched ``[T, E]``.
            memory: likewise with length ``S``: the output of an encoder, say.
            tgt_mask: ``[T, T]`` or ``[N * nhead, T, T]``; True = masked, or floating-point and
                added to the scores.
            memory_mask: ``[T, S]`` or ``[N * nhead, T, S]``, likewise.
            tgt_key_padding_mask: ``[N, T]`` (unbatched ``[T]``); True = masked, or added.
            memory_key_padding_mask: ``[N, S]`` (unbatched ``[S]``), likewise.
            tgt_is_causal, memory_is_causal: hints that ``tgt_mask`` or ``memory_mask``, which must
                be given, is the causal mask; it is then not read.

        Returns:
            Tensor of the shape and dtype of ``tgt``. Positions that ``tgt_key_padding_mask``
            masks are no keys, but are computed like any others.

        Raises:
            TypeError, ValueError: as :class:`MultiheadAttention`.
        """
        if not self._children_are_plain():
            own_masked = tgt_mask, tgt_key_padding_mask, tgt_is_causal
            cross_masked = memory_mask, memory_key_padding_mask, memory_is_causal
            return self._compose(
                tgt,
                lambda x: self._sa_block(x, *own_masked),
                lambda x: self._mha_block(x, memory, *cross_masked),
                self._ff_block,
            )
        own, cross = self._check(
            tgt,
            memory,
            tgt_mask,
            memory_mask,
            tgt_key_padding_mask,
            memory_key_padding_mask,
            tgt_is_causal,
            memory_is_causal,
        )
        with seeds_drawn_at_once(DROPOUTS):
            return self._forward_fused(tgt, memory, own, cross)[0]

    def _check(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None,
        memory_mask: Tensor | None,
        tgt_padding: Tensor | None,
        memory_padding: Tensor | None,
        tgt_is_causal: bool,
        memory_is_causal: bool,
    ) -> tuple[AttentionMasks, AttentionMasks]:
        """Check all arguments; return the masks of both attentions."""
        attention: Any = self.multihead_attn
        batch, rows, keys = attention._check_inputs(tgt, memory, memory, _CROSS)
        sizes: dict[str, Any] = {
            "batched": tgt.dim() == 3, "batch": batch, "heads": attention.num_heads, "rows": rows,
        }  # fmt: skip
        own = attention_masks(_SELF, tgt_mask, tgt_padding, tgt_is_causal, keys=rows, **sizes)
        cross = attention_masks(
            _CROSS, memory_mask, memory_padding, memory_is_causal, keys=keys, **sizes
        )
        return own, cross

    def _forward_fused(
        self, x: Tensor, memory: Tensor, own: AttentionMasks, cross: AttentionMasks
    ) -> tuple[Tensor, Tensor]:
        """Compute the fused steps on batches, sequences or packed rows; return the memory too.

        The memory is handed on from layer to layer, so that each layer's product adds its part of
        the memory's gradient to what the layers behind it gave.
        """
        if self.norm_first:
            pending, memory = self._pre_norm(x, self.norm1(x), memory, own, cross)
            return pending.added(), memory
        return self._post_norm(x, memory, own, cross)

    def _post_norm(
        self, x: Tensor, memory: Tensor, own: AttentionMasks, cross: AttentionMasks
    ) -> tuple[Tensor, Tensor]:
        """Compute :meth:`_forward_fused` with norms after the residuals."""
        found = self._one_node(x, None, memory, own, cross)
        if found is not None:
            return found[0], found[2]
        inner, bias, x = self._attend(x, x, own, None, fork=True)
        x = Pending(inner, bias, self.dropout1, x).normed(self.norm1)
        inner, bias, x, memory = self._attend_to_memory(x, memory, cross, fork=True)
        x = Pending(inner, bias, self.dropout2, x).normed(self.norm2)
        inner, bias, x = self._feed_forward(x, fork=True)
        return Pending(inner, bias, self.dropout3, x).normed(self.norm3), memory

    def _pre_norm(
        self,
        x: Tensor,
        normed: Tensor,
        memory: Tensor,
        own: AttentionMasks,
        cross: AttentionMasks,
    ) -> tuple[Pending, Tensor]:
        """Compute :meth:`_forward_fused` with norms before the blocks.

        ``normed`` is ``norm1`` of ``x``. The last sum is left to the norm that follows the layer.
        """
        found = self._one_node(normed, x, memory, own, cross)
        if found is not None and found[1] is not None:
            return Pending(found[0], self.linear2.bias, self.dropout3, found[1]), found[2]
        inner, bias, x = self._attend(normed, x, own, None, fork=False)
        normed, x = Pending(inner, bias, self.dropout1, x).normed_and_sum(self.norm2)
        inner, bias, _, memory = self._attend_to_memory(normed, memory, cross, fork=False)
        normed, x = Pending(inner, bias, self.dropout2, x).normed_and_sum(self.norm3)
        inner, bias, _ = self._feed_forward(normed, fork=False)
        return Pending(inner, bias, self.dropout3, x), memory

    def _one_node(
        self,
        x: Tensor,
        residual: Tensor | None,
        memory: Tensor,
        own: AttentionMasks,
        cross: AttentionMasks,
    ) -> tuple[Tensor, Tensor | None, Any] | None:
        """Compute the steps as one node of autograd; return None where that cannot be.

        ``residual`` is given where norms come first, and so is the sum in the result.
        """
        children = self._modules
        attention: Any = children["self_attn"]
        to_memory: Any = children["multihead_attn"]
        if (
            not self._is_one_node(x, own, attention)
            or to_memory.ring is not None
            or to_memory.num_heads != attention.num_heads
            or memory is x
            or x.dim() != memory.dim()
            or not encoder_layer_is_one_node(memory, cross.attn_mask, to_memory.head_dim)
        ):
            return None
        activation = fused_activation(self.activation)
        if activation is None:
            return None
        norms: list[Any] = [children[name] for name in _PARTS.norms]
        middle, behind_memory, last = norms if residual is None else (*norms[1:], None)
        settings = EncoderSettings(
            heads=attention.num_heads,
            activation=activation,
            middle_eps=middle.eps,
            last_eps=None if last is None else last.eps,
            hidden_p=dropout_probability(children["dropout"]),
            middle_p=dropout_probability(children["dropout1"]),
            last_p=dropout_probability(children["dropout3"]),
            checkpoint_activation=self.checkpoint_activation,
            cross_eps=behind_memory.eps,
            cross_p=dropout_probability(children["dropout2"]),
        )
        parameters = EncoderParameters._make(
            (
                attention.in_proj_weight,
                attention.in_proj_bias,
                *[None] * 4,
                *weights_and_biases(attention.out_proj, middle),
                *weights_and_biases(children["linear1"], children["linear2"], last),
                *[None] * 4,
                to_memory.in_proj_weight,
                to_memory.in_proj_bias,
                *weights_and_biases(to_memory.out_proj, behind_memory),
            )
        )
        terms, cross_terms = (
            masks.terms(one.head_dim, one.dropout if one.training else 0.0)
            for masks, one in ((own, attention), (cross, to_memory))
        )
        return encoder_layer(x, residual, parameters, settings, terms, memory, cross_terms)

    def _attend_to_memory(
        self, x: Tensor, memory: Tensor, masks: AttentionMasks, *, fork: bool
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """Attend from ``x`` to ``memory``; return what :meth:`_attend` does, and the memory."""
        attention: Any = self.multihead_attn
        heads, x, memory = attention._attend_to(x, memory, masks, fork=fork)
        return *project(heads, attention.out_proj), x, memory

    def _can_pack(self) -> bool:
        """Return whether, but for attention, the layer computes each row by itself."""
        return self._packs_as(TransformerDecoderLayer)
