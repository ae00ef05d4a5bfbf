"""Models of transformers that are packed as a whole, as their own forward runs the layers."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedformer import functional
from fusedformer._internal.checks import has_values
from fusedformer.functional import Packing
from fusedformer.fusion._attention import captured
from fusedformer.fusion._kept_rows import has_no_rows, unpacked, wants_padding, zeroed
from fusedformer.fusion._rows import needs_batch
from fusedformer.nn.stacks import can_pack, packing_of

_ARGUMENTS = "input_ids", "attention_mask", "position_ids", "inputs_embeds"


class PackedModel:
    """A base of models that compute only the real tokens of a padded batch, embeddings included.

    They go through the layers as one long sequence, in which attention keeps to each token's own;
    positions stay as they were. Kernels apply the windows of local layers, not masks.
    """

    static_shapes = False  # as in TransformerEncoder

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Compute what the class behind this one computes; packed, with zeros at padding."""
        given = {**dict(zip(_ARGUMENTS, args, strict=False)), **kwargs}
        if not self._packs(given):
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        keep = given["attention_mask"].bool()
        packing, keys = _spans(keep, self.static_shapes or not has_values(keep))
        if has_no_rows(packing):
            output = super().forward(**given)  # type: ignore[misc]
            found = zeroed(output[0], keep)
        else:
            output = super().forward(**{**given, **self._packed_arguments(given, packing, keys)})  # type: ignore[misc]
            if keys is None:
                found = unpacked(output[0][0], packing)
            else:  # some of the rows are padding
                found = zeroed(functional.unpack(output[0][0], packing), keep)
        if isinstance(output, tuple):
            return found, *output[1:]
        output.last_hidden_state = found
        return output

    def _packs(self: Any, given: dict[str, Any]) -> bool:
        """Return whether there is a 2-D mask, and nothing needs the batch padded."""
        keep, ids, embedded = map(given.get, ("attention_mask", "input_ids", "inputs_embeds"))
        tokens: Any = ids if embedded is None else embedded
        asked = "output_hidden_states", "output_attentions"
        return not (
            not isinstance(keep, Tensor)
            or keep.dim() != 2
            or (ids is None) == (embedded is None)
            or tokens.shape[:2] != keep.shape
            or given.get("cu_seq_lens_q") is not None
            or captured()
            or wants_padding()
            or any(given.get(n, getattr(self.config, n, False)) for n in asked)
            or not can_pack(tokens, self.static_shapes, keep)
            or needs_batch(self)
        )

    def _packed_arguments(
        self: Any, given: dict[str, Any], packing: Packing, keys: Tensor | None
    ) -> dict[str, Any]:
        """Return the arguments of the packed call that differ from those ``given``."""
        places = packing.indices.clamp(min=0)
        positions, embedded = given.get("position_ids"), given.get("inputs_embeds")
        columns = places % packing.length
        if positions is not None:
            columns = positions.expand(packing.batch, packing.length).flatten()[places]
        if embedded is None:
            rows = {"input_ids": given["input_ids"].flatten()[places][None]}
        else:
            rows = {"inputs_embeds": functional.pack(embedded, packing)[None]}
        return {
            **rows, "attention_mask": dict.fromkeys(self.config.layer_types, keys),
            "position_ids": columns[None], "cu_seq_lens_q": packing.cu_seqlens_q,
            "cu_seq_lens_k": packing.cu_seqlens_k, "max_length_q": packing.max_seqlen,
            "max_length_k": packing.max_seqlen,
        }  # fmt: skip


def _spans(keep: Tensor, static_shapes: bool) -> tuple[Packing, Tensor | None]:
    """Pack each row from its first real token to its last, as windows count all positions between.

    With static shapes whole rows are packed, since their tokens may end anywhere.

    Returns:
        The packing, and a mask of keys ``[sequences, 1, 1, longest]`` unless each of these
        positions is known to be real.
    """
    batch, length = keep.shape
    if static_shapes:
        return packing_of(torch.ones_like(keep), False, [length] * batch), keep[:, None, None]
    real = keep.int()
    begins = real.argmax(1)
    ends = torch.where(keep.any(1), length - real.flip(1).argmax(1), begins)
    columns = torch.arange(length, device=keep.device)
    spans = (columns >= begins[:, None]) & (columns < ends[:, None])
    counts = torch.stack((spans.sum(1), real.sum(1))).tolist()
    packing = packing_of(spans, False, counts[0])
    if counts[0] == counts[1]:
        return packing, None
    within = begins[:, None] + torch.arange(packing.max_seqlen, device=keep.device)
    keys = keep.gather(1, within.clamp(max=length - 1))
    return packing, F.pad(keys, (0, 0, 0, 2 * packing.has_tail), value=True)[:, None, None]


MODELS = {"modernbert.modeling_modernbert.ModernBertModel"}
