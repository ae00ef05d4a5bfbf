"""Judge results by the parity criterion: as close to the truth as stock PyTorch, or not.

With ``truth`` the definition evaluated in float64 on the same inputs, ``e`` the largest error of
the candidate against it and ``b`` that of stock PyTorch in the same dtype, the candidate passes iff

    e <= 2 * b + 2 * eps(dtype) * max|truth|

and the same with root mean squares in place of the maxima; for every output and every gradient,
with random output gradients. No tolerance is typed in by hand.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

Function = Callable[..., Any]


_NOTHING = "this case proves nothing"


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
        """The candidate's error as a multiple of stock's; 1 where both are exact."""
        if self.stock_error == 0.0:
            return 1.0 if self.error == 0.0 else float("inf")
        return self.error / self.stock_error

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed, "ratio": self.ratio}


def compare_tensors(name: str, candidate: Tensor, stock: Tensor, truth: Tensor) -> Comparison:
    """Judge one tensor by the criterion.

    Args:
        name: what the tensor is, for messages.
        candidate: the result under test; its dtype sets eps, and is no coarser than stock's.
        stock: stock PyTorch's result. Elements that are not finite where the truth is never loosen
            the limit.
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
    eps = _eps(candidate.dtype)
    if eps > _eps(stock.dtype):
        return _unmeasured(name, dtype, f"{name}: {candidate.dtype}, but stock is {stock.dtype}")
    if truth.numel() == 0:
        return Comparison(name, dtype, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    c, s, t = candidate.detach().double(), stock.detach().double(), truth.detach().double()
    finite = t.isfinite()
    same = torch.where(finite, c.isfinite(), (c == t) | (c.isnan() & t.isnan()))
    if not bool(same.all()):
        where = _worst(~same)
        fault = f"{name}{where}: got {c[where].item()}, but the truth is {t[where].item()}"
        return _unmeasured(name, dtype, fault)
    t = torch.where(finite, t, 0.0)
    error = torch.where(finite, c - t, 0.0).abs()
    stock_error = torch.where(finite & s.isfinite(), s - t, 0.0).abs()
    largest, rms = t.abs().max().item(), _rms(t)
    e, b = error.max().item(), stock_error.max().item()
    rms_e, rms_b = _rms(error), _rms(stock_error)
    limit, rms_limit = 2 * b + 2 * eps * largest, 2 * rms_b + 2 * eps * rms
    fault = ""
    if largest > 0 and (limit >= largest or rms_limit >= rms):
        fault = (
            f"{name}: {_NOTHING}: an all-zero result would have max error {largest:.3g} (limit "
            f"{limit:.3g}) and RMS error {rms:.3g} (limit {rms_limit:.3g})"
        )
    elif e > limit or rms_e > rms_limit:
        where = _worst(error)
        over = max(_over(e, limit), _over(rms_e, rms_limit))
        fault = (
            f"{name}{where}: got {c[where].item():.9g}, stock {s[where].item():.9g}, truth "
            f"{t[where].item():.9g}: {over:.3g} times the limit: max error {e:.3g} (limit "
            f"{limit:.3g}; stock {b:.3g}), RMS error {rms_e:.3g} (limit {rms_limit:.3g}; stock "
            f"{rms_b:.3g})"
        )
    return Comparison(name, dtype, e, b, limit, rms_e, rms_b, rms_limit, largest, fault)


def _unmeasured(name: str, dtype: str, fault: str) -> Comparison:
    nan = float("nan")
    return Comparison(name, dtype, nan, nan, nan, nan, nan, nan, nan, fault)


def _eps(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps if dtype.is_floating_point else 0.0


def _over(error: float, limit: float) -> float:
    return error / limit if limit else float("inf") if error else 0.0


def _rms(tensor: Tensor) -> float:
    return tensor.square().mean().sqrt().item()


def _worst(score: Tensor) -> tuple[int, ...]:
    """Return the index of the largest element."""
    return tuple(int(i) for i in torch.unravel_index(score.double().argmax(), score.shape))


def parity(
    candidate: Function,
    stock: Function,
    reference: Function,
    inputs: Mapping[str, Any],
    *,
    dtype: torch.dtype | None = None,
    seed: int = 0x5EED,
) -> list[Comparison]:
    """Compare outputs and gradients of three functions on the same inputs.

    Args:
        candidate, stock, reference: called as ``f(**inputs)``; return a tensor or a sequence of
            tensors. ``reference`` gets float64 copies of all floating-point inputs.
        inputs: by name. Gradients are taken for those that require one. Every function gets its
            own copies, with the same strides and alignment: non-contiguous, expanded and
            overlapping tensors stay so. A candidate that writes to one is at fault.
        dtype: floating-point inputs are first rounded to it; None leaves them as they are.
        seed: of the random output gradients, the same for all three. Take another than that of
            the inputs: a gradient equal to the input vanishes in a norm.

    Returns:
        One :class:`Comparison` per output ("output 0", ...) and gradient ("grad of NAME"). A
        gradient that the candidate does not have counts as zero; one that stock does not have
        never loosens the limit.
    """
    rounded = {name: copied(value, dtype) for name, value in inputs.items()}
    arguments = [
        {name: copied(value, wide) for name, value in rounded.items()}
        for wide in (None, None, torch.float64)
    ]
    outputs = [
        _tensors(function(**own))
        for function, own in zip((candidate, stock, reference), arguments, strict=True)
    ]
    counts = [len(tensors) for tensors in outputs]
    if len(set(counts)) > 1:
        fault = "candidate, stock and reference return {}, {} and {} tensors".format(*counts)
        return [_unmeasured("outputs", "", f"outputs: {fault}")]
    results = [
        compare_tensors(f"output {i}", *tensors)
        for i, tensors in enumerate(zip(*outputs, strict=True))
    ]
    if all(c.shape == s.shape == t.shape for c, s, t in zip(*outputs, strict=True)):
        generator = torch.Generator().manual_seed(seed)
        drawn = [torch.randn(s.shape, generator=generator).to(s) for s in outputs[1]]
        missing = (0.0, float("nan"), 0.0)
        grads = [
            _gradients(tensors, drawn, own, none)
            for tensors, own, none in zip(outputs, arguments, missing, strict=True)
        ]
        results += [
            compare_tensors(f"grad of {name}", *(g[name] for g in grads)) for name in grads[2]
        ]
    for name, value in rounded.items():
        if isinstance(value, Tensor) and not _equal(value, arguments[0][name]):
            fault = f"input {name}: the candidate wrote to it"
            results.append(_unmeasured(f"input {name}", "", fault))
    return results


def assert_function_parity(
    candidate: Function,
    stock: Function,
    reference: Function,
    inputs: Mapping[str, Any],
    *,
    dtype: torch.dtype | None = None,
    seed: int = 0x5EED,
) -> list[Comparison]:
    """Raise unless every tensor that :func:`parity` compares passes.

    Raises:
        ParityError: names each tensor that fails, its worst element, the values, and how far over.
        ProvesNothingError: a case whose limit an all-zero result would meet.
    """
    comparisons = parity(candidate, stock, reference, inputs, dtype=dtype, seed=seed)
    faults = [c.fault for c in comparisons if c.fault]
    if faults:
        nothing = all(_NOTHING in fault for fault in faults)
        raise (ProvesNothingError if nothing else ParityError)("\n".join(faults))
    return comparisons


def copied(value: Any, dtype: torch.dtype | None) -> Any:
    """Copy a tensor to a new leaf of the same strides and alignment; floats to ``dtype``."""
    if not isinstance(value, Tensor):
        return value
    if dtype is None or not value.is_floating_point():
        dtype = value.dtype
    if value.numel() == 0:
        copy = torch.empty_strided(value.shape, value.stride(), dtype=dtype, device=value.device)
    else:  # copy the part of the storage that the strides span, from an aligned element on
        offset = value.storage_offset() % 16
        start = value.storage_offset() - offset
        last = sum((n - 1) * step for n, step in zip(value.shape, value.stride(), strict=True))
        flat = value.detach().as_strided((offset + last + 1,), (1,), start).to(dtype, copy=True)
        copy = flat.as_strided(value.shape, value.stride(), offset)
    return copy.requires_grad_(value.requires_grad)


def _tensors(result: Any) -> list[Tensor]:
    """List the tensors of a result; None is left out."""
    return [result] if isinstance(result, Tensor) else [t for t in result if t is not None]


def _gradients(
    outputs: Sequence[Tensor], drawn: Sequence[Tensor], inputs: Mapping[str, Any], missing: float
) -> dict[str, Tensor]:
    """Return the gradients of inputs by name, filled with ``missing`` where there is none."""
    wanted = {n: t for n, t in inputs.items() if isinstance(t, Tensor) and t.requires_grad}
    reached = [(o, g.to(o)) for o, g in zip(outputs, drawn, strict=True) if o.requires_grad]
    found: Sequence[Tensor | None] = [None] * len(wanted)
    if wanted and reached:
        roots, grads = zip(*reached, strict=True)
        found = torch.autograd.grad(roots, list(wanted.values()), grads, allow_unused=True)
    return {
        name: torch.full_like(tensor, missing) if grad is None else grad
        for (name, tensor), grad in zip(wanted.items(), found, strict=True)
    }


def _equal(a: Tensor, b: Tensor) -> bool:
    return bool(((a == b) | ((a != a) & (b != b))).all())
