"""The result file: one schema for every suite, written whole after each case.

``{"schema": 1, "commit", "dirty", "date", "device", "torch", "triton", "ceilings", "records"}``.
A record is one provider of one case in one direction; ``status`` says whether it was timed, and
if it was not, ``reason`` says why. Shares of a ceiling are derived on reading, never stored.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import os
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fusedformer.tools import environment
from harness import CHECKOUT
from harness.counting import Cost

SCHEMA = 1
STATUSES = ("timed", "failed check", "unsupported", "error")

_DOCUMENT = {
    "schema": int,
    "commit": str,
    "dirty": bool,
    "date": str,
    "device": str,
    "torch": str,
    "triton": (str, type(None)),
    "ceilings": dict,
    "absent": dict,
    "clocks": dict,
    "records": list,
}
_NUMBER = (int, float, type(None))
_RECORD = {
    "suite": str,
    "case": str,
    "direction": str,
    "dtype": str,
    "provider": str,
    "status": str,
    "reason": str,
    "headline": bool,
    "median_us": _NUMBER,
    "p20_us": _NUMBER,
    "p80_us": _NUMBER,
    "bytes": int,
    "flops": int,
    "peak_memory_bytes": (int, type(None)),
    "error_ratio": _NUMBER,
    "method": str,
    "samples_us": list,
}
_LATER = {"tokens": (int, type(None))}  # fields that older files lack


@dataclass
class Record:
    """One provider of one case in one direction; the numbers are None unless it was timed."""

    suite: str
    case: str
    direction: str
    dtype: str
    provider: str
    bytes: int
    flops: int
    status: str = "timed"
    reason: str = ""
    headline: bool = False
    median_us: float | None = None
    p20_us: float | None = None
    p80_us: float | None = None
    peak_memory_bytes: int | None = None
    error_ratio: float | None = None
    method: str = ""
    samples_us: list[float] = field(default_factory=list)
    tokens: int | None = None


@dataclass(frozen=True)
class Rates:
    """What a timed record amounts to, at the ceilings measured in the same run.

    ``percent``, the floor's share of the median, can pass 100 where the inputs fit in a cache, or
    in another dtype than that of the measured product. ``tokens_s`` is None where none are counted.
    """

    gb_s: float
    tflop_s: float
    percent: float
    bound: str  # "bytes" or "flops", the larger of the two floors
    tokens_s: float | None


def rates(record: dict[str, Any], ceilings: dict[str, Any]) -> Rates:
    """Work out the rates of a timed record."""
    median, tokens = record["median_us"], record.get("tokens")
    moving, computing = Cost(record["flops"], record["bytes"]).times_us(
        ceilings["copy_gb_s"], ceilings["matmul_tflop_s"]
    )
    return Rates(
        record["bytes"] / median / 1e3,
        record["flops"] / median / 1e6,
        100.0 * max(moving, computing) / median,
        "flops" if computing > moving else "bytes",
        None if tokens is None else 1e6 * tokens / median,
    )


def problems(document: Any) -> list[str]:
    """List what is wrong with a result document; an empty list if it meets the schema."""
    found = _mistyped(document, _DOCUMENT, "document")
    if found:
        return found
    if document["schema"] != SCHEMA:
        found.append(f"schema is {document['schema']}, expected {SCHEMA}")
    for name in ("copy_gb_s", "matmul_tflop_s"):
        if not document["ceilings"].get(name, 0) > 0:
            found.append(f"ceilings: {name} is missing or not positive")
    for index, record in enumerate(document["records"]):
        where = f"records[{index}]"
        wrong = _mistyped({**dict.fromkeys(_LATER), **record}, _RECORD | _LATER, where)
        found += wrong
        if wrong:
            continue
        if record["status"] not in STATUSES:
            found.append(f"{where}: unknown status {record['status']!r}")
        timed = [record[name] for name in ("median_us", "p20_us", "p80_us")]
        if record["status"] != "timed":
            if any(value is not None for value in timed) or not record["reason"]:
                found.append(f"{where}: not timed, so it needs a reason and no times")
        elif not all(value is not None and 0 < value < math.inf for value in timed):
            found.append(f"{where}: timed, but a time is missing or not positive")
        elif not timed[1] <= timed[0] <= timed[2]:
            found.append(f"{where}: the percentiles are out of order")
    return found


def _mistyped(value: Any, fields: dict[str, Any], where: str) -> list[str]:
    if not isinstance(value, dict):
        return [f"{where}: expected an object, but got {type(value).__name__}"]
    return [
        f"{where}: {name} is {value.get(name, 'missing')!r}"
        for name, kind in fields.items()
        if name not in value or not isinstance(value[name], kind)
    ]


class ResultFile:
    """Records of a run, and the file they are kept in (none if ``path`` is None).

    A file that is there already from the same commit and device is continued: what it has measured
    is not measured again, and the ceilings are the better of both runs'.
    """

    def __init__(self, path: Path | None, document: dict[str, Any]) -> None:
        self.path = path
        self.document = document
        same = ("commit", "dirty", "device", "torch", "triton", "busy")
        if path is not None and path.exists():
            earlier = json.loads(path.read_text())
            if not problems(earlier) and all(earlier.get(k, 0) == document[k] for k in same):
                self.document["records"] = earlier["records"]
                self.set_ceilings(earlier["ceilings"])

    def set_ceilings(self, found: dict[str, Any]) -> None:
        """Take each ceiling if it is above the one that is there."""
        mine = self.document["ceilings"]
        for name, value in found.items():
            mine[name] = max(mine[name], value) if isinstance(mine.get(name), float) else value

    def measured(self) -> set[tuple[str, str, str]]:
        """List the (suite, case, dtype) that are there."""
        return {(r["suite"], r["case"], r["dtype"]) for r in self.document["records"]}

    def add(self, records: list[Record]) -> None:
        """Append the records of one case, and rewrite the file in one step."""
        self.document["records"] += [dataclasses.asdict(record) for record in records]
        self.save()

    def save(self) -> None:
        """Write the file through a temporary one: an interrupted write loses nothing."""
        if self.path is not None:
            temporary = self.path.with_name(self.path.name + ".new")
            temporary.write_text(_text(self.document))
            temporary.replace(self.path)


def _text(document: dict[str, Any]) -> str:
    """Write JSON with a line for each record, so that a version's changes can be read."""
    head = json.dumps({**document, "records": []}, indent=1).removesuffix("[]\n}")
    rows = ",\n".join("  " + json.dumps(record) for record in document["records"])
    return f"{head}[\n{rows}\n ]\n}}\n"


def new_document(device: torch.device, absent: dict[str, str], busy: int = 0) -> dict[str, Any]:
    """Make a document without ceilings and records, with all that is known of this run.

    ``busy`` is the number of processes that spin beside it.
    """
    commit, dirty = measured_commit()
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    return {
        "schema": SCHEMA,
        "commit": commit,
        "dirty": dirty,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": device_name(device),
        "torch": torch.__version__,
        "triton": triton_version,
        "busy": busy,
        "ceilings": {},
        "absent": absent,
        "clocks": {"start": clocks(device)},
        "records": [],
    }


def device_name(device: torch.device) -> str:
    """Name the GPU, or the processor with the number of threads that torch uses."""
    name = environment.device_name(device)
    return name if device.type == "cuda" else f"CPU {name}, {torch.get_num_threads()} threads"


def clocks(device: torch.device) -> str:
    """Read clocks, temperature and power of the GPU right now; empty where nobody can say."""
    if device.type != "cuda":
        return ""
    wanted = "clocks.sm,clocks.mem,temperature.gpu,power.draw"
    return _output("nvidia-smi", f"--query-gpu={wanted}", "--format=csv,noheader")


def measured_commit() -> tuple[str, bool]:
    """Find the commit measured and whether the tree differs, by git or the environment."""
    commit = ""
    if (CHECKOUT / ".git").exists():  # an export may lie in another repository
        commit = _output("git", "-C", str(CHECKOUT), "rev-parse", "HEAD")
    if not commit:
        return os.environ.get("FUSEDFORMER_COMMIT") or "unknown", False
    measured = ("python", "kernels", "benchmarks", ":!benchmarks/results")
    status = _output("git", "-C", str(CHECKOUT), "status", "--porcelain", "--", *measured)
    return commit, bool(status)


def _output(*command: str) -> str:
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return result.stdout.strip()
