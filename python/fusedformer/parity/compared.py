"""Compare a candidate with a baseline: every output, every gradient, every submodule."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fusedformer.parity import calls, submodules
from fusedformer.parity.calls import Arguments
from fusedformer.parity.criterion import Function, ParityError
from fusedformer.parity.measure import Measured, measured
from fusedformer.parity.tables import report_text

_LARGE = 2**16  # elements; gradients of smaller tensors are judged over several draws


class ParityReport:
    """The result of :func:`compare`; ``str()`` of it is a table.

    Attributes:
        rows: a :class:`Measured` for every output and gradient, and every submodule in the order
            in which they finish.
        faults: what could not be measured: a missing output, an input that was written to.
        not_called: submodules that the baseline calls and the candidate does not: they are fused
            into what is above them, and judged there.
    """

    def __init__(
        self,
        rows: Iterable[Measured],
        faults: Iterable[str] = (),
        not_called: Iterable[str] = (),
        names: tuple[str, str] = ("candidate", "baseline"),
    ) -> None:
        self.rows = tuple(rows)
        self.faults = tuple(faults)
        self.not_called = tuple(not_called)
        self.names = names

    @property
    def failures(self) -> tuple[str, ...]:
        """A line for each tensor that fails: index, values, and how far over the limit."""
        judged = [row for row in self.rows if row.kind != "submodule"]
        return (*self.faults, *(row.comparison.fault for row in judged if not row.passed))

    @property
    def passed(self) -> bool:
        """Whether every output and gradient meets the criterion; submodules only explain."""
        return not self.failures

    @property
    def first_drift(self) -> Measured | None:
        """The first submodule whose RMS error grew beyond the baseline's, by the criterion."""
        return next((row for row in self.of("submodule") if row.drifts), None)

    def of(self, kind: str) -> list[Measured]:
        """Return the rows of a kind: "output", "gradient" or "submodule"."""
        return [row for row in self.rows if row.kind == kind]

    def as_dict(self) -> dict[str, Any]:
        """Return everything as JSON takes it."""
        drift = self.first_drift
        return {
            "schema": 1, "torch": torch.__version__, "passed": self.passed,
            "names": list(self.names), "first_drift": drift and drift.name,
            "faults": list(self.faults), "not_called": list(self.not_called),
            "rows": [row.as_dict() for row in self.rows],
        }  # fmt: skip

    def save(self, path: str | Path) -> None:
        """Write all figures as JSON."""
        Path(path).write_text(json.dumps(self.as_dict(), indent=1) + "\n")

    def plot(self, path: str | Path) -> None:
        """Draw how errors grow with depth, in the format that the file's ending names.

        Raises:
            ModuleNotFoundError: matplotlib is not installed.
            ValueError: there are no submodules.
        """
        from fusedformer.parity import pages

        pages.growth(self).savefig(path)

    def html(self, path: str | Path) -> None:
        """Write one page without further files, with the picture if matplotlib is installed."""
        from fusedformer.parity import pages

        Path(path).write_text(pages.report_page(self), encoding="utf-8")

    def __str__(self) -> str:
        return report_text(self)

    __repr__ = __str__


def compare(
    candidate: Function,
    baseline: Function,
    inputs: Any,
    *,
    truth: Function | str = "float64",
    where: Tensor | None = None,
    gradients: bool = True,
    each_submodule: bool = True,
    seed: int = 0x5EED,
    draws: int = 8,
) -> ParityReport:
    """Compare two functions, or two modules of the same parameters, against float64.

    A tensor passes iff the candidate's largest error is at most twice the baseline's plus two
    roundings of the largest truth, and its RMS error likewise: see
    :mod:`fusedformer.parity.criterion`.

    Args:
        candidate: under test: a function or a module.
        baseline: what it replaces, whose own error is the yardstick.
        inputs: a tensor, a sequence of positional or a mapping of keyword arguments; each call
            gets copies. Gradients are taken for those that require one, and for parameters.
        truth: "float64", which is the baseline in float64 on the same inputs; or a function or a
            module that takes float64.
        where: boolean ``[N, S]``, True = real token: other positions of outputs and submodules
            are undefined; they are not compared, and get no gradient. Packed ``[tokens, *]`` and
            ``[1, tokens, *]`` are compared with the real rows of ``[N, S, *]``.
        gradients: compare them, for random gradients of all outputs.
        each_submodule: compare the outputs of all submodules too, if both are modules.
        seed: of the random gradients of the outputs.
        draws: how many draws of the outputs' gradients small tensors are judged over, since the
            largest error of a few elements is luck.

    Raises:
        TypeError: something is not callable; ``inputs`` is neither tensor, sequence nor mapping.
        ValueError: parameters differ; a call draws random numbers (dropout in training); ``truth``
            is another word than "float64"; ``draws`` is not positive.
    """
    calls.check_callable("compare", candidate=candidate, baseline=baseline)
    if draws < 1:
        raise ValueError(f"compare(): expected 'draws' to be positive, but got {draws}")
    calls.check_same_parameters("compare", candidate, baseline)
    given = Arguments.of("compare", inputs)
    exact = calls.truth_function(baseline, truth, "compare")
    for name, one in (("candidate", candidate), ("baseline", baseline)):
        calls.check_deterministic("compare", name, one, given)
    functions = candidate, baseline, exact
    arguments = [given.copied(), given.copied(), given.copied(torch.float64)]
    with torch.set_grad_enabled(gradients):
        found = [calls.call(one, own) for one, own in zip(functions, arguments, strict=True)]
    rows: list[Measured] = []
    faults = _overwritten_inputs(given, arguments[0])
    for name in found[2]:
        if name not in found[0] or name not in found[1]:
            faults.append(
                f"{name}: the truth has it, but not the "
                f"{'baseline' if name in found[0] else 'candidate'}"
            )
            continue
        tensors = [real_rows(outputs[name], where) for outputs in found]
        rows.append(measured("output", name, *tensors))
    measurable = not any(math.isnan(row.comparison.error) for row in rows)  # shapes agree
    if gradients and measurable and not faults:
        rows += _gradients(functions, arguments, found, where, seed, draws)
    not_called: list[str] = []
    modules = [one for one in functions if isinstance(one, nn.Module)]
    if each_submodule and len(modules) == 3:
        more, not_called = _submodules(modules, given, where)
        rows += more
    names = tuple(map(_name_of, (candidate, baseline)))
    if names[0] == names[1]:
        names = "candidate", "baseline"
    return ParityReport(rows, faults, not_called, (names[0], names[1]))


def assert_parity(candidate: Function, baseline: Function, inputs: Any, **settings: Any) -> None:
    """Raise unless all outputs and gradients that :func:`compare` measures pass.

    Raises:
        ParityError: names each tensor that fails, its worst element, the values, and how far over
            the limit it is; for two modules also the first submodule that drifts.
        TypeError, ValueError: as :func:`compare`.
    """
    report = compare(candidate, baseline, inputs, **{"each_submodule": False, **settings})
    if report.passed:
        return
    lines = list(report.failures)
    if isinstance(candidate, nn.Module) and isinstance(baseline, nn.Module):
        drift = compare(
            candidate, baseline, inputs, **{**settings, "each_submodule": True, "gradients": False}
        ).first_drift
        if drift is not None:
            lines.append(f"the first submodule that drifts is {drift.name}")
    raise ParityError("\n".join(lines))


def real_rows(tensor: Tensor, where: Tensor | None) -> Tensor:
    """Return the rows of real tokens ``[tokens, *]`` of a padded or packed tensor, else all."""
    if where is None or tensor.dim() < 2:
        return tensor
    if tensor.shape[:2] == where.shape:
        return tensor[where.to(tensor.device)]
    count = int(where.sum())
    rows = tensor[0] if tensor.shape[0] == 1 else tensor
    # Packed rows may be rounded up to a multiple of 16.
    return rows[:count] if count <= rows.shape[0] < count + 16 else tensor


def _gradients(
    functions: Sequence[Function],
    arguments: Sequence[Arguments],
    found: Sequence[Mapping[str, Tensor]],
    where: Tensor | None,
    seed: int,
    draws: int,
) -> list[Measured]:
    leaves = [
        {**calls.parameters(one), **own.leaves()}
        for one, own in zip(functions, arguments, strict=True)
    ]
    names = [n for n in leaves[2] if all(n in one for one in leaves)]
    outputs = [n for n in found[2] if all(one[n].requires_grad for one in found)]
    if not names or not outputs:
        return []
    generator = torch.Generator().manual_seed(seed)
    stacks: list[dict[str, list[Tensor]]] = [{}, {}, {}]
    for draw in range(draws):
        wanted = [n for n in names if not draw or leaves[2][n].numel() < _LARGE]
        if not wanted:
            break
        dys = {n: _random_gradient(found[1][n], where, generator) for n in outputs}
        for one, own, stack in zip(found, leaves, stacks, strict=True):
            grads = torch.autograd.grad(
                [one[n] for n in outputs],
                [own[n] for n in wanted],
                [dys[n].to(one[n]) for n in outputs],
                allow_unused=True,
                retain_graph=draw + 1 < draws,
            )
            for name, grad in zip(wanted, grads, strict=True):
                value = torch.zeros_like(own[name]) if grad is None else grad
                stack.setdefault(name, []).append(value)
    rows = []
    for name in names:
        tensors = [torch.stack(stack[name]) for stack in stacks]
        if not any(bool(x.any()) for x in tensors):
            continue  # the parameter is not used
        several = len(tensors[0]) > 1
        label = f"{name} ({len(tensors[0])} draws)" if several else name
        rows.append(measured("gradient", label, *(x if several else x[0] for x in tensors)))
    return rows


def _random_gradient(output: Tensor, where: Tensor | None, generator: torch.Generator) -> Tensor:
    drawn = torch.randn(output.shape, generator=generator).to(output)
    if where is not None and output.shape[:2] == where.shape:
        drawn[~where.to(drawn.device)] = 0.0
    return drawn


def _overwritten_inputs(given: Arguments, own: Arguments) -> list[str]:
    before, after = given.named(), own.named()
    return [
        f"{name}: the candidate wrote to it"
        for name, value in before.items()
        if isinstance(value, Tensor)
        and not torch.equal(value.detach().nan_to_num(), after[name].detach().nan_to_num())
    ]


def _submodules(
    models: Sequence[nn.Module], given: Arguments, where: Tensor | None
) -> tuple[list[Measured], list[str]]:
    """Measure submodules, in the order in which the truth's finish; name those not called."""
    wide = given.copied(torch.float64)
    place = {name: i for i, name in enumerate(submodules.order_of_calls(models[2], wide))}
    rows: list[Measured] = []
    not_called: list[str] = []
    for level in submodules.levels(models[2]):
        seen = [
            submodules.outputs_of(model, level, own)
            for model, own in zip(models, (given.copied(), given.copied(), wide), strict=True)
        ]
        for name in seen[2]:
            if name not in seen[1]:
                continue
            if name not in seen[0]:
                not_called.append(name)
                continue
            tensors = [real_rows(one[name], where) for one in seen]
            if len({t.shape for t in tensors}) == 1:
                rows.append(measured("submodule", name, *tensors))
    rows.sort(key=lambda row: place.get(row.name, len(place)))
    return rows, sorted(not_called, key=lambda name: place.get(name, len(place)))


def _name_of(called: Function) -> str:
    if isinstance(called, nn.Module):
        return type(called).__name__
    name: str = getattr(called, "__qualname__", "function")
    return name
