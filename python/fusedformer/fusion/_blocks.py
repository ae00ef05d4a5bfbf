"""Blocks of towers that are not transformers': those of timm's ViT and EVA, and open_clip's.

A block is norm, attention, sum, norm, feed-forward block, sum. What a half adds to the stream of
residuals is scaled by columns (LayerScale), dropped with its image (stochastic depth), summed and
normed in few steps. A child that does more than its class says (an adapter, a hook) is called.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from fusedformer import functional
from fusedformer import nn as fused
from fusedformer._internal.backend import chosen_backend
from fusedformer.functional.steps import FeedForward, feed_forward, linear
from fusedformer.fusion._activations import activation_name
from fusedformer.fusion._classes import WithArguments, is_asked
from fusedformer.fusion._classes import named as name_of
from fusedformer.fusion._hooks import is_untouched
from fusedformer.fusion._norms import normed_and_sum
from fusedformer.fusion._residual import pending_sum
from fusedformer.fusion._timm import Attending, CastingLayerNorm, LayerNorm
from fusedformer.nn.children import (
    Pending,
    dropout_probability,
    is_plain,
    project,
    weights_and_biases,
)
from fusedformer.nn.tracers import introduce

_NO_DROPOUT = nn.Dropout(0.0)
_SCALES = "timm.layers.layer_scale.LayerScale", "open_clip.transformer.LayerScale"
_DEPTH = "timm.layers.drop.DropPath"
_NORMS = fused.LayerNorm, nn.LayerNorm, LayerNorm, CastingLayerNorm


class Added(NamedTuple):
    """What half a block adds: ``dropout(x + bias)``."""

    x: Tensor
    bias: Tensor | None = None
    dropout: nn.Dropout = _NO_DROPOUT

    def to(self, residual: Tensor) -> Pending:
        """Return the sum with the residual, still to be computed."""
        return Pending(self.x, self.bias, self.dropout, residual)

    def normed(self, norm: Any) -> Added:
        """Return the same behind a norm of its own."""
        x = self.x if self.bias is None else self.x + self.bias
        return Added(norm(self.dropout(x)))


class Inner(NamedTuple):
    """The parts of a feed-forward block."""

    product: nn.Linear
    activation: Any
    out: nn.Linear
    gate: nn.Linear | None = None  # a product whose activated result is the other's factor
    activates: Any = None  # which half of the one product is activated, "first" or "second"
    hidden_dropout: Any = None
    norm: Any = None  # of what ``out`` reads
    dropout: Any = None

    def are_plain(self) -> bool:
        """Return whether calling them is no more than what their classes do."""
        linears = [one for one in (self.product, self.gate, self.out) if one is not None]
        dropouts = [one for one in (self.hidden_dropout, self.dropout) if one is not None]
        is_activation = isinstance(self.activation, nn.Module) and is_untouched(self.activation)
        return (
            is_activation
            and all(is_plain(one, nn.Linear) for one in linears)
            and all(is_plain(one, nn.Dropout) for one in dropouts)
            and (self.gate is None or (self.gate.bias is None) == (self.product.bias is None))
        )


def _of_timm(mlp: Any) -> Inner:
    return Inner(mlp.fc1, mlp.act, mlp.fc2, None, None, mlp.drop1, mlp.norm, mlp.drop2)


def _of_halves(mlp: Any) -> Inner:
    return _of_timm(mlp)._replace(activates="second" if mlp.gate_last else "first")


def _of_two(mlp: Any) -> Inner:
    return Inner(mlp.fc1_x, mlp.act, mlp.fc2, mlp.fc1_g, None, mlp.drop1, mlp.norm, mlp.drop2)


def _of_open_clip(mlp: Any) -> Inner | None:
    names = list(mlp._modules)
    return Inner(*mlp.children()) if names == ["c_fc", "gelu", "c_proj"] else None


_FEED_FORWARD: dict[str, Any] = {
    "timm.layers.mlp.Mlp": _of_timm,
    "timm.layers.mlp.GluMlp": _of_halves,
    "timm.layers.mlp.SwiGLU": _of_two,
    "torch.nn.Sequential": _of_open_clip,
}


class Block(WithArguments):
    """A block of timm's Vision Transformer."""

    FUSED = "fused steps, norms first"
    _second_norm = "norm2"
    _first_norm = "norm1"
    _scales: tuple[str, ...] = ("ls1", "ls2")
    _depths: tuple[str, ...] = ("drop_path1", "drop_path2")

    def forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Compute what the class behind this one computes."""
        given = {**dict(zip(self._arguments, args, strict=False)), **kwargs}
        if not self._is_known(given):
            own: Tensor = super().forward(**given)  # type: ignore[misc]
            return own
        return self._steps(given.pop(self._arguments[0]), given)  # type: ignore[no-any-return]

    def _steps(self: Any, x: Tensor, given: dict[str, Any]) -> Tensor:
        scales = [_scale(getattr(self, name)) for name in self._scales]
        depths = [getattr(self, name) for name in self._depths] or [None, None]
        added = self._attended(getattr(self, self._first_norm)(x), given)
        pending = pending_sum(added.to(x), scales[0], depths[0])
        norm = getattr(self, self._second_norm)
        if is_plain(norm, *_NORMS):
            source, x = normed_and_sum(pending, norm)
        else:
            x = pending.added()
            source = norm(x)
        added = _feed_forward(self.mlp, source)
        return pending_sum(added.to(x), scales[1], depths[1]).added()

    def _is_known(self: Any, given: dict[str, Any]) -> bool:
        """Return whether scales and depths do no more than their classes say."""
        scales = [getattr(self, name) for name in self._scales]
        depths = [getattr(self, name) for name in self._depths]
        return all(map(_is_scale, scales)) and all(map(_is_depth, depths))

    def _attended(self: Any, x: Tensor, given: dict[str, Any]) -> Added:
        attention: Any = self.attn
        if not _fuses(attention, given):
            return Added(attention(x, **given))
        heads = attention.joined(x, **given)
        return Added(*project(heads, attention.proj), attention.proj_drop)


class EvaBlock(Block):
    """A block of EVA's, whose scales are its own parameters."""

    _scales = "gamma_1", "gamma_2"


class PostNormBlock(Block):
    """A block of either family that norms what each half adds, not what it reads."""

    FUSED = "fused steps, norms last"
    _scales: tuple[str, ...] = ()

    def _steps(self: Any, x: Tensor, given: dict[str, Any]) -> Tensor:
        added = self._attended(x, given).normed(self.norm1)
        x = pending_sum(added.to(x), None, self.drop_path1).added()
        added = _feed_forward(self.mlp, x).normed(self.norm2)
        return pending_sum(added.to(x), None, self.drop_path2).added()


class ResidualAttentionBlock(Block):
    """A block of open_clip's, which attends by torch's module and drops nothing."""

    _first_norm = "ln_1"
    _second_norm = "ln_2"
    _scales = "ls_1", "ls_2"
    _depths = ()

    def _is_known(self: Any, given: dict[str, Any]) -> bool:
        others = given.get("k_x"), given.get("v_x")
        return not any(map(is_asked, others)) and super()._is_known(given)

    def _attended(self: Any, x: Tensor, given: dict[str, Any]) -> Added:
        attention, mask = self.attn, given.get("attn_mask")
        if (
            not is_plain(attention, fused.MultiheadAttention)
            or not is_plain(attention.out_proj, nn.Linear, NonDynamicallyQuantizableLinear)
            or "attention" in self.__dict__
        ):
            return Added(self.attention(q_x=x, attn_mask=mask))
        mask = None if mask is None else mask.to(x.dtype)
        heads, _ = attention._attend(x, x, x, None, mask, False, False)
        return Added(*project(heads, attention.out_proj))


def _fuses(attention: Any, given: dict[str, Any]) -> bool:
    """Return whether a call of timm's attention is no more than its steps."""
    is_ours = isinstance(attention, Attending)
    return bool(
        is_ours
        and attention.is_fused()
        and attention.takes(given)
        and is_untouched(attention)
        and is_plain(attention.proj, nn.Linear)
        and is_plain(attention.proj_drop, nn.Dropout)
    )


def _is_scale(scale: Any) -> bool:
    if scale is None or isinstance(scale, Tensor) or is_plain(scale, nn.Identity):
        return True
    return name_of(type(scale)) in _SCALES and is_untouched(scale)


def _scale(scale: Any) -> Tensor | None:
    """Return the factor of each column, a parameter of a block or of a module."""
    if scale is None or isinstance(scale, Tensor):
        return scale
    return getattr(scale, "gamma", None)


def _is_depth(depth: Any) -> bool:
    known = name_of(type(depth)) == _DEPTH and is_untouched(depth)
    return known or is_plain(depth, nn.Identity)


def _feed_forward(mlp: Any, x: Tensor) -> Added:
    """Compute the feed-forward block, all but the sum with its last bias and dropout."""
    known = _FEED_FORWARD.get(name_of(type(mlp)))
    inner = known(mlp) if known is not None and is_untouched(mlp) else None
    if inner is None or not inner.are_plain():
        return Added(mlp(x))
    dropout = _NO_DROPOUT if inner.dropout is None else inner.dropout
    normless = inner.norm is None or is_plain(inner.norm, nn.Identity)
    if normless and inner.gate is None and inner.activates is None:
        name = activation_name(inner.activation)
        weights = weights_and_biases(inner.product, inner.out)
        activation = inner.activation if name is None else name
        p = 0.0 if inner.hidden_dropout is None else dropout_probability(inner.hidden_dropout)
        block = FeedForward._make((*weights, activation, p, False))
        return Added(*feed_forward(x, block)[:2], dropout)
    hidden = _hidden(inner, x)
    hidden = hidden if normless else inner.norm(hidden)
    return Added(*project(hidden, inner.out), dropout)


def _hidden(inner: Inner, x: Tensor) -> Tensor:
    """Compute what the norm or the last product of a feed-forward block reads."""
    name, by_aten = activation_name(inner.activation), chosen_backend(x) == "torch"
    dropout = inner.hidden_dropout or _NO_DROPOUT
    if inner.activates is None and (inner.gate is None or name is None or by_aten):
        activated = inner.activation((inner.gate or inner.product)(x))
        hidden: Tensor = dropout(activated if inner.gate is None else activated * inner.product(x))
        return hidden
    if name is None:
        first, second = inner.product(x).chunk(2, -1)
        if inner.activates == "second":
            first, second = second, first
        return dropout(inner.activation(first) * second)  # type: ignore[no-any-return]
    weight, bias = weights_and_biases(inner.product)
    if inner.gate is not None:
        gate_weight, gate_bias = weights_and_biases(inner.gate)
        weight = torch.cat((gate_weight, weight))
        bias = None if bias is None else torch.cat((gate_bias, bias))
    # ATen adds the bias for free within the product.
    before, _ = linear(x, weight, bias if by_aten else None)
    return functional.gated_activation(
        before,
        None if by_aten else bias,
        name,
        activates=inner.activates or "first",
        p=dropout.p,
        training=dropout.training,
    )


introduce([Block])

# The replacement of each class.
BLOCKS: dict[str, type[Any]] = {
    "timm.models.vision_transformer.Block": Block,
    "timm.models.vision_transformer.ResPostBlock": PostNormBlock,
    "timm.models.eva.EvaBlock": EvaBlock,
    "timm.models.eva.EvaBlockPostNorm": PostNormBlock,
    "open_clip.transformer.ResidualAttentionBlock": ResidualAttentionBlock,
}
