"""Attention and norm in place of timm's, whose classes are not torch's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn import Dropout

from fusedformer import functional, nn
from fusedformer.nn.children import is_plain
from fusedformer.nn.tracers import introduce


class Attention:
    """Self-attention on query, key and value as the projection left them, in place."""

    def forward(
        self: Any, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Compute what the class behind this one computes."""
        if not self.fused_attn or not is_plain(self.attn_drop, Dropout):  # then weights are wanted
            given = {"is_causal": True} if is_causal else {}  # not in every version
            own: Tensor = super().forward(x, attn_mask, **given)  # type: ignore[misc]
            return own
        heads = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim))
        q, k, v = heads.permute(2, 0, 3, 1, 4).unbind(0)
        p = self.attn_drop.p if self.training else 0.0
        attended: Tensor = functional.scaled_dot_product_attention(
            self.q_norm(q), self.k_norm(k), v, attn_mask, p, is_causal, scale=self.scale
        )
        joined = self.norm(attended.transpose(1, 2).flatten(2))
        if getattr(self, "gate", None) is not None:  # not in every version
            joined = joined * self.gate(x).sigmoid()
        output: Tensor = self.proj_drop(self.proj(joined))
        return output


class LayerNorm(nn.LayerNorm):
    """timm's, but for its fast form."""


def _refuses_attention(module: Any) -> str:
    return "" if module.fused_attn else "its fused_attn is off, which keeps the weights"


def _refuses_norm(module: Any) -> str:
    fast = getattr(module, "_fast_norm", False)
    return "timm's fast norm is on, which computes under autocast in its dtype" if fast else ""


introduce([Attention])  # LayerNorm is registered as a subclass

# The replacement of each class of timm, and functions that say why one must not be replaced.
TIMM: dict[str, type[Any]] = {
    "timm.layers.attention.Attention": Attention, "timm.layers.norm.LayerNorm": LayerNorm,
}  # fmt: skip
REFUSES: dict[type[Any], Callable[[Any], str]] = {
    Attention: _refuses_attention, LayerNorm: _refuses_norm,
}  # fmt: skip
