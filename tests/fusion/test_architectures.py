"""A sixth of the architectures that can be built small; ``make architectures`` looks at all."""

from __future__ import annotations

import json
import warnings
import zlib
from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("transformers")

from tests.fusion.architectures import BUILDABLE, KNOWN, SECONDS, deadline, examine, quiet

TYPES = json.loads(BUILDABLE.read_text())
CHOSEN = [name for name in TYPES if zlib.crc32(name.encode()) % 6 == 0]


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    """One thread, and no word of transformers."""
    threads = torch.get_num_threads()
    with warnings.catch_warnings():
        quiet()
        torch.set_num_threads(1)
        yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", CHOSEN)
def test_fused_is_as_stock(name: str) -> None:
    """Outputs, gradients, weights, hooks, pickles, unfuse; at the level that is written down."""
    with deadline(SECONDS):
        found = examine(name, TYPES[name]["recipe"])
    known = [fault for fault in found.faults if fault.startswith("output_attentions")]
    assert (found.faults == known and known != []) if name in KNOWN else found.faults == []
    assert found.level == TYPES[name]["level"]


def test_enough_are_built() -> None:
    assert len(TYPES) >= 460 and len(CHOSEN) >= len(TYPES) / 8
    assert TYPES.keys() >= KNOWN.keys()
