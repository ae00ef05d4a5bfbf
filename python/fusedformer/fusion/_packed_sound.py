"""Encoders of sound, as wav2vec2's, that compute only the real frames of a padded batch.

The convolution that tells positions needs the batch as it is; everything behind it goes through
packed frames.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import modeling_outputs
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.integrations.fsdp import is_fsdp_managed_module
from transformers.modeling_outputs import BaseModelOutput

from fusedformer import functional
from fusedformer._internal.checks import has_values
from fusedformer.functional import Packing
from fusedformer.fusion._attention import key_mask_of
from fusedformer.fusion._classes import WithArguments, is_asked
from fusedformer.fusion._classes import named as name_of
from fusedformer.fusion._families import POOLED_SOUND
from fusedformer.fusion._gated_bias import GatedBiasLayer
from fusedformer.fusion._kept_rows import (
    has_no_rows,
    is_dropped,
    sequences_of,
    through_layers,
    zeroed,
)
from fusedformer.fusion._packed_model import spans
from fusedformer.fusion._rows import may_pack
from fusedformer.nn.stacks import packing_of


class PackedSound:
    """A base of encoders whose layers get the real frames of all sequences as one long sequence."""

    FUSED = "packed: real frames only, behind the convolution"

    static_shapes = False  # as in TransformerEncoder
    looks_attention_up = True
    _norms_last = False  # whether the norm of the encoder stands behind the layers

    def __init_subclass__(cls) -> None:
        """Look up once what the class behind is."""
        cls._norms_last = cls.__name__.endswith("StableLayerNorm")

    def forward(
        self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """Compute what the class behind this one computes; packed, with zeros at padding."""
        if not self._packs(hidden_states, attention_mask, kwargs):
            return super().forward(hidden_states, attention_mask, **kwargs)  # type: ignore[misc]
        keep: Any = attention_mask
        keep = keep.bool()
        packing, keys = self._packing(keep)
        if has_no_rows(packing):
            output = super().forward(hidden_states, attention_mask, **kwargs)  # type: ignore[misc]
            output.last_hidden_state = zeroed(output.last_hidden_state, keep)
            return output
        x = zeroed(hidden_states, keep)
        x = functional.pack(x + self.pos_conv_embed(x).to(x.device), packing)[None]
        x = self.dropout(x if self._norms_last else self.layer_norm(x))
        x = self._through_layers(x, packing, keys, kwargs)
        x = self.layer_norm(x) if self._norms_last else x
        output = functional.unpack(x[0], packing)
        return BaseModelOutput(last_hidden_state=output if keys is None else zeroed(output, keep))

    def _packing(self, keep: Tensor) -> tuple[Packing, Tensor | None]:
        """Return the packing of a batch, and a mask of keys where not all that it has are real."""
        return packing_of(keep, self.static_shapes), None

    def _through_layers(
        self: Any, x: Tensor, packing: Packing, keys: Tensor | None, given: dict[str, Any]
    ) -> Tensor:
        return through_layers(self, self.layers, x, packing, self.config.layerdrop, **given)

    def _packs(self: Any, x: Tensor, keep: Any, kwargs: dict[str, Any]) -> bool:
        """Return whether there is a 2-D mask, and nothing needs the batch padded."""
        return not (
            not isinstance(keep, Tensor)
            or keep.shape != x.shape[:2]
            or any(is_asked(one) for name, one in kwargs.items() if name != "return_dict")
            or not may_pack(self, x, keep, by_ours=self.looks_attention_up)
            # Then all ranks compute layers that are dropped.
            or is_deepspeed_zero3_enabled()  # type: ignore[no-untyped-call]
            or is_fsdp_managed_module(self)
        )


class PackedGatedSound(PackedSound):
    """The same of WavLM, whose layers attend by themselves and hand biases by distance on."""

    looks_attention_up = False

    def _packing(self, keep: Tensor) -> tuple[Packing, Tensor | None]:
        return spans(keep, self.static_shapes or not has_values(keep))

    def _through_layers(
        self: Any, x: Tensor, packing: Packing, keys: Tensor | None, given: dict[str, Any]
    ) -> Tensor:
        given = {"attention_mask": keys, **sequences_of(packing), **given}
        biases = None
        for index, layer in enumerate(self.layers):
            if not index or not is_dropped(self, self.config.layerdrop):  # the first has the biases
                x, biases = layer(x, position_bias=biases, **given)
        return x

    def _packs(self: Any, x: Tensor, keep: Any, kwargs: dict[str, Any]) -> bool:
        """Return the same, and whether no layer is computed by its own forward."""
        return super()._packs(x, keep, kwargs) and all(
            isinstance(layer, GatedBiasLayer) and layer.is_known(layer) and layer.is_plain(layer)
            for layer in self.layers
        )


_MASKS = {"attention_mask", "input_features_mask"}  # of frames behind convolutions; before them


class PackedPooledSound(WithArguments):
    """A base of encoders with Whisper's children that halve the frames behind their layers.

    Sounds are padded to one length, and a mask says so. A frame that would be the mean of a real
    one and padding counts for nothing: those who read the output leave it out.
    """

    FUSED = "packed: real frames only, behind the convolutions"
    static_shapes = False  # as in TransformerEncoder

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Compute what the class behind this one computes; packed."""
        given = {**dict(zip(self._arguments, args, strict=False)), **kwargs}
        x, masks = given.pop("input_features"), given.keys() & _MASKS
        keep = _frames_of(*(given.pop(name) for name in masks))
        if (
            keep is None
            or x.shape[-1] != 2 * self.embed_positions.weight.shape[0]
            or keep.shape != (x.shape[0], x.shape[-1] // 2)
            or any(is_asked(one) for name, one in given.items() if name != "return_dict")
            or given.get("return_dict") is False
            or not may_pack(self, x, keep)
        ):
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        packing = packing_of(keep, self.static_shapes)
        if has_no_rows(packing):
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        weight = self.conv1.weight
        x = F.gelu(self.conv1(x.to(weight.device, weight.dtype)))
        x = F.gelu(self.conv2(x)).transpose(1, 2) + self.embed_positions.weight
        x = F.dropout(x, self.dropout, self.training)
        rows = through_layers(
            self, self.layers, functional.pack(x, packing)[None], packing, self.layerdrop
        )
        x = functional.unpack(rows[0], packing)
        x = self.layer_norm(self.avg_pooler(x.transpose(1, 2)).transpose(1, 2))
        output: Any = getattr(modeling_outputs, POOLED_SOUND[name_of(self._made_of[1])])
        return output(last_hidden_state=x)


def _frames_of(mask: Tensor | None = None) -> Tensor | None:
    """Return which frames ``[batch, frames]`` are real that layers get.

    The mask is theirs; or ``[batch, length]`` of what the convolutions get, which halve it.
    """
    if mask is None or mask.dim() != 2:
        return key_mask_of(mask)
    lengths = (mask.sum(1) - 1) // 2 + 1
    return torch.arange((mask.shape[1] - 1) // 2 + 1, device=mask.device) < lengths[:, None]
