"""Times are measured fairly; result files are whole, and tables and pages say what is in them."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.benchmarks.square import (
    CPU,
    measured_square,
    new_results,
    run_options,
    square_case,
    square_suite,
)

from harness import records, timing
from harness.case import REFERENCE
from harness.runner import run_suite
from reporting import compare, page, table


def test_interrupted_run_keeps_what_it_measured_and_goes_on_from_there(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    cases = [square_case("first"), square_case("second")]

    def interrupt(input: torch.Tensor) -> torch.Tensor:
        raise KeyboardInterrupt

    results = new_results(path)
    run_suite(square_suite({}), cases[:1], results, run_options())
    with pytest.raises(KeyboardInterrupt):
        run_suite(square_suite({"peer": interrupt}), cases[1:], results, run_options())
    kept = json.loads(path.read_text())
    assert not records.problems(kept)
    assert {r["case"] for r in kept["records"]} == {"first"}
    again = new_results(path)
    run_suite(square_suite({}), cases, again, run_options())
    names = [r["case"] for r in json.loads(path.read_text())["records"]]
    assert names == ["first"] * 3 + ["second"] * 3


def test_no_case_starts_after_the_deadline() -> None:
    results = new_results()
    assert not run_suite(square_suite({}), [square_case()], results, run_options(deadline=0.0))
    assert results.document["records"] == []


def _valid_document() -> dict[str, Any]:
    return json.loads(_measured_once())


@functools.cache
def _measured_once() -> str:
    results = new_results()
    run_suite(square_suite({"peer": torch.square}), [square_case()], results, run_options())
    return json.dumps(results.document)


BREAKAGES = {
    "no commit": lambda d: d.pop("commit"),
    "another schema": lambda d: d.update(schema=2),
    "no ceiling": lambda d: d["ceilings"].pop("copy_gb_s"),
    "no provider": lambda d: d["records"][0].pop("provider"),
    "time without passing": lambda d: d["records"][0].update(status="failed check", reason="x"),
    "no reason": lambda d: d["records"][0].update(
        status="unsupported", median_us=None, p20_us=None, p80_us=None
    ),
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
    case = dataclasses.replace(square_case(), tokens=600)
    suite = square_suite({table.OURS: torch.square}, [case])
    results = new_results()
    run_suite(suite, [case], results, run_options())
    for record in results.document["records"]:
        assert record["tokens"] == 600
        ours = record["provider"] == table.OURS
        record["median_us"] = 2e5 if ours else 1e6
        record["peak_memory_bytes"] = 12_340_000 if ours else None
    text = table.markdown(results.document)
    row = next(line for line in text.splitlines() if line.startswith("| 4x8 "))
    assert "| 1 s, 600 tokens/s (5.00x) |" in row
    assert "| 200 ms, 3 k tokens/s, 12.3 MB, " in row


def _slower(document: dict[str, Any], factor: float, provider: str) -> dict[str, Any]:
    changed: dict[str, Any] = json.loads(json.dumps(document))
    for record in changed["records"]:
        if record["provider"] == provider:
            for name in ("median_us", "p20_us", "p80_us"):
                record[name] *= factor
    return changed


def test_compare_says_what_changed_beyond_the_spread(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    old = measured_square()
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
    file.write_text(json.dumps(measured_square()))
    monkeypatch.setattr(sys, "argv", ["page", str(file), "--out", str(out)])
    assert page.main() == 0
    text = out.read_text()
    assert text.count("image/svg+xml") == 4  # bars of three directions, and a roofline
    assert "4x8" in text and "<pre>" in text and "<script" not in text
    assert not re.search(r'(src|href)="(?!data:)', text)  # nothing besides itself


def test_percentiles_are_interpolated() -> None:
    samples = timing.Samples([40.0, 10.0, 30.0, 20.0], "paired")
    assert samples.median_us == 25.0
    assert samples.percentile(0.2) == pytest.approx(16.0)


@pytest.mark.parametrize("clock", ["device", "host", "latency"])
def test_a_suite_is_timed_by_its_clock(clock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def clocked(name: str) -> Any:
        return lambda calls, *_: {n: timing.Samples([1.0], name) for n in calls}

    monkeypatch.setattr(timing, "CLOCKS", {name: clocked(name) for name in timing.CLOCKS})
    results = new_results()
    suite = dataclasses.replace(square_suite({}), clock=clock)
    run_suite(suite, [square_case()], results, run_options())
    assert {r["method"] for r in results.document["records"]} == {clock}


def test_order_of_providers_rotates() -> None:
    order: list[str] = []
    calls = {name: [lambda name=name: order.append(name)] for name in "abc"}
    timing.measure(calls, CPU, 0.0)
    # One estimate each, then rounds of repeated calls: what leads changes from round to round.
    leads = [name for i, name in enumerate(order) if i == 0 or order[i - 1] != name]
    assert "".join(leads[3:]) in ("abcbcacab", "bcacab", "cbcacab", "bcbcacab")


ROOT = Path(__file__).parents[2]
RESULTS = sorted(p.relative_to(ROOT).as_posix() for p in ROOT.glob("docs/results*.md"))


@pytest.mark.parametrize("name", RESULTS)
def test_the_tables_of_a_page_are_those_of_the_result_files(name: str) -> None:
    page = _text(name)
    assert table.filled(page) == page, f"python benchmarks/reporting/table.py --fill {name}"


def test_every_result_file_is_shown() -> None:
    marks = [mark["files"] for name in RESULTS for mark in table.MARKED.finditer(_text(name))]
    shown = {path for mark in marks for pattern in mark.split() for path in ROOT.glob(pattern)}
    files = set(ROOT.glob("benchmarks/results/*/*.json"))
    assert {path.name for path in files - shown} == {"2026-11-28-tiles.json"}  # of the notes
    assert shown <= files


def test_a_changed_number_leaves_the_page() -> None:
    page = _text("docs/results-cpu.md")
    wrong = page.replace("| 0.837 ± ", "| 0.937 ± ")
    assert wrong != page == table.filled(wrong)


def test_what_no_command_wrote_is_no_result_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "other.json"
    file.write_text('{"rows": [{"name": "other"}]}')
    monkeypatch.setattr(sys, "argv", ["table", str(file)])
    assert table.main() == 1
    assert "not a result file" in capsys.readouterr().err


def _text(name: str) -> str:
    return (ROOT / name).read_text()
