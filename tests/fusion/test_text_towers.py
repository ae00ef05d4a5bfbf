"""Towers of text in dual encoders: which token each pools, and that only real ones are computed."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any
from unittest import mock

import pytest
import torch
from tests.fusion.models import LENGTHS, MASK, SIZES, perturbed
from tests.fusion.test_families import rows_of_products, same_when_asked
from torch import Tensor

import fusedformer
from fusedformer.fusion import _ends

T: Any = pytest.importorskip("transformers")
TOTAL = sum(LENGTHS)
# Kinds of models, the id that their configuration says is the end, and that of their tokens.
KINDS: dict[str, tuple[str, int, int]] = {
    "clip": ("CLIPText", 60, 60),
    "clip, the first": ("CLIPText", 2, 98),
    "clipseg": ("CLIPSegText", 60, 60),
    "x-clip": ("XCLIPText", 60, 98),
    "metaclip 2": ("MetaClip2Text", 2, 2),
    "owlvit": ("OwlViTText", 60, 98),
    "owlv2": ("Owlv2Text", 60, 98),
    "siglip": ("SiglipText", 60, 60),
    "siglip 2": ("Siglip2Text", 60, 60),
    "aimv2": ("Aimv2Text", 98, 98),
    "tipsv2": ("Tipsv2Text", 60, 60),
}
MASKS = {
    "right": MASK, "left": MASK.flip(1), "no token": MASK & torch.tensor([[True], [False], [True]]),
    "an end that is padding": MASK & (torch.arange(11) != 6),
}  # fmt: skip


def tower(case: str) -> tuple[Any, Tensor]:
    """A small model and ids, whose padding has the id of the end, as CLIP's tokenizer pads."""
    kind, said, last = KINDS[case]
    sizes = dict(SIZES, vocab_size=99, max_position_embeddings=11)
    config = getattr(T, f"{kind}Config")(
        **sizes, bos_token_id=0, pad_token_id=1, eos_token_id=said, attention_dropout=0.0
    )
    model = perturbed(getattr(T, f"{kind}Model")(config), 0)
    ids = torch.randint(61, 97, MASK.shape).where(MASK, last)
    ids[range(3), [n - 1 for n in LENGTHS]] = last
    return model, ids


@pytest.mark.parametrize("case", KINDS)
def test_pooled_as_stock_pools(case: str) -> None:
    """Whatever is padding; the rows of products are the real tokens, and those that are pooled."""
    model, ids = tower(case)
    fused = copy.deepcopy(model)
    fusedformer.fuse(fused, strict=True)
    for side, mask in MASKS.items():
        given = {"input_ids": ids, "attention_mask": mask.long()}
        with torch.no_grad():
            wanted, found = model(**given), fused(**given)
            pooled = mask[:, 0] | (side == "an end that is padding")  # else it may see nothing
            assert torch.allclose(
                found.pooler_output[pooled], wanted.pooler_output[pooled], atol=3e-5, rtol=1e-4
            ), side
            assert torch.allclose(found[0][mask], wanted[0][mask], atol=3e-5, rtol=1e-4)
            assert found[0][mask].any() and not found[0][~mask].any()
            assert (found[0] + found[1].sum()).isfinite().all()
        if side == "right":
            more = 2 if "siglip" in case else 0
            assert rows_of_products(fused, given) == {TOTAL + more}


@pytest.mark.parametrize("fault", [{"end": _ends.last}, {"is_causal": False}])
def test_faults_in_the_table_of_towers_are_seen(fault: dict[str, Any]) -> None:
    model, ids = tower("clip")
    given = {"input_ids": ids, "attention_mask": MASK.long()}
    fused: Any = copy.deepcopy(model)
    fusedformer.fuse(fused)
    right = type(fused)._model
    wrong = dataclasses.replace(right, tower=dataclasses.replace(right.tower, **fault))
    with torch.no_grad(), mock.patch.object(type(fused), "_model", wrong):
        assert not torch.allclose(fused(**given)[1], model(**given)[1], atol=1e-3)


def test_what_is_asked_for_besides() -> None:
    """States and weights come from a padded batch; texts that are too long are refused."""
    model, ids = tower("clip")
    model.set_attn_implementation("eager")
    fused: Any = copy.deepcopy(model)
    fusedformer.fuse(fused, strict=True)
    given = {"input_ids": ids, "attention_mask": MASK.long()}
    with torch.no_grad():
        same_when_asked(fused, model, given)
        found, wanted = (one(**given, return_dict=False) for one in (fused, model))
        assert isinstance(found, tuple) and torch.allclose(found[1], wanted[1], atol=3e-5)
    with pytest.raises(ValueError, match="max_position_embeddings"):
        fused(**{name: x.repeat(1, 2) for name, x in given.items()})
