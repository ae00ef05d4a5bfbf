"""Run a model fused and as it was, and compare outputs and gradients at real positions."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from tests.fusion.small_models import padded
from torch import Tensor

from fusedformer.testing import compare_tensors

SIDES = "right", "left", "middle"


def told(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def run(model: Any, inputs: dict[str, Any], **kwargs: Any) -> dict[str, Tensor]:
    """Return every floating-point tensor of the output by name, with all generators seeded."""
    torch.manual_seed(0)
    _seed_numpy()
    return dict(_flattened("", model(**inputs, **kwargs)))


def _seed_numpy() -> None:
    import random

    import numpy

    numpy.random.seed(0)
    random.seed(0)


def _flattened(name: str, output: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(output, Tensor):
        if output.is_floating_point() and output.dim():
            yield name.strip("."), output
    elif hasattr(output, "items"):
        for key, value in output.items():
            if "past_key_values" not in str(key):
                yield from _flattened(f"{name}.{key}", value)
    elif isinstance(output, (tuple, list)):
        for i, value in enumerate(output):
            yield from _flattened(f"{name}.{i}", value)


def bits_of(model: Any, inputs: dict[str, Any]) -> dict[str, Tensor]:
    with torch.no_grad():
        return run(model, inputs)


class RealPositions:
    """The positions whose results in stock do not depend on what stands in the padding."""

    def __init__(self, model: Any, inputs: dict[str, Any]) -> None:
        mask = inputs.get("attention_mask")
        self.mask = None if mask is None else mask.bool()
        patches = inputs.get("pixel_attention_mask")
        self.patches = None if patches is None else patches.bool()
        self.steady: dict[str, Tensor] = {}
        if self.mask is not None and not bool(self.mask.all()) and "input_ids" in inputs:
            ids = inputs["input_ids"]
            other = {**inputs, "input_ids": torch.where(self.mask, ids, ids[0, -1:] - 1)}
            a, b = bits_of(model, inputs), bits_of(model, other)
            for name in a.keys() & b.keys():
                if a[name].shape == b[name].shape:
                    close = torch.isclose(a[name], b[name], 1e-4, 1e-6, equal_nan=True)
                    self.steady[name] = close.flatten(2).all(-1) if close.dim() > 2 else close

    def __call__(self, name: str, tensor: Tensor) -> Tensor:
        if self.patches is not None and tensor.shape[:2] == self.patches.shape:
            return tensor[self.patches]
        if self.mask is None or bool(self.mask.all()):
            return tensor
        if tensor.shape[:2] == self.mask.shape:
            return tensor[self.mask]
        if name.endswith("pooler_output") and tensor.shape[0] == self.mask.shape[0]:
            tensor = tensor[self.mask[:, 0]]  # of others the first position is padding
            steady = self.steady.get(name)
            return tensor if steady is None else tensor[steady[self.mask[:, 0]]]
        return tensor[self.steady[name]] if name in self.steady else tensor


def computable_cases(
    model: Any, inputs: dict[str, Any], notes: list[str]
) -> dict[str, dict[str, Any]]:
    """Return the inputs for which stock gives finite results, twice the same."""
    sides = SIDES if "attention_mask" in inputs and "input_ids" in inputs else ()
    tried = {**{side: padded(inputs, side) for side in sides}, "unpadded": inputs}
    found = {}
    for name, given in tried.items():
        try:
            first, again = bits_of(model, given), bits_of(model, given)
            real = RealPositions(model, given)
            finite = all(bool(real(n, x).isfinite().all()) for n, x in first.items())
        except TimeoutError:
            raise
        except Exception as error:
            notes.append(f"stock can't, {name}: {told(error)}")
            continue
        if not first:
            notes.append("its output has no floats")
        elif not finite:
            notes.append(f"stock isn't finite, {name}")
        elif not same_bits(first, again):
            notes.append("stock isn't the same twice")
        else:
            found[name] = given
    return found


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[n].shape == b[n].shape and bool(((a[n] == b[n]) | (a[n].isnan() & b[n].isnan())).all())
        for n in a
    )


def _judge(
    name: str, ours: Tensor, stock: Tensor, truth: Tensor | None, largest: float
) -> list[str]:
    """Judge by the project's criterion, loosened for tens of thousands of tensors drawn once.

    Chance alone makes errors up to sixteen times stock's, or up to float32's
    rounding of the largest tensor of a kind.
    """
    if ours.shape != stock.shape:
        return [f"{name}: shape {tuple(ours.shape)}, but stock has {tuple(stock.shape)}"]
    if truth is None:
        error = (ours - stock).abs().max().item() if ours.numel() else 0.0
        limit = 1e-4 * stock.abs().max().item() + 1e-6 * largest if ours.numel() else 0.0
        told = "stock (no float64)"
    else:
        found = compare_tensors(name, ours, stock, truth)
        if found.passed:
            return []
        error, told = found.error, "float64"
        limit = 16 * found.stock_error + 32 * torch.finfo(torch.float32).eps * largest
    if error <= limit:
        return []
    return [f"{name}: off by {error:.2g} of {largest:.2g} from {told}"]


def compare_all(
    ours: dict[str, Tensor], stock: dict[str, Tensor], truth: dict[str, Tensor] | None
) -> list[str]:
    if ours.keys() != stock.keys():
        return [f"other outputs: {sorted(ours.keys() ^ stock.keys())[:4]}"]
    largest = max((x.abs().max().item() for x in stock.values() if x.numel()), default=0.0)
    faults = []
    for name in stock:
        of_kind = largest
        if not name.startswith("grad of") and stock[name].numel():
            of_kind = stock[name].abs().max().item()
        true = None if truth is None else truth.get(name)
        faults += _judge(name, ours[name], stock[name], true, of_kind)
    return faults[:2] + ([f"and {len(faults) - 2} more"] if len(faults) > 2 else [])


def _gradients(model: Any, outputs: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    roots = {n: x for n, x in outputs.items() if x.requires_grad and x.numel()}
    dys = [torch.randn(x.shape, generator=draw).to(x) for x in roots.values()]
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(
        list(roots.values()), list(parameters.values()), dys, allow_unused=True
    )
    return {f"grad of {n}": g for n, g in zip(parameters, grads, strict=True) if g is not None}


def differences(model: Any, stock: Any, inputs: dict[str, Any], notes: list[str]) -> list[str]:
    """Compare outputs and gradients of all parameters, at real positions."""
    real = RealPositions(stock, inputs)

    def both(module: Any, given: dict[str, Any], backwards: bool) -> tuple[Any, Any]:
        outputs = {n: real(n, x) for n, x in run(module, given).items()}
        grads = _gradients(module, outputs, 1) if backwards else {}
        return {n: x.detach() for n, x in outputs.items()}, grads

    backwards = True
    try:
        wanted = both(stock, inputs, True)
    except TimeoutError:
        raise
    except Exception as error:
        notes.append(f"stock has no gradients: {told(error)}")
        backwards, wanted = False, both(stock, inputs, False)
    truth: Any = None, None
    try:
        wide = {n: x.double() if _is_float(x) else x for n, x in inputs.items()}
        with contextlib.redirect_stderr(None):
            truth = both(copy.deepcopy(stock).double(), wide, backwards)
        wide_ones = [x for kind in truth for x in kind.values()]
        if not all(x.dtype == torch.float64 and x.isfinite().all() for x in wide_ones):
            truth = None, None
    except TimeoutError:
        raise
    except Exception:
        truth = None, None
    if truth[0] is None:
        notes.append("stock doesn't run in float64")
    found = both(model, inputs, backwards)
    if not any(x.numel() for x in wanted[0].values()):
        return ["nothing to compare"]
    faults = []
    kinds = "outputs", "gradients"
    for kind, ours, theirs, true in zip(kinds, found, wanted, truth, strict=True):
        zeros = {n: torch.zeros_like(x) for n, x in theirs.items()}
        if not compare_all(zeros, theirs, true):  # stock is too far from float64 to be judged by it
            true = None
        faults += compare_all(ours, theirs, true)
        if zeros and not compare_all(zeros, theirs, true):
            faults.append(f"{kind} of zeros would pass")
    return faults


def _is_float(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()
