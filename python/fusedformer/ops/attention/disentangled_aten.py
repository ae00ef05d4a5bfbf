"""Disentangled attention as a composition of ATen calls, some heads of one sequence at a time.

Scores are in memory for some heads of one sequence alone: the backward computes them again.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedformer._internal.autocast import autocast_off
from fusedformer.ops._registered import nothing, registered
from fusedformer.ops._shared import no_double_backward
from fusedformer.ops.attention.chunks import CHUNK
from fusedformer.ops.dropout_aten import drop_again_in_place, drop_in_place, dropout_aten
from fusedformer.ops.relative_position import distance_buckets

INPUTS = 5  # tensors that may require a gradient
SETTINGS = (
    "int max_distance, Tensor? key_mask, Tensor? starts_q, Tensor? starts_k, Tensor? seed, "
    "SymInt max_queries, SymInt max_keys, float p, float scale"
)


class Settings(NamedTuple):
    """What a call has besides the tensors that may require a gradient."""

    max_distance: int  # 0: no logarithmic buckets
    key_mask: Tensor | None  # boolean [B, S], True = keep; padded form only
    starts_q: Tensor | None  # integer [sequences + 1] of the packed form
    starts_k: Tensor | None
    seed: Tensor | None  # int64 [1] of the dropout mask
    max_queries: int  # of a sequence of the packed form, or a bound on it
    max_keys: int
    p: float
    scale: float


class Inputs(NamedTuple):
    """Tensors, or their gradients; a position term that a call lacks is None."""

    query: Any  # [B, H, L, E], packed [1, H, tokens, E]
    key: Any  # [B, H, S, E]
    value: Any
    position_key: Any  # [H, 2 * span, E]
    position_query: Any


class _Places(NamedTuple):
    """Where position terms of a sequence's scores are in products with a range of buckets."""

    buckets: slice  # that distances in this sequence have
    of_queries: Tensor  # [1, L * S]: into [L, buckets]
    of_keys: Tensor  # [1, L * S]: into [S, buckets]


class _Part(NamedTuple):
    """Some heads of one sequence."""

    sequence: int
    heads: slice
    queries: slice
    keys: slice
    places: _Places
    hidden: Tensor | None  # [S]: keys to leave out
    sees_nothing: Tensor | None  # []: whether that would be all of them


def composed(inputs: Inputs, settings: Settings) -> Tensor:
    """Compute the output ``[B, H, L, Ev]``; differentiable as often as wanted."""
    query, _, value, *_ = inputs
    if not query.numel() or not value.numel():
        nothing = sum(x.sum() for x in inputs if x is not None) * 0.0
        return value.new_zeros(*query.shape[:3], value.shape[3]) + nothing
    rows: list[Tensor] = []
    with _seeded(settings.seed, query), autocast_off(query):
        by_rows = itertools.groupby(_parts(inputs, settings), lambda p: (p.sequence, p.queries))
        for _, parts in by_rows:
            heads = [_attended(_of_part(inputs, part), part, settings) for part in parts]
            rows.append(torch.cat(heads))
    output = torch.stack(rows) if settings.starts_q is None else torch.cat(rows, 1)[None]
    return output.to(value.dtype)


def _attended(own: Inputs, part: _Part, settings: Settings) -> Tensor:
    weights = dropout_aten(_weights(own, part, settings), settings.p)
    return weights @ own.value


def _parts(inputs: Inputs, settings: Settings) -> Iterator[_Part]:
    """List the parts in the order in which their dropout is drawn."""
    batch, n_heads, length, _ = inputs.query.shape
    spans = [(b, slice(0, length), slice(0, inputs.key.shape[2])) for b in range(batch)]
    if settings.starts_q is not None and settings.starts_k is not None:
        sides = (itertools.pairwise(x.tolist()) for x in (settings.starts_q, settings.starts_k))
        spans = [(0, slice(*q), slice(*k)) for q, k in zip(*sides, strict=True) if q[0] < q[1]]
    known: dict[tuple[int, int], _Places] = {}
    for b, queries, keys in spans:
        sizes = queries.stop - queries.start, keys.stop - keys.start
        if sizes not in known:
            known[sizes] = _places(inputs, settings.max_distance, *sizes)
        hidden = None if settings.key_mask is None else ~settings.key_mask[b]
        sees_nothing = None if hidden is None else hidden.all()
        some = max(1, CHUNK // max(1, sizes[0] * sizes[1]))
        for first in range(0, n_heads, some):
            heads = slice(first, min(first + some, n_heads))
            yield _Part(b, heads, queries, keys, known[sizes], hidden, sees_nothing)


def _places(inputs: Inputs, max_distance: int, queries: int, keys: int) -> _Places:
    table = inputs.position_key if inputs.position_key is not None else inputs.position_query
    buckets, _ = distance_buckets(table.shape[1] // 2, max_distance, table.device)
    reach = buckets.shape[0] // 2
    if not (queries and keys):
        return _Places(slice(0, 0), *[buckets[None, :0].long()] * 2)
    nearby = torch.arange(1 - keys, queries, device=table.device).clamp(-reach, reach) + reach
    found = buckets[nearby].long()  # of all distances, from the smallest on
    first, last = int(found[0]), int(found[-1])
    # The distances of a query are those of the one before it, moved by one.
    bucket = (found - first).flip(0).unfold(0, keys, 1).flip(0)
    of_queries, of_keys = (
        torch.arange(n, device=table.device) * (last - first + 1) for n in (queries, keys)
    )
    places = (bucket + of_queries[:, None], bucket + of_keys)
    return _Places(slice(first, last + 1), *(x.reshape(1, -1) for x in places))


def _of_part(inputs: Inputs, part: _Part) -> Inputs:
    """Return the inputs of some heads of one sequence, at least float32."""
    wide = torch.promote_types(inputs.query.dtype, torch.float32)
    query, key, value, *tables = inputs
    query = query[part.sequence, part.heads, part.queries].to(wide)
    key, value = (x[part.sequence, part.heads, part.keys].to(wide) for x in (key, value))
    nearby = (None if x is None else x[part.heads, part.places.buckets].to(wide) for x in tables)
    return Inputs(query, key, value, *nearby)


def _weights(own: Inputs, part: _Part, settings: Settings) -> Tensor:
    """Compute the softmax ``[heads, L, S]`` of a part's scores; 0 where nothing is seen."""
    weights = _scores(own, part, settings).softmax(-1)
    return weights if part.sees_nothing is None else weights.masked_fill(part.sees_nothing, 0.0)


def _scores(own: Inputs, part: _Part, settings: Settings) -> Tensor:
    """Compute the scaled scores ``[heads, L, S]`` of a part."""
    query, key, _, position_key, position_query = own
    scores = query @ key.transpose(1, 2)
    for rows, table, places in (
        (query, position_key, part.places.of_queries), (key, position_query, part.places.of_keys),
    ):  # fmt: skip
        if table is not None:
            terms = (rows @ table.transpose(1, 2)).flatten(1)
            scores = scores + terms.gather(1, places.expand(len(terms), -1)).view_as(scores)
    scores = scores * settings.scale
    if part.hidden is not None and part.sees_nothing is not None:
        scores = scores.masked_fill(part.hidden & ~part.sees_nothing, -torch.inf)
    return scores


@contextlib.contextmanager
def _seeded(seed: Tensor | None, like: Tensor) -> Iterator[None]:
    """Let torch's generator draw from ``seed`` inside, if there is one."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng([like.device] if like.is_cuda else []):
        torch.manual_seed(int(seed))
        yield


@registered(
    "disentangled_attention_aten",
    schema="(Tensor query, Tensor key, Tensor value, Tensor? position_key, "
    f"Tensor? position_query, {SETTINGS}) -> Tensor",
)  # fmt: skip
def disentangled_attention_aten(*given: Any) -> Tensor:
    """Compute :func:`composed`, and keep no scores for the backward."""
    output = composed(Inputs(*given[:INPUTS]), Settings(*given[INPUTS:]))
    return output.transpose(1, 2).contiguous().transpose(1, 2)


@disentangled_attention_aten.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *others: Any) -> Tensor:
    return output_like(query, value)


def output_like(query: Tensor, value: Tensor) -> Tensor:
    """Make an output without values: heads of a token lie together."""
    batch, heads, length, _ = query.shape
    return query.new_empty(batch, length, heads, value.shape[3]).transpose(1, 2)


@registered(
    "disentangled_attention_aten_backward",
    schema="(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor? position_key, "
    f"Tensor? position_query, {SETTINGS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)  # fmt: skip
def _backward(grad: Tensor, *given: Any) -> tuple[Tensor | None, ...]:
    """Gradients of the inputs; the scores are computed again."""
    inputs, settings = Inputs(*given[:INPUTS]), Settings(*given[INPUTS:])
    wide = torch.promote_types(grad.dtype, torch.float32)
    found = Inputs(*(None if x is None else torch.zeros_like(x, dtype=wide) for x in inputs))
    with _seeded(settings.seed, grad), autocast_off(grad):
        for part in _parts(inputs, settings):
            own, into = _of_part(inputs, part), _of_part(found, part)
            dy = grad[part.sequence, part.heads, part.queries].to(wide)
            _add_gradients(dy, own, into, part, settings)
    pairs = zip(found, inputs, strict=True)
    return tuple(None if g is None else g.to(x.dtype) for g, x in pairs)


def _add_gradients(dy: Tensor, own: Inputs, into: Inputs, part: _Part, settings: Settings) -> None:
    """Add the gradients of a part to ``into``, where it has them as views."""
    weights = _weights(own, part, settings)
    dweights = dy @ own.value.transpose(1, 2)
    dropped = weights
    if settings.p:
        dropped = weights.clone()
        kept = drop_in_place(dropped, settings.p)
        drop_again_in_place(dweights, kept, settings.p)
    into.value.baddbmm_(dropped.transpose(1, 2), dy)
    dscores = torch.ops.aten._softmax_backward_data(dweights, weights, -1, dweights.dtype)
    dscores *= settings.scale
    into.query.baddbmm_(dscores, own.key)
    into.key.baddbmm_(dscores.transpose(1, 2), own.query)
    flat = dscores.flatten(1)
    for rows, table, places, drows, dtable in (
        (own.query, own.position_key, part.places.of_queries, into.query, into.position_key),
        (own.key, own.position_query, part.places.of_keys, into.key, into.position_query),
    ):
        if table is not None:
            dterms = flat.new_zeros(len(flat), rows.shape[1] * table.shape[1])
            dterms.scatter_add_(1, places.expand(len(flat), -1), flat)
            dterms = dterms.view(len(flat), rows.shape[1], table.shape[1])
            drows.baddbmm_(dterms, table)
            dtable.baddbmm_(dterms.transpose(1, 2), rows)


@_backward.register_fake
def _(grad: Tensor, *given: Any) -> tuple[Tensor, ...]:
    return tuple(nothing(grad) if x is None else torch.empty_like(x) for x in given[:INPUTS])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    save(ctx, inputs)


def save(ctx: Any, given: tuple[Any, ...], *more: Tensor) -> None:
    """Save the arguments of an op, and ``more`` tensors."""
    settings = Settings(*given[INPUTS:])
    ctx.save_for_backward(*given[:INPUTS], *settings[1:5], *more)
    ctx.numbers = settings[0], settings[5:]


def load(ctx: Any) -> tuple[Inputs, Settings, tuple[Tensor, ...]]:
    """Load what :func:`save` saved."""
    saved = ctx.saved_tensors
    first, last = ctx.numbers
    settings = Settings(first, *saved[INPUTS : INPUTS + 4], *last)
    return Inputs(*saved[:INPUTS]), settings, saved[INPUTS + 4 :]


def wanted_gradients(ctx: Any, found: Any) -> tuple[Tensor | None, ...]:
    """Return the gradients of all arguments, None for those that are not wanted."""
    needs = ctx.needs_input_grad
    wanted = (g if need else None for g, need in zip(found, needs[:INPUTS], strict=True))
    return (*wanted, *[None] * len(Settings._fields))


def _autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    inputs, settings, _ = load(ctx)
    if not torch.is_grad_enabled():
        return wanted_gradients(ctx, _backward(grad, *inputs, *settings))
    needs = ctx.needs_input_grad[:INPUTS]
    leaves = [x for x, need in zip(inputs, needs, strict=True) if need]
    output = composed(inputs, settings)
    grads = iter(torch.autograd.grad(output, leaves, grad, create_graph=True))
    return wanted_gradients(ctx, [next(grads) if need else None for need in needs])


disentangled_attention_aten.register_autograd(_autograd, setup_context=_setup)
_backward.register_autograd(no_double_backward("compiled disentangled attention"))
