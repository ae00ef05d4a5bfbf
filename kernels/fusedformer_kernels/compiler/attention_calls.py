"""Call the launchers of attention as the compile cases ask."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from fusedformer_kernels.attention import configs
from fusedformer_kernels.attention.arguments import attention_arguments
from fusedformer_kernels.attention.backward import attention_backward
from fusedformer_kernels.attention.disentangled import disentangled_backward
from fusedformer_kernels.attention.forward import attention_forward
from fusedformer_kernels.attention.merge import merge_states, merge_states_backward
from fusedformer_kernels.attention.terms import AttentionTerms, PositionTerms
from fusedformer_kernels.attention.weights import attention_weights, attention_weights_backward
from fusedformer_kernels.compiler.tensors import HALF, empty, empty_seed
from fusedformer_kernels.runtime.targets import assumed_target
from fusedformer_kernels.runtime.tuned import forced

# Of the backward in one pass, by head dim: no shipped table has it, a user's own may.
ONE_PASS = {
    dim: {"passes": 1, "block_m": m, "block_n": 64, "num_warps": 4, "num_stages": 3}
    for dim, m in ((64, 64), (128, 32))
}


def attend(
    head_dim: int,
    dtype: torch.dtype,
    *,
    value_dim: int = 0,
    mask: str = "",
    key_heads: int = 16,
    queries: int = 2048,
    keys: int = 2048,
    packed: bool = False,
    weights: str = "",
    one_pass: bool = False,
    gradients: bool = True,
    gated: bool = False,
    **terms: Any,
) -> None:
    length, heads, batch = keys, 16, 4
    # [batch, length, 3, heads, dim]: views of an interleaved projection, read in place.
    dims = head_dim, head_dim, value_dim or head_dim
    sizes = (queries, heads), (length, key_heads), (length, key_heads)
    leading = 1 if packed else batch
    q, k, v = (
        empty(leading, n, 3, h, d, dtype=dtype)[:, :, i].transpose(1, 2)
        for i, ((n, h), d) in enumerate(zip(sizes, dims, strict=True))
    )
    masks = {
        "": None,
        "boolean": empty(batch, 1, queries, length, dtype=torch.bool),
        "additive": empty(1, heads, queries, length, dtype=dtype),
    }
    if packed:
        starts = empty(batch + 1, dtype=torch.int32)
        terms |= {"starts_q": starts, "starts_k": starts}
        terms |= {"max_queries": queries // batch, "max_keys": length // batch}
    given = AttentionTerms(mask=masks[mask], scale=0.125, **terms)
    if gated:
        given = given._replace(gate=empty(leading, heads, queries, dtype=dtype))
    learned = [mask == "additive"]
    learned += [t is not None for t in (given.slopes, given.table, given.gate)]
    if weights:
        statistics = empty(2, batch, heads, queries, dtype=torch.float32)
        average = weights == "averaged"
        result = attention_weights(q, k, statistics, given, average)
        needs = [True, True, True, *learned]
        attention_weights_backward(result, q, k, statistics, given, average, needs)
        return
    output, _, statistics = attention_forward(q, k, v, given)
    if not gradients:
        return
    needs = [True, True, True, *learned, given.sinks is not None]
    forms: AbstractContextManager[None] = nullcontext()
    target = assumed_target()
    if one_pass and target is not None and target.backend == "cuda":
        kind = attention_arguments(q, k, v.shape[3], given).kind
        causal = terms.get("right") is not None
        fields = {**ONE_PASS[kind.size], "one_loop": causal}
        forms = forced(("attention_backward", *kind.words), fields)
    with forms:
        attention_backward(output, None, q, k, v, output, statistics, given, needs)


def disentangled(
    head_dim: int, dtype: torch.dtype, *, packed: bool = False, one_term: bool = False,
    dropout: bool = False,
) -> None:
    """Call both with 512 buckets, as DeBERTa v3 has; padded with a mask of keys."""
    heads, batch, length = 12, 4, 512
    leading, tokens = (1, batch * length) if packed else (batch, length)
    qkv = empty(leading, tokens, 3, heads, head_dim, dtype=dtype)
    q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
    starts = empty(batch + 1, dtype=torch.int32) if packed else None
    given = AttentionTerms(
        key_mask=None if packed else empty(batch, length, dtype=torch.bool), starts_q=starts,
        starts_k=starts, p=0.1, seed=empty_seed() if dropout else None, scale=0.125,
        max_queries=length, max_keys=length,
    )
    products = empty(heads, leading, tokens, 512, dtype=dtype).transpose(0, 1)
    buckets, firsts = (empty(n, dtype=torch.int32) for n in (1025, 513))
    positions = PositionTerms(buckets, products, None if one_term else products)
    output, _, statistics = attention_forward(q, k, v, given, False, positions)
    disentangled_backward(output, q, k, v, output, statistics, given, positions, firsts)


def specialized_forward(head_dim: int, tma: bool = False, **more: Any) -> None:
    """Call attention's forward as a table may ask for it on sm_90; elsewhere nothing is called."""
    kind = configs.AttentionKind(head_dim, "half", causal="right" in more)
    target = assumed_target()
    if target is None or not configs.can_specialize(kind, target):
        return
    fields = {"block_m": 128, "block_n": 128, "num_warps": 4, "num_stages": 2}
    with forced(("attention_forward", *kind.words), {**fields, "specialized": True, "tma": tma}):
        attend(head_dim, HALF, gradients=False, **more)


def merge(dtype: torch.dtype) -> None:
    o, lse = empty(4, 16, 512, 64, dtype=dtype), empty(4, 16, 512, dtype=torch.float32)
    merge_states(o, lse, o, lse)
    merge_states_backward(o, lse, o, lse, o, lse)
