"""A ninth of the architectures that can be built small; ``make architectures`` looks at all."""

from __future__ import annotations

import json
import warnings
import zlib
from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("transformers")

from tests.fusion.architectures import (
    BUILDABLE,
    KNOWN,
    SECONDS,
    deadline,
    examine,
    level_of,
    quiet,
)
from tests.fusion.models import model_of

import fusedformer

TYPES = json.loads(BUILDABLE.read_text())
CHOSEN = [name for name in TYPES if zlib.crc32(name.encode()) % 9 == 0]


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
    assert len(TYPES) >= 460 and len(CHOSEN) >= len(TYPES) / 10
    assert TYPES.keys() >= KNOWN.keys()


LEVELS = {"bert": "A", "mpnet": "A", "deberta-v3": "A", "t5": "A", "vit": "A", "whisper": "A",
          "siglip2": "A", "clip": "A", "gpt2": "A", "hubert": "A"}  # fmt: skip


@pytest.mark.parametrize("name", LEVELS)
def test_levels_tell_what_is_computed(name: str) -> None:
    """The highest only where every layer is fused, and no padding is left to compute."""
    model = model_of(name)
    level, below = level_of(model, fusedformer.fuse(model))
    assert level == LEVELS[name]
    assert (below == "") == (level == "A")


def test_a_layer_that_is_left_lowers_the_level() -> None:
    """And ``strict`` refuses it."""
    model = model_of("vit")
    product = model.get_submodule("layers.1.mlp.fc1")
    product.register_forward_hook(lambda module, args, output: output)
    with pytest.raises(ValueError, match=r"(?s)strict=True.*layers.1.*its own forward runs"):
        fusedformer.fuse(model, strict=True)
    level, below = level_of(model, fusedformer.fuse(model))
    assert level == "C" and "its own forward runs" in below
