"""Fixtures of the tests of launches and plans."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The plans that are run, in order."""
    from fusedformer_kernels.runtime import plan

    found: list[Any] = []
    original = plan.Plan.run

    def run(self: plan.Plan, *args: Any) -> Any:
        found.append(self)
        return original(self, *args)

    monkeypatch.setattr(plan.Plan, "run", run)
    return found
