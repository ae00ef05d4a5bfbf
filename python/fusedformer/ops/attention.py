"""Scaled dot-product attention: registration, autograd, choice of backend."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedformer import _checks
from fusedformer._backend import chosen_backend
from fusedformer.ops._shared import draw_seed, no_double_backward, nothing, register_fake

MAX_HEAD_DIM = 256


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    *,
    key_mask: Tensor | None,
    key_lengths: Tensor | None,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """See :func:`fusedformer.functional.scaled_dot_product_attention`."""
    if enable_gqa and query.dim() == 3:  # the one leading dimension is that of the heads
        q, k, v = query[None], key[None], value[None]
        result = scaled_dot_product_attention(
            q, k, v, attn_mask, dropout_p, is_causal, scale, enable_gqa, key_mask=key_mask,
            key_lengths=key_lengths, return_lse=return_lse,
        )
        return result[0] if isinstance(result, Tensor) else (result[0][0], result[1][0])
    batch = _checks.attention_batch_shape(query, key, value, enable_gqa)
    if scale is None:
        scale = 1.0 / math.sqrt(max(query.shape[-1], 1))
    heads_of = key.shape[-3] if enable_gqa else None
    q = _as_4d(query, batch, None)
    k = _as_4d(key, batch, heads_of)
    v = _as_4d(value, batch, heads_of)
    mask = None
    if attn_mask is not None:
        rows, columns = query.shape[-2], key.shape[-2]
        missing = len(batch) + 2 - attn_mask.dim()
        padded = attn_mask[(None,) * missing] if missing else attn_mask
        if len(batch) == 2:  # size-1 dimensions stay: a gradient is reduced over them
            mask = padded
        elif len(batch) < 2:
            mask = padded.reshape(*padded.shape[:-2], 1, *padded.shape[-2:])
            mask = mask if len(batch) else mask[None]
        else:
            mask = _as_4d(padded.expand(*batch, rows, columns), batch, None)
    if chosen_backend(query) == "torch":
        output, lse = _attention_aten(
            q, k, v, mask, key_mask, key_lengths, dropout_p, is_causal, scale, return_lse
        )
    else:
        function = "scaled_dot_product_attention"
        _checks.check_kernel_dtype(function, "query", query)
        for name, size in (("query", query.shape[-1]), ("value", value.shape[-1])):
            if not 1 <= size <= MAX_HEAD_DIM:
                raise ValueError(
                    f"{function}(): the triton backend supports head dims from 1 to "
                    f"{MAX_HEAD_DIM}, but the last dimension of '{name}' is {size}; run it under "
                    f"fusedformer.backend('torch')"
                )
        seed = draw_seed(dropout_p, query.device)
        output, lse = _attention(
            q, k, v, mask, key_mask, key_lengths, seed, dropout_p, is_causal, scale
        )
    output = output.reshape(*batch, *output.shape[-2:])
    return (output, lse.reshape(*batch, lse.shape[-1])) if return_lse else output


def _as_4d(tensor: Tensor, batch: tuple[int, ...], heads: int | None) -> Tensor:
    """``[batch, heads, sequence, dim]`` with broadcast batch dimensions, a view where possible."""
    leading = batch if heads is None else (*batch[:-1], heads)
    expanded = tensor.expand(*leading, *tensor.shape[-2:])
    if len(leading) == 2:
        return expanded
    if len(leading) < 2:
        return expanded.reshape(*(leading or (1,)), 1, *tensor.shape[-2:])
    return expanded.reshape(math.prod(leading[:-1]), leading[-1], *tensor.shape[-2:])


def _merged_mask(
    mask: Tensor | None,
    key_mask: Tensor | None,
    key_lengths: Tensor | None,
    is_causal: bool,
    query: Tensor,
    key: Tensor,
) -> tuple[Tensor | None, bool]:
    """One mask for ATen's attention, which takes one; and whether it is still to be causal."""
    keep = None if key_mask is None else key_mask[:, None, None, :]
    if key_lengths is not None:
        positions = torch.arange(key.shape[-2], device=key.device)
        within = (positions < key_lengths[:, None])[:, None, None, :]
        keep = within if keep is None else keep & within
    if is_causal and (mask is not None or keep is not None):
        ones = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=key.device)
        keep = ones.tril() if keep is None else keep & ones.tril()
        is_causal = False
    if mask is None or keep is None:
        merged = keep if mask is None else mask
    elif mask.dtype == torch.bool:
        merged = mask & keep
    else:
        merged = mask.masked_fill(~keep, -torch.inf)
    if merged is not None and merged.is_floating_point():
        merged = merged.to(query.dtype)
    return merged, is_causal


def _attention_aten(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    key_mask: Tensor | None,
    key_lengths: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    if scale < 0:
        # ATen's CPU kernel masks with -inf before it scales, and a negative factor makes NaN of it.
        query, scale = -query, -scale
    mask, is_causal = _merged_mask(mask, key_mask, key_lengths, is_causal, query, key)
    grouped = query.shape[1] != key.shape[1]
    output = F.scaled_dot_product_attention(
        query, key, value, mask, dropout_p, is_causal, scale=scale, enable_gqa=grouped
    )
    if not return_lse:
        return output, output
    # ATen's public attention does not return it, so it costs one more product here.
    if grouped:
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = query.to(wide) @ key.to(wide).transpose(-2, -1) * scale
    if is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        keep = mask.dtype == torch.bool
        scores = scores.masked_fill(~mask, -torch.inf) if keep else scores + mask
    removed = (scores == -torch.inf).all(-1)
    lse = scores.masked_fill(removed[..., None], 0.0).logsumexp(-1)
    return output, lse.masked_fill(removed, -torch.inf)


@torch.library.custom_op("fusedformer::attention", mutates_args=())
def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    key_mask: Tensor | None,
    key_lengths: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    from fusedformer_kernels.attention_forward import attention_forward

    return attention_forward(
        query, key, value, mask, key_mask, key_lengths, seed, dropout_p, is_causal, scale
    )


@register_fake("fusedformer::attention")
def _attention_fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    key_mask: Tensor | None,
    key_lengths: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    batch, heads, length, _ = query.shape
    # [batch, length, heads, dim] in memory: merging the heads again is then a view.
    output = query.new_empty(batch, length, heads, value.shape[-1]).transpose(1, 2)
    return output, query.new_empty(batch, heads, length, dtype=torch.float32)


@torch.library.custom_op("fusedformer::attention_backward", mutates_args=())
def _attention_backward(
    grad: Tensor | None,
    lse_grad: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    key_mask: Tensor | None,
    key_lengths: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and mask; empty where ``needs`` says False."""
    from fusedformer_kernels.attention_backward import attention_backward

    grads = attention_backward(
        grad, lse_grad, query, key, value, output, lse, mask, key_mask, key_lengths, seed,
        dropout_p, is_causal, scale, needs,
    )
    first, second, third, fourth = (nothing(query) if t is None else t for t in grads)
    return first, second, third, fourth


@register_fake("fusedformer::attention_backward")
def _attention_backward_fake(
    grad: Tensor | None,
    lse_grad: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    key_mask: Tensor | None,
    key_lengths: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def like(tensor: Tensor, wanted: bool) -> Tensor:
        if not wanted:
            return nothing(query)
        batch, heads, length, dim = tensor.shape
        return tensor.new_empty(batch, length, heads, dim).transpose(1, 2)

    mask_grad = nothing(query)
    if mask is not None and needs[3]:
        mask_grad = mask.new_empty(mask.shape)
    return like(query, needs[0]), like(key, needs[1]), like(value, needs[2]), mask_grad


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, mask, key_mask, key_lengths, seed = inputs[:7]
    ctx.dropout_p, ctx.is_causal, ctx.scale = inputs[7:]
    ctx.save_for_backward(query, key, value, *output, mask, key_mask, key_lengths, seed)
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, grad: Tensor | None, lse_grad: Tensor | None
) -> tuple[Tensor | None, ...]:
    if grad is None and lse_grad is None:
        return (None,) * 10
    query, key, value, output, lse, *others = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:4])
    grads = _attention_backward(
        grad, lse_grad, query, key, value, output, lse, *others,
        ctx.dropout_p, ctx.is_causal, ctx.scale, needs,
    )
    wanted = [g if need else None for g, need in zip(grads, needs, strict=True)]
    return (*wanted, None, None, None, None, None, None)


torch.library.register_autograd("fusedformer::attention", _backward, setup_context=_save)
torch.library.register_autograd(
    "fusedformer::attention_backward", no_double_backward("attention")
)
