"""Tune tile configs for the GPU of this machine: ``python -m fusedformer tune``.

Candidates that spill, or do not fit in shared memory, are found by compiling ahead of time, and
left out; the others are checked, and timed with the L2 cache flushed. Those that beat the default
go into a table in the user's cache directory, which the kernels read from then on. Without a GPU
``--dry-run --target sm_90`` says what would be tried, and what its machine code promises.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fusedformer.tools.arguments import check_any, pattern, positive

if TYPE_CHECKING:
    from fusedformer.tools.tune.search import Found
    from fusedformer_kernels.runtime.targets import Target


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 0, 2 where there is no GPU to tune for, 3 if time ran out."""
    parser = _parser()
    given = parser.parse_args(argv)
    try:
        from fusedformer.tools.tune import search
        from fusedformer.tools.tune.workloads import workloads
        from fusedformer_kernels.runtime.targets import TARGETS, target_of
    except ModuleNotFoundError as error:
        print(f"tune: {error}: it needs triton", file=sys.stderr)
        return 2
    check_any(parser, given.case, (workload.name for workload in workloads()))
    chosen = [(i, w) for i, w in enumerate(workloads()) if re.search(given.case, w.name)]
    if given.dry_run:
        target = TARGETS[given.target]
        for index, workload in chosen:
            pruned = search.prune([index], target, given.processes)[index]
            left = [fields for fields, reason in pruned if not reason]
            print(f"{workload.name}: {len(left)} of {len(pruned)} candidates to try", flush=True)
            if given.target == "sm_90":
                print(f"    {search.worth()}")
                times = [search.predicted_us(workload, fields, target) for fields in left]
                default = search.predicted_us(workload, None, target)
                print(f"    predicted {default:8.1f} us  default")
                for time_us, fields in sorted(zip(times, left, strict=True), key=lambda t: t[0]):
                    print(f"    predicted {time_us:8.1f} us  {_words(fields)}")
                continue
            for fields in left:
                print(f"    {_words(fields)}")
        return 0
    if not torch.cuda.is_available():
        print(
            "tune: torch sees no GPU here; --dry-run says what would be tried on one",
            file=sys.stderr,
        )
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    target = target_of(device)
    out = given.out or _cache_file(target)
    known = _timed_before(given.times)
    chosen = [(index, workload) for index, workload in chosen if workload.name not in known]
    found: list[Found] = []
    began = time.monotonic()
    deadline = began + given.budget
    try:
        # All at once, and before anything is timed: compilers would be in a timer's way.
        indices = [index for index, _ in chosen]
        compiled = search.prune(indices, target, given.processes, began + given.budget / 2)
        print(f"compiled in {time.monotonic() - began:.0f} s", flush=True)
        for number, (index, own) in enumerate(compiled.items(), 1):
            if time.monotonic() > deadline:
                break
            one = search.search(index, own, device, deadline=deadline)
            found.append(one)
            print(f"{number}/{len(chosen)} {line(one)}", flush=True)
            write(out, found, target)
            if given.times is not None and time.monotonic() <= deadline:
                known[one.name] = _times(one)
                given.times.write_text(json.dumps(list(known.values()), indent=1) + "\n")
        if len(found) < len(chosen):
            print(f"out of time: {len(chosen) - len(found)} of {len(chosen)} not tuned")
    except KeyboardInterrupt:
        print("interrupted: what was found so far is kept", file=sys.stderr)
    print(f"{sum(bool(one.best) for one in found)} of {len(found)} better than the default: {out}")
    return 0 if len(found) == len(chosen) else 3


def line(found: Found) -> str:
    """Describe the result of a workload in one line."""
    times = ", ".join(f"{n} {a:.1f} -> {b:.1f} us" for n, (a, b) in found.times_us.items())
    said = f"{found.speedup:.2f}x with {_words(found.best)}" if found.best else "default stays"
    return (
        f"{found.name}: {said} ({times}; {found.tried} tried, {found.pruned} pruned, "
        f"{found.wrong} wrong)"
    )


def _timed_before(path: Path | None) -> dict[str, Any]:
    """Read by workload what ``--times`` wrote; nothing where there is no such file."""
    if path is None or not path.exists():
        return {}
    return {one["workload"]: one for one in json.loads(path.read_text())}


def _times(found: Found) -> dict[str, Any]:
    """Make the entry of ``--times``: medians of the default, and of each candidate beside it."""
    (_, default), *tried = found.candidates_us
    return {
        "workload": found.name,
        "default": default,
        "tried": [[times, dict(fields)] for fields, times in tried],
    }


def write(path: Path, found: Sequence[Found], target: Target) -> None:
    """Write the table, keeping the entries that the file has for other keys."""
    import triton

    entries: dict[str, Any] = {}
    if path.exists():
        entries = json.loads(path.read_text()).get("entries", {})
    for one in found:
        entries.pop(one.name, None)
        if one.best:
            facts = {k: v for k, v in asdict(one).items() if k not in ("name", "best")}
            entries[one.name] = {"config": dict(one.best), **facts}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        json.dumps(
            {
                "schema": 1, "target": f"{target.backend} {target.arch}",
                "device": target.device_name, "torch": torch.__version__,
                "triton": triton.__version__,
                "date": datetime.datetime.now(datetime.timezone.utc).isoformat("T", "seconds"),
                "entries": entries,
            },
            indent=1,
        )
        + "\n"
    )  # fmt: skip


def _cache_file(target: Target) -> Path:
    from fusedformer_kernels.runtime.tuned import cache_file

    return cache_file(target.device_name)


def _words(fields: Any) -> str:
    return " ".join(f"{name}={value}" for name, value in fields.items())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fusedformer tune", description=__doc__)
    parser.add_argument(
        "--case", type=pattern, default="", help="only keys that match this regular expression"
    )
    parser.add_argument("--out", type=Path, help="the table (default: the user's, in the cache)")
    parser.add_argument(
        "--times", type=Path,
        help="write the medians of all candidates to this file, and leave out what it has already",
    )  # fmt: skip
    parser.add_argument(
        "--budget", type=float, default=math.inf, help="seconds in all, of which half may compile"
    )
    parser.add_argument(
        "--processes", type=positive, help="compilers at once; all cores by default"
    )
    parser.add_argument("--dry-run", action="store_true", help="compile and list, run nothing")
    parser.add_argument(
        "--target",
        default="sm_90",
        choices=("sm_80", "sm_90", "sm_100", "gfx942"),
        help="of --dry-run",
    )
    return parser
