"""CLIP against transformers' own, from the same random weights."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from tests.models.judge import faults_of, perturbed
from torch import Tensor

from fusedformer import backend
from fusedformer.models import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

SIZES: dict[str, Any] = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
)
EOS = 60
CONFIG = CLIPConfig(
    CLIPTextConfig(**SIZES, vocab_size=61, max_position_embeddings=12, eos_token_id=EOS),
    CLIPVisionConfig(**{**SIZES, "hidden_size": 24}, image_size=12, patch_size=4),
    projection_dim=16,
)
LENGTHS = (9, 2, 6)
MASK = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]


@pytest.fixture(scope="module")
def stock() -> Any:
    return stock_of(2)


def stock_of(layers: int) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = dataclasses.asdict(CONFIG)
    for tower in ("text_config", "vision_config"):
        config[tower] |= {"attn_implementation": "sdpa", "num_hidden_layers": layers}
    config["text_config"] |= {"bos_token_id": 0, "pad_token_id": 1}
    return perturbed(transformers.CLIPModel(transformers.CLIPConfig(**config)).eval())


def inputs(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Padding is the token that ends a text once more, as CLIP's tokenizer pads."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, EOS, MASK.shape, generator=generator)
    ids[torch.arange(9) >= torch.tensor(LENGTHS)[:, None] - 1] = EOS
    pixels = torch.randn(3, 3, 12, 12, generator=generator)
    return {"input_ids": ids, "attention_mask": MASK.long(), "pixel_values": pixels.to(dtype)}


def ours_of(stock: Any) -> CLIPModel:
    return CLIPModel.from_huggingface(stock.state_dict(), stock.config.to_dict())


def loss_of_ours(model: Any, seed: int) -> Tensor:
    loss: Tensor = model.loss(**inputs(seed, model.logit_scale.dtype))
    return loss


def stocks(model: Any, seed: int) -> Any:
    return model(**inputs(seed, model.logit_scale.dtype), return_loss=True)


def loss_of_theirs(model: Any, seed: int) -> Tensor:
    loss: Tensor = stocks(model, seed).loss
    return loss


@pytest.mark.parametrize("masked", [True, False], ids=["mask", "no mask"])
def test_logits_and_all_gradients_are_those_of_transformers(stock: Any, masked: bool) -> None:
    def ours(model: Any, seed: int) -> Tensor:
        given = inputs(seed)
        if not masked:
            del given["attention_mask"]
        logits: Tensor = model(**given)
        return logits

    def theirs(model: Any, seed: int) -> Tensor:
        logits: Tensor = stocks(model, seed).logits_per_text
        return logits

    assert faults_of(ours_of(stock), ours, stock, theirs) == []


@pytest.mark.parametrize(
    ("name", "layers"),
    [("torch", 2), pytest.param("triton", 1, marks=pytest.mark.interpreter)],
)
def test_loss_and_all_gradients_are_those_of_transformers(name: Any, layers: int) -> None:
    stock = stock_of(layers)
    assert faults_of(ours_of(stock), loss_of_ours, stock, loss_of_theirs, name) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype: torch.dtype) -> None:
    stock = stock_of(2).to(dtype)
    assert faults_of(ours_of(stock), loss_of_ours, stock, loss_of_theirs) == []


@pytest.mark.parametrize("fault", ["exact GELU", "not causal", "another end", "no first norm"])
def test_a_planted_fault_is_found(stock: Any, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = ours_of(stock)
    if fault == "exact GELU":
        for layer in ours.image.encoder.layers:
            layer.activation = torch.nn.GELU()
    elif fault == "not causal":
        ours.text._is_causal = False  # type: ignore[misc]
    elif fault == "another end":
        monkeypatch.setattr(ours.text, "_ends", lambda ids, ends=ours.text._ends: ends(ids) - 1)
    else:
        ours.image.embeddings.norm.eps = 1e-2
    assert faults_of(ours, loss_of_ours, stock, loss_of_theirs)


def test_old_configurations_end_a_text_at_its_largest_id(stock: Any) -> None:
    text = dataclasses.replace(CONFIG.text_config, eos_token_id=2)
    given = inputs(1)
    with backend("torch"), torch.no_grad():
        wanted = ours_of(stock)(**given)
        old = CLIPModel(dataclasses.replace(CONFIG, text_config=text)).eval()
        old.load_state_dict(ours_of(stock).state_dict())
        assert torch.equal(old(**given), wanted)


def test_tokens_behind_the_end_are_not_computed(stock: Any) -> None:
    ours = ours_of(stock)
    rows: list[int] = []
    with backend("torch"), torch.no_grad():
        given = inputs(1)
        ours.text.embeddings.token.register_forward_hook(
            lambda module, args, out: rows.append(out.shape[0])
        )
        ours.text_features(given["input_ids"])
    assert rows == [sum(LENGTHS)]


def test_weights_go_both_ways_bit_for_bit(stock: Any) -> None:
    given = stock.state_dict()
    back = ours_of(stock).to_huggingface_state_dict()
    assert back.keys() == given.keys()
    assert all(torch.equal(back[name], given[name]) for name in back)
    old = {**given, "text_model.embeddings.position_ids": torch.arange(12)}
    assert CLIPModel(CONFIG).load_huggingface_state_dict(old) == []
    assert CLIPConfig.from_huggingface(stock.config.to_dict()) == CONFIG


def test_initialization_is_clips() -> None:
    torch.manual_seed(0)
    text = CLIPTextConfig(**{**SIZES, "hidden_size": 96, "intermediate_size": 384})
    model = CLIPModel(dataclasses.replace(CONFIG, text_config=text))
    layer: Any = model.text.encoder.layers[0]
    wanted = {
        layer.self_attn.in_proj_weight: 96**-0.5 / 2, layer.linear1.weight: 192**-0.5,
        layer.linear2.weight: 96**-0.5 / 2, model.text_projection.weight: 96**-0.5,
        model.text.embeddings.token.weight: 0.02,
    }  # fmt: skip
    for weight, deviation in wanted.items():
        # Standard error of a deviation over n draws: sigma / sqrt(2 n).
        error = abs(weight.std().item() - deviation)
        assert error < 6 * deviation / (2 * weight.numel()) ** 0.5
    assert model.logit_scale.item() == pytest.approx(2.6592)


def test_bad_input(stock: Any) -> None:
    with pytest.raises(ValueError, match="'patch_size' to divide"):
        CLIPVisionConfig(patch_size=5)
    with pytest.raises(ValueError, match="12 positions"):
        ours_of(stock).text_features(torch.zeros(1, 13, dtype=torch.int64))
    with pytest.raises(ValueError, match="'pixel_values' of shape"):
        ours_of(stock).image_features(torch.zeros(1, 3, 12, 13))
