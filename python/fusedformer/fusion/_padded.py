"""Which models compute padding that they could be given, so that ``fuse`` reports them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from fusedformer.fusion._classes import Plan, arguments_of
from fusedformer.fusion._configs import attends
from fusedformer.fusion._layers import FusedLayer

_INPUTS = {"pixel_values", "input_ids", "input_values", "input_features"}
# Arguments that say what is real of other inputs than texts.
_MASKS = {
    "pixel_attention_mask", "patch_attention_mask", "spatial_shapes", "input_features_mask",
    "padding_mask",
}  # fmt: skip
# Sound that is padded to one length, which is computed as silence: no mask comes with it.
_OF_ONE_LENGTH = {"WhisperEncoder", "WhisperModel", "VoxtralEncoder", "ASTModel"}
_PATCHES, _JOINED = "its connector reads padding", "texts are padded before images join them"
_REASONS = {
    "Idefics3VisionTransformer": _PATCHES,
    "SmolVLMVisionTransformer": _PATCHES,
    "Qwen2AudioEncoder": "its mask is one of all pairs of frames",
    "ViltModel": _JOINED,
    "VisualBertModel": _JOINED,
    "FlavaMultimodalModel": _JOINED,
}


def plan_padded(plan: Plan, modules: Iterable[tuple[str, nn.Module]]) -> None:
    """Report the models that attend by this library, may be given padding, and are not packed.

    Those that are left for another reason are not named again, and a decoder beside an encoder is
    not counted.
    """
    known = dict(modules)
    done = {path for path, one in known.items() if _packs(plan.class_of(one))}
    done |= {one.path for one in plan.left}
    for inner, module in known.items():
        is_layer = issubclass(plan.class_of(module), FusedLayer)
        if not is_layer and not attends(type(module)):
            continue
        around = [path for path in around_of(inner) if path in known]
        takes = (p for p in around if _INPUTS & {*arguments_of(type(known[p]))})
        path = next(takes, around[-1])
        if done & {*around} or not _takes_padding(known[path]):
            continue
        form = "no table says how it packs" if is_layer else "its layers have no form"
        reason = _REASONS.get(type(known[path]).__name__, form)
        plan.leave(path, known[path], f"computed padded: {reason}")


def around_of(path: str) -> list[str]:
    """List a module's path and those of the modules that it is in, the innermost first."""
    parts = path.split(".") if path else []
    return [".".join(parts[:depth]) for depth in range(len(parts), -1, -1)]


def _packs(cls: Any) -> bool:
    """Return whether modules of a class compute real tokens alone."""
    return str(getattr(cls, "FUSED", "")).startswith("packed")


def _takes_padding(model: Any) -> bool:
    """Return whether batches come with a mask of what is real; images alone are of one size."""
    arguments = {*arguments_of(type(model))}
    if arguments & _MASKS:
        return True
    images = "pixel_values" in arguments and "input_ids" not in arguments
    alike = images or type(model).__name__ in _OF_ONE_LENGTH
    return "attention_mask" in arguments and not alike and not _decodes(model, arguments)


def _decodes(model: Any, arguments: set[str]) -> bool:
    """Return whether a model reads what an encoder beside it computed."""
    decodes = getattr(model.config, "is_decoder", False) or "Decoder" in type(model).__name__
    return decodes and "encoder_hidden_states" in arguments
