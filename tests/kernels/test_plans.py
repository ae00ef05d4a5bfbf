"""Launch plans: what they hold, when they are asked, and that they hold nothing alive."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fusedformer import backend, functional

plans = pytest.importorskip("fusedformer_kernels.runtime.plans")

from fusedformer_kernels.rows.norm import norm_forward  # noqa: E402
from fusedformer_kernels.rows.softmax import softmax_forward  # noqa: E402
from fusedformer_kernels.runtime import launch, plan, recording, targets, tuned  # noqa: E402
from fusedformer_kernels.runtime.recording import Recorder  # noqa: E402
from fusedformer_kernels.runtime.steps import step, unplanned  # noqa: E402


@pytest.fixture(autouse=True)
def _triton() -> Iterator[None]:
    plans.clear()
    with backend("triton"):
        yield
    plans.clear()


def softmax(x: Tensor) -> Tensor:
    return softmax_forward(x, None, 1.0, False, x.dtype, False)


def test_the_second_call_of_a_kind_is_planned_and_gives_the_same_bits(
    device: str, runs: list[plan.Plan]
) -> None:
    x, y = (torch.randn(3, 37, device=device) for _ in range(2))
    first, wanted = softmax(x), softmax_forward.__wrapped__(y, None, 1.0, False, y.dtype, False)  # type: ignore[attr-defined]
    assert not runs
    assert torch.equal(softmax(y), wanted)
    assert len(runs) == 1
    assert torch.equal(softmax(x), first)


def test_a_kind_is_recorded_when_it_is_seen_again(
    device: str, runs: list[plan.Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording, "_is_verified", False)
    known = softmax_forward.planner.plans  # type: ignore[attr-defined]
    for calls, (plans_made, planned) in enumerate([(0, 0), (1, 0), (1, 1), (1, 2)], start=1):
        x = torch.randn(3, 37, device=device)
        torch.testing.assert_close(softmax(x), x.softmax(-1))
        assert (len(known), len(runs)) == (plans_made, planned), calls


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.double().float().half(),
        lambda x: x[:, 1:],
        lambda x: x.t().contiguous().t(),
        lambda x: torch.cat((x, x)),
        lambda x: x.flatten()[1:37].view(1, 36),
    ],
    ids=["dtype", "alignment", "strides", "shape", "view"],
)
def test_what_a_launch_depends_on_makes_another_kind(
    change: Callable[[Tensor], Tensor], device: str, runs: list[plan.Plan]
) -> None:
    x = torch.randn(3, 37, device=device)
    softmax(x)
    other = change(x)
    torch.testing.assert_close(softmax(other), other.softmax(-1))
    assert not runs


def test_settings_that_decide_launches_make_other_kinds(device: str, runs: list[plan.Plan]) -> None:
    x = torch.randn(3, 37, device=device)
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    softmax(x)
    try:
        matmul.fp32_precision = "tf32" if before != "tf32" else "ieee"
        softmax(x)
    finally:
        matmul.fp32_precision = before
    with targets.assume_target(targets.TARGETS["sm_80"]):
        softmax(x)
    with tuned.forced(("softmax_forward", 64), {"num_warps": 2}):
        softmax(x)
    assert not runs
    tuned.clear_caches()
    softmax(x)
    assert not runs
    softmax(x)
    assert runs


def test_who_counts_launches_sees_those_of_planned_calls(device: str) -> None:
    x = torch.randn(3, 37, device=device)
    softmax(x)
    softmax(x)
    with launch.recorded_launches(run=True) as found:
        softmax(x)
    assert [one.name for one in found] == ["_softmax_forward"]


def test_one_tensor_for_two_arguments_is_another_kind_than_two(
    device: str, runs: list[plan.Plan]
) -> None:
    def add(x: Tensor, residual: Tensor) -> Any:
        return norm_forward(
            x, residual, None, None, None, None, 0.0, 1e-5, "layer", 1, True, False, None
        )[1]

    x, y = (torch.randn(3, 32, device=device) for _ in range(2))
    assert torch.equal(add(x, x), x + x)
    assert torch.equal(add(x, y), x + y)
    assert not runs
    assert torch.equal(add(y, y), y + y)
    assert torch.equal(add(y, x), x + y)
    assert len(runs) == 2
    # Two objects at one address: nothing tells which of both a kernel's pointer is.
    view = x.view(3, 32)
    assert torch.equal(add(x, view), x + x)


def test_plans_keep_no_tensor_alive(device: str, runs: list[plan.Plan]) -> None:
    x = torch.randn(3, 37, device=device)
    for _ in range(2):
        result = softmax(x)
    gone = weakref.ref(x), weakref.ref(result)
    del x, result
    assert [ref() for ref in gone] == [None, None]
    assert runs


def test_plans_do_not_grow_without_bound(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "_MOST", 8)
    x = torch.randn(64, 16, device=device)
    for rows in range(1, 40):
        softmax(x[:rows])
    planner = softmax_forward.planner  # type: ignore[attr-defined]
    assert 0 < len(planner.plans) <= 8
    assert 0 < len(planner._seen) <= 8


def test_threads_share_plans(
    device: str, runs: list[plan.Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    if device == "cpu":  # Triton's interpreter runs one kernel at a time
        lock, original = threading.Lock(), launch.launch

        def one_by_one(*args: Any, **constants: Any) -> None:
            with lock:
                original(*args, **constants)

        monkeypatch.setattr(launch, "launch", one_by_one)
    inputs = [torch.randn(3, 37, device=device) for _ in range(4)]
    wanted = [x.softmax(-1) for x in inputs]
    softmax(inputs[0])
    found: list[Tensor] = [torch.empty(0)] * 4

    def work(index: int) -> None:
        for _ in range(5):
            found[index] = softmax(inputs[index])

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want)
    assert len(runs) == 20


def planner_of(launcher: Callable[..., Any]) -> Any:
    return plans.Planner(launcher)


def test_a_step_runs_each_time_in_its_place(device: str, runs: list[plan.Plan]) -> None:
    calls = []

    @step
    def double(x: Tensor, factor: float) -> Tensor:
        calls.append(factor)
        return x * factor

    def launcher(x: Tensor) -> tuple[Tensor, Tensor]:
        twice = double(softmax(x), 2.0)
        return softmax(twice), twice

    planner = planner_of(launcher)
    x, y = (torch.randn(3, 37, device=device) for _ in range(2))
    planner((x,), {})
    found = planner((y,), {})
    wanted = launcher(y)
    assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))
    assert calls == [2.0] * 3
    assert runs[0] is next(iter(planner.plans.values()))


def test_a_step_may_write_to_memory_of_the_call(device: str, runs: list[plan.Plan]) -> None:
    @step
    def add_in_place(total: Tensor, x: Tensor) -> Tensor:
        return total.add_(x)

    def launcher(x: Tensor) -> Tensor:
        return add_in_place(softmax(x), x)

    planner = planner_of(launcher)
    for _ in range(3):
        x = torch.randn(3, 37, device=device)
        torch.testing.assert_close(planner((x,), {}), x.softmax(-1) + x)
    assert len(runs) == 2


def test_a_call_that_says_so_has_no_plan(device: str, runs: list[plan.Plan]) -> None:
    def launcher(x: Tensor) -> Tensor:
        unplanned()
        return softmax(x.clone())

    planner = planner_of(launcher)
    for _ in range(3):
        x = torch.randn(3, 37, device=device)
        torch.testing.assert_close(planner((x,), {}), x.softmax(-1))
    assert not planner.plans
    assert len(runs) == 1  # of the launcher within, which the second call has recorded


@pytest.mark.parametrize(
    "forbidden", [lambda x: x.clone(), lambda x: x * 2, lambda x: x.sum().item()]
)
def test_verification_sees_what_a_plan_would_leave_out(
    forbidden: Callable[[Tensor], Any], device: str
) -> None:
    def launcher(x: Tensor) -> Tensor:
        forbidden(x)
        return softmax(x)

    with pytest.raises(AssertionError, match="does not say so"), recording.verified():
        planner_of(launcher)((torch.randn(3, 37, device=device),), {})


def test_verification_sees_memory_that_outlives_the_call(device: str) -> None:
    kept = torch.randn(3, 37, device=device)

    def launcher(x: Tensor) -> tuple[Tensor, Tensor]:
        return softmax(x), softmax(kept)

    with pytest.raises(AssertionError, match="unknown origin"), recording.verified():
        planner_of(launcher)((torch.randn(3, 37, device=device),), {})


def test_results_that_are_parts_of_one_memory_are_parts_of_one_memory(
    device: str, runs: list[plan.Plan]
) -> None:
    def launcher(x: Tensor) -> tuple[Tensor, Tensor]:
        both = softmax(x)
        return both[0], both[1:]

    planner = planner_of(launcher)
    for _ in range(2):
        x = torch.randn(3, 37, device=device)
        first, rest = planner((x,), {})
        wanted = x.softmax(-1)
        torch.testing.assert_close(first, wanted[0])
        torch.testing.assert_close(rest, wanted[1:])
    assert runs
    assert first.untyped_storage().data_ptr() == rest.untyped_storage().data_ptr()


def test_results_without_elements_are_made_anew(device: str, runs: list[plan.Plan]) -> None:
    def launcher(x: Tensor) -> tuple[Tensor, tuple[Tensor, None]]:
        return softmax(x), (x.new_empty(2, 0, dtype=torch.int64), None)

    planner = planner_of(launcher)
    for _ in range(2):
        x = torch.randn(3, 37, device=device)
        found, (empty, nothing) = planner((x,), {})
        torch.testing.assert_close(found, x.softmax(-1))
        assert (empty.shape, empty.dtype, nothing) == ((2, 0), torch.int64, None)
    assert runs


def test_arguments_without_elements_have_no_plan(device: str) -> None:
    assert Recorder([torch.empty(0, 3, device=device)]).failed
    assert softmax(torch.empty(0, 3, device=device)).shape == (0, 3)


# Of public functions, which are planned whole where no gradient is wanted.


def test_public_calls_without_gradients_are_one_plan(device: str, runs: list[plan.Plan]) -> None:
    q, k, v = (torch.randn(2, 2, 8, 16, device=device) for _ in range(3))
    first = functional.scaled_dot_product_attention(q, k, v)
    assert torch.equal(functional.scaled_dot_product_attention(q, k, v), first)
    assert len(runs) == 1
    q.requires_grad_()
    with torch.no_grad():
        assert torch.equal(functional.scaled_dot_product_attention(q, k, v), first)
    assert len(runs) == 2
    with_gradient = functional.scaled_dot_product_attention(q, k, v)
    assert with_gradient.requires_grad
    assert torch.equal(with_gradient, first)


def test_arguments_are_checked_in_each_call(device: str) -> None:
    x = torch.randn(3, 37, device=device)
    for _ in range(2):
        functional.layer_norm(x, (37,))
    with pytest.raises(ValueError, match="normalized_shape"):
        functional.layer_norm(x, (36,))
    with pytest.raises(TypeError, match="eps"):
        functional.layer_norm(x, (37,), eps="1")  # type: ignore[arg-type]
    functional.softmax(x, 1)
    with pytest.raises(TypeError, match="dim"):  # though 1.0 is equal to 1
        functional.softmax(x, 1.0)  # type: ignore[arg-type]


def test_dropout_is_drawn_in_each_call(device: str) -> None:
    x, residual = (torch.randn(8, 32, device=device) for _ in range(2))
    calls = [
        functional.dropout_add_layer_norm(x, residual, (32,), p=0.5, training=True)
        for _ in range(3)
    ]
    assert not torch.equal(calls[1], calls[0])
    assert not torch.equal(calls[2], calls[1])


def test_a_warning_is_given_each_time(device: str) -> None:
    x = torch.randn(3, 37, device=device)
    for _ in range(3):
        with pytest.warns(UserWarning, match="Implicit dimension") as found:
            functional.softmax(x)
        assert found[0].filename == __file__


def test_negative_views_and_leftovers_of_transforms_are_not_planned(
    device: str, runs: list[plan.Plan]
) -> None:
    x = torch.randn(3, 37, device=device)
    functional.softmax(x, -1)
    negative = torch.complex(torch.zeros_like(x), -x).conj().imag
    assert negative.is_neg()
    torch.testing.assert_close(functional.softmax(negative, -1), x.softmax(-1))
    left: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        left.append(x)
        return x

    torch.func.grad(lambda x: keep(x).sum())(x)
    torch.testing.assert_close(functional.softmax(left[0], -1), x.softmax(-1))
