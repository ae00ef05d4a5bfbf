"""Towers of text in dual encoders, as CLIP's: texts of a batch packed, and pooled at one token.

Their embeddings take no more tokens at once than a text may have, so that the models' own forward
cannot be given packed ones. It is written here, by the model's table.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from fusedformer import functional
from fusedformer._internal.checks import has_values
from fusedformer.functional import Packing
from fusedformer.fusion._classes import is_asked, is_asked_of
from fusedformer.fusion._kept_rows import sequences_of, zeroed
from fusedformer.fusion._packed_model import PackedModel
from fusedformer.nn.stacks import packing_of

# All that is known here; of these, PackedModel looks at what layers would have to return.
_ARGUMENTS = {
    "input_ids", "attention_mask", "position_ids", "return_dict", "output_hidden_states",
    "output_attentions", "use_cache",
}  # fmt: skip


class PackedTower(PackedModel):
    """A base of towers whose encoder gets real tokens alone, and those that are pooled."""

    FUSED = "packed: real tokens only, behind the embeddings"

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Compute what the class behind this one computes; packed, with zeros at padding.

        What is pooled may be padding, which sees the real tokens.
        """
        given = {**dict(zip(self._arguments, args, strict=False)), **kwargs}
        more = given.keys() - _ARGUMENTS
        if any(is_asked(given[name]) for name in more) or not self._packs(given):
            return super(PackedModel, self).forward(*args, **kwargs)  # type: ignore[misc]
        tower, ids, keep = self._model.tower, given["input_ids"], given["attention_mask"].bool()
        if tower.if_padded and not (has_values(keep) and not bool(keep.all())):
            return super(PackedModel, self).forward(*args, **kwargs)  # type: ignore[misc]
        ends = None if tower.end is None else tower.end(self, ids)
        if ends is None:
            packing, keys = packing_of(keep, self._is_static()), None
        else:
            packing, keys = _packing(keep, ends, self._is_static())
        x = self.embeddings(input_ids=ids, position_ids=given.get("position_ids"))
        states = self.encoder(
            inputs_embeds=functional.pack(x, packing)[None],
            attention_mask=keys,
            is_causal=tower.is_causal,
            **sequences_of(packing),
        ).last_hidden_state
        states = functional.unpack(self.get_submodule(tower.norm)(states)[0], packing)
        if ends is None:
            count = given["attention_mask"].sum(1, keepdim=True)
            pooled = states.sum(1) / (count + self.config.pooling_epsilon)
        else:
            pooled = states[torch.arange(len(ends), device=ends.device), ends]
        if tower.head is not None:
            pooled = self.get_submodule(tower.head)(pooled)
        states = states if keys is None else zeroed(states, keep)
        if not is_asked_of(self, given, "return_dict"):
            return states, pooled
        return BaseModelOutputWithPooling(last_hidden_state=states, pooler_output=pooled)


def _packing(keep: Tensor, ends: Tensor, static_shapes: bool) -> tuple[Packing, Tensor | None]:
    """Pack real tokens and those at ``ends`` ``[batch]``.

    Returns:
        The packing, and a mask of keys ``[sequences, 1, 1, longest]`` unless all of these tokens
        are known to be real.
    """
    rows = keep.scatter(1, ends[:, None], True)
    if static_shapes or not has_values(keep):
        packing = packing_of(rows, True)
    else:
        counts = torch.stack((rows.sum(1), keep.sum(1))).tolist()
        packing = packing_of(rows, False, counts[0])
        if counts[0] == counts[1]:
            return packing, None
    columns = rows.int().sort(dim=1, descending=True, stable=True).indices
    keys = keep.gather(1, columns[:, : packing.max_seqlen])
    return packing, F.pad(keys, (0, 0, 0, 2 * packing.has_tail), value=True)[:, None, None]
