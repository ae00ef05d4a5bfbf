"""Which modules of ``torch.nn`` are replaced, and by what."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fusedformer import nn as fused
from fusedformer.fusion._classes import Plan, combined, named

_OURS: dict[type[Any], type[Any]] = {
    nn.Softmax: fused.Softmax,
    nn.LogSoftmax: fused.LogSoftmax,
    nn.LayerNorm: fused.LayerNorm,
    nn.RMSNorm: fused.RMSNorm,
    nn.MultiheadAttention: fused.MultiheadAttention,
    nn.TransformerEncoderLayer: fused.TransformerEncoderLayer,
    nn.TransformerEncoder: fused.TransformerEncoder,
    nn.TransformerDecoderLayer: fused.TransformerDecoderLayer,
    nn.TransformerDecoder: fused.TransformerDecoder,
    nn.Transformer: fused.Transformer,
}
# Methods besides forward that a subclass may have defined and ours would pass over.
_STEPS = ("_sa_block", "_mha_block", "_ff_block")


def plan_module(plan: Plan, path: str, module: nn.Module) -> None:
    """Add to the plan what is to become of ``module``, if it is of a kind that there is."""
    cls = type(module)
    if isinstance(module, tuple(_OURS.values())):
        return
    base = next((known for known in _OURS if isinstance(module, known)), None)
    if base is None:
        return
    ours = _OURS[base]
    if "forward" in module.__dict__:
        plan.leave(path, module, "its forward was replaced on the instance")
    elif cls is base:
        plan.give(path, module, ours, named(ours))
    elif any(getattr(cls, n, None) is not getattr(base, n, None) for n in ("forward", *_STEPS)):
        plan.leave(path, module, f"its class computes otherwise than {named(base)}")
    else:
        plan.give(path, module, combined(ours, cls), f"{named(ours)}, as a {cls.__name__}")


def refuse_wrapped(model: nn.Module) -> None:
    """Raise for what cannot be given another class."""
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            f"fuse(): expected 'model' to be a plain Module, but got a {type(model).__name__}; "
            f"fuse it before it is scripted"
        )
    for path, module in model.named_modules():
        names = {cls.__name__ for cls in type(module).__mro__}
        if names & {"FSDPModule", "FullyShardedDataParallel"}:
            raise ValueError(
                f"fuse(): '{path or 'model'}' is sharded by FSDP, which gave it a class of its "
                f"own; fuse the model before it is sharded"
            )
