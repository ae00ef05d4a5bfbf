"""Choose the size of a chunk of logits, and compute its loss and its gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedformer.ops import cross_entropy_aten
from fusedformer.ops.product import product

# The most bytes of logits in memory at once. The CPU's allocator keeps blocks of up to 32 MiB;
# on larger ones each chunk would wait for the system to map pages.
_BYTES = {"cpu": 2**25, "cuda": 2**30}
# Each chunk reads and writes a float32 sum of C x D: the more rows, the less that costs.
_MOST_ROWS, _FEWEST_ROWS = 2048, 128


def gradients_in_forward(rows: int, features: int, dtype: torch.dtype, reduction: str) -> bool:
    """Decide whether the forward computes the gradients; a pure function of its arguments.

    In bfloat16 it does not where a float32 sum of C x D would take more than a quarter of the
    logits' memory, unless all rows fit into one chunk, which needs no sum.
    """
    if reduction == "none" or dtype == torch.float16:
        return False
    return dtype != torch.bfloat16 or rows <= features or rows >= 4 * features


def rows_at_once(
    rows: int, classes: int, features: int, dtype: torch.dtype, device: str, by_aten: bool
) -> int:
    """Choose the rows of a chunk: a share of all, within bounds; a pure function."""
    if dtype.itemsize == 2 and rows <= features:
        return max(rows, 1)
    bound = _BYTES.get(device, 2**30) // (classes * dtype.itemsize)
    return max(min(-(-rows // _chunks(device, by_aten)), bound, _MOST_ROWS), _FEWEST_ROWS)


def classes_at_once(rows: int, classes: int, dtype: torch.dtype, device: str, by_aten: bool) -> int:
    """Choose the classes of a block, a multiple of 64, by the same bounds; a pure function."""
    bound = _BYTES.get(device, 2**30) // (max(rows, 1) * dtype.itemsize)
    return max(min(-(-classes // _chunks(device, by_aten)), bound) // 64 * 64, 64)


def _chunks(device: str, by_aten: bool) -> int:
    """Return how many chunks the logits are cut into; ATen's need room for its own results."""
    return 8 if by_aten or device == "cpu" else 4


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of sums and statistics: at least float32."""
    return torch.promote_types(dtype, torch.float32)


class ChunkLoss(NamedTuple):
    """The settings of the loss of a row, and the steps that compute it, by kernels or by ATen.

    All chunks that go to the kernels share one buffer with aligned rows; the fastest product on
    the CPU allocates its result itself.
    """

    weight: Tensor | None
    weight_total: Tensor | None
    ignore_index: int
    label_smoothing: float
    triton: bool

    def buffer(self, rows: int, columns: int, like: Tensor) -> Tensor | None:
        """Allocate room for :meth:`logits` of at most ``rows`` and ``columns``, if kernels run."""
        if not self.triton:
            return None
        from fusedformer_kernels.rows.cross_entropy import padded_rows

        return padded_rows(rows, columns, like)

    def logits(
        self, x: Tensor, matrix: Tensor, bias: Tensor | None, buffer: Tensor | None
    ) -> Tensor:
        """Return ``x @ matrix.T + bias``, written to ``buffer`` if there is one."""
        if buffer is None:
            return product(x, matrix, bias)
        out = buffer[: x.shape[0], : matrix.shape[0]]
        if bias is None:
            return torch.mm(x, matrix.t(), out=out)
        return torch.addmm(bias, x, matrix.t(), out=out)

    def rows_loss(
        self,
        logits: Tensor,
        target: Tensor,
        factor: Tensor | None,
        first_class: int = 0,
        n_classes: int | None = None,
        state: Tensor | None = None,
    ) -> Any:
        """Return (losses, statistics) of rows; use them only after the last block of classes.

        With a ``factor``, ``logits`` are overwritten by their gradient.
        """
        given = logits, target, *self[:4], factor
        where: dict[str, Any] = {
            "first_class": first_class, "n_classes": n_classes or logits.shape[1], "state": state,
        }  # fmt: skip
        if not self.triton:
            return cross_entropy_aten.cross_entropy_rows_aten(*given, **where)
        from fusedformer_kernels.rows.cross_entropy import cross_entropy_rows

        return cross_entropy_rows(*given, **where, padded=True)

    def new_state(self, rows: int, like: Tensor) -> Tensor:
        """Allocate what :meth:`rows_loss` carries from block to block."""
        if not self.triton:
            return like.new_empty((cross_entropy_aten.STATE, rows), dtype=wide_dtype(like.dtype))
        from fusedformer_kernels.rows.cross_entropy import STATE

        return like.new_empty((STATE, rows), dtype=torch.float32)

    def gradient_(
        self,
        logits: Tensor,
        target: Tensor,
        statistics: Tensor,
        factor: Tensor,
        first_class: int,
        n_classes: int,
    ) -> None:
        """Overwrite the logits of a block of classes by their gradient."""
        given = (logits, target, self.weight, self.weight_total, statistics, factor,
                 self.ignore_index, self.label_smoothing)  # fmt: skip
        where: dict[str, Any] = {"first_class": first_class, "n_classes": n_classes}
        if self.triton:
            from fusedformer_kernels.rows.cross_entropy import cross_entropy_gradient

            cross_entropy_gradient(*given, **where, in_place=True)
        else:
            cross_entropy_aten.cross_entropy_gradient_aten(*given, **where)


def each_block(
    loss: ChunkLoss,
    x: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    use: Callable[[slice, Tensor, Tensor], None],
) -> None:
    """Call ``use(classes, rows of the weight, logits)`` for each block of classes."""
    classes = linear_weight.shape[0]
    step = classes_at_once(x.shape[0], classes, x.dtype, x.device.type, not loss.triton)
    buffer = loss.buffer(x.shape[0], min(step, classes), x)
    for first in range(0, classes, step):
        block = slice(first, min(first + step, classes))
        matrix = linear_weight[block].to(x.dtype)
        bias = None if linear_bias is None else linear_bias[block].to(x.dtype)
        use(block, matrix, loss.logits(x, matrix, bias, buffer))
