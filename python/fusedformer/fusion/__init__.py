"""One call that puts this library's modules in place of torch's and Hugging Face's in a model.

A module is replaced by giving the same object another class: its parameters, buffers, hooks and
settings, and all that refers to it (optimizers, tied weights, DDP), stay as they are.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from fusedformer.fusion._classes import BEFORE, Plan, change_class
from fusedformer.fusion._modules import plan_module, refuse_spread, refuse_wrapped
from fusedformer.fusion._report import FusionReport
from fusedformer.fusion._seen import SEEN
from fusedformer.fusion.clients import is_known, leave_outdated
from fusedformer.nn import TransformerEncoder

__all__ = ["FusionReport", "fuse", "is_fused", "unfuse"]


def fuse(model: nn.Module, *, strict: bool = False, pack: bool | None = None) -> FusionReport:
    """Replace, in place, every module of ``model`` that this library has.

    Of ``torch.nn``: Softmax, LogSoftmax, LayerNorm, RMSNorm, CrossEntropyLoss, MultiheadAttention,
    and the layers and stacks of encoder and decoder, whole; also subclasses that leave the
    computation alone. Of Hugging Face's transformers: the attention of every ``PreTrainedModel``
    that takes registered implementations, RMS norms, and the layers of some fifty families of
    encoders (BERT's kin, MPNet, DeBERTa, ModernBERT, T5, Qwen3, Llama, GPT-2, ...), which then
    compute real tokens only. Of timm and open_clip: attention, norms, and the blocks of ViT, EVA
    and CLIP as fused steps. Of sentence-transformers: pooling, and ``encode``, in which tokens stay
    packed.

    Calling it again changes nothing. Parameters are the same objects before and after; the
    state_dict does not change.

    Args:
        model: any module, in training or not, on any device, also inside DDP.
        strict: raise if a module of these kinds is left alone, or a model that may be given padding
            computes it; not where ``pack=False`` asks for that, nor of a decoder beside an encoder.
        pack: whether encoders compute real tokens only, with zeros at padded positions. None does
            so but in models whose class is known to read these positions (question answering, late
            interaction), where the report says so.

    Returns:
        The replacements, and the modules left alone with reasons; it prints as a table.

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
    leave_outdated(plan, model)
    transformers = _transformers()
    if transformers is not None:
        transformers.plan_huggingface(plan, model, pack)
        if is_known("sentence_transformers"):
            from fusedformer.fusion import sentences

            sentences.plan_sentence_models(plan, model)
    if strict and plan.left:
        raise ValueError(f"fuse(): strict=True, but left alone were\n{FusionReport([], plan.left)}")
    plan.apply()
    if pack is False:
        for module in model.modules():
            if isinstance(module, TransformerEncoder) and BEFORE in module.__dict__:
                module.compute_padding = True
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
    transformers = _transformers()
    restored: int = 0 if transformers is None else transformers.restore(model)
    for module in model.modules():
        module.__dict__.pop(SEEN, None)
        before: Any = module.__dict__.pop(BEFORE, None)
        if before is not None:
            change_class(module, before)
            module.__dict__.pop("compute_padding", None)
            restored += 1
    return restored


def is_fused(model: nn.Module) -> bool:
    """Return whether :func:`fuse` replaced something in ``model``."""
    return any(BEFORE in module.__dict__ for module in model.modules())


def _transformers() -> Any:
    """Import what plans its models, if it was imported: else there are none."""
    if not is_known("transformers"):
        return None
    from fusedformer.fusion import _huggingface

    return _huggingface
