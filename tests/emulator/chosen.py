"""Every kernel that ships, launched at least once by either way: ``test_suite.py`` starts this.

Each case of the parity grid (odd sizes, masks, packed sequences) is compared with the definition,
and done again: the second time, launches are cached ones, and the bits must be those of the first.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from tests.emulator import plugin
from torch import Tensor

from fusedformer import backend, parity
from fusedformer import functional as F
from fusedformer.parity.cases import Case, all_cases
from fusedformer_kernels.compiler.attention_calls import ONE_PASS
from fusedformer_kernels.compiler.compile_cases import compile_cases
from fusedformer_kernels.rows.dropout import dropout_mask
from fusedformer_kernels.runtime import targets, tuned
from fusedformer_kernels.runtime.launch import recorded_launches

GPU = torch.device("cuda", 0)
DTYPES = torch.bfloat16, torch.float32, torch.float16
# Each case in one dtype; neighbours, which are of one op, in others.
CASES = list(zip(all_cases(), itertools.cycle(DTYPES)))


def results_of(run: Callable[..., Any], given: dict[str, Tensor]) -> list[Tensor]:
    """Outputs, and gradients by the same output gradients each time."""
    found = run(**given)
    outputs = [found] if isinstance(found, Tensor) else list(found)
    learned = [output for output in outputs if output.requires_grad]
    draw = torch.Generator(GPU).manual_seed(2)
    grads = [torch.randn(o.shape, device=GPU, generator=draw).to(o.dtype) for o in learned]
    leaves = [tensor for tensor in given.values() if tensor.requires_grad]
    back = torch.autograd.grad(learned, leaves, grads, allow_unused=True) if learned else ()
    return [*outputs, *(g for g in back if g is not None)]


def repeated(run: Callable[..., Any], given: dict[str, Tensor]) -> list[Tensor]:
    """What ``results_of`` returns, the same three times: by Triton's way, and cached ones."""
    torch.manual_seed(4)
    first = results_of(run, given)
    for _ in range(2):
        torch.manual_seed(4)
        for one, other in zip(first, results_of(run, given), strict=True):
            assert torch.equal(one, other)
    return first


@pytest.mark.parametrize(
    ("case", "dtype"), CASES, ids=[f"{case.op.name}, {case.name}" for case, _ in CASES]
)
def test_parity_and_the_same_bits_again(case: Case, dtype: torch.dtype) -> None:
    made = case.make(torch.Generator().manual_seed(1))
    given = {name: tensor.to(GPU) for name, tensor in made.items()}
    for name, tensor in given.items():
        if tensor.is_floating_point():
            given[name] = tensor.to(dtype).requires_grad_()
    repeated(partial(case.op.candidate, **case.settings), given)
    for record in parity.run_case(case, dtype, GPU):
        assert record["passed"], record["fault"]


def leaf(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, device=GPU, dtype=dtype, requires_grad=True)


DROPPING: dict[str, tuple[Callable[..., Any], Callable[[], dict[str, Tensor]]]] = {
    "attention": (
        partial(F.scaled_dot_product_attention, dropout_p=0.3),
        lambda: {name: leaf(2, 2, 37, 16) for name in ("query", "key", "value")},
    ),
    "norm": (
        partial(F.dropout_add_layer_norm, normalized_shape=(130,), p=0.3),
        lambda: {"input": leaf(9, 130), "residual": leaf(9, 130), "weight": leaf(130)},
    ),
    "bias and activation": (
        partial(F.bias_activation, activation="gelu", p=0.3),
        lambda: {"input": leaf(13, 130), "bias": leaf(130)},
    ),
    "sum": (
        partial(F.dropout_add, p=0.3),
        lambda: {"input": leaf(5, 77), "residual": leaf(5, 77)},
    ),
}


@pytest.mark.parametrize("name", DROPPING)
def test_dropout_is_drawn_from_the_generator(name: str) -> None:
    run, make = DROPPING[name]
    given = make()
    first = repeated(run, given)
    assert not torch.equal(first[0], run(**given))


OTHERS: dict[str, tuple[Callable[..., Any], Callable[[], dict[str, Tensor]]]] = {
    "rows longer than a program keeps": (
        partial(F.layer_norm, normalized_shape=(8200,)),
        lambda: {"input": leaf(3, 8200), "weight": leaf(8200), "bias": leaf(8200)},
    ),
    "softmax of rows in chunks": (
        partial(F.softmax, dim=-1),
        lambda: {"input": leaf(2, 33008)},
    ),
    "attention's weights": (
        partial(F.scaled_dot_product_attention, return_weights="per_head"),
        lambda: {name: leaf(2, 2, 21, 16) for name in ("query", "key", "value")},
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_the_grid_leaves_out(name: str) -> None:
    """As the torch backend in float64, and the same bits again."""
    run, make = OTHERS[name]
    given = make()
    found = repeated(run, given)
    wide = {name: t.detach().double().requires_grad_() for name, t in given.items()}
    with backend("torch"):
        expected = results_of(run, wide)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=0.02, atol=0.02)


ONE_PASS_OF_128 = ("attention_backward", "half", 128, "plain", "full"), ONE_PASS[128]
# A kernel that is launched then; heads of queries and keys, and the head dim.
SHARED = {
    "in one pass": ("_store_query_sums", (2, 2, 128)),
    "of few queries": ("_sum_query_parts", (4, 2, 64)),
}


@pytest.mark.parametrize("name", SHARED)
def test_backwards_whose_programs_share_a_sum(name: str) -> None:
    """Of packed sequences: as float64 has it, the same bits again, and in each replay of a graph.

    Between replays numbers change, and where sequences begin.
    """
    kernel, (heads, key_heads, dim) = SHARED[name]
    lengths = (37, 63) if name == "in one pass" else (2, 3)
    starts_q = torch.tensor([0, lengths[0], sum(lengths)], dtype=torch.int32, device=GPU)
    starts_k = torch.tensor([0, 40, 117], dtype=torch.int32, device=GPU)
    if name == "of few queries":
        starts_k *= 9
    tokens = int(starts_k[-1])
    longest = max(lengths), tokens
    given = {"query": leaf(sum(lengths), heads, dim)}
    given |= {name: leaf(tokens, key_heads, dim) for name in ("key", "value")}
    dy = torch.randn(sum(lengths), heads, dim, device=GPU).bfloat16()

    def run(**given: Tensor) -> Tensor:
        tensors = given["query"], given["key"], given["value"]
        return F.varlen_attention(
            *tensors, starts_q, starts_k, *longest, enable_gqa=heads > key_heads
        )

    def gradients() -> list[Tensor]:
        return list(torch.autograd.grad(run(**given), list(given.values()), dy))

    with contextlib.ExitStack() as stack:
        if name == "in one pass":
            stack.enter_context(tuned.forced(*ONE_PASS_OF_128))
        with recorded_launches(run=True) as launches:
            gradients()
        assert kernel in {launch.name for launch in launches}
        repeated(run, given)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = gradients()
        for _ in range(2):
            starts_k[1] -= 7
            with torch.no_grad():
                for tensor in (dy, *given.values()):
                    tensor.normal_()
            graph.replay()
            assert all(gradient.any() for gradient in captured)
            assert all(map(torch.equal, captured, gradients()))
        found = results_of(run, given)
    wide = {name: t.detach().double().requires_grad_() for name, t in given.items()}
    with backend("torch"):
        expected = results_of(run, wide)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=0.02, atol=0.02)


def test_dropout_masks() -> None:
    """Of rows and of attention: the share that is kept, and the same again by cached launches."""
    seed = torch.tensor([7], device=GPU)
    for of_attention in (False, True):
        masks = [dropout_mask(seed, 0.3, 2, 37, 130, of_attention) for _ in range(2)]
        assert torch.equal(*masks)
        assert 0.67 < masks[0].float().mean().item() < 0.73


def test_every_kernel_that_ships_was_launched() -> None:
    """Goes last: by Triton's own way, and cached."""
    target = targets.TARGETS[plugin.TARGET]
    with targets.assume_target(target), recorded_launches(run=False) as recorded:
        for case in compile_cases():
            if case.core:
                case.call()
    shipped = {launch.name for launch in recorded}
    kernels = plugin.launches.kernels.values()
    assert len(shipped) > 20
    assert shipped - {kernel.name for kernel in kernels if kernel.launches} == set()
    assert shipped - {kernel.name for kernel in kernels if kernel.cached} == set()
