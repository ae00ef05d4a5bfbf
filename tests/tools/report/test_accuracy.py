"""Errors by layer, of gradients and of embeddings, on a tiny model with and without faults."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import fusedformer
from fusedformer.models import BertConfig, BertEncoderModel
from fusedformer.tools.report import accuracy
from fusedformer.tools.report.minilm import Batch

CONFIG = BertConfig(
    vocab_size=50, hidden_size=24, num_hidden_layers=3, num_attention_heads=3,
    intermediate_size=40, max_position_embeddings=16,
)  # fmt: skip


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Without the interpreter, and with few draws: how errors are judged is tested here."""
    monkeypatch.setattr(accuracy, "VECTOR_DRAWS", 4)
    with fusedformer.backend("torch"):
        yield


@pytest.fixture
def models() -> dict[str, Any]:
    """Stock and fused of the same random weights, and stock in float64."""
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(**vars(CONFIG), attn_implementation="sdpa")
    torch.manual_seed(0)
    stock = transformers.BertModel(config, add_pooling_layer=False).eval()
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    truth = transformers.BertModel(config, add_pooling_layer=False).eval()
    truth.load_state_dict(stock.state_dict())
    fused = BertEncoderModel.from_huggingface(stock.state_dict(), CONFIG)
    return {"stock": stock, "fused": fused, "truth": truth.double()}


@pytest.fixture
def batch() -> Batch:
    ids = torch.randint(1, 50, (6, 9), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(9) < torch.tensor([9, 4, 1, 7, 9, 2])[:, None]).long()
    return Batch(ids, mask, [3, 1, 0, 5, 4, 2])


def shift(model: BertEncoderModel, layer: int) -> None:
    with torch.no_grad():
        module: Any = model.encoder.layers[layer]
        module.linear1.bias[0] += 0.01


def test_layers_are_judged_at_every_depth(models: dict[str, Any], batch: Batch) -> None:
    truth = models.pop("truth")
    found = accuracy.layer_report(models, truth, batch)
    assert [one["name"] for one in found] == ["embeddings", "layer 1", "layer 2", "layer 3"]
    assert all(one["passed"] for one in found)
    shift(models["fused"], 1)
    found = accuracy.layer_report(models, truth, batch)
    assert [one["passed"] for one in found] == [True, True, False, False]


def test_gradients_are_judged_by_kind(models: dict[str, Any], batch: Batch) -> None:
    truth = models.pop("truth")
    found = accuracy.gradient_report(models, truth, batch)
    kinds = {one["name"].split("*.")[-1]: one for one in found}
    assert len(found) == 5 + 16  # of the embeddings and of a layer
    assert [name for name, one in kinds.items() if not one["judged"]] == ["attention.self.key.bias"]
    assert all(one["passed"] for one in found)
    shift(models["fused"], 2)
    found = accuracy.gradient_report(models, truth, batch)
    assert not any(one["passed"] for one in found if one["judged"])


def test_embeddings_are_in_the_order_of_the_passages(models: dict[str, Any], batch: Batch) -> None:
    rows = accuracy.embed(models["stock"], [batch])
    with torch.no_grad():
        direct = accuracy.embedding(models["stock"], batch)
    assert torch.equal(rows[batch.index], direct)


def test_embedding_report(models: dict[str, Any], batch: Batch) -> None:
    truth = accuracy.embed(models["truth"], [batch])
    rows = {name: accuracy.embed(models[name], [batch]) for name in ("stock", "fused")}
    found = accuracy.embedding_report(rows, truth)
    assert found["errors"]["passed"]
    assert found["neighbours"]["fused"]["beyond_rounding"] == 0
    # Rounding alone: the squared chord is that of the errors, not of their cancellation.
    assert max(found["cosine_loss"]["fused"]) < 24 * torch.finfo(torch.float32).eps ** 2 * 100
    rows["fused"] = rows["fused"].roll(1, 0)
    found = accuracy.embedding_report(rows, truth)
    assert not found["errors"]["passed"]
    assert found["neighbours"]["fused"]["beyond_rounding"] > 0
