"""BERT's heads and losses against transformers' own, from the same random weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.models.judge import faults_of, perturbed
from torch import Tensor

from fusedformer import backend, nn
from fusedformer.models import BertConfig, BertEncoderModel
from fusedformer.objectives import mask_tokens

CONFIG = BertConfig(
    vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
    intermediate_size=48, max_position_embeddings=19,
)  # fmt: skip
LENGTHS = (11, 1, 7)
MASK = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]


@pytest.fixture(scope="module")
def stock() -> Any:
    return stock_of(2)


def stock_of(layers: int) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {**vars(CONFIG), "num_hidden_layers": layers}
    config = transformers.BertConfig(**sizes, attn_implementation="sdpa")
    return perturbed(transformers.BertForPreTraining(config).eval())


def inputs(seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, CONFIG.vocab_size, MASK.shape, generator=generator)
    ids, labels = mask_tokens(ids, 3, CONFIG.vocab_size, ~MASK, 0.4, generator)
    return {
        "input_ids": ids, "labels": labels, "attention_mask": MASK.long(),
        "token_type_ids": torch.randint(0, 2, ids.shape, generator=generator),
        "next_sentence_label": torch.tensor([1, 0, 1]),
    }  # fmt: skip


def loss_of_ours(model: Any, seed: int) -> Tensor:
    loss: Tensor = model.loss(**inputs(seed))
    return loss


def loss_of_theirs(model: Any, seed: int) -> Tensor:
    loss: Tensor = model(**inputs(seed)).loss
    return loss


def ours_of(stock: Any) -> BertEncoderModel:
    config = stock.config.to_dict()
    return BertEncoderModel.from_huggingface(stock.state_dict(), config, heads=["mlm", "nsp"])


@pytest.mark.parametrize(
    ("name", "layers"),
    [("torch", 2), pytest.param("triton", 1, marks=pytest.mark.interpreter)],
)
def test_loss_and_all_gradients_are_those_of_transformers(name: Any, layers: int) -> None:
    stock = stock_of(layers)
    found = faults_of(ours_of(stock), loss_of_ours, stock, loss_of_theirs, name)
    assert found == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype: torch.dtype) -> None:
    stock = stock_of(2).to(dtype)
    assert faults_of(ours_of(stock), loss_of_ours, stock, loss_of_theirs) == []


@pytest.mark.parametrize("fault", ["a label lost", "first tokens shifted", "another activation"])
def test_a_planted_fault_is_found(stock: Any, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = ours_of(stock)
    assert ours.mlm is not None and ours.nsp is not None
    lost = fault == "a label lost"
    if fault == "first tokens shifted":
        monkeypatch.setattr(ours, "_pool", lambda rows, pool=ours._pool: pool(rows.roll(1, 0)))
    elif fault == "another activation":
        ours.mlm.activation = "relu"

    def loss(model: Any, seed: int) -> Tensor:
        given = inputs(seed)
        labels = given["labels"].clone()
        if lost:
            labels.flatten()[labels.argmax()] = -100
        found: Tensor = model.loss(**{**given, "labels": labels})
        return found

    assert faults_of(ours, loss, stock, loss_of_theirs)


def test_losses_of_one_head_each(stock: Any) -> None:
    """Their sum is the loss of both; logits are those of transformers."""
    given = inputs()
    labels = given.pop("labels"), given.pop("next_sentence_label")
    with torch.no_grad(), backend("torch"):
        ours = ours_of(stock)
        both = ours.loss(labels=labels[0], next_sentence_label=labels[1], **given)
        one = ours.loss(labels=labels[0], **given)
        other = ours.loss(next_sentence_label=labels[1], **given)
        torch.testing.assert_close(one + other, both)
        ours.encoder.static_shapes = True
        static = ours.loss(labels=labels[0], next_sentence_label=labels[1], **given)
        torch.testing.assert_close(static, both)
        ours.encoder.static_shapes = False
        theirs = stock(**given)
        logits = ours.masked_lm_logits(ours(**given))[MASK]
        torch.testing.assert_close(logits, theirs.prediction_logits[MASK])
        assert ours.nsp is not None
        torch.testing.assert_close(ours.nsp(ours.pooled(**given)), theirs.seq_relationship_logits)


def test_only_masked_positions_and_first_tokens_meet_the_last_feed_forward(
    stock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []
    norm = nn.LayerNorm.forward
    layer = nn.TransformerEncoderLayer._post_norm

    def layer_of(self: Any, *args: Any) -> Tensor:
        output = layer(self, *args)
        rows.append(output.shape[0])
        return output

    def norm_of(self: Any, x: Tensor) -> Tensor:
        rows.append(x.shape[0])
        return norm(self, x)

    monkeypatch.setattr(nn.TransformerEncoderLayer, "_post_norm", layer_of)
    monkeypatch.setattr(nn.LayerNorm, "forward", norm_of)
    given = inputs()
    with backend("torch"):
        ours_of(stock).loss(**given)
    wanted = given["labels"] != -100
    wanted[:, 0] = True
    count = int(wanted.sum())
    # Two layers and the norm of the head.
    assert rows == [sum(LENGTHS), count, count] and count < sum(LENGTHS)


def test_weights_go_both_ways_bit_for_bit(stock: Any) -> None:
    theirs = stock.state_dict()
    back = ours_of(stock).to_huggingface_state_dict()
    assert back.keys() == theirs.keys()
    assert all(torch.equal(back[name], theirs[name]) for name in back)
    ours = BertEncoderModel(CONFIG, heads=["pooler"])
    left = ours.load_huggingface_state_dict(theirs)
    assert {name.split(".")[0] for name in left} == {"cls"}
    assert "pooler.dense.bias" in ours.to_huggingface_state_dict()


def test_an_untied_decoder_is_refused(stock: Any) -> None:
    theirs = dict(stock.state_dict())
    theirs["cls.predictions.decoder.weight"] = theirs["cls.predictions.decoder.weight"] + 1
    with pytest.raises(ValueError, match=r"decoder\.weight is not tied"):
        ours_of(stock).load_huggingface_state_dict(theirs)


def test_bad_input() -> None:
    model = BertEncoderModel(CONFIG)
    ids = torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="'heads'"):
        BertEncoderModel(CONFIG, heads=["lm"])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="head 'mlm'"):
        model.loss(ids, ids)
    with backend("torch"), pytest.raises(ValueError, match="head 'pooler'"):
        model.pooled(ids)
    with pytest.raises(ValueError, match="'labels' or"):
        model.loss(ids)
    with pytest.raises(ValueError, match="'labels' to have shape"):
        model.loss(ids, ids[:, :2])
