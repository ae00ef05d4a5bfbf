"""``torch.nn.TransformerEncoderLayer`` on the fused kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fusedformer.functional import Selection
from fusedformer.functional.steps import (
    EncoderParameters,
    EncoderSettings,
    encoder_layer,
    seeds_drawn_at_once,
)
from fusedformer.nn.children import (
    Pending,
    dropout_probability,
    fused_activation,
    weights_and_biases,
)
from fusedformer.nn.layers import FusedLayer, LayerParts
from fusedformer.nn.masks import AttentionMasks, Names, attention_masks
from fusedformer.nn.multihead_attention import MultiheadAttention

_NAMES = Names("TransformerEncoderLayer", "src", "src", "src", "src_mask", "src_key_padding_mask")
_PARTS = LayerParts(
    stock=torch.nn.TransformerEncoderLayer,
    methods=("_sa_block", "_ff_block"),
    attentions=("self_attn",),
    norms=("norm1", "norm2"),
    dropouts=("dropout", "dropout1", "dropout2"),
)
DROPOUTS = _PARTS.number_of_dropouts()


class TransformerEncoderLayer(FusedLayer, torch.nn.TransformerEncoderLayer):
    """Self-attention and feed-forward, each with dropout, residual and norm around it.

    A drop-in for :class:`torch.nn.TransformerEncoderLayer`: constructor, parameters,
    initialization and arguments are its own. One layer is the products of torch, and four fused
    steps between them: attention on the interleaved projection; bias + dropout + residual + norm;
    bias + activation + dropout; and again bias + dropout + residual (+ norm).

    A child that was replaced by another type, or that carries hooks, and a subclass that defines
    ``_sa_block`` or ``_ff_block``, are called as torch would call them; the layer is then a
    composition of its modules.

    Args:
        d_model: width ``E``.
        nhead: number of attention heads; divides ``d_model``.
        dim_feedforward: width of the feed-forward block.
        dropout: probability of all four dropouts (attention weights, ``dropout``, ``dropout1``,
            ``dropout2``), in [0, 1].
        activation: ``"relu"``, ``"gelu"`` or a callable. ReLU, GELU (both forms) and SiLU, as
            function or module, are fused; any other callable is applied as it is.
        layer_norm_eps: of both norms.
        batch_first: input is ``[batch, length, width]`` rather than ``[length, batch, width]``.
        norm_first: norms before attention and feed-forward (pre-norm) rather than after.
        bias: whether the products and norms have biases.
        device, dtype: of the parameters.
        checkpoint_activation: compute the output of the activation again in the backward rather
            than keep it: ``dim_feedforward`` numbers a token less memory, for one kernel more. The
            only argument that torch's layer does not have; may be set as an attribute.

    Raises:
        ValueError: ``nhead`` does not divide ``d_model``; unknown name of an activation;
            ``dropout`` outside [0, 1].
        TypeError: ``activation`` is neither a name nor callable.

    Source: Vaswani et al., arXiv:1706.03762; pre-norm: Xiong et al., arXiv:2002.04745.
    """

    _fused_parts = _PARTS
    self_attn: nn.MultiheadAttention

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Pass ``src`` through the layer.

        Args:
            src: ``[N, S, E]`` with ``batch_first``, else ``[S, N, E]``; unbatched ``[S, E]``.
            src_mask: ``[S, S]`` or ``[N * nhead, S, S]``; True = masked, or floating-point and
                added to the scores.
            src_key_padding_mask: ``[N, S]`` (unbatched ``[S]``); True = masked, or added.
            is_causal: a hint that ``src_mask``, which must be given, is the causal mask; it is
                then not read.

        Returns:
            Tensor of the shape and dtype of ``src``. Positions that ``src_key_padding_mask``
            masks are no keys, but are computed like any others.

        Raises:
            TypeError, ValueError: as :class:`MultiheadAttention`.
        """
        if not self._children_are_plain():
            masked = src_mask, src_key_padding_mask, is_causal
            return self._compose(src, lambda x: self._sa_block(x, *masked), self._ff_block)
        masks = self._check(src, src_mask, src_key_padding_mask, is_causal)
        with seeds_drawn_at_once(DROPOUTS):
            return self._forward_fused(src, masks)

    def _check(
        self, src: Tensor, mask: Tensor | None, padding: Tensor | None, is_causal: bool
    ) -> AttentionMasks:
        """Check all arguments; return the masks of attention."""
        attention = self.self_attn
        assert isinstance(attention, MultiheadAttention)
        batch, length, _ = attention._check_inputs(src, src, src, _NAMES)
        return attention_masks(
            _NAMES,
            mask,
            padding,
            is_causal,
            batched=src.dim() == 3,
            batch=batch,
            heads=attention.num_heads,
            rows=length,
            keys=length,
        )

    def _forward_fused(
        self, x: Tensor, masks: AttentionMasks, rows: Selection | None = None
    ) -> Tensor:
        """Compute the fused steps on a batch, a sequence or packed rows.

        Of packed ``x``, the result is only ``rows`` if they are given.
        """
        if self.norm_first:
            return self._pre_norm(x, self.norm1(x), masks, rows).added()
        return self._post_norm(x, masks, rows)

    def _post_norm(self, x: Tensor, masks: AttentionMasks, rows: Selection | None) -> Tensor:
        """Compute :meth:`_forward_fused` with norms after the residuals."""
        found = self._one_node(x, None, masks, rows)
        if found is not None:
            return found[0]
        inner, bias, x = self._attend(x, x, masks, rows, fork=True)
        x = Pending(inner, bias, self.dropout1, x).normed(self.norm1)
        inner, bias, x = self._feed_forward(x, fork=True)
        return Pending(inner, bias, self.dropout2, x).normed(self.norm2)

    def _pre_norm(
        self, x: Tensor, normed: Tensor, masks: AttentionMasks, rows: Selection | None
    ) -> Pending:
        """Compute :meth:`_forward_fused` with norms before the blocks.

        ``normed`` is ``norm1`` of ``x``. The last sum is left to the norm that follows the layer.
        """
        found = self._one_node(normed, x, masks, rows)
        if found is not None and found[1] is not None:
            return Pending(found[0], self.linear2.bias, self.dropout2, found[1])
        inner, bias, x = self._attend(normed, x, masks, rows, fork=False)
        normed, x = Pending(inner, bias, self.dropout1, x).normed_and_sum(self.norm2)
        inner, bias, _ = self._feed_forward(normed, fork=False)
        return Pending(inner, bias, self.dropout2, x)

    def _one_node(
        self, x: Tensor, residual: Tensor | None, masks: AttentionMasks, rows: Selection | None
    ) -> tuple[Tensor, Tensor | None, Any] | None:
        """Compute the steps as one node of autograd; return None where that cannot be.

        ``residual`` is given where norms come first, and so is the sum in the result.
        """
        children = self._modules
        attention: Any = children["self_attn"]
        if rows is not None or not self._is_one_node(x, masks, attention):
            return None
        activation = fused_activation(self.activation)
        if activation is None:
            return None
        norms: list[Any] = [children["norm1"], children["norm2"]]
        middle, last = norms if residual is None else (norms[1], None)
        settings = EncoderSettings(
            attention.num_heads,
            activation,
            middle.eps,
            None if last is None else last.eps,
            dropout_probability(children["dropout"]),
            dropout_probability(children["dropout1"]),
            dropout_probability(children["dropout2"]),
            self.checkpoint_activation,
        )
        products = children["linear1"], children["linear2"]
        parameters = EncoderParameters(
            attention.in_proj_weight,
            attention.in_proj_bias,
            None,
            None,
            None,
            None,
            *weights_and_biases(attention.out_proj, middle, *products, last),
        )
        terms = masks.terms(attention.head_dim, attention.dropout if attention.training else 0.0)
        return encoder_layer(x, residual, parameters, settings, terms)

    def _can_pack(self) -> bool:
        """Return whether, but for attention, the layer computes each row by itself."""
        return self._packs_as(TransformerEncoderLayer)
