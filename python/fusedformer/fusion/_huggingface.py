"""Hugging Face models: attention by the library's, registered, and BERT's kin packed.

A registered implementation is two functions: one that makes the mask of a batch once for all
layers, and one that attends. Padding stays a 2-D mask, which the encoders here pack by, and
attention takes as the mask of its keys; patterns other than causal and full come as boolean 4-D
masks, of which the kernels skip the empty tiles.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    sdpa_mask,
)

from fusedformer import functional
from fusedformer.fusion._classes import Plan, combined
from fusedformer.fusion._post_norm import ENCODERS, LAYERS, PackedEncoder, wants_weights

# The second is for models that say they cannot do with a 2-D mask.
NAME, NAME_4D = "fusedformer", "fusedformer_4d_masks"


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    position_bias: Tensor | None = None,
    s_aux: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """(``[batch, queries, heads, dim]``, weights if they are to be returned), as for transformers.

    Args:
        module: the attention module; its ``is_causal`` holds where none is given.
        query, key, value: ``[batch, heads, length, dim]``; keys may have fewer heads.
        attention_mask: boolean ``[batch, keys]``, True = real; or 4-D, boolean or added.
        dropout, scaling, is_causal, softcap: as the functional form's.
        sliding_window: keys within this distance are seen, itself included, where the mask is not
            4-D and so says so itself.
        position_bias: added to the scores.
        cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k: of packed sequences, in a batch
            of 1.

    Raises:
        ValueError: attention sinks (``s_aux``), which the kernels do not have.
    """
    if s_aux is not None:
        raise ValueError("fusedformer: attention sinks ('s_aux') are not supported; unfuse(model)")
    if is_causal is None:
        is_causal = bool(getattr(module, "is_causal", True))
    packed = cu_seq_lens_q is not None and cu_seq_lens_k is not None
    told = attention_mask is not None and attention_mask.dim() == 4
    is_causal = is_causal and query.shape[2] > 1 and (packed or not told)
    window = None
    if sliding_window is not None and (packed or not told):
        window = (sliding_window - 1, 0 if is_causal else sliding_window - 1)
    settings: dict[str, Any] = {
        "dropout_p": dropout, "is_causal": is_causal, "scale": scaling, "softcap": softcap,
        "enable_gqa": key.shape[1] != query.shape[1], "window": window,
        "causal_alignment": "bottom_right",
    }  # fmt: skip
    if cu_seq_lens_q is not None and cu_seq_lens_k is not None:  # which say it all
        q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
        most_q, most_k = (q.shape[0] if m is None else int(m) for m in (max_length_q, max_length_k))
        output = functional.varlen_attention(
            q, k, v, cu_seq_lens_q, cu_seq_lens_k, most_q, most_k, **settings
        )
        return output[None], None
    mask, key_mask = (attention_mask, None) if told else (None, attention_mask)
    if position_bias is not None:
        bias = position_bias.to(query.dtype)
        if mask is not None:
            keep = mask.dtype == torch.bool
            bias = bias.masked_fill(~mask, -torch.inf) if keep else bias + mask
        mask = bias
    elif mask is not None and mask.is_floating_point():
        mask = mask.to(query.dtype)
    result: Any = functional.scaled_dot_product_attention(
        query, key, value, mask, key_mask=key_mask,
        return_weights="per_head" if wants_weights() else False, **settings,
    )
    output, weights = result if isinstance(result, tuple) else (result, None)
    return output.transpose(1, 2).contiguous(), weights


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """The mask that :func:`attention` gets: None, the padding ``[batch, keys]``, or 4-D."""
    full = mask_function is bidirectional_mask_function
    aligned = (
        mask_function is causal_mask_function
        and isinstance(q_offset, int)
        and q_offset + q_length == kv_length
    )
    fits = attention_mask is None or tuple(attention_mask.shape) == (batch_size, kv_length)
    if (full or aligned) and fits and kv_offset == 0:
        return attention_mask
    found: Tensor | None = sdpa_mask(
        batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset,
        kv_offset=kv_offset, mask_function=mask_function, attention_mask=attention_mask,
        **{**kwargs, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False},
    )  # fmt: skip
    return found


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
            plan.give(where, module, combined(PackedEncoder, cls), "packed: real tokens only")
