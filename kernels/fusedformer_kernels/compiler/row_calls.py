"""Call the launchers of rows, and of all that is not attention, as the compile cases ask."""

from __future__ import annotations

import torch

from fusedformer_kernels.compiler.tensors import empty, empty_seed
from fusedformer_kernels.rows import contrastive
from fusedformer_kernels.rows.activation import bias_activation_backward, bias_activation_forward
from fusedformer_kernels.rows.cross_entropy import (
    STATE,
    cross_entropy_gradient,
    cross_entropy_rows,
    padded_rows,
)
from fusedformer_kernels.rows.embedding import Tables, embedding_backward, embedding_forward
from fusedformer_kernels.rows.gated import gated_activation_backward, gated_activation_forward
from fusedformer_kernels.rows.norm import norm_forward
from fusedformer_kernels.rows.norm_backward import norm_backward
from fusedformer_kernels.rows.packing import token_counts, token_places
from fusedformer_kernels.rows.rotary import rotary_backward, rotary_forward
from fusedformer_kernels.rows.scaled_sum import scaled_sum_backward, scaled_sum_forward
from fusedformer_kernels.rows.softmax import softmax_backward, softmax_forward


def softmax(columns: int, dtype: torch.dtype, mask: torch.Tensor | None, **flags: bool) -> None:
    x = empty(64, columns, dtype=dtype)
    causal, log = flags.get("causal", False), flags.get("log", False)
    softmax_forward(x, None if mask is None else mask.expand(64, columns), 1.0, causal, dtype, log)
    softmax_backward(x, x, 1.0, dtype, log, causal or mask is not None)


def norm(
    columns: int, dtype: torch.dtype, kind: str, fused: bool, p: float = 0.0, *,
    mixed: bool = False, inference: bool = False,
) -> None:
    """Call forward and backward.

    ``mixed``: the residual is float32, as under autocast; ``inference``: nothing is kept.
    """
    x = empty(4096, columns, dtype=dtype)
    z = empty(4096, columns, dtype=torch.float32) if mixed else x
    parameter = empty(columns, dtype=z.dtype)
    residual, input_bias = (z, parameter) if fused else (None, None)
    weight = None if kind == "none" else parameter
    bias = parameter if kind == "layer" else None
    seed = empty_seed() if p else None
    kept = not inference
    norm_forward(x, residual, input_bias, weight, bias, seed, p, 1e-5, kind, 1, kept, kept)
    if inference:
        return
    statistics = empty(4096, dtype=torch.float32)
    norm_backward(
        None if kind == "none" else z, z if fused else None, z, statistics, statistics, weight,
        seed, p, kind, 1, weight is not None, bias is not None, fused, dtype, parameter.dtype,
    )


def embedding(columns: int, dtype: torch.dtype, p: float) -> None:
    ids, parameter = empty(4096, dtype=torch.int64), empty(columns, dtype=dtype)
    sizes = 30522, 512, 2
    tables = Tables(*(t for n in sizes for t in (ids, empty(n, columns, dtype=dtype))))
    seed = empty_seed() if p else None
    y, mean, rstd = embedding_forward(tables, parameter, parameter, seed, p, 1e-5)
    embedding_backward(y, tables, mean, rstd, parameter, seed, p, True, True, True, dtype)


def cross_entropy(columns: int, dtype: torch.dtype, smoothing: float = 0.0) -> None:
    """Call both on given logits; with smoothing, also with class weights, by blocks of classes."""
    x, target = empty(4096, columns, dtype=dtype), empty(4096, dtype=torch.int64)
    weight = empty(columns, dtype=torch.float32) if smoothing else None
    total = empty(dtype=torch.float32) if smoothing else None
    statistics, grad = empty(2, 4096, dtype=torch.float32), empty(4096, dtype=torch.float32)
    given = target, weight, total
    if smoothing:
        state, half = empty(STATE, 4096, dtype=torch.float32), columns // 2
        for first, last in ((0, half), (half, columns)):
            block = x[:, first:last]
            cross_entropy_rows(
                block, *given, -100, smoothing, first_class=first, n_classes=columns, state=state
            )
    else:
        cross_entropy_rows(x, *given, -100, smoothing)
    cross_entropy_gradient(
        x, *given, statistics, grad, -100, smoothing, first_class=0, n_classes=columns
    )


def cross_entropy_in_place(columns: int, dtype: torch.dtype) -> None:
    """Call it as linear_cross_entropy does: in memory with aligned rows, one factor for all."""
    x, target = padded_rows(2048, columns, empty(1, dtype=dtype)), empty(2048, dtype=torch.int64)
    factor, statistics = empty(dtype=torch.float32), empty(2, 2048, dtype=torch.float32)
    cross_entropy_rows(x, target, None, None, -100, 0.0, factor, padded=True)
    cross_entropy_gradient(
        x, target, None, None, statistics, factor, -100, 0.0, first_class=columns,
        n_classes=2 * columns, in_place=True,
    )


def activation(columns: int, dtype: torch.dtype, activation: str, p: float = 0.0) -> None:
    x, bias = empty(4096, columns, dtype=dtype), empty(columns, dtype=dtype)
    seed = empty_seed() if p else None
    bias_activation_forward(x, bias, seed, p, activation)
    bias_activation_backward(x, x, bias, seed, p, activation, True)


def scaled_sum(columns: int, dtype: torch.dtype, p: float, scaled: bool) -> None:
    """Call both, with LayerScale or without, of samples some of which may be dropped."""
    x, parameter = empty(64, 197, columns, dtype=dtype), empty(columns, dtype=dtype)
    scale = parameter if scaled else None
    given = scale, empty(64, dtype=dtype), parameter, empty_seed() if p else None, p
    scaled_sum_forward(x, x, *given)
    scaled_sum_backward(x, x if scaled else None, *given, scaled, True, dtype, dtype)


def gated(columns: int, dtype: torch.dtype, activation: str, p: float, second: bool) -> None:
    x, dy = empty(4096, 2 * columns, dtype=dtype), empty(4096, columns, dtype=dtype)
    bias, seed = empty(2 * columns, dtype=dtype), empty_seed() if p else None
    gated_activation_forward(x, bias, seed, p, activation, second)
    gated_activation_backward(dy, x, bias, seed, p, activation, second, True)


def rotary_in_place(dim: int, dtype: torch.dtype) -> None:
    query, key, _ = empty(4, 2048, 3, 16, dim, dtype=dtype).unbind(2)
    cos, sin = (empty(2048, dim // 2, dtype=dtype)[None] for _ in range(2))
    rest = cos, sin, None, (None,) * 4, "none", 0.0, False
    rotary_forward(query, key, *rest, True)
    rotary_backward(query, key, query, key, *rest, False, True)


def rotary(dim: int, dtype: torch.dtype, norm: str, interleaved: bool) -> None:
    qkv = empty(4, 2048, 3, 16, dim, dtype=dtype)
    query, key, _ = qkv.unbind(2)
    cos, sin = (empty(2048, dim // 2, dtype=torch.float32)[None] for _ in range(2))
    weights = tuple(empty(dim, dtype=dtype) if norm != "none" else None for _ in range(4))
    if norm == "rms":
        weights = weights[0], None, weights[2], None
    tables = cos, sin, empty(4, 2048, dtype=torch.int64)
    grads = rotary_forward(query, key, *tables, weights, norm, 1e-6, interleaved)
    rotary_backward(*grads, query, key, *tables, weights, norm, 1e-6, interleaved, True)


def places(mask: torch.Tensor, tail: bool) -> None:
    counts = token_counts(mask, tail)
    token_places(mask, counts, mask.numel(), tail, tail)


def contrastive_loss(rows: int, dtype: torch.dtype, *, sigmoid: bool = False) -> None:
    """Call the forward, in two strips where there are ``rows``, and the backward in one."""
    scale = empty(dtype=torch.float32)
    grads: list[torch.Tensor | None]
    lse: list[torch.Tensor | None]

    def vector(x: torch.Tensor) -> torch.Tensor:
        return empty(x.shape[0], dtype=torch.float32)

    x = empty(rows, 512, dtype=dtype)
    strip = x[: contrastive.BACKWARD_ROWS]
    if sigmoid:
        contrastive.softplus_sums(strip, x, scale, scale, 0)
        grads, lse = [vector(strip), None, None], [None, None]
    else:
        contrastive.row_and_column_lse(x, x, scale, 0)
        grads = [vector(strip), vector(x), vector(strip)]
        lse = [vector(strip), vector(x)]
    bias = scale if sigmoid else None
    for _ in contrastive.score_gradients(strip, x, scale, bias, 0, grads, lse, bias):
        pass
