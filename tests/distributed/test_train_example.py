"""The example of distributed training: the same losses on two processes as on one."""

from __future__ import annotations

import functools
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fusedformer import backend
from fusedformer.distributed import LengthBalancedSampler
from fusedformer.testing import compare_tensors

ROOT = Path(__file__).parent.parent.parent
EXAMPLE = ROOT / "examples" / "train_distributed.py"
SMALL = [
    "--passages=24", "--words=300", "--width=32", "--layers=1", "--max-tokens=600", "--lr=0.01",
    "--device=cpu",
]  # fmt: skip
SECONDS = 120  # torchrun's two processes are started, train, and one dies

# The second process dies in its fourth step.
DIES = f"""
import os, runpy, torch
step, steps = torch.optim.AdamW.step, []
def dying(self):
    steps.append(step(self))
    if len(steps) == 4 and os.environ["RANK"] == "1":
        os._exit(7)
torch.optim.AdamW.step = dying
runpy.run_path({str(EXAMPLE)!r}, run_name="__main__")
"""


@pytest.fixture(scope="module")
def example() -> Any:
    spec = importlib.util.spec_from_file_location("train_distributed", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.stdlib_passages = functools.cache(module.stdlib_passages)
    return module


def train(example: Any, *arguments: object) -> list[float]:
    """The losses of one process."""
    with backend("torch"):
        losses: list[float] = example.main([*SMALL, *map(str, arguments)])
    return losses


class Whole:
    """The batches of two processes as one."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        settings |= {"num_replicas": 2}
        self.samplers = [LengthBalancedSampler(*args, **settings | {"rank": r}) for r in (0, 1)]

    def set_epoch(self, *where: int) -> None:
        for sampler in self.samplers:
            sampler.set_epoch(*where)

    def __iter__(self) -> Iterator[list[int]]:
        return (first + second for first, second in zip(*self.samplers, strict=True))


def test_two_processes_train_as_one_and_end_when_one_dies(
    example: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, checkpoint = tmp_path / "dies.py", tmp_path / "checkpoint"
    script.write_text(DIES)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {
        "PYTHONPATH": os.pathsep.join([str(ROOT / "python"), str(ROOT / "kernels")]),
        "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo",
    }  # fmt: skip
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    arguments = "--timeout=20", "--dropout=0", "--steps=5", "--save-every=1", "--checkpoint"
    result = subprocess.run(
        [*torchrun, script, *SMALL, *arguments, checkpoint], env=environment, timeout=SECONDS,
        capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode != 0
    assert "exitcode  : 7" in result.stderr, result.stderr

    assert "step    3  epoch 2  loss" in result.stdout
    spread = torch.load(checkpoint)["losses"][:3]
    settings = "--dropout", 0, "--steps", 3
    accumulated = train(example, *settings, "--accumulate", 2)
    monkeypatch.setattr(example, "LengthBalancedSampler", Whole)
    stock = train(example, *settings)
    model = example.MaskedWords
    monkeypatch.setattr(example, "MaskedWords", lambda *sizes: model(*sizes).double())
    truth = torch.tensor(train(example, *settings), dtype=torch.float64)
    assert truth[2] < truth[0]
    for name, losses in (("of two processes", spread), ("of two batches in turn", accumulated)):
        comparison = compare_tensors(
            f"losses {name}", torch.tensor(losses), torch.tensor(stock), truth
        )
        assert comparison.passed, comparison.fault


def test_it_goes_on_from_a_checkpoint_with_the_same_bits(example: Any, tmp_path: Path) -> None:
    paths = tmp_path / "whole", tmp_path / "parts"
    whole = train(example, "--steps", 5, "--checkpoint", paths[0])
    train(example, "--steps", 2, "--checkpoint", paths[1])
    assert train(example, "--steps", 5, "--checkpoint", paths[1], "--resume") == whole
    ends = [torch.load(path) for path in paths]
    assert ends[0]["reached"] == ends[1]["reached"] >= (1, 0)
    pairs = zip(ends[0]["model"].values(), ends[1]["model"].values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
