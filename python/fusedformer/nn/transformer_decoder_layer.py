"""``torch.nn.TransformerDecoderLayer`` on the fused kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
from fusedformer.nn.masks import AttentionMasks, Names, attention_masks
from fusedformer.nn.multihead_attention import MultiheadAttention, check_heads

DROPOUTS = 6  # of the weights of both attentions, and dropout, dropout1, dropout2 and dropout3
_FUNCTION = "TransformerDecoderLayer"
_SELF = Names(_FUNCTION, "tgt", "tgt", "tgt", "tgt_mask", "tgt_key_padding_mask")
_CROSS = Names(_FUNCTION, "tgt", "memory", "memory", "memory_mask", "memory_key_padding_mask")


class TransformerDecoderLayer(torch.nn.TransformerDecoderLayer):
    """Self-attention, attention to a memory, and feed-forward, with residual and norm around each.

    A drop-in for :class:`torch.nn.TransformerDecoderLayer`: constructor, parameters,
    initialization and arguments are its own. The steps are those of
    :class:`TransformerEncoderLayer`; keys and values of the memory come of one product.

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

    self_attn: nn.MultiheadAttention
    multihead_attn: nn.MultiheadAttention
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
        check_heads(_FUNCTION, "d_model", d_model, "nhead", nhead)
        check_activation(_FUNCTION, activation)
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
        self.multihead_attn = adopt(self.multihead_attn, MultiheadAttention)
        self.norm1 = adopt(self.norm1, LayerNorm)
        self.norm2 = adopt(self.norm2, LayerNorm)
        self.norm3 = adopt(self.norm3, LayerNorm)

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
            return self._compose(
                tgt, memory, tgt_mask, memory_mask, tgt_key_padding_mask,
                memory_key_padding_mask, tgt_is_causal, memory_is_causal,
            )  # fmt: skip
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
            return self._packed(tgt, memory, own, cross)[0]

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
        """The masks of both attentions, once everything is seen to fit."""
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

    def _packed(
        self, x: Tensor, memory: Tensor, own: AttentionMasks, cross: AttentionMasks
    ) -> tuple[Tensor, Tensor]:
        """The layer of a batch, a sequence or packed rows, if its children are plain; the memory.

        The memory is handed on from layer to layer: its gradient then is what each layer's product
        accumulates on.
        """
        if self.norm_first:
            pending, memory = self._pre_norm(x, self.norm1(x), memory, own, cross)
            return pending.added(), memory
        return self._post_norm(x, memory, own, cross)

    def _post_norm(
        self, x: Tensor, memory: Tensor, own: AttentionMasks, cross: AttentionMasks
    ) -> tuple[Tensor, Tensor]:
        """:meth:`_packed` for norms that come last."""
        inner, bias, x = self._attend(x, own, fork=True)
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
        """The same for norms that come first, of ``x`` and its norm; the last sum is left open."""
        inner, bias, _ = self._attend(normed, own, fork=False)
        normed, x = Pending(inner, bias, self.dropout1, x).normed_and_sum(self.norm2)
        inner, bias, _, memory = self._attend_to_memory(normed, memory, cross, fork=False)
        normed, x = Pending(inner, bias, self.dropout2, x).normed_and_sum(self.norm3)
        inner, bias, _ = self._feed_forward(normed, fork=False)
        return Pending(inner, bias, self.dropout3, x), memory

    def _attend(
        self, x: Tensor, masks: AttentionMasks, fork: bool
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """(attention of ``x`` to itself, the bias that is still to be added to it, ``x``)."""
        attention: Any = self.self_attn
        heads, x = attention._attend_to_itself(x, masks, fork=fork)
        return *project(heads, attention.out_proj), x

    def _attend_to_memory(
        self, x: Tensor, memory: Tensor, masks: AttentionMasks, fork: bool
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """(attention of ``x`` to ``memory``, the bias still to be added, ``x``, ``memory``)."""
        attention: Any = self.multihead_attn
        heads, x, memory = attention._attend_to(x, memory, masks, fork=fork)
        return *project(heads, attention.out_proj), x, memory

    def _feed_forward(self, x: Tensor, fork: bool) -> tuple[Tensor, Tensor | None, Tensor]:
        """(the block of ``x``, the bias that is still to be added to it, ``x``)."""
        return feed_forward_of(self, x, fork=fork)

    def _can_pack(self) -> bool:
        """Whether rows by themselves are all that this layer looks at besides attention."""
        attentions: Any = self.self_attn, self.multihead_attn
        plain = is_plain_or_sharded(self, TransformerDecoderLayer) and self._children_are_plain()
        return plain and all(attention.ring is None for attention in attentions)

    def _compose(
        self,
        x: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None,
        memory_mask: Tensor | None,
        tgt_padding: Tensor | None,
        memory_padding: Tensor | None,
        tgt_is_causal: bool,
        memory_is_causal: bool,
    ) -> Tensor:
        """The layer as calls of its modules."""
        own = tgt_mask, tgt_padding, tgt_is_causal
        cross = memory_mask, memory_padding, memory_is_causal
        if self.norm_first:
            x = x + self._sa_block(self.norm1(x), *own)
            x = x + self._mha_block(self.norm2(x), memory, *cross)
            return x + self._ff_block(self.norm3(x))
        x = self.norm1(x + self._sa_block(x, *own))
        x = self.norm2(x + self._mha_block(x, memory, *cross))
        output: Tensor = self.norm3(x + self._ff_block(x))
        return output

    def _children_are_plain(self) -> bool:
        """Whether the fused steps do exactly what calling the children would do."""
        stock = torch.nn.TransformerDecoderLayer
        attentions: Any = self.self_attn, self.multihead_attn
        return (
            all(getattr(type(self), name) is getattr(stock, name) for name in _BLOCKS)
            and all(is_plain(a, MultiheadAttention) and a._can_pack() for a in attentions)
            and len({a.batch_first for a in attentions}) == 1
            and are_plain(
                (*(a.out_proj for a in attentions), self.linear1, self.linear2),
                (self.norm1, self.norm2, self.norm3),
                (self.dropout, self.dropout1, self.dropout2, self.dropout3),
            )
        )


_BLOCKS = ("_sa_block", "_mha_block", "_ff_block")
