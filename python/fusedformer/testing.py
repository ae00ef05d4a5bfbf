"""The parity criterion, in one place: is a fused op as close to the truth as stock PyTorch is?

With ``truth`` the definition evaluated in float64 on the same inputs, ``e`` the largest error of
the candidate against it and ``b`` that of stock PyTorch in the same dtype, the candidate passes iff

    e <= 2 * b + 2 * eps(dtype) * max|truth|

and the same with root mean squares in place of the maxima; for every output and every gradient,
with random output gradients. No tolerance is typed in by hand.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

Function = Callable[..., Any]


class ParityError(AssertionError):
    """A candidate is further from the truth than the criterion allows."""


class ProvesNothingError(ParityError):
    """An all-zero result would pass this case, so that passing it shows nothing."""


@dataclass(frozen=True)
class Comparison:
    """One output or gradient of the candidate beside stock's, both against the truth."""

    name: str
    dtype: str
    error: float  # max |candidate - truth|
    stock_error: float
    limit: float
    rms_error: float
    stock_rms_error: float
    rms_limit: float
    largest: float  # max |truth|
    fault: str = ""

    @property
    def passed(self) -> bool:
        return not self.fault

    @property
    def ratio(self) -> float:
        """Candidate's error as a multiple of stock's, 1 where both are exact."""
        if self.stock_error == 0.0:
            return 1.0 if self.error == 0.0 else float("inf")
        return self.error / self.stock_error

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed, "ratio": self.ratio}


def compare(name: str, candidate: Tensor, stock: Tensor, truth: Tensor) -> Comparison:
    """Judge one tensor by the criterion.

    Args:
        name: what the tensor is, for messages.
        candidate: the result under test; its dtype sets eps.
        stock: stock PyTorch's result in the same dtype.
        truth: the definition's result in float64.

    Non-finite values must stand where the truth has them, and be the same ones. A case whose limit
    even zeros would meet is a fault of the case (see :class:`ProvesNothingError`), unless the truth
    is exactly zero everywhere.
    """
    dtype = str(candidate.dtype).removeprefix("torch.")
    if candidate.shape != truth.shape or stock.shape != truth.shape:
        fault = (
            f"{name}: shape {tuple(candidate.shape)} (stock {tuple(stock.shape)}), "
            f"but the truth has {tuple(truth.shape)}"
        )
        return _unmeasured(name, dtype, fault)
    if truth.numel() == 0:
        return Comparison(name, dtype, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    eps = torch.finfo(candidate.dtype).eps
    c, s, t = candidate.detach().double(), stock.detach().double(), truth.detach().double()
    finite = t.isfinite()
    same = torch.where(finite, c.isfinite(), (c == t) | (c.isnan() & t.isnan()))
    if not bool(same.all()):
        where = _worst(~same)
        fault = f"{name}{where}: got {c[where].item()}, but the truth is {t[where].item()}"
        return _unmeasured(name, dtype, fault)
    t = torch.where(finite, t, 0.0)
    error = torch.where(finite, c - t, 0.0).abs()
    stock_error = torch.where(finite, s - t, 0.0).nan_to_num(torch.inf).abs()
    largest, rms = t.abs().max().item(), _rms(t)
    e, b = error.max().item(), stock_error.max().item()
    rms_e, rms_b = _rms(error), _rms(stock_error)
    limit, rms_limit = 2 * b + 2 * eps * largest, 2 * rms_b + 2 * eps * rms
    fault = ""
    if largest > 0 and (limit >= largest or rms_limit >= rms):
        fault = (
            f"{name}: this case proves nothing: the limit is {limit:.3g}, and an all-zero result "
            f"would be off by {largest:.3g}"
        )
    elif e > limit or rms_e > rms_limit:
        where = _worst(error)
        fault = (
            f"{name}{where}: got {c[where].item():.9g}, stock {s[where].item():.9g}, truth "
            f"{t[where].item():.9g}: max error {e:.3g} (limit {limit:.3g}, over by "
            f"{e / limit if limit else float('inf'):.3g}x; stock {b:.3g}), RMS error {rms_e:.3g} "
            f"(limit {rms_limit:.3g}; stock {rms_b:.3g})"
        )
    return Comparison(name, dtype, e, b, limit, rms_e, rms_b, rms_limit, largest, fault)


def _unmeasured(name: str, dtype: str, fault: str) -> Comparison:
    nan = float("nan")
    return Comparison(name, dtype, nan, nan, nan, nan, nan, nan, nan, fault)


def _rms(tensor: Tensor) -> float:
    return tensor.square().mean().sqrt().item()


def _worst(score: Tensor) -> tuple[int, ...]:
    """Index of the largest element."""
    return tuple(int(i) for i in torch.unravel_index(score.double().argmax(), score.shape))


def parity(
    candidate: Function,
    stock: Function,
    reference: Function,
    inputs: Mapping[str, Any],
    *,
    dtype: torch.dtype | None = None,
    seed: int = 0,
) -> list[Comparison]:
    """Compare outputs and gradients of three functions on the same inputs.

    Args:
        candidate, stock, reference: called as ``f(**inputs)``; return a tensor or a sequence of
            tensors. ``reference`` gets float64 copies of all floating-point inputs.
        inputs: by name. Gradients are taken for those that require one. Layouts are preserved:
            non-contiguous and expanded tensors stay so.
        dtype: floating-point inputs are first rounded to it; None leaves them as they are.
        seed: of the random output gradients, the same for all three.

    Returns:
        One :class:`Comparison` per output ("output 0", ...) and gradient ("grad of NAME").
    """
    rounded = {name: _converted(value, dtype) for name, value in inputs.items()}
    wide = {name: _converted(value, torch.float64) for name, value in rounded.items()}
    runs: list[dict[str, Tensor]] = []
    output_grads: list[Tensor | None] = []
    for function, arguments in ((candidate, rounded), (stock, rounded), (reference, wide)):
        arguments = {name: _leaf(value) for name, value in arguments.items()}
        outputs = function(**arguments)
        outputs = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
        if not runs:
            output_grads = _random_grads(outputs, seed)
        runs.append(_with_gradients(outputs, output_grads, arguments))
    names = list(runs[2])
    return [compare(name, *(run[name] for run in runs)) for name in names]


def assert_parity(
    candidate: Function,
    stock: Function,
    reference: Function,
    inputs: Mapping[str, Any],
    *,
    dtype: torch.dtype | None = None,
    seed: int = 0,
) -> list[Comparison]:
    """:func:`parity`, raising for what fails.

    Raises:
        ParityError: names each tensor that fails, its worst element, the values, and how far over.
        ProvesNothingError: a case whose limit an all-zero result would meet.
    """
    comparisons = parity(candidate, stock, reference, inputs, dtype=dtype, seed=seed)
    faults = [c.fault for c in comparisons if c.fault]
    if faults:
        nothing = all("proves nothing" in fault for fault in faults)
        raise (ProvesNothingError if nothing else ParityError)("\n".join(faults))
    return comparisons


def _converted(value: Any, dtype: torch.dtype | None) -> Any:
    """A floating-point tensor in ``dtype`` with the same strides; anything else as it is."""
    if not isinstance(value, Tensor) or not value.is_floating_point() or dtype is None:
        return value
    if value.dtype == dtype:
        return value
    slim = value.detach()
    for dim, (size, stride) in enumerate(zip(value.shape, value.stride(), strict=True)):
        if stride == 0 and size > 1:
            slim = slim.narrow(dim, 0, 1)
    copy = torch.empty_strided(slim.shape, slim.stride(), dtype=dtype, device=value.device)
    return copy.copy_(slim).expand(value.shape).requires_grad_(value.requires_grad)


def _leaf(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.detach().requires_grad_(value.requires_grad)


def _random_grads(outputs: Sequence[Tensor], seed: int) -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(o.shape, generator=generator).to(o) if o.requires_grad else None
        for o in outputs
    ]


def _with_gradients(
    outputs: Sequence[Tensor], output_grads: Sequence[Tensor | None], inputs: Mapping[str, Any]
) -> dict[str, Tensor]:
    results = {f"output {i}": o for i, o in enumerate(outputs)}
    wanted = {n: t for n, t in inputs.items() if isinstance(t, Tensor) and t.requires_grad}
    reached = [(o, g.to(o)) for o, g in zip(outputs, output_grads, strict=True) if g is not None]
    if wanted and reached:
        grads = torch.autograd.grad(
            [o for o, _ in reached], list(wanted.values()), [g for _, g in reached],
            allow_unused=True,
        )  # fmt: skip
        for (name, tensor), grad in zip(wanted.items(), grads, strict=True):
            results[f"grad of {name}"] = torch.zeros_like(tensor) if grad is None else grad
    return results


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Make ``torch.empty`` and its kin return NaN (integers: their maximum) instead of leftovers.

    What a kernel forgets to write then shows. Built on torch's own deterministic mode.
    """
    was_on = torch.are_deterministic_algorithms_enabled()
    was_warn = torch.is_deterministic_algorithms_warn_only_enabled()
    settings: Any = torch.utils.deterministic
    was_filling = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was_on, warn_only=was_warn)
        settings.fill_uninitialized_memory = was_filling
