"""A provider is timed only where its results pass, whatever its layout, with dropout as asked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.benchmarks.square import CPU, new_results, run_options, square_case, square_suite

from fusedformer import backend
from harness import records
from harness.attention_peers import materialized, padded, stock
from harness.case import REFERENCE, Case, Layout, NotApplicable, Program, Sizes, Suite, Unsupported
from harness.providers import PEER_MODULES, absent_peers
from harness.runner import check_all, run_suite
from suites import bench_attention, bench_norm


def _declines(input: torch.Tensor) -> torch.Tensor:
    raise Unsupported("not on Mondays")


def _raises(input: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("out of paper")


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(input)
        return input * input

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad * ctx.saved_tensors[0]  # a factor of 2 is missing


# What is planted, and the status that forward and backward must get.
FAULTS = {
    "all zero": (lambda x: x * 0.0, "failed check", "failed check"),
    "one element off": (lambda x: x * x + 1e-3 * torch.eye(4, 8), "failed check", "failed check"),
    "not finite": (lambda x: x * x / 0.0, "failed check", "failed check"),
    "another shape": (lambda x: (x * x)[:1], "failed check", "failed check"),
    "another dtype": (lambda x: (x * x).double(), "failed check", "failed check"),
    "wrong gradient": (WrongGradient.apply, "timed", "failed check"),
    "no backward": (lambda x: (x * x).detach(), "timed", "error"),
    "declines": (_declines, "unsupported", "unsupported"),
    "raises": (_raises, "error", "error"),
    "right": (lambda x: x * x, "timed", "timed"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_provider_is_timed_only_where_it_passes_its_check(name: str) -> None:
    function, forward, backward = FAULTS[name]
    results = new_results()
    suite = square_suite({name: function})
    run_suite(suite, suite.cases(Sizes.of("tiny"), torch.float32), results, run_options())
    found = {r["direction"]: r for r in results.document["records"] if r["provider"] == name}
    assert found["forward"]["status"] == forward
    assert found["backward"]["status"] == found["both"]["status"] == backward
    for record in found.values():
        timed = record["status"] == "timed"
        assert (record["median_us"] is not None) == timed == bool(record["samples_us"])
        assert timed or record["reason"]
    assert not records.problems(results.document)
    stock = [r for r in results.document["records"] if r["provider"] == REFERENCE]
    assert [r["status"] for r in stock] == ["timed"] * 3


def _beside_nan(function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """A provider that holds each 4x8 tensor as the left half of a 4x16 one, NaN on the right."""
    pad = lambda name, tensor: torch.nn.functional.pad(tensor, (0, 8), value=torch.nan)
    layout = Layout(pad, lambda name, tensor: tensor[:, :8])
    return lambda case: Program(lambda input: function(input), layout=layout)


def test_provider_with_its_own_layout_is_compared_in_the_layout_of_the_case() -> None:
    seen = []

    def square(input: torch.Tensor) -> torch.Tensor:
        assert input.is_leaf and input.requires_grad  # made before the call, not within
        seen.append(tuple(input.shape))
        return input * input

    def foreign(case: Case) -> Program:
        raise NotApplicable("for other cases")

    given = {
        REFERENCE: _beside_nan(square),
        "as given": lambda case: Program(lambda input: input * input),
        "another layout": _beside_nan(square),
        "wrong": _beside_nan(lambda input: input * input + 1e-3),
        "wrong gradient": _beside_nan(WrongGradient.apply),
        "foreign": foreign,
    }
    truth = lambda case, device: Program(lambda input: input * input)
    suite = Suite("square", lambda *_: [square_case()], lambda *_: given, truth)
    results = new_results()
    run_suite(suite, [square_case()], results, run_options())
    found = {(r["provider"], r["direction"]): r["status"] for r in results.document["records"]}
    assert {name for name, _ in found} == set(given) - {"foreign"}
    failed = {key for key, status in found.items() if status == "failed check"}
    assert failed == {
        ("wrong", "forward"),
        ("wrong", "backward"),
        ("wrong", "both"),
        ("wrong gradient", "backward"),
        ("wrong gradient", "both"),
    }
    assert {status for key, status in found.items() if key not in failed} == {"timed"}
    assert set(seen) == {(4, 16)}


@pytest.mark.parametrize(
    "kind", ["key padding", "packed", "windowed", "biased", "relative bias", "gated relative bias"]
)
def test_attention_that_ignores_what_a_kind_is_about_is_not_timed(kind: str) -> None:
    with backend("torch"):  # what is tested is the harness
        _check_that_plain_attention_fails(kind)


def _check_that_plain_attention_fails(kind: str) -> None:
    torch.manual_seed(0)
    case = bench_attention._case(kind, 64, 32, 64, torch.float32, headline=True)

    def plain(query: Any, key: Any, value: Any, **ignored: torch.Tensor) -> torch.Tensor:
        if kind == "packed":  # all tokens in one sequence
            query, key, value = (t.transpose(0, 1)[None] for t in (query, key, value))
        output = torch.nn.functional.scaled_dot_product_attention(query, key, value)
        # A bias stays in the graph: its gradient is there, and zero.
        output = output + 0.0 * sum(t.sum() for t in ignored.values() if t.requires_grad)
        return output[0].transpose(0, 1) if kind == "packed" else output

    given = {
        REFERENCE: stock(),
        "plain": lambda case: Program(plain),
        "right": bench_attention.fused,
    }
    contenders = check_all(bench_attention.SUITE, case, given, case.make(CPU), CPU)
    statuses = {c.name: {v.status for v in c.verdicts.values()} for c in contenders}
    assert statuses == {REFERENCE: {"timed"}, "plain": {"failed check"}, "right": {"timed"}}


def _attention_with(p: float, same_mask: bool) -> Program:
    """Attention whose dropout has probability ``p``, and whose backward may draw another mask."""

    def call(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        weights = (query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5).softmax(-1)
        masks = [(torch.rand_like(weights) >= p) / (1 - p) for _ in range(2)]
        first = (weights * masks[0]) @ value
        if same_mask:
            return first
        second = (weights * masks[1]) @ value
        return second + (first - second).detach()  # the value of one, the gradient of the other

    return Program(call)


@pytest.mark.parametrize(
    ("p", "same_mask", "message"),
    [
        (0.1, True, None),
        (0.11, True, "dropout kept"),
        (0.0, True, "dropout kept"),
        (0.1, False, "dropout mask"),
    ],
    ids=["right", "drops too much", "drops nothing", "another mask in the backward"],
)
def test_dropout_check_of_attention(p: float, same_mask: bool, message: str | None) -> None:
    torch.manual_seed(0)
    case = bench_attention._case("dropout", 256, 128, 64, torch.float32, headline=True)
    assert case.before is not None
    if message is None:
        case.before(_attention_with(p, same_mask), case.make(CPU))
        return
    with pytest.raises(AssertionError, match=message):
        case.before(_attention_with(p, same_mask), case.make(CPU))


def test_dropout_check_of_norm_fails_without_dropout() -> None:
    case = bench_norm._case("dropout + add + layer_norm", 64, 768, torch.float32)
    program = bench_norm.eager(case)
    assert case.before is not None
    assert program.checked is not None
    case.before(program, case.make(CPU))
    with pytest.raises(AssertionError, match="dropout kept"):
        case.before(Program(program.checked), case.make(CPU))


def test_padded_layout_keeps_real_tokens_and_zeros_the_rest() -> None:
    layout = padded([5, 1, 3])
    tokens = torch.randn(9, 2, 4)
    held = layout.own("query", tokens)
    assert held.shape == (3, 2, 5, 4)
    assert torch.equal(held[2, :, :3].transpose(0, 1), tokens[6:])
    assert held.count_nonzero() == tokens.numel()
    assert torch.equal(layout.back("query", held), tokens)
    starts = torch.tensor([0, 5, 6, 9])
    assert layout.own("cu_seqlens", starts) is starts


def test_materialized_bias_has_the_table_by_distance_and_its_gradient() -> None:
    table = torch.randn(2, 7, dtype=torch.double, requires_grad=True)
    layout = materialized(6, 3)
    bias = layout.own("relative_bias", table)
    assert bias.shape == (1, 2, 6, 6)
    assert all(
        bias[0, h, i, j] == table[h, 3 + min(max(j - i, -3), 3)]
        for h in range(2)
        for i in range(6)
        for j in range(6)
    )
    grad = torch.randn_like(bias)
    (expected,) = torch.autograd.grad(bias, table, grad)
    torch.testing.assert_close(layout.back("relative_bias", grad), expected)
    assert layout.back("query", grad) is grad


def test_absent_peers_are_named() -> None:
    absent = absent_peers(CPU)
    assert set(PEER_MODULES) <= set(absent)
    assert "FlexAttention" in absent
