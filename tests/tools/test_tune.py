"""Tables of tuned configs, and the search for them; with times made up, since no GPU is needed."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from fusedformer.tools import tune
from fusedformer.tools.tune import search
from fusedformer.tools.tune.workloads import HALF, Workload, workloads
from fusedformer_kernels.attention import configs as attention
from fusedformer_kernels.rows import configs as rows
from fusedformer_kernels.runtime import targets, tuned
from fusedformer_kernels.runtime.launch import recorded_launches

META = torch.device("meta")
HERE = targets.Target("cuda", 90, 32, 132, 227 * 1024, "NVIDIA Test")


def _index(name: str) -> int:
    return [w.name for w in workloads()].index(name)


def _workload(name: str) -> Workload:
    return workloads()[_index(name)]


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where a user's table for :data:`HERE` is looked for."""
    monkeypatch.delenv("FUSEDFORMER_TUNED_TABLE", raising=False)
    monkeypatch.setenv("FUSEDFORMER_CACHE_DIR", str(tmp_path))
    tuned.clear_caches()
    yield tuned.cache_file("NVIDIA Test")
    tuned.clear_caches()


def _write(path: Path, entries: dict[str, Any], **changes: Any) -> None:
    import triton

    path.parent.mkdir(parents=True, exist_ok=True)
    document = {"schema": 1, "triton": triton.__version__, "entries": entries, **changes}
    path.write_text(json.dumps(document))


def _norm_tile(columns: int, target: targets.Target) -> targets.TileConfig:
    return rows.row_tile("norm_forward", columns, 16384, 2048, 16, target)


def test_a_table_takes_the_place_of_the_default_for_its_device_alone(table: Path) -> None:
    kind = attention.AttentionKind(64, "half")
    default = attention.attention_forward_config(kind, HERE, 512, 512)
    assert default == attention.attention_forward_config(kind, targets.TARGETS["sm_90"], 512, 512)
    tuned.clear_caches()
    _write(
        table,
        {
            "norm_forward 1024": {"config": {"block_m": 4, "num_warps": 8}},
            "attention_forward half 64 plain full": {"config": {"block_n": 64, "num_stages": 4}},
        },
    )
    assert _norm_tile(768, HERE) == targets.TileConfig(8, 2, 4, 1024)  # the rest as it was
    assert _norm_tile(2000, HERE) == _norm_tile(2000, targets.TARGETS["sm_90"])
    found = attention.attention_forward_config(kind, HERE, 512, 512)
    assert (found.block_m, found.block_n, found.num_stages) == (default.block_m, 64, 4)
    assert attention.attention_forward_config(kind, targets.INTERPRETED, 512, 512) == default
    causal = attention.AttentionKind(64, "half", causal=True)
    assert attention.attention_forward_config(causal, HERE, 512, 512).block_n == default.block_n


@pytest.mark.parametrize(
    "text", ["[]", "{", '{"schema": 2, "entries": {}}', '{"schema": 1, "entries": {"a": {}}}',
             '{"schema": 1, "entries": {"a 1": {"config": {"num_warps": "4"}}}}'],
)  # fmt: skip
def test_a_broken_table_says_which_and_what_to_do(table: Path, text: str) -> None:
    table.parent.mkdir(parents=True)
    table.write_text(text)
    with pytest.raises(ValueError, match=re.escape(str(table)) + ".*fusedformer tune"):
        _norm_tile(768, HERE)


def test_unknown_fields_and_another_triton(table: Path) -> None:
    _write(table, {"norm_forward 1024": {"config": {"block_k": 4}}})
    with pytest.raises(ValueError, match="block_k"):
        _norm_tile(768, HERE)
    tuned.clear_caches()
    _write(table, {"norm_forward 1024": {"config": {"block_m": 4}}}, triton="2.0.0")
    with pytest.warns(UserWarning, match="tuned with triton 2.0.0"):
        assert _norm_tile(768, HERE).block_m == 2


def test_every_workload_asks_for_the_key_that_it_tunes() -> None:
    """A forced config arrives in the launch; so a table's would."""
    for workload in workloads():
        size = next(iter(workload.shapes.values()))
        fields = workload.candidates[0]
        target = targets.TARGETS["sm_90"]
        with targets.assume_target(target), recorded_launches(run=False) as launches:
            call = workload.make(size, META, HALF)
            launches.clear()
            with tuned.forced(workload.key, fields):
                call()
        config = next(x.config for x in launches if "delta" not in x.name)
        assert {n: getattr(config, n) for n in fields} == dict(fields), workload.name


def test_what_spills_or_does_not_fit_is_not_tried() -> None:
    """And one compilation is all that a candidate needs: each size has the same kernels."""
    assert torch.version.hip is None
    code = """
from fusedformer.tools.tune.search import reason_against
from fusedformer.tools.tune.workloads import workloads
from fusedformer_kernels.runtime.targets import TARGETS
found = {w.name: w for w in workloads()}
w, sm_90 = found["attention_forward half 128 plain full"], TARGETS["sm_90"]
tile = {"block_m": 128, "block_n": 128, "num_warps": 4, "num_stages": 2, "one_loop": False}
print(reason_against(w, None, sm_90) or "fine")
print(reason_against(w, tile, sm_90))
print(reason_against(w, {**tile, "num_warps": 8, "num_stages": 4}, sm_90))
from fusedformer.tools.tune.search import launches_of
from fusedformer_kernels.compiler.ahead_of_time import ast_source
for w in found.values():
    kernels = [
        {(x.name, ast_source(x).hash()) for x in launches_of(w, w.candidates[0], size, sm_90)}
        for size in (*w.shapes.values(), w.small)
    ]
    assert all(each == kernels[0] for each in kernels), w.name
"""
    import os
    import subprocess
    import sys

    # The compiler cannot run where triton interprets.
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert said[0] == "fine" and "spills in _attention_forward" in said[1], done.stderr
    assert "shared memory" in said[2]


def test_a_wrong_config_is_found_and_a_right_one_is_not(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    workload = _workload("softmax_forward 128")
    fields = {"block_m": 1, "num_warps": 1}
    assert search.fault_of(workload, fields, torch.device(device)) == ""
    whole = workload.make

    def faulty(size: Any, device: torch.device, dtype: torch.dtype) -> Any:
        call = whole(size, device, dtype)
        wrong = tuned._forced.__contains__
        return lambda: tuple(
            None if y is None else y * (1.1 if wrong(workload.key) else 1.0) for y in call()
        )

    monkeypatch.setattr(search, "workloads", None)
    broken = Workload(workload.key, workload.candidates, workload.shapes, faulty, workload.small)
    assert "times the limit" in search.fault_of(broken, fields, torch.device(device))


def test_the_fastest_is_written_and_read_again(
    table: Path, device: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Times made up: the fewer warps the faster, and one candidate spills."""
    real = _workload("norm_forward 1024")
    small = Workload(real.key, real.candidates, {"small": (5, 1000)}, real.make, (3, 1000))
    monkeypatch.setattr(search, "workloads", lambda: [small])
    spilled = min(real.candidates, key=lambda c: c["num_warps"])
    pruned = [(c, "9 spills" * (c == spilled)) for c in real.candidates]

    def timer(call: Any) -> float:
        with recorded_launches(run=False) as launches:
            call()
        config: Any = launches[0].config  # a row config, which has a size of tiles
        return float(10.0 * config.num_warps + config.block_m)

    found = search.search(0, pruned, torch.device(device), timer=timer)
    assert found.pruned == 1 and found.wrong == 0 and found.tried == len(real.candidates) - 1
    best = min(
        (c for c in real.candidates if c != spilled),
        key=lambda c: 10 * c["num_warps"] + c["block_m"],
    )
    assert found.best == best and found.speedup > 1.02
    tune.write(table, [found], HERE)
    tuned.clear_caches()
    config = _norm_tile(1000, HERE)
    assert (config.block_m, config.num_warps) == (best["block_m"], best["num_warps"])
    assert "norm_forward 1024" in tune.line(found)
    tried = [fields for fields, _ in found.candidates_us]
    assert tried == [{}, *(fields for fields, reason in pruned if not reason)]
    tune.write(table, [search.Found("norm_forward 1024")], HERE)  # the default won
    assert json.loads(table.read_text())["entries"] == {}


def test_all_is_compiled_at_once_and_what_was_timed_before_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(targets, "target_of", lambda device: HERE)
    compiled: list[list[str]] = []

    def prune(indices: list[int], *_: Any) -> dict[int, list[Any]]:
        compiled.append([workloads()[i].name for i in indices])
        return {i: [] for i in indices[:2]}  # then half of the time was over

    def found(index: int, pruned: Any, device: Any, deadline: float) -> search.Found:
        tried: list[Any] = [({}, {"S": 3.0}), ({"block_m": 2}, {"S": 2.5})]
        return search.Found(workloads()[index].name, candidates_us=tried)

    monkeypatch.setattr(search, "prune", prune)
    monkeypatch.setattr(search, "search", found)
    table, times = tmp_path / "table.json", tmp_path / "times.json"
    options = ["--case", "activation|softmax_forward (128|512)", "--budget", "100"]
    for status in (3, 0):
        assert tune.main([*options, "--out", str(table), "--times", str(times)]) == status
    names = ["softmax_forward 128", "softmax_forward 512"]
    others = ["activation_forward 512", "activation_backward 512"]
    assert compiled == [[*names, *others], others]
    assert "out of time: 2 of 4 not tuned" in capsys.readouterr().out
    written = json.loads(times.read_text())
    assert [one["workload"] for one in written] == [*names, *others]
    assert written[0]["default"] == {"S": 3.0}
    assert written[0]["tried"] == [[{"S": 2.5}, {"block_m": 2}]]


def test_what_is_not_compiled_in_time_is_left_out() -> None:
    index = _index("activation_forward 512")
    past = time.monotonic()
    assert search.prune([index], targets.TARGETS["sm_90"], 1, deadline=past) == {}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_the_command_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert tune.main([]) == 2
    assert "no GPU" in capsys.readouterr().err


def test_a_dry_run_ranks_by_what_the_machine_code_promises(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fast, slow = {"block_m": 1, "num_warps": 1}, {"block_m": 2, "num_warps": 2}
    pruned = [(slow, ""), (fast, ""), (fast, "spills")]
    monkeypatch.setattr(search, "prune", lambda indices, *_: {indices[0]: pruned})
    times = {"1": 10.0, "2": 20.0, "default": 15.0}
    monkeypatch.setattr(
        search, "predicted_us",
        lambda workload, fields, target: times[str((fields or {}).get("block_m", "default"))],
    )  # fmt: skip
    assert tune.main(["--dry-run", "--case", "^norm_forward 256$"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "norm_forward 256: 2 of 3 candidates to try"
    assert lines[1].strip() == search.worth() and "median error" in lines[1]
    assert [line.split()[1] for line in lines[2:]] == ["15.0", "10.0", "20.0"]


def test_the_precision_of_products_by_either_of_torchs_settings() -> None:
    """The older one cannot be read once the newer one was set."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        for setting in ("tf32", "ieee"):
            matmul.fp32_precision = setting
            assert targets.dot_precision(torch.float32) == setting
            assert targets.dot_precision(torch.bfloat16) == "ieee"
    finally:
        matmul.fp32_precision = before
