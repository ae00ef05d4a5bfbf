"""Compares launches past Triton, and of plans, with Triton's own, for ``test_launch.py``.

Nothing is compiled and no device is needed: what would be handed to the driver is written down.
"""

from __future__ import annotations

import inspect
import itertools
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.compiler import CompiledKernel
from triton.runtime import driver

from fusedformer import functional as F
from fusedformer import nn
from fusedformer_kernels.attention.forward import attention_forward
from fusedformer_kernels.attention.terms import AttentionTerms
from fusedformer_kernels.compiler import compile_cases, tensors
from fusedformer_kernels.compiler.ahead_of_time import ast_source
from fusedformer_kernels.rows import gather as rows
from fusedformer_kernels.runtime import launch, plan, plans
from fusedformer_kernels.runtime.primitives import COUNTS
from fusedformer_kernels.runtime.targets import LaunchConfig
from harness.no_driver import kernels_go_nowhere

launched: list[tuple[tuple[Any, ...], tuple[Any, ...]]] = []
compiled: set[str] = set()  # by Triton, on its own way: hashes of sources


def plain(value: Any) -> Any:
    """What can be compared of an argument: of a tensor all that a launch depends on."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.shape, value.stride(), value.data_ptr() % 16
    return tuple(map(plain, value)) if isinstance(value, tuple) else value


def described(source: Any, arguments: tuple[Any, ...]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """One launch: kernel, specialization, grid, and the arguments that the launcher looks at.

    Second, the same with no more of pointers than their alignment.
    """
    *grid, _stream, _function, metadata, _, _, _ = arguments[:9]
    attributes = sorted(map(str, source.attrs.items()))
    chosen = source.fn.__name__, str(source.signature), str(source.constants), attributes
    given = arguments[9:]  # constants come in any order: the launcher looks at none
    kinds = source.signature.values()
    looked_at = [each for each in zip(given, kinds, strict=False) if each[1] != "constexpr"]
    by_kind = tuple(itertools.starmap(plain_by_kind, looked_at))
    return (
        (*chosen, metadata, tuple(grid), len(given), plain(tuple(a for a, _ in looked_at))),
        (*chosen, metadata, tuple(grid), len(given), by_kind),
    )


def plain_by_kind(value: Any, kind: Any) -> Any:
    """An argument of a launch; of a pointer, which plans hand on as a number, its alignment."""
    if isinstance(value, tuple):
        return tuple(itertools.starmap(plain_by_kind, zip(value, kind, strict=True)))
    if isinstance(kind, str) and kind.startswith("*"):
        return (value if isinstance(value, int) else value.data_ptr()) % 16
    return plain(value)


def stand_in(source: Any, target: Any, options: dict[str, Any], **others: Any) -> CompiledKernel:
    """A compiled kernel without the seconds that compiling takes."""
    compiled.add(source.hash())
    kernel = object.__new__(CompiledKernel)
    kernel.src, kernel.name, kernel.hash, kernel.module, kernel.function = source, "", "", 1, 1
    kernel.packed_metadata = options["num_warps"], options["num_stages"]
    kernel._run = driver.active.launcher_cls(source, None)
    return kernel


def launches_of(call: Callable[[], object], known: bool, which: int = 0) -> list[tuple[Any, ...]]:
    """Those of a call, as ``described``; past Triton where it can be if ``known``."""
    launch._IS_KNOWN = known
    if not known:
        launch._compiled.clear()
    launched.clear()
    call()
    return [each[which] for each in launched]


def check(call: Callable[[], object], name: str) -> None:
    """Raise AssertionError unless ``call`` launches the same past Triton, and does go past it."""
    wanted = launches_of(call, False)
    launches_of(call, True)
    before = dict(launch._compiled)
    got = launches_of(call, True)
    assert launch._compiled == before, f"{name}: not past Triton"
    assert before, f"{name}: not past Triton"
    for have, want in zip(got, wanted, strict=True):
        different = [pair for pair in zip(have, want, strict=False) if pair[0] != pair[1]]
        assert not different, (name, have[0], different)


def check_every_case() -> None:
    """Every compile case; what is compiled ahead of time is what Triton then finds in its cache."""
    for case in compile_cases.compile_cases():
        if case.forced:
            continue
        check(case.call, case.name)
        with launch.recorded_launches(run=False) as launches:
            case.call()
        assert {ast_source(each).hash() for each in launches} <= compiled, case.name
        for each in launches:  # Triton specializes on numbers in tuples, whatever it is told
            counts = [v for name, v in each.arguments.items() if name in COUNTS]
            assert not any(isinstance(v, tuple) for v in counts), (case.name, each.name)


# Launchers that are called between operators of torch, with no plans of their own.
UNPLANNED = ("dropout mask", "contrastive", "sigmoid contrastive")


# Of an encoder layer: inference, forward, forward and backward.
MOST_CALLS = 52, 54, 101
MOST_CALLS_OF_STACK = 309  # six layers, inference
LIBRARY = tuple(str(Path(inspect.getfile(module)).parents[1]) for module in (nn, launch))


def check_plans() -> None:
    """Every compile case, on memory that nobody touches: planned calls launch what others do."""
    planned: list[plan.Plan] = []
    original = plan.Plan.run

    def run(self: plan.Plan, *args: Any) -> Any:
        planned.append(self)
        return original(self, *args)

    with (
        mock.patch.object(tensors, "DEVICE", "cpu"),
        mock.patch.object(plan.Plan, "run", run),
    ):
        for case in compile_cases.compile_cases():
            if case.forced:
                continue
            plans.clear()
            unplanned = launches_of(case.call, True, 1)
            launches_of(case.call, True, 1)  # in which plans are recorded
            planned.clear()
            assert launches_of(case.call, True, 1) == unplanned, case.name
            assert planned or case.name.startswith(UNPLANNED), case.name


def python_calls(call: Callable[[], object]) -> int:
    """How many of the library's functions a call enters, once it is planned."""
    for _ in range(3):
        call()
    entered = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal entered
        entered += event == "call" and frame.f_code.co_filename.startswith(LIBRARY)

    sys.setprofile(count)
    try:
        call()
    finally:
        sys.setprofile(None)
    return entered


def check_counts() -> None:
    """What an encoder layer of 16 tokens has the host do, which is what a small layer costs."""
    layer = nn.TransformerEncoderLayer(64, 2, 128, 0.0, batch_first=True)
    x = torch.randn(2, 8, 64, requires_grad=True)
    leaves, grad = [x, *layer.parameters()], torch.randn(2, 8, 64)
    with torch.no_grad():
        assert python_calls(lambda: layer(x)) <= MOST_CALLS[0]
        stack = nn.TransformerEncoder(layer, 6)
        assert python_calls(lambda: stack(x)) <= MOST_CALLS_OF_STACK
    assert python_calls(lambda: layer(x)) <= MOST_CALLS[1]
    step = lambda: torch.autograd.grad(layer(x), leaves, grad)
    assert python_calls(step) <= MOST_CALLS[2]
    launched.clear()
    step()
    assert len(launched) == 4 + 9


def check_listeners() -> None:
    """While a profiler listens or changes kernels: Triton's own way, and nothing of it is kept."""
    case = next(case for case in compile_cases.compile_cases() if case.name == "layer_norm 768")
    for owner, name in (
        (triton.knobs.runtime, "launch_enter_hook"),
        (triton.knobs.runtime, "launch_exit_hook"),
        (triton.knobs.compilation, "instrumentation_mode"),
    ):
        launch._compiled.clear()
        hook = getattr(getattr(owner, name), "calls", None)
        if hook is None:
            setattr(owner, name, "consan")
        else:
            hook.append(lambda metadata: None)
        launches_of(case.call, True)
        assert not launch._compiled, name
        if hook is None:
            setattr(owner, name, "")
        else:
            hook.clear()
        check(case.call, name)


def check_kinds_of_arguments() -> None:
    """Every kind of pointer and integer, in whatever order they come."""
    sizes = 0, 1, 2, 8, 15, 16, 17, 24, 2**31 - 1, 2**31, 2**31 + 16, 2**40 + 1, -16, -5
    memory = torch.zeros(64, dtype=torch.float32)
    aligned, half, odd = memory[:4], memory[2:6], memory[1:5]
    config = LaunchConfig(4, 2)
    wanted: dict[tuple[Any, int, int], list[tuple[Any, ...]]] = {}
    kinds = list(itertools.product((aligned, half, odd, aligned.half()), sizes, sizes))
    for known in (False, True, True):
        launch._IS_KNOWN = known
        if not known:
            launch._compiled.clear()
        for kind in kinds:
            x, first, second = kind
            launched.clear()
            launch.launch(
                rows._gather_rows, (3,), config, x, None, aligned, first, 7, second, 1,
                BLOCK_M=4, BLOCK_N=16,
            )  # fmt: skip
            assert wanted.setdefault((plain(x), first, second), list(launched)) == launched, kind
    assert launch._kinds_of_numbers((1,), (int,)) != launch._kinds_of_numbers((1.0,), (float,))
    assert len(launch._compiled) < len(kinds) / 2, (len(launch._compiled), len(kinds))


def check_sizes_after_sizes() -> None:
    """What is launched does not depend on the sizes that were launched before."""
    shapes = [(2, 64, 64, 64), (2, 37, 48, 64), (1, 1, 1, 64), (16, 16, 32, 64), (3, 1, 5, 64)]
    wanted = [launches_of(attention(*shape), False, 1) for shape in shapes]
    launch._compiled.clear()
    for _ in range(2):
        for shape, want in zip(shapes, wanted, strict=True):
            assert launches_of(attention(*shape), True, 1) == want, shape


def attention(heads: int, queries: int, keys: int, dim: int) -> Callable[[], object]:
    query = torch.empty(1, heads, queries, dim, dtype=torch.bfloat16)
    key, value = torch.empty(2, 1, heads, keys, dim, dtype=torch.bfloat16).unbind()
    return lambda: attention_forward(query, key, value, AttentionTerms(scale=0.125))


def check_sizes() -> None:
    """Calls of one kind but for their sizes, one after another: each kernel fits its own call."""

    def attention(length: int) -> object:
        query, key, value = (torch.randn(1, 2, length, 16, requires_grad=True) for _ in range(3))
        output = F.scaled_dot_product_attention(query, key, value)
        return torch.autograd.grad(output, (query, key, value), torch.randn_like(output))

    def embedding(width: int) -> object:
        return F.embedding_layer_norm(torch.zeros(3, 5, dtype=torch.int64), torch.randn(7, width))

    for call in (attention, embedding):
        calls = [partial(call, size) for size in (1, 16, 17, 48, 33, 1)]
        plans.clear()
        wanted = [launches_of(each, False, 1) for each in calls]
        plans.clear()
        launch._compiled.clear()
        assert [launches_of(each, True, 1) for each in calls] == wanted, call.__name__


def main() -> None:
    """Put the stand-ins in place, then check."""
    kernels_go_nowhere(lambda source, arguments: launched.append(described(source, arguments)))
    original = launch._launch

    def with_stand_in(kernel: Any, *others: Any) -> Any:
        kernel.device_caches[0]  # makes what compiles
        kernel.compile = stand_in
        return original(kernel, *others)

    setattr(launch, "_launch", with_stand_in)  # noqa: B010
    check_every_case()
    check_plans()
    check_counts()
    check_listeners()
    check_kinds_of_arguments()
    check_sizes_after_sizes()
    check_sizes()


if __name__ == "__main__":
    main()
