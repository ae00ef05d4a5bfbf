"""The benchmarks measure what they say: checks come before times, counts are right, files last."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import bench_attention  # noqa: E402
import bench_norm  # noqa: E402
import compare  # noqa: E402
import page  # noqa: E402
import table  # noqa: E402
from fusedformer import backend  # noqa: E402
from harness import counting, records, timing  # noqa: E402
from harness.attention_peers import materialized, padded  # noqa: E402
from harness.case import (  # noqa: E402
    REFERENCE,
    Case,
    Inputs,
    Layout,
    NotApplicable,
    Program,
    Sizes,
    Suite,
    Unsupported,
)
from harness.providers import PEER_MODULES, absent_peers  # noqa: E402
from harness.runner import Options, check_all, run_suite  # noqa: E402
from harness.suites import SUITES  # noqa: E402

CPU = torch.device("cpu")


def _options(**changes: Any) -> Options:
    return Options(CPU, seconds=0.001, say=lambda line: None, **changes)


def _results(path: Path | None = None) -> records.ResultFile:
    results = records.ResultFile(path, records.new_document(CPU, {}))
    results.set_ceilings({"copy_gb_s": 10.0, "matmul_tflop_s": 0.1, "matmul_dtype": "float32"})
    return results


def _square_case(name: str = "4x8") -> Case:
    def make(device: torch.device) -> Inputs:
        return {"input": torch.randn(4, 8, device=device).requires_grad_()}

    return Case("square", name, torch.float32, make, counting.softmax(4, 8, 4))


def _square_suite(
    others: dict[str, Callable[[torch.Tensor], torch.Tensor]], cases: list[Case] | None = None
) -> Suite:
    def of(function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
        return lambda case: Program(lambda input: function(input))

    stock = of(torch.square)
    given = {REFERENCE: stock, **{name: of(function) for name, function in others.items()}}
    return Suite(
        "square", lambda sizes, dtype: cases or [_square_case()], lambda device, compile: given,
        lambda case, device: stock(case),
    )


def _declines(input: torch.Tensor) -> torch.Tensor:
    raise Unsupported("not on Mondays")


def _raises(input: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("out of paper")


class _WrongGradient(torch.autograd.Function):
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
    "one element off": (
        lambda x: x * x + 1e-3 * torch.eye(4, 8), "failed check", "failed check"),
    "not finite": (lambda x: x * x / 0.0, "failed check", "failed check"),
    "another shape": (lambda x: (x * x)[:1], "failed check", "failed check"),
    "another dtype": (lambda x: (x * x).double(), "failed check", "failed check"),
    "wrong gradient": (_WrongGradient.apply, "timed", "failed check"),
    "no backward": (lambda x: (x * x).detach(), "timed", "error"),
    "declines": (_declines, "unsupported", "unsupported"),
    "raises": (_raises, "error", "error"),
    "right": (lambda x: x * x, "timed", "timed"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_provider_is_timed_only_where_it_passes_its_check(name: str) -> None:
    function, forward, backward = FAULTS[name]
    results = _results()
    suite = _square_suite({name: function})
    run_suite(suite, suite.cases(Sizes.of("tiny"), torch.float32), results, _options())
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
        "wrong gradient": _beside_nan(_WrongGradient.apply),
        "foreign": foreign,
    }
    truth = lambda case, device: Program(lambda input: input * input)
    suite = Suite("square", lambda *_: [_square_case()], lambda *_: given, truth)
    results = _results()
    run_suite(suite, [_square_case()], results, _options())
    found = {(r["provider"], r["direction"]): r["status"] for r in results.document["records"]}
    assert {name for name, _ in found} == set(given) - {"foreign"}
    failed = {key for key, status in found.items() if status == "failed check"}
    assert failed == {
        ("wrong", "forward"), ("wrong", "backward"), ("wrong", "both"),
        ("wrong gradient", "backward"), ("wrong gradient", "both"),
    }
    assert {status for key, status in found.items() if key not in failed} == {"timed"}
    assert set(seen) == {(4, 16)}


def test_interrupted_run_keeps_what_it_measured_and_goes_on_from_there(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    cases = [_square_case("first"), _square_case("second")]

    def interrupt(input: torch.Tensor) -> torch.Tensor:
        raise KeyboardInterrupt

    results = _results(path)
    run_suite(_square_suite({}), cases[:1], results, _options())
    with pytest.raises(KeyboardInterrupt):
        run_suite(_square_suite({"peer": interrupt}), cases[1:], results, _options())
    kept = json.loads(path.read_text())
    assert not records.problems(kept)
    assert {r["case"] for r in kept["records"]} == {"first"}
    again = _results(path)
    run_suite(_square_suite({}), cases, again, _options())
    names = [r["case"] for r in json.loads(path.read_text())["records"]]
    assert names == ["first"] * 3 + ["second"] * 3


def test_no_case_starts_after_the_deadline() -> None:
    results = _results()
    assert not run_suite(_square_suite({}), [_square_case()], results, _options(deadline=0.0))
    assert results.document["records"] == []


def _valid_document() -> dict[str, Any]:
    results = _results()
    run_suite(_square_suite({"peer": torch.square}), [_square_case()], results, _options())
    return json.loads(json.dumps(results.document))


BREAKAGES = {
    "no commit": lambda d: d.pop("commit"),
    "another schema": lambda d: d.update(schema=2),
    "no ceiling": lambda d: d["ceilings"].pop("copy_gb_s"),
    "no provider": lambda d: d["records"][0].pop("provider"),
    "time without passing": lambda d: d["records"][0].update(status="failed check", reason="x"),
    "no reason": lambda d: d["records"][0].update(
        status="unsupported", median_us=None, p20_us=None, p80_us=None),
    "passing without time": lambda d: d["records"][0].update(median_us=None),
    "percentiles out of order": lambda d: d["records"][0].update(p20_us=1e9),
    "tokens that are no number": lambda d: d["records"][0].update(tokens="many"),
    "unknown status": lambda d: d["records"][0].update(status="fine"),
}


@pytest.mark.parametrize("name", BREAKAGES)
def test_schema_check_finds(name: str) -> None:
    document = _valid_document()
    assert records.problems(document) == []
    BREAKAGES[name](document)
    assert records.problems(document)


def test_table_names_the_place_and_compares_with_the_library() -> None:
    document = _valid_document()
    for record in document["records"]:
        ours = record["provider"] == "peer"
        record["provider"] = table.OURS if ours else "stock"
        record["median_us"] = 100.0 if ours else 250.0
    text = table.markdown(document)
    assert document["commit"][:12] in text
    assert "copy 10 GB/s" in text
    row = next(line for line in text.splitlines() if line.startswith("| 4x8 "))
    assert "250 µs (2.50x)" in row
    assert "%" in row  # the library's share of the floor


def test_files_from_before_tokens_were_counted_meet_the_schema() -> None:
    document = _valid_document()
    for record in document["records"]:
        del record["tokens"]
    assert records.problems(document) == []
    assert "tokens/s" not in table.markdown(document)


def test_tokens_a_second_and_peak_memory_stand_beside_each_time() -> None:
    case = dataclasses.replace(_square_case(), tokens=600)
    suite = _square_suite({table.OURS: torch.square}, [case])
    results = _results()
    run_suite(suite, [case], results, _options())
    for record in results.document["records"]:
        assert record["tokens"] == 600
        ours = record["provider"] == table.OURS
        record["median_us"] = 2e5 if ours else 1e6
        record["peak_memory_bytes"] = 12_340_000 if ours else None
    text = table.markdown(results.document)
    row = next(line for line in text.splitlines() if line.startswith("| 4x8 "))
    assert "| 1 s, 600 tokens/s (5.00x) |" in row
    assert "| 200 ms, 3 k tokens/s, 12.3 MB, " in row


# Floors that were worked out by hand for an H200: 4300 GB/s, 790 TFLOP/s, 16,384 tokens, bf16.
BY_HAND = {
    # 4 tensors of 16384 * 768 * 2 bytes = 100.7 MB
    "residual + LayerNorm": (
        counting.layer_norm(16384, 768, 2, residual=True, return_sum=True)["forward"], 23.4),
    # 3 tensors = 75.5 MB
    "LayerNorm backward": (counting.layer_norm(16384, 768, 2)["backward"], 17.6),
    # 4 * 16384 * 4096 * 768 = 206.2 GFLOP
    "attention S=4096": (counting.attention(4, 12, 4096, 64, 2)["forward"], 261.0),
    # 14 * 16384 * 512 * 768 FLOPs against 13 tensors of 25.2 MB, which take less
    "attention forward and backward S=512": (counting.attention(32, 12, 512, 64, 2)["both"], 114.2),
    # 4 tensors of 25.2 MB, more than 4 * 16384 * 128 * 768 FLOPs take
    "attention S=128": (counting.attention(128, 12, 128, 64, 2)["forward"], 23.4),
    # keys and values, 2 * 33.6 MB
    "attention of 1 query": (counting.attention(2, 16, 1, 64, 2, keys=8192)["forward"], 15.6),
    # queries and outputs of 32768 tokens, keys and values of the 16384 real ones: 201.3 MB
    "attention, half padded": (
        counting.attention(256, 16, 128, 64, 2, real_keys=16384, pairs=0)["forward"], 46.8),
    # as S=128 above, and 12 * 128 * 128 * 2 bytes of bias: read, read again and written
    "attention with a bias": (
        counting.attention(128, 12, 128, 64, 2, bias_bytes=12 * 2**15)["backward"], 47.2),
    # 2 * 8192 * 8192 * 512 FLOPs a product: one forward, three backward
    "contrastive forward": (counting.contrastive(8192, 512, 2)["forward"], 87.0),
    "contrastive": (counting.contrastive(8192, 512, 2)["both"], 347.9),
    "softmax": (counting.softmax(32768, 1024, 2)["forward"], 31.2),  # 2 * 67.1 MB
    "cross entropy": (counting.cross_entropy(8192, 50257, 2)["forward"], 191.5),  # 823.4 MB
    # 3 products of 2 * 8192 * 50257 * 768 = 632.4 GFLOP
    "projection and loss": (
        counting.linear_cross_entropy(8192, 8192, 50257, 768, 2)["both"], 2401.4),
    # GFLOP: 11 layers 7653.6 + 992.1 of attention, the last one's keys and values 116.0, its other
    # products and the head's of 32 * 77 rows 95.9, its attention 13.6, the projection 346.5
    "masked language modelling, a step": (
        counting.masked_lm([512] * 32, [77] * 32, 12, 768, 12, 3072, 30522, 2)["step"], 11668.1),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_floor_agrees_with_the_one_worked_out_by_hand(name: str) -> None:
    cost, floor = BY_HAND[name]
    assert round(cost.floor_us(4300.0, 790.0), 1) == floor


@pytest.mark.parametrize("kind", bench_attention.LENGTHS)
def test_attention_counts_exactly_the_visible_pairs(kind: str) -> None:
    batch, heads, length, dim = 4, 16, 24, 64
    case = bench_attention._case(kind, batch * length, length, dim, torch.float32, headline=True)
    inputs = case.make(CPU)
    if kind == "packed":
        counts = inputs["cu_seqlens"].diff().tolist()
        own = torch.block_diag(*(torch.ones(count, count) for count in counts)).bool()
        visible = own.expand(heads, -1, -1)
    else:
        rows = inputs["query"].shape[2]
        distance = torch.arange(length) - torch.arange(rows)[:, None]
        visible = torch.ones(*inputs["query"].shape[:2], rows, length, dtype=torch.bool)
        if kind == "causal":
            visible = visible & (distance <= 0)
        if case.options["window"] is not None:
            visible = visible & (distance.abs() <= case.options["window"])
        if "key_lengths" in inputs:
            visible = visible & inputs["key_mask"][:, None, None, :]
            assert torch.equal(inputs["key_lengths"], inputs["key_mask"].sum(-1).int())
        if kind == "boolean mask":
            visible = visible & inputs["attn_mask"]
    assert case.costs["forward"].flops == 4 * visible.sum().item() * dim
    assert visible.any(-1).all()  # no row of a benchmark is masked whole


@pytest.mark.parametrize("length", bench_attention.EVERY)
def test_natural_lengths_fill_half_of_the_padded_batch(length: int) -> None:
    lengths = bench_attention.natural_lengths(16384, length)
    assert lengths == bench_attention.natural_lengths(16384, length)
    assert max(lengths) == lengths[0] == length
    assert min(lengths) >= 1
    assert len(set(lengths)) > len(lengths) // 8
    assert 0.45 <= sum(lengths) / len(lengths) / length <= 0.55
    assert abs(sum(lengths) / 16384 - 1) < 0.1


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
        for h in range(2) for i in range(6) for j in range(6)
    )
    grad = torch.randn_like(bias)
    (expected,) = torch.autograd.grad(bias, table, grad)
    torch.testing.assert_close(layout.back("relative_bias", grad), expected)
    assert layout.back("query", grad) is grad


@pytest.mark.parametrize("kind", ["key padding", "packed", "windowed", "biased", "relative bias"])
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
        REFERENCE: bench_attention.stock(),
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
    [(0.1, True, None), (0.11, True, "dropout kept"), (0.0, True, "dropout kept"),
     (0.1, False, "dropout mask")],
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


def test_percentiles_are_interpolated() -> None:
    samples = timing.Samples([40.0, 10.0, 30.0, 20.0], "paired")
    assert samples.median_us == 25.0
    assert samples.percentile(0.2) == pytest.approx(16.0)


@pytest.mark.parametrize("clock", ["device", "host", "latency"])
def test_a_suite_is_timed_by_its_clock(clock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def clocked(name: str) -> Any:
        return lambda calls, *_: {n: timing.Samples([1.0], name) for n in calls}

    monkeypatch.setattr(timing, "CLOCKS", {name: clocked(name) for name in timing.CLOCKS})
    results = _results()
    suite = dataclasses.replace(_square_suite({}), clock=clock)
    run_suite(suite, [_square_case()], results, _options())
    assert {r["method"] for r in results.document["records"]} == {clock}


def test_order_of_providers_rotates() -> None:
    order: list[str] = []
    calls = {name: [lambda name=name: order.append(name)] for name in "abc"}
    timing.measure(calls, CPU, 0.0)
    # One estimate each, then rounds of repeated calls: what leads changes from round to round.
    leads = [name for i, name in enumerate(order) if i == 0 or order[i - 1] != name]
    assert "".join(leads[3:]) in ("abcbcacab", "bcacab", "cbcacab", "bcbcacab")


def test_peak_memory_counts_what_lives_at_once() -> None:
    def call() -> None:
        first = torch.empty(1000)
        second = first.clone()
        del first
        second.clone()

    assert timing.peak_memory(call, CPU) == 8000


def test_absent_peers_are_named() -> None:
    absent = absent_peers(CPU)
    assert set(PEER_MODULES) <= set(absent)
    assert "FlexAttention" in absent


# The suite may run under the interpreter; benchmarks never do.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


def test_the_list_of_suites_is_what_is_there() -> None:
    assert {path.stem for path in BENCHMARKS.glob("bench_*.py")} == {f"bench_{s}" for s in SUITES}


STAGES = "environment confirm tests bench tune memory compile"


def _gpu_check(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(BENCHMARKS / "gpu_check.sh"), *arguments],
        env={**ENVIRONMENT, "PYTHON": sys.executable, "STAGES": STAGES},
        capture_output=True, text=True, timeout=600,
    )


def test_gpu_check_runs_every_stage_dry_and_resumes(tmp_path: Path) -> None:
    result = _gpu_check(str(tmp_path), "--cpu-dry-run")
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    files = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*"))
    assert len(files) <= 16
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+", name) for name in files)
    document = json.loads((tmp_path / "bench.json").read_text())
    assert records.problems(document) == []
    assert {r["suite"] for r in document["records"]} == set(SUITES)
    # float32 on the same backend as stock: the library passes wherever it runs.
    ours = [r for r in document["records"] if r["provider"] == "fusedformer"]
    assert {r["status"] for r in ours} == {"timed"}
    done = (tmp_path / "stages.done").read_text().split()
    assert set(done) == set(SUITES) | set(STAGES.split()) - {"bench"}
    assert result.stdout.rstrip().endswith("none")  # the summary comes last

    again = _gpu_check(str(tmp_path), "--cpu-dry-run")
    assert again.returncode == 0
    assert again.stdout.count("complete before") == len(done)
    assert json.loads((tmp_path / "bench.json").read_text()) == document


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_gpu_check_says_that_there_is_no_gpu(tmp_path: Path) -> None:
    result = _gpu_check(str(tmp_path))
    assert result.returncode == 2
    assert "no GPU" in result.stderr
    assert _gpu_check().returncode == 2


def test_suite_runs_under_pytest_benchmark() -> None:
    pytest.importorskip("pytest_benchmark")
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist",
         str(BENCHMARKS / "bench_softmax.py"), "--bench-sizes=tiny", "--bench-quick",
         "--benchmark-max-time=0.01", "--benchmark-min-rounds=1", "-k", "64x128"],
        env={**ENVIRONMENT, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert re.search(r"\b6 passed", result.stdout)  # two providers in three directions


def _slower(document: dict[str, Any], factor: float, provider: str) -> dict[str, Any]:
    changed: dict[str, Any] = json.loads(json.dumps(document))
    for record in changed["records"]:
        if record["provider"] == provider:
            for name in ("median_us", "p20_us", "p80_us"):
                record[name] *= factor
    return changed


def _measured_square() -> dict[str, Any]:
    results = _results()
    suite = _square_suite({"fusedformer": lambda x: x * x})
    run_suite(suite, suite.cases(Sizes.of("tiny"), torch.float32), results, _options())
    for record in results.document["records"]:
        record["p20_us"], record["p80_us"] = 0.9 * record["median_us"], 1.1 * record["median_us"]
    return results.document


def test_compare_says_what_changed_beyond_the_spread(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    old = _measured_square()
    slow, fast, near = (_slower(old, f, "fusedformer") for f in (2.0, 0.5, 1.1))
    for new, verdict in ((slow, "slower"), (fast, "faster"), (near, "")):
        rows = compare.compare(old, new)
        assert len(rows) == 3 and {row["verdict"] for row in rows} == {verdict}
    assert {row["relative"] for row in compare.compare(old, slow)} == {2.0}
    both = _slower(slow, 2.0, REFERENCE)  # a machine half as fast
    assert {row["relative"] for row in compare.compare(old, both)} == {1.0}
    paths = [tmp_path / "old.json", tmp_path / "new.json"]
    for path, document in zip(paths, (old, slow), strict=True):
        path.write_text(json.dumps(document))
    monkeypatch.setattr(sys, "argv", ["compare", *map(str, paths)])
    assert compare.main() == 1
    assert "0 faster, 3 slower beyond the spread" in capsys.readouterr().out
    paths[1].write_text("{}")
    assert compare.main() == 2


def test_page_of_result_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    file, out = tmp_path / "square.json", tmp_path / "page.html"
    file.write_text(json.dumps(_measured_square()))
    monkeypatch.setattr(sys, "argv", ["page", str(file), "--out", str(out)])
    assert page.main() == 0
    text = out.read_text()
    assert text.count("image/svg+xml") == 4  # bars of three directions, and a roofline
    assert "4x8" in text and "<pre>" in text and "<script" not in text
    assert not re.search(r'(src|href)="(?!data:)', text)  # nothing besides itself


def test_bench_is_a_command_of_the_checkout(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fusedformer import bench

    file = tmp_path / "square.json"
    file.write_text(json.dumps(_measured_square()))
    assert bench.main(["compare", str(file), str(file)]) == 0
    assert "0 faster, 0 slower" in capsys.readouterr().out
    monkeypatch.setattr(bench, "__file__", str(tmp_path / "a" / "b" / "c.py"))
    assert bench.main([]) == 2
    assert "checkout" in capsys.readouterr().err


def test_flops_of_windows_and_gated_feed_forwards() -> None:
    def flops(**settings: Any) -> int:
        return counting.encoder([8, 5], 2, 4, 1, 6, 4, **settings)["forward"].flops

    seen = sum(abs(i - j) <= 2 for n in (8, 5) for i in range(n) for j in range(n))
    assert flops() - flops(windows=[2, 2]) == 2 * 4 * 4 * (64 + 25 - seen)
    assert flops(windows=[None, 100]) == flops()
    assert flops(gated=True) - flops() == 2 * 13 * 2 * 4 * 6


def test_flops_with_all_tokens_labelled_are_those_of_an_encoder_and_a_head() -> None:
    shape = (3, 8, 2, 12)
    found = counting.masked_lm([7, 4], [7, 4], *shape, 50, 4)
    whole = counting.encoder([7, 4], *shape, 4)
    head = 2 * 11 * 8 * 8 + 2 * 11 * 8 * 50
    assert found["forward"].flops == whole["forward"].flops + head
    assert found["step"].flops == whole["step"].flops + 3 * head
