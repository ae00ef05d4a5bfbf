"""Encoders of sequence-to-sequence models, as BART's: real tokens of a padded batch alone.

They number positions themselves, so that their own forward cannot be given packed tokens. It is
written here; a model's table says how it looks positions up.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from fusedformer import functional
from fusedformer.functional import Packing
from fusedformer.fusion._classes import is_asked, is_asked_of
from fusedformer.fusion._kept_rows import has_no_rows, through_layers, unpacked, zeroed
from fusedformer.fusion._packed_model import PackedModel
from fusedformer.nn.stacks import packing_of

# All that is known here; of these, PackedModel looks at what layers would have to return.
_ARGUMENTS = {
    "input_ids", "inputs_embeds", "attention_mask", "return_dict", "output_hidden_states",
    "output_attentions", "use_cache",
}  # fmt: skip


class PackedSeq2Seq(PackedModel):
    """A base of encoders that have BART's children."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Compute what the class behind this one computes; packed, with zeros at padding."""
        given = {**dict(zip(self._arguments, args, strict=False)), **kwargs}
        more = given.keys() - _ARGUMENTS
        if any(is_asked(given[name]) for name in more) or not self._packs(given):
            return super(PackedModel, self).forward(*args, **kwargs)  # type: ignore[misc]
        keep = given["attention_mask"].bool()
        packing = packing_of(keep, self._is_static())
        if has_no_rows(packing):
            output = super(PackedModel, self).forward(**{**given, "return_dict": True})  # type: ignore[misc]
            states = zeroed(output.last_hidden_state, keep)
        else:
            x = F.dropout(self._embedded(given, packing), self.dropout, self.training)
            x = through_layers(self, self.layers, x, packing, self.layerdrop)
            last = getattr(self, "layer_norm", None)
            states = unpacked((x if last is None else last(x))[0], packing)
        if not is_asked_of(self, given, "return_dict"):
            return (states,)
        return BaseModelOutput(last_hidden_state=states)

    def _embedded(self: Any, given: dict[str, Any], packing: Packing) -> Tensor:
        """Return the embeddings ``[1, total, width]`` of packed tokens."""
        places = packing.indices.clamp(min=0)
        if given.get("inputs_embeds") is not None:
            x = functional.pack(given["inputs_embeds"], packing)
        else:
            x = self.embed_tokens(given["input_ids"].flatten()[places])
            x = x * getattr(self, "embed_scale", 1.0)
        positions: Tensor = self._model.positions(self, given)
        if positions.shape[0] == 1:
            x = x + positions[0][places % packing.length].to(x.device)
        else:
            x = x + functional.pack(positions.to(x.device), packing)
        norm = getattr(self, "layernorm_embedding", None)
        return (x if norm is None else norm(x))[None]
