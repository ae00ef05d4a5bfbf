"""Embeddings of positions, as encoders of sequence-to-sequence models ask their table for them."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def of_ids(model: Any, given: dict[str, Any]) -> Tensor:
    """Return the embeddings ``[1, length, width]`` of a table that reads the shape of ids."""
    return model.embed_positions(given["attention_mask"][:1])  # type: ignore[no-any-return]


def of_shape(model: Any, given: dict[str, Any]) -> Tensor:
    """Return the same of a table that is told the shape."""
    return model.embed_positions(given["attention_mask"].shape)[None]  # type: ignore[no-any-return]


def of_tokens(model: Any, given: dict[str, Any]) -> Tensor:
    """Return the embeddings ``[batch, length, width]`` of a table that counts real tokens."""
    found: Tensor = model.embed_positions(given.get("input_ids"), given.get("inputs_embeds"))
    return found
