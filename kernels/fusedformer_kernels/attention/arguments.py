"""Launch arguments of the attention kernels, worked out once from the tensors of a call."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from fusedformer_kernels.attention import configs
from fusedformer_kernels.attention.spread_table import spread_table
from fusedformer_kernels.attention.terms import AttentionTerms, PositionTerms
from fusedformer_kernels.runtime import targets
from fusedformer_kernels.runtime.strided import contiguous_vector


class Sizes(NamedTuple):
    """How many there are. Kernels get each by itself, see ``primitives.COUNTS``, and make this."""

    heads: Any
    queries: Any  # of the padded form
    keys: Any
    in_sixteens: Any  # 1: keys are in units of 16, which lets masks be read by wider loads
    radius: Any  # of the table, or of the buckets


class Scores(NamedTuple):
    """The terms as kernels get them. What a call lacks is None, and costs no instruction.

    Flat: inside loops Triton 3.6 loses the constants of nested tuples.
    """

    scale: Any
    softcap: Any
    mask: Any  # uint8 for a boolean one
    mask_batch: Any  # strides, 0 where it broadcasts
    mask_head: Any
    mask_row: Any
    mask_column: Any
    key_mask: Any
    key_mask_batch: Any
    key_mask_column: Any
    key_lengths: Any
    slopes: Any
    slopes_batch: Any
    slopes_head: Any
    table: Any
    table_head: Any
    table_middle: Any  # where it has distance 0: see spread_table
    gate: Any  # on the table
    gate_batch: Any
    gate_head: Any
    gate_row: Any
    sinks: Any
    left: Any
    right: Any
    align_end: Any  # 1 or None
    seed: Any
    p: Any
    starts_q: Any
    starts_k: Any
    group: Any  # query heads that share a key head
    buckets: Any  # of disentangled attention, by distance
    n_buckets: Any
    of_queries: Any  # [batch, heads, queries, n_buckets], or None
    of_queries_batch: Any
    of_queries_head: Any
    of_keys: Any  # the same of keys
    of_keys_batch: Any
    of_keys_head: Any


class Layout(NamedTuple):
    """Strides of a tensor [batch, heads, rows, dim], as kernels get them."""

    batch: Any
    head: Any
    row: Any
    dim: Any
    # 1: the first three are in units of 8 elements. Triton sees multiples of 16 by itself, but not
    # of 8, which is what 16-byte accesses to heads of 40 or 72 elements need.
    in_eights: Any = None


def layout_of(tensor: torch.Tensor | None) -> Layout:
    """The strides of ``tensor``, zeros for None."""
    if tensor is None:
        return Layout(0, 0, 0, 0)
    return _layout(*tensor.stride()[-4:])


@functools.lru_cache(4096)
def _layout(batch: int, head: int, row: int, dim: int) -> Layout:
    if any(s % 8 for s in (batch, head, row)) or not any(s % 16 for s in (batch, head, row)):
        return Layout(batch, head, row, dim)
    return Layout(batch // 8, head // 8, row // 8, dim, 1)


def can_be_copied(*tensors: torch.Tensor) -> bool:
    """Whether all rows of heads are pieces of 16 bytes, at multiples of 16."""
    return all(
        tensor.stride(3) == 1
        and not any(n * tensor.element_size() % 16 for n in (*tensor.stride()[:3], tensor.shape[3]))
        and (tensor.is_meta or tensor.data_ptr() % 16 == 0)
        for tensor in tensors
    )


@dataclass(frozen=True)
class AttentionArguments:
    """What all kernels of one attention call are launched with."""

    scores: Scores
    sizes: Sizes
    kind: configs.AttentionKind
    sequences: int
    max_queries: int
    max_keys: int
    constants: dict[str, Any]

    @property
    def packed(self) -> bool:
        return self.scores.starts_q is not None

    @property
    def one_loop(self) -> bool:
        """Whether tiles before the first full one, or listed ones, ask for one checked loop."""
        return self.scores.left is not None or self.lists_tiles

    @property
    def lists_tiles(self) -> bool:
        """Whether a boolean mask says which tiles there are."""
        return self.scores.mask is not None and self.scores.mask.dtype == torch.uint8

    @property
    def n_features(self) -> int:
        """Number of terms that take registers in score tiles, besides masks and tables."""
        s = self.scores
        terms = s.softcap, s.slopes, s.key_lengths, s.sinks, s.left, s.right, s.seed, s.starts_q
        return sum(term is not None for term in terms)


def attention_arguments(
    query: torch.Tensor,
    key: torch.Tensor,
    value_dim: int,
    terms: AttentionTerms,
    positions: PositionTerms | None = None,
) -> AttentionArguments:
    """Arguments of one call; tensors as the classes of terms document them.

    A table and ``positions`` are not both given.
    """
    packed = terms.starts_q is not None
    sequences = terms.starts_q.numel() - 1 if terms.starts_q is not None else query.shape[0]
    mask, slopes, table, gate = terms.mask, terms.slopes, terms.table, terms.gate
    additive = mask is not None and mask.dtype != torch.bool
    softcap = None if terms.softcap is None else float(terms.softcap)
    mask_batch, mask_head, mask_row, mask_column = broadcast_strides(mask, 4)
    key_mask_batch, key_mask_column = broadcast_strides(terms.key_mask, 2)
    slopes_batch, slopes_head = broadcast_strides(slopes, 2)
    max_queries = terms.max_queries if packed else query.shape[2]
    max_keys = terms.max_keys if packed else key.shape[2]
    spread, table_middle = None, 0
    if table is not None:  # bounds of packed lengths may be higher than rows
        spread, table_middle = spread_table(
            table, min(max_queries, query.shape[2]), min(max_keys, key.shape[2])
        )
    table_head, _ = broadcast_strides(spread, 2)
    # Absent strides are None too: calls without a gate are compiled as if there were none.
    gate_strides = (None,) * 3 if gate is None else gate.stride()
    scores = Scores(
        scale=float(terms.scale),
        softcap=softcap,
        mask=None if mask is None else mask if additive else mask.view(torch.uint8),
        mask_batch=mask_batch,
        mask_head=mask_head,
        mask_row=mask_row,
        mask_column=mask_column,
        key_mask=None if terms.key_mask is None else terms.key_mask.view(torch.uint8),
        key_mask_batch=key_mask_batch,
        key_mask_column=key_mask_column,
        key_lengths=contiguous_vector(terms.key_lengths),
        slopes=slopes,
        slopes_batch=slopes_batch,
        slopes_head=slopes_head,
        table=spread,
        table_head=table_head,
        table_middle=table_middle,
        gate=gate,
        gate_batch=gate_strides[0],
        gate_head=gate_strides[1],
        gate_row=gate_strides[2],
        sinks=contiguous_vector(terms.sinks),
        left=terms.left,
        right=terms.right,
        align_end=1 if terms.align_end else None,
        seed=terms.seed,
        p=float(terms.p),
        starts_q=contiguous_vector(terms.starts_q),
        starts_k=contiguous_vector(terms.starts_k),
        group=query.shape[1] // key.shape[1],
        **_position_arguments(positions),
    )
    by_distance = table if positions is None else positions.buckets
    radius = 0 if by_distance is None else by_distance.shape[-1] // 2
    n_keys = key.shape[2]
    in_sixteens = None if n_keys % 16 else 1
    sizes = Sizes(
        query.shape[1], query.shape[2], n_keys // 16 if in_sixteens else n_keys, in_sixteens, radius
    )
    block_d = configs.padded_dim(query.shape[3])
    constants: dict[str, Any] = {
        "HEAD_DIM": query.shape[3],
        "VALUE_DIM": value_dim,
        "BLOCK_D": block_d,
        # Tiles of keys and of narrower values would have different swizzles at one address, and
        # ptxas then confuses their descriptors (descriptors.py).
        "BLOCK_DV": max(configs.padded_dim(value_dim), min(block_d, 64)),
        "SCALED": scores_are_scaled(query.dtype, terms),
        "PRECISION": precision_of(query, value_dim),
    }
    heavy = (
        _must_be_scaled(terms) or mask is not None or terms.seed is not None
        or terms.left is not None or positions is not None
    )
    of_registers = (
        softcap, slopes, table, gate, terms.key_mask, terms.key_lengths, terms.sinks, terms.left,
        terms.seed, terms.starts_q,
    )  # fmt: skip
    kind = configs.AttentionKind(
        dim=max(constants["BLOCK_D"], constants["BLOCK_DV"]),
        operands=constants["PRECISION"] if query.dtype == torch.float32 else "half",
        heavy=heavy,
        causal=terms.right is not None,
        equal=constants["BLOCK_D"] == constants["BLOCK_DV"],
        masked=mask is not None,
        gathers=positions is not None,
        table=table is not None,
        crowded=scores.group > 1 or sum(term is not None for term in of_registers) > 2,
    )
    return AttentionArguments(scores, sizes, kind, sequences, max_queries, max_keys, constants)


def _position_arguments(positions: PositionTerms | None) -> dict[str, Any]:
    of_queries = None if positions is None else positions.of_queries
    of_keys = None if positions is None else positions.of_keys
    wide = of_keys if of_queries is None else of_queries
    found: dict[str, Any] = {
        "buckets": None if positions is None else positions.buckets,
        "n_buckets": 0 if wide is None else wide.shape[3],
    }
    for name, tensor in (("of_queries", of_queries), ("of_keys", of_keys)):
        batch, head, *_ = broadcast_strides(tensor, 4)
        found |= {name: tensor, f"{name}_batch": batch, f"{name}_head": head}
    return found


def precision_of(query: torch.Tensor, value_dim: int) -> str:
    """Precision of float32 products, the same in all kernels of a call."""
    dim = max(query.shape[3], value_dim)
    return targets.dot_precision(query.dtype, targets.target_of(query.device), dim)


def scores_are_scaled(dtype: torch.dtype, terms: AttentionTerms) -> bool:
    """Whether kernels scale scores before the exponential: see :mod:`scores`.

    The scale can wait for it where nothing is added and order is kept. It then is rounded once with
    the top, so that the largest weight is 1 to within half of 2^-24 times the top: enough where
    weights are cast to half precision.
    """
    return dtype == torch.float32 or _must_be_scaled(terms)


def _must_be_scaled(terms: AttentionTerms) -> bool:
    """Whether something is added to scores, or the scale does not keep their order."""
    additive = terms.mask is not None and terms.mask.dtype != torch.bool
    others = terms.slopes, terms.table, terms.softcap
    return additive or terms.scale <= 0 or any(term is not None for term in others)


def lse_of(
    statistics: torch.Tensor, dtype: torch.dtype, terms: AttentionTerms
) -> torch.Tensor:
    """The natural log-sum-exp in float64, which holds both statistics [2, ...] of a query."""
    minus_top, inverse = statistics.double()
    unit = 1.0 if scores_are_scaled(dtype, terms) else math.log(2.0)
    return torch.where(minus_top == -torch.inf, -torch.inf, -minus_top * unit - inverse.log())


def statistics_of(lse: torch.Tensor, dtype: torch.dtype, terms: AttentionTerms) -> torch.Tensor:
    """The float32 statistics [2, ...] of queries from what :func:`lse_of` gives."""
    unit = 1.0 if scores_are_scaled(dtype, terms) else math.log(2.0)
    unseen = lse == -torch.inf
    top = (lse / unit).float()
    inverse = (top.double() * unit - lse).exp().float()
    minus_top = torch.where(unseen, -torch.inf, -top)
    return torch.stack((minus_top, inverse.masked_fill(unseen, 1.0)))


def broadcast_strides(tensor: torch.Tensor | None, rank: int) -> tuple[int, ...]:
    """Strides of a tensor of that rank, 0 in dimensions of size 1; zeros for None."""
    if tensor is None:
        return (0,) * rank
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return tuple(0 if size == 1 else stride for size, stride in sizes)
