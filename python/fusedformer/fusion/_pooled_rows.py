"""Pooling of packed rows to one vector for each sequence, as sentence-transformers pools."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedformer.functional import Packing


class PackedSequences:
    """Packed rows, and how many of each sequence's first tokens, a prompt's, are left out.

    Nothing here is differentiated, and no sequence's result depends on the others.
    """

    def __init__(self, rows: Tensor, packing: Packing, prompt_length: int = 0) -> None:
        """Take ``rows`` ``[total, width]``, of which all sums are computed in at least float32."""
        self.rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        self.packing = packing
        self.prompt_length = prompt_length
        self.starts = packing.cu_seqlens.long()

    def pooled(self, mode: str) -> Tensor:
        """Pool by a mode of sentence-transformers, to ``[batch, width]``; at least float32."""
        if mode == "max":
            return self._largest()
        if mode == "cls":
            sizes = self.starts.diff()
            skipped = torch.where(sizes > self.prompt_length, self.prompt_length, 0)
            return self._row_of_each(self.starts[:-1] + skipped, sizes > 0)
        if mode == "lasttoken":
            return self._row_of_each(self.starts[1:] - 1, self.starts.diff() > self.prompt_length)
        if mode in ("mean", "mean_sqrt_len_tokens", "weightedmean"):
            return self._mean(mode)
        raise ValueError(f"fusedformer: expected a known 'pooling_mode', but got {mode!r}")

    def _mean(self, mode: str) -> Tensor:
        weights = None
        if mode == "weightedmean":
            weights = self._places + 1
            weights = weights if self._counts is None else weights * self._counts
            weights = weights.to(self.rows.dtype)
        elif self._counts is not None:
            weights = self._counts.to(self.rows.dtype)
        if weights is None:
            total = self.starts.diff()[:, None].to(self.rows.dtype)
        else:
            total = self._sums(weights[:, None], None)
        total = total.clamp(min=1e-9)
        total = total.sqrt() if mode == "mean_sqrt_len_tokens" else total
        return self._sums(self.rows, weights) / total

    def _sums(self, rows: Tensor, weights: Tensor | None) -> Tensor:
        """Sum the rows of each sequence."""
        everything = torch.arange(rows.shape[0], device=rows.device)
        # The last bag has the rows behind the last token.
        sums = F.embedding_bag(
            everything, rows, self.starts, mode="sum", per_sample_weights=weights
        )
        return sums[:-1]

    def _largest(self) -> Tensor:
        rows, batch = self.rows, self.packing.batch
        if self._counts is not None:
            rows = rows.masked_fill(~self._counts[:, None], -torch.inf)
        found = rows.new_full((batch + 1, rows.shape[1]), -torch.inf)
        # Rows behind the last token go to a sequence of their own.
        places = self._sequences.where(self.packing.indices >= 0, batch)
        found.scatter_reduce_(0, places[:, None].expand_as(rows), rows, "amax")
        return found[:-1]

    def _row_of_each(self, places: Tensor, exists: Tensor) -> Tensor:
        """Pick a row of each sequence; zeros where it does not exist."""
        if not self.rows.shape[0]:
            return self.rows.new_zeros(self.packing.batch, self.rows.shape[1])
        last = self.rows.shape[0] - 1
        return self.rows[places.clamp(0, last)].masked_fill(~exists[:, None], 0.0)

    @functools.cached_property
    def _sequences(self) -> Tensor:
        return self.packing.indices.clamp(min=0) // self.packing.length

    @functools.cached_property
    def _places(self) -> Tensor:
        """The columns of tokens in the padded batch, from the first of their sequence on."""
        columns = self.packing.indices.clamp(min=0) % self.packing.length
        firsts = columns[self.starts[:-1].clamp(max=columns.shape[0] - 1)]
        return columns - firsts[self._sequences]

    @functools.cached_property
    def _counts(self) -> Tensor | None:
        """Which tokens count; None if all do."""
        return self._places >= self.prompt_length if self.prompt_length else None
