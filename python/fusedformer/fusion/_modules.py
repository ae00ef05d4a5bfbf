"""Plans for modules of ``torch.nn``: which are replaced, and by what."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import type_before_parametrizations

from fusedformer import nn as fused
from fusedformer.fusion._blocks import BLOCKS
from fusedformer.fusion._classes import BEFORE, Plan, combined, named
from fusedformer.fusion._timm import REFUSES, TIMM
from fusedformer.nn.children import is_sharded

_OURS: dict[type[Any], type[Any]] = {
    nn.Softmax: fused.Softmax,
    nn.LogSoftmax: fused.LogSoftmax,
    nn.LayerNorm: fused.LayerNorm,
    nn.RMSNorm: fused.RMSNorm,
    nn.CrossEntropyLoss: fused.CrossEntropyLoss,
    nn.MultiheadAttention: fused.MultiheadAttention,
    nn.TransformerEncoderLayer: fused.TransformerEncoderLayer,
    nn.TransformerEncoder: fused.TransformerEncoder,
    nn.TransformerDecoderLayer: fused.TransformerDecoderLayer,
    nn.TransformerDecoder: fused.TransformerDecoder,
    nn.Transformer: fused.Transformer,
}
# Methods besides forward that a subclass may define and our classes do not call.
_STEPS = ("_sa_block", "_mha_block", "_ff_block")


def plan_module(plan: Plan, path: str, module: nn.Module) -> None:
    """Add to the plan what is to become of ``module``, if this library has its kind."""
    cls = type_before_parametrizations(module)
    if isinstance(module, tuple(_OURS.values())) or hasattr(cls, "_made_of"):
        return
    base = next((known for known in cls.__mro__ if _ours(known) is not None), None)
    is_leaf = next(module.children(), None) is None  # layers too are called by their norms
    if is_leaf and cls.__name__.endswith(("LayerNorm", "RMSNorm")):
        known = _known_norm(cls)
        if base is None or known is not None:
            _plan_norm(plan, path, module, known)
            return
    if base is None:
        return
    ours: Any = _ours(base)
    reason = REFUSES.get(ours, lambda module: "")(module)
    if "forward" in module.__dict__:
        plan.leave(path, module, "its forward was replaced on the instance")
    elif any(getattr(cls, n, None) is not getattr(base, n, None) for n in ("forward", *_STEPS)):
        plan.leave(path, module, f"its class computes otherwise than {named(base)}")
    elif reason:
        plan.leave(path, module, reason)
    elif cls is base and issubclass(ours, base):
        plan.give(path, module, ours, named(ours))
    else:
        after = getattr(ours, "FUSED", f"{named(ours)}, as a {cls.__name__}")
        plan.give(path, module, combined(ours, cls), after)


def _known_norm(cls: Any) -> Any:
    """Return the class that computes what a norm of transformers does, if there is one."""
    if not cls.__module__.startswith("transformers."):
        return None
    from fusedformer.fusion._norms import norm_of  # which imports transformers' models

    return norm_of(cls)


def _plan_norm(plan: Plan, path: str, module: nn.Module, ours: Any) -> None:
    """Add to the plan a norm of another maker, and the class for it, if there is one."""
    if ours is None:
        plan.leave(path, module, "a norm that is not torch.nn's")
    elif "forward" in module.__dict__:
        plan.leave(path, module, "its forward was replaced on the instance")
    else:
        cls = combined(ours, type_before_parametrizations(module))
        plan.give(path, module, cls, f"fusedformer.functional.{ours.FUNCTION}")


def _ours(cls: type[Any]) -> type[Any] | None:
    """Return the class that replaces ``cls``, if there is one."""
    name = f"{cls.__module__}.{cls.__qualname__}"
    return _OURS.get(cls) or TIMM.get(name) or BLOCKS.get(name)


def refuse_wrapped(model: nn.Module) -> None:
    """Raise for what cannot be given another class."""
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            f"fuse(): expected 'model' to be a plain Module, but got a {type(model).__name__}; "
            f"fused modules cannot be scripted: use torch.export, torch.jit.trace or torch.compile "
            f"on the fused model"
        )
    for path, module in model.named_modules():
        names = {cls.__name__ for cls in type(module).__mro__}
        if names & {"FSDPModule", "FullyShardedDataParallel"}:
            raise ValueError(
                f"fuse(): '{path or 'model'}' is sharded by FSDP, which gave it a class of its "
                f"own; fuse the model before it is sharded"
            )


def refuse_spread(model: nn.Module) -> None:
    """Raise for what was given another class since it was fused."""
    for path, module in model.named_modules():
        if BEFORE in module.__dict__ and (is_sharded(module) or "_region" in module.__dict__):
            raise ValueError(
                f"unfuse(): '{path or 'model'}' is spread over ranks, for which it was given a "
                f"class of its own; unfuse the model before"
            )
