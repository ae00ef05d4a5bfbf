"""Tile configs: a pure function of shape, dtype and architecture.

Every choice here is read from the compile report (``python -m fusedformer compile-report``): no
spills on sm_90, shared memory within the architecture's limit. Nothing is tuned at run time; what
was tuned before is in the tables of :mod:`tuned`, which these functions ask.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from fusedformer_kernels.runtime.tuned import cached_config, clear_caches, tuned_config


@dataclass(frozen=True, eq=False)  # one object each: hashed by every launch
class Target:
    """What a config depends on, of a device."""

    backend: str  # "cuda" or "hip"
    arch: int | str  # compute capability * 10, or the gfx name
    warp_size: int
    multiprocessors: int
    shared_memory: int  # bytes that one program may use
    device_name: str = ""  # of a device that is here: a user may have tuned for it
    interpreted: bool = False


TARGETS = {
    "sm_80": Target("cuda", 80, 32, 108, 163 * 1024),
    "sm_90": Target("cuda", 90, 32, 132, 227 * 1024),
    "sm_100": Target("cuda", 100, 32, 148, 227 * 1024),
    "gfx942": Target("hip", "gfx942", 64, 304, 64 * 1024),
}
# The interpreter gets sm_90's tiles, and few multiprocessors so that persistent loops iterate.
INTERPRETED = Target("cuda", 90, 32, 2, 227 * 1024, interpreted=True)

_assumed: Target | None = None


@contextlib.contextmanager
def assume_target(target: Target) -> Iterator[None]:
    """Choose configs for ``target``, whatever device the tensors are on (for compiling ahead)."""
    global _assumed
    previous, _assumed = _assumed, target
    try:
        yield
    finally:
        _assumed = previous


def target_of(device: torch.device) -> Target:
    """The target that kernels on tensors of ``device`` are launched for."""
    if _assumed is not None:
        return _assumed
    return INTERPRETED if device.type != "cuda" else _cuda_target(device.index or 0)


@functools.cache
def _cuda_target(index: int) -> Target:
    properties = torch.cuda.get_device_properties(index)
    count = properties.multi_processor_count
    if torch.version.hip is not None:
        name = properties.gcnArchName.split(":")[0]
        return Target("hip", name, properties.warp_size, count, 64 * 1024, properties.name)
    arch = properties.major * 10 + properties.minor
    # Turing, and Ada and Blackwell of the desktop, have less than the data-center parts.
    shared = getattr(properties, "shared_memory_per_block_optin", 99 * 1024)
    return Target("cuda", arch, 32, count, shared, properties.name)


@dataclass(frozen=True)
class LaunchConfig:
    """How a compiled kernel is launched."""

    num_warps: int = 4
    num_stages: int = 2

    def options(self) -> dict[str, int]:
        """Options of the compiler. Multiply-adds are fused where ``primitives.fma`` says so."""
        return {
            "num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": False,
        }  # fmt: skip


@dataclass(frozen=True)
class TileConfig(LaunchConfig):
    """A tile of BLOCK_M rows and BLOCK_N columns."""

    block_m: int = 1
    block_n: int = 16


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _warps(elements: int, per_thread: int, target: Target) -> int:
    """Warps for a tile, so that one thread holds about ``per_thread`` of its elements."""
    threads = max(1, elements // per_thread)
    return max(1, min(next_power_of_2(threads // target.warp_size), 1024 // target.warp_size))


# Longest row that one program keeps whole in registers; longer rows are read twice.
SOFTMAX_ONE_PASS = 32768
SOFTMAX_BACKWARD_ONE_PASS = 16384
NORM_ONE_PASS = 16384
NORM_BACKWARD_ONE_PASS = 8192
NORM_DROPOUT_BACKWARD_ONE_PASS = 4096  # 8192 spills with dropout and three sums
LONG_ROW_CHUNK = 4096


@cached_config
def row_tile(
    kernel: str, columns: int, one_pass: int, tile: int, per_thread: int, target: Target
) -> TileConfig:
    """Whole rows of up to ``one_pass`` columns, several a program when short; else one chunk."""
    if columns > one_pass:
        return TileConfig(_warps(LONG_ROW_CHUNK, 16, target), 2, 1, LONG_ROW_CHUNK)
    block_n = max(next_power_of_2(columns), 16)
    block_m = max(1, min(tile // block_n, 64))
    default = TileConfig(_warps(block_m * block_n, per_thread, target), 2, block_m, block_n)
    return tuned_config((kernel, block_n), target, default)


@dataclass(frozen=True)
class LongRowConfig(LaunchConfig):
    """Chunks of block_n columns: a program walks those of a row, or each of ``splits`` has one."""

    block_n: int = 8192
    splits: int = 1


CHUNK_BYTES = 32 * 1024  # of the widest tensor that is read
IN_FLIGHT_BYTES = 128 * 1024  # of a program's chunks that are on their way


@cached_config
def long_rows(
    n_rows: int, columns: int, itemsizes: tuple[int, ...], target: Target
) -> LongRowConfig:
    """Chunks of softmax's rows that are too long for registers, and who reads them.

    Chunks go by the columns alone, since bits depend on them. One or two programs of an SM have
    enough bytes on their way, and so few rows are read at once that the second pass finds most of
    them in the cache. Split rows keep all SMs busy, but are read from memory twice.
    """
    block_n, threads, stages = LONG_ROW_CHUNK, 256, 1
    if target.backend == "cuda" and columns % 16:  # elements are loaded one by one
        block_n, threads = LONG_ROW_CHUNK // 2, 128
    elif target.backend == "cuda":
        block_n = CHUNK_BYTES // max(itemsizes)
        room = min(target.shared_memory - 2048, IN_FLIGHT_BYTES)
        stages = min(1 + room // (block_n * sum(itemsizes)), 4)
    splits = ceil_div(columns, block_n) if 3 * n_rows < 2 * target.multiprocessors else 1
    return LongRowConfig(threads // target.warp_size, stages, block_n, splits)


@dataclass(frozen=True)
class PartsConfig(TileConfig):
    """Rows of ``parts`` tiles of BLOCK_M rows and BLOCK_N columns, for persistent programs.

    Attributes:
        programs: how many a multiprocessor is to hold at once.
        max_registers: of a thread, so that they fit; 0 leaves it to the compiler.
    """

    parts: int = 1
    programs: int = 2
    max_registers: int = 0

    def options(self) -> dict[str, int]:
        """Options of the compiler."""
        bound = {"maxnreg": self.max_registers} if self.max_registers else {}
        return super().options() | bound


@cached_config
def parts_tile(kernel: str, columns: int, one_pass: int, target: Target) -> PartsConfig:
    """Whole rows of up to ``one_pass`` columns in a few tiles; else one chunk.

    A row is three or four tiles: three are enough for 768 columns, of which one tile of 1,024 would
    waste a quarter. A warp has 256 columns of a tile: eight a lane, which one instruction loads of
    16 bits.
    """
    default = _parts_default(columns, one_pass, target)
    return tuned_config((kernel, next_power_of_2(columns)), target, default)


def _parts_default(columns: int, one_pass: int, target: Target) -> PartsConfig:
    if columns > one_pass:
        return PartsConfig(_warps(LONG_ROW_CHUNK, 16, target), 2, 1, LONG_ROW_CHUNK)
    block_n = max(next_power_of_2(columns) // 4, 16)
    block_m = max(1, min(1024 // block_n, 64))
    warps = _warps(block_m * block_n, 8, target)
    return PartsConfig(warps, 2, block_m, block_n, ceil_div(columns, block_n))


@cached_config
def persistent_tile(
    kernel: str, columns: int, one_pass: int, heavy: bool, loaded: int, target: Target
) -> PartsConfig:
    """The same for programs that walk the rows, load ahead and keep sums of columns.

    An SM holds eight warps of them; with three tiles it holds twelve, if the compiler lets go of
    registers that it does not need. ``heavy`` ones have three sums, and need them. ``loaded`` are
    the bytes of a column of a row, in all tensors: as many stages are loaded ahead as have room.
    """
    tile = _parts_default(columns, one_pass, target)
    if columns > one_pass:
        return tile
    small = tile.parts < 4 and not heavy and tile.num_warps == 4 and target.backend == "cuda"
    small &= kernel != "embedding_backward"  # Triton 3.9 spills with the registers of three
    config = replace(
        tile, num_stages=3, programs=3 if small else max(1, 8 // tile.num_warps),
        max_registers=168 if small else 0,
    )
    if not heavy:
        config = tuned_config((kernel, next_power_of_2(columns)), target, config)
    stage = config.block_m * config.block_n * config.parts * loaded
    room = (target.shared_memory - 4096) // stage
    return replace(config, num_stages=max(1, min(config.num_stages, 1 + room)))


@cached_config
def elementwise_tile(
    kernel: str, columns: int, target: Target, per_thread: int = 16
) -> TileConfig:
    """Tiles for bias + activation, forward and backward, so many elements a thread."""
    block_n = min(max(next_power_of_2(columns), 16), 512)
    block_m = max(1, min(128 * per_thread // block_n, 64))
    default = TileConfig(_warps(block_m * block_n, per_thread, target), 2, block_m, block_n)
    return tuned_config((kernel, block_n), target, default)


@cached_config
def column_tile(kernel: str, columns: int, programs: int, target: Target) -> PartsConfig:
    """Tiles for programs that walk the rows of a block of columns and sum them up.

    A thread has sixteen elements, of eight neighbouring columns where there are enough, and all
    rows of a tile; ``programs`` is how many of them, two warps each, an SM holds.
    """
    block_n = min(max(next_power_of_2(columns), 16), 512)
    block_m = max(1, min(1024 // block_n, 64))
    warps = _warps(block_m * block_n, 16, target)
    default = PartsConfig(warps, 3, block_m, block_n, 1, programs)
    return tuned_config((kernel, block_n), target, default)


def column_programs(
    n_rows: int, column_blocks: int, config: PartsConfig, target: Target
) -> int:
    """How many persistent programs walk the rows of each block of columns."""
    of_all = config.programs * target.multiprocessors
    return max(1, min(ceil_div(n_rows, config.block_m), of_all // column_blocks))


def row_programs(row_blocks: int, target: Target, programs: int = 2) -> int:
    """How many persistent programs walk ``row_blocks``, so many a multiprocessor.

    It bounds the partial sums they leave.
    """
    return max(1, min(row_blocks, programs * target.multiprocessors))


_float32_products = "torch"


def set_float32_products(name: str) -> None:
    """See :func:`fusedformer.set_float32_products`."""
    global _float32_products
    if name != _float32_products:
        _float32_products = name
        clear_caches()  # plans have launches of the other kind


def float32_products() -> str:
    """What :func:`set_float32_products` says."""
    return _float32_products


def dot_precision(dtype: torch.dtype, target: Target | None = None, dim: int = 0) -> str:
    """Precision of float32 products: "tf32" where torch's own setting for products is that.

    Those of attention, for a target and of the larger head dim, may be by three of TF32. Above 64
    the backward has no registers for them.
    """
    if dtype != torch.float32:
        return "ieee"
    if precision_of_products() == "tf32":
        return "tf32"
    has_tf32 = target is not None and target.backend == "cuda" and int(target.arch) >= 80
    return "tf32x3" if _float32_products == "tf32x3" and has_tf32 and dim <= 64 else "ieee"


# What ``torch.backends.cuda.matmul.fp32_precision`` is, by the short way to it.
precision_of_products = functools.partial(torch._C._get_fp32_precision_getter, "cuda", "matmul")


def assumed_target() -> Target | None:
    """What :func:`assume_target` says."""
    return _assumed


@dataclass(frozen=True)
class PairConfig(TileConfig):
    """A tile of scores of all pairs, by a loop over block_k dimensions."""

    block_k: int = 64


def pair_tile(operands: str, n_rows: int, n_columns: int, target: Target) -> PairConfig:
    """Tile of the contrastive losses; ``operands`` as in :class:`AttentionKind`.

    On sm_90 the large one reads least out of L2; it has no register to spare, and an SM to itself.
    Small problems get more, smaller tiles, so that no SM is idle.
    """
    large = _large_pair_tile(operands, target)
    tiles = ceil_div(n_rows, large.block_m) * ceil_div(n_columns, large.block_n)
    if operands == "half" and target.backend == "cuda" and tiles < target.multiprocessors:
        return tuned_config(("pairs", operands, "small"), target, PairConfig(4, 3, 128, 64, 64))
    return tuned_config(("pairs", operands, "large"), target, large)


def _large_pair_tile(operands: str, target: Target) -> PairConfig:
    if operands == "ieee":
        return PairConfig(8, 1, 64, 64, 16)
    block_k = 64 if operands == "half" else 32
    if target.backend == "hip":
        return PairConfig(8, 1, 128, 128, block_k)
    if target.arch == 90 and operands == "half":
        return PairConfig(8, 4, 256, 128, block_k)
    roomy = target.shared_memory > 128 * 1024
    return PairConfig(8, 3 if roomy else 2, 128, 128, block_k)


@dataclass(frozen=True)
class AttentionConfig(LaunchConfig):
    """Tile of block_m queries by block_n keys."""

    block_m: int = 64
    block_n: int = 64
    one_loop: bool = False  # one checked loop in place of a full and a partial one: fewer registers
    split_keys: bool = False  # dk and dv in a pass each: one accumulator in registers at a time
    keys_per_split: int = 0  # keys that one program walks when queries are few; 0: all
    passes: int = 2  # backward: 1 for one over the keys that gives dq too (query_sums.py)
    specialized: bool = False  # forward, on sm_90: the kernel whose warps copy or multiply


@dataclass(frozen=True)
class AttentionKind:
    """What attention's tiles depend on besides the target."""

    dim: int  # the larger of the padded key and value head dims
    operands: str  # "half", or of float32 the precision of products
    heavy: bool = False  # anything added, masks, dropout, a window: more registers an element
    causal: bool = False
    equal: bool = True  # the padded head dims of key and value
    masked: bool = False  # by a mask of pairs, boolean or additive
    gathers: bool = False  # position terms by bucket: more registers still

    @property
    def size(self) -> int:
        """Class of head dims that share a config."""
        return 64 if self.dim <= 64 else 128 if self.dim <= 128 else 256

    @property
    def words(self) -> tuple[str | int, ...]:
        """As tables of tuned configs name it."""
        return (
            self.operands, self.size, "heavy" if self.heavy else "plain",
            "causal" if self.causal else "full",
        )  # fmt: skip


def padded_dim(dim: int) -> int:
    """Head dim as tiles hold it: a power of two that tensor cores take."""
    return max(next_power_of_2(dim), 16)


# AttentionConfig(num_warps, num_stages, block_m, block_n, one_loop, split_keys), by operands and
# size: the plain form, then the heavy one. Read from the compile report for sm_90. At 64, tiles of
# 128 x 128 leave room for one program an SM, whose products and softmax wait for each other; of
# these two fit, and one works on its softmax while the other multiplies.
_HOPPER_FORWARD = {
    ("half", 64): (AttentionConfig(8, 3, 128, 64), AttentionConfig(8, 2, 128, 64)),
    ("half", 128): (AttentionConfig(8, 2, 128, 128), AttentionConfig(8, 2, 128, 64, True)),
    ("half", 256): (AttentionConfig(8, 2, 64, 64, True), AttentionConfig(8, 2, 64, 32, True)),
    ("ieee", 64): (AttentionConfig(8, 1, 64, 32, True), AttentionConfig(8, 1, 64, 32, True)),
    ("ieee", 128): (AttentionConfig(8, 1, 32, 32, True), AttentionConfig(8, 1, 32, 32, True)),
    ("ieee", 256): (AttentionConfig(8, 1, 32, 32, True), AttentionConfig(8, 1, 16, 32, True)),
    # HMMA here and in the backward, which is to find the very scores of the forward again.
    ("tf32x3", 64): (AttentionConfig(4, 1, 32, 32), AttentionConfig(4, 1, 32, 32, True)),
    ("tf32", 64): (AttentionConfig(4, 2, 64, 32), AttentionConfig(4, 2, 64, 32)),
    ("tf32", 128): (AttentionConfig(8, 1, 64, 32, True), AttentionConfig(8, 1, 64, 32, True)),
    # A tile of 64 rows, which HGMMA wants, spills here: HMMA then.
    ("tf32", 256): (AttentionConfig(8, 1, 32, 32, True), AttentionConfig(8, 1, 16, 32, True)),
}
# For both backward kernels: the one over keys steps through block_m queries for a tile of block_n
# keys, the one over queries has the two the other way round.
_HOPPER_BACKWARD = {
    ("half", 64): (AttentionConfig(8, 2, 64, 128), AttentionConfig(8, 2, 32, 128, True)),
    ("half", 128): (AttentionConfig(8, 2, 64, 64), AttentionConfig(8, 2, 32, 64, True)),
    ("half", 256): (
        AttentionConfig(8, 2, 16, 64, True, True),
        AttentionConfig(8, 2, 16, 64, True, True),
    ),
    ("ieee", 64): (AttentionConfig(8, 1, 32, 32, True), AttentionConfig(8, 1, 32, 32, True)),
    ("ieee", 128): (AttentionConfig(8, 1, 32, 32, True), AttentionConfig(8, 1, 32, 32, True)),
    ("ieee", 256): (AttentionConfig(8, 1, 16, 32, True), AttentionConfig(8, 1, 16, 32, True)),
    ("tf32x3", 64): (AttentionConfig(4, 1, 32, 32), AttentionConfig(4, 1, 32, 16, True, True)),
    ("tf32", 64): (AttentionConfig(4, 1, 32, 64), AttentionConfig(8, 1, 32, 64, True)),
    ("tf32", 128): (
        AttentionConfig(8, 1, 16, 64, True, True),
        AttentionConfig(8, 1, 16, 64, True, True),
    ),
    ("tf32", 256): (AttentionConfig(8, 1, 32, 32, True), AttentionConfig(8, 1, 16, 32, True)),
}
# Disentangled attention: forward, and both backward kernels. Tiles of sm_100 spill less.
_GATHERING = {
    ("half", 64): (AttentionConfig(4, 3, 64, 64), AttentionConfig(4, 3, 32, 64)),
    ("half", 128): (AttentionConfig(8, 2, 64, 64, True), AttentionConfig(8, 2, 32, 64, True)),
    ("half", 256): (AttentionConfig(8, 2, 64, 32, True), AttentionConfig(8, 2, 16, 64, True, True)),
    ("ieee", 64): (AttentionConfig(8, 1, 32, 32, True), AttentionConfig(8, 1, 32, 32, True)),
    ("ieee", 128): (AttentionConfig(8, 1, 32, 32, True), AttentionConfig(8, 1, 32, 32, True)),
    ("ieee", 256): (AttentionConfig(8, 1, 16, 32, True), AttentionConfig(8, 1, 16, 32, True)),
    ("tf32", 64): (AttentionConfig(4, 2, 64, 32), AttentionConfig(8, 1, 32, 64, True)),
    ("tf32", 128): (AttentionConfig(8, 1, 64, 32, True), AttentionConfig(8, 1, 16, 64, True, True)),
    ("tf32", 256): (AttentionConfig(8, 1, 16, 32, True), AttentionConfig(8, 1, 16, 32, True)),
}


# So few queries over many keys leave most of a GPU idle unless the keys are split among programs.
# That goes by lengths, not by the batch's size; and never happens in self-attention, where a short
# sequence is to get the same bits alone as among longer ones.
FEW_QUERIES = 16
KEYS_PER_SPLIT = 512


def are_few_queries(max_queries: int, max_keys: int) -> bool:
    """Whether programs share the keys of one block of queries."""
    return max_queries <= FEW_QUERIES and max_keys > KEYS_PER_SPLIT


@cached_config
def attention_forward_config(
    kind: AttentionKind, target: Target, max_queries: int, max_keys: int
) -> AttentionConfig:
    """Tile of the forward kernel."""
    if are_few_queries(max_queries, max_keys):
        block_n = 64 if kind.operands == "half" and kind.size < 256 else 32
        stages = 1 if target.backend == "hip" or kind.operands != "half" else 3
        return AttentionConfig(4, stages, FEW_QUERIES, block_n, keys_per_split=KEYS_PER_SPLIT)
    default = attention_forward_default(kind, target)
    if not kind.equal or kind.gathers:  # see attention_backward_config
        return default
    return tuned_config(("attention_forward", *kind.words), target, default)


def can_specialize(kind: AttentionKind, target: Target) -> bool:
    """Whether there is a kernel with specialized warps, which only a table may ask for."""
    is_hopper = target.backend == "cuda" and target.arch == 90 and not target.interpreted
    is_simple = kind.operands == "half" and kind.equal and not kind.heavy
    return is_hopper and is_simple and 64 <= kind.dim <= 128


def attention_forward_default(kind: AttentionKind, target: Target) -> AttentionConfig:
    """Tile of the forward kernel where no table has an entry, or its kernel does not fit."""
    if target.backend == "hip":
        if kind.size == 256 or kind.operands != "half":
            return AttentionConfig(4, 1, 64, 32)
        return AttentionConfig(4, 1, 128 if kind.size == 64 else 64, 64)
    if kind.gathers:
        return _GATHERING[kind.operands, kind.size][0]
    if target.arch == 90 or kind.operands != "half":
        return _HOPPER_FORWARD[kind.operands, kind.size][kind.heavy]
    roomy = target.shared_memory > 160 * 1024
    if kind.size == 256:
        return AttentionConfig(8, 1, 64, 64 if roomy else 32)
    return AttentionConfig(8, 2 if roomy else 1, 128 if kind.size == 64 or roomy else 64, 64)


@cached_config
def attention_backward_config(kind: AttentionKind, target: Target) -> AttentionConfig:
    """Tile of both backward kernels; the one over queries swaps its two sides."""
    default = _attention_backward_default(kind, target)
    # Candidates are checked with equal head dims alone, and others have been wrong on a GPU with
    # configs that were right there. With a mask of pairs ptxas waits after each product of tiles
    # that are fine without.
    if not kind.equal or kind.masked or kind.gathers:
        return default
    return tuned_config(("attention_backward", *kind.words), target, default)


def _attention_backward_default(kind: AttentionKind, target: Target) -> AttentionConfig:
    if target.backend == "hip":
        small = kind.size > 64 or kind.operands != "half"
        return AttentionConfig(4, 1, 32 if small else 64, 32 if small else 64)
    if kind.gathers and (target.arch != 100 or kind.operands != "half"):
        return _GATHERING[kind.operands, kind.size][1]
    if target.arch == 90 or kind.operands != "half":
        config = _HOPPER_BACKWARD[kind.operands, kind.size][kind.heavy]
        if kind.causal and kind.operands == "half" and kind.size == 128:
            return replace(config, one_loop=True)
        return config
    roomy = target.shared_memory > 160 * 1024
    if kind.size == 256:
        return AttentionConfig(8, 1, 16 if not roomy else 32, 64, True, True)
    return AttentionConfig(8, 2 if kind.size == 64 and roomy else 1, 64 if roomy else 32, 64)


@cached_config
def few_queries_backward_config(
    kind: AttentionKind, target: Target, max_queries: int, max_keys: int, group: int
) -> AttentionConfig | None:
    """Tile of the backward that shares keys among programs; None: a program has all keys of dq.

    Not where position terms are gathered by bucket, whose attention has as many keys as queries;
    nor where ``group`` heads have so many queries at a key head that parts of dq, in float32, would
    take more memory than the keys.
    """
    # HMMA takes 32 keys. Of 64, whose products are HGMMA, fewer programs would load at a time.
    half = kind.operands == "half"
    large = kind.size == 256 and not half
    block_n = 16 if large and target.shared_memory <= 128 * 1024 else 32
    fits = 4 * max_queries * group <= (2 if half else 4) * block_n
    if kind.gathers or not fits or not are_few_queries(max_queries, max_keys):
        return None
    return AttentionConfig(8 if large else 4, 1, FEW_QUERIES, block_n, keys_per_split=block_n)


@cached_config
def attention_mask_gradient_config(kind: AttentionKind, target: Target) -> AttentionConfig:
    """Square tiles, no larger than the backward's longer side by default: tables are not asked."""
    config = _attention_backward_default(kind, target)
    side = min(max(config.block_m, config.block_n), 64 if kind.operands == "half" else 32)
    return AttentionConfig(config.num_warps, 1, side, side)


def attention_bucket_gradient_config(kind: AttentionKind, target: Target) -> AttentionConfig:
    """Square tiles of scores; block_n buckets of each row or column."""
    if target.backend == "hip":
        return AttentionConfig(4, 1, 32, 32 if kind.operands == "half" else 16)
    if kind.operands != "half":
        return AttentionConfig(8, 1, 16, 32)
    if kind.size == 256:
        return AttentionConfig(4, 1, 32, 32)
    return AttentionConfig(8, 1, 64, 64)
