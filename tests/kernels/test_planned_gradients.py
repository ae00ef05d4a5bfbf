"""Public calls whose result has a gradient: planned from the second on, with the same bits."""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fusedformer import backend, functional

plans = pytest.importorskip("fusedformer_kernels.runtime.plans")

from fusedformer_kernels.runtime import plan, recording  # noqa: E402

Inputs = dict[str, Tensor]


def attention(query: Tensor, key: Tensor, value: Tensor, **named: Any) -> Any:
    return functional.scaled_dot_product_attention(query, key, value, **named)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return functional.layer_norm(x, (16,), weight, bias)


def add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Any:
    return functional.dropout_add_layer_norm(x, residual, (16,), weight, bias, p=0.0)


def softmax(x: Tensor) -> Tensor:
    return functional.softmax(x, -1, scale=0.5)


def scaled_sum(x: Tensor, residual: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return functional.dropout_scale_add(x, residual, scale, input_bias=bias, p=0.0)


def gelu(x: Tensor, bias: Tensor) -> Tensor:
    return functional.bias_activation(x, bias, "gelu")


CALLS: dict[Callable[..., Any], dict[str, tuple[int, ...]]] = {
    attention: {"query": (2, 2, 5, 16), "key": (2, 2, 7, 16), "value": (2, 2, 7, 16)},
    layer_norm: {"x": (3, 5, 16), "weight": (16,), "bias": (16,)},
    add_layer_norm: {"x": (5, 16), "residual": (5, 16), "weight": (16,), "bias": (16,)},
    scaled_sum: {"x": (5, 16), "residual": (5, 16), "scale": (16,), "bias": (16,)},
    softmax: {"x": (3, 37)},
    gelu: {"x": (3, 16), "bias": (16,)},
}
each_call = pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)


@pytest.fixture(autouse=True)
def _triton() -> Iterator[None]:
    plans.clear()
    with backend("triton"):
        yield
    plans.clear()


def inputs_of(call: Callable[..., Any], device: str, dtype: torch.dtype) -> Inputs:
    return {
        name: torch.randn(shape, device=device, dtype=dtype, requires_grad=True)
        for name, shape in CALLS[call].items()
    }


def step(call: Callable[..., Any], inputs: Inputs, wanted: list[str] | None = None) -> list[Tensor]:
    """The result, and gradients from the same random output gradient each time."""
    output = call(**inputs)
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(output.shape, generator=generator).to(output)
    leaves = [inputs[name] for name in wanted or inputs]
    return [output.detach(), *torch.autograd.grad(output, leaves, grad)]


def unplanned_step(call: Callable[..., Any], inputs: Inputs) -> list[Tensor]:
    plans.clear()
    return step(call, inputs)


def assert_same_bits(got: list[Tensor], wanted: list[Tensor]) -> None:
    assert len(got) == len(wanted)
    assert all(torch.equal(*pair) for pair in zip(got, wanted, strict=True))
    assert all(one.count_nonzero() for one in got)


@each_call
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_second_call_runs_plans_and_gives_the_same_bits(
    call: Callable[..., Any], dtype: torch.dtype, device: str, runs: list[plan.Plan]
) -> None:
    first, second = (inputs_of(call, device, dtype) for _ in range(2))
    wanted = unplanned_step(call, second)
    plans.clear()
    runs.clear()
    step(call, first)
    assert not runs
    assert_same_bits(step(call, second), wanted)
    assert len(runs) == 2  # a forward's and a backward's


@each_call
def test_each_choice_of_gradients_has_a_plan_of_its_own(
    call: Callable[..., Any], device: str
) -> None:
    inputs = inputs_of(call, device, torch.float32)
    wanted = dict(zip(inputs, unplanned_step(call, inputs)[1:], strict=True))
    for name in inputs:
        for _ in range(2):
            frozen = {n: t.detach().requires_grad_(n == name) for n, t in inputs.items()}
            assert torch.equal(step(call, frozen, [name])[1], wanted[name])
            assert torch.equal(step(call, inputs, [name])[1], wanted[name])


@each_call
def test_output_gradients_of_any_layout(call: Callable[..., Any], device: str) -> None:
    inputs = inputs_of(call, device, torch.float32)
    for _ in range(2):
        output = call(**inputs)
        grad = torch.randn(*output.shape[:-1], 2 * output.shape[-1], device=device)[..., ::2]
        leaves = list(inputs.values())
        got = torch.autograd.grad(output, leaves, grad, retain_graph=True)
        wanted = torch.autograd.grad(output, leaves, grad.contiguous())
        assert_same_bits(list(got), list(wanted))


@each_call
def test_two_backwards_of_one_forward(call: Callable[..., Any], device: str) -> None:
    inputs = inputs_of(call, device, torch.float32)
    for _ in range(2):
        output = call(**inputs)
        grad = torch.randn_like(output)
        first = torch.autograd.grad(output, list(inputs.values()), grad, retain_graph=True)
        again = torch.autograd.grad(output, list(inputs.values()), grad)
        assert_same_bits(list(first), list(again))


@each_call
def test_what_a_backward_reads_may_not_change(call: Callable[..., Any], device: str) -> None:
    for _ in range(3):
        inputs = inputs_of(call, device, torch.float32)
        output = call(**inputs)
        saved = output if call is softmax else next(iter(inputs.values()))
        if call is add_layer_norm:
            saved = inputs["weight"]
        with torch.no_grad():
            saved.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(output, list(inputs.values()), torch.randn_like(output))


@each_call
def test_double_backward_still_says_that_there_is_none(
    call: Callable[..., Any], device: str
) -> None:
    inputs = inputs_of(call, device, torch.float32)
    for _ in range(3):
        output = call(**inputs)
        grad = torch.randn_like(output, requires_grad=True)
        found = torch.autograd.grad(output, list(inputs.values()), grad, create_graph=True)
        with pytest.raises(RuntimeError, match="double backward"):
            torch.autograd.grad(found[0], grad, torch.randn_like(found[0]))


@each_call
def test_batches_of_gradients(call: Callable[..., Any], device: str) -> None:
    inputs = inputs_of(call, device, torch.float32)
    for _ in range(2):
        output, leaves = call(**inputs), list(inputs.values())
        grads = torch.randn(2, *output.shape, device=device)
        wanted = [torch.autograd.grad(output, leaves, g, retain_graph=True) for g in grads]
        found = torch.autograd.grad(output, leaves, grads, is_grads_batched=True)
        for got, *each in zip(found, *wanted, strict=True):
            torch.testing.assert_close(got, torch.stack(each))


@each_call
def test_hooks_on_saved_tensors(call: Callable[..., Any], device: str) -> None:
    inputs = inputs_of(call, device, torch.float32)
    wanted = unplanned_step(call, inputs)
    for _ in range(2):
        with torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone):
            assert_same_bits(step(call, inputs), wanted)


def test_one_tensor_for_all_arguments(device: str) -> None:
    x = torch.randn(2, 2, 5, 16, device=device, requires_grad=True)
    inputs = {"x": x}
    call = lambda x: attention(x, x, x)
    wanted = unplanned_step(call, inputs)
    step(attention, inputs_of(attention, device, torch.float32))
    for _ in range(2):
        assert_same_bits(step(call, inputs), wanted)


def test_gradients_of_a_mask_and_of_the_log_sum_exp(device: str) -> None:
    inputs = inputs_of(attention, device, torch.float32)
    inputs["attn_mask"] = torch.randn(2, 2, 5, 7, device=device, requires_grad=True)

    def call(**inputs: Tensor) -> Tensor:
        output, lse = attention(**inputs, return_lse=True)
        return torch.cat((output.flatten(), lse.flatten()))

    wanted = unplanned_step(call, inputs)
    for _ in range(2):
        assert_same_bits(step(call, inputs), wanted)


def test_a_masked_softmax_casts_the_gradient_of_its_mask(device: str) -> None:
    inputs = {
        "x": torch.randn(3, 37, device=device, dtype=torch.float16, requires_grad=True),
        "mask": torch.randn(3, 37, device=device, requires_grad=True),
    }
    call = lambda x, mask: functional.softmax(x, -1, mask=mask)
    wanted = unplanned_step(call, inputs)
    for _ in range(2):
        assert_same_bits(step(call, inputs), wanted)


def test_parameters_of_another_dtype(device: str) -> None:
    inputs = inputs_of(layer_norm, device, torch.float32)
    inputs["x"] = inputs["x"].detach().half().requires_grad_()
    inputs["bias"] = inputs["bias"].detach().half().requires_grad_()
    wanted = unplanned_step(layer_norm, inputs)
    assert [one.dtype for one in wanted[1:]] == [torch.half, torch.float, torch.half]
    for _ in range(2):
        assert_same_bits(step(layer_norm, inputs), wanted)


def test_dropout_is_drawn_in_each_call(device: str) -> None:
    inputs = inputs_of(attention, device, torch.float32)
    call = lambda **named: attention(**named, dropout_p=0.5)
    first, second = step(call, inputs), step(call, inputs)
    assert not torch.equal(first[0], second[0])
    torch.manual_seed(3)
    wanted = unplanned_step(call, inputs)
    torch.manual_seed(3)
    assert_same_bits(step(call, inputs), wanted)


def test_views_between_arguments_and_op_keep_their_place_in_the_graph(device: str) -> None:
    x = torch.randn(5, 2, 16, device=device, requires_grad=True)
    starts = torch.tensor([0, 2, 5], device=device, dtype=torch.int32)
    call = lambda x: functional.varlen_attention(x, x, x, starts, starts, 3, 3)
    wanted = unplanned_step(call, {"x": x})
    for _ in range(2):
        assert_same_bits(step(call, {"x": x}), wanted)


@each_call
def test_nothing_is_kept_alive(call: Callable[..., Any], device: str) -> None:
    inputs = inputs_of(call, device, torch.float32)
    for _ in range(3):
        found = step(call, inputs)
    gone = [weakref.ref(one) for one in (*inputs.values(), *found)]
    del inputs, found
    assert not any(ref() is not None for ref in gone)


def test_threads_share_calls(device: str) -> None:
    """Without a lock of the tests' own only on a GPU: the interpreter runs one kernel at a time."""
    inputs = [inputs_of(layer_norm, device, torch.float32) for _ in range(4)]
    wanted = [unplanned_step(layer_norm, one) for one in inputs]
    lock, found = threading.Lock(), [list[Tensor]()] * 4

    def work(index: int) -> None:
        for _ in range(3):
            with lock:
                found[index] = step(layer_norm, inputs[index])

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for pair in zip(found, wanted, strict=True):
        assert_same_bits(*pair)


def test_verification_sees_a_backward_that_does_more_than_launch(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    op = sys.modules["fusedformer.ops.softmax"]
    original = op._softmax_backward
    monkeypatch.setattr(op, "_softmax_backward", lambda *args: original(*args).clone())
    inputs = inputs_of(softmax, device, torch.float32)
    with pytest.raises(AssertionError, match="does not say so"), recording.verified():
        step(softmax, inputs)
