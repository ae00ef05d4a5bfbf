"""What tests of the C++ on CPUs share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from fusedformer import backend
from fusedformer_kernels.cpu import build


@pytest.fixture
def by_compiled_torch() -> Iterator[None]:
    """The torch backend in inference, where something was compiled for this CPU."""
    if build.library() is None:
        pytest.skip("no compiler")
    with backend("torch"), torch.no_grad():
        yield
