"""What attention's scores depend on besides queries and keys, in one object from op to kernel.

It imports no triton: the library makes terms on machines that have no kernels too.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class AttentionTerms(NamedTuple):
    """The terms of one call, for launchers, the ATen composition and the registered ops alike.

    B sequences, H query heads, L queries, S keys. Query i sits at key position i + offset, with
    offset 0, or S - L of each sequence if ``align_end``; the distance of key j is j - i - offset.
    Padded form (``starts_q`` is None): query ``[B, H, L, E]``, key and value ``[B, Hk, S, E]``.
    Packed form: ``[1, H, tokens, E]``, where sequence b has the tokens from ``starts[b]`` on.
    """

    mask: Tensor | None = None  # [1 or B, 1 or H, 1 or L, 1 or S]: boolean (True = keep) or added
    key_mask: Tensor | None = None  # boolean [B, S], True = keep; padded form only
    key_lengths: Tensor | None = None  # integer [B]: keys at and beyond are hidden; S is then this
    slopes: Tensor | None = None  # [1 or B, H]: -slope * abs(distance) is added
    table: Tensor | None = None  # [1 or H, 2R + 1]: entry R + clamp(distance, -R, R) is added
    gate: Tensor | None = None  # [B, H, L], packed [1, H, tokens]: factor on what the table adds
    sinks: Tensor | None = None  # [H]: a logit in each query's sum that no key and no value has
    starts_q: Tensor | None = None  # integer [B + 1]
    starts_k: Tensor | None = None  # integer [B + 1]
    seed: Tensor | None = None  # int64 [1], of the dropout mask; None: nothing is dropped
    p: float = 0.0  # dropout probability
    left: int | None = None  # visible iff distance >= -left; None: unbounded
    right: int | None = None  # visible iff distance <= right (causal: 0); None: unbounded
    align_end: bool = False
    scale: float = 1.0
    softcap: float | None = None  # scaled scores become softcap * tanh(score / softcap), then terms
    max_queries: int = 0  # longest sequence of the packed form
    max_keys: int = 0


class PositionTerms(NamedTuple):
    """What disentangled attention adds to the products of queries and keys, by their distances.

    The distance is query i less key j, without the offset of the other terms. W buckets hold all.
    """

    buckets: Tensor  # int32 [2R + 1]: entry R + clamp(distance, -R, R), which never falls
    of_queries: Tensor | None  # [B, H, L, W], rows of it contiguous; packed [1, H, tokens, W]
    of_keys: Tensor | None  # [B, H, S, W]


N_TENSORS = 10  # fields that are tensors or None; they come first

# Gradients that a backward gives: those of query, key and value, and of no term.
OF_HEADS_ALONE = [*[True] * 3, *[False] * 5]
