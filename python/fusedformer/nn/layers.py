"""The constructor, the checks and the blocks that encoder and decoder layers share.

The order of a layer's steps stands in :class:`TransformerEncoderLayer` and
:class:`TransformerDecoderLayer` themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from fusedformer.functional import Selection
from fusedformer.functional.steps import encoder_layer_is_one_node, feed_forward
from fusedformer.nn.children import (
    HOOKS,
    adopt,
    are_plain,
    check_activation,
    feed_forward_block,
    is_plain,
    is_plain_or_sharded,
    is_sharded,
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

    def _is_one_node(self: Any, x: Tensor, masks: AttentionMasks, attention: Any) -> bool:
        """Return whether one node of autograd may attend from ``x`` to itself, and more."""
        return not (
            self._is_parallel
            or masks.attend is not None
            or attention.ring is not None
            or (x.dim() == 3 and not attention.batch_first)
        ) and encoder_layer_is_one_node(x, masks.attn_mask, attention.head_dim)

    def _compose(self: Any, x: Tensor, *blocks: Callable[[Tensor], Tensor]) -> Tensor:
        """Call the layer's modules as torch does: ``blocks``, each with its residual and norm."""
        norms = (getattr(self, name) for name in self._fused_parts.norms)
        for norm, block in zip(norms, blocks, strict=True):
            x = x + block(norm(x)) if self.norm_first else norm(x + block(x))
        return x

    def _packs_as(self: Any, layer: type[nn.Module]) -> bool:
        """Return whether this is a plain ``layer``, which computes row by row but for attention."""
        own = self.__dict__
        known = None if torch.compiler.is_compiling() else _plain_layers.get(self)
        if (
            known is not None
            and known.packs_as is layer
            and known.holds(self)
            and "forward" not in own
            and not (own["_forward_hooks"] or own["_forward_pre_hooks"])
            and not (own["_backward_hooks"] or own["_backward_pre_hooks"])
        ):
            return True
        return (
            is_plain_or_sharded(self, layer)
            and self._children_are_plain()
            and all(getattr(self, name).ring is None for name in self._fused_parts.attentions)
        )

    def _children_are_plain(self: Any) -> bool:
        """Return whether the fused steps do exactly what calling the children would do.

        Found once, it holds until something is replaced or registered.
        """
        if torch.compiler.is_compiling():
            return bool(self._look_at_children())
        known = _plain_layers.get(self)
        if known is not None and known.holds(self):
            return True
        if not self._look_at_children():
            return False
        _plain_layers[self] = PlainLayer.of(self)
        return True

    def _look_at_children(self: Any) -> bool:
        """Look at each child for :meth:`_children_are_plain`."""
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


class PlainLayer(NamedTuple):
    """What was looked at when a layer's children were found to be plain.

    It does not hold the layer itself, which is to be free to go.
    """

    owners: tuple[dict[str, Any], ...]  # of children: the layer's, the attentions'
    owned: tuple[tuple[Any, ...], ...]  # their values
    children: tuple[nn.Module, ...]
    classes: tuple[type, ...]  # the layer's, and the children's
    hooks: tuple[dict[int, Any], ...]  # of the children
    settings: tuple[Any, ...]
    packs_as: type | None  # the class as which the layer packs, but for hooks of its own

    @staticmethod
    def of(layer: Any) -> PlainLayer:
        """Take note of ``layer``."""
        parts: LayerParts = layer._fused_parts
        attentions = [getattr(layer, name) for name in parts.attentions]
        children = [
            *attentions,
            *(attention.out_proj for attention in attentions),
            *(getattr(layer, name) for name in ("linear1", "linear2", *parts.norms)),
            *(getattr(layer, name) for name in parts.dropouts),
        ]
        owners = tuple(module._modules for module in (layer, *attentions))
        return PlainLayer(
            owners,
            tuple(tuple(owner.values()) for owner in owners),
            tuple(children),
            tuple(map(type, (layer, *children))),
            tuple(child.__dict__[name] for child in children for name in HOOKS),
            _settings_of(children),
            None
            if is_sharded(layer) or any(attention.ring is not None for attention in attentions)
            else getattr(type(layer), "_made_of", (type(layer),))[0],
        )

    def holds(self, layer: nn.Module) -> bool:
        """Return whether nothing of ``layer`` has been replaced, registered or set since."""
        return (
            not any(self.hooks)
            and tuple(map(tuple, map(dict.values, self.owners))) == self.owned
            and tuple(map(type, (layer, *self.children))) == self.classes
            and _settings_of(self.children) == self.settings
            and not _has_any_global_hook()  # type: ignore[no-untyped-call]
        )


_plain_layers: WeakKeyDictionary[Any, PlainLayer] = WeakKeyDictionary()


def _settings_of(children: Sequence[Any]) -> tuple[Any, ...]:
    """Return what attributes of children decide."""
    found: list[Any] = []
    for module in children:
        own = module.__dict__
        if "forward" in own:
            found.append(own["forward"])
        if "in_proj_weight" in own["_parameters"]:
            found += (
                module.batch_first,
                module._qkv_same_embed_dim,
                module.bias_k is None,
                module.add_zero_attn,
                module.ring,
            )
        elif "normalized_shape" in own:
            found.append(own["normalized_shape"])
    return tuple(found)
