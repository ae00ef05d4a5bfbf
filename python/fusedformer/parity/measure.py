"""Measure one tensor of a candidate and of a baseline, both against the truth."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from fusedformer.parity.criterion import Comparison, compare_tensors


@dataclass(frozen=True)
class Measured:
    """The errors of a tensor, and whether they pass.

    Attributes:
        kind: "output", "gradient" or "submodule".
        name: of the tensor, by its place in what was returned, or of the parameter or module.
        shape: of the compared tensor, which has real positions alone if ``where`` was given.
        comparison: largest and RMS errors, the limits, and the verdict of the criterion.
        max_ulp, baseline_max_ulp: largest error in units in the last place of the truth there,
            taken as no smaller than eps times the largest truth.
        cosine_loss, baseline_cosine_loss: 1 - cosine with the truth, without cancellation.
        worst: index of the element with the largest error.
        judged: whether the truth stands above the baseline's own rounding; else passing shows
            nothing, as for the bias of attention's keys, whose true gradient is 0.
    """

    kind: str
    name: str
    shape: tuple[int, ...]
    comparison: Comparison
    max_ulp: float
    baseline_max_ulp: float
    cosine_loss: float
    baseline_cosine_loss: float
    worst: tuple[int, ...]
    judged: bool

    @property
    def passed(self) -> bool:
        """Whether it meets the criterion, or cannot be judged."""
        return self.comparison.passed or not self.judged

    @property
    def drifts(self) -> bool:
        """Whether the RMS error alone is over its limit: single elements can be luck."""
        return self.judged and not self.comparison.rms_error <= self.comparison.rms_limit

    def as_dict(self) -> dict[str, Any]:
        """Return everything as JSON takes it."""
        own = {n: v for n, v in asdict(self).items() if n != "comparison"}
        return {**self.comparison.as_dict(), **own, "passed": self.passed}


def measured(kind: str, name: str, candidate: Tensor, baseline: Tensor, truth: Tensor) -> Measured:
    """Measure one tensor."""
    found = compare_tensors(name, candidate, baseline, truth)
    nan = float("nan")
    if candidate.shape != truth.shape or baseline.shape != truth.shape:
        return Measured(kind, name, tuple(truth.shape), found, nan, nan, nan, nan, (), True)
    judged = not (kind != "output" and found.error <= found.limit and found.largest <= found.limit)
    if truth.numel() == 0:
        return Measured(kind, name, tuple(truth.shape), found, 0.0, 0.0, 0.0, 0.0, (), judged)
    c, b, t = (x.detach().double() for x in (candidate, baseline, truth))
    unit = _unit_in_the_last_place(t, candidate.dtype)
    error, own = (c - t).abs(), (b - t).abs()
    worst = torch.unravel_index(error.nan_to_num(torch.inf).argmax(), error.shape)
    return Measured(
        kind,
        name,
        tuple(truth.shape),
        found,
        (error / unit).max().item(),
        (own / unit).max().item(),
        cosine_loss(c, t),
        cosine_loss(b, t),
        tuple(int(i) for i in worst),
        judged,
    )


def cosine_loss(a: Tensor, b: Tensor) -> float:
    """Compute ``1 - cos(a, b)`` in float64, as half the squared chord: nothing cancels."""
    norms = a.norm().item(), b.norm().item()
    if 0.0 in norms:
        return 0.0 if norms == (0.0, 0.0) else 1.0
    chord = a / norms[0] - b / norms[1]
    return float(0.5 * chord.square().sum().item())


def _unit_in_the_last_place(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the distance of neighbouring numbers of ``dtype`` at ``x``, in float64."""
    info = torch.finfo(dtype)
    size = x.abs().nan_to_num(1.0, posinf=1.0)
    least = max(info.eps * size.max().item(), info.tiny)
    exponent = torch.frexp(size.clamp(min=least)).exponent
    return torch.ldexp(torch.full_like(x, info.eps), exponent - 1)
