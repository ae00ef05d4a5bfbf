"""Language models with a loss, in which each position tells the next token: one of padding too.

The padding before a row tells its first token, and stock learns from that.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusedformer._internal.checks import has_values
from fusedformer._internal.tracing import is_traced_by_jit, is_vmapped
from fusedformer.fusion._classes import WithArguments
from fusedformer.fusion._kept_rows import padding_computed


class NextTokens(WithArguments):
    """A base of models that compute a batch padded where its loss reads padded positions."""

    FUSED = "padded where labels are behind padding"

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Compute what the class behind this one computes."""
        given = {**dict(zip(self._arguments, args, strict=False)), **kwargs}
        if not _read_padding(given.get("labels"), given.get("attention_mask")):
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        with padding_computed():
            return super().forward(*args, **kwargs)  # type: ignore[misc]


def _read_padding(labels: Any, keep: Any) -> bool:
    """Return whether a label ``[batch, length]`` other than -100 is behind a padded position."""
    if not isinstance(labels, Tensor) or not isinstance(keep, Tensor):
        return False
    if (
        labels.dim() != 2
        or labels.shape != keep.shape
        or torch.compiler.is_compiling()
        or is_traced_by_jit()
        or is_vmapped(labels, keep)
        or not (has_values(labels) and has_values(keep))
    ):
        return False
    return bool((labels[:, 1:].ne(-100) & keep[:, :-1].eq(0)).any())
