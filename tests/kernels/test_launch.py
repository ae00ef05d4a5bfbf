"""Kernels launched past Triton's own way to them are those that Triton would have launched."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

PROGRAM = """
import itertools, sys
import torch
from triton.compiler import CompiledKernel
from triton.runtime import driver

from benchmarks.harness.no_driver import kernels_go_nowhere
from fusedformer_kernels.compiler import compile_cases
from fusedformer_kernels.runtime import launch
from fusedformer_kernels.rows import gather

launched = []
kernels_go_nowhere(lambda source, arguments: launched.append(described(source, arguments)))


def plain(value):
    if isinstance(value, torch.Tensor):
        return value.dtype, value.shape, value.stride(), value.data_ptr() % 16
    return tuple(map(plain, value)) if isinstance(value, tuple) else value


def described(source, arguments):
    *grid, stream, function, metadata, _, _, _ = arguments[:9]
    attributes = sorted(map(str, source.attrs.items()))
    chosen = source.fn.__name__, str(source.signature), str(source.constants), attributes
    given = arguments[9:]  # constants come in any order: the launcher looks at none
    looked_at = [a for a, kind in zip(given, source.signature.values()) if kind != "constexpr"]
    return (*chosen, metadata, tuple(grid), len(given), plain(tuple(looked_at)))


def stand_in(source, target, options, **others):
    '''A compiled kernel without the seconds that compiling takes.'''
    kernel = object.__new__(CompiledKernel)
    kernel.src, kernel.name, kernel.hash, kernel.module, kernel.function = source, "", "", 1, 1
    kernel.packed_metadata = options["num_warps"], options["num_stages"]
    kernel._run = driver.active.launcher_cls(source, None)
    return kernel


def launches_of(call, known):
    '''Those of a call; past Triton where it can be if ``known``.'''
    launch._IS_KNOWN = known
    if not known:
        launch._compiled.clear()
    launched.clear()
    call()
    return list(launched)


original = launch._launch
def _launch(kernel, *others):
    kernel.device_caches[0]  # makes what compiles
    kernel.compile = stand_in
    original(kernel, *others)
launch._launch = _launch

def check(call, name):
    want = launches_of(call, False)
    launches_of(call, True)
    before = dict(launch._compiled)
    got = launches_of(call, True)
    assert launch._compiled == before and before, f"{name}: not past Triton"
    for have, want in zip(got, want, strict=True):
        different = [pair for pair in zip(have, want) if pair[0] != pair[1]]
        assert not different, (name, have[0], different)

for case in compile_cases.compile_cases():
    check(case.call, case.name)

# While a profiler listens or changes kernels, Triton's own way; and nothing of then is kept.
import triton
case = next(case for case in compile_cases.compile_cases() if case.name == "layer_norm 768")
for owner, name in ((triton.knobs.runtime, "launch_enter_hook"),
                    (triton.knobs.runtime, "launch_exit_hook"),
                    (triton.knobs.compilation, "instrumentation_mode")):
    launch._compiled.clear()
    hook = getattr(getattr(owner, name), "calls", None)
    if hook is None:
        setattr(owner, name, "consan")
    else:
        hook.append(lambda metadata: None)
    launches_of(case.call, True)
    assert not launch._compiled, name
    if hook is None:
        setattr(owner, name, "")
    else:
        hook.clear()
    check(case.call, name)

# Whatever order kinds of arguments come in.
sizes = 0, 1, 2, 8, 15, 16, 17, 24, 2**31 - 1, 2**31, 2**31 + 16, 2**40 + 1, -16, -5
memory = torch.zeros(64, dtype=torch.float32)
aligned, half, odd = memory[:4], memory[2:6], memory[1:5]
config = launch.LaunchConfig(4, 2)
wanted = {}
kinds = list(itertools.product((aligned, half, odd, aligned.half()), sizes, sizes))
for known in (False, True, True):
    launch._IS_KNOWN = known
    launch._compiled.clear() if not known else None
    for kind in kinds:
        x, first, second = kind
        launched.clear()
        launch.launch(
            gather._gather_rows, (3,), config, x, None, aligned, first, 7, second, 1,
            BLOCK_M=4, BLOCK_N=16,
        )
        assert wanted.setdefault((plain(x), first, second), list(launched)) == launched, kind
assert launch._kinds_of_numbers((1,), (int,)) != launch._kinds_of_numbers((1.0,), (float,))
print(len(launch._compiled), "of", len(kinds))
assert len(launch._compiled) < len(kinds) / 2
"""


def test_the_same_kernels_with_the_same_arguments() -> None:
    """Every compile case's launches, and every kind of pointer and integer."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT / "python", ROOT / "kernels", ROOT)))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, cwd=ROOT,
        timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
