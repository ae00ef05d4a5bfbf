"""Models of transformers that are made of others, and the configurations that their parts share."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tests.fusion.models import (
    IMAGE,
    LENGTHS,
    MASK,
    TEXT,
    TOKENS,
    inputs_of,
    model_of,
    perturbed,
    run,
)
from tests.fusion.test_after_fuse import BERT, same

import fusedformer
from fusedformer import backend

T: Any = pytest.importorskip("transformers")


def encoder_decoder(fuse_part: bool) -> Any:
    encoder = perturbed(T.BertModel(T.BertConfig(**BERT)), 1)
    decoder = perturbed(
        T.BertLMHeadModel(T.BertConfig(**BERT, is_decoder=True, add_cross_attention=True)), 2
    )
    if fuse_part:
        fusedformer.fuse(encoder)
    return T.EncoderDecoderModel(encoder=encoder, decoder=decoder).eval()


def dual_encoder(fuse_part: bool) -> Any:
    vision = perturbed(T.ViTModel(T.ViTConfig(**IMAGE)), 1)
    text = perturbed(T.BertModel(T.BertConfig(**BERT)), 2)
    if fuse_part:
        fusedformer.fuse(text)
    return T.VisionTextDualEncoderModel(vision_model=vision, text_model=text).eval()


@pytest.mark.parametrize("fuse_part", [False, True])
@pytest.mark.parametrize("made", [encoder_decoder, dual_encoder])
def test_models_of_models(made: Any, fuse_part: bool) -> None:
    """Whose parts have other configurations than their layers: fused whole, or one part before."""
    torch.manual_seed(3)
    stock = made(False)
    torch.manual_seed(3)
    model = made(fuse_part)
    if not fuse_part:
        fusedformer.fuse(model)
    inputs = inputs_of("bart" if made is encoder_decoder else "clip")
    with torch.no_grad():
        wanted, found = stock(**inputs), model(**inputs)
        for name in ("logits", "logits_per_text"):
            if name in wanted:
                assert torch.allclose(found[name], wanted[name], atol=1e-4)
        fusedformer.unfuse(model)
        assert torch.equal(model(**inputs)[0], wanted[0])
    assert all(
        "fusedformer" not in str(getattr(m, "config", None) and m.config._attn_implementation)
        for m in model.modules()
    )


def test_a_second_model_of_the_configuration_is_left_alone() -> None:
    config = T.BertConfig(**BERT)
    fused, other = perturbed(T.BertModel(config)).eval(), perturbed(T.BertModel(config)).eval()
    inputs = inputs_of("bert")
    with torch.no_grad():
        wanted = other(**inputs)[0]
        fusedformer.fuse(fused)
        assert config._attn_implementation == other.config._attn_implementation == "sdpa"
        assert torch.equal(other(**inputs)[0], wanted)
    assert fused.config is fused.encoder.config is fused.encoder.layer[0].attention.self.config
    fused.config.use_cache = False
    fusedformer.unfuse(fused)
    assert fused.config is config and config.use_cache is False


def test_what_each_part_attended_by_comes_back() -> None:
    config = T.CLIPConfig(
        text_config={**TEXT, **TOKENS}, vision_config=IMAGE,
        attn_implementation={"text_config": "eager", "vision_config": "sdpa"}, **TOKENS,
    )  # fmt: skip
    model = T.CLIPModel(config).eval()
    names = [m.config._attn_implementation for m in model.modules() if hasattr(m, "config")]
    assert {"eager", "sdpa"} <= {*names}
    for _ in range(2):
        fusedformer.fuse(model)
        assert model.text_model.config is model.config.text_config
        assert fusedformer.unfuse(model) > 0
        again = [m.config._attn_implementation for m in model.modules() if hasattr(m, "config")]
        assert again == names and model.config is config


def test_attention_chosen_after_fuse_is_used() -> None:
    """And the encoder then is given the batch, since other attention does not know sequences."""
    model, inputs = model_of("bert").eval(), inputs_of("bert")
    with torch.no_grad():
        wanted = model(**inputs)
        fusedformer.fuse(model)
        for name in ("eager", "sdpa", "fusedformer"):
            model.set_attn_implementation(name)
            found = model(**inputs)
            assert same(found, wanted)
            assert bool(found[0][~MASK].any()) == (name != "fusedformer")


class Around(T.PreTrainedModel):  # type: ignore[misc]
    """A user's own model, which says nothing of attention, around one of transformers."""

    config_class = T.BertConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.backbone = T.AutoModel.from_config(config)
        self.post_init()

    def forward(self, **inputs: Any) -> Any:
        return self.backbone(**inputs)


def test_a_model_within_one_that_takes_no_attention_is_fused() -> None:
    model, inputs = perturbed(Around(T.BertConfig(**BERT))).eval(), inputs_of("bert")
    with torch.no_grad():
        wanted = model(**inputs)
        report = fusedformer.fuse(model, strict=True)
        assert any(one.path == "backbone.encoder" for one in report.replaced)
        found = model(**inputs)
        assert same(found, wanted) and not found[0][~MASK].any()
        fusedformer.unfuse(model)
        assert torch.equal(model(**inputs)[0], wanted[0])


def test_gradients_through_a_model_of_models() -> None:
    torch.manual_seed(3)
    stock = encoder_decoder(False)
    model = copy.deepcopy(stock)
    fusedformer.fuse(model)
    inputs = inputs_of("bart")
    wanted, found = run(stock, inputs), run(model, inputs)
    names = [n for n in wanted if n.startswith("grad") and not n.endswith("key.bias")]
    assert len(names) > 40 and LENGTHS
    for name in names:
        scale = wanted[name].abs().max().item()
        assert torch.allclose(found[name], wanted[name], atol=1e-4 * scale + 1e-6), name


def test_an_encoder_of_its_own_arguments_generates() -> None:
    """All that a tokenizer returns may be given."""
    model = encoder_decoder(False)
    inputs = {**inputs_of("bert"), "token_type_ids": (inputs_of("bert")["input_ids"] % 2)}
    settings = dict(max_new_tokens=4, do_sample=False, decoder_start_token_id=97, pad_token_id=1)
    wanted = model.generate(**inputs, **settings)
    fusedformer.fuse(model)
    with backend("torch"):
        assert torch.equal(model.generate(**inputs, **settings), wanted)
