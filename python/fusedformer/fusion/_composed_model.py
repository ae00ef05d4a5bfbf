"""Models of transformers whose layers compute attention themselves, and get nothing but a mask.

Their own forward cannot hand packed sequences on, so it is written here, by the model's table.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import modeling_outputs

from fusedformer import functional
from fusedformer.functional import Packing
from fusedformer.fusion._attention import FULL
from fusedformer.fusion._classes import is_asked, is_asked_of
from fusedformer.fusion._forms import Composed, is_table
from fusedformer.fusion._hooks import is_untouched
from fusedformer.fusion._kept_rows import has_no_rows, unpacked, wants_padding, zeroed
from fusedformer.fusion._packed_model import PackedModel

_MORE = "past_key_values", "encoder_hidden_states", "use_cache"

_BUCKETS = 32  # of MPNet, whatever its configuration says


class ComposedModel(PackedModel):
    """A base of models that are computed by their parts, packed or padded."""

    looks_attention_up = False

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Compute what the class behind this one computes; packed, with zeros at padding."""
        given = {**dict(zip(self._arguments, args, strict=False)), **kwargs}
        if "position_ids" not in self._model.composed.embeds:  # then they count for nothing
            given.pop("position_ids", None)
        path = self._model.layers
        layers = self.get_submodule(path)
        encoder = self.get_submodule(path.rpartition(".")[0])
        if not self._composes(given, encoder):
            return super(PackedModel, self).forward(*args, **kwargs)  # type: ignore[misc]
        keep: Any = given.get("attention_mask")
        packing = keys = None
        rows = dict(given, attention_mask=None if keep is None else _of_keys(keep))
        packs = self._packs(given)
        if packs:
            packing, keys = self._packing(keep.bool())
            if keys is not None and self._model.composed.distances is not None:
                packing = None
            elif not has_no_rows(packing):
                rows.update(self._packed_arguments(given, packing, keys))
        wants_all = is_asked_of(self, given, "output_hidden_states")
        unpack = functional.unpack if wants_all else unpacked

        def returned(x: Tensor) -> Tensor:
            if packing is not None:
                found: Tensor = self._returned(x, packing, keys, keep.bool(), unpack)
                return found
            return zeroed(x, keep.bool()) if packs else x

        packed = packing if "cu_seq_lens_q" in rows else None
        shown: list[Tensor] = []

        def show(x: Tensor) -> Tensor:
            if not wants_all:
                return x
            shown.append(returned(x))
            if not torch.is_grad_enabled():
                return x
            # What comes next depends on what is shown, so that it has a gradient.
            return shown[-1] if packed is None else functional.pack(shown[-1], packed)[None]

        last = self._last_state(layers, rows, packed, show)
        if self._model.composed.last is not None:
            last = self.get_submodule(self._model.composed.last)(show(last))
        return self._output(given, [*shown, returned(last)], wants_all)

    def _output(self: Any, given: dict[str, Any], states: list[Tensor], wants_all: bool) -> Any:
        """Return what was asked for: the last states, what is pooled of them, all states."""
        found: dict[str, Any] = {"last_hidden_state": states[-1]}
        keep = given.get("attention_mask")
        is_padded = keep is None or states[-1].shape[:2] == keep.shape  # else whoever keeps rows
        if hasattr(self, "pooler") and is_padded:  # pools them
            found["pooler_output"] = self._pooled(states[-1])
        if wants_all:
            found["hidden_states"] = tuple(states[:-1] if self._model.composed.last else states)
        if not is_asked_of(self, given, "return_dict"):
            return tuple(found.values())
        return getattr(modeling_outputs, self._model.composed.output)(**found)

    def _composes(self: Any, given: dict[str, Any], encoder: Any) -> bool:
        """Return whether all is known of the model, and no more is wanted than what it encodes."""
        keep, ids, embedded = map(given.get, ("attention_mask", "input_ids", "inputs_embeds"))
        made = self._model.composed
        return (
            (ids is None) != (embedded is None)
            and (keep is None or keep.dim() == 2)
            and not any(is_asked(given.get(name)) for name in (*_MORE, *self._model.padded_by))
            and not is_asked_of(self, given, "output_attentions")
            and not (made.distances is not None and wants_padding())
            and not (made.unless is not None and getattr(self, made.unless))
            and type(encoder).__module__ == type(self).__module__
            and is_untouched(encoder)
            and (made.buckets is None or is_table(self.get_submodule(made.buckets)))
            and self._knows_layers()
        )

    def _is_asked_for_more(self, given: dict[str, Any]) -> bool:
        """Return False: what else could be wanted is not composed."""
        return False

    def _last_state(
        self: Any,
        layers: Any,
        rows: dict[str, Any],
        packing: Packing | None,
        show: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """Compute the states behind the layers, of packed tokens or a batch.

        ``show`` is called with the states before each layer, and returns those to go on with.
        """
        made: Composed = self._model.composed
        mask = rows["attention_mask"]
        embeds = {name: rows.get(name) for name in made.embeds}
        if made.embeds_mask is not None and mask is not None:
            embeds[made.embeds_mask] = mask
        x: Tensor = self.embeddings(**embeds)
        before = None if made.before is None else _at(self, made.before)
        x = x if before is None else before(x)
        others = self._of_all_layers(layers, rows, x)
        for i, layer in enumerate(layers):
            given = show(x)
            found = layer(given, attention_mask=mask, **others)
            x = found if isinstance(found, Tensor) else found[0]
            conv = None if made.conv is None or i else _at(self, made.conv)
            if conv is not None:
                x = _convolved(conv, given, x, mask, packing)
        return x if made.behind is None else self.get_submodule(made.behind)(x)

    def _of_all_layers(self: Any, layers: Any, rows: dict[str, Any], x: Tensor) -> dict[str, Any]:
        """Return the arguments of layers besides states and mask."""
        made: Composed = self._model.composed
        others = {n: one for n, one in rows.items() if n.startswith(("cu_seq", "max_length"))}
        if made.buckets is not None:
            weight = self.get_submodule(made.buckets).weight[:_BUCKETS]
            others["position_bias"] = functional.relative_position_bias(weight)
        if made.angles is not None:
            positions = rows.get("position_ids")
            angles = self.get_submodule(made.angles)(x.shape[:-1], 0, positions)
            name = layers[0]._form.rotary
            others[name] = angles.view(1, 1, *angles.shape[-2:])
        if made.distances is not None:
            others["rel_embeddings"] = _at(self, made.distances)()
        return others


def _convolved(
    conv: Any, embedded: Tensor, x: Tensor, mask: Tensor | None, packing: Packing | None
) -> Tensor:
    """Call a convolution, which needs the batch padded, and a mask of 0 and 1."""
    if packing is None:
        keep = x.new_ones(x.shape[:2], dtype=torch.int64) if mask is None else mask[:, 0, 0].long()
        return conv(embedded, x, keep)  # type: ignore[no-any-return]
    both = [functional.unpack(rows[0], packing) for rows in (embedded, x)]
    keep = (packing.inverse >= 0).view(packing.batch, packing.length).long()
    return functional.pack(conv(*both, keep), packing)[None]


def _at(module: Any, path: str) -> Any:
    """Return what a path leads to, None where its last step leads nowhere."""
    holder, _, name = path.rpartition(".")
    return getattr(module.get_submodule(holder), name, None)


def _of_keys(keep: Tensor) -> Tensor:
    """Return a mask of keys as layers take it."""
    return keep.bool().to(FULL)[:, None, None]
