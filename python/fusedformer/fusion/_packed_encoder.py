"""Encoders of transformers that compute only the real tokens of a padded batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from fusedformer import functional
from fusedformer._internal.checks import has_values
from fusedformer.fusion._attention import key_mask_of
from fusedformer.fusion._classes import WithArguments, is_asked
from fusedformer.fusion._classes import named as name_of
from fusedformer.fusion._families import STACKS
from fusedformer.fusion._kept_rows import (
    has_no_rows,
    sequences_of,
    through_layers,
    unpacked,
    zeroed,
)
from fusedformer.fusion._layers import see_packed_rows
from fusedformer.fusion._rows import may_pack
from fusedformer.nn.stacks import packing_of


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
            or not may_pack(self, x, keep)
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


class PackedStack(WithArguments):
    """A base of encoders that do no more than call their layers, which hand nothing on."""

    FUSED = PackedEncoder.FUSED
    static_shapes = False  # as in TransformerEncoder
    looks_attention_up = False  # its layers look whether it is this library's

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Compute what the class behind this one computes; packed, with zeros at padding."""
        given = {**dict(zip(self._arguments, args, strict=False)), **kwargs}
        x, mask = given.pop(self._arguments[0]), given.pop("attention_mask", None)
        as_tuple = given.pop("return_dict", True) is False
        layers = getattr(self, STACKS[name_of(self._made_of[1])])
        keep = key_mask_of(mask)
        keep = shared_keys(mask) if keep is None else keep
        if (
            keep is None
            or keep.shape != x.shape[:2]
            or any(map(is_asked, given.values()))
            or not may_pack(self, x, keep, by_ours=False)
            or not see_packed_rows(layers)
        ):
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        packing = packing_of(keep, self.static_shapes)
        if has_no_rows(packing):
            states = zeroed(super().forward(*args, **kwargs)[0], keep)  # type: ignore[misc]
        else:
            rows = through_layers(self, layers, functional.pack(x, packing)[None], packing)
            states = unpacked(rows[0], packing)
        return (states,) if as_tuple else BaseModelOutput(last_hidden_state=states)


def shared_keys(mask: Tensor | None) -> Tensor | None:
    """Return the keys ``[batch, keys]``, True = real, that a mask of scores leaves to all queries.

    None if it is another mask, or nobody knows.
    """
    if mask is None or mask.dim() != 4 or mask.shape[1] != 1 or not has_values(mask):
        return None
    if mask.dtype not in (torch.bool, torch.float32, torch.float16, torch.bfloat16):
        return None
    rows = mask[:, 0]
    keys = rows[:, :1]
    if mask.dtype == torch.bool:
        real, is_of_keys = keys, (rows == keys).all()
    else:
        real = keys == 0
        is_of_keys = (rows == keys).all() & (real | (keys == torch.finfo(mask.dtype).min)).all()
    return real[:, 0] if bool(is_of_keys) else None
