"""The parity criterion rejects what is wrong, each in its own way; so the other tests mean it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fusedformer import reference, testing
from fusedformer.testing import (
    ParityError,
    ProvesNothingError,
    assert_function_parity,
    compare_tensors,
    parity,
    poisoned_memory,
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def attention_inputs(**changes: Any) -> dict[str, Any]:
    shapes = {"query": (2, 3, 9, 8), "key": (2, 3, 11, 8), "value": (2, 3, 11, 8)}
    inputs: dict[str, Any] = {k: torch.randn(s).requires_grad_() for k, s in shapes.items()}
    inputs["attn_mask"] = torch.rand(9, 11) > 0.4
    inputs["attn_mask"][:, 0] = True
    return inputs | changes


def attention_truth(**inputs: Any) -> Tensor:
    return reference.scaled_dot_product_attention(**inputs)[0]


def norm_inputs() -> dict[str, Any]:
    return {
        "input": (0.05 * torch.randn(7, 24)).requires_grad_(),
        "normalized_shape": (24,),
        "weight": torch.randn(24).requires_grad_(),
        "bias": torch.randn(24).requires_grad_(),
    }


class WithGradient(torch.autograd.Function):
    """The identity, whose gradient is changed on its way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.change = change
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return ctx.change(grad), None


def one_wrong(x: Tensor) -> Tensor:
    """One element off by a tenth of the largest."""
    error = torch.zeros(x.numel(), dtype=x.dtype)
    error[x.numel() // 2] = 0.1 * x.detach().abs().max()
    return x + error.view(x.shape)


def one_nan(x: Tensor) -> Tensor:
    hole = torch.zeros(x.shape, dtype=torch.bool)
    hole.view(-1)[-1] = True
    return x.masked_fill(hole, torch.nan)


def attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, attn_mask)


def through(name: str, change: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """Attention with the gradient of one input changed, the output right."""

    def candidate(**inputs: Any) -> Tensor:
        return attention(**{**inputs, name: WithGradient.apply(inputs[name], change)})

    return candidate


FAULTS: dict[str, Callable[..., Any]] = {
    "all zeros": lambda **i: attention(**i) * 0.0,
    "mask dropped": lambda **i: attention(**{**i, "attn_mask": None}),
    "mask inverted": lambda **i: attention(**{**i, "attn_mask": ~i["attn_mask"]}),
    "heads swapped": lambda **i: attention(**i).flip(1),
    "dims of a head reversed": lambda **i: attention(**i).flip(3),
    "scale dropped": lambda **i: attention(**{**i, "query": i["query"] * 8**0.5}),
    "one wrong element": lambda **i: one_wrong(attention(**i)),
    "one NaN": lambda **i: one_nan(attention(**i)),
    "one infinity": lambda **i: one_nan(attention(**i)).nan_to_num(nan=torch.inf),
    "last row not computed": lambda **i: F.pad(attention(**i)[:, :, :-1], (0, 0, 0, 1)),
    "shape that broadcasts": lambda **i: attention(**i)[:1],
    "an output too many": lambda **i: (attention(**i), attention(**i)),
    "gradient of query zero": through("query", torch.zeros_like),
    "gradient of key twice": through("key", lambda g: 2 * g),
    "gradient of value of one element wrong": through("value", one_wrong),
    "gradient of value of one element NaN": through("value", one_nan),
    "gradient of query missing": lambda **i: attention(**{**i, "query": i["query"].detach()}),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_attention_fail(fault: str, dtype: torch.dtype) -> None:
    with pytest.raises(ParityError) as error:
        assert_function_parity(
            FAULTS[fault], attention, attention_truth, attention_inputs(), dtype=dtype
        )
    assert not isinstance(error.value, ProvesNothingError)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_right_passes(dtype: torch.dtype) -> None:
    comparisons = assert_function_parity(
        attention, attention, attention_truth, attention_inputs(), dtype=dtype
    )
    names = ["output 0", "grad of query", "grad of key", "grad of value"]
    assert [c.name for c in comparisons] == names
    assert all(c.passed and c.ratio == 1.0 for c in comparisons)


@pytest.mark.parametrize(
    ("fault", "names"),
    [
        ("gradient of query zero", {"grad of query"}),
        ("gradient of value of one element wrong", {"grad of value"}),
        ("one NaN", {"output 0"}),
    ],
)
def test_only_what_is_wrong_is_named(fault: str, names: set[str]) -> None:
    results = parity(FAULTS[fault], attention, attention_truth, attention_inputs())
    found = {c.name for c in results if not c.passed}
    # The NaN's element also cuts its gradient off, which is a fault of the gradients too.
    assert found >= names
    if "grad" in fault:
        assert found == names


NORM_FAULTS: dict[str, Callable[..., Tensor]] = {
    "epsilon of 1e-12": lambda **i: F.layer_norm(**i, eps=1e-12),
    "epsilon outside the root": lambda input, normalized_shape, weight, bias: (
        (input - input.mean(-1, keepdim=True))
        / (input.std(-1, keepdim=True, correction=0) + 1e-5)
        * weight
        + bias
    ),
    "Bessel's correction": lambda input, normalized_shape, weight, bias: (
        (input - input.mean(-1, keepdim=True))
        / (input.var(-1, keepdim=True) + 1e-5).sqrt()
        * weight
        + bias
    ),
    "bias dropped": lambda input, normalized_shape, weight, bias: F.layer_norm(
        input, normalized_shape, weight
    ),
    "mean kept": lambda input, normalized_shape, weight, bias: (
        F.rms_norm(input, normalized_shape, weight, 1e-5) + bias
    ),
}


@pytest.mark.parametrize("fault", NORM_FAULTS)
def test_faults_of_layer_norm_fail(fault: str) -> None:
    with pytest.raises(ParityError, match="output 0"):
        assert_function_parity(
            NORM_FAULTS[fault], F.layer_norm, reference.layer_norm, norm_inputs()
        )


def test_a_low_precision_sum_fails() -> None:
    """Statistics in half precision give the right magnitude, and too large an error."""

    def candidate(input: Tensor) -> Tensor:
        total = torch.zeros(input.shape[0], 1, dtype=input.dtype)
        for column in input.exp().split(1, -1):
            total = total + column
        return input.exp() / total

    x = torch.randn(4, 500).requires_grad_()
    stock = lambda input: torch.softmax(input, -1)
    truth = lambda input: reference.softmax(input, -1)
    with pytest.raises(ParityError):
        assert_function_parity(candidate, stock, truth, {"input": x}, dtype=torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_zeros_fail_for_every_op(dtype: torch.dtype) -> None:
    x = {"input": torch.randn(5, 20).requires_grad_()}
    for function in (
        lambda input: reference.softmax(input, -1),
        lambda input: reference.log_softmax(input, -1),
        lambda input: reference.layer_norm(input, (20,)),
        lambda input: reference.rms_norm(input, (20,)),
        lambda input: reference.bias_activation(input),
    ):
        zeros = lambda input, f=function: 0.0 * f(input)
        with pytest.raises(ParityError):
            assert_function_parity(zeros, function, function, x, dtype=dtype)


class TestDegenerateCases:
    """A case that an all-zero result would pass is refused: it would show nothing."""

    def test_gradient_that_cancels(self) -> None:
        # The sum of a softmax is 1: the gradient is rounding alone, and zeros are as good.
        total = lambda input: torch.softmax(input, -1).sum(-1)
        truth = lambda input: reference.softmax(input, -1).sum(-1)
        x = {"input": torch.randn(4, 30).requires_grad_()}
        with pytest.raises(ProvesNothingError, match=r"grad of input: this case proves nothing"):
            assert_function_parity(total, total, truth, x)

    def test_a_real_fault_beside_it_is_the_one_raised(self) -> None:
        total = lambda input: torch.softmax(input, -1).sum(-1)
        truth = lambda input: reference.softmax(input, -1).sum(-1)
        x = {"input": torch.randn(4, 30).requires_grad_()}
        with pytest.raises(ParityError) as error:
            assert_function_parity(lambda input: 2 * total(input), total, truth, x)
        assert not isinstance(error.value, ProvesNothingError)

    def test_stock_that_is_wrong_is_no_yardstick(self) -> None:
        x = {"input": torch.randn(4, 6)}
        truth = lambda input: input * 2
        stock = lambda input: input * -2
        with pytest.raises(ProvesNothingError, match="all-zero"):
            assert_function_parity(truth, stock, truth, x)

    def test_zero_truth_wants_zeros(self) -> None:
        """Where the truth is zero throughout, zero is the answer and the only one."""
        zeros = torch.zeros(3, 4)
        assert compare_tensors("x", zeros, zeros, zeros.double()).passed
        assert not compare_tensors("x", zeros + 1e-30, zeros, zeros.double()).passed


class TestCompare:
    truth = torch.linspace(1.0, 2.0, 12, dtype=torch.float64).reshape(3, 4)

    def test_limit_is_twice_stock_and_two_eps(self) -> None:
        stock = self.truth.float()
        stock[0, 0] += 1e-3
        for error, passes in ((1.9e-3, True), (2.1e-3, False)):
            candidate = self.truth.float()
            candidate[2, 3] += error
            assert compare_tensors("x", candidate, stock, self.truth).passed is passes

    def test_many_small_errors_fail_by_root_mean_square(self) -> None:
        stock = self.truth.float()
        stock[0, 0] += 1e-3
        result = compare_tensors("x", self.truth.float() + 1e-3, stock, self.truth)
        assert result.error <= result.limit
        assert result.rms_error > result.rms_limit
        assert not result.passed

    def test_message_names_the_worst_element(self) -> None:
        candidate = self.truth.float()
        candidate[1, 2] += 0.25
        fault = compare_tensors("grad of weight", candidate, self.truth.float(), self.truth).fault
        assert fault.startswith("grad of weight(1, 2): got ")
        assert "times the limit" in fault

    @pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
    def test_non_finite_values_belong_where_the_truth_has_them(self, value: float) -> None:
        truth = self.truth.clone()
        truth[1, 1] = value
        right = truth.float()
        assert compare_tensors("x", right, right, truth).passed
        assert not compare_tensors("x", self.truth.float(), right, truth).passed
        assert not compare_tensors("x", right, right, self.truth).passed
        assert not compare_tensors("x", right.neg().nan_to_num(3.0), right, truth).passed

    def test_coarser_result_than_stock_fails(self) -> None:
        low = self.truth.bfloat16()
        assert (
            "stock is torch.float32"
            in compare_tensors("x", low, self.truth.float(), self.truth).fault
        )

    def test_finer_result_than_stock_is_held_to_its_own_rounding(self) -> None:
        """A float32 log-sum-exp, say, beside stock's in bfloat16."""
        stock = self.truth.bfloat16()
        result = compare_tensors("x", self.truth.float(), stock, self.truth)
        assert result.passed
        eps = torch.finfo(torch.float32).eps
        assert result.limit == 2 * result.stock_error + 2 * eps * result.largest

    def test_zero_truth_is_not_loosened_by_stock_that_is_not_finite(self) -> None:
        zeros, stock = torch.zeros(3, 4), torch.full((3, 4), torch.nan)
        assert compare_tensors("x", zeros, stock, zeros.double()).passed
        assert not compare_tensors("x", zeros + 1e9, stock, zeros.double()).passed

    def test_stock_not_finite_loosens_nothing(self) -> None:
        stock = self.truth.float()
        stock[0] = torch.nan
        assert compare_tensors("x", self.truth.float(), stock, self.truth).passed
        assert not compare_tensors("x", self.truth.float() + 1e-3, stock, self.truth).passed

    def test_empty(self) -> None:
        empty = torch.empty(0, 3)
        assert compare_tensors("x", empty, empty, empty.double()).passed


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.transpose(0, 2),
    "a step along columns": lambda x: x[..., ::3],
    "an offset": lambda x: x[1:, 2:, 3:],
    "expanded": lambda x: x[:1].expand(5, -1, -1),
    "overlapping windows": lambda x: x.unfold(2, 4, 2),
    "empty": lambda x: x[:0].transpose(0, 1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_are_kept(layout: str) -> None:
    x = LAYOUTS[layout](torch.randn(4, 6, 10)).requires_grad_()
    seen = []

    def record(input: Tensor) -> Tensor:
        seen.append((input.stride(), input.storage_offset() % 16, input.dtype))
        return input * 2

    assert_function_parity(record, record, record, {"input": x})
    wanted = (x.stride(), x.storage_offset() % 16)
    assert seen == [(*wanted, d) for d in (torch.float32, torch.float32, torch.float64)]


def test_no_gradient_at_all_fails() -> None:
    """A result cut off from its inputs has gradients of zero, not gradients that nobody judges."""
    detached = lambda **i: attention(**i).detach()
    with pytest.raises(ParityError, match="grad of query") as error:
        assert_function_parity(detached, attention, attention_truth, attention_inputs())
    assert "grad of value" in str(error.value)


def test_gradient_that_stock_lacks_is_judged_by_rounding_alone() -> None:
    stock = lambda input: (2 * input).detach()
    x = {"input": torch.randn(3, 4).requires_grad_()}
    right = lambda input: 2 * input
    wrong = lambda input: 2.001 * input - 0.001 * input.detach()
    found = parity(right, stock, right, x)[1]
    assert found.passed
    assert found.limit == 2 * torch.finfo(torch.float32).eps * found.largest
    assert not parity(wrong, stock, right, x)[1].passed


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_output_gradients_are_not_the_inputs(seed: int) -> None:
    """Drawn from the same seed they would be equal, and through a norm such a gradient vanishes."""
    seen: list[Tensor] = []
    torch.manual_seed(seed)
    x = torch.randn(5, 8).requires_grad_()

    def look(gradient: Tensor) -> Tensor:
        seen.append(gradient)
        return gradient

    candidate = lambda input: WithGradient.apply(input, look)
    double = lambda input: input.clone()
    assert_function_parity(candidate, double, double, {"input": x})
    assert not torch.equal(seen[0], x)


def test_nothing_returned_in_a_place_is_no_output() -> None:
    """As attention weights that were not asked for."""
    pair = lambda input: (2 * input, None)
    x = {"input": torch.randn(3, 4)}
    assert [c.name for c in assert_function_parity(pair, pair, pair, x)] == ["output 0"]


def test_writing_to_an_input_fails() -> None:
    def candidate(input: Tensor) -> Tensor:
        result = torch.relu(input)
        with torch.no_grad():
            input.zero_()
        return result

    x = {"input": torch.randn(3, 4)}
    with pytest.raises(ParityError, match="input: the candidate wrote to it"):
        assert_function_parity(candidate, torch.relu, lambda input: torch.relu(input), x)


@poisoned_memory()
def poisoned_and_raising() -> None:
    for empty in (
        torch.empty(9),
        torch.empty_like(torch.ones(9, dtype=torch.bfloat16)),
        torch.ones(1).new_empty(9),
        torch.empty_strided((3, 3), (1, 3), dtype=torch.float16),
    ):
        assert empty.isnan().all()
    assert (torch.empty(9, dtype=torch.int64) == torch.iinfo(torch.int64).max).all()
    raise ValueError("inside")


@pytest.mark.parametrize("before", [True, False])
def test_poisoned_memory_is_nan_and_restored_after_an_error(before: bool) -> None:
    settings: Any = torch.utils.deterministic
    torch.use_deterministic_algorithms(before, warn_only=True)
    settings.fill_uninitialized_memory = before
    with pytest.raises(ValueError, match="inside"):
        poisoned_and_raising()
    assert torch.are_deterministic_algorithms_enabled() is before
    assert settings.fill_uninitialized_memory is before


def test_the_old_names_mean_the_functions_that_have_new_ones() -> None:
    assert testing.compare is compare_tensors
    assert testing.assert_parity is assert_function_parity
