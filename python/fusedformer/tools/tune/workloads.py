"""List what is tuned: calls of the launchers, one key of the config tables each.

A workload makes its calls on any device: on ``meta`` they are recorded and compiled ahead of time,
on a GPU they are checked and timed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from fusedformer_kernels.attention import configs
from fusedformer_kernels.attention.backward import attention_backward
from fusedformer_kernels.attention.forward import attention_forward
from fusedformer_kernels.attention.terms import OF_HEADS_ALONE, AttentionTerms
from fusedformer_kernels.rows.activation import bias_activation_backward, bias_activation_forward
from fusedformer_kernels.rows.norm import norm_forward
from fusedformer_kernels.rows.norm_backward import norm_backward
from fusedformer_kernels.rows.softmax import softmax_backward, softmax_forward
from fusedformer_kernels.runtime import targets
from fusedformer_kernels.runtime.tuned import Fields, Key

Results = tuple[Tensor | None, ...]
Call = Callable[[], Results]
Size = tuple[int, ...]
HALF = torch.bfloat16


@dataclass(frozen=True)
class Workload:
    """One key of the tables.

    Attributes:
        key: its words.
        candidates: the fields to try.
        shapes: sizes by name, whose times have equal weight.
        make: makes the call from a size, a device and a dtype. Inputs are made once, of the same
            numbers each time, which bfloat16 can represent.
        small: the size at which a candidate is checked, by the kernels that are timed.
    """

    key: Key
    candidates: tuple[Fields, ...]
    shapes: Mapping[str, Size]
    make: Callable[[Size, torch.device, torch.dtype], Call]
    small: Size

    @property
    def name(self) -> str:
        """The key in words."""
        return " ".join(map(str, self.key))

    @property
    def kernel(self) -> str:
        """The name of the kernel, the first word of the key."""
        return str(self.key[0])


def workloads() -> list[Workload]:
    """List all workloads, in bfloat16, those that matter most first."""
    return [*_attention(), *_rows()]


def _attention() -> Iterator[Workload]:
    lengths = {64: (512, 4096), 128: (512, 4096), 256: (2048,)}
    for dim, heavy, causal in product((64, 128, 256), (False, True), (False, True)):
        kind = configs.AttentionKind(dim, "half", heavy, causal)
        shapes = {f"S={n}": (16384 // n, 1024 // dim, n, dim) for n in lengths[dim]}
        for name, found, call in (
            ("attention_forward", _forward_tiles(kind), _attention_forward),
            ("attention_backward", _backward_tiles(dim), _attention_backward),
        ):
            yield Workload(
                (name, *kind.words),
                found,
                shapes,
                partial(call, heavy=heavy, causal=causal),
                (1, 1024 // dim, 512, dim),
            )


def _forward_tiles(kind: configs.AttentionKind) -> tuple[Fields, ...]:
    dim, heavy, small = kind.dim, kind.heavy, kind.dim == 64
    tiles: list[Fields] = []
    if configs.can_specialize(kind, targets.TARGETS["sm_90"]):
        tiles += [
            {"block_m": 128, "block_n": n, "num_warps": 4, "num_stages": s, "specialized": True}
            | {"tma": tma}
            for n, s, tma in product((64, 128), (2, 3), (False, True))
        ]
    tiles += (
        {"block_m": m, "block_n": n, "num_warps": w, "num_stages": s, "one_loop": one}
        for m, n, w, s, one in product(
            (64, 128),
            (64, 128) if dim < 256 else (32, 64),
            (4, 8),
            (2, 3, 4) if small else (1, 2, 3),
            (False,) if small and not heavy else (False, True),
        )
    )
    return tuple(tiles)


def _backward_tiles(dim: int) -> tuple[Fields, ...]:
    two_passes = tuple(
        {"block_m": m, "block_n": n, "num_warps": w, "num_stages": s, "one_loop": one,
         "split_keys": split}
        for m, n, w, s, one, split in product(
            (32, 64) if dim < 256 else (16, 32), (64, 128) if dim < 256 else (64,), (4, 8),
            (1, 2, 3) if dim < 256 else (1, 2), (False, True),
            (False,) if dim == 64 else (False, True),
        )
    )  # fmt: skip
    if dim == 128:  # the heavy forms' default, and what has registers for more terms
        two_passes += tuple(
            {"block_m": 16, "block_n": 64, "num_warps": 4, "num_stages": s, "one_loop": one,
             "split_keys": False}
            for s, one in product((2, 3), (False, True))
        )  # fmt: skip
    one_pass: tuple[Fields, ...] = ()
    if dim < 256:  # whose sums of keys and of queries do not fit in registers together
        one_pass = tuple(
            {"block_m": m, "block_n": n, "num_warps": w, "num_stages": s, "one_loop": one,
             "split_keys": False, "passes": 1}
            for m, (n, w), s, one in product(
                (32, 64) if dim == 64 else (16, 32), ((64, 4), (128, 8)), (2, 3), (False, True)
            )
        )  # fmt: skip
    return (*two_passes, *one_pass)


def _terms(device: torch.device, heavy: bool, causal: bool) -> AttentionTerms:
    more: dict[str, Any] = {"right": 0} if causal else {}
    if heavy:
        more |= {"p": 0.1, "seed": torch.zeros(1, dtype=torch.int64, device=device)}
    return AttentionTerms(scale=0.125, **more)


def _heads(size: Size, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    batch, heads, length, dim = size
    packed = _made((batch, length, 3, heads, dim), device, dtype, 0)
    return [packed[:, :, i].transpose(1, 2) for i in range(3)]


def _attention_forward(
    size: Size, device: torch.device, dtype: torch.dtype, heavy: bool, causal: bool
) -> Call:
    q, k, v = _heads(size, device, dtype)
    terms = _terms(device, heavy, causal)
    return lambda: attention_forward(q, k, v, terms)


def _attention_backward(
    size: Size, device: torch.device, dtype: torch.dtype, heavy: bool, causal: bool
) -> Call:
    q, k, v = _heads(size, device, dtype)
    terms = _terms(device, heavy, causal)
    output, _, statistics = attention_forward(q, k, v, terms)
    grad = _made(tuple(output.shape), device, dtype, 1)
    given = q, k, v, output, statistics, terms, OF_HEADS_ALONE
    return lambda: tuple(attention_backward(grad, None, *given))


def _rows() -> Iterator[Workload]:
    calls: dict[str, tuple[Any, tuple[int, ...], tuple[int, ...]]] = {
        "norm_forward": (_norm_forward, (256, 512, 1024, 2048, 4096, 8192, 16384), (1, 2, 4, 8)),
        "norm_backward": (_norm_backward, (256, 512, 1024, 2048, 4096, 8192), (1, 2, 4, 8)),
        "softmax_forward": (_softmax_forward, (128, 512, 1024, 4096, 16384, 32768), (1, 2, 4, 8)),
        "softmax_backward": (_softmax_backward, (128, 512, 1024, 4096, 16384), (1, 2, 4, 8)),
        "activation_forward": (_activation_forward, (512,), (1, 2, 4, 8)),
        "activation_backward": (_activation_backward, (512,), (1, 2, 4, 8)),
    }
    for name, (make, columns, rows) in calls.items():
        for n in columns:
            candidates = _row_tiles(n, rows)
            if name == "norm_backward":
                candidates = _persistent_tiles(n // 4)
            elif name == "activation_backward":
                candidates = _column_tiles(n)
            # Elementwise tiles are 512 wide, and run over the width of a feed-forward block.
            width = 3072 if name.startswith("activation") else n
            sizes = {f"{2**25 // width}x{width}": (2**25 // width, width)}
            yield Workload((name, n), candidates, sizes, make, (67, width))


def _row_tiles(n: int, rows: tuple[int, ...]) -> tuple[Fields, ...]:
    return tuple(
        {"block_m": m, "num_warps": w}
        for m, w in product(rows, (1, 2, 4, 8, 16, 32))
        if 4 <= m * n // (32 * w) <= 64
    )


def _persistent_tiles(block_n: int) -> tuple[Fields, ...]:
    """Tiles of 256 columns a warp, by how many programs of them an SM is to hold."""
    return tuple(
        {"block_m": w * 256 // block_n, "num_warps": w, "num_stages": s, "programs": p,
         "max_registers": r}
        for w, s, (p, r) in product((4, 8, 16), (2, 3, 4), ((1, 0), (2, 0), (3, 168)))
        if w * 256 >= block_n
    )  # fmt: skip


def _column_tiles(block_n: int) -> tuple[Fields, ...]:
    return tuple(
        {"block_m": m, "num_warps": w, "num_stages": s, "programs": p}
        for m, w, s, p in product((1, 2, 4), (1, 2, 4), (2, 3, 4), (4, 8, 12, 16))
        if 8 <= m * block_n // (32 * w) <= 32 and 16 <= p * w <= 32
    )


def _made(size: Size, device: torch.device, dtype: torch.dtype, seed: int) -> Tensor:
    if device.type == "meta":
        return torch.empty(size, device=device, dtype=dtype)
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(size, device=device, generator=generator).to(HALF).to(dtype)


def _norm_forward(size: Size, device: torch.device, dtype: torch.dtype) -> Call:
    x, residual = (_made(size, device, dtype, seed) for seed in (0, 1))
    weight, bias = (_made(size[1:], device, dtype, seed) for seed in (2, 3))
    kept = True, True
    return lambda: norm_forward(x, residual, None, weight, bias, None, 0.0, 1e-5, "layer", 1, *kept)


def _norm_backward(size: Size, device: torch.device, dtype: torch.dtype) -> Call:
    dy, z = (_made(size, device, dtype, seed) for seed in (0, 1))
    weight = _made(size[1:], device, dtype, 2)
    mean, variance = z.float().mean(1), z.float().var(1, correction=0)
    rstd = torch.rsqrt(variance + 1e-5)
    return lambda: norm_backward(
        dy, None, z, mean, rstd, weight, None, 0.0, "layer", 1, True, True, False, dtype, dtype
    )


def _softmax_forward(size: Size, device: torch.device, dtype: torch.dtype) -> Call:
    x = _made(size, device, dtype, 0)
    return lambda: (softmax_forward(x, None, 1.0, False, dtype, False),)


def _softmax_backward(size: Size, device: torch.device, dtype: torch.dtype) -> Call:
    y = _made(size, device, dtype, 0).softmax(-1).to(HALF).to(dtype)
    dy = _made(size, device, dtype, 1)
    return lambda: (softmax_backward(dy, y, 1.0, dtype, False, False),)


def _activation_forward(size: Size, device: torch.device, dtype: torch.dtype) -> Call:
    x, bias = _made(size, device, dtype, 0), _made(size[1:], device, dtype, 1)
    return lambda: (bias_activation_forward(x, bias, None, 0.0, "gelu"),)


def _activation_backward(size: Size, device: torch.device, dtype: torch.dtype) -> Call:
    x, dy = (_made(size, device, dtype, seed) for seed in (0, 1))
    bias = _made(size[1:], device, dtype, 2)
    return lambda: bias_activation_backward(dy, x, bias, None, 0.0, "gelu", True)
