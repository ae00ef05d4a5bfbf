"""On the torch backend, which is what CPU tensors take; files are small, and written quietly."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from fusedformer import backend

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


@pytest.fixture(autouse=True)
def _torch_backend() -> Iterator[None]:
    with backend("torch"):
        yield
