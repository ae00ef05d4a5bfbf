"""Encoders of transformers that compute only the real tokens of a padded batch."""

from __future__ import annotations

from typing import Any

from fusedformer import functional
from fusedformer.fusion._attention import captured, key_mask_of
from fusedformer.fusion._classes import WithArguments
from fusedformer.fusion._kept_rows import (
    has_no_rows,
    sequences_of,
    unpacked,
    wants_padding,
    zeroed,
)
from fusedformer.fusion._layers import see_packed_rows
from fusedformer.fusion._rows import needs_batch
from fusedformer.nn.stacks import can_pack, packing_of


class PackedEncoder(WithArguments):
    """A base of encoders that compute only the real tokens of a padded batch.

    They go through the layers as one long sequence, in which attention keeps to each token's own.
    Where the model around them packs, they find that done.
    """

    FUSED = "packed: real tokens only"
    looks_attention_up = True  # in a configuration, so that it may be another by now

    static_shapes = False  # as in TransformerEncoder

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Compute what the class behind this one computes; packed, with zeros at padding."""
        given = {**dict(zip(self._arguments, args, strict=False)), **kwargs}
        name = self._arguments[0]
        x, keep = given[name], key_mask_of(given.get("attention_mask"))
        others = [*args[2:], *map(given.get, ("past_key_values", "encoder_hidden_states"))]
        if (
            keep is None
            or keep.shape != x.shape[:2]
            or any(one is not None for one in others)
            or given.get("cu_seq_lens_q") is not None
            or captured()
            or wants_padding()
            or not can_pack(x, self.static_shapes, keep)
            or needs_batch(self)
            or not self._knows_layers()
        ):
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        packing = packing_of(keep, self.static_shapes)
        if has_no_rows(packing):
            output = super().forward(*args, **kwargs)  # type: ignore[misc]
            output.last_hidden_state = zeroed(output.last_hidden_state, keep)
            return output
        given[name], given["attention_mask"] = functional.pack(x, packing)[None], None
        output = super().forward(  # type: ignore[misc]
            **given, **sequences_of(packing)
        )
        output.last_hidden_state = unpacked(output.last_hidden_state[0], packing)
        return output

    def _knows_layers(self) -> bool:
        """Return whether the layers see packed sequences; those of texts hand them on."""
        return True


class PackedPatches(PackedEncoder):
    """The same of images with SigLIP's layers, which by themselves hand nothing on."""

    def _knows_layers(self: Any) -> bool:
        """Return whether all layers are computed by their form."""
        return see_packed_rows(self.layers)
