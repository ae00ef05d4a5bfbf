"""Little text and small models: what every run of these tests is made of."""

from __future__ import annotations

import os
import shutil
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fusedformer import backend
from fusedformer.tools.training import pretrain
from fusedformer.tools.training.settings import Settings
from fusedformer.tools.training.trainer import Trainer

SMALL = dict(
    steps=6, batch_tokens=600, pairs=8, length=48, vocab_size=400, width=32, layers=2, heads=2,
    lr=0.003,
)  # fmt: skip
PACKAGES = "asyncio", "email", "logging"


def words(**settings: Any) -> list[str]:
    """As options of the command line."""
    return [f"--{n.replace('_', '-')}={v}" for n, v in {**SMALL, **settings}.items()]


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of some packages of the standard library."""
    folder = tmp_path_factory.mktemp("text")
    for name in PACKAGES:
        shutil.copytree(Path(sysconfig.get_path("stdlib")) / name, folder / name)
    return folder


@pytest.fixture(autouse=True)
def _on_torch() -> Iterator[None]:
    """The interpreter would take minutes; kernels have tests of their own."""
    with backend("torch"):
        yield


@pytest.fixture
def trainer(text: Path) -> Callable[..., Trainer]:
    """One of small models."""

    def make(**given: Any) -> Trainer:
        settings = Settings(**{**SMALL, "text": str(text), **given})
        task, _, _ = pretrain.load_task(settings)
        return Trainer(task, torch.device("cpu"))

    return make


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """For commands in processes of their own, without the interpreter."""
    kept = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    root = Path(__file__).parent.parent.parent.parent
    paths = os.pathsep.join(str(root / name) for name in ("python", "kernels"))
    return kept | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
