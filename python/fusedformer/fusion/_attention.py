"""The attention of transformers' models on this library's: what is registered with them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    sdpa_mask,
)

from fusedformer import functional

try:
    from transformers.utils.output_capturing import _active_collector
except ImportError:  # of an older transformers: then hooks are what tells
    _active_collector = None  # type: ignore[assignment]


def captured() -> dict[str, Any]:
    """What the running model was asked to return besides, by name."""
    collector: Any = _active_collector
    return (None if collector is None else collector.get()) or {}


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
        s_aux: the functional form's ``sinks``.
        cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k: of packed sequences, in a batch
            of 1.
    """
    if is_causal is None:
        is_causal = bool(getattr(module, "is_causal", True))
    packed = cu_seq_lens_q is not None and cu_seq_lens_k is not None
    told = attention_mask is not None and attention_mask.dim() == 4
    is_causal = is_causal and query.shape[2] > 1 and (packed or not told)
    window = None
    if sliding_window is not None and (packed or not told):
        window = (sliding_window - 1, 0 if is_causal else sliding_window - 1)
    settings: dict[str, Any] = {
        "dropout_p": dropout, "is_causal": is_causal, "scale": scaling, "sinks": s_aux,
        "softcap": softcap,
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
        return_weights="per_head" if "attentions" in captured() else False, **settings,
    )
    output, weights = result if isinstance(result, tuple) else (result, None)
    # Autocast may have widened the weights; those models cast them back.
    weights = None if weights is None else weights.to(query.dtype)
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
