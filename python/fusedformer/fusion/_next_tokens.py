"""Heads of language models that read padded positions: a loss, and what classifies a text.

In a loss each position tells the next token, so that the padding before a row tells its first, and
stock learns from that. A text is classified by its last token, which without ids is taken to be the
last position.
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


class LastToken(WithArguments):
    """A base of models that compute a batch padded where the token that they pool is padding."""

    FUSED = "padded where it pools padding"

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Compute what the class behind this one computes."""
        given = {**dict(zip(self._arguments, args, strict=False)), **kwargs}
        keep, ids = given.get("attention_mask"), given.get("input_ids")
        if not _pools_padding(keep, ids, self.config.get_text_config().pad_token_id):
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        with padding_computed():
            return super().forward(*args, **kwargs)  # type: ignore[misc]


def _pools_padding(keep: Any, ids: Any, padding: int | None) -> bool:
    """Return whether the mask ``[batch, length]`` hides the last position, or the last real id."""
    if not isinstance(keep, Tensor) or keep.dim() != 2 or not keep.numel() or _is_unknown(keep):
        return False
    if not isinstance(ids, Tensor) or padding is None or ids.shape != keep.shape:
        return bool(keep[:, -1].eq(0).any())
    columns = torch.arange(ids.shape[1], device=ids.device)
    last = (columns * ids.ne(padding)).argmax(1, keepdim=True)
    return bool(keep.gather(1, last).eq(0).any())


def _is_unknown(*tensors: Tensor) -> bool:
    """Return whether nobody can look at values now."""
    return (
        torch.compiler.is_compiling()
        or is_traced_by_jit()
        or is_vmapped(*tensors)
        or not all(map(has_values, tensors))
    )


def _read_padding(labels: Any, keep: Any) -> bool:
    """Return whether a label ``[batch, length]`` other than -100 is behind a padded position."""
    if not isinstance(labels, Tensor) or not isinstance(keep, Tensor):
        return False
    if labels.dim() != 2 or labels.shape != keep.shape or _is_unknown(labels, keep):
        return False
    return bool((labels[:, 1:].ne(-100) & keep[:, :-1].eq(0)).any())
