"""Plans for Hugging Face models: attention of this library, fused layers, and packing.

A registered implementation is two functions: one that makes the mask of a batch once for all
layers, and one that attends. Padding stays small, a mask of keys, which the encoders here pack by;
patterns other than causal and full come as boolean 4-D masks, of which the kernels skip the empty
tiles.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn
from transformers import PreTrainedModel

from fusedformer.fusion._classes import Plan, combined
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
from fusedformer.fusion._gated import LAYERS as GATED_LAYERS
from fusedformer.fusion._packed_model import MODELS, PackedModel
from fusedformer.fusion._post_norm import ENCODERS, PackedEncoder
from fusedformer.fusion._post_norm import LAYERS as POST_NORM_LAYERS
from fusedformer.fusion._rows import has_quantized_products, needs_batch

__all__ = ["plan_huggingface", "restore"]

_LAYERS = {**POST_NORM_LAYERS, **GATED_LAYERS}
_PACKED = "packed: real tokens only"
_CHANGED = "something in it was replaced or hooked"
# Names of classes that read a model's output at padded positions.
_HEADS = "ForQuestionAnswering", "ForQuestionAnsweringSimple"
_LATE_INTERACTION = {"ColBERT", "MultiVectorEncoder"}


class Place(NamedTuple):
    """A module, and the model of transformers that it is part of."""

    path: str
    module: Any
    model_path: str
    model: Any

    @property
    def cls(self) -> Any:
        """Return the module's class."""
        return type(self.module)


def plan_huggingface(plan: Plan, model: nn.Module, pack: bool | None) -> None:
    """Add to the plan what is to become of the models of transformers in ``model``."""
    places = list(_places(model))
    by_ours = _plan_attention(plan, model, places)
    reads = _reads_padding(model) if pack is None else ""
    for place in places:
        if not hasattr(type(place.module), "_made_of"):
            _plan_stack(plan, place, by_ours, reads, pack is not False)


def _places(model: nn.Module) -> Iterator[Place]:
    inside: dict[str, tuple[str, Any]] = {}
    for path, module in model.named_modules():
        outer = inside.get(path.rpartition(".")[0]) if path else None
        found = (path, module) if isinstance(module, PreTrainedModel) else outer
        if found is not None:
            inside[path] = found
            yield Place(path, module, *found)


def _plan_attention(plan: Plan, model: nn.Module, places: list[Place]) -> set[int]:
    """Choose the configurations that will name :func:`attention`; return these models' ids."""
    attending = [p for p in places if attends(p.cls) and "config" in vars(p.module)]
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
        if computes_attention(place.module):
            plan.leave(place.path, place.module, "it computes attention itself")
    return by_ours


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
            is_late = cls.__name__ in _LATE_INTERACTION and not _marks_expansions(module)
            if cls.__name__.endswith(_HEADS) or is_late:
                return (
                    f"{cls.__name__} reads padded positions, which would be 0; pack=True packs, "
                    f"pack=False says nothing"
                )
    return ""


def _marks_expansions(model: nn.Module) -> bool:
    """Return whether ``model`` says which queries' padding has a meaning: only these need it."""
    if "sentence_transformers" not in sys.modules:
        return False
    from fusedformer.fusion import sentences

    return sentences.marks_expansions(model)


def _plan_stack(plan: Plan, place: Place, by_ours: set[int], reads: str, pack: bool) -> None:
    cls = place.cls
    known = f"{cls.__module__}.{cls.__name__}".removeprefix("transformers.models.")
    packs: Any = PackedEncoder if known in ENCODERS else PackedModel if known in MODELS else None
    if id(place.model) not in by_ours or (known not in _LAYERS and packs is None):
        return
    path, module = place.path, place.module
    if "forward" in module.__dict__:
        plan.leave(path, module, "its forward was replaced on the instance")
    elif known in _LAYERS:
        layer = _LAYERS[known]
        reason = layer.refuses(module)
        if reason:
            plan.leave(path, module, reason)
            return
        plan.give(path, module, combined(layer, cls), layer.FUSED)
        if layer.plain_parts(module) is None:
            changed = "products are quantized" if has_quantized_products(module) else _CHANGED
            plan.leave(path, module, f"{changed}: its own forward runs")
    elif reads or not pack:
        if reads:
            plan.leave(path, module, reads)
    else:
        plan.give(path, module, combined(packs, cls), _PACKED)
        reason = needs_batch(module, by_ours=False)
        if reason:
            plan.leave(path, module, f"computed padded: {reason}")
