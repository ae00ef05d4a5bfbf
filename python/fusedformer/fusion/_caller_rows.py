"""Rows that a caller packed: sequences in a batch of one, whose positions begin anew.

TRL and transformers' ``DataCollatorWithFlattening`` make them. Causal models of transformers then
mask pairs of different sequences; here attention gets the sequences in place of that mask.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusedformer._internal.checks import has_values


def sequences_of_positions(positions: Any) -> dict[str, Any]:
    """Return what tells attention of the sequences in one row; nothing if there is but one.

    As to transformers, a position that does not follow the one before is the first of a sequence.
    """
    if not isinstance(positions, Tensor) or positions.dim() != 2 or positions.shape[0] != 1:
        return {}
    if not has_values(positions):
        return {}
    length = positions.shape[1]
    firsts = torch.nonzero(positions[0].diff() != 1).flatten() + 1
    if not len(firsts):
        return {}
    starts = torch.cat((firsts.new_zeros(1), firsts, firsts.new_full((1,), length)))
    longest = int(starts.diff().max())
    starts = starts.int()
    return {
        "cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": longest,
        "max_length_k": longest,
    }  # fmt: skip
