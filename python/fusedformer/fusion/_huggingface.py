"""Hugging Face models: attention by the library's, registered, and BERT's kin packed.

A registered implementation is two functions: one that makes the mask of a batch once for all
layers, and one that attends. Padding stays a 2-D mask, which the encoders here pack by, and
attention takes as the mask of its keys; patterns other than causal and full come as boolean 4-D
masks, of which the kernels skip the empty tiles.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from fusedformer.fusion._attention import attention, attention_mask
from fusedformer.fusion._classes import Plan, combined
from fusedformer.fusion._packed_model import MODELS, PackedModel
from fusedformer.fusion._post_norm import ENCODERS, LAYERS, PackedEncoder

# The second is for models that say they cannot do with a 2-D mask.
NAME, NAME_4D = "fusedformer", "fusedformer_4d_masks"
_PACKED = "packed: real tokens only"


def plan_huggingface(plan: Plan, model: nn.Module) -> None:
    """Add to the plan what is to become of the models of transformers in ``model``."""
    within: list[str] = []
    for path, module in model.named_modules():
        if not isinstance(module, PreTrainedModel):
            continue
        if any(path.startswith(outer) for outer in within):
            continue
        within.append(f"{path}." if path else "")
        if _plan_attention(plan, path, module):
            _plan_stacks(plan, path, module)


def _plan_attention(plan: Plan, path: str, model: Any) -> bool:
    """Whether the model is to attend by :func:`attention`."""
    before = model.config._attn_implementation
    if before in (NAME, NAME_4D):
        return True
    if not (getattr(model, "_supports_sdpa", False) or model._supports_attention_backend):
        plan.leave(path, model, "its attention takes no registered implementation")
        return False
    for name, masks in ((NAME, attention_mask), (NAME_4D, sdpa_mask)):
        AttentionInterface.register(name, attention)
        AttentionMaskInterface.register(name, masks)
    name = NAME if getattr(model, "_supports_flash_attn", False) else NAME_4D
    plan.set_attention(path, model, before, name)
    return True


def _plan_stacks(plan: Plan, path: str, model: nn.Module) -> None:
    for inner, module in model.named_modules():
        where = ".".join(filter(None, (path, inner)))
        cls = type(module)
        known = f"{cls.__module__.rpartition('.')[2]}.{cls.__name__}"
        if hasattr(cls, "_made_of"):
            continue
        if known in LAYERS:
            reason = LAYERS[known].refuses(module)
            if reason:
                plan.leave(where, module, reason)
            else:
                plan.give(where, module, combined(LAYERS[known], cls), "four fused steps")
        elif known in ENCODERS:
            plan.give(where, module, combined(PackedEncoder, cls), _PACKED)
        elif known in MODELS:
            plan.give(where, module, combined(PackedModel, cls), _PACKED)
