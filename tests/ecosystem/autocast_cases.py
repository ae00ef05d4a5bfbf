"""Functions beside what torch makes of what they replace, for tests of autocast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as TF
from torch import Tensor

from fusedformer import functional as F
from fusedformer._internal.autocast import Op

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
N, S, D, H = 2, 5, 16, 2
WIDENED: tuple[Op, ...] = ("layer_norm", "rms_norm", "softmax", "log_softmax")


# Each function of this library, and what torch makes of what it replaces.


class Given:
    """Tensors of a dtype on a device."""

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.wide = F64 if dtype == F64 else F32  # of parameters
        self.x, self.q = self(N, S, D), self(N, H, S, D)
        self.weight = self(D, dtype=self.wide)

    def __call__(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.ones(shape, dtype=dtype or self.dtype, device=self.device)

    def ids(self) -> Tensor:
        return torch.zeros(N, S, dtype=torch.int64, device=self.device)

    def starts(self) -> Tensor:
        return torch.tensor([0, S], dtype=torch.int32).to(self.device)


def dropped_and_added(g: Given, residual: Tensor) -> Tensor:
    return TF.dropout(g.x, 0.0) + residual


def gated(x: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return TF.silu(a) * b


def packed_attention(g: Given, key: Tensor) -> Tensor:
    other, starts = g(S, 1, D), g.starts()
    return F.varlen_attention(other, key, other, starts, starts, S, S)


Pair = tuple[Callable[[Given], Any], Callable[[Given], Any]]
FUNCTIONS: dict[str, Pair] = {
    "layer_norm": (
        lambda g: F.layer_norm(g.x, (D,), g.weight, g.weight),
        lambda g: TF.layer_norm(g.x, (D,), g.weight, g.weight),
    ),
    "layer_norm, no parameters": (
        lambda g: F.layer_norm(g.x, (D,)), lambda g: TF.layer_norm(g.x, (D,)),
    ),
    "rms_norm": (
        lambda g: F.rms_norm(g.x, (D,), g.weight), lambda g: TF.rms_norm(g.x, (D,), g.weight),
    ),
    "softmax": (lambda g: F.softmax(g.x, -1), lambda g: TF.softmax(g.x, -1)),
    "softmax, masked": (
        lambda g: F.softmax(g.x, -1, mask=g.x > 0, scale=0.5), lambda g: TF.softmax(g.x, -1),
    ),
    "log_softmax": (lambda g: F.log_softmax(g.x, -1), lambda g: TF.log_softmax(g.x, -1)),
    "softmax to bfloat16": (
        lambda g: F.softmax(g.x, -1, dtype=BF16), lambda g: TF.softmax(g.x, -1, dtype=BF16),
    ),
    "log_softmax to float32": (
        lambda g: F.log_softmax(g.x, -1, dtype=F32), lambda g: TF.log_softmax(g.x, -1, dtype=F32),
    ),
    "norm of a sum": (
        lambda g: F.dropout_add_layer_norm(g.x, g.x, (D,), g.weight, return_sum=True),
        lambda g: (TF.layer_norm(dropped_and_added(g, g.x), (D,), g.weight), g.x + g.x),
    ),
    "norm of a sum, wide residual": (
        lambda g: F.dropout_add_layer_norm(
            g.x, g(N, S, D, dtype=g.wide), (D,), g.weight, return_sum=True
        ),
        lambda g: (
            TF.layer_norm(dropped_and_added(g, g(N, S, D, dtype=g.wide)), (D,), g.weight),
            g.x + g(N, S, D, dtype=g.wide),
        ),
    ),
    "rms norm of a sum": (
        lambda g: F.dropout_add_rms_norm(g.x, g.x, (D,), g.weight, return_sum=True),
        lambda g: (TF.rms_norm(dropped_and_added(g, g.x), (D,), g.weight), g.x + g.x),
    ),
    "dropout_add": (
        lambda g: F.dropout_add(g.x, g(N, S, D, dtype=g.wide)),
        lambda g: dropped_and_added(g, g(N, S, D, dtype=g.wide)),
    ),
    "dropout_scale_add": (
        lambda g: F.dropout_scale_add(g.x, g(N, S, D, dtype=g.wide), g.weight),
        lambda g: g.x * g.weight + g(N, S, D, dtype=g.wide),
    ),
    "gated_activation": (
        lambda g: F.gated_activation(g.x, g.weight, "silu"),
        lambda g: gated(g.x + g.weight.to(g.dtype)),
    ),
    "bias_activation": (
        lambda g: F.bias_activation(g.x, g.weight, "gelu"),
        lambda g: TF.gelu(g.x + g.weight.to(g.dtype)),  # a product has a bias of its dtype
    ),
    "embedding_layer_norm": (
        lambda g: F.embedding_layer_norm(g.ids(), g(3, D), g.weight, g.weight),
        lambda g: TF.layer_norm(TF.embedding(g.ids(), g(3, D)), (D,), g.weight, g.weight),
    ),
    "cross_entropy": (
        lambda g: F.cross_entropy(g.x.flatten(0, 1), g.ids().flatten(), label_smoothing=0.1),
        lambda g: TF.cross_entropy(g.x.flatten(0, 1), g.ids().flatten(), label_smoothing=0.1),
    ),
    "linear_cross_entropy": (
        lambda g: F.linear_cross_entropy(g.x, g(7, D), g.ids(), reduction="none"),
        lambda g: TF.cross_entropy(
            TF.linear(g.x, g(7, D)).flatten(0, 1), g.ids().flatten(), reduction="none"
        ),
    ),
    "attention": (
        lambda g: F.scaled_dot_product_attention(g.q, g.q, g.q),
        lambda g: TF.scaled_dot_product_attention(g.q, g.q, g.q),
    ),
    "attention, mask": (
        lambda g: F.scaled_dot_product_attention(g.q, g.q, g.q, g(1, 1, S, S)),
        lambda g: TF.scaled_dot_product_attention(g.q, g.q, g.q, g(S, S)),
    ),
    "attention, weights": (
        lambda g: F.scaled_dot_product_attention(g.q, g.q, g.q, return_weights="averaged"),
        lambda g: (
            TF.scaled_dot_product_attention(g.q, g.q, g.q),
            TF.softmax(g.q @ g.q.transpose(-2, -1), -1),
        ),
    ),
    "attention, packed": (
        lambda g: packed_attention(g, g(S, 1, D)),
        lambda g: TF.scaled_dot_product_attention(g.q, g.q, g.q),
    ),
    "attention, mixed": (
        lambda g: F.scaled_dot_product_attention(g.q, g(N, H, S, D, dtype=g.wide), g.q),
        lambda g: TF.scaled_dot_product_attention(g.q, g(N, H, S, D, dtype=g.wide), g.q),
    ),
    "attention, mixed, packed": (
        lambda g: packed_attention(g, g(S, 1, D, dtype=g.wide)),
        lambda g: TF.scaled_dot_product_attention(g.q, g(N, H, S, D, dtype=g.wide), g.q),
    ),
}  # fmt: skip


# Inputs whose values are judged: candidate, stock, and what makes the inputs.


def leaf(*shape: int, dtype: torch.dtype = F32) -> Tensor:
    return torch.randn(shape).to(dtype).requires_grad_()


def summed_layer_norm(input: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Any:
    total = input + residual
    return TF.layer_norm(total, (D,), weight, bias), total


def summed_rms_norm(input: Tensor, residual: Tensor, weight: Tensor) -> Any:
    total = input + residual
    return TF.rms_norm(total, (D,), weight), total


def weights_of(query: Tensor, key: Tensor) -> Tensor:
    return TF.softmax((query * D**-0.5) @ key.transpose(-2, -1), -1)


def embedded(input: Tensor, weight: Tensor, norm_weight: Tensor, norm_bias: Tensor) -> Tensor:
    return TF.layer_norm(TF.embedding(input, weight), (D,), norm_weight, norm_bias)


VALUES: dict[str, tuple[Any, Any, Callable[[], dict[str, Any]]]] = {
    "layer_norm": (
        lambda **k: F.layer_norm(normalized_shape=(D,), **k),
        lambda **k: TF.layer_norm(normalized_shape=(D,), **k),
        lambda: dict(input=leaf(3, D, dtype=BF16), weight=leaf(D), bias=leaf(D)),
    ),
    "rms_norm": (
        lambda **k: F.rms_norm(normalized_shape=(D,), **k),
        lambda **k: TF.rms_norm(normalized_shape=(D,), **k),
        lambda: dict(input=leaf(3, D, dtype=BF16), weight=leaf(D)),
    ),
    "softmax": (
        lambda input: F.softmax(input, 0), lambda input: TF.softmax(input, 0),
        lambda: dict(input=leaf(5, 7, dtype=BF16)),
    ),
    "log_softmax": (
        lambda input: F.log_softmax(input, -1), lambda input: TF.log_softmax(input, -1),
        lambda: dict(input=leaf(5, 7, dtype=BF16)),
    ),
    "float32 residual": (
        lambda **k: F.dropout_add_layer_norm(normalized_shape=(D,), return_sum=True, **k),
        summed_layer_norm,
        lambda: dict(
            input=leaf(3, D, dtype=BF16), residual=leaf(3, D), weight=leaf(D), bias=leaf(D)
        ),
    ),
    "bfloat16 residual": (
        lambda **k: F.dropout_add_layer_norm(normalized_shape=(D,), return_sum=True, **k),
        summed_layer_norm,
        lambda: dict(
            input=leaf(3, D, dtype=BF16), residual=leaf(3, D, dtype=BF16), weight=leaf(D),
            bias=leaf(D),
        ),
    ),
    "narrow residual": (
        lambda **k: F.dropout_add_rms_norm(normalized_shape=(D,), return_sum=True, **k),
        summed_rms_norm,
        lambda: dict(input=leaf(3, D), residual=leaf(3, D, dtype=BF16), weight=leaf(D)),
    ),
    "two halves": (
        lambda **k: F.dropout_add_rms_norm(normalized_shape=(D,), return_sum=True, **k),
        summed_rms_norm,
        lambda: dict(
            input=leaf(3, D, dtype=BF16), residual=leaf(3, D, dtype=F16), weight=leaf(D)
        ),
    ),
    "embedding": (
        F.embedding_layer_norm, embedded,
        lambda: dict(
            input=torch.tensor([2, 0, 1]), weight=leaf(4, D, dtype=BF16), norm_weight=leaf(D),
            norm_bias=leaf(D),
        ),
    ),
    "attention, mixed": (
        F.scaled_dot_product_attention, TF.scaled_dot_product_attention,
        lambda: dict(
            query=leaf(1, H, 4, D), key=leaf(1, H, S, D, dtype=BF16),
            value=leaf(1, H, S, D, dtype=F16), attn_mask=leaf(4, S),
        ),
    ),
    "weights of attention": (
        lambda query, key: F.scaled_dot_product_attention(
            query, key, key, return_weights="per_head"
        )[1],
        weights_of,
        lambda: dict(query=leaf(1, H, 4, D, dtype=BF16), key=leaf(1, H, S, D, dtype=BF16)),
    ),
}  # fmt: skip
WITHOUT: dict[str, tuple[Any, Any, Callable[[], dict[str, Any]]]] = {
    **{name: VALUES[name] for name in ("layer_norm", "rms_norm", "bfloat16 residual")},
    "bias_activation": (
        F.bias_activation, lambda input, bias: TF.gelu(input + bias.to(input.dtype)),
        lambda: dict(input=leaf(3, D, dtype=BF16), bias=leaf(D)),
    ),
    "embedding": VALUES["embedding"],
}  # fmt: skip
