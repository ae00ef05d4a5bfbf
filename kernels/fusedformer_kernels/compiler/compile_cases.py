"""Call every launcher on tensors without memory, in all variants that ship.

The compile report records the launches that each call makes and compiles those, so what it reads
is what runs: the same kernel, config and specialization.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from fusedformer_kernels.attention import configs
from fusedformer_kernels.attention.arguments import attention_arguments
from fusedformer_kernels.attention.backward import attention_backward
from fusedformer_kernels.attention.disentangled import disentangled_backward
from fusedformer_kernels.attention.forward import attention_forward
from fusedformer_kernels.attention.merge import merge_states, merge_states_backward
from fusedformer_kernels.attention.terms import AttentionTerms, PositionTerms
from fusedformer_kernels.attention.weights import attention_weights, attention_weights_backward
from fusedformer_kernels.rows import contrastive
from fusedformer_kernels.rows.activation import (
    ACTIVATIONS,
    bias_activation_backward,
    bias_activation_forward,
)
from fusedformer_kernels.rows.cross_entropy import (
    STATE,
    cross_entropy_gradient,
    cross_entropy_rows,
    padded_rows,
)
from fusedformer_kernels.rows.dropout import dropout_mask
from fusedformer_kernels.rows.embedding import Tables, embedding_backward, embedding_forward
from fusedformer_kernels.rows.gated import gated_activation_backward, gated_activation_forward
from fusedformer_kernels.rows.gather import gather_rows
from fusedformer_kernels.rows.norm import norm_forward
from fusedformer_kernels.rows.norm_backward import norm_backward
from fusedformer_kernels.rows.packing import token_counts, token_places
from fusedformer_kernels.rows.rotary import rotary_backward, rotary_forward
from fusedformer_kernels.rows.scaled_sum import scaled_sum_backward, scaled_sum_forward
from fusedformer_kernels.rows.softmax import softmax_backward, softmax_forward
from fusedformer_kernels.runtime.targets import assumed_target
from fusedformer_kernels.runtime.tuned import forced

HALF = torch.bfloat16
CORE_FLOAT32 = {"softmax 1024", "layer_norm 768", "bias_gelu", "attention d=64"}
CORE = CORE_FLOAT32 | {
    "softmax 131072", "layer_norm 32768", "dropout_add_layer_norm 768", "bias_gelu dropout",
    "dropout mask", "attention d=128", "attention d=256", "attention d=64 all", "merge states",
    "pack", "pack places, tail",
    "attention d=64 boolean mask", "attention d=64 packed", "attention d=64 few queries",
    "attention d=64 averaged weights", "embedding_layer_norm 768", "cross_entropy 50257",
    "gated gelu", "scaled sum 768", "rotary 64", "rotary 128 rms norm",
    "attention d=64 sinks", "attention d=64 sinks, few queries",
    "contrastive", "sigmoid contrastive", "attention d=64 value dim 16",
    "attention d=128 value dim 32", "attention d=64 causal, one token", "attention d=128 one pass",
    "disentangled d=64 packed",
}  # fmt: skip


# Of the backward in one pass, by head dim: no shipped table has it, a user's own may.
ONE_PASS = {
    dim: {"passes": 1, "block_m": m, "block_n": 64, "num_warps": 4, "num_stages": 3}
    for dim, m in ((64, 64), (128, 32))
}


@dataclass(frozen=True)
class CompileCase:
    """A named call.

    ``matrix`` says that its kernels must reach the tensor cores. The ``core`` cases hold every
    kernel and every size class once: the test suite compiles those for all targets, and for sm_90
    all cases but the ``extra`` ones, which share config and code with others. ``forced`` ones have
    configs that no shipped table has: they launch something on sm_90 alone, past plans.
    """

    name: str
    dtype: torch.dtype
    call: Callable[[], object] = field(compare=False)
    matrix: bool = False
    products: str = "ieee"  # of float32: also "tf32" and "tf32x3"
    core: bool = False
    extra: bool = False
    forced: bool = False


def _empty(*shape: int, dtype: torch.dtype = HALF) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _seed() -> torch.Tensor:
    return _empty(1, dtype=torch.int64)


def _softmax(columns: int, dtype: torch.dtype, mask: torch.Tensor | None, **flags: bool) -> None:
    x = _empty(64, columns, dtype=dtype)
    causal, log = flags.get("causal", False), flags.get("log", False)
    softmax_forward(x, None if mask is None else mask.expand(64, columns), 1.0, causal, dtype, log)
    softmax_backward(x, x, 1.0, dtype, log, causal or mask is not None)


def _norm(
    columns: int, dtype: torch.dtype, kind: str, fused: bool, p: float = 0.0, *,
    mixed: bool = False, inference: bool = False,
) -> None:
    """Call forward and backward.

    ``mixed``: the residual is float32, as under autocast; ``inference``: nothing is kept.
    """
    x = _empty(4096, columns, dtype=dtype)
    z = _empty(4096, columns, dtype=torch.float32) if mixed else x
    parameter = _empty(columns, dtype=z.dtype)
    residual, input_bias = (z, parameter) if fused else (None, None)
    weight = None if kind == "none" else parameter
    bias = parameter if kind == "layer" else None
    seed = _seed() if p else None
    kept = not inference
    norm_forward(x, residual, input_bias, weight, bias, seed, p, 1e-5, kind, 1, kept, kept)
    if inference:
        return
    statistics = _empty(4096, dtype=torch.float32)
    norm_backward(
        None if kind == "none" else z, z if fused else None, z, statistics, statistics, weight,
        seed, p, kind, 1, weight is not None, bias is not None, fused, dtype, parameter.dtype,
    )


def _embedding(columns: int, dtype: torch.dtype, p: float) -> None:
    ids, parameter = _empty(4096, dtype=torch.int64), _empty(columns, dtype=dtype)
    sizes = 30522, 512, 2
    tables = Tables(*(t for n in sizes for t in (ids, _empty(n, columns, dtype=dtype))))
    seed = _seed() if p else None
    y, mean, rstd = embedding_forward(tables, parameter, parameter, seed, p, 1e-5)
    embedding_backward(y, tables, mean, rstd, parameter, seed, p, True, True, True, dtype)


def _cross_entropy(columns: int, dtype: torch.dtype, smoothing: float = 0.0) -> None:
    """Call both on given logits; with smoothing, also with class weights, by blocks of classes."""
    x, target = _empty(4096, columns, dtype=dtype), _empty(4096, dtype=torch.int64)
    weight = _empty(columns, dtype=torch.float32) if smoothing else None
    total = _empty(dtype=torch.float32) if smoothing else None
    statistics, grad = _empty(2, 4096, dtype=torch.float32), _empty(4096, dtype=torch.float32)
    given = target, weight, total
    if smoothing:
        state, half = _empty(STATE, 4096, dtype=torch.float32), columns // 2
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


def _cross_entropy_in_place(columns: int, dtype: torch.dtype) -> None:
    """Call it as linear_cross_entropy does: in memory with aligned rows, one factor for all."""
    x, target = padded_rows(2048, columns, _empty(1, dtype=dtype)), _empty(2048, dtype=torch.int64)
    factor, statistics = _empty(dtype=torch.float32), _empty(2, 2048, dtype=torch.float32)
    cross_entropy_rows(x, target, None, None, -100, 0.0, factor, padded=True)
    cross_entropy_gradient(
        x, target, None, None, statistics, factor, -100, 0.0, first_class=columns,
        n_classes=2 * columns, in_place=True,
    )


def _activation(columns: int, dtype: torch.dtype, activation: str, p: float = 0.0) -> None:
    x, bias = _empty(4096, columns, dtype=dtype), _empty(columns, dtype=dtype)
    seed = _seed() if p else None
    bias_activation_forward(x, bias, seed, p, activation)
    bias_activation_backward(x, x, bias, seed, p, activation, True)


def _scaled_sum(columns: int, dtype: torch.dtype, p: float, scaled: bool) -> None:
    """Call both, with LayerScale or without, of samples some of which may be dropped."""
    x, parameter = _empty(64, 197, columns, dtype=dtype), _empty(columns, dtype=dtype)
    scale = parameter if scaled else None
    given = scale, _empty(64, dtype=dtype), parameter, _seed() if p else None, p
    scaled_sum_forward(x, x, *given)
    scaled_sum_backward(x, x if scaled else None, *given, scaled, True, dtype, dtype)


def _gated(columns: int, dtype: torch.dtype, activation: str, p: float, second: bool) -> None:
    x, dy = _empty(4096, 2 * columns, dtype=dtype), _empty(4096, columns, dtype=dtype)
    bias, seed = _empty(2 * columns, dtype=dtype), _seed() if p else None
    gated_activation_forward(x, bias, seed, p, activation, second)
    gated_activation_backward(dy, x, bias, seed, p, activation, second, True)


def _rotary_in_place(dim: int, dtype: torch.dtype) -> None:
    query, key, _ = _empty(4, 2048, 3, 16, dim, dtype=dtype).unbind(2)
    cos, sin = (_empty(2048, dim // 2, dtype=dtype)[None] for _ in range(2))
    rest = cos, sin, None, (None,) * 4, "none", 0.0, False
    rotary_forward(query, key, *rest, True)
    rotary_backward(query, key, query, key, *rest, False, True)


def _rotary(dim: int, dtype: torch.dtype, norm: str, interleaved: bool) -> None:
    qkv = _empty(4, 2048, 3, 16, dim, dtype=dtype)
    query, key, _ = qkv.unbind(2)
    cos, sin = (_empty(2048, dim // 2, dtype=torch.float32)[None] for _ in range(2))
    weights = tuple(_empty(dim, dtype=dtype) if norm != "none" else None for _ in range(4))
    if norm == "rms":
        weights = weights[0], None, weights[2], None
    tables = cos, sin, _empty(4, 2048, dtype=torch.int64)
    grads = rotary_forward(query, key, *tables, weights, norm, 1e-6, interleaved)
    rotary_backward(*grads, query, key, *tables, weights, norm, 1e-6, interleaved, True)


def _attention(
    head_dim: int,
    dtype: torch.dtype,
    *,
    value_dim: int = 0,
    mask: str = "",
    key_heads: int = 16,
    queries: int = 2048,
    keys: int = 2048,
    packed: bool = False,
    weights: str = "",
    one_pass: bool = False,
    gradients: bool = True,
    gated: bool = False,
    **terms: Any,
) -> None:
    length, heads, batch = keys, 16, 4
    # [batch, length, 3, heads, dim]: views of an interleaved projection, read in place.
    dims = head_dim, head_dim, value_dim or head_dim
    sizes = (queries, heads), (length, key_heads), (length, key_heads)
    leading = 1 if packed else batch
    q, k, v = (
        _empty(leading, n, 3, h, d, dtype=dtype)[:, :, i].transpose(1, 2)
        for i, ((n, h), d) in enumerate(zip(sizes, dims, strict=True))
    )
    masks = {
        "": None,
        "boolean": _empty(batch, 1, queries, length, dtype=torch.bool),
        "additive": _empty(1, heads, queries, length, dtype=dtype),
    }
    if packed:
        starts = _empty(batch + 1, dtype=torch.int32)
        terms |= {"starts_q": starts, "starts_k": starts}
        terms |= {"max_queries": queries // batch, "max_keys": length // batch}
    given = AttentionTerms(mask=masks[mask], scale=0.125, **terms)
    if gated:
        given = given._replace(gate=_empty(leading, heads, queries, dtype=dtype))
    learned = [mask == "additive"]
    learned += [t is not None for t in (given.slopes, given.table, given.gate)]
    if weights:
        statistics = _empty(2, batch, heads, queries, dtype=torch.float32)
        average = weights == "averaged"
        result = attention_weights(q, k, statistics, given, average)
        needs = [True, True, True, *learned]
        attention_weights_backward(result, q, k, statistics, given, average, needs)
        return
    output, _, statistics = attention_forward(q, k, v, given)
    if not gradients:
        return
    needs = [True, True, True, *learned, given.sinks is not None]
    forms: AbstractContextManager[None] = nullcontext()
    target = assumed_target()
    if one_pass and target is not None and target.backend == "cuda":
        kind = attention_arguments(q, k, v.shape[3], given).kind
        causal = terms.get("right") is not None
        fields = {**ONE_PASS[kind.size], "one_loop": causal}
        forms = forced(("attention_backward", *kind.words), fields)
    with forms:
        attention_backward(output, None, q, k, v, output, statistics, given, needs)


def _disentangled(
    head_dim: int, dtype: torch.dtype, *, packed: bool = False, one_term: bool = False,
    dropout: bool = False,
) -> None:
    """Call both with 512 buckets, as DeBERTa v3 has; padded with a mask of keys."""
    heads, batch, length = 12, 4, 512
    leading, tokens = (1, batch * length) if packed else (batch, length)
    qkv = _empty(leading, tokens, 3, heads, head_dim, dtype=dtype)
    q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
    starts = _empty(batch + 1, dtype=torch.int32) if packed else None
    given = AttentionTerms(
        key_mask=None if packed else _empty(batch, length, dtype=torch.bool), starts_q=starts,
        starts_k=starts, p=0.1, seed=_seed() if dropout else None, scale=0.125,
        max_queries=length, max_keys=length,
    )
    products = _empty(heads, leading, tokens, 512, dtype=dtype).transpose(0, 1)
    buckets, firsts = (_empty(n, dtype=torch.int32) for n in (1025, 513))
    positions = PositionTerms(buckets, products, None if one_term else products)
    output, _, statistics = attention_forward(q, k, v, given, False, positions)
    disentangled_backward(output, q, k, v, output, statistics, given, positions, firsts)


def _specialized(head_dim: int, **more: Any) -> None:
    """Call attention's forward as a table may ask for it on sm_90; elsewhere nothing is called."""
    kind = configs.AttentionKind(head_dim, "half", causal="right" in more)
    target = assumed_target()
    if target is None or not configs.can_specialize(kind, target):
        return
    fields = {"block_m": 128, "block_n": 128, "num_warps": 4, "num_stages": 2}
    with forced(("attention_forward", *kind.words), {**fields, "specialized": True}):
        _attention(head_dim, HALF, gradients=False, **more)


def _places(mask: torch.Tensor, tail: bool) -> None:
    counts = token_counts(mask, tail)
    token_places(mask, counts, mask.numel(), tail, tail)


def _merge(dtype: torch.dtype) -> None:
    o, lse = _empty(4, 16, 512, 64, dtype=dtype), _empty(4, 16, 512, dtype=torch.float32)
    merge_states(o, lse, o, lse)
    merge_states_backward(o, lse, o, lse, o, lse)


def _contrastive(rows: int, dtype: torch.dtype, *, sigmoid: bool = False) -> None:
    """Call the forward, in two strips where there are ``rows``, and the backward in one."""
    scale = _empty(dtype=torch.float32)
    grads: list[torch.Tensor | None]
    lse: list[torch.Tensor | None]

    def vector(x: torch.Tensor) -> torch.Tensor:
        return _empty(x.shape[0], dtype=torch.float32)

    x = _empty(rows, 512, dtype=dtype)
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


# Of rows in float16 and float32: what differs from a case beside it by an activation or a size.
ALIKE = {
    *(f"bias_{activation}" for activation in ACTIVATIONS if activation != "gelu"), "gated silu",
    "softmax 100", "softmax 16384", "layer_norm 17", "layer_norm 1024", "layer_norm 4096",
    "layer_norm 16384", "cross_entropy 50257 in place",
}  # fmt: skip


def compile_cases() -> list[CompileCase]:
    """List every shipped variant: kernels × dtypes × flags × sizes at which configs change."""
    full = torch.float32
    cases: list[CompileCase] = []

    def add(name: str, dtype: torch.dtype, call: Callable[[], object], **flags: Any) -> None:
        core = dtype != torch.float16 and name in CORE and (dtype == HALF or name in CORE_FLOAT32)
        flags["extra"] = flags.get("extra", False) or (dtype != HALF and name in ALIKE)
        cases.append(CompileCase(name, dtype, call, core=core, **flags))

    keep = _empty(64, 1, dtype=torch.bool)
    for dtype in (HALF, torch.float16, full):
        for columns in (100, 1024, 16384, 32768, 131072):
            if dtype != torch.float16 or columns == 1024:
                add(f"softmax {columns}", dtype, partial(_softmax, columns, dtype, None))
        for columns in (17, 768, 1024, 4096, 8192, 16384, 32768):
            if dtype != torch.float16 or columns == 768:
                add(
                    f"layer_norm {columns}", dtype,
                    partial(_norm, columns, dtype, "layer", False),
                )
        for columns in (768, 4096, 8192, 32768):
            if dtype == HALF or columns == 768:
                add(
                    f"dropout_add_layer_norm {columns}", dtype,
                    partial(_norm, columns, dtype, "layer", True, 0.1),
                )
        for columns in (768, 1024, 4096, 8192):
            if dtype == HALF or columns == 768:
                call = partial(_embedding, columns, dtype, 0.1)
                add(f"embedding_layer_norm {columns}", dtype, call)
        for columns in (10, 1000, 50257):
            if dtype == HALF or columns == 50257:
                call = partial(_cross_entropy, columns, dtype)
                add(f"cross_entropy {columns}", dtype, call)
        add("cross_entropy 50257 in place", dtype, partial(_cross_entropy_in_place, 50257, dtype))
        for activation in ACTIVATIONS:
            add(
                f"bias_{activation}", dtype,
                partial(_activation, 3072, dtype, activation),
            )
        if dtype != torch.float16:
            add("scaled sum 768", dtype, partial(_scaled_sum, 768, dtype, 0.0, True))
        for activation in ("gelu", "silu"):
            call = partial(_gated, 3072, dtype, activation, 0.0, False)
            add(f"gated {activation}", dtype, call)
    for norm, dim, interleaved in (
        ("none", 64, False), ("none", 128, True), ("rms", 128, False), ("layer", 64, False),
        ("rms", 256, False),
    ):
        name = f"rotary {dim}" + (f" {norm} norm" if norm != "none" else "")
        call = partial(_rotary, dim, HALF, norm, interleaved)
        add(name + (" neighbours" if interleaved else ""), HALF, call)
    add("rotary 64 in place", HALF, lambda: _rotary_in_place(64, HALF))
    add("rotary 64", full, lambda: _rotary(64, full, "none", False))
    add("sum of samples 384 dropout", HALF, lambda: _scaled_sum(384, HALF, 0.1, False))
    add("gated gelu_tanh dropout", HALF, lambda: _gated(3072, HALF, "gelu_tanh", 0.1, True))
    add("softmax 50257", HALF, partial(_softmax, 50257, HALF, None))
    add("softmax 1024 boolean mask", HALF, lambda: _softmax(1024, HALF, keep))
    add("softmax 1024 causal log", HALF, lambda: _softmax(1024, HALF, None, causal=True, log=True))
    add(
        "softmax 131072 additive mask", HALF,
        lambda: _softmax(131072, HALF, _empty(64, 131072, dtype=full)),
    )
    add("rms_norm 4096", HALF, lambda: _norm(4096, HALF, "rms", False))
    add("dropout_add_rms_norm 4096", HALF, lambda: _norm(4096, HALF, "rms", True, 0.1))
    add("dropout_add 768", HALF, lambda: _norm(768, HALF, "none", True, 0.1))
    for name, form in (("autocast", {"mixed": True}), ("inference", {"inference": True})):
        call = partial(_norm, 768, HALF, "layer", True, 0.0, **form)
        add(f"dropout_add_layer_norm 768 {name}", HALF, call)
    call = partial(_cross_entropy, 50257, HALF, 0.1)
    add("cross_entropy 50257 smoothed, weighted", HALF, call)
    add("bias_gelu dropout", HALF, lambda: _activation(3072, HALF, "gelu", 0.1))
    add("dropout mask", HALF, lambda: dropout_mask(_seed(), 0.1, 2, 64, 64, False))
    add("dropout mask, attention", HALF, lambda: dropout_mask(_seed(), 0.1, 2, 64, 64, True))

    for dim in (16, 32, 40, 64, 72, 80, 96, 128, 160, 192, 256):
        extra = dim in (16, 32, 80, 160)
        add(f"attention d={dim}", HALF, partial(_attention, dim, HALF), matrix=True, extra=extra)
    for dim in (64, 128):
        add(
            f"attention d={dim}", torch.float16,
            partial(_attention, dim, torch.float16), matrix=True, extra=dim == 128,
        )
        add(
            f"attention d={dim} causal", HALF,
            partial(_attention, dim, HALF, right=0), matrix=True,
        )
        for name, flags in (("", {}), (" causal", {"right": 0}), (" packed", {"packed": True})):
            call = partial(_attention, dim, HALF, one_pass=True, **flags)
            extra = dim == 64 or bool(flags)
            add(f"attention d={dim} one pass{name}", HALF, call, matrix=True, extra=extra)
    for dim in (64, 128, 256):
        add(f"attention d={dim}", full, partial(_attention, dim, full))
        call = partial(_attention, dim, full)
        add(f"attention d={dim} tf32", full, call, matrix=dim < 256, products="tf32")
    add("attention d=64 tf32x3", full, partial(_attention, 64, full), products="tf32x3")
    for dtype in (full, torch.float16):
        call = partial(_attention, 64, dtype, sinks=_empty(16, dtype=dtype))
        add("attention d=64 sinks", dtype, call, matrix=dtype != full)
    lengths = {"key_lengths": _empty(4, dtype=torch.int32)}
    positions = {"slopes": _empty(1, 16, dtype=full), "table": _empty(16, 257, dtype=full)}
    sinks = {"sinks": _empty(16)}
    variants: dict[str, dict[str, Any]] = {
        "key mask": {"key_mask": _empty(4, 2048, dtype=torch.bool)},
        "causal key mask": {"key_mask": _empty(4, 2048, dtype=torch.bool), "right": 0},
        "lengths": lengths,
        "boolean mask": {"mask": "boolean"},
        "additive mask": {"mask": "additive"},
        "dropout": {"p": 0.1, "seed": _seed()},
        "slopes": {"slopes": positions["slopes"]},
        "relative bias": {"table": positions["table"]},
        "gated relative bias": {"table": positions["table"], "gated": True, "packed": True},
        "softcap": {"softcap": 30.0},
        "window": {"left": 128, "right": 128},
        "causal window": {"left": 256, "right": 0, "align_end": True},
        "packed": {"packed": True},
        "packed causal": {"packed": True, "right": 0},
        "grouped heads": {"key_heads": 4},
        "few queries": {"queries": 8},
        "sinks": sinks,
        "sinks, causal window, grouped heads": {**sinks, "left": 127, "right": 0, "key_heads": 2},
        "sinks, packed causal": {**sinks, "packed": True, "right": 0},
        "sinks, few queries": {**sinks, "queries": 8},
        "value dim 128": {"value_dim": 128},
        "value dim 16": {"value_dim": 16},
        "causal, one token": {"queries": 1, "keys": 1, "right": 0},
        "weights": {"weights": "per head"},
        "averaged weights": {"weights": "averaged"},
    }
    everything = {
        "mask": "additive", "right": 0, "left": 512, "align_end": True, "softcap": 30.0,
        **variants["dropout"], **variants["key mask"], **positions, **lengths, **sinks,
        "gated": True,
    }  # fmt: skip
    variants["all"] = everything
    for name, flags in variants.items():
        add(
            f"attention d=64 {name}", HALF,
            partial(_attention, 64, HALF, **flags), matrix=True,
        )
    for dim, dtype in ((128, HALF), (256, full)):
        call = partial(_attention, dim, dtype, **variants["few queries"])
        add(f"attention d={dim} few queries", dtype, call, matrix=dtype == HALF)
    # Values narrower than keys: tiles of two swizzles, which ptxas confuses (descriptors.py).
    for dim, value_dim in ((64, 32), (32, 16), (128, 32), (128, 16), (256, 16)):
        call = partial(_attention, dim, HALF, value_dim=value_dim)
        name = f"attention d={dim} value dim {value_dim}"
        add(name, HALF, call, matrix=True, extra=(dim, value_dim) in ((128, 16), (256, 16)))
    # At 256 the plain config has no register to spare: what it serves besides is compiled too.
    for name in ("key mask", "causal key mask", "dropout", "sinks"):
        call = partial(_attention, 256, HALF, **variants[name])
        add(f"attention d=256 {name}", HALF, call, matrix=True)
    biases = "additive mask", "relative bias", "gated relative bias"
    for name in (*biases, "dropout", "packed", "sinks"):
        add(
            f"attention d=128 {name}", HALF,
            partial(_attention, 128, HALF, **variants[name]), matrix=True,
        )
    for dim in (64, 128):
        call = partial(_disentangled, dim, HALF, packed=True)
        add(f"disentangled d={dim} packed", HALF, call, matrix=True, extra=dim == 128)
    call = partial(_disentangled, 64, HALF, dropout=True)
    add("disentangled d=64 key mask, dropout", HALF, call, matrix=True, extra=True)
    call = partial(_disentangled, 64, torch.float16, packed=True, one_term=True)
    add("disentangled d=64 one term", torch.float16, call, matrix=True, extra=True)
    add("disentangled d=64", full, lambda: _disentangled(64, full, packed=True))
    call = partial(_disentangled, 64, full)
    add("disentangled d=64 tf32", full, call, products="tf32", extra=True)
    specialized: dict[str, dict[str, Any]] = {
        "": {}, ", causal": {"right": 0}, ", causal, packed": {"right": 0, "packed": True},
    }
    for dim, kind in ((128, ""), (128, ", causal"), (64, ""), (64, ", causal, packed")):
        call = partial(_specialized, dim, **specialized[kind])
        add(f"attention d={dim} specialized{kind}", HALF, call, matrix=True, forced=True)
    add("pack", HALF, lambda: gather_rows(_empty(4096, 768), _empty(2048, dtype=torch.int64)))
    for tail, name in ((False, "pack places"), (True, "pack places, tail")):
        add(name, HALF, partial(_places, _empty(64, 512, dtype=torch.bool), tail))
    add("merge states", HALF, lambda: _merge(HALF))
    for name, sigmoid in (("contrastive", False), ("sigmoid contrastive", True)):
        for rows, more in ((16384, ""), (1024, " small")):
            call = partial(_contrastive, rows, HALF, sigmoid=sigmoid)
            add(f"{name}{more}", HALF, call, matrix=True, extra=sigmoid and rows == 1024)
        call = partial(_contrastive, 1024, full, sigmoid=sigmoid)
        add(name, full, call, extra=sigmoid)
        add(f"{name} tf32", full, call, matrix=True, products="tf32", extra=sigmoid)
    return cases
