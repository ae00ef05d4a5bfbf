"""Tile configs of attention: a function of head dims, dtype, features and target.

Every choice here is read from the compile report (``python -m fusedformer compile-report``): no
spills on sm_90, shared memory within the architecture's limit. Nothing is tuned at run time; what
was tuned before is in the tables of :mod:`tuned`, which these functions ask.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from fusedformer_kernels.runtime.targets import LaunchConfig, Target, next_power_of_2
from fusedformer_kernels.runtime.tuned import cached_config, tuned_config


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
    tma: bool = False  # of that one: copies by TMA where sequences end with tensors


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
    table: bool = False  # biases by distance, whose tiles are loaded ahead too
    crowded: bool = False  # more than two terms, or grouped heads

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
    ("half", 128): (AttentionConfig(8, 2, 64, 64), AttentionConfig(4, 3, 16, 64, True)),
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
    is_hopper = target.backend == "cuda" and target.arch == 90
    if is_hopper and kind.operands == "half" and kind.size == 128 and kind.table:
        return AttentionConfig(4, 3, 64, 32, True)  # of programs with 64 x 64 an SM holds one
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
    if kind.heavy and kind.crowded and int(target.arch) < 90:
        if kind.size == 64:
            return AttentionConfig(4, 2 if roomy else 1, 64, 32)
        return AttentionConfig(8, 2 if roomy else 1, 64, 64, True)
    return AttentionConfig(8, 2 if roomy else 1, 128 if kind.size == 64 or roomy else 64, 64)


@cached_config
def attention_backward_config(kind: AttentionKind, target: Target) -> AttentionConfig:
    """Tile of both backward kernels; the one over queries swaps its two sides."""
    default = _attention_backward_default(kind, target)
    # Candidates are checked with equal head dims alone, and others have been wrong on a GPU with
    # configs that were right there.
    if not kind.equal or kind.gathers:
        return default
    if kind.masked or kind.crowded:
        # ptxas waits after each product of a mask's tiles: with small ones, programs take turns.
        is_hopper = target.backend == "cuda" and target.arch == 90 and kind.operands == "half"
        if is_hopper and kind.size == 64 and kind.heavy:
            return AttentionConfig(4, 2, 32, 64, True)
        if kind.heavy or (is_hopper and kind.size == 128):
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
        if kind.crowded and kind.operands == "half" and kind.size == 128:
            return AttentionConfig(8 if kind.heavy else 4, 2 if kind.heavy else 3, 16, 64, True)
        if kind.causal and kind.operands == "half" and kind.size == 128:
            return replace(config, one_loop=True)
        return config
    roomy = target.shared_memory > 160 * 1024
    if kind.size == 256:
        return AttentionConfig(8, 1, 16 if not roomy else 32, 64, True, True)
    if kind.size == 64 and roomy and int(target.arch) < 90:
        return AttentionConfig(4, 2, 32, 64)
    if kind.crowded and kind.size == 128 and int(target.arch) < 90:
        return AttentionConfig(8, 1, 32, 64, True)
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
    half = kind.operands == "half"
    large = kind.size == 256 and not half
    block_n = 16 if large and target.shared_memory <= 128 * 1024 else 32
    warps = 8 if large else 4
    if half and target.backend == "cuda":
        # Fewer warps load an operand from shared memory fewer times. Two of them take HMMA for 64
        # keys too. The sums of grouped heads need more registers.
        if group > 1:
            warps = 4 if kind.size == 64 else 8
        elif kind.size < 256:
            warps, block_n = 2, 64 if kind.size == 64 else 32
    fits = 4 * max_queries * group <= (2 if half else 4) * block_n
    if kind.gathers or not fits or not are_few_queries(max_queries, max_keys):
        return None
    return AttentionConfig(warps, 1, FEW_QUERIES, block_n, keys_per_split=block_n)


@cached_config
def attention_square_config(kind: AttentionKind, target: Target) -> AttentionConfig:
    """Square tiles, no larger than the backward's longer side by default: tables are not asked."""
    config = _attention_backward_default(kind, target)
    side, warps = 64, config.num_warps
    if target.backend == "cuda":
        if kind.operands == "tf32" and kind.size > 64:
            side, warps = 16, 2
        elif kind.operands != "half":
            side = 32
        elif int(target.arch) < 90:
            side, warps = 32, 4 if kind.size == 64 else 8
        else:
            warps = 8
    side = min(max(config.block_m, config.block_n), side)
    return AttentionConfig(warps, 1, side, side)


@cached_config
def attention_term_gradient_config(kind: AttentionKind, target: Target) -> AttentionConfig:
    """Square tiles for gradients of terms, smaller where tiles of four tensors spill."""
    is_old = target.backend == "cuda" and int(target.arch) < 90
    if is_old and kind.operands == "half" and kind.size == 256:
        return AttentionConfig(4, 1, 16, 16)
    return attention_square_config(kind, target)


@cached_config
def attention_mask_gradient_config(
    kind: AttentionKind, target: Target, simple: bool
) -> AttentionConfig:
    """Square tiles; fewer warps and more stages where the compile report shows no spills."""
    config = attention_term_gradient_config(kind, target)
    if target.backend != "cuda" or target.arch != 90 or kind.operands != "half":
        return config
    if kind.size == 64 and simple:
        return AttentionConfig(4, 3, 64, 64)
    return replace(config, num_stages=2 if kind.size < 256 else 1)


@cached_config
def attention_table_gradient_config(
    kind: AttentionKind, target: Target, simple: bool
) -> AttentionConfig:
    """Square tiles. Four warps have registers for two more, their sum and the bias, where there is
    little besides."""
    config = attention_term_gradient_config(kind, target)
    if target.arch != 90 or kind.operands != "half" or kind.size == 256:
        return config
    if kind.size == 64 and simple:
        return AttentionConfig(4, 3, 64, 64)
    return replace(config, num_stages=2)


def attention_bucket_gradient_config(kind: AttentionKind, target: Target) -> AttentionConfig:
    """Square tiles of scores; block_n buckets of each row or column."""
    if target.backend == "hip":
        return AttentionConfig(4, 1, 32, 32 if kind.operands == "half" else 16)
    if kind.operands != "half":
        return AttentionConfig(8, 1, 16, 32)
    if kind.size == 256 or int(target.arch) < 90:
        return AttentionConfig(4, 1, 32, 32)
    return AttentionConfig(8, 1, 64, 64)
