"""Models of transformers whose own forward goes through the layers: packed as a whole."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fusedformer import functional
from fusedformer.functional import Packing
from fusedformer.fusion._attention import captured
from fusedformer.fusion._post_norm import takes_rows
from fusedformer.nn._stacks import can_pack, packing_of

_ARGUMENTS = "input_ids", "attention_mask", "position_ids", "inputs_embeds"


class PackedModel:
    """A model's forward on the real tokens of a padded batch, from the embedding on.

    They go through it as one sequence with the positions that they had, whose parts attention
    tells apart; the windows of local layers are then the kernels', not masks.
    """

    static_shapes = False  # as of TransformerEncoder

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        """As the class that it is put before; with zeros at padded positions if it packs."""
        given = {**dict(zip(_ARGUMENTS, args, strict=False)), **kwargs}
        packing = self._packing_of(given)
        if packing is None:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        output = super().forward(**{**given, **self._packed(given, packing)})  # type: ignore[misc]
        unpacked = functional.unpack(output[0][0], packing)
        if isinstance(output, tuple):
            return unpacked, *output[1:]
        output.last_hidden_state = unpacked
        return output

    def _packing_of(self: Any, given: dict[str, Any]) -> Packing | None:
        """Of a batch with a 2-D mask, if nothing needs it padded."""
        keep, ids, embedded = map(given.get, ("attention_mask", "input_ids", "inputs_embeds"))
        tokens: Any = ids if embedded is None else embedded
        asked = "output_hidden_states", "output_attentions"
        if (
            not isinstance(keep, Tensor)
            or keep.dim() != 2
            or (ids is None) == (embedded is None)
            or tokens.shape[:2] != keep.shape
            or given.get("cu_seq_lens_q") is not None
            or captured()
            or any(given.get(n, getattr(self.config, n, False)) for n in asked)
            or not takes_rows(self)
            or not can_pack(tokens, self.static_shapes)
        ):
            return None
        return packing_of(keep.bool(), self.static_shapes)

    def _packed(self: Any, given: dict[str, Any], packing: Packing) -> dict[str, Any]:
        """The arguments that differ."""
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
            **rows, "attention_mask": dict.fromkeys(self.config.layer_types),
            "position_ids": columns[None], "cu_seq_lens_q": packing.cu_seqlens_q,
            "cu_seq_lens_k": packing.cu_seqlens_k, "max_length_q": packing.max_seqlen,
            "max_length_k": packing.max_seqlen,
        }  # fmt: skip


MODELS = {"modeling_modernbert.ModernBertModel"}
