"""Call every launcher on tensors without memory, in all variants that ship.

The compile report records the launches that each call makes and compiles those, so what it reads
is what runs: the same kernel, config and specialization.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from fusedformer_kernels.compiler import row_calls as rows
from fusedformer_kernels.compiler.attention_calls import (
    attend,
    disentangled,
    merge,
    specialized_forward,
)
from fusedformer_kernels.compiler.tensors import HALF, empty, empty_seed
from fusedformer_kernels.rows.activation import ACTIVATIONS
from fusedformer_kernels.rows.dropout import dropout_mask
from fusedformer_kernels.rows.gather import gather_rows

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


# In float16 and float32: what differs from a case beside it by an activation, a size or a dtype.
ALIKE = {
    *(f"bias_{activation}" for activation in ACTIVATIONS if activation != "gelu"), "gated silu",
    "softmax 100", "softmax 16384", "layer_norm 17", "layer_norm 1024", "layer_norm 4096",
    "layer_norm 16384", "cross_entropy 50257 in place", "attention d=64 sinks", "disentangled d=64",
    "attention d=256 few queries",
}  # fmt: skip
# In bfloat16: what differs from a case beside it by a term that two other cases have together, or
# by a head dim between two.
BETWEEN = {
    "attention d=72", "attention d=192", "attention d=64 softcap", "attention d=64 value dim 32",
    "attention d=64 gated relative bias", "attention d=128 gated relative bias",
    "attention d=64 dropout, grouped", "attention d=128 packed causal, grouped",
    "attention d=128 additive mask", "attention d=128 sinks", "attention d=128 few queries",
    "attention d=256 sinks", "attention d=256 causal key mask",
    "attention d=128 specialized, causal",
}  # fmt: skip


def compile_cases() -> list[CompileCase]:
    """List every shipped variant: kernels × dtypes × flags × sizes at which configs change."""
    full = torch.float32
    cases: list[CompileCase] = []

    def add(name: str, dtype: torch.dtype, call: Callable[[], object], **flags: Any) -> None:
        core = dtype != torch.float16 and name in CORE and (dtype == HALF or name in CORE_FLOAT32)
        alike = BETWEEN if dtype == HALF else ALIKE
        flags["extra"] = flags.get("extra", False) or name in alike
        cases.append(CompileCase(name, dtype, call, core=core, **flags))

    keep = empty(64, 1, dtype=torch.bool)
    for dtype in (HALF, torch.float16, full):
        for columns in (100, 1024, 16384, 32768, 131072):
            if dtype != torch.float16 or columns == 1024:
                add(f"softmax {columns}", dtype, partial(rows.softmax, columns, dtype, None))
        for columns in (17, 768, 1024, 4096, 8192, 16384, 32768):
            if dtype != torch.float16 or columns == 768:
                add(
                    f"layer_norm {columns}", dtype,
                    partial(rows.norm, columns, dtype, "layer", False),
                )
        for columns in (768, 4096, 8192, 32768):
            if dtype == HALF or columns == 768:
                add(
                    f"dropout_add_layer_norm {columns}", dtype,
                    partial(rows.norm, columns, dtype, "layer", True, 0.1),
                )
        for columns in (768, 1024, 4096, 8192):
            if dtype == HALF or columns == 768:
                call = partial(rows.embedding, columns, dtype, 0.1)
                add(f"embedding_layer_norm {columns}", dtype, call)
        for columns in (10, 1000, 50257):
            if dtype == HALF or columns == 50257:
                call = partial(rows.cross_entropy, columns, dtype)
                add(f"cross_entropy {columns}", dtype, call)
        call = partial(rows.cross_entropy_in_place, 50257, dtype)
        add("cross_entropy 50257 in place", dtype, call)
        for activation in ACTIVATIONS:
            add(
                f"bias_{activation}", dtype,
                partial(rows.activation, 3072, dtype, activation),
            )
        if dtype != torch.float16:
            add("scaled sum 768", dtype, partial(rows.scaled_sum, 768, dtype, 0.0, True))
        for activation in ("gelu", "silu"):
            call = partial(rows.gated, 3072, dtype, activation, 0.0, False)
            add(f"gated {activation}", dtype, call)
    for norm, dim, interleaved in (
        ("none", 64, False), ("none", 128, True), ("rms", 128, False), ("layer", 64, False),
        ("rms", 256, False),
    ):
        name = f"rotary {dim}" + (f" {norm} norm" if norm != "none" else "")
        call = partial(rows.rotary, dim, HALF, norm, interleaved)
        add(name + (" neighbours" if interleaved else ""), HALF, call)
    add("rotary 64 in place", HALF, lambda: rows.rotary_in_place(64, HALF))
    add("rotary 64", full, lambda: rows.rotary(64, full, "none", False))
    add("sum of samples 384 dropout", HALF, lambda: rows.scaled_sum(384, HALF, 0.1, False))
    add("gated gelu_tanh dropout", HALF, lambda: rows.gated(3072, HALF, "gelu_tanh", 0.1, True))
    add("softmax 50257", HALF, partial(rows.softmax, 50257, HALF, None))
    add("softmax 1024 boolean mask", HALF, lambda: rows.softmax(1024, HALF, keep))
    call = partial(rows.softmax, 1024, HALF, None, causal=True, log=True)
    add("softmax 1024 causal log", HALF, call)
    add(
        "softmax 131072 additive mask", HALF,
        lambda: rows.softmax(131072, HALF, empty(64, 131072, dtype=full)),
    )
    add("rms_norm 4096", HALF, lambda: rows.norm(4096, HALF, "rms", False))
    add("dropout_add_rms_norm 4096", HALF, lambda: rows.norm(4096, HALF, "rms", True, 0.1))
    add("dropout_add 768", HALF, lambda: rows.norm(768, HALF, "none", True, 0.1))
    for name, form in (("autocast", {"mixed": True}), ("inference", {"inference": True})):
        call = partial(rows.norm, 768, HALF, "layer", True, 0.0, **form)
        add(f"dropout_add_layer_norm 768 {name}", HALF, call)
    call = partial(rows.cross_entropy, 50257, HALF, 0.1)
    add("cross_entropy 50257 smoothed, weighted", HALF, call)
    add("bias_gelu dropout", HALF, lambda: rows.activation(3072, HALF, "gelu", 0.1))
    add("dropout mask", HALF, lambda: dropout_mask(empty_seed(), 0.1, 2, 64, 64, False))
    add("dropout mask, attention", HALF, lambda: dropout_mask(empty_seed(), 0.1, 2, 64, 64, True))

    for dim in (16, 32, 40, 64, 72, 80, 96, 128, 160, 192, 256):
        extra = dim in (16, 32, 80, 160)
        add(f"attention d={dim}", HALF, partial(attend, dim, HALF), matrix=True, extra=extra)
    for dim in (64, 128):
        add(
            f"attention d={dim}", torch.float16,
            partial(attend, dim, torch.float16), matrix=True, extra=dim == 128,
        )
        add(
            f"attention d={dim} causal", HALF,
            partial(attend, dim, HALF, right=0), matrix=True,
        )
        for name, flags in (("", {}), (" causal", {"right": 0}), (" packed", {"packed": True})):
            call = partial(attend, dim, HALF, one_pass=True, **flags)
            extra = dim == 64 or bool(flags)
            add(f"attention d={dim} one pass{name}", HALF, call, matrix=True, extra=extra)
    for dim in (64, 128, 256):
        add(f"attention d={dim}", full, partial(attend, dim, full))
        call = partial(attend, dim, full)
        add(f"attention d={dim} tf32", full, call, matrix=dim < 256, products="tf32")
    add("attention d=64 tf32x3", full, partial(attend, 64, full), products="tf32x3")
    for dtype in (full, torch.float16):
        call = partial(attend, 64, dtype, sinks=empty(16, dtype=dtype))
        add("attention d=64 sinks", dtype, call, matrix=dtype != full)
    lengths = {"key_lengths": empty(4, dtype=torch.int32)}
    positions = {"slopes": empty(1, 16, dtype=full), "table": empty(16, 257, dtype=full)}
    sinks = {"sinks": empty(16)}
    variants: dict[str, dict[str, Any]] = {
        "key mask": {"key_mask": empty(4, 2048, dtype=torch.bool)},
        "causal key mask": {"key_mask": empty(4, 2048, dtype=torch.bool), "right": 0},
        "lengths": lengths,
        "boolean mask": {"mask": "boolean"},
        "additive mask": {"mask": "additive"},
        "dropout": {"p": 0.1, "seed": empty_seed()},
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
            partial(attend, 64, HALF, **flags), matrix=True,
        )
    for dim, dtype in ((128, HALF), (256, full)):
        call = partial(attend, dim, dtype, **variants["few queries"])
        add(f"attention d={dim} few queries", dtype, call, matrix=dtype == HALF)
    # Values narrower than keys: tiles of two swizzles, which ptxas confuses (descriptors.py).
    for dim, value_dim in ((64, 32), (32, 16), (128, 32), (128, 16), (256, 16)):
        call = partial(attend, dim, HALF, value_dim=value_dim)
        name = f"attention d={dim} value dim {value_dim}"
        add(name, HALF, call, matrix=True, extra=(dim, value_dim) in ((128, 16), (256, 16)))
    # At 256 the plain config has no register to spare: what it serves besides is compiled too.
    for name in ("key mask", "causal key mask", "dropout", "sinks"):
        call = partial(attend, 256, HALF, **variants[name])
        add(f"attention d=256 {name}", HALF, call, matrix=True)
    biases = "additive mask", "relative bias", "gated relative bias"
    for name in (*biases, "dropout", "packed", "sinks"):
        add(
            f"attention d=128 {name}", HALF,
            partial(attend, 128, HALF, **variants[name]), matrix=True,
        )
    # Forms with more terms than tiles of one or two have registers for.
    gated = {**variants["gated relative bias"], "table": empty(16, 257)}
    add(
        "attention d=64 gated relative bias, grouped", HALF,
        partial(attend, 64, HALF, **gated, key_heads=4), matrix=True,
    )
    add(
        "attention d=128 gated relative bias, dropout, grouped", HALF,
        partial(attend, 128, HALF, **gated, **variants["dropout"], key_heads=4), matrix=True,
    )
    add(
        "attention d=256 relative bias", HALF,
        partial(attend, 256, HALF, table=gated["table"]), matrix=True,
    )
    call = partial(attend, 128, full, table=gated["table"], gated=True)
    add("attention d=128 gated relative bias tf32", full, call, products="tf32")
    for dim, name in ((64, "dropout"), (128, "packed"), (128, "packed causal")):
        call = partial(attend, dim, HALF, **variants[name], key_heads=4)
        add(f"attention d={dim} {name}, grouped", HALF, call, matrix=True)
    call = partial(attend, 64, HALF, **variants["softcap"], **variants["dropout"], packed=True)
    add("attention d=64 softcap, dropout, packed", HALF, call, matrix=True)
    for dim in (64, 128):
        call = partial(disentangled, dim, HALF, packed=True)
        add(f"disentangled d={dim} packed", HALF, call, matrix=True, extra=dim == 128)
    call = partial(disentangled, 64, HALF, dropout=True)
    add("disentangled d=64 key mask, dropout", HALF, call, matrix=True, extra=True)
    call = partial(disentangled, 64, torch.float16, packed=True, one_term=True)
    add("disentangled d=64 one term", torch.float16, call, matrix=True, extra=True)
    add("disentangled d=64", full, lambda: disentangled(64, full, packed=True))
    call = partial(disentangled, 64, full)
    add("disentangled d=64 tf32", full, call, products="tf32", extra=True)
    specialized: dict[str, dict[str, Any]] = {
        "": {}, ", causal": {"right": 0}, ", causal, packed": {"right": 0, "packed": True},
        " by TMA": {"tma": True}, " by TMA, causal": {"tma": True, "right": 0},
    }
    of_128, of_64 = ("", ", causal", " by TMA"), ("", ", causal, packed", " by TMA, causal")
    for dim, kind in (*((128, kind) for kind in of_128), *((64, kind) for kind in of_64)):
        call = partial(specialized_forward, dim, **specialized[kind])
        add(f"attention d={dim} specialized{kind}", HALF, call, matrix=True, forced=True)
    add("pack", HALF, lambda: gather_rows(empty(4096, 768), empty(2048, dtype=torch.int64)))
    for tail, name in ((False, "pack places"), (True, "pack places, tail")):
        add(name, HALF, partial(rows.places, empty(64, 512, dtype=torch.bool), tail))
    add("merge states", HALF, lambda: merge(HALF))
    for name, sigmoid in (("contrastive", False), ("sigmoid contrastive", True)):
        for count, more in ((16384, ""), (1024, " small")):
            call = partial(rows.contrastive_loss, count, HALF, sigmoid=sigmoid)
            add(f"{name}{more}", HALF, call, matrix=True, extra=sigmoid and count == 1024)
        call = partial(rows.contrastive_loss, 1024, full, sigmoid=sigmoid)
        add(name, full, call, extra=sigmoid)
        add(f"{name} tf32", full, call, matrix=True, products="tf32", extra=sigmoid)
    return cases
