"""``torch.nn.TransformerEncoderLayer`` on the fused kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from fusedformer import functional
from fusedformer.nn._masks import Names, check_sequence
from fusedformer.nn._modules import adopt, fused_activation, is_plain, product
from fusedformer.nn.layer_norm import LayerNorm
from fusedformer.nn.multihead_attention import MultiheadAttention, check_heads

_NAMES = Names(
    "TransformerEncoderLayer", "src", "src", "src", "src_mask", "src_key_padding_mask"
)


class TransformerEncoderLayer(torch.nn.TransformerEncoderLayer):
    """Self-attention and feed-forward, each with dropout, residual and norm around it.

    A drop-in for :class:`torch.nn.TransformerEncoderLayer`: constructor, parameters,
    initialization and arguments are its own. One layer is the products of torch, and four fused
    steps between them: attention on the interleaved projection; bias + dropout + residual + norm;
    bias + activation + dropout; and again bias + dropout + residual (+ norm).

    A child that was replaced by another type, or that carries hooks, and a subclass that defines
    ``_sa_block`` or ``_ff_block``, are called as torch would call them; the layer is then a
    composition of its modules.

    Args:
        d_model: width ``E``.
        nhead: number of attention heads; divides ``d_model``.
        dim_feedforward: width of the feed-forward block.
        dropout: probability of all four dropouts (attention weights, ``dropout``, ``dropout1``,
            ``dropout2``), in [0, 1].
        activation: ``"relu"``, ``"gelu"`` or a callable. ReLU, GELU (both forms) and SiLU, as
            function or module, are fused; any other callable is applied as it is.
        layer_norm_eps: of both norms.
        batch_first: input is ``[batch, length, width]`` rather than ``[length, batch, width]``.
        norm_first: norms before attention and feed-forward (pre-norm) rather than after.
        bias: whether the products and norms have biases.
        device, dtype: of the parameters.

    Raises:
        ValueError: ``nhead`` does not divide ``d_model``; unknown name of an activation;
            ``dropout`` outside [0, 1].
        TypeError: ``activation`` is neither a name nor callable.

    Source: Vaswani et al., arXiv:1706.03762; pre-norm: Xiong et al., arXiv:2002.04745.
    """

    self_attn: nn.MultiheadAttention

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        function = "TransformerEncoderLayer"
        check_heads(function, "d_model", d_model, "nhead", nhead)
        if isinstance(activation, str) and activation not in ("relu", "gelu"):
            raise ValueError(
                f"{function}(): expected 'activation' to be 'relu', 'gelu' or a callable, "
                f"but got {activation!r}"
            )
        if not isinstance(activation, str) and not callable(activation):
            raise TypeError(
                f"{function}(): expected 'activation' to be 'relu', 'gelu' or a callable, "
                f"but got {type(activation).__name__}"
            )
        super().__init__(
            d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first,
            norm_first, bias, device, dtype,
        )
        self.self_attn = adopt(self.self_attn, MultiheadAttention)
        self.norm1 = adopt(self.norm1, LayerNorm)
        self.norm2 = adopt(self.norm2, LayerNorm)

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Pass ``src`` through the layer.

        Args:
            src: ``[N, S, E]`` with ``batch_first``, else ``[S, N, E]``; unbatched ``[S, E]``.
            src_mask: ``[S, S]`` or ``[N * nhead, S, S]``; True = masked, or floating-point and
                added to the scores.
            src_key_padding_mask: ``[N, S]`` (unbatched ``[S]``); True = masked, or added.
            is_causal: a hint that ``src_mask``, which must be given, is the causal mask; it is
                then not read.

        Returns:
            Tensor of the shape and dtype of ``src``. Positions that ``src_key_padding_mask``
            masks are no keys, but are computed like any others.

        Raises:
            TypeError, ValueError: as :class:`MultiheadAttention`.
        """
        attention = self.self_attn
        if not isinstance(attention, MultiheadAttention) or not self._children_are_plain():
            return self._compose(src, src_mask, src_key_padding_mask, is_causal)
        weight = attention.out_proj.weight
        check_sequence("TransformerEncoderLayer", "src", src, attention.embed_dim, weight)
        x = self.norm1(src) if self.norm_first else src
        heads, _ = attention._attend(
            x, x, x, src_key_padding_mask, src_mask, is_causal, False, names=_NAMES
        )
        return self._after_attention(src, heads)

    def _forward_packed(self, src: Tensor, packing: functional.Packing, is_causal: bool) -> Tensor:
        """The same for packed rows ``[total, E]``, if :meth:`_can_pack`."""
        attention = self.self_attn
        assert isinstance(attention, MultiheadAttention)
        x = self.norm1(src) if self.norm_first else src
        heads = attention._attend_packed(x, packing, is_causal)
        return self._after_attention(src, heads)

    def _can_pack(self) -> bool:
        """Whether rows by themselves are all that this layer looks at besides attention."""
        attention = self.self_attn
        return (
            is_plain(self, TransformerEncoderLayer)
            and isinstance(attention, MultiheadAttention)
            and attention._can_pack()
            and self._children_are_plain()
        )

    def _after_attention(self, src: Tensor, heads: Tensor) -> Tensor:
        """All that follows the merged heads, row by row."""
        projected, bias = product(heads, self.self_attn.out_proj)
        if self.norm_first:
            normed, total = _add_norm_and_sum(projected, bias, self.dropout1, src, self.norm2)
            return _add(*self._feed_forward(normed), self.dropout2, total)
        x = _add_norm(projected, bias, self.dropout1, src, self.norm1)
        return _add_norm(*self._feed_forward(x), self.dropout2, x, self.norm2)

    def _feed_forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The feed-forward block without its last bias and dropout, and that bias."""
        name = fused_activation(self.activation)
        if name is None:
            hidden = self.dropout(self.activation(self.linear1(x)))
        else:
            hidden = functional.bias_activation(
                *product(x, self.linear1), name, p=self.dropout.p, training=self.dropout.training
            )
        return product(hidden, self.linear2)

    def _compose(
        self,
        x: Tensor,
        src_mask: Tensor | None,
        src_key_padding_mask: Tensor | None,
        is_causal: bool,
    ) -> Tensor:
        """The layer as calls of its modules."""
        masks = src_mask, src_key_padding_mask, is_causal
        if self.norm_first:
            x = x + self._sa_block(self.norm1(x), *masks)
            x = x + self._ff_block(self.norm2(x))
        else:
            x = self.norm1(x + self._sa_block(x, *masks))
            x = self.norm2(x + self._ff_block(x))
        return x

    def _children_are_plain(self) -> bool:
        """Whether the fused steps do exactly what calling the children would do."""
        stock, norms = torch.nn.TransformerEncoderLayer, (self.norm1, self.norm2)
        return (
            type(self)._sa_block is stock._sa_block
            and type(self)._ff_block is stock._ff_block
            and is_plain(self.self_attn, MultiheadAttention)
            and is_plain(self.self_attn.out_proj, nn.Linear, NonDynamicallyQuantizableLinear)
            and all(is_plain(linear, nn.Linear) for linear in (self.linear1, self.linear2))
            and all(is_plain(norm, LayerNorm, nn.LayerNorm) for norm in norms)
            and all(len(norm.normalized_shape) == 1 for norm in norms)
            and all(
                is_plain(dropout, nn.Dropout)
                for dropout in (self.dropout, self.dropout1, self.dropout2)
            )
        )


def _add(x: Tensor, bias: Tensor | None, dropout: nn.Dropout, residual: Tensor) -> Tensor:
    """``dropout(x + bias) + residual``."""
    x, residual = _promoted(x, residual)
    return functional.dropout_add(
        x, residual, input_bias=bias, p=dropout.p, training=dropout.training
    )


def _add_norm(
    x: Tensor, bias: Tensor | None, dropout: nn.Dropout, residual: Tensor, norm: nn.LayerNorm
) -> Tensor:
    """The norm of :func:`_add`."""
    x, residual = _promoted(x, residual)
    return functional.dropout_add_layer_norm(
        x, residual, norm.normalized_shape, norm.weight, norm.bias, norm.eps, input_bias=bias,
        p=dropout.p, training=dropout.training,
    )


def _add_norm_and_sum(
    x: Tensor, bias: Tensor | None, dropout: nn.Dropout, residual: Tensor, norm: nn.LayerNorm
) -> tuple[Tensor, Tensor]:
    """The norm of :func:`_add`, and :func:`_add`."""
    x, residual = _promoted(x, residual)
    return functional.dropout_add_layer_norm(
        x, residual, norm.normalized_shape, norm.weight, norm.bias, norm.eps, input_bias=bias,
        p=dropout.p, training=dropout.training, return_sum=True,
    )


def _promoted(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """Both in one dtype: under autocast a product is narrower than the residual stream."""
    dtype = torch.promote_types(x.dtype, residual.dtype)
    return x.to(dtype), residual.to(dtype)
