"""Attention and norms in place of those of timm and open_clip, whose classes are not torch's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Dropout

from fusedformer import functional, nn
from fusedformer.nn.children import is_plain
from fusedformer.nn.tracers import introduce


class Attending:
    """A base of attention modules with timm's children."""

    def is_fused(self: Any) -> bool:
        """Return whether nobody looks at the weights of attention."""
        return bool(self.fused_attn and is_plain(self.attn_drop, Dropout))

    def takes(self, given: dict[str, Any]) -> bool:
        """Return whether a call with these arguments is computed here."""
        return True

    def _attended(
        self: Any,
        x: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        is_causal: bool,
        **settings: Any,
    ) -> Tensor:
        """Attend with heads ``[batch, heads, length, dim]``, norm and gate the result."""
        p = self.attn_drop.p if self.training else 0.0
        attended = functional.scaled_dot_product_attention(q, k, v, mask, p, is_causal, **settings)
        joined: Tensor = self.norm(attended.transpose(1, 2).flatten(2))
        if getattr(self, "gate", None) is not None:  # not in every version
            joined = joined * self.gate(x).sigmoid()
        return joined


class Attention(Attending):
    """Self-attention on query, key and value as the projection left them, in place."""

    def forward(
        self: Any, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Compute what the class behind this one computes."""
        if not self.is_fused():
            given = {"is_causal": True} if is_causal else {}  # not in every version
            own: Tensor = super().forward(x, attn_mask, **given)  # type: ignore[misc]
            return own
        output: Tensor = self.proj_drop(self.proj(self.joined(x, attn_mask, is_causal)))
        return output

    def joined(
        self: Any, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Compute the heads side by side ``[batch, length, heads * dim]``, as ``proj`` reads it."""
        heads = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim))
        q, k, v = heads.permute(2, 0, 3, 1, 4).unbind(0)
        joined: Tensor = self._attended(
            x, self.q_norm(q), self.k_norm(k), v, attn_mask, is_causal, scale=self.scale
        )
        return joined


class RotaryAttention(Attending):
    """EVA's, and that of ViTs with rotary positions: heads are normed and turned in one step."""

    def forward(
        self: Any,
        x: Tensor,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Compute what the class behind this one computes."""
        if not self.is_fused() or not self.takes({"rope": rope}):
            given = {"is_causal": True} if is_causal else {}  # not in every version
            own: Tensor = super().forward(x, rope, attn_mask, **given)  # type: ignore[misc]
            return own
        output: Tensor = self.proj_drop(self.proj(self.joined(x, rope, attn_mask, is_causal)))
        return output

    def takes(self, given: dict[str, Any]) -> bool:
        """Return whether angles are given as one table for all heads, which nobody learns."""
        rope = given.get("rope")
        if rope is None:
            return True
        of_all_heads = rope.dim() == 2 or (rope.dim() == 4 and rope.shape[1] == 1)
        return of_all_heads and not rope.requires_grad

    def joined(
        self: Any,
        x: Tensor,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Compute the heads side by side ``[batch, length, heads * dim]``, as ``proj`` reads it.

        ``rope`` is sines and then cosines ``[patches, 2 * dim]``, or as many for each image
        ``[batch, 1, patches, 2 * dim]``.
        """
        q, k, v = self._heads(x)
        if rope is None:
            q, k = self.q_norm(q), self.k_norm(k)
        else:
            q, k = self._turned(q, k, rope)
        settings = {"enable_gqa": True} if k.shape[1] != q.shape[1] else {}
        joined: Tensor = self._attended(x, q, k, v, attn_mask, is_causal, **settings)
        return joined

    def _heads(self: Any, x: Tensor) -> tuple[Tensor, ...]:
        """Compute query, key and value ``[batch, heads, length, dim]``."""
        if self.qkv is None:
            products = self.q_proj(x), self.k_proj(x), self.v_proj(x)
            return tuple(one.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for one in products)
        if getattr(self, "q_bias", None) is None:
            product = self.qkv(x)
        else:
            bias = torch.cat((self.q_bias, self.k_bias, self.v_bias))
            if self.qkv_bias_separate:
                product = self.qkv(x) + bias
            else:
                product = F.linear(x, self.qkv.weight, bias)
        heads: Tensor = product.unflatten(-1, (3, self.num_heads, self.head_dim))
        return heads.permute(2, 0, 3, 1, 4).unbind(0)

    def _turned(self: Any, q: Tensor, k: Tensor, rope: Tensor) -> tuple[Tensor, Tensor]:
        """Norm heads and turn them by the angles of their patches; tokens in front have none."""
        of_halves = getattr(self, "rotate_half", False)
        sin, cos = (rope if rope.dim() == 2 else rope.squeeze(1)).chunk(2, -1)
        half = cos.shape[-1] // 2  # the tables have each angle twice
        sin, cos = (one[..., :half] if of_halves else one[..., ::2] for one in (sin, cos))
        before = (0, 0, q.shape[2] - cos.shape[-2], 0)
        sin, cos = F.pad(sin, before), F.pad(cos, before, value=1.0)
        settings = _norms_of_heads(self.q_norm, self.k_norm)
        if not settings:
            q, k = self.q_norm(q), self.k_norm(k)
        return functional.rotary_embedding(q, k, cos, sin, interleaved=not of_halves, **settings)


def _norms_of_heads(query_norm: Any, key_norm: Any) -> dict[str, Any]:
    """Return the norms as settings of the rotation; empty where these are no LayerNorms alike."""
    plain = all(is_plain(one, LayerNorm, nn.LayerNorm) for one in (query_norm, key_norm))
    if not plain or query_norm.eps != key_norm.eps:
        return {}
    return {
        "norm": "layer", "eps": query_norm.eps,
        "query_weight": query_norm.weight, "query_bias": query_norm.bias,
        "key_weight": key_norm.weight, "key_bias": key_norm.bias,
    }  # fmt: skip


class LayerNorm(nn.LayerNorm):
    """timm's, but for its fast form."""


class CastingLayerNorm(nn.LayerNorm):
    """open_clip's two, whose results have the dtype of what they are given."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalize ``[*, *normalized_shape]``; under autocast too in the dtype of ``input``."""
        return super().forward(input).to(input.dtype)


def _refuses_attention(module: Any) -> str:
    return "" if module.fused_attn else "its fused_attn is off, which keeps the weights"


def _refuses_norm(module: Any) -> str:
    fast = getattr(module, "_fast_norm", False)
    return "timm's fast norm is on, which computes under autocast in its dtype" if fast else ""


introduce([Attention, RotaryAttention])  # norms are registered as subclasses

# The replacement of each class, and functions that say why one must not be replaced.
TIMM: dict[str, type[Any]] = {
    "timm.layers.attention.Attention": Attention,
    "timm.layers.attention.AttentionRope": RotaryAttention,
    "timm.models.eva.EvaAttention": RotaryAttention,
    "timm.layers.norm.LayerNorm": LayerNorm,
    "open_clip.transformer.LayerNorm": CastingLayerNorm,
    "open_clip.transformer.LayerNormFp32": CastingLayerNorm,
}  # fmt: skip
REFUSES: dict[type[Any], Callable[[Any], str]] = {
    Attention: _refuses_attention, RotaryAttention: _refuses_attention, LayerNorm: _refuses_norm,
}  # fmt: skip
