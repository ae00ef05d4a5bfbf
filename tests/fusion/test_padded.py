"""Models whose layers or attention are fused, but which compute padding: they are reported."""

from __future__ import annotations

from typing import Any

import pytest
from tests.fusion.models import IMAGE, SIZES, SOUND, TEXT, TOKENS, WHISPER, model_of

import fusedformer
from fusedformer.fusion import is_fused

T: Any = pytest.importorskip("transformers")


def tableless() -> Any:
    """Sound, whose layers are fused."""
    return T.SEWModel(T.SEWConfig(**SIZES, **SOUND, squeeze_factor=2))


def formless() -> Any:
    """Attention and norms alone are fused."""
    return T.GraniteMoeSharedModel(T.GraniteMoeSharedConfig(**TEXT, **TOKENS))


def with_text_of_no_form() -> Any:
    """A packed tower of text beside one that is not, in a model of both."""
    config = T.AyaVisionConfig(
        vision_config=dict(IMAGE, model_type="siglip_vision_model"),
        text_config=dict(**TEXT, **TOKENS, model_type="granitemoeshared"),
    )
    return T.AyaVisionModel(config)


CASES = {
    "tableless": (tableless, "", "no table says how it packs"),
    "formless": (formless, "", "its layers have no form"),
    "with_text_of_no_form": (with_text_of_no_form, "language_model", "its layers have no form"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_computed_padded_is_told(case: str) -> None:
    """Once, with the reason; ``strict`` refuses it, and who asked for it is told nothing."""
    build, path, reason = CASES[case]
    model = build()
    with pytest.raises(ValueError, match=f"strict=True(.|\n)*computed padded: {reason}"):
        fusedformer.fuse(model, strict=True)
    assert not is_fused(model)
    for _ in range(2):  # again when it is fused already
        left = fusedformer.fuse(model).left
        padded = [(one.path, one.reason) for one in left if one.reason.startswith("computed")]
        assert padded == [(path, f"computed padded: {reason}")]
    fusedformer.unfuse(model)
    left = fusedformer.fuse(model, pack=False).left
    assert not any("padded" in one.reason for one in left)


@pytest.mark.parametrize("name", ["vit", "siglip", "whisper", "bart", "t5", "swin", "wavlm"])
def test_what_has_nothing_to_pack_is_not(name: str) -> None:
    """Images of one size, sound of one length, what packs, and a decoder beside an encoder."""
    assert not fusedformer.fuse(model_of(name), strict=True).left


def test_an_encoder_of_sound_alone() -> None:
    """Whisper's takes a mask that it does not read."""
    model = T.models.whisper.modeling_whisper.WhisperEncoder(T.WhisperConfig(**WHISPER))
    assert not fusedformer.fuse(model, strict=True).left


def test_one_reason_is_enough() -> None:
    """A model whose padding is read says so, and not that it is padded."""
    left = fusedformer.fuse(T.BertForQuestionAnswering(T.BertConfig(**TEXT))).left
    assert len(left) == 1 and "reads padded positions" in left[0].reason
    with_cache = T.LlamaForCausalLM(T.LlamaConfig(**SIZES, vocab_size=99, pad_token_id=0))
    assert len(fusedformer.fuse(with_cache).left) == 1
