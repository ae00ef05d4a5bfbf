"""Attention on CPU tensors with a backward that normalizes by maxima and sums of its own.

ATen's flash kernels keep one log-sum-exp a query. In float32 it is rounded to 2^-24 of itself, so
that gradients lose digits as scores grow, and where all keys of a query have a finite mask of -1e9
its weights sum to the number of keys. Here the backward takes the softmax of the scores again, some
heads and queries at a time: memory stays linear in the length.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedformer._internal.autocast import autocast_off
from fusedformer.ops._registered import nothing, registered
from fusedformer.ops._shared import no_double_backward
from fusedformer.ops.dropout_aten import dropped_again, kept_factor

# Scores in a chunk: what stays in a core's cache from one product to the next.
CHUNK = 1 << 20


_SETTINGS = "Tensor? mask, Tensor? sinks, Tensor? kept, float scale, bool is_causal, float p"


@registered("chunked_attention", f"(Tensor query, Tensor key, Tensor value, {_SETTINGS}) -> Tensor")
def chunked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
    kept: Tensor | None,
    scale: float,
    is_causal: bool,
    p: float,
) -> Tensor:
    """Output ``[B, H, L, Ev]`` of padded attention; keys have the heads of queries.

    ``mask`` is boolean (True = keep) or added, has no gradient, and broadcasts to ``[B, H, L, S]``.
    Scores are at least float32. With sinks ``[H]`` the forward is computed in chunks too; with
    ``kept``, of uint8 and the shape of the scores, which dropout of probability ``p`` keeps; and
    with an added mask of another dtype than the queries: cast to theirs, it might be finite no
    more.
    """
    own = mask is None or mask.dtype in (torch.bool, query.dtype)
    if sinks is None and kept is None and own:
        output = F.scaled_dot_product_attention(
            query, key, value, mask, is_causal=is_causal, scale=scale
        )
    else:
        q, k, v = (_planes(t) for t in (query, key, value))
        found = torch.empty(*q.shape[:2], v.shape[2], dtype=q.dtype, device=q.device)
        with autocast_off(query):
            for chunk in _chunks(query.shape[0], q, k, mask, sinks, kept, scale, is_causal):
                if chunk.kept is not None:
                    chunk.weights.mul_(chunk.kept)
                found[chunk.rows].baddbmm_(
                    chunk.weights, v[chunk.keys], beta=0, alpha=kept_factor(p)
                )
        output = found.view(*query.shape[:3], -1).to(query.dtype)
    # [B, L, H, Ev] in memory: merging the heads is then a view.
    return output.transpose(1, 2).contiguous().transpose(1, 2)


@chunked_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *settings: Any) -> Tensor:
    batch, heads, length, _ = query.shape
    return query.new_empty(batch, length, heads, value.shape[3]).transpose(1, 2)


@registered(
    "chunked_attention_backward",
    f"(Tensor grad, Tensor query, Tensor key, Tensor value, {_SETTINGS}, bool[] needs) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)
def _chunked_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
    kept: Tensor | None,
    scale: float,
    is_causal: bool,
    p: float,
    needs: list[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of query, key, value and sinks, contiguous; None where ``needs`` says False."""
    q, k, v, dy = (_planes(t) for t in (query, key, value, grad))
    # Causal chunks of the first queries leave out keys that later ones add to.
    new = torch.zeros_like if is_causal else torch.empty_like
    dq = torch.empty_like(q) if needs[0] else None
    dk, dv = new(k) if needs[1] else None, new(v) if needs[2] else None
    dsinks = q.new_zeros(q.shape[0]) if needs[3] and sinks is not None else None
    factor = kept_factor(p)
    nothing_added = q.new_empty(1)  # ignored, as beta is 0
    with autocast_off(query):
        for chunk in _chunks(query.shape[0], q, k, mask, sinks, kept, scale, is_causal):
            own, seen = dy[chunk.rows], min(chunk.rows[1].start, 1)
            if dv is not None:
                weights = chunk.weights
                if chunk.kept is not None:
                    weights = weights * chunk.kept
                dv[chunk.keys].baddbmm_(weights.transpose(1, 2), own, beta=seen, alpha=factor)
            if dq is None and dk is None and dsinks is None:
                continue
            turned = v[chunk.keys].transpose(1, 2)
            dweights = torch.baddbmm(nothing_added, own, turned, beta=0, alpha=factor)
            if chunk.kept is not None:
                dweights.mul_(chunk.kept)
            if dsinks is not None and chunk.sinks is not None:
                delta = torch.linalg.vecdot(dweights, chunk.weights)
                dsinks[chunk.rows[0]] -= torch.linalg.vecdot(delta, chunk.sinks)
            dscores = torch.ops.aten._softmax_backward_data(
                dweights, chunk.weights, -1, dweights.dtype
            )
            if dq is not None:
                dq[chunk.rows].baddbmm_(dscores, k[chunk.keys], beta=0, alpha=scale)
            if dk is not None:
                dk[chunk.keys].baddbmm_(
                    dscores.transpose(1, 2), q[chunk.rows], beta=seen, alpha=scale
                )
    found = zip((dq, dk, dv), (query, key, value), strict=True)
    grads = [None if g is None else g.view(t.shape).to(t.dtype) for g, t in found]
    if dsinks is not None and sinks is not None:
        dsinks = dsinks.view(query.shape[:2]).sum(0).to(sinks.dtype)
    return *grads, dsinks


@_chunked_backward.register_fake
def _(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *settings: Any) -> tuple[Any, ...]:
    wanted = zip((query, key, value, settings[1]), settings[-1], strict=True)
    return tuple(
        nothing(query) if t is None or not need else t.new_empty(t.shape) for t, need in wanted
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:6])
    ctx.settings = inputs[6:]


def _autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    tensors, needs = ctx.saved_tensors, [*ctx.needs_input_grad[:3], ctx.needs_input_grad[4]]
    if torch._C._are_functorch_transforms_active() or torch.is_grad_enabled():
        found = _differentiable_gradients(grad, *tensors, *ctx.settings)
    else:
        found = _chunked_backward(grad, *tensors, *ctx.settings, needs)
    dq, dk, dv, dsinks = (g if need else None for g, need in zip(found, needs, strict=True))
    return dq, dk, dv, None, dsinks, *(None,) * 4


chunked_attention.register_autograd(_autograd, setup_context=_setup)
_chunked_backward.register_autograd(no_double_backward("attention"))


class _Chunk(NamedTuple):
    """Some queries of some planes ``[sequence and head]``."""

    rows: tuple[slice, slice]  # of queries and outputs
    keys: tuple[slice, slice]  # that any of them sees
    weights: Tensor  # [planes, queries, keys]
    sinks: Tensor | None  # [planes, queries], the weights of the sinks
    kept: Tensor | None  # like the weights, in their dtype: 1 where dropout keeps them


def _planes(tensor: Tensor) -> Tensor:
    """``[B * H, n, d]``, contiguous and at least float32."""
    wide = torch.promote_types(tensor.dtype, torch.float32)
    return tensor.to(wide).contiguous().flatten(0, 1)


def _chunks(
    batch: int,
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
    kept: Tensor | None,
    scale: float,
    is_causal: bool,
) -> Iterator[_Chunk]:
    """All of the scores, part by part; ``query`` and ``key`` are planes of ``batch`` sequences."""
    heads, n_queries, n_keys = query.shape[0] // batch, query.shape[1], key.shape[1]
    length = max(1, min(n_queries, CHUNK // n_keys))
    some = max(1, CHUNK // (length * n_keys))
    nothing = query.new_empty(1)  # ignored, as beta is 0
    for b, h in itertools.product(_slices(batch, some // heads), _slices(heads, some)):
        plane = slice(b.start * heads + h.start, (b.stop - 1) * heads + h.stop)
        for rows in _slices(n_queries, length):
            keys = slice(0, min(rows.stop, n_keys) if is_causal else n_keys)
            turned = key[plane, keys].transpose(1, 2)
            scores = torch.baddbmm(nothing, query[plane, rows], turned, beta=0, alpha=scale)
            own_mask = None
            if is_causal:
                shape = 1, 1, rows.stop - rows.start, keys.stop
                own_mask = scores.new_ones(shape, dtype=torch.bool).tril_(rows.start)
            elif mask is not None:
                place = zip(mask.shape, (b, h, rows, keys), strict=True)
                own_mask = mask[tuple(part if n > 1 else slice(None) for n, part in place)]
            by_head = scores.view(b.stop - b.start, -1, *scores.shape[1:])
            own_sinks = None if sinks is None else sinks[h]
            weights, of_sinks = _weights(by_head, own_mask, own_sinks)
            of_sinks = None if of_sinks is None else of_sinks.flatten(0, 1)
            own_kept = None
            if kept is not None:
                own_kept = kept.flatten(0, 1)[plane, rows, keys].to(weights.dtype)
            yield _Chunk((plane, rows), (plane, keys), weights.flatten(0, 1), of_sinks, own_kept)


def _slices(length: int, size: int) -> Iterator[slice]:
    size = max(size, 1)
    return (slice(i, min(i + size, length)) for i in range(0, length, size))


def _weights(
    scores: Tensor, mask: Tensor | None, sinks: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Softmax of ``scores`` ``[b, h, l, s]``, whose memory it takes; 0 where nothing is seen.

    And the weights ``[b, h, l]`` of ``sinks`` ``[h]``, which are in its sums.
    """
    if mask is not None and mask.dtype == torch.bool:
        scores.masked_fill_(~mask, -torch.inf)
    elif mask is not None:
        scores += mask
    if sinks is not None:
        scores = _with_sinks(scores, sinks)
    weights = scores.softmax(-1)
    if mask is not None and (nothing := sees_nothing(mask)).any():
        weights.masked_fill_(nothing, 0.0)
    return (weights, None) if sinks is None else (weights[..., :-1], weights[..., -1])


def _with_sinks(scores: Tensor, sinks: Tensor) -> Tensor:
    """``[b, h, l, s + 1]``: sinks ``[h]`` as one more key."""
    column = sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:3], 1)
    return torch.cat((scores, column), -1)


def sees_nothing(mask: Tensor) -> Tensor:
    """Which queries ``[..., L, 1]`` a mask shows no key."""
    hidden = ~mask if mask.dtype == torch.bool else mask == -torch.inf
    return hidden.all(-1, keepdim=True)


def _differentiable_gradients(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
    kept: Tensor | None,
    scale: float,
    is_causal: bool,
    p: float,
) -> tuple[Tensor | None, ...]:
    """The same in one chunk, nothing in place: of a batch of gradients (torch.vmap), or twice."""
    wide = torch.promote_types(query.dtype, torch.float32)
    q, k, v, dy = (t.to(wide) for t in (query, key, value, grad))
    scores, dweights = q @ k.transpose(-2, -1) * scale, dy @ v.transpose(-2, -1)
    if is_causal:
        mask = q.new_ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()[None, None]
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -torch.inf)
    elif mask is not None:
        scores = scores + mask
    if sinks is not None:
        scores = _with_sinks(scores, sinks)
    if mask is None:
        weights = scores.softmax(-1)
    else:  # 0 before, too: the gradient of the softmax would be NaN
        nothing = sees_nothing(mask)
        weights = scores.masked_fill(nothing, 0.0).softmax(-1).masked_fill(nothing, 0.0)
    of_sinks, weights = weights[..., k.shape[2] :], weights[..., : k.shape[2]]
    left = weights
    if kept is not None:
        left, dweights = (dropped_again(each, kept, p) for each in (weights, dweights))
    delta = (dweights * weights).sum(-1, keepdim=True)
    dscores = weights * (dweights - delta) * scale
    found = dscores @ k, dscores.transpose(-2, -1) @ q, left.transpose(-2, -1) @ dy
    dq, dk, dv = (g.to(t.dtype) for g, t in zip(found, (query, key, value), strict=True))
    return dq, dk, dv, None if sinks is None else -(of_sinks * delta).sum((0, 2, 3)).to(sinks.dtype)
