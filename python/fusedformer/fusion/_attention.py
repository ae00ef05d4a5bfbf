"""Attention functions of this library, as transformers registers them by name."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    sdpa_mask,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fusedformer import functional
from fusedformer._internal.checks import has_values
from fusedformer._internal.tracing import is_traced_by_jit
from fusedformer.functional.steps import scaled_attention

try:
    from transformers.utils.output_capturing import _active_collector
except ImportError:  # an older transformers: then only hooks tell
    _active_collector = None  # type: ignore[assignment]


# Dtypes that mark masks of keys made by this library, for all queries or for causal attention.
# Dimensions tell nothing, as models hand on 4-D masks unchanged; a boolean mask may be the user's.
FULL, CAUSAL = torch.uint8, torch.int8
KEPT = "_fusedformer_configs"  # where a module keeps the configurations that it had: ``_configs``


def captured() -> dict[str, Any]:
    """Return further outputs that the running model was asked for, by name."""
    collector: Any = _active_collector
    if collector is None:
        return {}
    if torch.compiler.is_compiling():  # a ContextVar cannot be compiled: transformers has a proxy
        return getattr(collector, "global_var", None) or {}
    return collector.get() or {}


def key_mask_of(mask: Any) -> Tensor | None:
    """Return the mask of keys ``[batch, keys]``, True = real, if ``mask`` is no more than that."""
    if not isinstance(mask, Tensor) or mask.dtype not in (torch.bool, FULL):
        return None
    if mask.dim() == 4 and mask.shape[1:3] == (1, 1):
        return _mask_as(torch.bool, mask[:, 0, 0])
    return mask if mask.dim() == 2 else None


def for_batch(mask: Tensor | None, batch: int) -> Tensor | None:
    """Return a mask of keys for each of the batch: torch takes one row for all."""
    # Its len() would fix a size that torch.export leaves open.
    if mask is None or mask.dim() != 2 or mask.shape[0] != 1:
        return mask
    return mask.expand(batch, -1)


def _mask_as(dtype: torch.dtype, mask: Tensor) -> Tensor:
    """View a mask of 0 and 1 in another dtype of one byte; torch.jit.trace must copy it."""
    return mask.to(dtype) if is_traced_by_jit() else mask.view(dtype)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | BlockMask | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    sliding_window: int | tuple[int, int] | None = None,
    position_bias: Tensor | None = None,
    relative_bias: Tensor | None = None,
    relative_bias_gate: Tensor | None = None,
    sequence_bias: Tensor | None = None,
    s_aux: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attend as transformers asks; return ``[batch, queries, heads, dim]``, and weights if asked.

    Args:
        module: the attention module; its ``is_causal`` holds where none is given.
        query, key, value: ``[batch, heads, length, dim]``; keys may have fewer heads.
        attention_mask: of :func:`attention_mask`; or boolean ``[batch, keys]``, True = real, or
            4-D, boolean or added; of packed sequences by the positions in each. A BlockMask is for
            flex_attention, which then attends.
        dropout, scaling, is_causal, softcap: as the functional form's.
        sliding_window: of packed sequences, keys within this distance are seen, itself included;
            or the farthest that are, before and behind; of others the mask says so.
        position_bias: added to the scores.
        relative_bias: the functional form's.
        relative_bias_gate: ``[batch, heads, queries]``, a factor on it.
        sequence_bias: added to the scores of packed sequences ``[sequences, heads, longest,
            longest]``, in place of their mask.
        s_aux: its ``sinks``.
        cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k: of packed sequences, in a batch
            of 1.

    Raises:
        ValueError: ``position_bias`` of packed sequences.
    """
    if isinstance(attention_mask, BlockMask):
        of_blocks: Any = ALL_ATTENTION_FUNCTIONS["flex_attention"]
        found: tuple[Tensor, Tensor | None] = of_blocks(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling,
            softcap=softcap, s_aux=s_aux, is_causal=is_causal, **kwargs,
        )  # fmt: skip
        return found
    if is_causal is None:
        is_causal = bool(getattr(module, "is_causal", True))
    packed = cu_seq_lens_q is not None and cu_seq_lens_k is not None
    mask = key_mask = None
    if not packed:
        mask, key_mask, is_causal = split_mask(module, attention_mask, is_causal)
        key_mask = for_batch(key_mask, query.shape[0])
    is_causal = is_causal and query.shape[2] > 1
    if (
        cu_seq_lens_q is not None
        and cu_seq_lens_k is not None
        and not is_causal
        and not dropout
        and attention_mask is None
        and softcap is None
        and sliding_window is None
        and position_bias is None
        and relative_bias is None
        and sequence_bias is None
        and s_aux is None
    ):
        output = scaled_attention(query, key, value, cu_seq_lens_q, cu_seq_lens_k, scaling)
        if output is not None:
            return output, None
    window = None
    if sliding_window is not None and packed:  # else the mask contains it
        window = reach(sliding_window, is_causal)
    settings: dict[str, Any] = {
        "dropout_p": dropout, "is_causal": is_causal, "scale": scaling, "softcap": softcap,
        "enable_gqa": key.shape[1] != query.shape[1], "window": window, "sinks": s_aux,
        "relative_bias": relative_bias, "relative_bias_gate": relative_bias_gate,
        "causal_alignment": "bottom_right",
    }  # fmt: skip
    if cu_seq_lens_q is not None and cu_seq_lens_k is not None:  # they replace the mask
        if position_bias is not None:
            raise ValueError(
                "fusedformer: expected no 'position_bias' with packed sequences ('cu_seq_lens_q'), "
                "but got one; pass the batch padded, with 'attention_mask'"
            )
        q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
        if relative_bias_gate is not None:
            settings["relative_bias_gate"] = relative_bias_gate.squeeze(0).t()
        most_q, most_k = (q.shape[0] if m is None else int(m) for m in (max_length_q, max_length_k))
        mask = sequence_bias
        if mask is None:
            mask = mask_of_sequences(attention_mask, cu_seq_lens_k)
        output = functional.varlen_attention(
            q, k, v, cu_seq_lens_q, cu_seq_lens_k, most_q, most_k, attn_mask=mask, **settings
        )
        return output[None], None
    if position_bias is not None:
        bias = position_bias.to(query.dtype)
        if mask is not None:
            keep = mask.dtype == torch.bool
            bias = bias.masked_fill(~mask, -torch.inf) if keep else bias + mask
        mask = bias
    elif mask is not None and mask.is_floating_point():
        mask = mask.to(query.dtype)
    returned = "attentions" in captured() or kwargs.get("output_attentions")
    result: Any = functional.scaled_dot_product_attention(
        query,
        key,
        value,
        mask,
        key_mask=key_mask,
        return_weights="per_head" if returned else False,
        **settings,
    )
    output, weights = result if isinstance(result, tuple) else (result, None)
    # Autocast may have widened the weights; models with eager attention cast them back.
    weights = None if weights is None else weights.to(query.dtype)
    return output.transpose(1, 2).contiguous(), weights


def reach(window: int | tuple[int, int], is_causal: bool) -> tuple[int, int]:
    """Return how far a sliding window reaches before a token and behind it."""
    if isinstance(window, tuple):
        return window
    return window - 1, 0 if is_causal else window - 1


def mask_of_sequences(mask: Tensor | None, starts: Tensor) -> Tensor | None:
    """Return ``mask`` if it is a mask of the keys of each packed sequence."""
    keys = key_mask_of(mask)
    if mask is None or keys is None or mask.dim() != 4 or len(keys) != len(starts) - 1:
        return None
    return mask


def split_mask(
    module: nn.Module, given: Tensor | None, module_is_causal: bool
) -> tuple[Tensor | None, Tensor | None, bool]:
    """Split a mask that layers were given into mask of scores, mask of keys, and causality.

    Where the mask leaves causality open, ``module_is_causal``, the module's setting, holds.
    """
    if given is None:
        return None, None, module_is_causal
    if given.dim() == 2:
        return None, given, module_is_causal
    is_causal = given.dtype == CAUSAL
    keys = _mask_as(torch.bool, given[:, 0, 0]) if is_causal else key_mask_of(given)
    if keys is None:
        return given, None, False
    ours = given.dtype != torch.bool
    if ours and is_causal != module_is_causal and _sdpa_left_mask_out(module, keys):
        is_causal = module_is_causal
    return None, keys, is_causal


def _sdpa_left_mask_out(module: nn.Module, keys: Tensor) -> bool:
    """Return whether a module that contradicts its mask would have got none before it was fused.

    For ``sdpa`` transformers leaves the mask away if nothing is padding, see
    ``findings/aimv2_text_causality.sh``: the model computes the same as before.
    """
    kept = module.__dict__.get(KEPT, {}).get("config")
    before = None if kept is None else kept.original._attn_implementation
    return before == "sdpa" and has_values(keys) and bool(keys.all())


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    **kwargs: Any,
) -> Tensor | None:
    """Make the mask for :func:`attention`, as small as the request allows.

    Returns:
        None without padding; the padding ``[batch, 1, 1, keys]``, of dtype ``FULL`` where all
        queries see all keys, ``CAUSAL`` where they see those before them; else boolean
        ``[batch, 1, queries, keys]``.
    """
    attention_mask = for_batch(attention_mask, batch_size)
    full = mask_function is bidirectional_mask_function and allow_is_bidirectional_skip
    aligned = (
        mask_function is causal_mask_function
        and allow_is_causal_skip
        and isinstance(q_offset, int)
        and q_offset + q_length == kv_length
    )
    fits = attention_mask is None or tuple(attention_mask.shape) == (batch_size, kv_length)
    if (full or aligned) and fits and kv_offset == 0:
        if attention_mask is None:
            return None
        return _mask_as(FULL if full else CAUSAL, attention_mask.bool()[:, None, None])
    found: Tensor | None = sdpa_mask(
        batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset,
        kv_offset=kv_offset, mask_function=mask_function, attention_mask=attention_mask,
        **{**kwargs, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False},
    )  # fmt: skip
    return found


def attention_mask_4d(
    q_length: int, kv_length: int, allow_is_causal_skip: bool = True, **kwargs: Any
) -> Tensor | None:
    """Make the mask for models that read it: None or ``[batch, 1, queries, keys]``, as ``sdpa``'s.

    It is never None where queries are fewer than keys but more than one, as ``sdpa`` would then
    align causality at the top left.
    """
    found: Tensor | None = sdpa_mask(
        q_length=q_length, kv_length=kv_length,
        allow_is_causal_skip=allow_is_causal_skip and q_length in (1, kv_length), **kwargs,
    )  # fmt: skip
    return found
