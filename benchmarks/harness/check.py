"""Every provider meets the parity criterion before it is timed; one that fails is not timed.

The criterion is :mod:`fusedformer.testing`'s. Truth and stock are computed once for a case, and
every provider is compared with them, on the inputs that are timed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fusedformer.testing import compare_tensors
from harness.case import Case, Inputs, Part, Program, Unsupported, whole


@dataclass(frozen=True)
class Verdict:
    """``timed`` with the largest error as a multiple of stock's, or why it will not be timed."""

    status: str
    reason: str = ""
    error_ratio: float | None = None


class Checker:
    """Compares programs with the float64 truth, with the reference's own error as yardstick."""

    def __init__(self, case: Case, reference: Program, truth: Program, inputs: Inputs) -> None:
        self.case = case
        self.inputs = inputs
        with torch.no_grad():
            shapes = reference.outputs(reference.own(inputs), reference.checked)
        self.grads = [torch.randn_like(reference.back("output", output)) for output in shapes]
        wide_inputs = _in_float64(inputs, case.part)
        wide_grads = [case.part(grad).double() for grad in self.grads]
        self.truth = _outputs(truth, wide_inputs, whole)
        self.truth |= _gradients(truth, wide_inputs, wide_grads, whole)
        self.baseline = _outputs(reference, inputs, case.part)
        self.baseline |= _gradients(reference, inputs, self.grads, case.part)

    def judge(self, program: Program) -> dict[str, Verdict]:
        """Give a verdict for each direction of the case: outputs for forward, else gradients."""
        if self.case.before is not None:
            self.case.before(program, self.inputs)
        found = _outputs(program, self.inputs, self.case.part)
        verdicts = dict.fromkeys(self.case.costs, self._verdict(found))
        others = [direction for direction in verdicts if direction != "forward"]
        if others and verdicts["forward"].status == "timed":
            try:
                found = _gradients(program, self.inputs, self.grads, self.case.part)
                verdict = self._verdict(found)
            except Exception as error:  # a peer may have a forward only
                reraise_if_device_is_lost(error)
                verdict = Verdict(*status_of(error))
            verdicts |= dict.fromkeys(others, verdict)
        return verdicts

    def _verdict(self, found: dict[str, Tensor]) -> Verdict:
        compared = []
        for name, tensor in found.items():
            stock = self.baseline[name]
            if tensor.dtype != stock.dtype:
                return Verdict("failed check", f"{name}: {tensor.dtype}, stock gives {stock.dtype}")
            compared.append(compare_tensors(name, tensor, stock, self.truth[name]))
        faults = "; ".join(c.fault for c in compared if not c.passed)
        ratio = max((c.ratio for c in compared), default=0.0)
        finite = ratio if math.isfinite(ratio) else None  # stock may be exact
        return Verdict("failed check" if faults else "timed", faults, finite)


def _outputs(program: Program, inputs: Inputs, part: Part) -> dict[str, Tensor]:
    """Compute the outputs by name, as ``forward`` is timed: no gradient is wanted."""
    if program.module is not None:
        program.module.eval()  # no dropout
    with torch.no_grad():
        outputs = program.outputs(program.own(inputs), program.checked)
    outputs = [program.back("output", output) for output in outputs]
    if any(not output.isfinite().all() for output in outputs):
        raise AssertionError("an output is not finite")
    return {f"output {i}": part(output) for i, output in enumerate(outputs)}


def _gradients(
    program: Program, inputs: Inputs, grads: list[Tensor], part: Part
) -> dict[str, Tensor]:
    """Compute the gradient of every input and parameter that wants one, by name."""
    inputs = program.own(inputs)
    leaves = program.leaves(inputs)
    if not leaves:
        return {}
    outputs = program.outputs(inputs, program.checked)
    if program.layout is not None:
        grads = [program.layout.own("output", grad) for grad in grads]
    computed = torch.autograd.grad(outputs, list(leaves.values()), grads)
    found = {name: program.back(name, g) for name, g in zip(leaves, computed, strict=True)}
    found = program.gradients(found)
    if any(not grad.isfinite().all() for grad in found.values()):
        raise AssertionError("a gradient is not finite")
    return {
        f"gradient of {name}": part(grad) if name in inputs else grad
        for name, grad in found.items()
    }


def _in_float64(inputs: Inputs, part: Part) -> Inputs:
    """Take the compared part of the inputs, floating-point ones as leaves in float64."""
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


def status_of(error: Exception) -> tuple[str, str]:
    """Say which status and reason a record gets for what a provider raised."""
    text = f"{type(error).__name__}: {error}".strip()[:2000]
    if isinstance(error, AssertionError):
        return "failed check", text
    declined = ("No available kernel", "No viable backend", "not supported", "NotImplementedError")
    if isinstance(error, Unsupported) or any(word in text for word in declined):
        return "unsupported", text
    return "error", text


def reraise_if_device_is_lost(error: Exception) -> None:
    """Raise a sticky CUDA error again: after it nothing in this process works."""
    sticky = ("illegal", "device-side assert", "launch failure", "misaligned address")
    if "CUDA error" in str(error) and any(word in str(error) for word in sticky):
        raise error
