"""Models of transformers whose layers compute attention themselves, and get nothing but a mask.

Their own forward cannot hand packed sequences on, so it is written here, by the model's table.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import modeling_outputs

from fusedformer import functional
from fusedformer.fusion._attention import FULL
from fusedformer.fusion._classes import is_asked, is_asked_of
from fusedformer.fusion._forms import Composed, is_table
from fusedformer.fusion._kept_rows import has_no_rows
from fusedformer.fusion._packed_model import PackedModel
from fusedformer.fusion._rows import is_untouched

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
        packing = None
        rows = dict(given, attention_mask=None if keep is None else _of_keys(keep))
        if self._packs(given):
            packing, keys = self._packing(keep.bool())
            if not has_no_rows(packing):
                rows.update(self._packed_arguments(given, packing, keys))
        states = self._states(self._model.composed, layers, rows)
        if packing is not None:
            states = self._returned(states, packing, keys, keep.bool())
        found = {"last_hidden_state": states}
        is_padded = keep is None or states.shape[:2] == keep.shape  # else whoever keeps rows pools
        if hasattr(self, "pooler") and is_padded:
            found["pooler_output"] = self._pooled(states)
        if not is_asked_of(self, given, "return_dict"):
            return tuple(found.values())
        return getattr(modeling_outputs, self._model.composed.output)(**found)

    def _composes(self: Any, given: dict[str, Any], encoder: Any) -> bool:
        """Return whether all is known of the model, and no more is wanted than what it encodes."""
        keep, ids, embedded = map(given.get, ("attention_mask", "input_ids", "inputs_embeds"))
        buckets = self._model.composed.buckets
        return (
            (ids is None) != (embedded is None)
            and (keep is None or keep.dim() == 2)
            and not any(is_asked(given.get(name)) for name in _MORE)
            and not self._is_asked_for_more(given)
            and type(encoder).__module__ == type(self).__module__
            and is_untouched(encoder)
            and (buckets is None or is_table(self.get_submodule(buckets)))
            and self._knows_layers()
        )

    def _states(self: Any, made: Composed, layers: Any, rows: dict[str, Any]) -> Tensor:
        """Compute the states behind the last layer, of packed tokens or a batch."""
        x: Tensor = self.embeddings(**{name: rows.get(name) for name in made.embeds})
        before = None if made.before is None else _at(self, made.before)
        x = x if before is None else before(x)
        mask = rows["attention_mask"]
        others = {n: one for n, one in rows.items() if n.startswith(("cu_seq", "max_length"))}
        if made.buckets is not None:
            weight = self.get_submodule(made.buckets).weight[:_BUCKETS]
            others["position_bias"] = functional.relative_position_bias(weight)
        if made.angles is not None:
            positions = rows.get("position_ids")
            angles = self.get_submodule(made.angles)(x.shape[:-1], 0, positions)
            name = layers[0]._form.rotary
            others[name] = angles.view(1, 1, *angles.shape[-2:])
        for layer in layers:
            found = layer(x, mask, **others)
            x = found if isinstance(found, Tensor) else found[0]
        return x if made.behind is None else self.get_submodule(made.behind)(x)


def _at(module: Any, path: str) -> Any:
    """Return what a path leads to, None where its last step leads nowhere."""
    holder, _, name = path.rpartition(".")
    return getattr(module.get_submodule(holder), name, None)


def _of_keys(keep: Tensor) -> Tensor:
    """Return a mask of keys as layers take it."""
    return keep.bool().to(FULL)[:, None, None]
