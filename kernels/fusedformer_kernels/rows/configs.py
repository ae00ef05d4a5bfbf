"""Tile configs of row-wise and pairwise kernels: a function of shape, dtype and target.

Every choice here is read from the compile report (``python -m fusedformer compile-report``): no
spills on sm_90, shared memory within the architecture's limit. Nothing is tuned at run time; what
was tuned before is in the tables of :mod:`tuned`, which these functions ask.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from fusedformer_kernels.runtime.targets import (
    LaunchConfig,
    Target,
    TileConfig,
    ceil_div,
    next_power_of_2,
)
from fusedformer_kernels.runtime.tuned import cached_config, tuned_config


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
        chunk = CHUNK_BYTES
        if columns * max(itemsizes) <= 2 * chunk:
            chunk //= 2  # of two chunks there would be little to load ahead
        block_n = chunk // max(itemsizes)
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
    if heavy and tile.block_n == 1024:  # four warps spill
        tile = replace(tile, num_warps=8)
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
