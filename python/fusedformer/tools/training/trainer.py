"""Train so that a run can stop at any step, and resume with the same bits."""

from __future__ import annotations

import contextlib
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fusedformer.parity.trained import Gaps, TrainingReport, add_gaps, nudged
from fusedformer.tools.training.tasks import Task, moved

OURS, STOCK, NUDGED = "fusedformer", "stock", "stock, nudged"
# By the names of a training report.
_ROLES = {OURS: "candidate", STOCK: "baseline", NUDGED: "nudged 1"}
_WARMUP = 0.1  # share of the steps
_LARGEST_NORM = 1.0  # of all gradients together
_SKIPPED = 3  # steps not timed, since they allocate buffers


@dataclass
class Run:
    """One model in training, with the loss and the seconds of each step."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def state(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return {
            "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
            "losses": self.losses, "seconds": self.seconds,
        }  # fmt: skip

    def load(self, state: dict[str, Any]) -> None:
        """Load what :meth:`state` returned."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.losses, self.seconds = list(state["losses"]), list(state["seconds"])

    def milliseconds(self) -> dict[str, float]:
        """The median, 20th and 80th percentile of steps, without the first ones if there are more.

        Forward, backward and the optimizer's step; not the making of batches.
        """
        counted = self.seconds[_SKIPPED:] or self.seconds
        if len(counted) == 1:
            counted = counted * 2
        ends = statistics.quantiles(counted, n=5, method="inclusive")
        times = {"median": statistics.median(counted), "p20": ends[0], "p80": ends[3]}
        return {name: 1e3 * value for name, value in times.items()}


class Trainer:
    """Trains the model of a task, and with ``settings.stock`` two of torch's modules beside it.

    All start from the same weights, but those of one stock model are moved by one rounding: how far
    the two stock models part is the effect of rounding, by which the difference of ours is judged.

    A step depends on weights, optimizer and its number alone: batches, masks and dropout are drawn
    by generators that are seeded with the number.
    """

    def __init__(self, task: Task, device: torch.device) -> None:
        settings = task.settings
        self.task, self.device, self.settings = task, device, settings
        torch.manual_seed(settings.seed)
        models = {OURS: task.model()}
        if settings.stock:
            generator = torch.Generator().manual_seed(settings.seed)
            for name in (STOCK, NUDGED):
                models[name] = task.stock_model()
                models[name].load_state_dict(models[OURS].state_dict())
            nudged(models[NUDGED], generator)
        self.runs = {name: self._run(model.to(device)) for name, model in models.items()}
        self.gaps: dict[str, Gaps] = {
            kind: {role: [] for name, role in _ROLES.items() if name in models and name != STOCK}
            for kind in ("gradients", "weights")
        }
        self.evaluations: list[dict[str, float]] = []
        self.tokens: list[int] = []
        self._epoch, self._done, self._batches = 0, 0, task.batches(0)

    def _run(self, model: nn.Module) -> Run:
        return Run(model.train(), adamw(model.parameters(), self.settings.lr))

    @property
    def steps_done(self) -> int:
        """The number of steps done."""
        return len(self.tokens)

    @property
    def model(self) -> Any:
        """This library's model."""
        return self.runs[OURS].model

    def step(self) -> float:
        """Take a step with all models on the same batch; return the loss of ours."""
        number = self.steps_done
        if self._done == len(self._batches):
            self._epoch, self._done = self._epoch + 1, 0
            self._batches = self.task.batches(self._epoch)
        samples = self._batches[self._done]
        generator = torch.Generator().manual_seed(hash((self.settings.seed, number)))
        batch = moved(self.task.batch(samples, generator), self.model)
        for run in self.runs.values():
            torch.manual_seed(hash((self.settings.seed, number, 1)))
            with self._timed(run), self._autocast():
                loss = run.model.loss(**batch)  # type: ignore[operator]
                loss.backward()
                clip(run.optimizer)
            run.losses.append(loss.item())
        self._compare("gradients", lambda p: p.grad)
        for run in self.runs.values():
            set_rate(run.optimizer, self.settings.lr, number, self.settings.steps)
            with self._timed(run, again=True):
                run.optimizer.step()
            run.optimizer.zero_grad()
        self._compare("weights", lambda p: p.detach())
        self._done += 1
        self.tokens.append(int(batch["attention_mask"].sum()))
        return self.runs[OURS].losses[-1]

    def _compare(self, kind: str, of: Callable[[nn.Parameter], Any]) -> None:
        if self.settings.stock:
            add_gaps(self.gaps[kind], {_ROLES[n]: run.model for n, run in self.runs.items()}, of)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.amp)

    @contextlib.contextmanager
    def _timed(self, run: Run, again: bool = False) -> Iterator[None]:
        """Time a step of ``run``, or with ``again`` add to the time of its last one."""
        self._wait()
        start = time.perf_counter()
        yield
        self._wait()
        took = time.perf_counter() - start
        if again:
            run.seconds[-1] += took
        else:
            run.seconds.append(took)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def evaluate(self) -> dict[str, float]:
        """Evaluate on held-out text, and keep the result with the number of the step."""
        self.model.eval()
        with torch.random.fork_rng(), self._autocast():
            found = {"step": self.steps_done, **self.task.evaluate(self.model)}
        self.model.train()
        self.evaluations.append(found)
        return found

    def check_finite(self) -> None:
        """Raise ``ValueError`` if a loss of the last step or evaluation is not finite."""
        last = {f"loss of {name}": run.losses[-1] for name, run in self.runs.items()}
        if self.evaluations:
            last["held-out loss"] = self.evaluations[-1]["loss"]
        for name, value in last.items():
            if not math.isfinite(value):
                raise ValueError(
                    f"the {name} is {value} after step {self.steps_done}: try a smaller --lr"
                )

    def report(self) -> TrainingReport | None:
        """Compare our loss curve with stock's; None without stock."""
        if not self.settings.stock:
            return None
        losses = {_ROLES[name]: run.losses for name, run in self.runs.items()}
        eps = torch.finfo(torch.bfloat16 if self.settings.amp else torch.float32).eps
        return TrainingReport(losses, self.gaps["gradients"], self.gaps["weights"], eps)

    def tokens_per_second(self) -> float:
        """Tokens a second of our model's median step; padding is not counted."""
        seconds = self.runs[OURS].seconds
        rates = [n / time for n, time in zip(self.tokens, seconds, strict=True)]
        return statistics.median(rates[_SKIPPED:] or rates)

    def save(self, path: Path, **others: Any) -> None:
        """Write a checkpoint so that an interruption leaves the one before it."""
        state = {
            "settings": asdict(self.settings), "tokens": self.tokens, "gaps": self.gaps,
            "evaluations": self.evaluations, "reached": (self._epoch, self._done),
            "runs": {name: run.state() for name, run in self.runs.items()}, **others,
        }  # fmt: skip
        part = path.with_name(path.name + ".part")
        with part.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)

    def load(self, state: dict[str, Any]) -> None:
        """Load what :meth:`save` wrote for the same settings and task."""
        for name, run in self.runs.items():
            run.load(state["runs"][name])
        self.tokens, self.evaluations = state["tokens"], state["evaluations"]
        self.gaps = state["gaps"]
        self._epoch, self._done = state["reached"]
        self._batches = self.task.batches(self._epoch)


def adamw(parameters: Iterable[nn.Parameter], rate: float) -> torch.optim.AdamW:
    """Make the optimizer of every training here."""
    return torch.optim.AdamW(parameters, rate, betas=(0.9, 0.98), fused=True)


def set_rate(optimizer: torch.optim.Optimizer, largest: float, step: int, steps: int) -> None:
    """Raise the rate for a tenth of the steps, then lower it to a tenth of the largest."""
    warmup = max(1, round(_WARMUP * steps))
    if step < warmup:
        share = (step + 1) / warmup
    else:
        share = 1.0 - 0.9 * (step - warmup) / max(1, steps - warmup)
    for group in optimizer.param_groups:
        group["lr"] = largest * share


def clip(optimizer: torch.optim.Optimizer) -> None:
    """Bound the norm of the gradients of all that ``optimizer`` trains."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    nn.utils.clip_grad_norm_(parameters, _LARGEST_NORM)


def descend(optimizer: torch.optim.Optimizer, loss: Tensor) -> float:
    """Take a step down ``loss``; return its value after waiting for the device."""
    loss.backward()  # type: ignore[no-untyped-call]
    clip(optimizer)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read what :meth:`Trainer.save` wrote, to the CPU.

    Raises:
        ValueError: there is no file, or it is not a checkpoint.
    """
    if not path.exists():
        raise ValueError(f"expected a checkpoint, but there is no {path}")
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu")
        complete = state.keys() >= {"settings", "runs", "tokens", "text", "tokenizer"}
    except Exception as error:  # a damaged file may raise anything
        raise ValueError(f"expected {path} to be a checkpoint: {error!r}") from None
    if not complete:
        raise ValueError(f"expected {path} to be a checkpoint of 'pretrain', but it is not")
    return state
