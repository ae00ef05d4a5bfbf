"""The BERT encoder against transformers' own, from the same random weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fusedformer import backend, nn
from fusedformer.models import BertConfig, BertEncoderModel, mean_pooling, sentence_embeddings
from fusedformer.testing import compare_tensors

CONFIG = BertConfig(
    vocab_size=61, hidden_size=24, num_hidden_layers=2, num_attention_heads=3,
    intermediate_size=40, max_position_embeddings=19,
)  # fmt: skip
LENGTHS = (11, 1, 7)  # full, a single token, padded


@pytest.fixture
def stock() -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(**vars(CONFIG), attn_implementation="sdpa")
    model = transformers.BertModel(config, add_pooling_layer=False).eval()
    with torch.no_grad():  # biases and norms are constants when new: a mix-up would not show
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


@pytest.fixture
def inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = (len(LENGTHS), max(LENGTHS))
    mask = torch.arange(shape[1]) < torch.tensor(LENGTHS)[:, None]
    return {
        "input_ids": torch.randint(0, CONFIG.vocab_size, shape, generator=generator),
        "attention_mask": mask.long(),
        "token_type_ids": torch.randint(0, 2, shape, generator=generator),
        "position_ids": torch.arange(1, 1 + shape[1]).expand(shape),
    }


def run(model: Any, given: dict[str, torch.Tensor], names: Any) -> dict[str, torch.Tensor]:
    """Hidden states of real tokens, and the gradients by Hugging Face's names."""
    output = model(**given)
    hidden = output if isinstance(output, torch.Tensor) else output.last_hidden_state
    hidden = hidden[given["attention_mask"] != 0]
    grad = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(2)).to(hidden)
    parameters = dict(model.named_parameters())
    found = torch.autograd.grad(hidden, list(parameters.values()), grad)
    return {"hidden": hidden, **names(dict(zip(parameters, found, strict=True)))}


def faults(ours: BertEncoderModel, stock: Any, given: dict[str, torch.Tensor]) -> list[str]:
    """What the criterion finds; gradients of key biases are rounding alone, their truth is 0."""
    found = run(ours, given, ours.to_huggingface_layout)
    baseline = run(stock, given, lambda grads: grads)
    truth = run(stock.double(), given, lambda grads: grads)
    assert found.keys() == truth.keys()
    compared = [
        compare_tensors(name, found[name], baseline[name], truth[name])
        for name in truth
        if not name.endswith("key.bias")
    ]
    return [one.fault for one in compared if not one.passed]


def test_the_backend_of_this_machine_agrees_with_transformers(
    stock: Any, inputs: dict[str, torch.Tensor]
) -> None:
    ours = BertEncoderModel.from_huggingface(stock.state_dict(), CONFIG)
    assert faults(ours, stock, inputs) == []


@pytest.mark.parametrize(
    "left_out",
    [(), ("token_type_ids",), ("position_ids",), ("token_type_ids", "position_ids")],
    ids=["all given", "no token types", "no positions", "neither"],
)
def test_hidden_states_and_gradients_are_those_of_transformers(
    stock: Any, inputs: dict[str, torch.Tensor], left_out: tuple[str, ...]
) -> None:
    ours = BertEncoderModel.from_huggingface(stock.state_dict(), CONFIG)
    given = {name: tensor for name, tensor in inputs.items() if name not in left_out}
    with backend("torch"):
        assert faults(ours, stock, given) == []


@pytest.mark.parametrize(
    "fault",
    ["query and key exchanged", "another eps", "a layer twice", "mask dropped", "tanh GELU"],
)
def test_a_planted_fault_is_found(stock: Any, inputs: dict[str, torch.Tensor], fault: str) -> None:
    ours = BertEncoderModel.from_huggingface(stock.state_dict(), CONFIG)
    first: Any = ours.encoder.layers[0]
    with torch.no_grad():
        if fault == "query and key exchanged":
            query, key, value = first.self_attn.in_proj_weight.chunk(3)
            first.self_attn.in_proj_weight.copy_(torch.cat([key, query, value]))
        elif fault == "another eps":
            first.norm1.eps = 1e-5
        elif fault == "a layer twice":
            ours.encoder.layers[1].load_state_dict(first.state_dict())
        elif fault == "tanh GELU":
            first.activation = torch.nn.GELU("tanh")
    if fault == "mask dropped":
        forward = ours.encoder.forward
        ours.encoder.forward = lambda src, *args, **masks: forward(src)  # type: ignore[method-assign]
    with backend("torch"):
        assert faults(ours, stock, inputs)


def test_weights_go_both_ways_bit_for_bit(stock: Any) -> None:
    theirs = stock.state_dict()
    ours = BertEncoderModel.from_huggingface(theirs, CONFIG)
    back = ours.to_huggingface_state_dict()
    parameters = dict(stock.named_parameters())
    assert back.keys() == parameters.keys()
    assert all(torch.equal(back[name], theirs[name]) for name in back)
    assert BertEncoderModel(CONFIG).load_huggingface_state_dict(back) == []


def test_parts_that_are_not_ours_are_named() -> None:
    theirs = BertEncoderModel(CONFIG).to_huggingface_state_dict()
    whole = {f"bert.{name}": tensor for name, tensor in theirs.items()}
    whole |= {"bert.pooler.dense.bias": torch.zeros(24), "bert.embeddings.position_ids":
              torch.arange(19), "cls.predictions.bias": torch.zeros(61)}  # fmt: skip
    left = BertEncoderModel(CONFIG).load_huggingface_state_dict(whole)
    assert left == ["pooler.dense.bias", "cls.predictions.bias"]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"encoder.layer.1.output.dense.bias": None}, KeyError, "layer.1.output.dense.bias"),
        ({"encoder.layer.2.output.dense.bias": torch.zeros(24)}, ValueError, "layer.2"),
        ({"embeddings.word_embeddings.weight": torch.zeros(61, 25)}, ValueError, r"61, 25"),
        ({"encoder.layer.0.attention.self.key.bias": torch.zeros(1)}, ValueError, "key.bias"),
    ],
    ids=["missing", "one layer too many", "another width", "a part of another size"],
)
def test_a_wrong_state_dict_changes_nothing(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = BertEncoderModel(CONFIG)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wrong = {**BertEncoderModel(CONFIG).to_huggingface_state_dict(), **change}
    with pytest.raises(error, match=message):
        model.load_huggingface_state_dict({n: t for n, t in wrong.items() if t is not None})
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_dropouts_are_berts() -> None:
    config = BertConfig(**{**vars(CONFIG), "attention_probs_dropout_prob": 0.3})
    for layer in BertEncoderModel(config).encoder.layers:
        assert isinstance(layer, nn.TransformerEncoderLayer)
        assert layer.self_attn.dropout == 0.3
        assert (layer.dropout.p, layer.dropout1.p, layer.dropout2.p) == (0.0, 0.1, 0.1)


def test_initialization_is_berts() -> None:
    torch.manual_seed(0)
    model = BertEncoderModel(BertConfig(vocab_size=997, hidden_size=96, num_hidden_layers=1,
                                        num_attention_heads=4, intermediate_size=64))  # fmt: skip
    assert not model.embeddings.word.weight[0].any()
    weights = torch.cat([p.flatten() for p in model.parameters() if p.dim() == 2])
    # Standard error of a deviation over n draws: sigma / sqrt(2 n).
    assert abs(weights.std().item() - 0.02) < 6 * 0.02 / (2 * weights.numel()) ** 0.5 + 2e-5
    assert torch.equal(model.encoder.layers[0].norm1.weight, torch.ones(96))
    assert not model.encoder.layers[0].self_attn.in_proj_bias.any()


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"input_ids": torch.zeros(3, dtype=torch.int64)}, ValueError),
        ({"input_ids": torch.zeros(1, 3)}, TypeError),
        ({"input_ids": torch.zeros(1, 20, dtype=torch.int64)}, ValueError),
        ({"input_ids": torch.zeros(1, 3, dtype=torch.int64),
          "attention_mask": torch.ones(1, 4)}, ValueError),
    ],
    ids=["one dimension", "floating-point ids", "too long", "mask of another length"],
)  # fmt: skip
def test_bad_input(given: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match="BertEncoderModel"):
        BertEncoderModel(CONFIG)(**given)


@pytest.mark.parametrize(
    "change",
    [{"hidden_size": 25}, {"vocab_size": 0}, {"hidden_dropout_prob": 1.1}, {"hidden_act": "mish"}],
    ids=lambda change: next(iter(change)),
)
def test_bad_config(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="BertConfig"):
        BertConfig(**{**vars(CONFIG), **change})


def test_config_of_relative_positions_is_refused() -> None:
    with pytest.raises(ValueError, match="position_embedding_type"):
        BertConfig.from_huggingface({"position_embedding_type": "relative_key"})


def test_mean_pooling_sees_real_tokens_only() -> None:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(3, 5, 4, generator=generator)
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 0, 0], [0, 0, 0, 0, 0]])
    poisoned = hidden.masked_fill((mask == 0)[..., None], torch.nan)
    pooled = mean_pooling(poisoned, mask)
    torch.testing.assert_close(pooled[1], hidden[1, 1:3].mean(0))
    torch.testing.assert_close(pooled[0], mean_pooling(hidden)[0])
    assert not pooled[2].any()
    assert mean_pooling(hidden.bfloat16(), mask).dtype == torch.float32
    with pytest.raises(ValueError, match="attention_mask"):
        mean_pooling(hidden, mask[:, :4])


def test_sentence_embeddings_have_length_one() -> None:
    hidden = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(sentence_embeddings(hidden).norm(dim=-1), torch.ones(3))


@pytest.mark.parametrize("name", ["triton", "torch"])
def test_embeddings_are_packed(inputs: dict[str, torch.Tensor], name: Any, device: str) -> None:
    """Nothing padded is embedded, and neither the ids nor the table's row of padding matter."""
    model = BertEncoderModel(CONFIG).to(device).eval()
    given = {key: tensor.to(device) for key, tensor in inputs.items()}
    seen: list[torch.Size] = []
    with backend(name), torch.no_grad():
        model.embeddings.norm.bias.normal_()
        packed = model(**given)
        handle = model.embeddings.word.register_forward_hook(lambda *a: seen.append(a[2].shape))
        composed = model(**given)
        assert seen == [torch.Size([sum(LENGTHS), CONFIG.hidden_size])]
        handle.remove()
        hook = model.embeddings.register_forward_hook(lambda *a: seen.append(a[2].shape))
        padded = model(**given)
        assert seen[1] == (*inputs["input_ids"].shape, CONFIG.hidden_size)
        hook.remove()
    for other in (composed, padded):
        assert torch.allclose(packed, other, atol=1e-5)


def test_output_rows(inputs: dict[str, torch.Tensor]) -> None:
    model = BertEncoderModel(CONFIG).eval()
    masked = torch.rand(inputs["input_ids"].shape) < 0.5
    columns = torch.zeros(len(LENGTHS), 1, dtype=torch.int64)
    for left_out in ("", "attention_mask"):
        given = {key: tensor for key, tensor in inputs.items() if key != left_out}
        whole = model(**given)
        assert torch.allclose(model(**given, output_rows=masked), whole[masked], atol=1e-5)
        assert torch.allclose(model(**given, output_rows=columns), whole[:, :1], atol=1e-5)
    with pytest.raises(IndexError, match="'output_rows'"):
        model(**inputs, output_rows=columns + 11)
