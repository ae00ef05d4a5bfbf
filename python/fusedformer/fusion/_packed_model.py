"""Models of transformers that are packed as a whole, as their own forward runs the layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedformer import functional
from fusedformer._internal.checks import has_values
from fusedformer.functional import Packing
from fusedformer.fusion._attention import captured
from fusedformer.fusion._caller_rows import sequences_of_positions
from fusedformer.fusion._causality import (
    angles_need_batch,
    masks_are_causal,
    no_mask,
    sees_otherwise,
)
from fusedformer.fusion._classes import WithArguments, is_asked, is_asked_of
from fusedformer.fusion._classes import named as name_of
from fusedformer.fusion._families import MODELS
from fusedformer.fusion._forms import Model
from fusedformer.fusion._kept_rows import (
    are_kept,
    has_no_rows,
    sequences_of,
    unpacked,
    wants_padding,
    zeroed,
)
from fusedformer.fusion._layers import see_packed_rows
from fusedformer.fusion._rows import needs_batch
from fusedformer.nn.stacks import can_pack, packing_of

# Arguments with which a model does more than encode tokens.
_MORE = "past_key_values", "encoder_hidden_states", "use_cache", "cu_seq_lens_q"
_ASKED = "output_hidden_states", "output_attentions", "output_router_logits"
_OF_TOKENS = "input_ids", "inputs_embeds", "attention_mask", "position_ids"


class PackedModel(WithArguments):
    """A base of models that compute only the real tokens of a padded batch, embeddings included.

    They go through the layers as one long sequence, in which attention keeps to each token's own;
    positions stay as they were. Kernels apply the windows of local layers, not masks.
    """

    FUSED = "packed: real tokens only, embeddings too"
    static_shapes = False  # as in TransformerEncoder
    _minds_cache = False  # of its configuration
    looks_attention_up = True  # in its configuration, so that it may be another by now
    _model: Model

    def __init_subclass__(cls) -> None:
        """Look up once what the class behind is."""
        super().__init_subclass__()
        made_of = getattr(cls, "_made_of", None)
        if made_of is not None:  # else a base too
            cls._model = MODELS[name_of(made_of[1])]

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Compute what the class behind this one computes; packed, with zeros at padding."""
        given = {**dict(zip(self._arguments, args, strict=False)), **kwargs}
        if not self._packs(given):
            sequences = self._sequences_given(given)
            if sequences:
                return super().forward(**{**given, **sequences})  # type: ignore[misc]
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        keep = given["attention_mask"].bool()
        packing, keys = self._packing(keep)
        if has_no_rows(packing):
            output = super().forward(**given)  # type: ignore[misc]
        else:
            output = super().forward(**{**given, **self._packed_arguments(given, packing, keys)})  # type: ignore[misc]
        states = self._returned(output[0], packing, keys, keep)
        pooled = None if are_kept(packing) else self._pooled(states)  # whoever keeps rows pools
        if isinstance(output, tuple):
            return (states, *output[1:]) if pooled is None else (states, pooled, *output[2:])
        output.last_hidden_state = states
        if pooled is not None:
            output.pooler_output = pooled
        return output

    @staticmethod
    def _returned(
        states: Tensor,
        packing: Packing,
        keys: Tensor | None,
        keep: Tensor,
        unpack: Callable[[Tensor, Packing], Tensor] = unpacked,
    ) -> Tensor:
        """Return computed states as the caller gets them: zeros at padding, or rows kept packed."""
        if has_no_rows(packing):  # computed padded
            return zeroed(states, keep)
        if keys is None:
            return unpack(states[0], packing)
        return zeroed(functional.unpack(states[0], packing), keep)  # some rows are padding

    def _pooled(self: Any, states: Tensor) -> Any:
        """Pool the padded states, where the model does."""
        pooler = getattr(self, "pooler", None)
        if pooler is None:
            return None
        if self._model.pools_first_token:
            return self.pooler_activation(pooler(states[:, 0]))
        return pooler(states)

    def _packs(self: Any, given: dict[str, Any]) -> bool:
        """Return whether there is a 2-D mask, and nothing needs the batch padded."""
        keep, ids, embedded = map(given.get, ("attention_mask", "input_ids", "inputs_embeds"))
        tokens: Any = ids if embedded is None else embedded
        return not (
            not isinstance(keep, Tensor)
            or keep.dim() != 2
            or (ids is None) == (embedded is None)
            or tokens.shape[:2] != keep.shape
            or any(is_asked(given.get(name)) for name in (*_MORE, *self._model.padded_by))
            or any(one.shape[:2] != keep.shape for one in self._others(given, keep).values())
            or (self._model.first_is_read and not (has_values(keep) and bool(keep[:, 0].all())))
            or captured()
            or wants_padding()
            or self._is_asked_for_more(given)
            or not self._knows_layers()
            or not can_pack(tokens, self._is_static(), keep)
            or angles_need_batch(self.config, keep.shape[1], given.get("position_ids"))
            or sees_otherwise(self._model, self.config, given)
            or needs_batch(
                self, self.looks_attention_up, masks_are_causal(self._model, self.config, given)
            )
        )

    def _sequences_given(self: Any, given: dict[str, Any]) -> dict[str, Any]:
        """Return arguments in place of the mask of a row that the caller packed; none of others."""
        model, positions = self._model, given.get("position_ids")
        if (
            not model.masks_by_positions
            or given.get("attention_mask") is not None
            or positions is None
            or any(is_asked(given.get(name)) for name in (*_MORE, *model.padded_by))
            or is_asked_of(self, given, "use_cache")
            or captured()
            or wants_padding()
            or self._is_asked_for_more(given)
            or not masks_are_causal(model, self.config, given)
        ):
            return {}
        found = sequences_of_positions(positions)
        tokens = [given.get(name) for name in ("input_ids", "inputs_embeds")]
        shapes = [one.shape[:2] for one in tokens if one is not None]
        if (
            not found
            or shapes != [positions.shape]
            or not self._knows_layers()
            or needs_batch(self, self.looks_attention_up, True)
        ):
            return {}
        return {**found, "attention_mask": self._masks(no_mask(positions.device))}

    def _masks(self: Any, mask: Any) -> Any:
        """Return a mask as layers of all types get it."""
        return dict.fromkeys(self.config.layer_types, mask) if self._model.masks_by_type else mask

    def _is_asked_for_more(self: Any, given: dict[str, Any]) -> bool:
        """Return whether outputs of layers are wanted."""
        asks = (*_ASKED, "use_cache") if self._minds_cache else _ASKED
        return any(is_asked_of(self, given, name) for name in asks)

    def _knows_layers(self: Any) -> bool:
        """Return whether all layers are computed by their form, where they have to be."""
        path = self._model.layers
        return path is None or see_packed_rows(self.get_submodule(path))

    def _is_static(self: Any) -> bool:
        """Return whether ``static_shapes`` was set here, or on the encoder, which packs as well."""
        encoder = getattr(self, "encoder", None)
        return bool(self.static_shapes or getattr(encoder, "static_shapes", False))

    def _packing(self, keep: Tensor) -> tuple[Packing, Tensor | None]:
        """Return the packing of a batch, and a mask of keys where not all that it has are real."""
        if self._model.has_distances:
            return spans(keep, self._is_static() or not has_values(keep))
        return packing_of(keep, self._is_static()), None

    def _packed_arguments(
        self: Any, given: dict[str, Any], packing: Packing, keys: Tensor | None
    ) -> dict[str, Any]:
        """Return the arguments of the packed call that differ from those ``given``."""
        embedded = given.get("inputs_embeds")
        if embedded is None and self._model.embeds_padded:
            asked = "input_ids", "attention_mask", "position_ids"
            embedded = self.embeddings(**{name: given.get(name) for name in asked})
        if embedded is None:
            rows: dict[str, Any] = {"input_ids": _picked(given["input_ids"], packing)}
        else:
            rows = {"input_ids": None, "inputs_embeds": functional.pack(embedded, packing)[None]}
        for name, one in self._others(given, given["attention_mask"]).items():
            rows[name] = _picked(one, packing)
        if self._model.caches:
            rows["use_cache"] = False
        if self._model.is_causal is not None:
            rows["is_causal"] = self._model.is_causal
        masks: Any = keys
        if keys is None and self._model.masks_causally:
            masks = no_mask(packing.indices.device)
        return {
            **rows, "attention_mask": self._masks(masks),
            "position_ids": self._positions(given, packing),
            **sequences_of(packing),
        }  # fmt: skip

    def _others(self, given: dict[str, Any], keep: Tensor) -> dict[str, Tensor]:
        """Return further tensors that were given: of each token, or else nothing is packed."""
        found = {
            name: one for name, one in given.items()
            if isinstance(one, Tensor) and name not in _OF_TOKENS
        }  # fmt: skip
        for name in self._model.of_sequences:
            if name in found and found[name].shape == keep.shape[:1]:
                found[name] = found[name][:, None].expand(keep.shape)
        return found

    def _positions(self: Any, given: dict[str, Any], packing: Packing) -> Tensor:
        """Return the positions of tokens, as the class behind this one would number them.

        Those given may be of more than one kind, as of time, rows and columns.
        """
        positions = given.get("position_ids")
        if positions is not None:
            positions = positions.expand(*positions.shape[:-2], packing.batch, packing.length)
            rows: Tensor = positions.flatten(-2)
            rows = rows if packing.is_whole else rows[..., _places(packing)]
            return rows.unsqueeze(-2)
        if self._model.counts_real:
            keep = given["attention_mask"].bool()
            return _picked(keep.int().cumsum(1) * keep - 1, packing)
        if self._model.behind_padding and given.get("input_ids") is not None:
            padding: int = self.embeddings.padding_idx
            real = given["input_ids"].ne(padding).int()
            return _picked(real.cumsum(1) * real + padding, packing)
        places = _places(packing)
        first = self.embeddings.padding_idx + 1 if self._model.behind_padding else 0
        columns = places if packing.batch == 1 and packing.is_whole else places % packing.length
        return (columns + first if first else columns)[None]


class PackedDecoder(PackedModel):
    """The same of models that generate, and so need the cache for which their configuration asks.

    Others, which embed texts, return none where they pack.
    """

    _minds_cache = True


def _picked(x: Tensor, packing: Packing) -> Tensor:
    """Pick of ``x`` ``[batch, length, *]`` what is packed, as a batch of 1; a view of all of it."""
    rows = x.flatten(0, 1)
    return (rows if packing.is_whole else rows[_places(packing)])[None]


def _places(packing: Packing) -> Tensor:
    """Return where the packed rows come from; those behind the last token from the first place."""
    return packing.indices.clamp(min=0) if packing.has_tail else packing.indices


def spans(keep: Tensor, static_shapes: bool) -> tuple[Packing, Tensor | None]:
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
