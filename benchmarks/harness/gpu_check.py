"""Test and time the checkout on a GPU, in calls of a few minutes: ``benchmarks/gpu_check.sh``.

Files are written to a folder of the machine's, and packed into OUTDIR every 20 seconds: there are
never more than ``results.tar.gz`` and ``summary.txt``, whole whenever the machine is taken away.
The same command goes on where the last call ended; on another machine, from its archive.
``docs/gpu-check.md`` says how to read what comes back.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from harness import CHECKOUT
from harness.gpu_stages import Setting, Stage, stages
from harness.pytest_results import outcomes
from harness.records import measured_commit
from reporting.standing import standing

ARCHIVE, SUMMARY = "results.tar.gz", "summary.txt"
PACKED_EVERY = 20.0  # seconds
LEAST = 5.0  # seconds that a stage needs to begin
NO_TESTS_LEFT = 5  # exit status of pytest
MOST_NAMED = 40  # failed tests in the summary
PACKAGES = ("torch", "triton", "numpy", "transformers", "pytest", "pytest-xdist")


class State:
    """The folder that lasts between calls: what stages wrote, and how each of them ended."""

    def __init__(self, folder: Path, commit: str, archive: Path | None = None) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        if archive is not None and not (folder / "state.json").exists():
            with tarfile.open(archive) as packed:
                packed.extractall(folder, filter="data")
        known = folder / "state.json"
        found = json.loads(known.read_text()) if known.exists() else {}
        if found.get("commit") != commit:  # results of another commit
            shutil.rmtree(folder)
            folder.mkdir()
            found = {"commit": commit, "stages": {}}
        self.commit = commit
        self.ended: dict[str, dict[str, Any]] = found["stages"]
        self.save()

    def save(self) -> None:
        """Write how stages ended."""
        found = {"commit": self.commit, "stages": self.ended}
        replace(self.folder / "state.json", json.dumps(found, indent=1) + "\n")

    def note(self, stage: Stage, status: int, seconds: float, cut: bool) -> str:
        """Write how a stage ended; return it in a word or two."""
        how = "complete"
        if cut or status in stage.unfinished:
            how = "cut short"
        elif status in stage.failed:
            how = "failed"
        elif status not in (0, NO_TESTS_LEFT):
            how = f"died ({status})"
        before = self.ended.get(stage.name, {}).get("seconds", 0.0)
        self.ended[stage.name] = {"how": how, "seconds": round(before + seconds, 1)}
        self.save()
        return how

    def is_done(self, stage: Stage) -> bool:
        """Tell whether a stage came to its end, well or not."""
        return self.ended.get(stage.name, {}).get("how") in ("complete", "failed")


def replace(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    part.replace(path)


class Packer(threading.Thread):
    """Packs the state's files and a summary into the folder that is brought home."""

    def __init__(self, state: State, names: list[str], out: Path) -> None:
        super().__init__(daemon=True)
        self.state, self.names, self.out = state, names, out
        self.stopped = threading.Event()
        self.lock = threading.Lock()

    def run(self) -> None:
        """Pack again and again until stopped."""
        while not self.stopped.wait(PACKED_EVERY):
            self.pack()

    def pack(self) -> None:
        """Replace archive and summary, each at once."""
        with self.lock:
            folder = self.state.folder
            text = summary(self.state, self.names)
            replace(folder / SUMMARY, text)
            failed = [t for t, r in tests_of(self.state).items() if r["outcome"] == "failed"]
            replace(folder / "failed-tests.txt", "".join(f"{test}\n" for test in sorted(failed)))
            part = self.out / f"{ARCHIVE}.part"
            with tarfile.open(part, "w:gz") as packed:
                for path in sorted(folder.iterdir()):
                    if path.is_file() and path.suffix != ".part":
                        packed.add(path, path.name)
            part.replace(self.out / ARCHIVE)
            replace(self.out / SUMMARY, text)


def tests_of(state: State) -> dict[str, dict[str, Any]]:
    """Read the last result of every test."""
    return outcomes(state.folder / "tests.jsonl")


def summary(state: State, names: list[str]) -> str:
    """Say at a glance how stages ended, which tests failed, and where the library stands."""
    lines = (state.folder / "environment.txt").read_text().splitlines()[:5]
    lines.append("")
    for name in names:
        ended = state.ended.get(name, {"how": "not begun", "seconds": 0.0})
        lines.append(f"{name:16}{ended['how']:12}{ended['seconds']:6.0f} s")
    results = tests_of(state)
    count = Counter(result["outcome"] for result in results.values())
    words = ", ".join(f"{count[each]} {each}" for each in ("passed", "failed", "skipped"))
    lines += ["", f"tests: {words}"]
    failed = [result for result in results.values() if result["outcome"] == "failed"]
    lines += [f"FAILED {r['test']}: {r['message']}" for r in failed[:MOST_NAMED]]
    if len(failed) > MOST_NAMED:
        lines.append(f"and {len(failed) - MOST_NAMED} more, in failed-tests.txt")
    for name in ("bench.json", "retime.json"):
        path = state.folder / name
        if path.exists():
            lines += ["", f"{name}:", *standing(json.loads(path.read_text()))]
    return "\n".join(lines) + "\n"


def describe(commit: str) -> str:
    """Describe the machine and its versions."""

    def version(package: str) -> str:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return "absent"

    def said(*command: str) -> str:
        try:
            return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout
        except (OSError, subprocess.SubprocessError):
            return ""

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    tools = [tool for tool in ("ncu", "compute-sanitizer") if shutil.which(tool)]
    return "\n".join(
        [
            f"commit {commit}",
            f"{name}, {os.cpu_count()} cores",
            f"python {platform.python_version()}, "
            + ", ".join(f"{package} {version(package)}" for package in PACKAGES),
            f"tools: {', '.join(tools) or 'none'}",
            time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
            said("nvidia-smi") or "no nvidia-smi",
        ]
    )


def run_stage(stage: Stage, seconds: float, state: State, again: bool) -> tuple[int, bool]:
    """Run a stage's command; return its status, and whether its time was over before it was."""
    done = state.folder / "done-tests.txt"
    done.write_text("" if again else "".join(f"{test}\n" for test in tests_of(state)))
    replacements = {"LIMIT": str(int(0.8 * seconds)), "DONE": str(done)}
    command = [replacements.get(word, word) for word in stage.command]
    environment = {**os.environ, **stage.environment}
    environment.pop("TRITON_INTERPRET", None)  # kernels are timed, never their interpretation
    with (state.folder / f"{stage.name}.log").open("a") as log:
        process = subprocess.Popen(
            command, cwd=CHECKOUT, env=environment, stdin=subprocess.DEVNULL, stdout=log,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            return process.wait(seconds), False
        except subprocess.TimeoutExpired:
            return end(process), True
        except BaseException:
            end(process)
            raise


def end(process: subprocess.Popen[bytes], patience: float = 10.0) -> int:
    """Interrupt a stage, so that it writes what it has, then kill it and what it started."""
    for signal_ in (signal.SIGINT, signal.SIGKILL):
        try:
            os.killpg(process.pid, signal_)
        except ProcessLookupError:
            break
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            continue
    return process.wait()


def _interrupted(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main(arguments: list[str] | None = None) -> int:
    """Run the stages that are left; 0 all is well, 1 not, 2 there is no GPU."""
    given = _parser().parse_args(arguments)
    if not given.cpu_dry_run and not torch.cuda.is_available():
        print("gpu_check: torch sees no GPU here (--cpu-dry-run needs none)", file=sys.stderr)
        return 2
    if given.commit:
        os.environ["FUSEDFORMER_COMMIT"] = given.commit
    commit = measured_commit()[0]
    given.out.mkdir(parents=True, exist_ok=True)
    state = State(given.state, commit, given.restore)
    (state.folder / "environment.txt").write_text(describe(commit))
    workers = given.workers or (os.cpu_count() or 1)
    planned = stages(Setting(state.folder, given.cpu_dry_run, workers))
    names = [stage.name for stage in planned]
    if unknown := set(given.stages or ()) - set(names):
        print(f"gpu_check: no stage {', '.join(sorted(unknown))}; there are {', '.join(names)}")
        return 2
    packer = Packer(state, names, given.out)
    packer.start()
    before = signal.signal(signal.SIGTERM, _interrupted)
    try:
        deadline = time.monotonic() + given.seconds
        for stage in planned:
            if stage.name not in (given.stages or names):
                continue
            if state.is_done(stage) and not given.again:
                continue
            limit = min(stage.seconds, deadline - time.monotonic())
            if limit < LEAST:
                break
            began = time.monotonic()
            status, cut = run_stage(stage, limit, state, given.again)
            took = time.monotonic() - began
            how = state.note(stage, status, took, cut)
            print(f"{stage.name:16}{how:12}{took:6.0f} s", flush=True)
    except KeyboardInterrupt:
        state.note(stage, 0, time.monotonic() - began, True)
        print("interrupted: what is there is packed", file=sys.stderr)
    finally:
        signal.signal(signal.SIGTERM, before)
        packer.stopped.set()
        packer.pack()
    print((given.out / SUMMARY).read_text(), end="")
    ended = {state.ended.get(name, {}).get("how") for name in given.stages or names}
    return 0 if ended == {"complete"} else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gpu_check.sh", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    default = Path(os.environ.get("GPU_CHECK_STATE") or "/tmp/fusedformer-gpu-check")
    parser.add_argument("out", type=Path, metavar="OUTDIR", help="for the archive and the summary")
    parser.add_argument("--commit", help="what is checked, where there is no repository")
    parser.add_argument("--seconds", type=float, default=340.0, help="of this call (default: 340)")
    parser.add_argument("--restore", type=Path, help="archive of a call on another machine")
    parser.add_argument(
        "--state", type=Path, default=default,
        help="folder between calls (default: $GPU_CHECK_STATE or /tmp/fusedformer-gpu-check)",
    )  # fmt: skip
    parser.add_argument("--stages", nargs="+", help="these only")
    parser.add_argument("--again", action="store_true", help="what is complete too")
    parser.add_argument("--workers", type=int, help="of tests (default: one a core)")
    parser.add_argument("--cpu-dry-run", action="store_true", help="every stage, tiny, on CPU")
    return parser


if __name__ == "__main__":
    sys.exit(main())
