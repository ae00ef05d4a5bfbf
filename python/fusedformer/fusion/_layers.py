"""Layers of transformers' models by their description: norms after the sums, or first.

A layer whose children were replaced since (by an adapter, say) or have hooks, and a call with a
cache or a memory, are computed by the layer's own forward. Attention and norms are still the
library's then.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fusedformer import functional
from fusedformer._internal.backend import chosen_backend
from fusedformer.functional.steps import (
    FeedForward,
    feed_forward,
    linear,
)
from fusedformer.fusion._activations import activation_name
from fusedformer.fusion._attention import FULL, attention, captured
from fusedformer.fusion._biases import dense_biases
from fusedformer.fusion._classes import WithArguments, is_asked
from fusedformer.fusion._classes import named as name_of
from fusedformer.fusion._configs import NAMES, named
from fusedformer.fusion._families import LAYERS
from fusedformer.fusion._forms import Finder, Form, Parts, probability
from fusedformer.fusion._inference import inferred, is_unseen, only_adds_and_norms
from fusedformer.fusion._kept_rows import as_sequences
from fusedformer.fusion._norms import dtypes_fit, normed, normed_and_sum
from fusedformer.fusion._one_node import joint, one_node
from fusedformer.fusion._residual import pending_sum
from fusedformer.fusion._rotary import tables_of, turned
from fusedformer.fusion._seen import SEEN
from fusedformer.nn.children import (
    Pending,
    dropout_probability,
    project,
    weights_and_biases,
)

_NO_DROPOUT = nn.Dropout(0.0)
# Arguments of layers with which they do more than the fused steps.
_MORE = "past_key_values", "layer_past", "encoder_hidden_states", "output_attentions"


class Call(NamedTuple):
    """What a layer was given."""

    x: Tensor
    mask: Tensor | None
    rotary: tuple[Tensor, Tensor] | None
    others: dict[str, Any]


class Known(NamedTuple):
    """What is known of a layer's children, for as long as they are the same."""

    parts: Parts
    fits: bool  # nothing that attention calls for is more than it was
    is_plain: bool  # nor is anything else
    finder: Finder  # by which parts were found


class FusedLayer(WithArguments):
    """A base of layers whose forward is products and the fused steps between them.

    Gradients that come by a residual are added up within the products that compute the others.
    """

    _form: Form
    _finder: Finder
    _only_adds_and_norms: bool

    def __init_subclass__(cls) -> None:
        """Look up once what the class behind is."""
        super().__init_subclass__()
        made_of = getattr(cls, "_made_of", None)
        if made_of is None:  # a base too
            return
        cls._form = LAYERS[name_of(made_of[1])]
        cls._finder = Finder(cls._form)
        cls._only_adds_and_norms = only_adds_and_norms(cls._form)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Compute what the class behind this one computes, by the fused steps if they fit."""
        given = dict(zip(self._arguments, args, strict=False))
        given.update(kwargs)
        form = self._form
        for name in _MORE:
            if is_asked(given.get(name)):
                return self._own(given)
        if "attentions" in captured():
            return self._own(given)
        if form.own is not None and not form.own.takes(given):
            return self._own(given)
        if not isinstance(given.get("attention_mask"), Tensor | None):  # flex_attention's
            return self._own(given)
        known = self._known()
        if known is None or not known.fits or not self._fits(known.parts, given["hidden_states"]):
            return self._own(given)
        parts = known.parts
        is_plain = known.is_plain and parts.agree(form.norms_all_heads)
        if not is_plain and not self.calls_children():
            return self._own(given)
        call = self._call(parts, given)
        return self._returned(self._found(parts, call, is_plain), call)

    def _known(self: Any) -> Known | None:
        """Return what is known of the children; None if the form does not say what they do."""
        looks = not torch.compiler.is_compiling()
        seen = self.__dict__.get(SEEN) if looks else None
        if seen is not None and seen.found.finder is self._finder and seen.holds_for(self):
            return seen.found  # type: ignore[no-any-return]
        parts = self._finder.parts(self)
        if parts is None:
            return None
        known = Known(parts, self._weights_fit(parts), self.are_plain(parts), self._finder)
        if looks:
            self.__dict__[SEEN] = self._finder.seen(self, parts, known)
        return known

    @classmethod
    def _weights_fit(cls, parts: Parts) -> bool:
        return not cls.calls_children() or parts.weights_are_plain()

    def _found(self: Any, parts: Parts, call: Call, is_plain: bool) -> Tensor:
        """Compute the layer in the way that takes least time."""
        if not is_plain:
            return self._called(parts, call)  # type: ignore[no-any-return]
        by_aten = self._only_adds_and_norms and is_unseen(call.x)
        found = inferred(self, parts, call) if by_aten else self._one_node(parts, call)
        return self._steps(parts, call) if found is None else found

    def _returned(self: Any, found: Tensor, call: Call) -> Any:
        """Return the states as the class behind this one does."""
        found = found if self._form.bounds is None else found[0]
        if self._form.returns_bias:
            return found, call.others.get("position_bias"), None
        return (found,) if self._form.returns_tuple else found

    def _own(self, given: dict[str, Any]) -> Any:
        """Call the forward of the class behind this one."""
        bias = given.get("position_bias")
        if bias is not None and bias.dim() == 2:  # of a layer before
            given = {**given, "position_bias": dense_biases(bias, given["hidden_states"].shape[1])}
        return super().forward(**given)  # type: ignore[misc]

    @classmethod
    def calls_children(cls) -> bool:
        """Return whether children that do more are called here, not by the layer's own forward."""
        form = cls._form
        attends = form.attends_itself or not form.hands_on
        return (attends and form.position_bias is None) or form.buckets is not None

    def _fits(self, parts: Parts, x: Tensor) -> bool:
        """Return whether attention is still this library's, and no cast stands between steps."""
        form = self._form
        if not form.attends_itself and named(parts.attention.config) not in NAMES:
            return False
        weight = parts.last.weight  # a method where products are quantized
        other = isinstance(weight, Tensor) and x.dtype != weight.dtype
        if form.clamps_half and (x.dtype is torch.float16 or other):
            return False
        return dtypes_fit(parts.norms(), x)

    def _call(self, parts: Parts, given: dict[str, Any]) -> Call:
        """Sort the arguments."""
        if self._form.bounds is not None:
            given = as_sequences(self._form.bounds, given)
        rotary: Any = None if self._form.rotary is None else given.pop(self._form.rotary, None)
        rotary = tables_of(self._form, rotary, given["hidden_states"].shape[1])
        if parts.buckets is not None and given.get("position_bias") is None:
            given["position_bias"] = functional.relative_position_bias(
                parts.buckets.weight, max_distance=getattr(parts.attention, self._form.max_distance)
            )
        mask = given.pop("attention_mask", None)
        if self._form.attends_itself and given.get("cu_seq_lens_q") is None:
            mask = _added(mask, given["hidden_states"])
        if self._form.position_bias is not None:
            bias = self._form.position_bias(self, given)
            if given.get("cu_seq_lens_q") is not None:
                given["sequence_bias"] = bias
            else:
                mask = bias if mask is None else mask if bias is None else bias + mask
        return Call(given.pop("hidden_states"), mask, rotary, given)

    def _steps(self, parts: Parts, call: Call) -> Tensor:
        form, x, norms_first = self._form, call.x, self._form.puts_norms_first(self)
        source = parts.norm1(x) if norms_first and parts.norm1 is not None else x
        forks = source is x
        heads, through = self._attends(parts, call, source, forks)
        residual = through if forks else x
        summed = pending_sum(
            self._to_add(project(heads, parts.out), parts.dropout1, parts.out_norm, residual),
            parts.scale1,
            parts.depth,
            parts.divisor,
        )
        if form.is_parallel(self):
            source = source if parts.norm2 is None else parts.norm2(x)
            x = summed.added()
        elif norms_first:
            source, x = normed_and_sum(summed, parts.norm2)
        else:
            source = normed(summed, parts.norm1)
        inner, bias, through = self._block(parts, source, fork=not norms_first)
        residual = x if norms_first else through
        summed = pending_sum(
            self._to_add((inner, bias), parts.dropout2, parts.block_norm, residual),
            parts.scale2,
            None if form.depth_of_attention else parts.depth,
            parts.divisor,
        )
        if form.adapter is not None:
            x = form.adapter(self, summed.added(), call.others)
            return x if norms_first else parts.norm2(x)
        return summed.added() if norms_first else normed(summed, parts.norm2)

    def _to_add(
        self, product: tuple[Tensor, Tensor | None], dropout: Any, norm: Any, residual: Tensor
    ) -> Pending:
        """Return what is to be added to the residual, normed by itself where there is a norm."""
        (x, bias), dropout = product, self._dropout_of(dropout)
        if norm is None:
            return Pending(x, bias, dropout, residual)
        x = x if bias is None else x + bias
        if self._form.drops_normed:
            return Pending(norm(x), None, dropout, residual)
        x = norm(dropout(x) if dropout_probability(dropout) else x)
        return Pending(x, None, _NO_DROPOUT, residual)

    def _called(self, parts: Parts, call: Call) -> Tensor:
        """Call the children, which may be more than they were, as by an adapter."""
        x, norms_first = call.x, self._form.puts_norms_first(self)
        dim = getattr(parts.attention, self._form.head_dim)
        source = parts.norm1(x) if norms_first else x
        products: list[Any] = [parts.query, parts.key, parts.value]
        found = [one(source) for one in products if one is not None]
        q, k, v = self._split(parts, found, dim)
        q, k = turned(self._form, parts, q, k, call.rotary, call.others)
        heads = parts.out(self._attended(parts, call, q, k, v))
        x = x + self._normed_and_dropped(heads, parts.out_norm, parts.dropout1)
        source = parts.norm2(x) if norms_first else parts.norm1(x)
        inner = self._block_called(parts, source)
        inner = self._normed_and_dropped(inner, parts.block_norm, parts.dropout2)
        x = (x if norms_first else source) + inner
        return x if norms_first else parts.norm2(x)  # type: ignore[no-any-return]

    def _block_called(self, parts: Parts, x: Tensor) -> Tensor:
        """Call the children of the feed-forward block."""
        if parts.block is not None:
            found: Any = parts.block(x)
            own: Tensor = found[0] if isinstance(found, tuple) else found  # some return routes too
            return own
        inner = parts.linear1(x)
        if parts.gate is None:
            inner = parts.activation(inner)
        else:
            inner = parts.activation(parts.gate(x)) * inner
        last: Tensor = parts.linear2(self._to_call(parts.hidden_dropout)(inner))
        return last

    def _normed_and_dropped(self, x: Tensor, norm: Any, dropout: Any) -> Any:
        """Call what stands between a product and the sum."""
        drop = self._to_call(dropout)
        if norm is None:
            return drop(x)
        return drop(norm(x)) if self._form.drops_normed else norm(drop(x))

    def _attends(
        self, parts: Parts, call: Call, source: Tensor, fork: bool
    ) -> tuple[Tensor, Tensor]:
        """Compute the heads of ``source`` side by side, attended; and ``source`` again."""
        query, key, value, through = self._heads(parts, call, source, fork)
        return self._attended(parts, call, query, key, value), through

    def _attended(self, parts: Parts, call: Call, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend; return heads side by side."""
        own = self._form.own
        if own is not None:
            return own.attended(parts.attention, q, k, v, call.mask, call.others).flatten(-2)
        heads, _ = attention(
            parts.attention,
            q,
            k,
            v,
            call.mask,
            dropout=self._form.weights_dropout(parts),
            scaling=self._scaling(parts.attention),
            **self._settings(parts.attention, call.others),
        )
        return heads.flatten(-2)

    def _heads(
        self, parts: Parts, call: Call, source: Tensor, fork: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Compute query, key and value ``[batch, heads, length, dim]``; and ``source`` again."""
        dim = getattr(parts.attention, self._form.head_dim)
        query, x = linear(source, parts.query.weight, parts.query.bias, fork=fork)
        if parts.key is None or parts.value is None:
            q, k, v = self._split(parts, [query], dim)
        else:
            key, x = linear(x, parts.key.weight, parts.key.bias, fork=fork)
            value, x = linear(x, parts.value.weight, parts.value.bias, fork=fork)
            if self._form.norms_all_heads and parts.query_norm is not None:
                query, key = parts.query_norm(query), parts.key_norm(key)
            q, k, v = self._split(parts, [query, key, value], dim)
            if parts.value_norm is not None:
                v = parts.value_norm(v.transpose(1, 2)).transpose(1, 2)
        q, k = turned(self._form, parts, q, k, call.rotary, call.others)
        return q, k, v, x

    def _split(self, parts: Parts, products: list[Tensor], dim: int) -> Iterator[Tensor]:
        """Yield query, key and value ``[batch, heads, length, dim]``, of one product or three."""
        rows = products[0].shape[:-1]
        if len(products) == 3:
            products = [one.view(*rows, -1, dim) for one in products]
        elif self._form.goes_by_head(parts.attention):
            products = list(products[0].view(*rows, -1, 3, dim).unbind(-2))
        else:
            heads = products[0].view(*rows, -1, dim)
            queries = parts.out.weight.shape[1] // dim
            keys = (heads.shape[-2] - queries) // 2
            products = list(torch.split(heads, [queries, keys, keys], -2))
        return (one.transpose(1, 2) for one in products)

    def _block(self, parts: Parts, x: Tensor, fork: bool) -> tuple[Tensor, Tensor | None, Tensor]:
        """Compute the feed-forward block, the bias still to be added, and ``x`` again."""
        if parts.block is not None:
            return self._block_called(parts, x), None, x
        name = activation_name(parts.activation)
        if not self._gates(parts):
            products = weights_and_biases(parts.linear1, parts.linear2)
            p = probability(parts.hidden_dropout, self)
            activation = parts.activation if name is None else name
            block = FeedForward._make((*products, activation, p, False))
            return feed_forward(x, block, fork=fork)
        hidden, x = self._gated(parts, x, name, fork)
        return *project(hidden, parts.linear2), x

    def _gates(self, parts: Parts) -> bool:
        """Return whether the feed-forward block is gated."""
        return self._form.is_gated or parts.gate is not None

    def _gated(self, parts: Parts, x: Tensor, name: Any, fork: bool) -> tuple[Tensor, Tensor]:
        """Compute what the block's second product reads, and ``x`` again."""
        dropout, by_aten = self._dropout_of(parts.hidden_dropout), chosen_backend(x) == "torch"
        if parts.gate is not None and (name is None or by_aten):
            first, x = linear(x, parts.gate.weight, parts.gate.bias, fork=fork)
            second, x = linear(x, parts.linear1.weight, parts.linear1.bias, fork=fork)
            return dropout(parts.activation(first) * second), x
        weight, bias = joint(parts)
        # ATen adds the bias for free within the product.
        before, x = linear(x, weight, bias if by_aten else None, fork=fork)
        bias = None if by_aten else bias
        if name is None:
            first, second = (before if bias is None else before + bias).chunk(2, -1)
            return dropout(parts.activation(first) * second), x
        p, training = dropout.p, dropout.training
        return functional.gated_activation(before, bias, name, p=p, training=training), x

    def _dropout_of(self: Any, dropout: Any) -> nn.Dropout:
        """Return a module for ``dropout``, which may be a setting of this layer."""
        if isinstance(dropout, nn.Dropout):
            return dropout
        p = probability(dropout, self)
        return nn.Dropout(p) if p else _NO_DROPOUT

    def _to_call(self, dropout: Any) -> Any:
        """Return what stands at the place of a dropout, whatever its class."""
        return dropout if isinstance(dropout, nn.Module) else self._dropout_of(dropout)

    def _settings(self, module: Any, others: dict[str, Any]) -> dict[str, Any]:
        """Return what attention is given besides; of the arguments that the layer was given."""
        form = self._form
        own: dict[str, Any] = {}
        if form.window is not None:
            own["sliding_window"] = _window(module, form.window)
        if form.softcap is not None:
            own["softcap"] = getattr(module, form.softcap)
        if form.sinks is not None:
            own["s_aux"] = getattr(module, form.sinks)
        if form.is_causal is not None:
            own["is_causal"] = form.is_causal
        bias = others.get("position_bias")
        if bias is not None and bias.dim() == 2:  # a table of biases by distance
            own.update(position_bias=None, relative_bias=bias)
        return {**others, **own}

    def _scaling(self, module: Any) -> float:
        form = self._form
        found = getattr(module, form.head_dim) ** -0.5
        return float(found if form.scaling is None else getattr(module, form.scaling))

    def _one_node(self, parts: Parts, call: Call) -> Tensor | None:
        """Compute the steps as one node of autograd; return None where that cannot be."""
        return one_node(self, parts, call)

    @classmethod
    def fused_as(cls, layer: Any) -> str:
        """Say in the report how ``layer`` is computed."""
        norms_first = cls._form.puts_norms_first(layer)
        steps = "fused steps, norms first" if norms_first else "four fused steps"
        if cls._form.block is not None:
            steps = f"{steps}, around its own feed-forward"
        return f"{steps}, with attention" if cls._form.attends_itself else steps

    @classmethod
    def refuses(cls, layer: Any) -> str:
        """Say why ``layer`` cannot be fused; empty if it can."""
        names = cls._arguments
        form = cls._form
        wanted = {"hidden_states", form.mask, form.rotary, form.bounds} - {None}
        if not wanted <= {*names} or names[0] != "hidden_states":
            return "its forward takes other arguments than those of a transformers known here"
        attention = layer.get_submodule(cls._form.attention)
        config = getattr(layer, "config", None) or getattr(attention, "config", None)
        reason = cls._form.own.refuses(attention) if cls._form.own is not None else ""
        if reason:
            return reason
        decodes = "is_decoder", "add_cross_attention"
        if any(getattr(one, name, False) for one in (config, layer) for name in decodes):
            return "it is a decoder's; its attention and norms are fused"
        if getattr(layer, "chunk_size_feed_forward", 0):
            return "chunk_size_feed_forward is set"
        if cls._form.unless is not None:
            try:
                is_set = operator.attrgetter(cls._form.unless)(layer)
            except AttributeError:
                is_set = False
            if is_set:
                return f"its {cls._form.unless.rpartition('.')[2]} is set"
        return ""

    @classmethod
    def is_known(cls, layer: Any) -> bool:
        """Return whether what ``layer`` computes is what its form says."""
        parts = cls._finder.parts(layer)
        if parts is None:
            return False
        weight = parts.last.weight
        x = weight if isinstance(weight, Tensor) else parts.norm2.weight
        return cls._weights_fit(parts) and bool(layer._fits(parts, x))

    @classmethod
    def has_parts(cls, layer: Any) -> bool:
        """Return whether ``layer`` has the children of its form, and calls no others."""
        return cls._finder.parts(layer) is not None

    @classmethod
    def is_plain(cls, layer: Any) -> bool:
        """Return whether the fused steps are what the forward of ``layer`` does."""
        parts = cls._finder.parts(layer)
        return parts is not None and cls.are_plain(parts)

    @classmethod
    def are_plain(cls, parts: Parts) -> bool:
        """Return whether the fused steps do exactly what calling the children would do."""
        return parts.are_plain(cls._form.norms_all_heads)


def _added(mask: Tensor | None, x: Tensor) -> Tensor | None:
    """Return a caller's mask as models add it that attend by themselves: a boolean one as 0 and 1.

    Masks of keys that this library made stay as they are.
    """
    if mask is None or mask.dtype is FULL or mask.is_floating_point():
        return mask
    return mask.to(x.dtype)


def _window(module: Any, where: str | Callable[[Any], Any]) -> Any:
    """Return the window of attention, which stands at a path or is told by a function."""
    if not isinstance(where, str):
        return where(module)
    for name in where.split("."):
        module = getattr(module, name, None)
    return module


def see_packed_rows(layers: Iterable[Any]) -> bool:
    """Return whether layers whose own forward cannot see packed sequences will not need it."""
    return all(
        isinstance(layer, FusedLayer)
        and layer.is_known(layer)
        and (layer.calls_children() or layer.is_plain(layer))
        for layer in layers
    )
