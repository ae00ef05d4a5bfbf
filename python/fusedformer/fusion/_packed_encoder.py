"""Encoders of transformers that compute only the real tokens of a padded batch."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fusedformer import functional
from fusedformer.fusion._attention import captured, key_mask_of
from fusedformer.fusion._kept_rows import has_no_rows, unpacked, wants_padding, zeroed
from fusedformer.fusion._rows import needs_batch
from fusedformer.nn.stacks import can_pack, packing_of


class PackedEncoder:
    """A base of encoders that compute only the real tokens of a padded batch.

    They go through the layers as one long sequence, in which attention keeps to each token's own.
    Where the model around them packs, they find that done.
    """

    FUSED = "packed: real tokens only"
    looks_attention_up = True  # in a configuration, so that it may be another by now

    static_shapes = False  # as in TransformerEncoder

    def forward(
        self: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Compute what the class behind this one computes; packed, with zeros at padding."""
        others = [*args, *(kwargs.get(n) for n in ("past_key_values", "encoder_hidden_states"))]
        keep = key_mask_of(attention_mask)
        if (
            keep is None
            or keep.shape != hidden_states.shape[:2]
            or any(one is not None for one in others)
            or kwargs.get("cu_seq_lens_q") is not None
            or captured()
            or wants_padding()
            or not can_pack(hidden_states, self.static_shapes, keep)
            or needs_batch(self)
        ):
            return super().forward(hidden_states, attention_mask, *args, **kwargs)  # type: ignore[misc]
        packing = packing_of(keep, self.static_shapes)
        if has_no_rows(packing):
            output = super().forward(hidden_states, attention_mask, *args, **kwargs)  # type: ignore[misc]
            output.last_hidden_state = zeroed(output.last_hidden_state, keep)
            return output
        rows = functional.pack(hidden_states, packing)
        output = super().forward(  # type: ignore[misc]
            rows[None],
            None,
            *args,
            **kwargs,
            cu_seq_lens_q=packing.cu_seqlens_q,
            cu_seq_lens_k=packing.cu_seqlens_k,
            max_length_q=packing.max_seqlen,
            max_length_k=packing.max_seqlen,
        )
        output.last_hidden_state = unpacked(output.last_hidden_state[0], packing)
        return output
