"""Train two models side by side from the same state."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fusedformer._internal.text import table
from fusedformer.parity import calls
from fusedformer.parity.calls import Arguments

Loss = Callable[[nn.Module, Any], Tensor]
Gaps = dict[str, list[float]]


class TrainingReport:
    """The result of :func:`training`; ``str()`` of it is a table.

    Runs are named "baseline", "candidate" and "nudged 1", "nudged 2", ...: the baseline again with
    every weight moved by one rounding, which shows how far rounding alone takes a run.

    Attributes:
        losses: of each run, step by step.
        loss_gaps, gradient_gaps, weight_gaps: distances from the baseline step by step: of losses
            absolute, of gradients and weights relative in the Euclidean norm.
        limits: for "losses" and "weights" the largest distance that passes.
    """

    def __init__(self, losses: Gaps, gradient_gaps: Gaps, weight_gaps: Gaps, eps: float) -> None:
        self.losses = losses
        self.gradient_gaps = gradient_gaps
        self.weight_gaps = weight_gaps
        base = losses["baseline"]
        self.loss_gaps = {
            name: [abs(a - b) for a, b in zip(values, base, strict=True)]
            for name, values in losses.items()
            if name != "baseline"
        }
        largest = max(map(abs, base), default=0.0)
        self.limits = {
            "losses": 2 * _largest_nudge(self.loss_gaps) + 2 * eps * largest,
            "weights": 2 * _largest_nudge(weight_gaps) + 2 * eps,
        }

    @property
    def failures(self) -> tuple[str, ...]:
        """A line for what is over twice as far from the baseline as one rounding takes it."""
        found = []
        for name, gaps in (("losses", self.loss_gaps), ("weights", self.weight_gaps)):
            values, limit = gaps["candidate"], self.limits[name]
            worst = max(range(len(values)), key=lambda i: _finite(values[i]))
            if not values[worst] <= limit:
                found.append(
                    f"{name} after step {worst + 1}: {values[worst]:.3g} from the baseline's, "
                    f"{values[worst] / limit:.3g} times the limit ({limit:.3g})"
                )
        return tuple(found)

    @property
    def passed(self) -> bool:
        """Whether the candidate stays as near to the baseline as rounding lets it."""
        return not self.failures

    def as_dict(self) -> dict[str, Any]:
        """Return everything as JSON takes it."""
        return {
            "schema": 1, "torch": torch.__version__, "passed": self.passed,
            "failures": list(self.failures), "losses": self.losses, "limits": self.limits,
            "loss_gaps": self.loss_gaps, "gradient_gaps": self.gradient_gaps,
            "weight_gaps": self.weight_gaps,
        }  # fmt: skip

    def save(self, path: str | Path) -> None:
        """Write all figures as JSON."""
        Path(path).write_text(json.dumps(self.as_dict(), indent=1) + "\n")

    def plot(self, path: str | Path) -> None:
        """Draw loss curves and distances, as the file's ending says; needs matplotlib."""
        from fusedformer.parity import pages

        pages.curves(self).savefig(path)

    def __str__(self) -> str:
        steps = len(self.losses["baseline"])
        shown = sorted({*range(0, steps, max(1, steps // 10)), steps - 1}) if steps else []
        nudges = [name for name in self.loss_gaps if name != "candidate"]
        body = [
            [
                str(i + 1),
                f"{self.losses['baseline'][i]:.6g}",
                f"{self.losses['candidate'][i]:.6g}",
                *(
                    f"{value:.1e}"
                    for gaps in (self.loss_gaps, self.gradient_gaps, self.weight_gaps)
                    for value in (gaps["candidate"][i], max(gaps[n][i] for n in nudges))
                ),
            ]
            for i in shown
        ]
        head = ("step", "baseline", "candidate", "loss, distance", "of a rounding",
                "gradients", "of a rounding", "weights", "of a rounding")  # fmt: skip
        verdict = "PASS: " if self.passed else "FAIL: "
        lines = [f"FAILED {fault}" for fault in self.failures]
        lines.append(
            f"{verdict}{steps} steps, at most twice as far from the baseline as the baseline goes "
            f"when its weights are moved by one rounding"
        )
        return table(head, body, range(len(head))) + "\n\n" + "\n".join(lines)

    __repr__ = __str__


def training(
    candidate: nn.Module,
    baseline: nn.Module,
    batches: Iterable[Any],
    *,
    loss: Loss | None = None,
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] | None = None,
    nudges: int = 2,
    seed: int = 0,
) -> TrainingReport:
    """Train both from the same state on the same batches, and say how far they come apart.

    Training magnifies rounding, so no fixed tolerance fits. The yardstick is the baseline itself:
    it is trained again with every weight moved by one rounding, up or down at random. The
    candidate passes if it stays within twice the largest distance of those runs, plus two
    roundings, in losses and in weights. All are copies: the models given are left as they are.

    Args:
        candidate, baseline: with equal parameters, and no dropout.
        batches: one for each step, passed to ``loss``; without ``loss`` keyword arguments.
        loss: of a model and a batch, a scalar; None takes ``model(**batch).loss``.
        optimizer: of parameters; None takes ``torch.optim.AdamW`` with a rate of 1e-3.
        nudges: how many runs of the baseline with moved weights.
        seed: of the moves, and of the generator before each step.

    Raises:
        TypeError: a model is not a module.
        ValueError: parameters differ; a loss draws random numbers (dropout); no batches; no
            ``nudges``.
    """
    for name, model in (("candidate", candidate), ("baseline", baseline)):
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"training(): expected '{name}' to be a Module, but got {type(model).__name__}"
            )
    if nudges < 1:
        raise ValueError(f"training(): expected 'nudges' to be positive, but got {nudges}")
    calls.check_same_parameters("training", candidate, baseline)
    steps = list(batches)
    if not steps:
        raise ValueError("training(): expected at least one batch in 'batches'")
    loss_of = loss or (lambda model, batch: model(**batch).loss)
    for name, model in (("candidate", candidate), ("baseline", baseline)):
        first = functools.partial(loss_of, model, steps[0])
        calls.check_deterministic("training", name, first, Arguments((), {}))
    make = optimizer or (lambda parameters: torch.optim.AdamW(parameters, lr=1e-3))
    generator = torch.Generator().manual_seed(seed)
    runs = {"baseline": copy.deepcopy(baseline), "candidate": copy.deepcopy(candidate)}
    for i in range(1, nudges + 1):
        runs[f"nudged {i}"] = nudged(copy.deepcopy(baseline), generator)
    optimizers = {
        name: make([p for p in model.parameters() if p.requires_grad])
        for name, model in runs.items()
    }
    losses: Gaps = {name: [] for name in runs}
    gradients: Gaps = {name: [] for name in runs if name != "baseline"}
    weights: Gaps = {name: [] for name in runs if name != "baseline"}
    for number, batch in enumerate(steps):
        for name, model in runs.items():
            with torch.random.fork_rng():
                torch.manual_seed(seed + number)
                value = loss_of(model, batch)
                value.backward()
            losses[name].append(value.item())
        add_gaps(gradients, runs, lambda p: p.grad)
        for one in optimizers.values():
            one.step()
            one.zero_grad()
        add_gaps(weights, runs, lambda p: p.detach())
    eps = max(torch.finfo(p.dtype).eps for p in baseline.parameters())
    return TrainingReport(losses, gradients, weights, eps)


def nudged(model: nn.Module, generator: torch.Generator) -> nn.Module:
    """Move each element of each parameter to a neighbouring number; return ``model``."""
    with torch.no_grad():
        for parameter in model.parameters():
            up = torch.rand(parameter.shape, generator=generator).to(parameter.device) < 0.5
            towards = torch.full_like(parameter, torch.inf).where(up, -torch.inf)
            parameter.copy_(torch.nextafter(parameter, towards))
    return model


def add_gaps(
    gaps: Gaps, runs: dict[str, nn.Module], pick: Callable[[nn.Parameter], Tensor | None]
) -> None:
    """Append each run's relative distance from the baseline, over all picked tensors."""
    base = {n: pick(p) for n, p in runs["baseline"].named_parameters()}
    norm = sum(x.double().square().sum().item() for x in base.values() if x is not None) ** 0.5
    for name, values in gaps.items():
        squares = 0.0
        for key, parameter in runs[name].named_parameters():
            x, y = pick(parameter), base[key]
            if x is not None and y is not None:
                squares += (x.double() - y.double()).square().sum().item()
        values.append(squares**0.5 / norm if norm else 0.0)


def _largest_nudge(gaps: Gaps) -> float:
    return max((max(v) for name, v in gaps.items() if name != "candidate"), default=0.0)


def _finite(value: float) -> float:
    return value if value == value else float("inf")
