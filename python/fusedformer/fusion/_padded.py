"""Which models compute padding that they could be given, so that ``fuse`` reports them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from fusedformer.fusion._classes import Plan, arguments_of
from fusedformer.fusion._configs import attends
from fusedformer.fusion._layers import FusedLayer

# Arguments that say what is real of other inputs than texts.
_MASKS = {
    "pixel_attention_mask", "patch_attention_mask", "spatial_shapes", "input_features_mask",
    "padding_mask",
}  # fmt: skip
# Sound that is padded to one length, which is computed as silence: no mask comes with it; and the
# frames of videos, of which all have as many.
_OF_ONE_LENGTH = {
    "WhisperEncoder", "WhisperModel", "VoxtralEncoder", "ASTModel",
    "XCLIPMultiframeIntegrationTransformer", "XCLIPPromptGenerator",
}  # fmt: skip


def plan_padded(plan: Plan, places: Iterable[tuple[str, nn.Module, str, nn.Module]]) -> None:
    """Report the models that attend by this library, may be given padding, and are not packed.

    Those that are left for another reason are not named again, and a decoder beside an encoder is
    not counted.

    Args:
        plan: whose changes are known by now.
        places: path and module of all that models have, and path and module of the innermost model.
    """
    known = {path: (module, outer, model) for path, module, outer, model in places}
    done = {path for path, (module, *_) in known.items() if _packs(plan.class_of(module))}
    done |= {one.path for one in plan.left}
    for inner, (module, outer, model) in known.items():
        around = [path for path in around_of(inner) if path in known]
        classes = [plan.class_of(known[path][0]) for path in around]
        attending = issubclass(classes[0], FusedLayer) or attends(type(module))
        if (
            attending
            and not done & {*around}
            and "cu_seqlens" not in arguments_of(type(module))  # else its rows are packed
            and not _OF_ONE_LENGTH & {cls.__name__ for cls in classes}
            and _takes_padding(model)
        ):
            is_fused = any(issubclass(cls, FusedLayer) for cls in classes)
            reason = "no table says how it packs" if is_fused else "its layers have no form"
            plan.leave(outer, model, f"computed padded: {reason}")
            done.add(outer)


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
    kinds = model.input_modalities
    images = not {"text", "audio"} & {*([kinds] if isinstance(kinds, str) else kinds)}
    return "attention_mask" in arguments and not images and not _decodes(model, arguments)


def _decodes(model: Any, arguments: set[str]) -> bool:
    """Return whether a model reads what an encoder beside it computed."""
    decodes = getattr(model.config, "is_decoder", False) or "Decoder" in type(model).__name__
    return decodes and "encoder_hidden_states" in arguments
