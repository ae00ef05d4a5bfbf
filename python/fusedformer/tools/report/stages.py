"""Measure stage by stage what the report shows, as one JSON document."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch

from fusedformer.tools import measure
from fusedformer.tools.report import accuracy
from fusedformer.tools.report.corpus import Passage, stdlib_passages
from fusedformer.tools.report.minilm import Batch, MiniLM

DTYPES = (torch.float32, torch.bfloat16)
Advance = Callable[[], None]


@dataclass(frozen=True)
class Plan:
    """How much to measure.

    Attributes:
        passages, batch: number of passages, in all and in a batch.
        layer_passages: number of passages whose hidden states are compared at every depth.
        gradient_passages, gradient_tokens: number of passages whose gradients are compared, and
            of tokens to which they are cut.
        step_passages: size of the batch whose training step is timed, and its peak memory.
        forward_seconds, step_seconds: time for timing, at least one round over the batches.
    """

    passages: int = 256
    batch: int = 32
    layer_passages: int = 8
    gradient_passages: int = 8
    gradient_tokens: int = 64
    step_passages: int = 16
    forward_seconds: float = 10.0
    step_seconds: float = 15.0


QUICK = Plan(passages=64, step_passages=8, forward_seconds=4.0, step_seconds=4.0)


class Watcher(Protocol):
    """Receives the progress of stages."""

    def stage(self, name: str, steps: int | None) -> AbstractContextManager[Advance]:
        """Open a stage of ``steps`` steps (None: unknown); yield what to call after each."""


class Stopwatch:
    """Runs stages, and keeps the seconds that each took."""

    def __init__(self, watcher: Watcher) -> None:
        self.watcher = watcher
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str, steps: int | None) -> Iterator[Advance]:
        start = time.perf_counter()
        with self.watcher.stage(name, steps) as advance:
            yield advance
        self.seconds[name] = time.perf_counter() - start


def measure_model(plan: Plan, device: torch.device, watch: Stopwatch) -> dict[str, Any]:
    """Measure the model; return ``{"corpus": ..., "dtypes": {"float32": ..., ...}}``."""
    with watch.stage("Read text and weights", 2) as advance:
        passages = stdlib_passages(plan.passages)
        advance()
        minilm = MiniLM()
        ids = minilm.tokenize([passage.text for passage in passages])
        advance()
    batches = minilm.batches(ids, plan.batch, device)
    return {
        "corpus": _corpus(passages, ids, batches, plan),
        "dtypes": {
            _name(dtype): _measure_dtype(minilm, ids, dtype, plan, device, watch)
            for dtype in DTYPES
        },
    }


def _corpus(
    passages: list[Passage], ids: list[list[int]], batches: list[Batch], plan: Plan
) -> dict[str, Any]:
    lengths = [len(tokens) for tokens in ids]
    slots = sum(batch.input_ids.numel() for batch in batches)
    return {
        "passages": len(passages),
        "batch": plan.batch,
        "names": [passage.name for passage in passages],
        "tokens": lengths,
        "mean_tokens": sum(lengths) / len(lengths),
        "max_tokens": max(lengths),
        "padded_lengths": [batch.input_ids.shape[1] for batch in batches],
        "padding_share": 1 - sum(lengths) / slots,
    }


def _measure_dtype(
    minilm: MiniLM,
    ids: list[list[int]],
    dtype: torch.dtype,
    plan: Plan,
    device: torch.device,
    watch: Stopwatch,
) -> dict[str, Any]:
    name = _name(dtype)
    batches = minilm.batches(ids, plan.batch, device)
    models = {"stock": minilm.stock(dtype, device), "fused": minilm.fused(dtype, device)}
    truth = minilm.truth(dtype, device)

    # Sorted by length, which computes less padding and gives the same truth.
    sorted_batches = minilm.batches(ids, plan.batch, device, by_length=True)
    with watch.stage(f"{name}: float64 truth", len(batches)) as advance:
        right = accuracy.embed(truth, sorted_batches, advance)

    def first(passages: int) -> Batch:
        return minilm.batches(ids[:passages], passages, device)[0]

    with watch.stage(f"{name}: errors by layer", None):
        layers = accuracy.layer_report(models, truth, first(plan.layer_passages))
    with watch.stage(f"{name}: errors of gradients", None):
        cut = [tokens[: plan.gradient_tokens] for tokens in ids[: plan.gradient_passages]]
        batch = minilm.batches(cut, len(cut), device)[0]
        gradients = accuracy.gradient_report(models, truth, batch)
    del truth

    with watch.stage(f"{name}: embeddings, forward time", len(batches)) as advance:
        forward, embeddings = _time_forward(models, batches, plan, device, advance)
    batch = first(plan.step_passages)
    with watch.stage(f"{name}: peak memory", None):
        memory = _peak_memory(models, batch, device)
    with watch.stage(f"{name}: forward + backward time", None):
        step = _time_step(models, batch, plan, device)
    return {
        **accuracy.embedding_report(embeddings, right),
        "layers": layers,
        "layer_passages": plan.layer_passages,
        "gradients": gradients,
        "forward": forward,
        "step": step,
        "peak_memory_bytes": memory,
        "step_batch": list(batch.input_ids.shape),
    }


def _time_forward(
    models: accuracy.Models,
    batches: list[Batch],
    plan: Plan,
    device: torch.device,
    advance: Advance,
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    rows: dict[str, dict[int, torch.Tensor]] = {name: {} for name in models}

    def call(name: str, index: int) -> None:
        rows[name][index] = accuracy.embedding(models[name], batches[index])

    with torch.no_grad():
        for model in models.values():
            accuracy.embedding(model, _warm_up(batches[0]))
        calls = {n: [partial(call, n, i) for i in range(len(batches))] for n in models}
        samples = measure.interleaved(calls, plan.forward_seconds, device, advance)
    embeddings = {
        name: accuracy.in_order([kept[i].cpu() for i in range(len(batches))], batches)
        for name, kept in rows.items()
    }
    return measure.summary(samples), embeddings


def _time_step(
    models: accuracy.Models, batch: Batch, plan: Plan, device: torch.device
) -> dict[str, Any]:
    """Time steps, after :func:`_peak_memory` has warmed up."""
    calls = {name: [partial(_step, model, batch)] for name, model in models.items()}
    return measure.summary(measure.interleaved(calls, plan.step_seconds, device))


def _warm_up(batch: Batch) -> Batch:
    """Run a few passages, so that kernels are compiled before anything is timed."""
    return Batch(batch.input_ids[:4], batch.attention_mask[:4], batch.index[:4])


def _step(model: torch.nn.Module, batch: Batch) -> None:
    """Run forward and backward as in training, dropout included; then free the gradients."""
    model.train()
    embeddings = accuracy.embedding(model, batch)
    torch.autograd.backward(embeddings, torch.ones_like(embeddings))
    model.zero_grad(set_to_none=True)
    model.eval()


def _peak_memory(
    models: accuracy.Models, batch: Batch, device: torch.device
) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {"forward": {}, "step": {}}
    for name, model in models.items():
        with torch.no_grad():
            call = partial(accuracy.embedding, model, batch)
            found["forward"][name] = measure.peak_memory(call, device)
        found["step"][name] = measure.peak_memory(partial(_step, model, batch), device)
    return found


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
