"""List cases of attention: padded, packed and in parts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from fusedformer import functional, reference
from fusedformer.parity.cases.case import Case, Op, normal
from fusedformer.parity.criterion import Function


def _stock_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    key_lengths: Tensor | None = None,
    return_lse: bool = False,
    window: tuple[int, int] | None = None,
    alibi_slopes: Tensor | None = None,
    relative_bias: Tensor | None = None,
    relative_bias_gate: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    **settings: Any,
) -> Any:
    positions = torch.arange(key.shape[-2], device=key.device)
    distance = positions - torch.arange(query.shape[-2], device=key.device)[:, None]
    if key_lengths is not None:
        attn_mask = (positions < key_lengths[:, None])[:, None, None, :]
    if window is not None:
        attn_mask = (distance >= -window[0]) & (distance <= window[1])
    if alibi_slopes is not None:
        attn_mask = -alibi_slopes[:, None, None] * distance.abs()
    if relative_bias is not None:
        radius = relative_bias.shape[1] // 2
        attn_mask = relative_bias[:, radius + distance.clamp(-radius, radius)]
        if relative_bias_gate is not None:
            attn_mask = relative_bias_gate[..., None] * attn_mask
    if softcap is not None:
        scores = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5
        return (softcap * torch.tanh(scores / softcap)).softmax(-1) @ value
    if sinks is not None:
        scores = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5
        column = sinks[:, None, None].expand(*scores.shape[:3], 1)
        return torch.cat((scores, column), -1).softmax(-1)[..., :-1] @ value
    output = F.scaled_dot_product_attention(query, key, value, attn_mask, **settings)
    if not return_lse:
        return output
    # In at least float32: the error of a log-sum-exp in half precision would loosen the limit.
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = query.to(wide) @ key.to(wide).transpose(-2, -1) * query.shape[-1] ** -0.5
    return output, scores.logsumexp(-1)


def _true_attention(*args: Any, return_lse: bool = False, **settings: Any) -> Any:
    both = reference.scaled_dot_product_attention(*args, **settings)
    return both if return_lse else both[0]


def attention_cases() -> Iterator[Case]:
    op = Op(
        "scaled_dot_product_attention",
        functional.scaled_dot_product_attention,
        _stock_attention,
        _true_attention,
    )
    plain = {"query": (2, 2, 37, 32), "key": (2, 2, 37, 32), "value": (2, 2, 37, 32)}
    cross = {"query": (1, 2, 19, 24), "key": (1, 2, 45, 24), "value": (1, 2, 45, 40)}
    grouped = {"query": (1, 4, 21, 16), "key": (1, 2, 21, 16), "value": (1, 2, 21, 16)}
    yield Case(op, "odd length", normal(**plain), quick=True)
    yield Case(op, "causal", normal(**plain), {"is_causal": True})
    yield Case(
        op,
        "one past a tile, log-sum-exp",
        normal(query=(1, 1, 65, 64), key=(1, 1, 129, 64), value=(1, 1, 129, 64)),
        {"return_lse": True},
    )
    yield Case(op, "Sq != Sk, Ev != E, odd head dim", normal(**cross))
    yield Case(op, "broadcast additive mask", normal(**cross, attn_mask=(1, 2, 1, 45)))
    yield Case(op, "boolean mask", _attention_mask)
    yield Case(op, "key lengths", _key_lengths)
    yield Case(op, "grouped queries", normal(**grouped), {"enable_gqa": True})
    yield Case(op, "window", normal(**plain), {"window": (7, 3)})
    yield Case(
        op,
        "ALiBi slopes",
        lambda g: {**normal(**plain)(g), "alibi_slopes": torch.tensor([0.25, 0.0625])},
    )
    yield Case(op, "relative bias", normal(**plain, relative_bias=(2, 21)))
    gated = {"relative_bias": (2, 21), "relative_bias_gate": (2, 2, 37)}
    yield Case(op, "gated relative bias", normal(**plain, **gated))
    yield Case(op, "softcap", normal(**plain), {"softcap": 3.0})
    yield Case(op, "sinks", normal(**plain, sinks=(2,)))
    yield Case(
        op,
        "few queries, split keys",
        normal(query=(1, 2, 3, 16), key=(1, 2, 1100, 16), value=(1, 2, 1100, 16)),
    )
    packed = Op("varlen_attention", functional.varlen_attention, _stock_packed, _true_packed)
    lengths = {"max_seqlen_q": 37, "max_seqlen_k": 37}
    yield Case(packed, "packed", _packed, lengths, quick=True)
    yield Case(packed, "packed, causal", _packed, {**lengths, "is_causal": True})
    merge = Op(
        "merge_attention_states", _with_wide_lse(functional.merge_attention_states),
        _with_wide_lse(_stock_merge), reference.merge_attention_states,
    )  # fmt: skip
    states = normal(output1=(2, 37, 16), output2=(2, 37, 16), lse1=(2, 37), lse2=(2, 37))
    yield Case(merge, "two parts", states, quick=True)
    buckets = Op(
        "relative_position_bias", functional.relative_position_bias,
        reference.relative_position_bias, reference.relative_position_bias,
    )  # fmt: skip
    yield Case(buckets, "T5's buckets", normal(weight=(32, 4)), {"max_distance": 40}, quick=True)


def _packed(generator: Generator) -> dict[str, Tensor]:
    tensors = normal(query=(50, 2, 16), key=(50, 2, 16), value=(50, 2, 16))(generator)
    starts = torch.tensor([0, 12, 12, 49, 50])
    return {**tensors, "cu_seqlens_q": starts, "cu_seqlens_k": starts}


def _stock_packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    is_causal: bool = False,
    **settings: Any,
) -> Tensor:
    lengths = cu_seqlens_q.diff().tolist()
    heads_first = (torch.split(t.transpose(0, 1), lengths, 1) for t in (query, key, value))
    outputs = [
        F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
        for q, k, v in zip(*heads_first, strict=True)
    ]
    return torch.cat(outputs, 1).transpose(0, 1)


def _true_packed(**arguments: Any) -> Tensor:
    return reference.varlen_attention(**arguments)[0]


def _with_wide_lse(merge: Function) -> Function:
    """Call ``merge`` with log-sum-exps in at least float32, as attention returns them."""

    def call(output1: Tensor, lse1: Tensor, output2: Tensor, lse2: Tensor) -> Any:
        wide = torch.promote_types(lse1.dtype, torch.float32)
        return merge(output1, lse1.to(wide), output2, lse2.to(wide))

    return call


def _stock_merge(output1: Tensor, lse1: Tensor, output2: Tensor, lse2: Tensor) -> Any:
    lse = torch.logaddexp(lse1, lse2)
    first, second = ((part - lse).exp()[..., None] for part in (lse1, lse2))
    return (output1 * first + output2 * second).to(output1.dtype), lse


def _attention_mask(generator: Generator) -> dict[str, Tensor]:
    mask = torch.rand(2, 1, 19, 37, generator=generator) < 0.6
    mask[..., 3] = True  # stock torch has no gradient for a query without keys
    tensors = normal(query=(2, 2, 19, 16), key=(2, 2, 37, 16), value=(2, 2, 37, 16))(generator)
    return {**tensors, "attn_mask": mask}


def _key_lengths(generator: Generator) -> dict[str, Tensor]:
    tensors = normal(query=(3, 2, 23, 16), key=(3, 2, 23, 16), value=(3, 2, 23, 16))(generator)
    return {**tensors, "key_lengths": torch.tensor([23, 1, 14])}
