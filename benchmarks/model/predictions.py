"""Predicted times of the benchmark's cases on an H200: ``python benchmarks/model/predictions.py``.

Nothing is run: what the library would launch is recorded and compiled for sm_90, and
``fusedformer_kernels.compiler.prediction`` reads the machine code. ``--write`` puts the
table into ``tables/predictions.md``. Some minutes on a laptop, as every kernel is compiled once.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "kernels"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "python"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fusedformer import functional as F
from fusedformer._internal import backend as backends
from fusedformer_kernels.compiler.ahead_of_time import compile_launch
from fusedformer_kernels.compiler.prediction import GPU, Prediction, predict
from fusedformer_kernels.rows.contrastive import BACKWARD_ROWS
from fusedformer_kernels.runtime.launch import Launch, recorded_launches
from fusedformer_kernels.runtime.targets import TARGETS, assume_target
from harness.case import Case, Sizes
from model import TABLES, page

PREDICTED = ("softmax", "norm", "activation", "embedding", "steps", "losses", "attention")
TARGET = TARGETS["sm_90"]
PRODUCTS = 790e12  # FLOP/s of a large bfloat16 product, measured on an H200
HEAD = "| suite | case | direction | µs | of the floor | longest kernel, what it waits for |"


class Untouched(TorchDispatchMode):
    """Draws and copies nothing: memory is reserved, but no page of it is touched."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] = {}
    ) -> Any:
        name = func.__name__.split(".")[0]
        if name in ("randn", "rand"):
            return torch.empty(*args, **{k: v for k, v in kwargs.items() if k != "generator"})
        if name in ("randn_like", "zeros_like", "ones_like"):
            return torch.empty_like(args[0])
        if name in ("zero_", "fill_", "normal_", "uniform_"):
            return args[0]
        return func(*args, **kwargs)


def launches_of(call: Callable[[], object]) -> list[Launch]:
    """Record what ``call`` would launch on an H200, with tensors on the CPU."""
    with ExitStack() as stack:
        switch = backends.INTERPRETER_IS_ON
        stack.callback(setattr, backends, "INTERPRETER_IS_ON", switch)
        backends.INTERPRETER_IS_ON = True  # kernels for CPU tensors, of which none will run
        stack.enter_context(assume_target(TARGET))
        stack.enter_context(Untouched())
        launches = stack.enter_context(recorded_launches(run=False))
        call()
    return launches


def prediction_of(launch: Launch, pairs: float | None) -> Prediction:
    """Predict one launch."""
    return predict(launch, compile_launch(launch, TARGET), pairs=pairs)


def told(call: Callable[[], object], pairs: float | None = None) -> tuple[float, str]:
    """Predict the microseconds of all launches of ``call``, and name the longest and its limit."""
    found = [(prediction_of(launch, pairs), launch.name) for launch in launches_of(call)]
    longest, name = max(found, key=lambda each: each[0].microseconds)
    return sum(each.microseconds for each, _ in found), f"{name.strip('_')}: {longest.limit}"


def predicted(case: Case, program: Any, direction: str) -> tuple[float, str]:
    """Predict one direction of a case."""
    with Untouched():
        inputs = program.own(case.make(torch.device("cpu")))
    flops = case.costs["forward"].flops
    pairs = flops / (4 * inputs["query"].shape[-1]) if case.suite == "attention" else None
    calls: list[Callable[[], object]] = []

    def prepare() -> None:
        with torch.no_grad():
            outputs = program.outputs(inputs)
        grads = [] if direction == "forward" else [torch.randn_like(o) for o in outputs]
        calls.append(program.call(direction, inputs, grads))

    launches_of(prepare)
    return told(calls[0], pairs)


def line(suite: str, case: str, direction: str, found: float, floor: float, remark: str) -> str:
    """Make a row of the table."""
    return f"| {suite} | {case} | {direction} | {found:.1f} | {found / floor:.2f} | {remark} |"


def rows(chosen: str) -> list[str]:
    """Make the lines of the table, and print each as soon as it is there."""
    lines = [HEAD, "| --- | --- | --- | ---: | ---: | --- |"]
    copied = GPU.copy_bytes / 1e9
    for name in PREDICTED:
        suite = importlib.import_module(f"suites.bench_{name}")
        for case in suite.SUITE.cases(Sizes.of("full"), torch.bfloat16):
            if chosen not in f"{name} {case.name}" or case.options.get("projected"):
                continue  # the time of a projection is that of ATen's products
            program = suite.fused(case)
            for direction in ("forward", "backward"):
                found, remark = predicted(case, program, direction)
                floor = max(case.costs[direction].times_us(copied, PRODUCTS / 1e12))
                lines.append(line(name, case.name, direction, found, floor, remark))
                print(lines[-1], flush=True)
    for case in importlib.import_module("suites.bench_contrastive").SUITE.cases(
        Sizes.of("full"), torch.bfloat16
    ):
        if chosen in f"contrastive {case.name}":
            lines += contrastive_rows(case)
            print(*lines[-2:], sep="\n", flush=True)
    for case in importlib.import_module("suites.bench_encoder").SUITE.cases(
        Sizes.of("full"), torch.bfloat16
    ):
        if chosen in f"encoder {case.name}":
            lines += encoder_rows(case)
            print(*lines[-2:], sep="\n", flush=True)
    return lines


def encoder_rows(case: Case) -> list[str]:
    """Add up a layer: products at the measured rate, kernels as predicted; a step also AdamW."""
    o = case.options
    tokens, width, heads = o["batch"] * o["mean"], o["width"], o["heads"]
    costs = case.costs
    weights = 4 * width * width + 2 * width * o["feedforward"]
    products = 2e6 * tokens * weights / PRODUCTS
    pairs = (costs["forward"].flops / o["layers"] - 2 * tokens * weights) / (4 * width // heads)
    found, kernels = {}, {}
    for direction in ("forward", "backward"):
        p = 0.0 if direction == "forward" else 0.1
        times = {
            name: told(functools.partial(call, direction), pairs)[0]
            for name, call in _layer_calls(tokens, o, p).items()
        }
        kernels[direction] = ", ".join(f"{name} {time:.0f}" for name, time in times.items())
        found[direction] = sum(times.values()) + products * (1 if direction == "forward" else 2)
    adam = 1e6 * 7 * 2 * weights / GPU.copy_bytes  # p, g, m, v read; p, m, v written
    both = found["forward"] + found["backward"] + adam
    floors = [max(costs[d].times_us(GPU.copy_bytes / 1e9, PRODUCTS / 1e12)) for d in costs]
    return [
        line("encoder", case.name, direction, o["layers"] * time, floor,
             f"a layer: products {share * products:.0f}, {kernels[of]}")
        for direction, time, floor, share, of in (
            ("forward", found["forward"], floors[0], 1, "forward"),
            ("step", both, floors[1], 3, "backward"),
        )
    ]  # fmt: skip


def contrastive_rows(case: Case) -> list[str]:
    """The kernels as predicted, the products of the backward at the measured rate, and the bytes
    of torch's steps around them at that of a copy."""
    fused = importlib.import_module("suites.bench_contrastive").fused(case)
    costs = case.costs
    product = costs["forward"].flops / PRODUCTS * 1e6
    with Untouched():
        inputs = case.make(torch.device("cpu"))
    side = inputs["a"].numel()
    strips = -(-inputs["a"].shape[0] // BACKWARD_ROWS)
    # Sums in float32: of b added up strip by strip, multiplied with b for the scale's gradient and
    # added up, and both sides read and written narrow.
    moved = side * (12 * (strips - 1) + (4 + 2 + 4) + 4 + 2 * (4 + 2))
    steps = 1e6 * moved / GPU.copy_bytes
    found = []
    for direction, more in (("forward", 0.0), ("backward", 2 * product + steps)):
        kernels, remark = predicted(case, fused, direction)
        floor = max(costs[direction].times_us(GPU.copy_bytes / 1e9, PRODUCTS / 1e12))
        if more:
            remark += f"; products {2 * product:.0f}, torch's steps {steps:.0f}"
        found.append(line("contrastive", case.name, direction, kernels + more, floor, remark))
    return found


def _layer_calls(tokens: int, o: dict[str, Any], p: float) -> dict[str, Callable[[str], object]]:
    """Make calls of the kernels of one layer on packed tokens, by name."""
    width, inner, heads = o["width"], o["feedforward"], o["heads"]
    packed = (tokens, heads, width // heads)
    starts = torch.arange(o["batch"] + 1, dtype=torch.int32) * o["mean"]

    def call(op: Callable[..., Any], shapes: list[tuple[int, ...]], direction: str) -> object:
        leaves = [torch.empty(s, dtype=torch.bfloat16).requires_grad_() for s in shapes]
        with torch.set_grad_enabled(direction != "forward"):
            output = op(*leaves)
        if direction == "forward":
            return output
        return torch.autograd.grad(output, leaves, torch.empty_like(output))

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        longest = o["longest"]
        return F.varlen_attention(q, k, v, starts, starts, longest, longest, dropout_p=p)

    def norms(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.dropout_add_layer_norm(x, residual, (width,), weight, bias, p=p)

    def activation(x: Tensor, bias: Tensor) -> Tensor:
        return F.bias_activation(x, bias, "gelu", p=p)

    rows, parameter = (tokens, width), (width,)
    norm = functools.partial(call, norms, [rows, rows, parameter, parameter])
    return {
        "attention": functools.partial(call, attention, [packed] * 3), "first norm": norm,
        "GELU": functools.partial(call, activation, [(tokens, inner), (inner,)]),
        "second norm": norm,
    }  # fmt: skip


def main() -> None:
    """Print the table, or put it into a file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", default="", help="part of a suite's and case's name")
    parser.add_argument("--write", action="store_true", help="into tables/predictions.md")
    given = parser.parse_args()
    found = "\n".join(rows(given.case))
    if given.write:
        (TABLES / "predictions.md").write_text(text(found))


def text(found: str) -> str:
    """Put a table into the text of its file."""
    about = (
        "Of attention's cases with masks or lengths the pairs that are computed are counted, not "
        "the tiles that they touch; the encoder is the sum of its products at 790 TFLOP/s, its "
        "kernels and AdamW on bfloat16 states."
    )
    return page("Predictions on an H200", "predictions", about, found)


if __name__ == "__main__":
    main()
