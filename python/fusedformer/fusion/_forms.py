"""Descriptions of layers and models: where each keeps its products, norms and activation.

A :class:`Form` and a :class:`Model` are all that is written down of a family, see ``_families.py``.
How such layers are computed stands once, in ``_layers.py``, and how models are packed once, in
``_packed_model.py``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fusedformer.fusion._hooks import is_untouched
from fusedformer.fusion._norms import epsilon, is_plain_norm, is_rms
from fusedformer.fusion._seen import Seen
from fusedformer.nn.children import are_plain, dropout_probability, is_plain


class OwnAttention(Protocol):
    """Attention that is not among those of transformers' functions, by a family's own rules."""

    def refuses(self, module: Any) -> str:
        """Say why layers that attend by ``module`` cannot be fused; empty if they can."""

    def takes(self, given: dict[str, Any]) -> bool:
        """Return whether a layer's arguments are such as it can attend by."""

    def attended(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        others: dict[str, Any],
    ) -> Tensor:
        """Attend; of ``[batch, heads, length, dim]`` return ``[batch, length, heads, dim]``."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Form:
    """Where layers of a class keep what they compute with: paths below the layer.

    A path may lead to a module, a function or a number; None says that there is nothing of it, as
    does a path to nothing. ``a|b`` is the first of two names that there is. All modules that paths
    lead through must do no more than call those at their ends.
    """

    attention: str  # whose attributes are the settings below
    query: str  # the product of the query; without ``key``, that of query, key and value in one
    key: str | None = None
    value: str | None = None
    by_head: bool | Callable[[Any], bool] = False  # that one product has those of a head side by
    # side, or the function of attention that tells
    out: str
    norm1: str | None  # in the order of the computation
    norm2: str | None
    linear1: str | None  # of the feed-forward block; its second half gates the first if
    # ``is_gated``
    gate: str | None = None  # a product whose activated result gates that of ``linear1``
    activation: str | Callable[[Tensor], Tensor] | None  # or the function itself
    linear2: str | None
    block: str | None = None  # in place of these four: what computes the block, of each token by
    # itself, as experts do; it is called as it is
    attention_dropout: str | None = None  # of weights
    drops_by: Callable[[Any], float | None] | None = None  # or, of attention that does not look
    # there, the probability in its mode; None if it looks
    dropout1: str | None = None  # of what attention adds
    hidden_dropout: str | None = None  # behind the activation
    dropout2: str | None = None  # of what the feed-forward block adds
    out_norm: str | None = None  # of what attention adds
    block_norm: str | None = None  # of what the feed-forward block adds
    drops_normed: bool = False  # dropouts stand behind these two
    query_norm: str | None = None  # of each head
    key_norm: str | None = None
    value_norm: str | None = None
    norms_all_heads: bool = False  # the first two are of all heads of a token at once
    buckets: str | None = None  # biases of distances by T5's buckets, which the next layer gets too
    max_distance: str = "relative_attention_max_distance"  # of attention: the last bucket's first
    scale1: str | None = None  # of what attention adds: a parameter for each column (LayerScale),
    scale2: str | None = None  # or a number; the second is of what the feed-forward block adds
    depth: str | None = None  # drops what either adds, for whole sequences (stochastic depth)
    divisor: str | None = None  # a number by which what either adds is divided
    logit_scale: str | None = None  # scores are cosines, times its exponential

    mask: str | None = "attention_mask"  # the argument of the layer; None: its class names none
    bounds: str | None = None  # the argument that tells where sequences begin, of states that are
    # rows ``[total, width]`` of all of them
    position_bias: Callable[[Any, dict[str, Any]], Tensor | None] | None = None
    # made by a layer of its arguments, and added to the mask; it takes those from them

    adapter: Callable[[Any, Tensor, dict[str, Any]], Tensor] | None = None
    # what a layer makes of its last sum, by its other arguments

    norms_first: bool | str = False  # or the attribute of a layer that says so
    parallel: bool | str = False  # or that attribute: both blocks read the input of the layer
    depth_of_attention: bool = False  # ``depth`` drops nothing of the feed-forward block
    is_gated: bool = False
    rotary: str | None = None  # the argument of the layer with cosines and sines
    rotary_last: bool = False  # the first tokens have no angles, as those before patches
    rotary_in_one: bool = False  # it is one tensor, sines first
    angles: str = "twice"  # the tables have each angle twice, the second time behind all others; or
    # "pairs": the second time beside it; or "once"
    learned_angles: bool = False  # they get gradients
    interleaved: bool = False  # pairs of columns are neighbours
    turns: Callable[[Any], bool] | None = None  # whether attention turns by them, which it may not
    query_scale: Callable[[Any, dict[str, Any]], Tensor] | None = None
    # factors of turned queries, by attention and the arguments of the layer
    head_dim: str = "attention_head_size"
    scaling: str | None = "scaling"  # None: one over the root of ``head_dim``
    softcap: str | None = None
    sinks: str | None = None  # a score of each head that takes its part and adds no value
    window: str | Callable[[Any], int | tuple[int, int] | None] | None = None
    # keys at smaller distances are seen; or the farthest that are, before and behind
    is_causal: bool | None = None  # None: as attention says
    attends_itself: bool = False  # it asks transformers for no attention
    hands_on: bool = True  # its own attention sees of packed sequences what this form says
    own: OwnAttention | None = None  # attends in place of :func:`attention`, where models pack
    gates_bias: bool = False  # each head and query gates them, see ``_gated_bias.py``
    is_windowed: bool = False  # tokens of an image attend within windows, see ``_windows.py``
    is_divided: bool = False  # patches of videos attend over time and space, see ``_divided.py``
    returns_tuple: bool = False
    returns_weights: bool = False  # with the states: None unless they are asked for
    returns_bias: bool = False  # with the states, for the next layer
    clamps_half: bool = False  # float16 has steps of its own
    unless: str | None = None  # an attribute; where true the layer computes otherwise

    def puts_norms_first(self, layer: Any) -> bool:
        """Return whether ``layer`` norms before attention and the feed-forward block."""
        first = self.norms_first
        return bool(getattr(layer, first)) if isinstance(first, str) else first

    def goes_by_head(self, attention: Any) -> bool:
        """Return whether the one product of ``attention`` has those of a head side by side."""
        return self.by_head if isinstance(self.by_head, bool) else self.by_head(attention)

    def is_parallel(self, layer: Any) -> bool:
        """Return whether the feed-forward block of ``layer`` does not wait for attention."""
        both = self.parallel
        return bool(getattr(layer, both)) if isinstance(both, str) else both

    def weights_dropout(self, parts: Parts) -> float:
        """Return the probability with which weights are dropped.

        Attention that is asked of transformers never calls a dropout: it reads ``p``, in its own
        mode.
        """
        dropout, attention = parts.attention_dropout, parts.attention
        p = None if self.drops_by is None else self.drops_by(attention)
        if p is not None:
            return p if attention.training else 0.0
        if isinstance(dropout, nn.Dropout) and not self.attends_itself:
            dropout = dropout.p
        return probability(dropout, attention)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Composed:
    """What the forward of a model calls besides ``embeddings`` and ``pooler``, by paths."""

    embeds: tuple[str, ...] = ("input_ids", "token_type_ids", "position_ids", "inputs_embeds")
    embeds_mask: str | None = None  # the argument of ``embeddings`` that zeros padding
    before: str | None = None  # between embeddings and layers
    behind: str | None = None
    last: str | None = None  # the same of the last states alone, not of all that are asked for
    angles: str | None = None  # makes what layers take as ``rotary``
    buckets: str | None = None  # biases of distances by T5's buckets, for all layers
    distances: str | None = None  # makes what layers take as ``rel_embeddings``; then attention
    # has no mask of keys of packed sequences, and padding sees nothing
    conv: str | None = None  # of embeddings and a mask, added to what the first layer computes
    unless: str | None = None  # an attribute; where true the model computes otherwise
    output: str = "BaseModelOutputWithPoolingAndCrossAttentions"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tower:
    """How texts are pooled in a dual encoder whose tower has CLIP's children."""

    end: Callable[[Any, Tensor], Tensor] | None  # of model and ids: the column that is pooled;
    # None: the mean of all real tokens
    is_causal: bool = True
    norm: str = "final_layer_norm"
    if_padded: bool = False  # masks that hide no token are not causal, as ``sdpa`` gets none then
    head: str | None = None  # a product of what is pooled


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """What must be known of a model to give it the real tokens of a batch alone."""

    behind_padding: bool = False  # positions begin behind the id of padding, as RoBERTa's do
    embeds_padded: bool = False  # its embeddings look at whole sequences, and at the mask
    has_distances: bool = False  # attention counts the positions between two tokens
    pools_first_token: bool = False  # its pooler is a product of the first token, then activated
    first_is_read: bool = False  # it is computed padded if a sequence begins with padding, as
    # states of 0 there would be divided by their norm
    is_causal: bool | None = None  # what its attention leaves to the mask
    layers: str | None = None  # where these must all be known, as their own forward cannot pack
    composed: Composed | None = None  # where its layers cannot be told of packed sequences
    tower: Tower | None = None  # where it is one of a dual encoder's
    positions: Callable[[Any, dict[str, Any]], Tensor] | None = None
    # of an encoder with BART's children: the embeddings of positions, see ``_positions.py``
    counts_real: bool = False  # positions count the real tokens of a row alone
    caches: bool = False  # it returns a cache, unless it is told otherwise
    masks_by_type: bool = False  # it takes a dictionary of masks by the type of layers
    masks_causally: bool = False  # it makes causal masks, whatever attention says of itself
    masks_by_positions: bool = False  # these leave out pairs of sequences in a row, if positions
    # begin anew
    full_by: str | None = None  # a setting of its configuration; where true they are not causal
    of_sequences: tuple[str, ...] = ()  # arguments ``[batch]``, which each token gets
    padded_by: tuple[str, ...] = ()  # arguments with which it needs the batch


class Parts(NamedTuple):
    """What the paths of a :class:`Form` lead to, in a layer."""

    attention: Any
    query: nn.Linear
    key: nn.Linear | None
    value: nn.Linear | None
    out: nn.Linear
    norm1: Any
    norm2: Any
    linear1: Any
    gate: nn.Linear | None
    activation: Any
    linear2: Any
    block: Any
    attention_dropout: Any
    dropout1: Any
    hidden_dropout: Any
    dropout2: Any
    out_norm: Any
    block_norm: Any
    query_norm: Any
    key_norm: Any
    value_norm: Any
    buckets: nn.Embedding | None
    scale1: Any
    scale2: Any
    depth: nn.Module | None
    divisor: float | None
    logit_scale: Any

    @property
    def last(self) -> Any:
        """Return the last product whose weight is known."""
        return self.out if self.linear2 is None else self.linear2

    def norms(self) -> tuple[Any, ...]:
        """Return the norms of tokens and heads."""
        return (
            self.norm1, self.norm2, self.out_norm, self.block_norm, self.query_norm, self.key_norm,
            self.value_norm,
        )  # fmt: skip

    def are_plain(self, norms_all_heads: bool) -> bool:
        """Return whether the fused steps do exactly what calling these children would do."""
        products = self.query, self.key, self.value, self.out, self.linear1, self.gate, self.linear2
        linears: list[Any] = [one for one in products if one is not None]
        dropouts = self.attention_dropout, self.dropout1, self.hidden_dropout, self.dropout2
        return (
            are_plain(
                [one for one in linears if type(one) is not Transposed],
                (),
                [one for one in dropouts if not _drops_nothing(one)],
            )
            and all(is_plain(one.own, Conv1D) for one in linears if type(one) is Transposed)
            and all(one is None or is_plain_norm(one) for one in self.norms())
            and self.agree(norms_all_heads)
            and (not isinstance(self.activation, nn.Module) or is_untouched(self.activation))
            and (self.depth is None or is_untouched(self.depth))
        )

    def agree(self, norms_all_heads: bool) -> bool:
        """Return whether what is computed at once has the same settings."""
        return (norms_all_heads or self._heads_are_normed_alike()) and (
            self.gate is None or (self.gate.bias is None) == (self.linear1.bias is None)
        )

    def weights_are_plain(self) -> bool:
        """Return whether attention calls its dropout and biases by distance for nothing more."""
        dropout, buckets = self.attention_dropout, self.buckets
        return (_drops_nothing(dropout) or is_plain(dropout, nn.Dropout)) and (
            buckets is None or is_table(buckets)
        )

    def _heads_are_normed_alike(self) -> bool:
        """Return whether one kernel can norm heads of queries and keys."""
        norms = self.query_norm, self.key_norm
        if norms == (None, None):
            return True
        alike = all(map(is_rms, norms)) or not any(map(is_rms, norms))
        return alike and epsilon(norms[0]) == epsilon(norms[1])


class Transposed:
    """A Conv1D of transformers as the linear layer that computes the same."""

    def __init__(self, own: Any) -> None:
        self.own = own
        self.weight: Tensor = own.weight.t()
        self.bias: Tensor = own.bias
        self._parameters = {"weight": self.weight, "bias": self.bias}


def probability(dropout: Any, module: Any) -> float:
    """Return the probability with which ``dropout`` drops, a module or a setting of ``module``."""
    if isinstance(dropout, nn.Dropout):
        return dropout_probability(dropout)
    return float(dropout) if isinstance(dropout, (float, int)) and module.training else 0.0


def is_table(module: Any) -> bool:
    """Return whether looking rows up in its weight is all that ``module`` does."""
    return type(module).forward is nn.Embedding.forward and is_untouched(module)


def _drops_nothing(dropout: Any) -> bool:
    return dropout is None or isinstance(dropout, (float, int)) or is_plain(dropout, nn.Identity)


class Finder:
    """Finds the parts of layers by a form; each module on the way is looked up once a call."""

    def __init__(self, form: Form) -> None:
        """Write down the steps of the way: the index of a module found before, and a name."""
        self._steps: list[tuple[int, str, list[str]]] = []
        known = {"": 0}
        paths = [getattr(form, field) for field in Parts._fields]
        self._constants = {i: one for i, one in enumerate(paths) if callable(one)}
        paths = [None if callable(one) else one for one in paths]
        for path in filter(None, paths):
            names = path.split(".")
            for depth in range(1, len(names) + 1):
                inner, outer = ".".join(names[:depth]), ".".join(names[: depth - 1])
                if inner not in known:
                    *others, last = names[depth - 1].split("|")
                    self._steps.append((known[outer], last, others))
                    known[inner] = len(self._steps)
        self._parts = [-1 if path is None else known[path] for path in paths]
        holders = {index for index, *_ in self._steps} | {known[form.attention]}
        self._holders = sorted(holders - {0})
        norms = "query_norm", "key_norm"
        self._norms = [Parts._fields.index(one) for one in norms if getattr(form, one) is not None]

    def seen(self, layer: nn.Module, parts: Parts, found: Any) -> Seen | None:
        """Return what keeps ``found``, which follows from ``parts`` of ``layer``, if that can be.

        A Conv1D is a part by views of its weights, which may be others by the next call.
        """
        reached = self._reached(layer)
        if reached is None or any(type(one) is Transposed for one in parts):
            return None
        settings = []
        for (index, name, others), value in zip(self._steps, reached[1:], strict=True):
            own = reached[index].__dict__
            inside = own["_modules"]
            if name in inside or any(other in inside for other in others):
                continue
            place = own["_parameters"] if name in own["_parameters"] else own
            if place.get(name) is not value:  # a property, say
                return None
            settings.append((place, name, value))
        return Seen.of(layer, found, settings)

    def parts(self, layer: nn.Module) -> Parts | None:
        """Return the parts, if calling them by the form is what the forward of ``layer`` does."""
        found = self._reached(layer)
        if found is None:
            return None
        home = type(layer).__module__
        for index in self._holders:
            holder = found[index]
            is_theirs = type(holder).__module__ == home or type(holder) is nn.ModuleList
            if not is_theirs or not is_untouched(holder):
                return None
        found.append(None)  # which paths to nothing lead to
        reached = [found[index] for index in self._parts]
        reached = [Transposed(one) if type(one) is Conv1D else one for one in reached]
        for index, constant in self._constants.items():
            reached[index] = constant
        for index in self._norms:
            reached[index] = None if is_plain(reached[index], nn.Identity) else reached[index]
        return Parts._make(reached)

    def _reached(self, layer: nn.Module) -> list[Any] | None:
        """Return what all steps lead to, the layer first; None if one is not from a module."""
        found: list[Any] = [layer]
        for index, name, others in self._steps:
            holder = found[index]
            if not isinstance(holder, nn.Module):
                return None
            inside = holder.__dict__["_modules"]
            for other in others:
                if other in inside:
                    name = other
                    break
            found.append(inside[name] if name in inside else getattr(holder, name, None))
        return found
