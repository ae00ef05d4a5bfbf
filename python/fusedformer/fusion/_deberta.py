"""DeBERTa v2 and v3 of transformers: packed, with fused layers and disentangled attention.

The model computes the layers of real tokens itself, and hands on where the sequences are in place
of a mask. Whatever a call asks for besides, its own forward computes it all, padded.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fusedformer import functional
from fusedformer._internal.checks import has_values
from fusedformer.functional import Packing
from fusedformer.functional.steps import FeedForward, feed_forward, linear
from fusedformer.fusion._activations import activation_name
from fusedformer.fusion._attention import captured
from fusedformer.fusion._classes import Plan, combined, is_asked_of
from fusedformer.fusion._classes import named as name_of
from fusedformer.fusion._kept_rows import unpacked, wants_padding
from fusedformer.fusion._rows import change_in, is_untouched, needs_batch
from fusedformer.nn.children import (
    Pending,
    are_plain,
    dropout_probability,
    project,
    weights_and_biases,
)
from fusedformer.nn.stacks import can_pack, packing_of

_ARGUMENTS = (
    "input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds",
    "output_attentions", "output_hidden_states", "return_dict",
)  # fmt: skip


class Sequences(NamedTuple):
    """Where packed sequences are: what layers get in place of a mask."""

    packing: Packing


class DisentangledSelfAttention:
    """A base of self-attention whose scores of packed sequences are never in memory."""

    FUSED = "fused attention"

    def forward(
        self: Any, hidden_states: Tensor, attention_mask: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Compute what the class behind this one computes; of packed sequences by the kernels."""
        if not isinstance(attention_mask, Sequences):
            return super().forward(hidden_states, attention_mask, *args, **kwargs)  # type: ignore[misc]
        projections = self.query_proj, self.key_proj, self.value_proj
        rows = [projection(hidden_states) for projection in projections]
        return attended(self, rows, attention_mask, kwargs["rel_embeddings"]), None

    @staticmethod
    def refuses(module: Any) -> str:
        """Say why a module cannot be fused; empty if it can."""
        buckets = module.position_buckets if module.relative_attention else 0
        if buckets > 0 and (
            buckets < 4 or buckets % 2 or module.max_relative_positions <= buckets // 2 + 1
        ):
            return "its buckets of positions are none that the kernels know"
        return ""


def attended(module: Any, rows: list[Tensor], sequences: Sequences, rel_embeddings: Any) -> Tensor:
    """Attend by the settings of a module of DeBERTa.

    Args:
        module: its DisentangledSelfAttention.
        rows: query, key and value ``[1, total, width]``.
        sequences: where these rows belong.
        rel_embeddings: ``[2 * span, width]`` or more; None where positions are not relative.
    """
    packing = sequences.packing
    query, key, value = (_heads(module, x[0]) for x in rows)
    kinds = {"c2p", "p2c"} & {*module.pos_att_type}
    settings: dict[str, Any] = {
        "cu_seqlens_q": packing.cu_seqlens_q, "cu_seqlens_k": packing.cu_seqlens_k,
        "max_seqlen_q": packing.max_seqlen, "max_seqlen_k": packing.max_seqlen,
        "dropout_p": dropout_probability(module.dropout),
        "scale": 1.0 / math.sqrt(query.shape[-1] * (1 + len(kinds))),
    }  # fmt: skip
    if not (module.relative_attention and kinds):
        plain: Tensor = functional.varlen_attention(query, key, value, **settings)
        return plain.flatten(-2)[None]
    places = module.pos_dropout(rel_embeddings[: 2 * module.pos_ebd_size])
    prefix = "" if module.share_att_key else "pos_"
    tables: dict[str, Any] = {
        name: _heads(module, getattr(module, f"{prefix}{projection}")(places)).transpose(0, 1)
        for kind, name, projection in (
            ("c2p", "position_key", "key_proj"), ("p2c", "position_query", "query_proj")
        )
        if kind in kinds
    }  # fmt: skip
    longest = module.max_relative_positions if module.position_buckets > 0 else None
    output = functional.disentangled_attention(
        query, key, value, **tables, max_distance=longest, **settings
    )
    return output.flatten(-2)[None]


def _heads(module: Any, x: Tensor) -> Tensor:
    """Split ``[rows, width]`` in ``[rows, heads, dim]``."""
    return torch.unflatten(x, -1, (module.num_attention_heads, -1))


class DebertaLayer:
    """A base of layers whose forward on packed sequences is four fused steps and its products."""

    FUSED = "four fused steps"

    def forward(
        self: Any, hidden_states: Tensor, attention_mask: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Compute what the class behind this one computes, by the fused steps if they fit."""
        if not isinstance(attention_mask, Sequences) or not self.is_plain(self):
            return super().forward(hidden_states, attention_mask, *args, **kwargs)  # type: ignore[misc]
        own, out = self.attention.self, self.attention.output
        rows, x = [], hidden_states
        for one in (own.query_proj, own.key_proj, own.value_proj):
            found, x = linear(x, one.weight, one.bias, fork=True)
            rows.append(found)
        heads = attended(own, rows, attention_mask, kwargs["rel_embeddings"])
        x = Pending(*project(heads, out.dense), out.dropout, x).normed(out.LayerNorm)
        last, act = self.output, self.intermediate.intermediate_act_fn
        weights = weights_and_biases(self.intermediate.dense, last.dense)
        block = FeedForward._make((*weights, activation_name(act) or act, 0.0, False))
        inner, bias, x = feed_forward(x, block, fork=True)
        return Pending(inner, bias, last.dropout, x).normed(last.LayerNorm), None

    @staticmethod
    def is_plain(layer: Any) -> bool:
        """Return whether calling its children is all that the forward of ``layer`` does."""
        attention, own, out = layer.attention, layer.attention.self, layer.attention.output
        inner, output = layer.intermediate, layer.output
        act = inner.intermediate_act_fn
        return (
            are_plain(
                (own.query_proj, own.key_proj, own.value_proj, out.dense, inner.dense,
                 output.dense),
                (out.LayerNorm, output.LayerNorm), (own.dropout, out.dropout, output.dropout),
            )
            and all(map(is_untouched, (attention, own, out, inner, output)))
            and (not isinstance(act, nn.Module) or is_untouched(act))
        )  # fmt: skip


class PackedDeberta:
    """A base of models that compute only the real tokens of a padded batch, embeddings included."""

    FUSED = "packed: real tokens only"
    static_shapes = False  # as in TransformerEncoder

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Compute what the class behind this one computes; packed, with zeros at padding."""
        given = {**dict(zip(_ARGUMENTS, args, strict=False)), **kwargs}
        packing = self._packing(given)
        if packing is None:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        wanted = is_asked_of(self, given, "output_hidden_states")
        unpack = functional.unpack if wanted else unpacked
        states = [unpack(rows[0], packing) for rows in self._states(given, packing)]
        if not is_asked_of(self, given, "return_dict"):
            return (states[-1], tuple(states)) if wanted else (states[-1],)
        from transformers.modeling_outputs import BaseModelOutput

        return BaseModelOutput(
            last_hidden_state=states[-1], hidden_states=tuple(states) if wanted else None
        )

    def _packing(self: Any, given: dict[str, Any]) -> Packing | None:
        """Return where the real tokens go; None where the model's own forward is to compute."""
        keep, ids, embedded = map(given.get, ("attention_mask", "input_ids", "inputs_embeds"))
        tokens: Any = ids if embedded is None else embedded
        if not isinstance(tokens, Tensor) or (ids is None) == (embedded is None):
            return None
        if keep is None:
            keep = tokens.new_ones(tokens.shape[:2], dtype=torch.bool)
        if (
            not isinstance(keep, Tensor)
            or keep.dim() != 2
            or tokens.shape[:2] != keep.shape
            or is_asked_of(self, given, "output_attentions")
            or captured()
            or wants_padding()
            or self.z_steps > 1
            or self.static_shapes
            or not has_values(keep)
            or not can_pack(tokens, False, keep)
            or not self._is_ours()
            or _needs_batch(self)
        ):
            return None
        keep = keep.bool()
        return packing_of(keep, False) if _are_whole(keep) else None

    def _is_ours(self: Any) -> bool:
        """Return whether every layer still attends by :func:`attended`."""
        return all(
            isinstance(layer.attention.self, DisentangledSelfAttention)
            for layer in self.encoder.layer
        )

    def _states(self: Any, given: dict[str, Any], packing: Packing) -> list[Tensor]:
        """Compute the packed embeddings and the outputs of all layers; the last alone if enough."""
        encoder, sequences = self.encoder, Sequences(packing)
        embedded = rows = self._embedded(given, packing)
        states = [rows]
        positions = encoder.get_rel_embedding()
        for i, layer in enumerate(encoder.layer):
            rows, _ = layer(rows, sequences, rel_embeddings=positions)
            if i == 0 and encoder.conv is not None:
                rows = _convolved(encoder.conv, embedded, rows, packing)
            states.append(rows)
        return states if is_asked_of(self, given, "output_hidden_states") else states[-1:]

    def _embedded(self: Any, given: dict[str, Any], packing: Packing) -> Tensor:
        """Compute the embeddings of real tokens; of all, if a hook wants to see the batch."""
        if is_untouched(self.embeddings) and not needs_batch(self.embeddings):
            found: Tensor = self.embeddings(**_packed_arguments(given, packing))
            return found
        names = "input_ids", "token_type_ids", "position_ids", "inputs_embeds"
        padded = self.embeddings(**{n: given[n] for n in names if given.get(n) is not None})
        return functional.pack(padded, packing)[None]


def _needs_batch(model: Any) -> str:
    """Say what in a model may need the batch that it was given; empty if nothing does."""
    if not is_untouched(model.encoder):
        return "'encoder' has a hook, or its forward was replaced"
    return needs_batch(model.encoder, by_ours=False)


def _are_whole(keep: Tensor) -> bool:
    """Return whether nothing is left out between the real tokens of a sequence.

    Distances count positions, those that are left out too.
    """
    begins = keep[:, 1:] & ~keep[:, :-1]
    return not bool((begins.sum(1) + keep[:, :1].sum(1) > 1).any())


def _packed_arguments(given: dict[str, Any], packing: Packing) -> dict[str, Any]:
    """Return the arguments of the embeddings of real tokens, in a batch of 1."""
    places = packing.indices.clamp(min=0)
    columns = places % packing.length
    if given.get("position_ids") is not None:
        columns = given["position_ids"].expand(packing.batch, packing.length).flatten()[places]
    found = {"position_ids": columns[None]}
    for name in ("input_ids", "token_type_ids"):
        if given.get(name) is not None:
            found[name] = given[name].flatten()[places][None]
    if given.get("inputs_embeds") is not None:
        found["inputs_embeds"] = functional.pack(given["inputs_embeds"], packing)[None]
    return found


def _convolved(conv: nn.Module, embedded: Tensor, rows: Tensor, packing: Packing) -> Tensor:
    """Call the convolution of the first layer, which needs the batch padded."""
    both = [functional.unpack(x[0], packing) for x in (embedded, rows)]
    mask = (packing.inverse >= 0).view(packing.batch, packing.length).to(torch.int64)
    return functional.pack(conv(*both, mask), packing)[None]


_MODEL = "deberta_v2.modeling_deberta_v2.DebertaV2Model"


def plan_deberta(plan: Plan, model: nn.Module, reads: str, pack: bool) -> set[int]:
    """Add to the plan what is to become of the DeBERTas in ``model``.

    Args:
        plan: what is added to.
        model: any module.
        reads: why padded positions must be computed, if so.
        pack: whether models are to be packed, without which nothing is fused.

    Returns:
        The ids of the modules that will attend by this library.
    """
    found: set[int] = set()
    for path, module in model.named_modules():
        cls: Any = type(module)
        if name_of(cls) != _MODEL or hasattr(cls, "_made_of") or not pack:
            continue
        reason = reads or _refuses(module)
        if reason:
            plan.leave(path, module, reason)
            continue
        plan.give(path, module, combined(PackedDeberta, cls), PackedDeberta.FUSED)
        reason = _needs_batch(module)
        if reason:
            plan.leave(path, module, f"computed padded: {reason}")
        for i, layer in enumerate(module.encoder.layer):
            below = f"{path}.encoder.layer.{i}".lstrip(".")
            own = layer.attention.self
            plan.give(below, layer, combined(DebertaLayer, type(layer)), DebertaLayer.FUSED)
            if not DebertaLayer.is_plain(layer):
                plan.leave(below, layer, f"{change_in(layer)}: its own forward runs")
            ours = DisentangledSelfAttention
            plan.give(f"{below}.attention.self", own, combined(ours, type(own)), ours.FUSED)
            found.add(id(own))
    return found


def _refuses(model: Any) -> str:
    """Say why a model cannot be fused; empty if it can."""
    layers = list(model.encoder.layer)
    attending = [layer.attention.self for layer in layers]
    names = {name_of(type(one)).partition(".")[2] for one in (*layers, *attending)}
    known = {f"modeling_deberta_v2.{n}" for n in ("DebertaV2Layer", "DisentangledSelfAttention")}
    if not names <= known:
        return "its layers or their attention are of other classes"
    if any("forward" in one.__dict__ for one in (model, *layers, *attending)):
        return "a forward in it was replaced on the instance"
    reasons = (DisentangledSelfAttention.refuses(one) for one in attending)
    return next(filter(None, reasons), "")
