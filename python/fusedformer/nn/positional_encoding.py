"""Encodings of position that are added to embeddings: sinusoidal and learned."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedformer._internal import checks
from fusedformer.errors import BadTypeError, BadValueError


class _PositionalEncoding(torch.nn.Module):
    """``dropout(x + weight[positions])`` for a table ``weight`` of ``[max_len, d_model]``."""

    weight: Tensor

    def __init__(self, d_model: int, max_len: int, dropout: float, batch_first: bool) -> None:
        function = type(self).__name__
        for name, value in (("d_model", d_model), ("max_len", max_len)):
            if value <= 0:
                raise BadValueError(
                    f"{function}(): expected '{name}' to be positive, but got {value}"
                )
        checks.check_probability(function, "dropout", dropout)
        super().__init__()
        self.d_model = d_model
        self.max_len = max_len
        self.dropout = dropout
        self.batch_first = batch_first

    def forward(self, input: Tensor, positions: Tensor | None = None) -> Tensor:
        """Add the encoding of each position, then drop elements while training.

        Args:
            input: ``[N, S, d_model]`` with ``batch_first``, else ``[S, N, d_model]``; unbatched
                or packed ``[S, d_model]``.
            positions: integers from 0 to ``max_len - 1`` that broadcast to ``input.shape[:-1]``;
                0, 1, ... along the sequence if None. For packed or left-padded sequences.

        Returns:
            Tensor of the shape and dtype of ``input``.

        Raises:
            TypeError: ``input`` is not floating-point; ``positions`` are not integers.
            ValueError: ``input`` is not 2-D or 3-D, does not end in ``d_model`` or is longer than
                ``max_len``; ``positions`` does not broadcast.
        """
        function = type(self).__name__
        checks.check_tensor(function, "input", input)
        checks.check_floating(function, "input", input)
        if input.dim() not in (2, 3) or input.shape[-1] != self.d_model:
            raise BadValueError(
                f"{function}(): expected 'input' to be 3-D (batched) or 2-D (unbatched) with a "
                f"last dimension of d_model={self.d_model}, but got shape {tuple(input.shape)}"
            )
        if positions is None:
            encoding = self._leading(input)
        else:
            self._check_positions(input, positions)
            encoding = F.embedding(positions, self.weight)
        return F.dropout(input + encoding.to(input.dtype), self.dropout, self.training)

    def _leading(self, input: Tensor) -> Tensor:
        """Return the first rows of the table, broadcastable to ``input``."""
        length = input.shape[1 if self.batch_first and input.dim() == 3 else 0]
        if length > self.max_len:
            raise BadValueError(
                f"{type(self).__name__}(): expected 'input' to have at most max_len="
                f"{self.max_len} positions, but got {length}"
            )
        rows = self.weight[:length]
        return rows if input.dim() == 2 or self.batch_first else rows[:, None]

    def _check_positions(self, input: Tensor, positions: Tensor) -> None:
        function = type(self).__name__
        checks.check_tensor(function, "positions", positions)
        if positions.dtype not in (torch.int32, torch.int64):
            raise BadTypeError(
                f"{function}(): expected 'positions' to be int32 or int64, "
                f"but got {positions.dtype}"
            )
        sizes = zip(reversed(positions.shape), reversed(input.shape[:-1]), strict=False)
        if positions.dim() >= input.dim() or any(have not in (1, want) for have, want in sizes):
            raise BadValueError(
                f"{function}(): expected 'positions' to broadcast to {tuple(input.shape[:-1])}, "
                f"but got shape {tuple(positions.shape)}"
            )

    def extra_repr(self) -> str:
        """Return sizes and settings, for ``repr``."""
        return (
            f"{self.d_model}, max_len={self.max_len}, dropout={self.dropout}, "
            f"batch_first={self.batch_first}"
        )


class SinusoidalPositionalEncoding(_PositionalEncoding):
    """Add sines to the even and cosines to the odd columns, then apply dropout.

    Column pair i of position t holds ``sin(t / 10000**(2i/d_model))`` and the cosine of the same
    angle. The table is a buffer: it follows ``.to()``, is not trained, and is not in the
    state_dict, since the constructor's arguments determine it.

    Args:
        d_model: width of the input; may be odd.
        max_len: longest sequence.
        dropout: probability that an element of the sum is dropped while training, in [0, 1].
        batch_first: input is ``[batch, length, width]`` rather than ``[length, batch, width]``.
        device, dtype: of the table.

    Raises:
        ValueError: a size that is not positive; ``dropout`` outside [0, 1].

    Source: Vaswani et al., Attention Is All You Need, arXiv:1706.03762, section 3.5.
    """

    def __init__(
        self,
        d_model: int,
        max_len: int = 5000,
        dropout: float = 0.1,
        batch_first: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(d_model, max_len, dropout, batch_first)
        table = torch.empty(max_len, d_model, device=device, dtype=dtype)
        self.register_buffer("weight", table, persistent=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Compute the table, also after ``to_empty`` of a module that was made on meta."""
        if self.weight.is_meta:
            return
        # In float64: float32 rounds an angle of some thousands by 1e-4 before its sine is taken.
        wide: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}
        columns = torch.arange(0, self.d_model, 2, **wide)
        angles = torch.arange(self.max_len, **wide)[:, None] / 10000.0 ** (columns / self.d_model)
        self.weight[:, 0::2] = angles.sin().to(self.weight)
        self.weight[:, 1::2] = angles[:, : self.d_model // 2].cos().to(self.weight)


class LearnedPositionalEncoding(_PositionalEncoding):
    """Add a trained vector for each position, then apply dropout.

    Args:
        d_model: width of the input.
        max_len: longest sequence, the number of vectors in the parameter ``weight``
            ``[max_len, d_model]``, drawn from a normal distribution of deviation 0.02.
        dropout: probability that an element of the sum is dropped while training, in [0, 1].
        batch_first: input is ``[batch, length, width]`` rather than ``[length, batch, width]``.
        device, dtype: of the parameter.

    Raises:
        ValueError: a size that is not positive; ``dropout`` outside [0, 1].

    Source: Devlin et al., BERT, arXiv:1810.04805 (positions and deviation).
    """

    def __init__(
        self,
        d_model: int,
        max_len: int = 512,
        dropout: float = 0.1,
        batch_first: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(d_model, max_len, dropout, batch_first)
        self.weight = torch.nn.Parameter(torch.empty(max_len, d_model, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the vectors anew."""
        torch.nn.init.normal_(self.weight, std=0.02)
