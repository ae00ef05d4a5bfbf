"""One call that puts this library's modules in place of torch's and Hugging Face's in a model.

A module is replaced by giving the same object another class: its parameters, buffers, hooks and
settings, and all that refers to it (optimizers, tied weights, DDP), stay as they are.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from fusedformer.fusion._classes import ATTENTION_BEFORE, BEFORE, Plan, change_class
from fusedformer.fusion._modules import plan_module, refuse_spread, refuse_wrapped
from fusedformer.fusion._report import FusionReport

__all__ = ["FusionReport", "fuse", "unfuse"]


def fuse(model: nn.Module, *, strict: bool = False) -> FusionReport:
    """Replace, in place, every module of ``model`` that this library has.

    Of ``torch.nn``: Softmax, LogSoftmax, LayerNorm, RMSNorm, CrossEntropyLoss, MultiheadAttention,
    and the layers and stacks of encoder and decoder, whole; also subclasses that leave the
    computation alone. Of Hugging Face's transformers: the attention of every ``PreTrainedModel``
    that takes registered implementations, and the layers and the encoder of BERT, RoBERTa, XLM-R,
    CamemBERT, ELECTRA, DistilBERT and ALBERT, and the whole of ModernBERT, which then compute real
    tokens only.

    Calling it again changes nothing. Parameters are the same objects before and after; the
    state_dict does not change.

    Args:
        model: any module, in training or not, on any device, also inside DDP.
        strict: raise if a module of these kinds is left alone.

    Returns:
        What was replaced by what, and what was left alone and why; it prints as a table.

    Raises:
        TypeError: ``model`` is not a module, or is scripted.
        ValueError: ``model`` is sharded by FSDP (fuse it before); with ``strict`` something is left
            alone. The model then is what it was.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"fuse(): expected 'model' to be a Module, but got {type(model).__name__}")
    refuse_wrapped(model)
    plan = Plan()
    for path, module in model.named_modules():
        plan_module(plan, path, module)
    _plan_huggingface(plan, model)
    if strict and plan.left:
        raise ValueError(f"fuse(): strict=True, but left alone were\n{FusionReport([], plan.left)}")
    plan.apply()
    return FusionReport(plan.replaced, plan.left)


def unfuse(model: nn.Module) -> int:
    """Undo :func:`fuse`: every module gets the class back that it had.

    Returns:
        How many replacements were undone.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: ``model`` was sharded by FSDP or made tensor-parallel since.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"unfuse(): expected 'model' to be a Module, but got {type(model).__name__}"
        )
    refuse_spread(model)
    restored = 0
    for module in model.modules():
        attention: str | None = module.__dict__.pop(ATTENTION_BEFORE, None)
        if attention is not None:
            module.set_attn_implementation(attention)  # type: ignore[operator]
        before: Any = module.__dict__.pop(BEFORE, None)
        if before is not None:
            change_class(module, before)
        restored += (attention is not None) + (before is not None)
    return restored


def _plan_huggingface(plan: Plan, model: nn.Module) -> None:
    import sys

    if "transformers" not in sys.modules:  # nothing of it can be in the model
        return
    from fusedformer.fusion._huggingface import plan_huggingface

    plan_huggingface(plan, model)
