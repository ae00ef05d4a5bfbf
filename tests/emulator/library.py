"""The library's own kernels, compiled for GPUs and run by the emulator on CPU tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from tests.emulator.machine import Compiled, Machine, compile_source

Call = Callable[..., torch.Tensor]


def compiled_kernels(target_name: str, every: bool) -> dict[str, Compiled | str]:
    """Compile the compile report's cases; of each kernel one config, or ``every`` one.

    What does not compile is the error's text.
    """
    from fusedformer.tools.compile_report import float32_products
    from fusedformer_kernels.compiler.ahead_of_time import ast_source
    from fusedformer_kernels.compiler.compile_cases import compile_cases
    from fusedformer_kernels.runtime.launch import recorded_launches
    from fusedformer_kernels.runtime.targets import TARGETS, assume_target

    found: dict[str, Compiled | str] = {}
    seen = set()
    for case in compile_cases():
        if not (every or case.core):
            continue
        with (
            float32_products(case.products),
            assume_target(TARGETS[target_name]),
            recorded_launches(run=False) as launches,
        ):
            case.call()
        for launch in launches:
            source, options = ast_source(launch), launch.config.options()
            key = (source.hash(), tuple(options.items())) if every else launch.name
            if key in seen:
                continue
            seen.add(key)
            name = f"{case.name} {case.dtype} {launch.name} {options}"
            try:
                found[name] = compile_source(source, target_name, options)
            except Exception as error:  # a compiler may raise anything
                found[name] = f"{type(error).__name__}: {error}"
    return found


def without_last_part(launch: Any) -> Any:
    """Let the few queries' backward add one part of dq less: that of the last block of keys."""
    if launch.name != "_sum_query_parts":
        return launch
    keys = launch.arguments["keys"] - launch.arguments["BLOCK_N"]
    return replace(launch, arguments={**launch.arguments, "keys": keys})


def with_overlapping_parts(launch: Any) -> Any:
    """Let the few queries' backward write its parts of dq as if there were a query less."""
    if launch.name != "_few_queries_backward":
        return launch
    queries = launch.arguments["max_queries"] - 1
    return replace(launch, arguments={**launch.arguments, "max_queries": queries})


def both(
    call: Call,
    tensors: list[torch.Tensor],
    target_name: str,
    settings: dict[str, int],
    changed: Callable[[Any], Any] | None = None,
) -> tuple[list[torch.Tensor], list[torch.Tensor], list[str]]:
    """Call and differentiate: by emulated kernels, then in float64 by the torch backend.

    Returns what came out of each (output and gradients), and what the emulator found.
    """
    from fusedformer import backend
    from fusedformer._internal import backend as backends

    machine = Machine(**settings)
    given = [t.detach().clone().requires_grad_(t.is_floating_point()) for t in tensors]
    exact = [t.detach().double().requires_grad_(t.is_floating_point()) for t in tensors]

    def differentiated(inputs: list[torch.Tensor], grad: torch.Tensor) -> list[torch.Tensor]:
        out = call(*inputs)
        return [out, *torch.autograd.grad(out, inputs, grad.to(out.dtype))]

    with backend("torch"):
        grad = torch.randn(call(*exact).shape)
        want = differentiated(exact, grad.to(tensors[0].dtype))
    kept, backends.INTERPRETER_IS_ON = backends.INTERPRETER_IS_ON, True  # CPU tensors have kernels
    try:
        with backend("triton"), machine.taking_launches(target_name, changed):
            got = differentiated(given, grad)
    finally:
        backends.INTERPRETER_IS_ON = kept
    assert machine.instructions, "nothing was launched"
    detach = lambda all: [t.detach() for t in all]
    return detach(got), detach(want), machine.findings()


def calls() -> dict[str, tuple[Call, list[torch.Tensor]]]:
    """Name what is run: a call and its tensors in float32."""
    from fusedformer import functional as F

    attention = F.scaled_dot_product_attention

    def tensors(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
        torch.manual_seed(0)
        return [torch.randn(shape) for shape in shapes]

    heads = (1, 2, 150, 64)
    return {
        "softmax": (lambda x: F.softmax(x, -1), tensors((5, 300))),
        "layer_norm": (
            lambda x, w, b: F.layer_norm(x, (300,), w, b), tensors((9, 300), (300,), (300,)),
        ),
        "attention": (attention, tensors(heads, heads, heads)),
        "attention causal": (
            lambda q, k, v: attention(q, k, v, is_causal=True), tensors(*[(2, 1, 70, 32)] * 3),
        ),
        "attention value dim 16": (
            attention, tensors((1, 2, 100, 64), (1, 2, 100, 64), (1, 2, 100, 16)),
        ),
        "attention d=128": (attention, tensors(*[(1, 1, 130, 128)] * 3)),
        "attention of few queries": (
            attention, tensors((1, 2, 3, 64), (1, 2, 600, 64), (1, 2, 600, 64)),
        ),
    }  # fmt: skip


def errors_of(
    name: str,
    dtype: torch.dtype,
    target_name: str,
    settings: dict[str, int],
    changed: Callable[[Any], Any] | None = None,
) -> tuple[list[float], list[str]]:
    """Run one of ``calls``: largest errors relative to the largest value, and the findings."""
    call, tensors = calls()[name]
    given = [t.to(dtype) for t in tensors]
    got, want, findings = both(call, given, target_name, settings, changed)
    errors = []
    for have, exact in zip(got, want, strict=True):
        errors.append(float((have.double() - exact).abs().max() / exact.abs().max()))
    return errors, findings


def one_pass(target_name: str, dim: int, order: int) -> tuple[list[float], list[str], int]:
    """Run attention with its backward in one pass: errors, findings, and a hash of the gradients.

    ``order`` is that of programs and warps.
    """
    from fusedformer import functional as F
    from fusedformer_kernels.runtime.tuned import forced

    fields = {"passes": 1, "block_m": 32, "block_n": 64, "num_warps": 4, "num_stages": 2}
    torch.manual_seed(0)
    tensors = [torch.randn(1, 2, 150, dim).bfloat16() for _ in range(3)]
    with forced(("attention_backward", "half", 64, "plain", "causal"), fields):
        got, want, findings = both(
            lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
            tensors, target_name, {"order": order},
        )  # fmt: skip
    errors = []
    for have, exact in zip(got, want, strict=True):
        errors.append(float((have.double() - exact).abs().max() / exact.abs().max()))
    return errors, findings, hash(tuple(got[1].float().flatten().tolist()))
