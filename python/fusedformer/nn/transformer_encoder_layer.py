"""``torch.nn.TransformerEncoderLayer`` on the fused kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusedformer.functional import Selection
from fusedformer.functional.steps import seeds_drawn_at_once
from fusedformer.nn.children import (
    Pending,
    adopt,
    are_plain,
    check_activation,
    feed_forward_of,
    is_plain,
    is_plain_or_sharded,
    project,
)
from fusedformer.nn.layer_norm import LayerNorm
from fusedformer.nn.masks import AttentionMasks, Names, attention_masks, check_sequence
from fusedformer.nn.multihead_attention import MultiheadAttention, check_heads

_NAMES = Names("TransformerEncoderLayer", "src", "src", "src", "src_mask", "src_key_padding_mask")

DROPOUTS = 4  # of attention weights, and the modules dropout, dropout1 and dropout2


class TransformerEncoderLayer(torch.nn.TransformerEncoderLayer):
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

    self_attn: nn.MultiheadAttention
    checkpoint_activation = False
    _is_parallel = False

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        checkpoint_activation: bool = False,
    ) -> None:
        function = "TransformerEncoderLayer"
        check_heads(function, "d_model", d_model, "nhead", nhead)
        check_activation(function, activation)
        super().__init__(
            d_model,
            nhead,
            dim_feedforward,
            dropout,
            activation,
            layer_norm_eps,
            batch_first,
            norm_first,
            bias,
            device,
            dtype,
        )
        if checkpoint_activation:
            self.checkpoint_activation = True
        self.self_attn = adopt(self.self_attn, MultiheadAttention)
        self.norm1 = adopt(self.norm1, LayerNorm)
        self.norm2 = adopt(self.norm2, LayerNorm)

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
        attention: Any = self.self_attn
        if not self._children_are_plain():
            return self._compose(src, src_mask, src_key_padding_mask, is_causal)
        weight = attention.out_proj.weight
        check_sequence("TransformerEncoderLayer", "src", src, attention.embed_dim, weight)
        heads = attention.num_heads
        batched = src.dim() == 3
        batch, length = attention._sizes(src)
        masks = attention_masks(
            _NAMES,
            src_mask,
            src_key_padding_mask,
            is_causal,
            batched=batched,
            batch=batch,
            heads=heads,
            rows=length,
            keys=length,
        )
        with seeds_drawn_at_once(DROPOUTS):
            return self._packed(src, masks)

    def _packed(self, x: Tensor, masks: AttentionMasks, rows: Selection | None = None) -> Tensor:
        """The layer of a batch, a sequence or packed rows, if its children are plain.

        Or, of packed ``x``, only ``rows`` of the result.
        """
        if self.norm_first:
            return self._pre_norm(x, self.norm1(x), masks, rows).added()
        return self._post_norm(x, masks, rows)

    def _post_norm(self, x: Tensor, masks: AttentionMasks, rows: Selection | None = None) -> Tensor:
        """:meth:`_packed` for norms that come last."""
        inner, bias, x = self._attend(x, x, masks, rows, fork=True)
        x = Pending(inner, bias, self.dropout1, x).normed(self.norm1)
        inner, bias, x = self._feed_forward(x, fork=True)
        return Pending(inner, bias, self.dropout2, x).normed(self.norm2)

    def _pre_norm(
        self, x: Tensor, normed: Tensor, masks: AttentionMasks, rows: Selection | None = None
    ) -> Pending:
        """The same for norms that come first, of ``x`` and its norm; the last sum is left open."""
        inner, bias, x = self._attend(normed, x, masks, rows, fork=False)
        normed, x = Pending(inner, bias, self.dropout1, x).normed_and_sum(self.norm2)
        inner, bias, _ = self._feed_forward(normed, fork=False)
        return Pending(inner, bias, self.dropout2, x)

    def _attend(
        self, x: Tensor, residual: Tensor, masks: AttentionMasks, rows: Selection | None, fork: bool
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """(attention of ``x``, the bias that is still to be added to it, ``residual``)."""
        heads, residual = self._heads(x, residual, masks, rows, fork)
        return *project(heads, self.self_attn.out_proj), residual

    def _feed_forward(self, x: Tensor, fork: bool) -> tuple[Tensor, Tensor | None, Tensor]:
        """(the block of ``x``, the bias that is still to be added to it, ``x``)."""
        return feed_forward_of(self, x, fork=fork)

    def _heads(
        self, x: Tensor, residual: Tensor, masks: AttentionMasks, rows: Selection | None, fork: bool
    ) -> tuple[Tensor, Tensor]:
        """(merged heads of ``x``, ``residual``), of ``rows`` if they are given."""
        attention = self.self_attn
        assert isinstance(attention, MultiheadAttention)
        if rows is not None and not masks.is_causal and masks.attend is None:
            return attention._attend_from(x, rows, masks), rows.take(residual)
        heads, x = attention._attend_to_itself(x, masks, fork=fork and rows is None)
        residual = x if fork else residual
        return (heads, residual) if rows is None else (rows.take(heads), rows.take(residual))

    def _can_pack(self) -> bool:
        """Whether rows by themselves are all that this layer looks at besides attention."""
        attention: Any = self.self_attn
        plain = is_plain_or_sharded(self, TransformerEncoderLayer) and self._children_are_plain()
        return plain and attention.ring is None

    def _compose(
        self,
        x: Tensor,
        src_mask: Tensor | None,
        src_key_padding_mask: Tensor | None,
        is_causal: bool,
    ) -> Tensor:
        """The layer as calls of its modules."""
        masks = src_mask, src_key_padding_mask, is_causal
        if self.norm_first:
            x = x + self._sa_block(self.norm1(x), *masks)
            x = x + self._ff_block(self.norm2(x))
        else:
            x = self.norm1(x + self._sa_block(x, *masks))
            x = self.norm2(x + self._ff_block(x))
        return x

    def _children_are_plain(self) -> bool:
        """Whether the fused steps do exactly what calling the children would do."""
        stock = torch.nn.TransformerEncoderLayer
        attention: Any = self.self_attn
        return (
            type(self)._sa_block is stock._sa_block
            and type(self)._ff_block is stock._ff_block
            and is_plain(attention, MultiheadAttention)
            and attention._can_pack()
            and are_plain(
                (attention.out_proj, self.linear1, self.linear2),
                (self.norm1, self.norm2),
                (self.dropout, self.dropout1, self.dropout2),
            )
        )
