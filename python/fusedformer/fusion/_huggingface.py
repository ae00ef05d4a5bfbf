"""Plans for Hugging Face models: attention of this library, fused layers, and packing.

A registered implementation is two functions: one that makes the mask of a batch once for all
layers, and one that attends. Padding stays small, a mask of keys, which the encoders here pack by;
patterns other than causal and full come as boolean 4-D masks, of which the kernels skip the empty
tiles.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn
from transformers import GenerationMixin, PreTrainedModel

from fusedformer.fusion._causality import masks_are_causal
from fusedformer.fusion._classes import Plan, arguments_of, combined
from fusedformer.fusion._classes import named as name_of
from fusedformer.fusion._composed_model import ComposedModel
from fusedformer.fusion._configs import (
    NAME,
    NAME_4D,
    NAME_ADDED,
    NAMES,
    asks_for_name,
    attends,
    computes_attention,
    exchange,
    named,
    restore,
)
from fusedformer.fusion._divided import DividedLayer
from fusedformer.fusion._families import (
    ENCODERS,
    GATED_SOUND,
    LAYERS,
    MIXED,
    MODELS,
    POOLED_SOUND,
    SOUND,
    STACKS,
)
from fusedformer.fusion._forms import Form
from fusedformer.fusion._gated_bias import GatedBiasLayer
from fusedformer.fusion._layers import FusedLayer
from fusedformer.fusion._layoutlmv3 import PackedLayoutEncoder
from fusedformer.fusion._next_tokens import LastToken, NextTokens
from fusedformer.fusion._packed_encoder import PackedEncoder, PackedStack
from fusedformer.fusion._packed_model import PackedDecoder, PackedModel
from fusedformer.fusion._packed_seq2seq import PackedSeq2Seq
from fusedformer.fusion._packed_sound import PackedGatedSound, PackedPooledSound, PackedSound
from fusedformer.fusion._packed_tower import PackedTower
from fusedformer.fusion._padded import plan_padded
from fusedformer.fusion._rows import change_in, needs_batch
from fusedformer.fusion._windows import WindowedLayer
from fusedformer.fusion.clients import is_known

__all__ = ["plan_huggingface", "restore"]

# Names of classes that read a model's output at padded positions.
_HEADS = (
    "ForQuestionAnswering", "ForQuestionAnsweringSimple", "ForXVector",
    "ForAudioFrameClassification",
)  # fmt: skip
_OTHER_ENCODERS: dict[str, Any] = {
    "layoutlmv3.modeling_layoutlmv3.LayoutLMv3Encoder": PackedLayoutEncoder,
    **dict.fromkeys(STACKS, PackedStack),
    **dict.fromkeys(POOLED_SOUND, PackedPooledSound),
}
_POOLED = {"ViltForQuestionAnswering"}  # whose name says so, but which read the first token alone
_LATE_INTERACTION = {"ColBERT", "MultiVectorEncoder"}


class Place(NamedTuple):
    """A module, and the model of transformers that it is part of."""

    path: str
    module: Any
    model_path: str
    model: Any
    is_mixed: bool = False  # by a connector beside it or around it, see ``MIXED``
    form: Form | None = None  # of a layer

    @property
    def cls(self) -> Any:
        """Return the module's class."""
        return type(self.module)


def plan_huggingface(plan: Plan, model: nn.Module, pack: bool | None) -> None:
    """Add to the plan what is to become of the models of transformers in ``model``."""
    reads = _reads_padding(model) if pack is None else ""
    packs = pack is not False and not reads
    places = [place._replace(form=_form(place, packs)) for place in _places(model)]
    by_ours = _plan_attention(plan, model, places)
    generates = any(isinstance(module, GenerationMixin) for module in model.modules())
    for place in places:
        if not hasattr(type(place.module), "_made_of"):
            _plan_stack(plan, place, by_ours, reads, pack is not False, generates)
    for place in places:
        _plan_head(plan, place)
    if pack is not False:
        mixed = tuple(p.path for p in places if p.is_mixed and name_of(p.cls) in MIXED)
        plan_padded(plan, (p[:4] for p in places if not p.path.startswith(mixed)))


def _places(model: nn.Module) -> Iterator[Place]:
    inside: dict[str, tuple[str, Any]] = {}
    mixed: tuple[str, ...] = ()
    for path, module in model.named_modules():
        if "connector" in module._modules:
            mixed += (f"{path}." if path else "",)
        outer = inside.get(path.rpartition(".")[0]) if path else None
        found = (path, module) if isinstance(module, PreTrainedModel) else outer
        if found is not None:
            inside[path] = found
            yield Place(path, module, found[0], found[1], path.startswith(mixed))


def _form(place: Place, packs: bool) -> Form | None:
    """Return the form by which a layer is to be fused; some are where the model packs."""
    form = LAYERS.get(name_of(place.cls))
    return None if form is not None and form.own is not None and not packs else form


def _plan_attention(plan: Plan, model: nn.Module, places: list[Place]) -> set[int]:
    """Choose the configurations that will name :func:`attention`; return these models' ids."""
    alone = _attending_alone(places)
    attending = [
        p for p in places
        if attends(p.cls) and "config" in vars(p.module) and not p.path.startswith(alone)
    ]  # fmt: skip
    refused: dict[int, str] = {}
    for place in attending:
        reason = _refuses(place)
        if reason:
            refused.setdefault(id(place.module.config), reason)
    named_here: dict[int, str] = {}
    by_ours: set[int] = set()
    for place in attending:
        config = place.module.config
        if id(config) in refused:
            plan.leave(place.model_path, place.model, refused[id(config)])
            continue
        by_ours.add(id(place.model))
        if id(config) not in named_here and named(config) not in NAMES:
            named_here[id(config)] = _name_for(place.model, places)
            plan.attend(place.model_path, named(config) or "eager")
    by_them = set(named_here)
    _name_for_masks(places, attending, refused, named_here)
    if named_here:
        plan.do(functools.partial(exchange, model, named_here, by_them))
    for place in places:
        if computes_attention(place.module) and not place.path.startswith(alone):
            plan.leave(place.path, place.module, "it computes attention itself")
    return by_ours


def _attending_alone(places: list[Place]) -> tuple[str, ...]:
    """Return how paths begin below layers that attend by themselves, fused or to be fused."""
    found = []
    for place in places:
        form = place.form
        if form is not None and form.attends_itself and not _fused(place).refuses(place.module):
            found.append(f"{place.path}.")
    return tuple(found)


def _fused(place: Place) -> Any:
    """Return the class of a layer of a known form, once it is fused."""
    cls: Any = place.cls
    if issubclass(cls, FusedLayer):
        return cls
    form = LAYERS[name_of(cls)]
    bases = (
        (WindowedLayer, form.is_windowed), (GatedBiasLayer, form.gates_bias),
        (DividedLayer, form.is_divided),
    )  # fmt: skip
    return combined(next((base for base, fits in bases if fits), FusedLayer), cls)


def _refuses(place: Place) -> str:
    """Say why an attending module must keep its attention, if so."""
    model = place.model
    if not (getattr(model, "_supports_sdpa", False) or model._supports_attention_backend):
        return "its attention takes no registered implementation"
    if asks_for_name(place.cls):
        return f"{place.cls.__name__} computes otherwise for names that it does not know"
    return ""


def _name_for_masks(
    places: list[Place], attending: list[Place], refused: dict[int, str], names: dict[int, str]
) -> None:
    """Name :func:`attention` where masks are made for modules that attend by it.

    A model's configuration need not be that of its layers: models of models get one of their own.
    """
    for place in places:
        model = place.module
        if model is not place.model or id(model.config) in refused.keys() | names.keys():
            continue
        below = [p for p in attending if p.path.startswith(f"{place.path}." if place.path else "")]
        own = [p for p in below if p.model is model]
        configs = [p.module.config for p in own or below]
        if configs and all(id(c) in names or named(c) in NAMES for c in configs):
            names[id(model.config)] = _name_for(model, places)


def _name_for(model: Any, places: list[Place]) -> str:
    """Choose a name whose masks all of ``model`` can read."""
    itself = any(p.model is model and computes_attention(p.module) for p in places)
    if getattr(model, "_supports_flash_attn", False) and not itself:
        return NAME
    return NAME_4D if getattr(model, "_supports_sdpa", False) else NAME_ADDED


def _reads_padding(model: nn.Module) -> str:
    for module in model.modules():
        for cls in type(module).__mro__:
            name = cls.__name__
            is_late = name in _LATE_INTERACTION and not _marks_expansions(module)
            # All but "first" read the last position, or every one.
            sums_up = name.endswith("SequenceSummary") and module.summary_type != "first"
            if (
                (name.endswith(_HEADS) and name not in _POOLED)
                or is_late
                or sums_up
                or _convolves(cls, module)
            ):
                return (
                    f"{name} reads padded positions, which would be 0; pack=True packs, "
                    f"pack=False says nothing"
                )
    return ""


def _convolves(cls: type[Any], module: nn.Module) -> bool:
    """Return whether a model of sound has an adapter behind its encoder, a convolution."""
    is_model = cls.__name__.endswith("Model") and "feature_extractor" in module._modules
    return is_model and getattr(module, "adapter", None) is not None


def _marks_expansions(model: nn.Module) -> bool:
    """Return whether ``model`` says which queries' padding has a meaning: only these need it."""
    if not is_known("sentence_transformers"):
        return False
    from fusedformer.fusion import sentences

    return sentences.marks_expansions(model)


def _plan_stack(
    plan: Plan, place: Place, by_ours: set[int], reads: str, pack: bool, generates: bool
) -> None:
    known, path, module = name_of(place.cls), place.path, place.module
    form, model = place.form, MODELS.get(known)
    packs: Any = PackedEncoder if known in ENCODERS else _OTHER_ENCODERS.get(known)
    packs = None if known in MIXED and place.is_mixed else packs
    packs = PackedSound if known in SOUND else packs
    packs = PackedGatedSound if known in GATED_SOUND else packs
    if model is not None and not getattr(module.config, "is_decoder", False):
        packs = PackedModel if model.composed is None else ComposedModel
        packs = packs if model.tower is None else PackedTower
        packs = packs if model.positions is None else PackedSeq2Seq
        packs = PackedDecoder if model.caches and generates else packs
    needs_ours = not (form and form.attends_itself) and getattr(packs, "looks_attention_up", True)
    if (form is None and packs is None) or (needs_ours and id(place.model) not in by_ours):
        return
    if "forward" in module.__dict__:
        plan.leave(path, module, "its forward was replaced on the instance")
    elif form is not None:
        layer = _fused(place)
        reason = layer.refuses(module)
        if reason:
            plan.leave(path, module, reason)
            return
        plan.give(path, module, layer, layer.fused_as(module))
        if not layer.is_plain(module):
            instead = (
                "its children are called" if layer.calls_children() else "its own forward runs"
            )
            plan.leave(path, module, f"{change_in(module)}: {instead}")
    elif reads or not pack:
        if reads and not _has_encoder(module):
            plan.leave(path, module, reads)
    else:
        plan.give(path, module, combined(packs, place.cls), packs.FUSED)
        is_causal = None if model is None else masks_are_causal(model, module.config, {})
        reason = needs_batch(module, by_ours=False, is_causal=is_causal)
        if packs is PackedDecoder and getattr(module.config, "use_cache", False):
            reason = "its config.use_cache is True, and a cache is of batches"
        layers = None if model is None else model.layers
        layers = STACKS.get(known, layers)
        reason = reason or _sees_no_packed_rows(module, layers)
        if reason and not _has_encoder(module):
            plan.leave(path, module, f"computed padded: {reason}")


def _sees_no_packed_rows(module: nn.Module, where: str | None) -> str:
    """Say which layer's own forward, which cannot see packed sequences, will run; empty if none."""
    for name, layer in () if where is None else module.get_submodule(where).named_children():
        known = name_of(type(layer)) in LAYERS and "forward" not in layer.__dict__
        fused: Any = _fused(Place("", layer, "", module)) if known else None
        if (
            fused is None
            or fused.refuses(layer)
            or not fused.has_parts(layer)
            or not (fused.calls_children() or fused.is_plain(layer))
        ):
            return f"'{where}.{name}' runs its own forward"
    return ""


def _plan_head(plan: Plan, place: Place) -> None:
    """Have a head look at what it reads of padding, if what is in it packs."""
    path, module, cls = place.path, place.module, place.cls
    arguments = arguments_of(cls)
    ours: Any = None
    if issubclass(cls, GenerationMixin) and "labels" in arguments:
        ours = NextTokens
    elif "ForSequenceClassification" in cls.__name__ and "score" in module._modules:
        ours = LastToken
    if (
        ours is not None
        and not hasattr(cls, "_made_of")
        and "forward" not in vars(module)
        and any(_packs_text(plan.class_of(one)) for one in module.modules())
    ):
        plan.give(path, module, combined(ours, cls), ours.FUSED)


def _packs_text(cls: type[Any]) -> bool:
    """Return whether modules of a class, once they are fused, are language models that pack."""
    return issubclass(cls, PackedModel) and cls._model.caches


def _has_encoder(model: nn.Module) -> bool:
    """Return whether a child of ``model`` packs by itself, and so tells why it would not."""
    return any(
        name_of(type(child)) in ENCODERS | _OTHER_ENCODERS.keys() for child in model.children()
    )
