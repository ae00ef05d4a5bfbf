"""Every provider meets the parity criterion before it is timed; one that fails is not timed."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from harness.case import Case, Inputs, Part, Program, whole


def _parity(candidate: Tensor, baseline: Tensor, truth: Tensor) -> tuple[bool, float, str]:
    ours = (candidate.double() - truth).abs().max().item()
    stock = (baseline.double() - truth).abs().max().item()
    limit = 2 * stock + 2 * torch.finfo(candidate.dtype).eps * truth.abs().max().item()
    return ours <= limit, ours / limit, f"error {ours:.3g}, limit {limit:.3g}"


@dataclass(frozen=True)
class Verdict:
    """``timed`` with the error as a multiple of stock's, or why it will not be timed."""

    status: str
    reason: str = ""
    error_ratio: float | None = None


class Checker:
    """Compares programs with the float64 truth, with the reference's own error as yardstick."""

    def __init__(self, case: Case, reference: Program, truth: Program, inputs: Inputs) -> None:
        self.case = case
        self.inputs = inputs
        with torch.no_grad():
            shapes = reference.outputs(inputs, reference.checked)
        self.grads = [torch.randn_like(output) for output in shapes]
        wide_grads = [case.part(grad).double() for grad in self.grads]
        self.truth = self._run(truth, _in_float64(inputs, case.part), wide_grads, whole)
        self.baseline = self._run(reference, inputs, self.grads, case.part)

    def judge(self, program: Program) -> dict[str, Verdict]:
        """A verdict for each direction of the case: outputs for forward, gradients for the rest."""
        if self.case.before is not None:
            self.case.before(program, self.inputs)
        found = self._run(program, self.inputs, self.grads, self.case.part)
        verdicts = {}
        for direction in self.case.costs:
            names = [n for n in found if (direction == "forward") == n.startswith("output")]
            verdicts[direction] = self._verdict(found, names)
        return verdicts

    def _verdict(self, found: dict[str, Tensor], names: list[str]) -> Verdict:
        ratio = 0.0
        for name in names:
            within, one, message = _parity(found[name], self.baseline[name], self.truth[name])
            if not within:
                return Verdict("failed check", f"{name}: {message}", one)
            ratio = max(ratio, one)
        return Verdict("timed", error_ratio=ratio)

    def _run(
        self, program: Program, inputs: Inputs, grads: list[Tensor], part: Part
    ) -> dict[str, Tensor]:
        """The outputs as they are timed (no gradient wanted), and every gradient, by name."""
        if program.module is not None:
            program.module.eval()  # no dropout
        with torch.no_grad():
            outputs = program.outputs(inputs, program.checked)
        named = {f"output {i}": part(output) for i, output in enumerate(outputs)}
        if any(not output.isfinite().all() for output in outputs):
            raise AssertionError("an output is not finite")
        leaves = program.leaves(inputs)
        if any(direction != "forward" for direction in self.case.costs):
            outputs = program.outputs(inputs, program.checked)
            found = torch.autograd.grad(outputs, list(leaves.values()), grads)
            named |= {
                f"gradient of {name}": part(grad) if name in inputs else grad
                for name, grad in zip(leaves, found, strict=True)
            }
        return {name: tensor.detach() for name, tensor in named.items()}


def _in_float64(inputs: Inputs, part: Part) -> Inputs:
    """The compared part of the inputs; floating-point ones in float64, as leaves of their own."""
    wide = {}
    for name, value in inputs.items():
        value = part(value.detach())
        if value.is_floating_point():
            value = value.double().requires_grad_(inputs[name].requires_grad)
        wide[name] = value
    return wide


def check_kept_share(share: float, draws: int, p: float) -> None:
    """Raise unless ``share`` of ``draws`` independent draws is 1 - p within six sigma."""
    bound = 6.0 * math.sqrt(p * (1.0 - p) / draws)
    if not abs(share - (1.0 - p)) <= bound:
        raise AssertionError(f"dropout kept {share:.6f}, expected {1.0 - p} within {bound:.2g}")
