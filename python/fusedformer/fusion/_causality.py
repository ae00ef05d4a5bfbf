"""What causal models of transformers see, where their tokens are packed.

Their masks are causal whatever attention says of itself, unless a configuration or a caller says
``is_causal=False``; and what a packed call has in place of a mask is attention's own setting.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusedformer.fusion._attention import CAUSAL
from fusedformer.fusion._forms import Model


def no_mask(device: torch.device) -> Tensor:
    """Return what causal models hand on in place of a mask; given none they make one."""
    return torch.empty((0, 1, 1, 1), dtype=CAUSAL, device=device)


def masks_are_causal(model: Model, config: Any, given: dict[str, Any]) -> bool | None:
    """Return what attention must say of itself, to see packed what masks let it see.

    None leaves it open: its masks are made by it, or it is told by the call.
    """
    if not model.masks_causally or _told(config, given) is not None:
        return None
    return not _are_full(model, config)


def sees_otherwise(model: Model, config: Any, given: dict[str, Any]) -> bool:
    """Return whether masks are other than what a packed call would be told.

    Masks that are not causal have windows that are wider by one.
    """
    told = _told(config, given)
    if not model.masks_causally or told is None:
        return False
    return _are_full(model, config) if told else _windows(config)


def angles_need_batch(config: Any, length: int, positions: Any) -> bool:
    """Return whether rotary embedding scales angles by the longest row of a batch."""
    ropes = getattr(config, "rope_parameters", None) or {}
    of_types = all(isinstance(rope, dict) for rope in ropes.values())
    for rope in ropes.values() if of_types else (ropes,):
        kind = rope.get("rope_type") or ""
        if "dynamic" in kind or kind == "longrope":
            longest = rope.get("original_max_position_embeddings"), config.max_position_embeddings
            if positions is not None or length >= min(one for one in longest if one):
                return True
    return False


def _told(config: Any, given: dict[str, Any]) -> bool | None:
    told = given.get("is_causal")
    return getattr(config, "is_causal", None) if told is None else told


def _are_full(model: Model, config: Any) -> bool:
    return model.full_by is not None and bool(getattr(config, model.full_by, False))


def _windows(config: Any) -> bool:
    return getattr(config, "sliding_window", None) is not None
