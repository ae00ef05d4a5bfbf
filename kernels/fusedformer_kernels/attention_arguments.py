"""Launch arguments of the attention kernels, worked out once from the tensors of a call."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from fusedformer_kernels import configs
from fusedformer_kernels.strided import in_line


class AttentionTerms(NamedTuple):
    """What scores depend on besides queries and keys: see ``fusedformer.ops.attention_terms``."""

    mask: torch.Tensor | None = None
    key_mask: torch.Tensor | None = None
    key_lengths: torch.Tensor | None = None
    slopes: torch.Tensor | None = None
    table: torch.Tensor | None = None
    starts_q: torch.Tensor | None = None
    starts_k: torch.Tensor | None = None
    seed: torch.Tensor | None = None
    p: float = 0.0
    left: int | None = None
    right: int | None = None
    align_end: bool = False
    scale: float = 1.0
    softcap: float | None = None
    max_queries: int = 0
    max_keys: int = 0


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
    table_column: Any
    radius: Any  # of the table
    left: Any
    right: Any
    align_end: Any  # 1 or None
    seed: Any
    p: Any
    starts_q: Any
    starts_k: Any
    heads: Any
    group: Any  # query heads that share a key head
    n_queries: Any  # of the padded form
    n_keys: Any


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


@dataclass(frozen=True)
class AttentionArguments:
    """What all kernels of one attention call are launched with."""

    scores: Scores
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


def attention_arguments(
    query: torch.Tensor, key: torch.Tensor, value_dim: int, terms: AttentionTerms
) -> AttentionArguments:
    """Arguments of one call; tensors as ``AttentionTerms`` of the library documents them."""
    packed = terms.starts_q is not None
    sequences = terms.starts_q.numel() - 1 if terms.starts_q is not None else query.shape[0]
    mask, slopes, table = terms.mask, terms.slopes, terms.table
    additive = mask is not None and mask.dtype != torch.bool
    softcap = None if terms.softcap is None else float(terms.softcap)
    mask_batch, mask_head, mask_row, mask_column = broadcast_strides(mask, 4)
    key_mask_batch, key_mask_column = broadcast_strides(terms.key_mask, 2)
    slopes_batch, slopes_head = broadcast_strides(slopes, 2)
    table_head, table_column = broadcast_strides(table, 2)
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
        key_lengths=in_line(terms.key_lengths),
        slopes=slopes,
        slopes_batch=slopes_batch,
        slopes_head=slopes_head,
        table=table,
        table_head=table_head,
        table_column=table_column,
        radius=0 if table is None else table.shape[1] // 2,
        left=terms.left,
        right=terms.right,
        align_end=1 if terms.align_end else None,
        seed=terms.seed,
        p=float(terms.p),
        starts_q=in_line(terms.starts_q),
        starts_k=in_line(terms.starts_k),
        heads=query.shape[1],
        group=query.shape[1] // key.shape[1],
        n_queries=query.shape[2],
        n_keys=key.shape[2],
    )
    added = additive or slopes is not None or table is not None or softcap is not None
    constants: dict[str, Any] = {
        "HEAD_DIM": query.shape[3],
        "VALUE_DIM": value_dim,
        "BLOCK_D": configs.padded_dim(query.shape[3]),
        "BLOCK_DV": configs.padded_dim(value_dim),
        # The scale can wait for the exponential where nothing is added and order is kept.
        "SCALED": added or terms.scale <= 0,
        "PRECISION": configs.dot_precision(query.dtype),
    }
    kind = configs.AttentionKind(
        dim=max(constants["BLOCK_D"], constants["BLOCK_DV"]),
        operands=constants["PRECISION"] if query.dtype == torch.float32 else "half",
        heavy=added or mask is not None or terms.seed is not None or terms.left is not None,
        causal=terms.right is not None,
    )
    return AttentionArguments(
        scores, kind, sequences, terms.max_queries if packed else query.shape[2],
        terms.max_keys if packed else key.shape[2], constants,
    )


def broadcast_strides(tensor: torch.Tensor | None, rank: int) -> tuple[int, ...]:
    """Strides of a tensor of that rank, 0 in dimensions of size 1; zeros for None."""
    if tensor is None:
        return (0,) * rank
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return tuple(0 if size == 1 else stride for size, stride in sizes)
