"""Fused layers of transformers' BERT and its kin as one node of autograd: the bits of the steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
transformers = pytest.importorskip("transformers")

import fusedformer  # noqa: E402
from fusedformer.functional.steps import encoder_layer  # noqa: E402
from fusedformer.fusion import _one_node  # noqa: E402

SIZES: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 48, "max_position_embeddings": 16,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _triton() -> Iterator[None]:
    """On one thread: products of several may have other last bits from one run to the next."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with fusedformer.backend("triton"):
        yield
    torch.set_num_threads(threads)


def models() -> Iterator[tuple[str, Any]]:
    t = transformers
    yield "bert", lambda: t.BertModel(t.BertConfig(**SIZES))
    yield "albert", lambda: t.AlbertModel(t.AlbertConfig(**SIZES, embedding_size=16))
    yield (
        "distilbert",
        lambda: t.DistilBertModel(
            t.DistilBertConfig(vocab_size=40, dim=32, n_layers=2, n_heads=2, hidden_dim=48)
        ),
    )


def other_forms() -> Iterator[tuple[str, bool, Any]]:
    """Norms first; a gate of its own; rotary embedding; RMS norms. One layer of each."""
    t, sizes = transformers, {**SIZES, "num_hidden_layers": 1}
    rotary = {"position_embedding_type": "rotary", "pad_token_id": 1, "mask_token_id": 2}
    yield (
        "roberta-prelayernorm", True,
        lambda: t.RobertaPreLayerNormModel(t.RobertaPreLayerNormConfig(**sizes)),
    )  # fmt: skip
    yield "gte", True, lambda: t.GteModel(t.GteConfig(**sizes, hidden_dropout_prob=0.2))
    yield "esm", False, lambda: t.EsmModel(t.EsmConfig(**sizes, **rotary))
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "mask_token_id": 3}
    yield "eurobert", True, lambda: t.EuroBertModel(t.EuroBertConfig(**sizes, **tokens))


@pytest.mark.parametrize(("name", "pack", "make"), list(other_forms()))
def test_other_forms_have_the_bits_of_their_steps(
    name: str, pack: bool, make: Any, device: str
) -> None:
    check(make(), pack, True, device)


@pytest.mark.parametrize("pack", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "not training"])
@pytest.mark.parametrize(("name", "make"), list(models()))
def test_the_bits_are_those_of_the_steps(
    name: str, make: Any, training: bool, pack: bool, device: str
) -> None:
    check(make(), pack, training, device)


def check(model: Any, pack: bool, training: bool, device: str) -> None:
    model = fusedformer_of(model, pack, training).to(device)
    ids = torch.randint(5, 40, (2, 7), device=device)
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    weights = list(model.parameters())

    def run(one_node: bool) -> list[Tensor]:
        steps = mock.patch.object(_one_node, "encoder_layer_is_one_node", return_value=False)
        torch.manual_seed(3)
        with nullcontext() if one_node else steps:
            output = model(ids, attention_mask=mask).last_hidden_state
        grads = torch.autograd.grad(output, weights, torch.randn_like(output), allow_unused=True)
        return [output.detach(), *(grad for grad in grads if grad is not None)]

    want = run(False)
    with mock.patch.object(_one_node, "encoder_layer", side_effect=encoder_layer) as called:
        for _ in range(2):
            assert all(map(torch.equal, run(True), want))
    assert called.call_count == 2 * model.config.num_hidden_layers
    assert all(one.any() for one in want[:1])


def fusedformer_of(model: Any, pack: bool, training: bool) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    fusedformer.fuse(model, pack=pack)
    return model.train(training)
