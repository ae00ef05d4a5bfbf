"""Sequences and masks as ``torch.nn`` takes them: checked, and brought into one form.

``torch.nn`` says True = masked; :mod:`fusedformer.functional` says True = keep, as
``F.scaled_dot_product_attention`` does. The change of sign happens here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedformer._internal import checks
from fusedformer._internal.autocast import autocast_dtype
from fusedformer.errors import BadTypeError, BadValueError
from fusedformer.functional import Packing
from fusedformer.functional.packing import with_empty_tail
from fusedformer.functional.steps import AttentionTerms, self_attention_terms


class Names(NamedTuple):
    """Names of a module and its arguments in error messages."""

    function: str
    query: str
    key: str
    value: str
    attn_mask: str
    key_padding_mask: str


class AttentionMasks(NamedTuple):
    """Masks in the form that functions take: each field is the argument of the same name."""

    attn_mask: Tensor | None  # [1 or batch, 1 or heads, L, S]; True = keep, or added to the scores
    key_mask: Tensor | None  # [batch, S]; True = keep
    is_causal: bool
    cu_seqlens_q: Tensor | None = None  # [sequences + 1], of packed rows
    cu_seqlens_k: Tensor | None = None
    max_seqlen_q: int = 0
    max_seqlen_k: int = 0
    attend: Attend | None = None  # computes self-attention in the usual function's place
    layer: int = 0  # index of the encoder's layer, for ``attend``

    def terms(self, head_dim: int, dropout_p: float) -> AttentionTerms:
        """Return what the scores of attention depend on, as ops take it."""
        return self_attention_terms(
            head_dim,
            dropout_p,
            attn_mask=self.attn_mask,
            key_mask=self.key_mask,
            is_causal=self.is_causal,
            cu_seqlens_q=self.cu_seqlens_q,
            cu_seqlens_k=self.cu_seqlens_k,
            max_seqlen_q=self.max_seqlen_q,
            max_seqlen_k=self.max_seqlen_k,
        )

    @staticmethod
    def packed(queries: Packing, keys: Packing, is_causal: bool) -> AttentionMasks:
        """Make the masks by which packed rows attend to the packed rows of their sequence."""
        starts_q, starts_k = queries.cu_seqlens_q, keys.cu_seqlens_k
        # A tail counts as two more sequences. A side without one gets two empty ones to match.
        if keys.has_tail and not queries.has_tail:
            starts_q = with_empty_tail(starts_q)
        if queries.has_tail and not keys.has_tail:
            starts_k = with_empty_tail(starts_k)
        return AttentionMasks(
            None, None, is_causal, starts_q, starts_k, queries.max_seqlen, keys.max_seqlen
        )


_NO_MASKS = AttentionMasks(None, None, False)

# From a projection [batch, length, 3, heads, head_dim], the probability of dropout and the masks,
# which name the layer, to heads [batch, length, heads, head_dim]. Packed rows are a batch of 1.
Attend = Callable[[Tensor, float, AttentionMasks], Tensor]


def _restrict(mask: Tensor | None, keep: Tensor) -> Tensor:
    if mask is None:
        return keep
    return mask & keep if mask.dtype == torch.bool else mask.masked_fill(~keep, -torch.inf)


def check_rank(function: str, name: str, tensor: Tensor) -> None:
    """Check that ``tensor`` is a padded batch of sequences, or one sequence."""
    checks.check_tensor(function, name, tensor)
    if tensor.is_nested:
        raise BadTypeError(f"{function}(): expected '{name}' to be padded, but got a nested tensor")
    if tensor.dim() not in (2, 3):
        raise BadValueError(
            f"{function}(): expected '{name}' to be 3-D (batched) or 2-D (unbatched), "
            f"but got shape {tuple(tensor.shape)}"
        )


def check_sequence(function: str, name: str, tensor: Tensor, width: int, weight: Tensor) -> None:
    """Check that ``tensor`` is ``[*, *, width]`` or ``[*, width]`` and fits ``weight``."""
    if (  # what almost every call finds, without a call
        type(tensor) is Tensor
        and tensor.layout is torch.strided
        and not tensor.is_nested
        and tensor.dim() in (2, 3)
        and tensor.shape[-1] == width
        and tensor.dtype is weight.dtype
        and tensor.device == weight.device
    ):
        return
    check_rank(function, name, tensor)
    if tensor.shape[-1] != width:
        raise BadValueError(
            f"{function}(): expected the last dimension of '{name}' to be {width}, "
            f"but got shape {tuple(tensor.shape)}"
        )
    checks.check_same_device(function, {name: tensor, "weight": weight})
    if tensor.dtype != weight.dtype and autocast_dtype("linear", tensor, weight) is None:
        raise BadTypeError(
            f"{function}(): expected '{name}' to have the dtype of the parameters, "
            f"{weight.dtype}, but got {tensor.dtype}"
        )


def check_padding_mask(
    function: str, name: str, mask: Tensor, batched: bool, batch: int, keys: int
) -> None:
    """Check that ``mask`` is boolean or floating, ``[batch, keys]``, unbatched ``[keys]``."""
    _check_mask_type(function, name, mask)
    if batched:
        checks.check_shape(function, name, mask, (batch, keys), "batch, keys")
    else:
        checks.check_shape(function, name, mask, (keys,), "keys, for unbatched input")


def _check_mask_type(function: str, name: str, mask: Tensor) -> None:
    checks.check_tensor(function, name, mask)
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise BadTypeError(
            f"{function}(): expected '{name}' to be boolean (True = masked) or floating-point "
            f"(added to the scores), but got {mask.dtype}"
        )


def padded_positions(key_padding_mask: Tensor) -> Tensor:
    """Return a boolean mask, True where a key is removed: at True or -inf."""
    if key_padding_mask.dtype == torch.bool:
        return key_padding_mask
    return key_padding_mask == -torch.inf


def is_causal_mask(mask: Tensor | None, length: int) -> bool:
    """Return whether ``mask`` is exactly the causal mask of ``length`` positions.

    On a GPU this waits for the device once. Where values cannot be read, as inside
    ``torch.compile``, the answer is False: the mask is then applied as it is, with the same result.
    """
    if mask is None or mask.shape != (length, length) or not checks.has_values(mask):
        return False
    masked = 1.0 if mask.dtype == torch.bool else -torch.inf
    causal = torch.full((length, length), masked, dtype=mask.dtype, device=mask.device).triu(1)
    return torch.equal(mask, causal)


def check_attn_mask(
    names: Names,
    attn_mask: Tensor | None,
    is_causal: bool,
    *,
    batch: int,
    heads: int,
    rows: int,
    keys: int,
) -> None:
    """Check the shape and dtype of ``attn_mask``, and that ``is_causal`` comes with a mask."""
    function = names.function
    if attn_mask is not None:
        _check_mask_type(function, names.attn_mask, attn_mask)
        wanted = {2: (rows, keys), 3: (batch * heads, rows, keys)}
        if tuple(attn_mask.shape) != wanted.get(attn_mask.dim()):
            raise BadValueError(
                f"{function}(): expected '{names.attn_mask}' to have shape {wanted[2]} "
                f"(queries, keys) or {wanted[3]} (batch * heads, queries, keys), "
                f"but got {tuple(attn_mask.shape)}"
            )
    elif is_causal:
        raise BadValueError(
            f"{function}(): is_causal=True is a hint that '{names.attn_mask}' is the causal mask, "
            f"so '{names.attn_mask}' is needed, but got None; see "
            f"torch.nn.Transformer.generate_square_subsequent_mask"
        )


def attention_masks(
    names: Names,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    is_causal: bool,
    *,
    batched: bool,
    batch: int,
    heads: int,
    rows: int,
    keys: int,
    appended: int = 0,
) -> AttentionMasks:
    """Check the masks of a ``torch.nn`` attention module and convert them.

    After ``keys`` come ``appended`` more, which every query sees. With ``is_causal``, the hint
    that ``attn_mask`` is the causal mask, ``attn_mask`` is not read, unless it may be learned or
    the causal pattern would hide appended keys.
    """
    if attn_mask is None and key_padding_mask is None and not is_causal:
        return _NO_MASKS
    check_attn_mask(names, attn_mask, is_causal, batch=batch, heads=heads, rows=rows, keys=keys)
    if key_padding_mask is not None:
        name = names.key_padding_mask
        check_padding_mask(names.function, name, key_padding_mask, batched, batch, keys)

    is_causal = is_causal and attn_mask is not None and not attn_mask.requires_grad and not appended
    mask = None if is_causal else attn_mask
    if mask is not None:
        mask = _appended(~mask if mask.dtype == torch.bool else mask, appended)
        mask = torch.unflatten(mask, 0, (batch, heads)) if mask.dim() == 3 else mask[None, None]
    if key_padding_mask is None:
        return AttentionMasks(mask, None, is_causal)
    padding = key_padding_mask if batched else key_padding_mask[None]
    if padding.dtype == torch.bool:
        return AttentionMasks(mask, _appended(~padding, appended), is_causal)
    added = _appended(padding, appended)[:, None, None, :]
    if mask is not None:
        added = _restrict(added, mask) if mask.dtype == torch.bool else added + mask
    return AttentionMasks(added, None, is_causal)


def _appended(mask: Tensor, count: int) -> Tensor:
    visible = 1.0 if mask.dtype == torch.bool else 0.0
    return F.pad(mask, (0, count), value=visible) if count else mask
