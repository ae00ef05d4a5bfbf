"""Checks for modules that need sequences in a batch, so that an encoder must not be packed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.nn.utils.parametrize import ParametrizationList

from fusedformer.fusion._attention import captured
from fusedformer.fusion._configs import NAMES, attends, named
from fusedformer.fusion._hooks import changes_no_value
from fusedformer.fusion._kept_rows import wants_padding
from fusedformer.fusion._seen import SEEN, Seen
from fusedformer.nn.children import is_hooked
from fusedformer.nn.stacks import can_pack

_CHUNKS = "chunk_size_feed_forward"  # a setting of layers

_needs_look: dict[Any, bool] = {}  # whether modules of a class may need the batch without hooks
# Packages whose modules compute each token by itself, or attend in ways that are checked here.
_TOKENWISE = (
    "torch.nn.", "torch.ao.", "torch.distributed.", "torchao.", "bitsandbytes.", "transformers.",
    "fusedformer.", "peft.tuners.lora.", "peft.tuners.adalora.", "peft.tuners.ia3.",
)  # fmt: skip


def change_in(layer: nn.Module) -> str:
    """Say what was changed in a layer that is no longer plain."""
    if any(type(m).__module__.startswith("torch.ao.nn.quantized.") for m in layer.modules()):
        return "products are quantized"
    return "something in it was replaced or hooked"


def may_pack(encoder: Any, x: Tensor, keep: Tensor, by_ours: bool = True) -> bool:
    """Return whether neither who calls, nor what is below ``encoder``, needs ``x`` padded.

    Args:
        encoder: with ``static_shapes``; else as in :func:`needs_batch`.
        x: a batch, its tokens real where ``keep`` is.
    """
    return (
        not captured()
        and not wants_padding()
        and can_pack(x, encoder.static_shapes, keep)
        and not needs_batch(encoder, by_ours)
    )


def needs_batch(encoder: nn.Module, by_ours: bool = True, is_causal: bool | None = None) -> str:
    """Say what below ``encoder`` may need the batch that it was given; empty if nothing does.

    Args:
        encoder: whose layers would get the tokens of all sequences as one.
        by_ours: whether its attention has to be this library's by now.
        is_causal: what attention has to say of itself, if anything.
    """
    if _has_any_global_hook():  # type: ignore[no-untyped-call]
        return "a hook on all modules"
    looks = by_ours and not torch.compiler.is_compiling()
    seen = encoder.__dict__.get(SEEN) if looks else None
    if seen is not None and seen.holds_for(encoder):
        asked, ask = seen.found, _reason_by_settings
        looks = False
    else:
        asked, ask = _to_be_asked(encoder), _reason
    for child in asked:
        reason = ask(child, by_ours, is_causal)
        if reason:
            path = next(n for n, one in encoder.named_modules() if one is child)
            return f"'{path}' {reason}"
    if looks:
        encoder.__dict__[SEEN] = Seen.of(encoder, asked)
    return ""


def _to_be_asked(encoder: nn.Module) -> list[nn.Module]:
    """List the modules below ``encoder`` that may need the batch."""
    found, left = [], [encoder]
    while left:  # on calls that find changes: so paths are looked up only for a reason
        for child in left.pop().__dict__["_modules"].values():
            if child is None:
                continue
            own, cls = child.__dict__, type(child)
            if _needs_look.get(cls, True) or is_hooked(child) or _CHUNKS in own:
                if isinstance(child, ParametrizationList):  # these compute weights
                    continue
                _needs_look[cls] = attends(cls) or not _is_tokenwise(cls)
                found.append(child)
            if own["_modules"]:
                left.append(child)
    return found


def _is_tokenwise(cls: type[Any]) -> bool:
    return f"{cls.__module__}.".startswith(_TOKENWISE)


def _reason(module: Any, by_ours: bool, is_causal: bool | None) -> str:
    cls: Any = type(module)
    if not _is_tokenwise(cls):
        return f"is a {cls.__name__}, which may need the batch"
    if not changes_no_value(module):
        return "has a hook, or its forward was replaced"
    return _reason_by_settings(module, by_ours, is_causal)


def _reason_by_settings(module: Any, by_ours: bool, is_causal: bool | None) -> str:
    """Say why a module needs the batch which does no more than its class says."""
    cls: Any = type(module)
    if module.__dict__.get(_CHUNKS, 0):
        return "computes sequences in chunks"
    if by_ours and attends(cls) and named(module.config) not in NAMES:
        return f"attends by {named(module.config)!r}"
    if attends(cls) and is_causal not in (None, getattr(module, "is_causal", is_causal)):
        return f"says is_causal={module.is_causal}, which its masks are not"
    return ""
