"""Provide a pytest fixture to the test suites of users.

In its ``conftest.py``::

    pytest_plugins = ["fusedformer.parity.fixtures"]

and then in a test ``def test_swap(assert_parity): assert_parity(mine, stock, {"x": x})``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from fusedformer import parity


@pytest.fixture
def assert_parity(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Return :func:`fusedformer.parity.assert_parity`, seeded by the name of the test."""

    def check(candidate: Any, baseline: Any, inputs: Any, **settings: Any) -> None:
        __tracebackhide__ = True
        seed = sum(request.node.nodeid.encode())
        parity.assert_parity(candidate, baseline, inputs, **{"seed": seed, **settings})

    return check
