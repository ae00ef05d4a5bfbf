"""Encoders of sequence-to-sequence models, alone and beside their decoders."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tests.fusion.models import BART, LENGTHS, MASK, perturbed, run
from tests.fusion.test_families import rows_of_products, same_when_asked
from tests.fusion.test_huggingface import faults
from torch import Tensor

import fusedformer

T: Any = pytest.importorskip("transformers")
KINDS = "Bart", "PLBart", "MBart", "Blenderbot", "BlenderbotSmall", "Marian", "Pegasus", "M2M100"
SIZES: dict[str, Any] = dict(
    BART, dropout=0.0, attention_dropout=0.0, activation_dropout=0.0, scale_embedding=True,
    pad_token_id=1, decoder_start_token_id=2, bos_token_id=0, eos_token_id=2,
    forced_eos_token_id=None,
)  # fmt: skip
TOTAL = sum(LENGTHS)


def model_of(kind: str, **settings: Any) -> Any:
    config = getattr(T, f"{kind}Config")(**{**SIZES, "encoder_layerdrop": 0.0, **settings})
    name = {"Marian": "MarianMTModel"}.get(kind, f"{kind}ForConditionalGeneration")
    return perturbed(getattr(T, name)(config), 0)


def texts(mask: Tensor) -> dict[str, Tensor]:
    ids = torch.randint(3, 97, mask.shape, generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids.where(mask, 1), "attention_mask": mask.long()}


@pytest.mark.parametrize("kind", KINDS)
def test_encoders_beside_stock(kind: str) -> None:
    """Outputs and gradients; padding on the left, embedded texts, all padding, states asked for."""
    model = model_of(kind).get_encoder()
    fused: Any = copy.deepcopy(model)
    fusedformer.fuse(fused, strict=True)
    given = texts(MASK)
    assert faults(fused.train(), model.train(), given) == []
    assert rows_of_products(fused, given) == {TOTAL}
    embedded = torch.randn(*MASK.shape, 32)
    with torch.no_grad():
        for mask in (MASK.flip(1), MASK & (torch.arange(11) != 2)):
            for call in (texts(mask), {"inputs_embeds": embedded, "attention_mask": mask.long()}):
                found, wanted = (one(**call, return_dict=False)[0] for one in (fused, model))
                assert torch.allclose(found[mask], wanted[mask], atol=3e-5, rtol=1e-4)
                assert found[mask].any() and not found[~mask].any()
                assert rows_of_products(fused, call) == {int(mask.sum())}
        assert not fused(**texts(MASK & False))[0].any()
        whole = {"input_ids": given["input_ids"]}
        assert torch.allclose(fused(**whole)[0], model(**whole)[0], atol=3e-5, rtol=1e-4)
        for one in (fused, model):
            one.set_attn_implementation("eager")
        fusedformer.fuse(fused)
        same_when_asked(fused, model, given)


def test_layers_are_dropped_as_stock_drops_them() -> None:
    model = model_of("MBart", encoder_layerdrop=0.5, encoder_layers=5).get_encoder().train()
    fused: Any = copy.deepcopy(model)
    fusedformer.fuse(fused, strict=True)
    found = []
    for one in (fused, model):
        torch.manual_seed(3)
        found.append(run(one, texts(MASK)))
    assert found[0].keys() == found[1].keys()
    for name, wanted in found[1].items():
        assert torch.allclose(found[0][name], wanted, atol=2e-5 * wanted.abs().max().item() + 2e-5)


def test_texts_are_generated_as_before() -> None:
    model = model_of("M2M100").eval()
    fused: Any = copy.deepcopy(model)
    report = fusedformer.fuse(fused)
    assert any(one.after.startswith("packed") for one in report.replaced)
    given, settings = texts(MASK), {"max_new_tokens": 5, "num_beams": 2}
    assert torch.equal(fused.generate(**given, **settings), model.generate(**given, **settings))
