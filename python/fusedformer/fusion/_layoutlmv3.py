"""The encoder of LayoutLMv3: packed, with the biases of real tokens alone.

Its layers add biases by the distances of tokens and of their boxes to the scores. The encoder makes
both of the positions and boxes that it is given, once for all layers: here of real tokens, moved to
the front of each row.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fusedformer import functional
from fusedformer.functional import Packing
from fusedformer.fusion._kept_rows import (
    has_no_rows,
    sequences_of,
    unpacked,
    zeroed,
)
from fusedformer.fusion._layers import FusedLayer
from fusedformer.fusion._packed_encoder import shared_keys
from fusedformer.fusion._rows import may_pack


class PackedLayoutEncoder:
    """A base of encoders that compute only the real tokens of texts and images."""

    FUSED = "packed: real tokens only"
    static_shapes = False  # as in TransformerEncoder
    looks_attention_up = False  # in a configuration

    def forward(
        self: Any,
        hidden_states: Tensor,
        bbox: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Compute what the class behind this one computes; packed, with zeros at padding."""
        keep = shared_keys(attention_mask)
        if keep is None or not self._packs(hidden_states, keep):
            return super().forward(  # type: ignore[misc]
                hidden_states, bbox, attention_mask, position_ids, *args, **kwargs
            )
        packing = Packing.of(keep)  # without rows of zeros, which would need biases too
        if has_no_rows(packing):
            output = super().forward(hidden_states, bbox, None, position_ids, *args, **kwargs)  # type: ignore[misc]
            output.last_hidden_state = zeroed(output.last_hidden_state, keep)
            return output
        first = (~keep).byte().argsort(dim=1, stable=True)[:, : packing.max_seqlen]
        if bbox is not None:
            bbox = bbox.gather(1, first[..., None].expand(-1, -1, bbox.shape[-1]))
        if position_ids is not None:
            position_ids = position_ids.gather(1, first)
        output = super().forward(  # type: ignore[misc]
            functional.pack(hidden_states, packing)[None],
            bbox,
            None,
            position_ids,
            *args,
            **kwargs,
            **sequences_of(packing),
        )
        output.last_hidden_state = unpacked(output.last_hidden_state[0], packing)
        return output

    def _packs(self: Any, x: Tensor, keep: Tensor) -> bool:
        """Return whether nothing needs the batch padded, and every layer knows packed rows."""
        return (
            keep.shape == x.shape[:2]
            and not self.static_shapes
            and may_pack(self, x, keep, by_ours=False)
            and all(
                isinstance(layer, FusedLayer) and layer.is_known(layer) and layer.is_plain(layer)
                for layer in self.layer
            )
        )
