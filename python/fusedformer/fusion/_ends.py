"""The position of each text that a dual encoder's tower pools: where the text ends."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def largest(model: Any, ids: Tensor) -> Tensor:
    """Return the columns ``[batch]`` of the largest ids: the token of the end has the last id."""
    return ids.to(torch.int).argmax(-1)


def first_end(model: Any, ids: Tensor) -> Tensor:
    """Return the columns of the first tokens that end a text; padding may have their id."""
    is_end: Tensor = ids == model.eos_token_id
    return is_end.int().argmax(-1)


def end(model: Any, ids: Tensor) -> Tensor:
    """Return the columns of the ends; configurations of the first models say 2, which is wrong."""
    return largest(model, ids) if model.eos_token_id == 2 else first_end(model, ids)


def last(model: Any, ids: Tensor) -> Tensor:
    """Return the last column of each text, padding or not."""
    return ids.new_full(ids.shape[:1], ids.shape[1] - 1)
