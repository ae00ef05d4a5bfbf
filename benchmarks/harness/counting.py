"""Useful FLOPs and fewest bytes of each operation: what any implementation has to do.

Bytes: every input read once, every output written once. Statistics and other scratch that an
implementation chooses to keep are not counted. ``both`` (a training forward, then the backward)
counts what must be kept between the two once written and once read.

FLOPs: 2 for a multiply-add of a matrix product; for element-wise work one for each add, multiply,
compare, division or transcendental of the defining formula. Work on masked pairs is not useful.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """FLOPs and bytes of one call."""

    flops: int
    bytes: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes)

    def floor_us(self, copy_gb_s: float, matmul_tflop_s: float) -> float:
        """Give the time that no version can beat: of the bytes or of the products."""
        return max(self.times_us(copy_gb_s, matmul_tflop_s))

    def times_us(self, copy_gb_s: float, matmul_tflop_s: float) -> tuple[float, float]:
        """Give the microseconds to move the bytes, and to do the FLOPs, at these ceilings."""
        return self.bytes / copy_gb_s / 1e3, self.flops / matmul_tflop_s / 1e6


Costs = dict[str, Cost]


def softmax(rows: int, columns: int, itemsize: int) -> Costs:
    """Count softmax: forward reads x, writes y; backward reads dy and y, writes dx."""
    n = rows * columns
    forward = Cost(5 * n, 2 * n * itemsize)  # max, subtract, exp, sum, divide
    backward = Cost(4 * n, 3 * n * itemsize)  # y * dy, sum, subtract, multiply
    return {"forward": forward, "backward": backward, "both": forward + backward}


def layer_norm(
    rows: int,
    columns: int,
    itemsize: int,
    *,
    offset: bool = True,
    residual: bool = False,
    return_sum: bool = False,
    dropout: bool = False,
) -> Costs:
    """Count ``norm(dropout(x) + residual)``; without ``residual`` the plain norm of x.

    Forward reads x (and residual), writes y (and the sum, if returned). Backward reads dy (and the
    gradient of the sum) and the normalized input, writes dx; residual's gradient is the same tensor
    unless dropout sets them apart. A sum that isn't returned is one tensor more between the two.
    """
    n = rows * columns
    parameters = columns * (2 if offset else 1) * itemsize
    forward_tensors = 2 + residual + return_sum
    backward_tensors = 3 + return_sum + (residual and dropout)
    kept = residual and not return_sum
    forward = Cost((8 + residual + 2 * dropout) * n, forward_tensors * n * itemsize + parameters)
    # The gain is read, and the gradients of gain and offset are written.
    backward = Cost(
        (12 + dropout) * n, backward_tensors * n * itemsize + parameters + columns * itemsize
    )
    return {
        "forward": forward,
        "backward": backward,
        "both": forward + backward + Cost(0, kept * n * itemsize),
    }


def embedding(rows: int, columns: int, tables: Sequence[int], itemsize: int) -> Costs:
    """Forward reads a vector a token and the small tables, writes y. Backward reads dy and both
    again, and writes the gradients of all ``tables``, the largest first."""
    n, small = rows * columns, sum(tables[1:]) * columns * itemsize
    ids = 8 * rows * len(tables)
    forward = Cost(10 * n, 2 * n * itemsize + small + ids)
    written = sum(tables) * columns * itemsize
    backward = Cost(14 * n, 2 * n * itemsize + small + ids + written)
    return {"forward": forward, "backward": backward, "both": forward + backward}


def cross_entropy(rows: int, classes: int, itemsize: int) -> Costs:
    """Count the loss: forward reads logits and classes; backward reads them again, writes dx."""
    n, ids = rows * classes, 8 * rows
    forward = Cost(4 * n, n * itemsize + ids)  # max, subtract, exp, sum
    backward = Cost(3 * n, 2 * n * itemsize + ids)  # subtract, exp, multiply
    return {"forward": forward, "backward": backward, "both": forward + backward}


def linear_cross_entropy(
    rows: int, counted: int, classes: int, features: int, itemsize: int
) -> Costs:
    """Count the projection of the rows that count, one product, and two more in training.

    Forward reads those rows, all of the weight and the targets; a step also writes the gradients
    of both, of the rows all. The logits need not be moved.
    """
    product = 2 * counted * classes * features
    weight = classes * features * itemsize
    forward = Cost(product, counted * features * itemsize + weight + 8 * rows)
    both = Cost(3 * product, forward.bytes + rows * features * itemsize + weight)
    return {"forward": forward, "both": both}


def bias_activation(rows: int, columns: int, itemsize: int) -> Costs:
    """Forward reads x, writes y. Backward reads dy and x, writes dx and the bias gradient."""
    n = rows * columns
    forward = Cost(6 * n, 2 * n * itemsize + columns * itemsize)
    backward = Cost(12 * n, 3 * n * itemsize + 2 * columns * itemsize)
    return {"forward": forward, "backward": backward, "both": forward + backward}


def gated_activation(rows: int, columns: int, itemsize: int) -> Costs:
    """Forward reads x, twice as wide as y, which it writes. Backward reads dy, x, writes dx."""
    n = rows * columns
    forward = Cost(7 * n, 3 * n * itemsize + 2 * columns * itemsize)
    backward = Cost(14 * n, 5 * n * itemsize + 4 * columns * itemsize)
    return {"forward": forward, "backward": backward, "both": forward + backward}


def rotary(
    batch: int, heads: int, length: int, dim: int, itemsize: int, *, normed: bool = False
) -> Costs:
    """Count the rotation of queries and keys; both are read and written, with float32 tables.

    Backward does so with their gradients; behind a norm of heads it reads queries and keys again.
    """
    n = 2 * batch * heads * length * dim
    tables = length * dim * 4
    forward = Cost((3 + 4 * normed) * n, 2 * n * itemsize + tables)
    backward = Cost((3 + 9 * normed) * n, (2 + normed) * n * itemsize + tables)
    return {"forward": forward, "backward": backward, "both": forward + backward}


def scaled_sum(rows: int, columns: int, itemsize: int) -> Costs:
    """Forward reads x and residual, writes the sum. Backward reads its gradient and x, writes dx.

    Scale and bias are read both times, and backward writes their gradients.
    """
    n = rows * columns
    forward = Cost(3 * n, (3 * n + 2 * columns) * itemsize)
    backward = Cost(5 * n, (3 * n + 4 * columns) * itemsize)
    return {"forward": forward, "backward": backward, "both": forward + backward}


def contrastive(rows: int, dims: int, itemsize: int) -> Costs:
    """Count the loss over all pairs of two batches of ``rows`` embeddings.

    One product forward, three backward: the scores again, and the gradients of both sides. Forward
    reads both sides; backward reads them and writes their gradients, and reads what is kept of each
    row and column, 4 bytes.
    """
    product, side, kept = 2 * rows * rows * dims, rows * dims * itemsize, 2 * rows * 4
    forward = Cost(product, 2 * side)
    backward = Cost(3 * product, 4 * side + kept)
    return {
        "forward": forward,
        "backward": backward,
        "both": forward + backward + Cost(0, kept),
    }


def attention(
    batch: int,
    heads: int,
    length: int,
    dim: int,
    itemsize: int,
    *,
    keys: int | None = None,
    real_keys: int | None = None,
    pairs: int | None = None,
    mask_bytes: int = 0,
    bias_bytes: int = 0,
) -> Costs:
    """Count attention of ``length`` queries a sequence to ``keys`` keys, as many if None.

    ``pairs`` are the visible (query, key) pairs over batch and heads, ``real_keys`` the keys over
    the batch that any query sees; all if None. ``bias_bytes`` are those of what is added to the
    scores and gets a gradient.

    Two products forward, five backward (scores again, dP, dV, dK, dQ). Forward reads q, k, v,
    writes o. Backward reads those, do and the float32 log-sum-exp, writes dq, dk, dv. Of k and v
    only real keys are read; dk and dv are written whole.
    """
    keys = length if keys is None else keys
    real_keys = batch * keys if real_keys is None else real_keys
    pairs = batch * heads * length * keys if pairs is None else pairs
    row = heads * dim * itemsize
    q, k, k_read = batch * length * row, batch * keys * row, real_keys * row
    lse = batch * heads * length * 4
    product = 2 * pairs * dim
    forward = Cost(2 * product, 2 * q + 2 * k_read + mask_bytes + bias_bytes)
    backward = Cost(5 * product, 4 * q + 2 * k_read + 2 * k + lse + mask_bytes + 2 * bias_bytes)
    return {
        "forward": forward,
        "backward": backward,
        "both": forward + backward + Cost(0, lse),
    }


def disentangled(
    batch: int, heads: int, length: int, dim: int, buckets: int, itemsize: int, *, real_keys: int
) -> Costs:
    """Count attention with both position terms, ``buckets`` vectors a head for each.

    Besides :func:`attention`: a product of all queries with one table and of all keys with the
    other forward; backward both again, and two more for each. The tables are read, and their
    gradients written; the products themselves need not be in memory.
    """
    pairs = heads * length * real_keys
    own = attention(batch, heads, length, dim, itemsize, real_keys=real_keys, pairs=pairs)
    products = 2 * 2 * batch * heads * length * buckets * dim
    tables = 2 * heads * buckets * dim * itemsize
    forward = own["forward"] + Cost(products, tables)
    backward = own["backward"] + Cost(3 * products, 2 * tables)
    both = own["both"] + Cost(4 * products, 3 * tables)
    return {"forward": forward, "backward": backward, "both": both}


def encoder(
    lengths: Sequence[int],
    layers: int,
    width: int,
    heads: int,
    feedforward: int,
    itemsize: int,
    *,
    gated: bool = False,
    windows: Sequence[int | None] = (),
    causal: bool = False,
    head_dim: int | None = None,
    key_heads: int | None = None,
) -> Costs:
    """Count a stack of Transformer encoder layers over the real tokens of sequences.

    ``gated`` feed-forwards have three products; ``windows`` are how far to each side the layers
    see, all of it for None; ``causal`` ones see the tokens before. ``head_dim`` and ``key_heads``
    are those of models whose heads are wider than their share, and shared by queries.

    Bytes: weights and the tokens in and out; a lower bound, since no stack keeps a layer's
    activations on chip. A step also writes the weights' gradients; the optimizer isn't counted.
    """
    tokens = sum(lengths)
    head_dim, key_heads = head_dim or width // heads, key_heads or heads
    projections = 2 * (heads + key_heads) * head_dim * width
    weights = layers * (projections + (2 + gated) * width * feedforward)
    products = 2 * tokens * weights
    pairs = heads * sum(
        _pairs(length, window) for window in windows or [None] * layers for length in lengths
    )
    if causal:  # half of them, and each token's with itself
        pairs = (pairs + heads * layers * tokens) // 2
    scores = attention(1, 1, 1, head_dim, itemsize, pairs=pairs)["forward"].flops
    forward = Cost(products + scores, (weights + 2 * tokens * width) * itemsize)
    step = Cost(3 * products + scores * 7 // 2, forward.bytes + 2 * weights * itemsize)
    return {"forward": forward, "step": step}


def masked_lm(
    lengths: Sequence[int],
    labelled: Sequence[int],
    layers: int,
    width: int,
    heads: int,
    feedforward: int,
    classes: int,
    itemsize: int,
) -> Costs:
    """Count an encoder and the loss over its tied embeddings of the tokens with a label.

    Only of those the last layer has to compute more than keys and values, and the head anything.
    The lookup of embeddings isn't counted, nor is the optimizer.
    """
    tokens, counted = sum(lengths), sum(labelled)
    below = encoder(lengths, layers - 1, width, heads, feedforward, itemsize)
    # Queries, what follows attention, and the head's own layer.
    keys, others = 2 * width * width, 3 * width * width + 2 * width * feedforward
    products = 2 * (tokens * keys + counted * others)
    pairs = heads * sum(n * length for n, length in zip(labelled, lengths, strict=True))
    scores = attention(1, 1, 1, width // heads, itemsize, pairs=pairs)["forward"].flops
    weights = (keys + others) * itemsize
    loss = linear_cross_entropy(counted, counted, classes, width, itemsize)
    return {
        "forward": below["forward"] + Cost(products + scores, weights) + loss["forward"],
        "step": below["step"] + Cost(3 * products + scores * 7 // 2, 3 * weights) + loss["both"],
    }


def _pairs(length: int, window: int | None) -> int:
    """Count the queries and keys of one sequence that are at most ``window`` apart."""
    if window is None or window >= length:
        return length * length
    return length * (2 * window + 1) - window * (window + 1)
