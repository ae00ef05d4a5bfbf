"""The forward of a layer, from its input to what the backward reads."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedformer.ops.attention.terms import AttentionTerms
from fusedformer.ops.encoder.arguments import EncoderParameters, EncoderSettings, Kept
from fusedformer.ops.encoder.launchers import Launchers, launchers
from fusedformer.ops.encoder.steps import in_dtype, product_of, seed_of

NO_NORMS = (None, None, None, None)  # of heads before they are turned


class Call(NamedTuple):
    """What a call has besides the tensors that it computes with."""

    how: EncoderSettings
    terms: AttentionTerms
    cross_terms: AttentionTerms | None  # of attention to the memory
    batch: int
    norm_dtype: torch.dtype | None


def forward(
    x: Tensor,
    residual: Tensor | None,
    memory: Tensor | None,
    own: EncoderParameters,
    how: EncoderSettings,
    terms: AttentionTerms,
    cross_terms: AttentionTerms | None,
    batch: int,
    norm_dtype: torch.dtype | None,
    keeps: bool,
) -> tuple[Tensor, Tensor | None, Kept | None]:
    """Compute both results of rows ``[total, E]``; if it ``keeps``, what a backward would read."""
    run, call = launchers(), Call(how, terms, cross_terms, batch, norm_dtype)
    device, is_open = x.device, how.last_eps is None
    kept: dict[str, Any] = {}
    normed = x
    if how.first_eps is not None:
        normed, _, mean0, rstd0 = run.norm(
            x, None, None, own.first_weight, own.first_bias, None, 0.0, how.first_eps, how.norm, 1,
            False, keeps, norm_dtype,
        )  # fmt: skip
        kept.update(x=x, mean0=mean0, rstd0=rstd0)
    source = in_dtype(own.in_weight.dtype, normed)
    seed = seed_of(terms.p, device)
    projected = tuple(product_of(source, weight, bias) for weight, bias in projections(own))
    projected = _rotated(run, projected, own, call)
    merged, statistics = run.attention(projected, batch, how.heads, terms._replace(seed=seed))
    inner = product_of(merged, own.out_weight, None)
    seed1 = seed_of(how.middle_p, device)
    normed, total, mean1, rstd1 = run.norm(
        inner, x if residual is None else residual, own.out_bias, own.middle_weight,
        own.middle_bias, seed1, how.middle_p, how.middle_eps, how.norm, 1, keeps or is_open, keeps,
        norm_dtype,
    )  # fmt: skip
    key, value = projected[1:] if len(projected) == 3 else (None, None)
    kept.update(
        source=source, projected=projected[0], key=key, value=value, merged=merged,
        statistics=statistics, sum1=total, mean1=mean1, rstd1=rstd1, seed=seed, seed1=seed1,
    )  # fmt: skip
    if memory is not None:
        normed, total = _to_memory(run, normed, total, memory, own, call, keeps, kept)
    middle = in_dtype(own.weight1.dtype, normed)
    before = product_of(middle, own.weight1, None)
    hidden_seed = seed_of(how.hidden_p, device)
    hidden = activated(run, before, hidden_seed, own, how)
    output = product_of(hidden, own.weight2, None)
    kept.update(middle=middle, before=before, hidden=hidden, hidden_seed=hidden_seed)
    kept.update(sum2=None, mean2=None, rstd2=None, seed2=None)
    if how.adds_last or not is_open:
        seed2 = seed_of(how.last_p, device)
    if how.adds_last:
        output = run.norm(
            output, total, own.bias2, None, None, seed2, how.last_p, 0.0, "none", 1, True, False,
            None,
        )[1]  # fmt: skip
        kept.update(seed2=seed2)
    elif how.last_eps is not None:
        output, sum2, mean2, rstd2 = run.norm(
            output, normed, own.bias2, own.last_weight, own.last_bias, seed2, how.last_p,
            how.last_eps, how.norm, 1, keeps, keeps, norm_dtype,
        )  # fmt: skip
        kept.update(sum2=sum2, mean2=mean2, rstd2=rstd2, seed2=seed2)
    left = total if is_open and not how.adds_last else None
    return output, left, Kept(**kept) if keeps else None


def _rotated(
    run: Launchers, projected: tuple[Tensor, ...], own: EncoderParameters, call: Call
) -> tuple[Tensor, ...]:
    """Turn queries and keys by the angles of their positions, where there are some."""
    if own.cos is None or own.sin is None:
        return projected
    if len(projected) == 1:
        query, key = queries_and_keys(projected[0], call)
        run.rotary(query, key, *half_tables(own), None, NO_NORMS, "none", 0.0, False, True)
        return projected  # which was written over
    query, key = (heads_of(rows, call) for rows in projected[:2])
    turned = run.rotary(query, key, *half_tables(own), None, NO_NORMS, "none", 0.0, False)
    return (*(heads.view(projected[0].shape) for heads in turned), projected[2])


def heads_of(rows: Tensor, call: Call) -> Tensor:
    """View rows ``[batch * length, E]`` as heads ``[batch, length, heads, dim]``."""
    length = rows.shape[0] // max(call.batch, 1)
    return rows.view(call.batch, length, call.how.heads, rows.shape[1] // call.how.heads)


def queries_and_keys(rows: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """View rows ``[batch * length, 3 * E]``, but values, as ``[batch, length, heads, dim]``."""
    heads = call.how.heads
    dim = rows.shape[1] // (3 * heads)
    qkv = rows.view(call.batch, rows.shape[0] // max(call.batch, 1), 3, heads, dim)
    return qkv[:, :, 0], qkv[:, :, 1]


def half_tables(own: EncoderParameters) -> tuple[Tensor, Tensor]:
    """Return the cosines and sines of each pair of columns, which stand twice in a row."""
    assert own.cos is not None
    assert own.sin is not None
    pairs = own.cos.shape[-1] // 2
    return own.cos[..., :pairs], own.sin[..., :pairs]


def _to_memory(
    run: Launchers,
    normed: Tensor,
    total: Tensor | None,
    memory: Tensor,
    own: EncoderParameters,
    call: Call,
    keeps: bool,
    kept: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """Attend from ``normed`` to the memory; return the norm of the sum with it, and the sum."""
    how, terms = call.how, call.cross_terms
    assert terms is not None
    assert own.cross_weight is not None
    assert own.cross_out_weight is not None
    is_open = how.last_eps is None
    (weight_q, bias_q), (weight_kv, bias_kv) = cross_projections(own)
    asking, memory = (in_dtype(weight_q.dtype, rows) for rows in (normed, memory))
    query, pair = product_of(asking, weight_q, bias_q), product_of(memory, weight_kv, bias_kv)
    seed = seed_of(terms.p, normed.device)
    merged, statistics = run.attention(
        (query, pair), call.batch, how.heads, terms._replace(seed=seed)
    )
    inner = product_of(merged, own.cross_out_weight, None)
    seed1 = seed_of(how.cross_p, normed.device)
    normed, total, mean, rstd = run.norm(
        inner, total if is_open else normed, own.cross_out_bias, own.cross_norm_weight,
        own.cross_norm_bias, seed1, how.cross_p, how.cross_eps, how.norm, 1, keeps or is_open,
        keeps, call.norm_dtype,
    )  # fmt: skip
    kept.update(
        asking=asking, memory=memory, query=query, pair=pair, cross_merged=merged,
        cross_statistics=statistics, cross_sum=total, cross_mean=mean, cross_rstd=rstd,
        cross_seed=seed, cross_seed1=seed1,
    )  # fmt: skip
    return normed, total


def activated(
    run: Launchers,
    before: Tensor,
    seed: Tensor | None,
    own: EncoderParameters,
    how: EncoderSettings,
) -> Tensor:
    """Compute what the second product of the feed-forward block reads, of what the first gave."""
    found: Tensor
    if how.is_gated:
        found = run.gated(before, own.bias1, seed, how.hidden_p, how.activation, False)
        return found
    found = run.activation(before, own.bias1, seed, how.hidden_p, how.activation)
    return found


def projections(own: EncoderParameters) -> list[tuple[Tensor, Tensor | None]]:
    """Return weight and bias of the one product, or of query, key and value."""
    if own.key_weight is None or own.value_weight is None:
        return [(own.in_weight, own.in_bias)]
    return [
        (own.in_weight, own.in_bias),
        (own.key_weight, own.key_bias),
        (own.value_weight, own.value_bias),
    ]


def cross_projections(own: EncoderParameters) -> list[tuple[Tensor, Tensor | None]]:
    """Return weight and bias for the query, and for key and value of the memory together."""
    weight, bias = own.cross_weight, own.cross_bias
    assert weight is not None
    width = weight.shape[0] // 3
    return [
        (weight[:width], None if bias is None else bias[:width]),
        (weight[width:], None if bias is None else bias[width:]),
    ]
