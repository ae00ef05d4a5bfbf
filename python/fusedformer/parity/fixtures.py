"""A pytest fixture for the test suite of a user.

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
    """:func:`fusedformer.parity.assert_parity`, with output gradients seeded by the test's name."""

    def check(candidate: Any, baseline: Any, inputs: Any, **settings: Any) -> None:
        __tracebackhide__ = True
        seed = sum(request.node.nodeid.encode())
        parity.assert_parity(candidate, baseline, inputs, **{"seed": seed, **settings})

    return check
