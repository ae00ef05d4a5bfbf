"""Every pair of attention's features together, and random combinations of all of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.ops.features import CHOICES, Call, Combination, pairwise

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import strategies  # noqa: E402

PAIRS = pairwise()


def named(choice: Combination) -> str:
    present = (
        f"{name}={value}".removeprefix("dtype=torch.")
        for name, value in choice.items()
        if value != CHOICES[name][0]
    )
    return ", ".join(present)


@pytest.mark.parametrize("choice", PAIRS, ids=named)
def test_pairs(choice: Combination, device: str) -> None:
    Call.draw(choice, device).check()


# Without shrinking: a failing call names its choices, and a smaller one may take minutes to find.
@hypothesis.settings(max_examples=4, phases=[hypothesis.Phase.generate])
@hypothesis.given(
    choice=strategies.fixed_dictionaries(
        {name: strategies.sampled_from(list(values)) for name, values in CHOICES.items()}
    ),
    seed=strategies.integers(0, 2**31 - 1),
)
def test_random_combinations(choice: dict[str, Any], seed: int, device: str) -> None:
    torch.manual_seed(seed)
    Call.draw(choice, device).check()
