"""The constructor, the checks and the blocks that encoder and decoder layers share.

The order of a layer's steps stands in :class:`TransformerEncoderLayer` and
:class:`TransformerDecoderLayer` themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusedformer.functional import Selection
from fusedformer.functional.steps import feed_forward
from fusedformer.nn.children import (
    adopt,
    are_plain,
    check_activation,
    feed_forward_block,
    is_plain,
    is_plain_or_sharded,
    project,
)
from fusedformer.nn.layer_norm import LayerNorm
from fusedformer.nn.masks import AttentionMasks
from fusedformer.nn.multihead_attention import MultiheadAttention, check_heads

# A block's output, the bias that is still to be added to it, and the residual.
Block = tuple[Tensor, Tensor | None, Tensor]


class LayerParts(NamedTuple):
    """Torch's class of a layer, and names of the methods and children that fused steps replace."""

    stock: type[nn.Module]
    methods: tuple[str, ...]
    attentions: tuple[str, ...]
    norms: tuple[str, ...]
    dropouts: tuple[str, ...]

    def number_of_dropouts(self) -> int:
        """Return how many times a layer drops: attention weights are dropped too."""
        return len(self.attentions) + len(self.dropouts)


class FusedLayer:
    """A base of encoder and decoder layers; it comes before torch's class."""

    _fused_parts: ClassVar[LayerParts]
    _is_parallel = False
    checkpoint_activation = False

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
        parts = self._fused_parts
        check_heads(parts.stock.__name__, "d_model", d_model, "nhead", nhead)
        check_activation(parts.stock.__name__, activation)
        super().__init__(  # type: ignore[call-arg]
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
        for name in parts.attentions:
            setattr(self, name, adopt(getattr(self, name), MultiheadAttention))
        for name in parts.norms:
            setattr(self, name, adopt(getattr(self, name), LayerNorm))

    def _attend(
        self: Any,
        x: Tensor,
        residual: Tensor,
        masks: AttentionMasks,
        rows: Selection | None,
        *,
        fork: bool,
    ) -> Block:
        """Attend from ``x`` to itself; where ``rows`` are given, return only these.

        With ``fork`` the residual is ``x`` itself, and its gradient is added within the product
        that computes the gradient of ``x``.
        """
        heads, residual = self._attended_heads(x, residual, masks, rows, fork=fork)
        return *project(heads, self.self_attn.out_proj), residual

    def _attended_heads(
        self: Any,
        x: Tensor,
        residual: Tensor,
        masks: AttentionMasks,
        rows: Selection | None,
        *,
        fork: bool,
    ) -> tuple[Tensor, Tensor]:
        """Return the merged heads of :meth:`_attend`, and the residual."""
        attention: MultiheadAttention = self.self_attn
        if rows is not None and not masks.is_causal and masks.attend is None:
            return attention._attend_from(x, rows, masks), rows.take(residual)
        heads, x = attention._attend_to_itself(x, masks, fork=fork and rows is None)
        residual = x if fork else residual
        return (heads, residual) if rows is None else (rows.take(heads), rows.take(residual))

    def _feed_forward(self: Any, x: Tensor, *, fork: bool) -> Block:
        """Compute the feed-forward block without its last dropout; the residual is ``x``.

        ``fork`` as for :meth:`_attend`.
        """
        return feed_forward(x, feed_forward_block(self), fork=fork)

    def _compose(self: Any, x: Tensor, *blocks: Callable[[Tensor], Tensor]) -> Tensor:
        """Call the layer's modules as torch does: ``blocks``, each with its residual and norm."""
        norms = (getattr(self, name) for name in self._fused_parts.norms)
        for norm, block in zip(norms, blocks, strict=True):
            x = x + block(norm(x)) if self.norm_first else norm(x + block(x))
        return x

    def _packs_as(self: Any, layer: type[nn.Module]) -> bool:
        """Return whether this is a plain ``layer``, which computes row by row but for attention."""
        return (
            is_plain_or_sharded(self, layer)
            and self._children_are_plain()
            and all(getattr(self, name).ring is None for name in self._fused_parts.attentions)
        )

    def _children_are_plain(self: Any) -> bool:
        """Return whether the fused steps do exactly what calling the children would do."""
        parts: LayerParts = self._fused_parts
        own, stock, children = type(self), parts.stock, self._modules
        for name in parts.methods:
            if getattr(own, name) is not getattr(stock, name):
                return False
        linears = [children["linear1"], children["linear2"]]
        attentions = [children[name] for name in parts.attentions]
        for one in attentions:
            if not (is_plain(one, MultiheadAttention) and one._can_pack()):
                return False
            if one.batch_first != attentions[0].batch_first:
                return False
            linears.append(one.out_proj)
        return are_plain(
            linears,
            [children[name] for name in parts.norms],
            [children[name] for name in parts.dropouts],
        )
