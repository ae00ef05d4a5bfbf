"""Attention over a part of the keys, where the other parts are somewhere else.

No autograd: who calls these knows where the parts are. The forward gives output and log-sum-exp of
one part, to be merged; the backward takes those that all parts gave together. The log-sum-exps are
float64: in float32 they would forget the sums of queries whose scores are large.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusedformer._internal.backend import Backend, chosen_backend
from fusedformer.ops.attention import packed, registered
from fusedformer.ops.attention.aten import merge_attention_states_aten
from fusedformer.ops.attention.terms import OF_HEADS_ALONE, AttentionTerms


def attention_part(
    query: Tensor, key: Tensor, value: Tensor, terms: AttentionTerms
) -> tuple[Tensor, Tensor]:
    """(output, log-sum-exp) of queries and some keys, in the forms of :class:`AttentionTerms`."""
    if chosen_backend(query) == "triton":
        from fusedformer_kernels.attention.arguments import lse_of

        part, _, statistics = registered.attention(query, key, value, False, *terms)
        return part, lse_of(statistics, query.dtype, terms)
    given = [query, key, value, *terms]
    output, lse = packed.seeded_aten(given, return_lse=True, wide_lse=True)
    return output, lse


def merge_parts(
    output1: Tensor, lse1: Tensor, output2: Tensor, lse2: Tensor
) -> tuple[Tensor, Tensor]:
    """(output, log-sum-exp) of two parts of the keys together."""
    return merge_attention_states_aten(output1, lse1, output2, lse2)


def attention_part_backward(
    backend: Backend,
    grad: Tensor,
    lse_grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    needs: list[bool],
    terms: AttentionTerms,
) -> list[Tensor | None]:
    """What this part adds to the gradients of query, key and value; None where not needed.

    ``output``, ``lse`` and their gradients are those of all parts together; ``terms`` as in the
    forward, which ran on ``backend``.
    """
    if backend == "triton":
        from fusedformer_kernels.attention.arguments import statistics_of

        needs_all = [*needs, *OF_HEADS_ALONE[3:]]
        statistics = statistics_of(lse, query.dtype, terms)
        grads = registered.attention_backward(
            grad, lse_grad, query, key, value, output, statistics, needs_all, *terms
        )
        return [g if need else None for g, need in zip(grads[:3], needs, strict=True)]
    leaves = [t.detach().requires_grad_(n) for t, n in zip((query, key, value), needs, strict=True)]
    with torch.enable_grad():
        own, own_lse = packed.seeded_aten([*leaves, *terms], return_lse=True, wide_lse=True)
    # With the share of this part w = exp(own_lse - lse), the merged output is the sum of w * own.
    wide = torch.promote_types(own.dtype, torch.float32)
    share = (own_lse - lse.masked_fill(lse == -torch.inf, 0.0)).exp().detach().to(wide)
    apart = (grad.to(wide) * (own.detach().to(wide) - output)).sum(-1)
    own_grads = (grad * share[..., None]).to(own.dtype), (share * (lse_grad + apart)).to(lse.dtype)
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    found = iter(
        torch.autograd.grad(
            (own, own_lse), wanted, own_grads, allow_unused=True, materialize_grads=True
        )
    )
    return [next(found) if need else None for need in needs]
