"""The kernels have tests of their own: here they run where a test asks for them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fusedformer import backend


@pytest.fixture(autouse=True)
def _torch_backend() -> Iterator[None]:
    with backend("torch"):
        yield
