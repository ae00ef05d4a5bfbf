"""Attention as a composition of ATen calls, for CPU tensors and wherever it is asked for.

What ``F.scaled_dot_product_attention`` can express goes to it, with the smallest mask that says
it; a cap on the scores and weights that are asked for need the scores themselves. Packed sequences
of near lengths run as one batch.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

from fusedformer._internal import checks
from fusedformer._internal.autocast import autocast_off
from fusedformer._internal.tracing import is_eager
from fusedformer.ops.attention.chunks import chunked_attention, sees_nothing
from fusedformer.ops.attention.compiled import attention_compiled
from fusedformer.ops.attention.groups import (
    Batches,
    Group,
    batches_of,
    groups_of,
    heads_apart,
    stay_aligned,
)
from fusedformer.ops.attention.terms import AttentionTerms
from fusedformer.ops.dropout_aten import draw_kept, dropout_aten


def attention_aten(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    terms: AttentionTerms,
    *,
    return_lse: bool,
    wide_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """(output, log-sum-exp or None), tensors in the forms of :class:`AttentionTerms`.

    The log-sum-exp is float64 if ``wide_lse``, so that it does not forget the sum.
    """
    if not return_lse:
        compiled = attention_compiled(query, key, value, terms)
        if compiled is not None:
            return compiled, None
    if terms.starts_q is not None and terms.starts_k is not None:
        lengths = terms.starts_q.diff().tolist(), terms.starts_k.diff().tolist()
        output, lse = _packed(query, key, value, terms, *lengths, return_lse)
    else:
        output, lse = _padded(query, key, value, terms, return_lse)
    if lse is not None and not wide_lse:
        lse = lse.to(torch.promote_types(query.dtype, torch.float32))
    return output, lse


def attention_weights_aten(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    terms: AttentionTerms,
    average: bool,
    dtype: torch.dtype,
    *,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(output, log-sum-exp or None, weights ``[B, H, L, S]`` in ``dtype``, or their mean)."""
    key, value = _within_lengths(key, value, terms.key_lengths)
    output, lse, weights = _explicit(query, key, value, terms, return_lse)
    weights = weights.mean(1, keepdim=True) if average else weights
    if lse is not None:
        lse = lse.to(torch.promote_types(query.dtype, torch.float32))
    return output, lse, weights.to(dtype)


def merge_attention_states_aten(
    output1: Tensor, lse1: Tensor, output2: Tensor, lse2: Tensor
) -> tuple[Tensor, Tensor]:
    """See :func:`fusedformer.functional.merge_attention_states`."""
    nothing = (lse1 == -torch.inf) & (lse2 == -torch.inf)
    first, second = (lse.masked_fill(nothing, 0.0) for lse in (lse1, lse2))
    lse = torch.logaddexp(first, second)
    weights = torch.stack((first, second)).sub(lse).exp().masked_fill(nothing, 0.0)[..., None]
    weights = weights.to(torch.promote_types(output1.dtype, torch.float32))
    output = output1 * weights[0] + output2 * weights[1]
    return output.to(output1.dtype), lse.masked_fill(nothing, -torch.inf)


def _padded(
    query: Tensor, key: Tensor, value: Tensor, terms: AttentionTerms, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    key, value = _within_lengths(key, value, terms.key_lengths)
    if terms.scale <= 0:
        # ATen's CPU kernel masks with -inf before it scales, and makes NaN of it by such a factor.
        query = query * (-1.0 if terms.scale < 0 else 0.0)
        terms = terms._replace(scale=-terms.scale or 1.0)
    # Positions times slopes lose their digits in half precision, which one mask would have to be.
    half = query.dtype in (torch.float16, torch.bfloat16)
    by_position = terms.slopes is not None or terms.table is not None
    sunk = terms.sinks is not None
    empty = not (query.numel() and key.numel())
    if (
        terms.softcap is not None
        or return_lse
        or (half and by_position)
        or (sunk and (terms.p or empty))
    ):
        return _explicit(query, key, value, terms, return_lse)[:2]
    keep, added, is_causal = _masks(query, key, terms, may_be_causal=True)
    mask = keep
    if added is not None:
        mask = added if keep is None else added.masked_fill(~keep, -torch.inf)
    dropped = terms.p > 0 and query.device.type == "cpu"
    if not empty and (dropped or sunk or _needs_chunks(query, key, value, mask)):
        tensors = query, key, value, mask, terms.sinks
        may_draw = not dropped or not torch.compiler.is_compiling()
        if _is_plain(*tensors) and (mask is None or not mask.requires_grad) and may_draw:
            key, value = (_shared_by_heads(tensor, query.shape[1]) for tensor in (key, value))
            scores = query.new_empty(()).expand(*query.shape[:3], key.shape[2])
            kept = draw_kept(scores, terms.p) if terms.p else None
            output: Tensor = chunked_attention(
                query, key, value, mask, terms.sinks, kept, terms.scale, is_causal, terms.p
            )
            return output, None
        if dropped and mask is None and not is_causal:
            return _dropped(query, key, value, terms), None
        if sunk or (mask is not None and mask.dtype != torch.bool):
            return _explicit(query, key, value, terms, return_lse)[:2]
    cast = mask if mask is None or mask.dtype == torch.bool else mask.to(query.dtype)
    arguments = (query, key, value, cast, terms.p, is_causal)
    if query.shape[1] != key.shape[1]:  # decided here: ATen takes no symbol for enable_gqa
        output = F.scaled_dot_product_attention(*arguments, scale=terms.scale, enable_gqa=True)
    else:
        output = F.scaled_dot_product_attention(*arguments, scale=terms.scale)
    return output if mask is None else _without_unseen(output, mask), None


def _within_lengths(key: Tensor, value: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    """Both with zeros beyond ``lengths``, where anything may be: even a weight of 0 keeps NaN."""
    if lengths is None:
        return key, value
    beyond = torch.arange(key.shape[2], device=key.device) >= lengths[:, None]
    beyond = beyond[:, None, :, None]
    return key.masked_fill(beyond, 0.0), value.masked_fill(beyond, 0.0)


def _needs_chunks(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """Whether one log-sum-exp a query, as ATen keeps it, is not enough, or a second derivative."""
    added = mask is not None and mask.dtype != torch.bool
    if mask is not None and added and mask.dtype != query.dtype:
        return True
    tensors = (t for t in (query, key, value, mask) if t is not None)
    if not torch.is_grad_enabled() or not any(t.requires_grad for t in tensors):
        return False
    wide = query.dtype in (torch.float32, torch.float64)
    return added or (wide and query.device.type == "cpu")


def _is_plain(*tensors: Tensor | None) -> bool:
    """Whether this is an eager or a compiled call on torch's own tensors, no meta or fake ones."""
    if torch.compiler.is_compiling():
        return all(t is None or type(t) in (Tensor, Parameter) for t in tensors)
    return is_eager() and all(
        t is None or (type(t) in (Tensor, Parameter) and checks.has_values(t)) for t in tensors
    )


def _without_unseen(output: Tensor, mask: Tensor) -> Tensor:
    """``output`` with zeros for queries that see no key: cuDNN gives them something else."""
    nothing = sees_nothing(mask)
    if checks.has_values(nothing) and not nothing.is_cuda and not nothing.any():
        return output
    return output.masked_fill(nothing, 0.0)


def _dropped(query: Tensor, key: Tensor, value: Tensor, terms: AttentionTerms) -> Tensor:
    """Attention with dropout and nothing else, which ATen has no fused kernel for on the CPU."""
    batch, heads = query.shape[:2]
    key, value = (_shared_by_heads(tensor, heads) for tensor in (key, value))
    q, k, v = (tensor.flatten(0, 1) for tensor in (query, key, value))
    nothing = q.new_empty(1)  # ignored, as beta is 0
    scores = torch.baddbmm(nothing, q, k.transpose(1, 2), beta=0, alpha=terms.scale)
    weights = dropout_aten(scores.softmax(-1), terms.p)
    return torch.unflatten(weights @ v, 0, (batch, heads))


def _shared_by_heads(tensor: Tensor, heads: int) -> Tensor:
    """Keys or values repeated for the ``heads`` of queries."""
    group = heads // tensor.shape[1]
    return tensor if group == 1 else tensor.repeat_interleave(group, dim=1)


def _explicit(
    query: Tensor, key: Tensor, value: Tensor, terms: AttentionTerms, return_lse: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(output, log-sum-exp in float64 if asked for, weights after dropout), by way of scores."""
    scores = _scores(query, key, terms)
    if terms.sinks is not None:  # as one more key, whose weight has no value
        shape = *scores.shape[:3], 1
        scores = torch.cat((scores, terms.sinks.to(scores.dtype)[:, None, None].expand(shape)), -1)
    finite, hidden, unseen = scores, None, None
    if not _all_see_a_key(scores):
        hidden = scores == -torch.inf
        unseen = hidden.all(-1, keepdim=True)
        finite = scores.masked_fill(unseen, 0.0)
    lse = None
    if return_lse and not scores.shape[-1]:
        lse = scores.logsumexp(-1).double()
    elif return_lse:
        # Not ATen's, whose gradient is by the result: exp(score - lse), where lse is rounded.
        top = finite.detach().amax(-1, keepdim=True)
        lse = (finite - top).exp().sum(-1, keepdim=True).double().log() + top
        lse = (lse if unseen is None else lse.masked_fill(unseen, -torch.inf))[..., 0]
    weights = finite.softmax(-1)
    weights = weights if hidden is None else weights.masked_fill(hidden, 0.0)
    weights = dropout_aten(weights[..., : key.shape[2]], terms.p)
    wide = _shared_by_heads(value.to(weights.dtype), query.shape[1])
    with autocast_off(query):
        output = weights @ wide
    return output.to(query.dtype), lse, weights


def _all_see_a_key(scores: Tensor) -> bool:
    """Whether it is known that each query sees a key: softmax then knows what is hidden."""
    if not scores.shape[-1] or not _is_plain(scores) or scores.is_cuda:
        return False
    if torch.compiler.is_compiling():  # values would break the graph
        return False
    return not bool((scores.detach().amax(-1) == -torch.inf).any())


def _scores(query: Tensor, key: Tensor, terms: AttentionTerms) -> Tensor:
    """Scores ``[B, H, L, S]`` with -inf where hidden, at least float32."""
    wide = torch.promote_types(query.dtype, torch.float32)
    key = _shared_by_heads(key.to(wide), query.shape[1])
    with autocast_off(query):  # which would round the scores
        scores = (query.to(wide) * terms.scale) @ key.transpose(-2, -1)
    if terms.softcap is not None:
        scores = terms.softcap * torch.tanh(scores / terms.softcap)
    keep, added, _ = _masks(query, key, terms, may_be_causal=False)
    if added is not None:
        scores = scores + added
    return scores if keep is None else scores.masked_fill(~keep, -torch.inf)


def _masks(
    query: Tensor, key: Tensor, terms: AttentionTerms, *, may_be_causal: bool
) -> tuple[Tensor | None, Tensor | None, bool]:
    """(boolean mask, what is added, whether causality is still to be applied)."""
    added = terms.mask if terms.mask is not None and terms.mask.dtype != torch.bool else None
    kept = [terms.mask] if terms.mask is not None and added is None else []
    if terms.key_mask is not None:
        kept.append(terms.key_mask[:, None, None, :])
    if terms.key_lengths is not None:
        positions = torch.arange(key.shape[2], device=key.device)
        kept.append((positions < terms.key_lengths[:, None])[:, None, None, :])
    by_position = terms.slopes is not None or terms.table is not None
    plain = not kept and added is None and not by_position and terms.left is None
    aligned = not terms.align_end or query.shape[2] == key.shape[2]
    if may_be_causal and plain and aligned and terms.right == 0:
        return None, None, True
    if terms.left is not None or terms.right is not None or by_position:
        distance = _distances(query, key, terms)
        if terms.right is not None:
            kept.append(distance <= terms.right)
        if terms.left is not None:
            kept.append(distance >= -terms.left)
        for term in _position_terms(distance, terms):
            added = term if added is None else added + term
    keep = None
    for mask in kept:
        keep = mask if keep is None else keep & mask
    return keep, added, False


def _distances(query: Tensor, key: Tensor, terms: AttentionTerms) -> Tensor:
    """``[B or 1, 1, L, S]``: how far each key is from each query."""
    rows = torch.arange(query.shape[2], device=query.device)[:, None]
    distance = (torch.arange(key.shape[2], device=query.device) - rows)[None, None]
    if terms.align_end and terms.key_lengths is not None:
        ends = terms.key_lengths.long().clamp(max=key.shape[2])
        distance = distance - (ends - query.shape[2])[:, None, None, None]
    elif terms.align_end:
        distance = distance - (key.shape[2] - query.shape[2])
    return distance


def _position_terms(distance: Tensor, terms: AttentionTerms) -> list[Tensor]:
    """What slopes and table add, each ``[B or 1, H or 1, L, S]`` and at least float32."""
    found = []
    if terms.slopes is not None:
        wide = torch.promote_types(terms.slopes.dtype, torch.float32)
        found.append(-terms.slopes.to(wide)[:, :, None, None] * distance.abs())
    if terms.table is not None:
        wide = torch.promote_types(terms.table.dtype, torch.float32)
        radius = terms.table.shape[1] // 2
        entries = radius + distance[:, 0].clamp(-radius, radius)
        by_distance = F.embedding(entries, terms.table.to(wide).t()).permute(0, 3, 1, 2)
        found.append(by_distance if terms.gate is None else by_distance * terms.gate[..., None])
    return found


def _packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    terms: AttentionTerms,
    lengths_q: list[int],
    lengths_k: list[int],
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """A few calls for all sequences, in batches of like lengths, their results back in place."""
    lengths = tuple(lengths_q), tuple(lengths_k)
    may_pad = query.device.type == "cpu" and _is_plain(query, key, value)
    may_pad = may_pad and stay_aligned(terms, *lengths)
    groups = groups_of(*lengths, query.shape[1], may_pad=may_pad)
    terms = terms._replace(starts_q=None, starts_k=None)
    if len(groups) == 1 and not groups[0].is_padded:
        q, k, v = (_batched(tensor, len(lengths_q)) for tensor in (query, key, value))
        own = _own_terms(terms, groups[0], [], [])
        if terms.gate is not None:
            of_one = _batched(terms.gate[..., None], len(lengths_q))
            own = own._replace(gate=of_one[..., 0])
        output, lse = _padded(q, k, v, own, return_lse)
        output = output.transpose(1, 2).flatten(0, 1).transpose(0, 1)[None]
        return output, None if lse is None else lse.transpose(0, 1).flatten(1, 2)[None]
    if not groups:
        wide = torch.float64
        empty = query.new_zeros(*query.shape[:3], value.shape[3])
        empty = empty + 0.0 * (query.sum() + key.sum() + value.sum())  # a gradient, if an empty one
        return empty, empty.new_zeros(query.shape[:3], dtype=wide)
    longest_q, longest_k = (
        tuple(longest) for longest in zip(*(g[1:3] for g in groups), strict=True)
    )
    gates: list[Tensor | None] = [None] * len(groups)
    if terms.gate is not None:
        of_groups, _ = _batches(terms.gate[..., None], lengths_q, groups, longest_q)
        gates = [gate[..., 0] for gate in of_groups]
    parts_q, places = _batches(query, lengths_q, groups, longest_q)
    parts_k, _ = _batches(key, lengths_k, groups, longest_k)
    parts_v, _ = _batches(value, lengths_k, groups, longest_k)
    outputs, lses = [], []
    for group, q, k, v, gate in zip(groups, parts_q, parts_k, parts_v, gates, strict=True):
        own = _own_terms(terms._replace(gate=gate), group, lengths_q, lengths_k)
        output, lse = _padded(q, k, v, own, return_lse)
        outputs.append(output.flatten(0, 2))
        if lse is not None:
            lses.append(lse.flatten())
    # [total, heads, dim] in memory: merging the heads is then a view.
    heads = query.shape[1]
    output = places.packed(_joined(outputs), heads).transpose(0, 1)[None]
    return output, places.packed(_joined(lses), heads).t()[None] if return_lse else None


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _batches(
    tensor: Tensor, lengths: list[int], groups: tuple[Group, ...], longest: tuple[int, ...]
) -> tuple[list[Tensor], Batches]:
    """``[1, H, tokens, D]`` as one ``[n, H, length, D]`` for each group, and their places."""
    heads = tensor.shape[1]
    sizes = [(len(g.members), heads, length) for g, length in zip(groups, longest, strict=True)]
    x = tensor.squeeze(0).transpose(0, 1)  # its gradient copies nothing, as that of an index would
    # What is made under a mode or a transform is theirs, and must not be kept.
    make = batches_of if is_eager() else batches_of.__wrapped__
    places = make(tuple(lengths), groups, longest, heads, heads_apart(x), x.device)
    parts: tuple[Tensor, ...] = torch.split(places.batched(x), [math.prod(size) for size in sizes])
    return [torch.unflatten(p, 0, size) for p, size in zip(parts, sizes, strict=True)], places


def _batched(tensor: Tensor, sequences: int) -> Tensor:
    """``[1, H, tokens, D]`` of sequences of one length as ``[sequences, H, length, D]``."""
    length = tensor.shape[2] // sequences
    return torch.unflatten(tensor[0], 1, (sequences, length)).transpose(0, 1)


def _own_terms(
    terms: AttentionTerms, group: Group, lengths_q: list[int], lengths_k: list[int]
) -> AttentionTerms:
    """The terms of some sequences only, cut to their lengths, with keys behind the ends hidden."""
    members, queries, keys, is_padded = group
    mask, slopes, lengths = terms.mask, terms.slopes, terms.key_lengths
    if mask is not None:
        mask = mask[list(members)] if mask.shape[0] > 1 else mask
        mask = mask[:, :, :queries] if mask.shape[2] > 1 else mask
        mask = mask[..., :keys] if mask.shape[3] > 1 else mask
    if slopes is not None and slopes.shape[0] > 1:
        slopes = slopes[list(members)]
    if lengths is not None:
        lengths = lengths[list(members)].clamp(max=keys)
    terms = terms._replace(mask=mask, slopes=slopes, key_lengths=lengths)
    if not is_padded:
        return terms
    terms = terms._replace(align_end=False)
    own = torch.tensor([lengths_k[i] for i in members], device="cpu")
    if lengths is not None:
        return terms._replace(key_lengths=lengths.minimum(own))
    if terms.right == 0 and all(lengths_q[i] == lengths_k[i] for i in members):
        return terms  # causality hides those keys from all queries but those behind the ends
    return terms._replace(key_mask=torch.arange(keys, device="cpu") < own[:, None])
