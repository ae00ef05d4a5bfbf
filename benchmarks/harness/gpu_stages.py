"""What ``gpu_check`` does, stage by stage, most valuable first; and each stage again without a GPU.

In a command ``LIMIT`` stands for the seconds after which it had better begin nothing new, and
``DONE`` for a list of the tests that have a result already.
"""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

from harness import CHECKOUT
from harness.profiled import KERNELS
from harness.pytest_results import read_list
from harness.suites import SUITES

# Timed first; the other suites come last.
FIRST_SUITES = ("attention", "encoder", "norm", "softmax")
FIRST_TESTS = (
    "tests/ops", "tests/kernels", "tests/test_graphs.py", "tests/ecosystem/test_cuda_graphs.py",
)  # fmt: skip
ALONE = "tests/ops/test_big_offsets.py"  # takes a large part of the memory
SMOKE = ("tests/ops/test_softmax.py", "tests/ops/test_norm.py", "tests/ops/test_attention.py")


@dataclass(frozen=True)
class Stage:
    """A command with a process and a time limit of its own, so that one that dies takes no other.

    Attributes:
        name: in the summary, and ``<name>.log`` has what it writes.
        seconds: its time limit.
        command: the program and its arguments.
        failed: exit statuses of a command that came to its end and found something wrong.
        unfinished: of one that left something for the next time.
        environment: variables beside those of ``gpu_check``.
    """

    name: str
    seconds: int
    command: list[str]
    failed: tuple[int, ...] = ()
    unfinished: tuple[int, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Setting:
    """Where the stages run: the folder for their files, and whether a GPU is there."""

    folder: Path
    dry: bool
    workers: int

    def file(self, name: str) -> str:
        """Name a file of the folder."""
        return str(self.folder / name)


def stages(setting: Setting) -> list[Stage]:
    """List all stages in the order in which they run; without a GPU a busy machine has time."""
    planned = _stages(setting)
    return [replace(stage, seconds=600) for stage in planned] if setting.dry else planned


def _stages(setting: Setting) -> list[Stage]:
    dry = setting.dry
    rest = [name for name in SUITES if name not in FIRST_SUITES]
    smoke = ["-k", "test_any_dimension" if dry else "test_widths or test_head_dims"]
    elsewhere = [f"--ignore={path}" for path in (*FIRST_TESTS, ALONE)]
    first, others = [*FIRST_TESTS], ["tests"]
    if dry:  # files that collect at once
        first, others = [SMOKE[0]], ["tests/test_descriptors.py"]
    return [
        _tests(setting, "smoke", 40, [*SMOKE, *smoke], run_dry=True),
        _tests(setting, "failed-before", 60, _failed_before(setting)),
        _tests(setting, "tests", 180, [*first, f"--ignore={ALONE}"]),
        _tests(setting, "big-offsets", 60, [ALONE], workers=1),
        Stage("compile", 90, _compile(setting, FIRST_SUITES)),
        *(_suite(setting, name) for name in FIRST_SUITES),
        _tune(setting),
        _profile(setting),
        _tests(setting, "other-tests", 150, [*others, *elsewhere]),
        Stage("compile-others", 90, _compile(setting, rest)),
        *(_suite(setting, name) for name in rest),
        _suite(
            setting, "retime", ["softmax", *([] if dry else ["attention", "norm", "activation"])]
        ),
        _memory(setting),
    ]


def _tests(
    setting: Setting,
    name: str,
    seconds: int,
    arguments: list[str],
    *,
    workers: int = 0,
    run_dry: bool = False,
) -> Stage:
    command = [
        sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider",
        "-p", "harness.pytest_results", "--results", setting.file("tests.jsonl"),
        "--without", "DONE", "-m", "not cpu", *arguments,
    ]  # fmt: skip
    workers = workers or setting.workers
    if setting.dry and not run_dry:
        command.append("--collect-only")
    elif workers > 1:
        # Idle workers take tests of busy ones; one that lost the GPU is replaced.
        command += ["-n", str(workers), "--dist", "worksteal", "--max-worker-restart", "100"]
    return Stage(name, seconds, command, failed=(1,))


def _failed_before(setting: Setting) -> list[str]:
    """Choose the tests that result files name; those that are gone since are no error."""
    names: set[str] = set()
    for path in CHECKOUT.glob("benchmarks/results/*/failed-tests.txt"):
        names |= read_list(path) or set()
    listed = setting.folder / "failed-before.txt"
    listed.write_text("\n".join(sorted(names)) + "\n")
    files = {name.partition("::")[0] for name in names}
    there = sorted(name for name in files if (CHECKOUT / name).is_file())
    return ["--only", str(listed), *(there or [SMOKE[0]])]


def _compile(setting: Setting, suites: tuple[str, ...] | list[str]) -> list[str]:
    command = [sys.executable, "benchmarks/harness/compile_kernels.py", *suites]
    if setting.dry:
        command += ["--device", "cpu", "--sizes", "tiny", "--processes", "1"]
    return command


def _suite(setting: Setting, name: str, suites: list[str] | None = None) -> Stage:
    arguments = SUITES[name].arguments if name in SUITES else ""
    seconds = SUITES[name].seconds if name in SUITES else 100
    results = "bench.json" if suites is None else f"{name}.json"
    command = [
        sys.executable, "benchmarks/run.py", "--suite", *(suites or [name]), "--quick",
        "--out", setting.file(results), "--budget", "LIMIT", *arguments.split(),
    ]  # fmt: skip
    if setting.dry:
        command += ["--device", "cpu", "--sizes", "tiny"]
    tuned = {} if suites is None else {"FUSEDFORMER_TUNED_TABLE": setting.file("tuned.json")}
    return Stage(name, seconds, command, failed=(1,), unfinished=(3,), environment=tuned)


def _tune(setting: Setting) -> Stage:
    command = [sys.executable, "-m", "fusedformer", "tune", "--out", setting.file("tuned.json")]
    command += ["--times", setting.file("tune.json"), "--budget", "LIMIT"]
    if setting.dry:
        command += ["--dry-run", "--case", "^softmax_forward.32768$", "--processes", "1"]
    return Stage("tune", 120, command, unfinished=(3,))


def _profile(setting: Setting) -> Stage:
    program = [sys.executable, "benchmarks/harness/profiled.py"]
    if setting.dry:
        return Stage("ncu", 60, [*program, "--device", "cpu", "--shrink", "128"])
    if shutil.which("ncu") is None:
        return Stage("ncu", 60, ["echo", "ncu is not here"])
    names = "|".join(KERNELS)
    command = ["ncu", "--set", "full", "--clock-control", "none"]  # the clocks are left alone
    return Stage("ncu", 60, [*command, "--kernel-name", f"regex:^({names})$", *program])


def _memory(setting: Setting) -> Stage:
    pytest = [
        sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *SMOKE[:2],
        "tests/ops/test_attention_parts.py", "-k", "width or lengths or few",
    ]  # fmt: skip
    if setting.dry:
        return Stage("memory", 150, [*pytest, "--collect-only"])
    if shutil.which("compute-sanitizer") is None:
        return Stage("memory", 150, ["echo", "compute-sanitizer is not here"])
    command = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9", *pytest]
    # Without the caching allocator, so that each tensor's end is where memory ends.
    allocator = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return Stage("memory", 150, command, failed=(1, 9), environment=allocator)
