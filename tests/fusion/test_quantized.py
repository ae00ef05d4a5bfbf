"""fuse() on models whose products are quantized to int8."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tests.fusion.models import LENGTHS, MASK, inputs_of, model_of
from torch import Tensor, nn

import fusedformer

NAMES = ["bert", "distilbert", "modernbert", "esmc", "deberta", "deberta-v3", "mpnet", "t5"]
CALLED = "deberta", "deberta-v3", "mpnet", "t5"  # whose layers call their children


def hidden(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model(**inputs).last_hidden_state
    return found


def assert_close_beside(found: Tensor, wanted: Tensor, stock: Tensor, truth: Tensor) -> None:
    """They differ by less than what quantization is off: sums in another order may flip a step."""
    assert (found - wanted).abs().max() < (stock - truth)[MASK].abs().max()


def assert_rounds_no_more(ours: Tensor, stock: Tensor, truth: Tensor) -> None:
    """The error beside the model that is not quantized is at most twice stock's, and no zeros'."""
    error, stocks = ((x - truth)[MASK].abs().max() for x in (ours, stock))
    assert 0 < error <= 2 * stocks < truth.abs().max() / 2


@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization is deprecated")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("name", NAMES)
def test_dynamic_products_of_torch_ao(name: str) -> None:
    """The encoder packs; the report says whose forward runs."""
    model, inputs = model_of(name).eval(), inputs_of(name)
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    stock = copy.deepcopy(quantized)
    report = fusedformer.fuse(quantized)
    assert any(one.after.startswith("packed: real tokens only") for one in report.replaced)
    reasons = {one.reason for one in report.left}
    calls = "its children are called" if name in CALLED else "its own forward runs"
    assert reasons == {f"products are quantized: {calls}"}
    ours = hidden(quantized, inputs)
    assert not ours[~MASK].any()
    assert_rounds_no_more(ours, hidden(stock, inputs), hidden(model, inputs))
    assert fusedformer.unfuse(quantized)
    assert torch.equal(hidden(quantized, inputs), hidden(stock, inputs))


@pytest.mark.parametrize("name", NAMES)
def test_dynamic_products_of_torchao(name: str) -> None:
    """Each token has a scale of its own: the same packed, padded and alone."""
    ao: Any = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    model, inputs = model_of(name).eval(), inputs_of(name)
    stock = copy.deepcopy(model)
    ao.quantize_(stock, ao.Int8DynamicActivationInt8WeightConfig())
    packed, padded = copy.deepcopy(stock), copy.deepcopy(stock)
    assert not fusedformer.fuse(packed).left
    fusedformer.fuse(padded, pack=False)
    ours = hidden(packed, inputs)
    assert not ours[~MASK].any()
    beside = hidden(stock, inputs), hidden(model, inputs)
    assert_close_beside(ours[MASK], hidden(padded, inputs)[MASK], *beside)
    for i, n in enumerate(LENGTHS):
        alone = hidden(packed, {key: x[i : i + 1, :n] for key, x in inputs.items()})
        assert_close_beside(alone[0], ours[i, :n], *beside)
    assert_rounds_no_more(ours, *beside)
