"""``gpu_check.sh``: every stage without a GPU, calls that go on, and what is packed when."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.benchmarks.square import measured_square

from harness import CHECKOUT, gpu_check, records
from harness.gpu_stages import Setting, Stage, stages
from harness.pytest_results import read_list
from harness.suites import SUITES

SCRIPT = CHECKOUT / "benchmarks" / "gpu_check.sh"
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
# One thread: work this small is done before a busy machine wakes a second.
ENVIRONMENT |= {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
Run = Callable[..., int]


def script(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(SCRIPT), *map(str, arguments)], env=ENVIRONMENT, capture_output=True,
        text=True, timeout=1800,
    )  # fmt: skip


def unpacked(out: Path) -> dict[str, str]:
    """What the archive holds."""
    found = {}
    with tarfile.open(out / gpu_check.ARCHIVE) as packed:
        for member in packed:
            file = packed.extractfile(member)
            assert file is not None  # it is flat
            found[member.name] = file.read().decode()
    return found


def test_every_stage_runs_dry_and_nothing_runs_twice(tmp_path: Path) -> None:
    out, state = tmp_path / "out", tmp_path / "state"
    dry = "--cpu-dry-run", "--workers", 1, "--seconds", 1700
    first = script(out, "--state", state, *dry)
    assert first.returncode == 0, first.stdout[-3000:] + first.stderr[-3000:]
    assert {path.name for path in out.iterdir()} == {gpu_check.ARCHIVE, gpu_check.SUMMARY}
    files = unpacked(out)
    names = [stage.name for stage in stages(Setting(state, True, 1))]
    assert set(SUITES) < set(names)
    assert {f"{name}.log" for name in names} < set(files)
    ended = json.loads(files["state.json"])["stages"]
    assert {name: each["how"] for name, each in ended.items()} == dict.fromkeys(names, "complete")
    document = json.loads(files["bench.json"])
    assert records.problems(document) == []
    assert {r["suite"] for r in document["records"]} == set(SUITES)
    # float32 on the same backend as stock: the library passes wherever it runs.
    ours = [r for r in document["records"] if r["provider"] == "fusedformer"]
    assert {r["status"] for r in ours} == {"timed"}
    tests = [json.loads(line) for line in files["tests.jsonl"].splitlines()]
    assert tests and {test["outcome"] for test in tests} == {"passed"}
    assert f"tests: {len(tests)} passed, 0 failed" in first.stdout
    assert "attention, forward: as fast as the fastest peer in" in first.stdout

    elsewhere = tmp_path / "other machine"
    rest = script(out, "--state", elsewhere, "--restore", out / gpu_check.ARCHIVE, *dry)
    assert rest.returncode == 0, rest.stderr
    assert rest.stdout.startswith("commit ")  # nothing but the summary
    assert unpacked(out)["bench.json"] == files["bench.json"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_or_a_folder_it_says_so(tmp_path: Path) -> None:
    result = script(tmp_path)
    assert result.returncode == 2
    assert "no GPU" in result.stderr
    assert script().returncode == 2


def test_on_a_gpu_the_order_is_by_value_and_tests_have_a_worker_each(tmp_path: Path) -> None:
    planned = {stage.name: stage for stage in stages(Setting(tmp_path, False, 16))}
    first = ["smoke", "failed-before", "tests", "big-offsets", "compile", "attention", "encoder"]
    assert list(planned)[:11] == [*first, "norm", "softmax", "tune", "ncu"]
    command = " ".join(planned["tests"].command)
    assert "-m not cpu" in command and "-n 16 --dist worksteal" in command
    assert "-n" not in planned["big-offsets"].command
    assert "--ignore=tests/ops/test_big_offsets.py" in planned["tests"].command
    for path in (p for stage in planned.values() for p in stage.command if p.startswith("tests/")):
        assert (CHECKOUT / path).exists()


def test_what_failed_before_is_there() -> None:
    lists = sorted(CHECKOUT.glob("benchmarks/results/*/failed-tests.txt"))
    assert lists
    for name in sorted(set().union(*(read_list(path) or set() for path in lists))):
        path, _, test = name.partition("::")
        assert f"def {test.partition('[')[0]}(" in (CHECKOUT / path).read_text(), name


def program(text: str, name: str = "one", **settings: Any) -> Stage:
    return Stage(name, 100, [sys.executable, "-c", text], **settings)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs these stages on the folders ``out`` and ``state``, for commit ``c``."""
    monkeypatch.setattr(gpu_check, "measured_commit", lambda: (os.environ["FUSEDFORMER_COMMIT"], 0))
    monkeypatch.setenv("FUSEDFORMER_COMMIT", "")

    def call(planned: list[Stage], *arguments: str) -> int:
        monkeypatch.setattr(gpu_check, "stages", lambda setting: planned)
        folders = [str(tmp_path / "out"), "--state", str(tmp_path / "state")]
        return gpu_check.main([*folders, "--cpu-dry-run", "--commit", "c", *arguments])

    return call


def ended(folder: Path) -> dict[str, str]:
    found = json.loads((folder / "state" / "state.json").read_text())["stages"]
    return {name: each["how"] for name, each in found.items()}


def test_how_stages_end(run: Run, tmp_path: Path) -> None:
    planned = [
        program("print('fine')", "fine"),
        program("raise SystemExit(1)", "wrong", failed=(1,)),
        program("raise SystemExit(3)", "more", unfinished=(3,)),
        program("import os; os.abort()", "dead"),
        program("raise SystemExit(5)", "nothing"),
    ]
    assert run(planned) == 1
    assert ended(tmp_path) == {
        "fine": "complete", "wrong": "failed", "more": "cut short", "dead": "died (-6)",
        "nothing": "complete",
    }  # fmt: skip
    assert unpacked(tmp_path / "out")["fine.log"] == "fine\n"
    assert run(planned[:1]) == 0


def test_what_is_left_is_done_by_the_next_call(run: Run, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    note = f"open({str(trace)!r}, 'a').write('%s ')"
    slow = "import time; time.sleep(60)"
    first = [program(note % "a", "a"), program(f"{note % 'b'}; {slow}", "b"), program("", "c")]
    assert run([*first[:2], program(note % "c", "c")], "--seconds", "7") == 1
    assert ended(tmp_path) == {"a": "complete", "b": "cut short"}
    assert run([first[0], program(note % "b", "b"), program(note % "c", "c")]) == 0
    assert trace.read_text() == "a b b c "
    assert run([program(note % "a", "a")], "--again") == 0
    assert trace.read_text() == "a b b c a "
    assert run([program(note % "a", "a")], "--commit", "d") == 0  # which knows nothing of c's
    assert trace.read_text() == "a b b c a a "
    assert "commit d" in (tmp_path / "out" / gpu_check.SUMMARY).read_text()


def test_what_a_stage_started_ends_with_it(tmp_path: Path) -> None:
    code = "import os, subprocess, sys, time; child = subprocess.Popen(['sleep', '60']);"
    code += "open('pid', 'w').write(str(child.pid)); time.sleep(60)"
    process = subprocess.Popen(
        [sys.executable, "-c", f"import signal; signal.signal(2, signal.SIG_IGN); {code}"],
        cwd=tmp_path, start_new_session=True,
    )  # fmt: skip
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        time.sleep(0.05)
    assert gpu_check.end(process, patience=0.3) == -signal.SIGKILL
    child = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 20
    while Path(f"/proc/{child}").exists() and time.monotonic() < deadline:
        if "(sleep) Z" in Path(f"/proc/{child}/stat").read_text():
            return
        time.sleep(0.05)
    assert not Path(f"/proc/{child}").exists()


def test_what_is_there_is_packed_while_a_stage_runs_and_when_it_is_stopped(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stage ends when the archive has what it wrote; then it is told to stop itself."""
    monkeypatch.setattr(gpu_check, "PACKED_EVERY", 0.05)
    archive = tmp_path / "out" / gpu_check.ARCHIVE
    waits = f"""
import os, signal, tarfile, time
print('half', flush=True)
while True:
    try:
        with tarfile.open({str(archive)!r}) as packed:
            if packed.extractfile('one.log').read() == b'half\\n':
                break
    except (OSError, KeyError):
        pass
    time.sleep(0.02)
os.kill(os.getppid(), signal.SIGTERM)
time.sleep(60)
"""
    assert run([program(waits), program("", "two")]) == 1
    assert ended(tmp_path) == {"one": "cut short"}
    assert unpacked(tmp_path / "out")["one.log"].startswith("half")


def test_a_summary_at_a_glance(run: Run, tmp_path: Path) -> None:
    state = tmp_path / "state"
    document = measured_square()
    ours, stock = (
        next(r for r in document["records"] if r["provider"] == name and r["direction"] == "both")
        for name in ("fusedformer", "torch eager")
    )
    ours["median_us"], stock["median_us"] = 20.0, 10.0
    other = next(r for r in document["records"] if r["direction"] == "forward")
    other |= {"provider": "fusedformer", "status": "failed check", "reason": "13 times the limit"}
    results = [{"test": "a.py::x", "outcome": "passed", "message": ""}]
    results += [{"test": "a.py::y", "outcome": "failed", "message": "assert 1 == 2"}]
    lines = [json.dumps(each) for each in (*results, {**results[0], "test": "a.py::z"})]

    def write(name: str, text: str) -> str:
        return f"open({str(state / name)!r}, 'w').write({text!r})"

    both = [write("tests.jsonl", "\n".join(lines)), write("bench.json", json.dumps(document))]
    assert run([program("; ".join(both)), program("", "two")], "--stages", "one") == 0
    said = (tmp_path / "out" / gpu_check.SUMMARY).read_text()
    assert "tests: 2 passed, 1 failed, 0 skipped\nFAILED a.py::y: assert 1 == 2\n" in said
    assert "two             not begun" in said
    assert (
        "square, both: as fast as the fastest peer in 0 of 1 cases, 0.50x in the mean; the least "
        "is 0.50x (4x8, torch eager)" in said
    )
    assert "failed check: square, 4x8, forward: 13 times the limit" in said
    assert unpacked(tmp_path / "out")["failed-tests.txt"] == "a.py::y\n"
    assert run([program("")], "--stages", "three") == 2


def test_an_export_in_another_repository_has_the_commit_that_was_passed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    monkeypatch.setattr(records, "CHECKOUT", tmp_path / "export")
    monkeypatch.setenv("FUSEDFORMER_COMMIT", "abc")
    assert records.measured_commit() == ("abc", False)
    monkeypatch.delenv("FUSEDFORMER_COMMIT")
    assert records.measured_commit() == ("unknown", False)
