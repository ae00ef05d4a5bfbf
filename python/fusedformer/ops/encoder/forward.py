"""The forward of an encoder layer, from its input to what the backward reads."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedformer.ops.attention.terms import AttentionTerms
from fusedformer.ops.encoder.arguments import EncoderParameters, EncoderSettings, Kept
from fusedformer.ops.encoder.launchers import launchers
from fusedformer.ops.encoder.steps import in_dtype, product_of, seed_of


def forward(
    x: Tensor,
    residual: Tensor | None,
    own: EncoderParameters,
    how: EncoderSettings,
    terms: AttentionTerms,
    batch: int,
    norm_dtype: torch.dtype | None,
    keeps: bool,
) -> tuple[Tensor, Tensor | None, Kept | None]:
    """Compute both results of rows ``[total, E]``; if it ``keeps``, what a backward would read."""
    run, device, opened = launchers(), x.device, how.last_eps is None
    source = in_dtype(own.in_weight.dtype, x)
    seed = seed_of(terms.p, device)
    projected = tuple(product_of(source, weight, bias) for weight, bias in projections(own))
    merged, statistics = run.attention(projected, batch, how.heads, terms._replace(seed=seed))
    inner = product_of(merged, own.out_weight, None)
    seed1 = seed_of(how.middle_p, device)
    normed, sum1, mean1, rstd1 = run.norm(
        inner,
        x if residual is None else residual,
        own.out_bias,
        own.middle_weight,
        own.middle_bias,
        seed1,
        how.middle_p,
        how.middle_eps,
        "layer",
        1,
        keeps or opened,
        keeps,
        norm_dtype,
    )
    middle = in_dtype(own.weight1.dtype, normed)
    before = product_of(middle, own.weight1, None)
    hidden_seed = seed_of(how.hidden_p, device)
    hidden = run.activation(before, own.bias1, hidden_seed, how.hidden_p, how.activation)
    block = product_of(hidden, own.weight2, None)
    output, sum2, mean2, rstd2, seed2 = block, None, None, None, None
    if not opened:
        seed2 = seed_of(how.last_p, device)
        output, sum2, mean2, rstd2 = run.norm(
            block,
            normed,
            own.bias2,
            own.last_weight,
            own.last_bias,
            seed2,
            how.last_p,
            how.last_eps,
            "layer",
            1,
            keeps,
            keeps,
            norm_dtype,
        )
    kept = None
    if keeps:
        key, value = projected[1:] if len(projected) == 3 else (None, None)
        kept = Kept(
            source, projected[0], key, value, merged, statistics,
            sum1, mean1, rstd1, middle, before, hidden, sum2, mean2, rstd2, seed, seed1,
            hidden_seed, seed2,
        )  # fmt: skip
    return output, sum1 if opened else None, kept


def projections(own: EncoderParameters) -> list[tuple[Tensor, Tensor | None]]:
    """Return weight and bias of the one product, or of query, key and value."""
    if own.key_weight is None or own.value_weight is None:
        return [(own.in_weight, own.in_bias)]
    return [
        (own.in_weight, own.in_bias),
        (own.key_weight, own.key_bias),
        (own.value_weight, own.value_bias),
    ]
