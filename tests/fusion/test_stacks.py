"""Encoders that only call their layers: texts joined with images, and patches that are empty."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tests.fusion.models import IMAGE, LENGTHS, MASK, SIZES, TEXT, perturbed
from tests.fusion.test_families import near, rows_of_products, same_when_asked
from torch import Tensor

import fusedformer
from fusedformer.fusion._packed_encoder import shared_keys

T: Any = pytest.importorskip("transformers")
TOTAL = sum(LENGTHS)
PATCHES = 16
NO_DROPOUT: dict[str, Any] = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
# Images of 4 x 4 patches, 2 x 4, and 3 x 2.
SHAPES = ((4, 4), (2, 4), (3, 2))


def idefics3(kind: str = "Idefics3") -> tuple[Any, dict[str, Tensor], Tensor]:
    """The tower alone, and which patches the images have."""
    config = getattr(T, f"{kind}VisionConfig")(**IMAGE)
    model = getattr(T, f"{kind}VisionTransformer")(config)
    keep = torch.zeros(3, 4, 4, dtype=torch.bool)
    for image, (rows, columns) in enumerate(SHAPES):
        keep[image, :rows, :columns] = True
    inputs = {"pixel_values": torch.randn(3, 3, 16, 16), "patch_attention_mask": keep}
    return model, inputs, keep.flatten(1)


def texts() -> dict[str, Tensor]:
    return {"input_ids": torch.randint(3, 97, MASK.shape), "attention_mask": MASK.long()}


def vilt() -> tuple[Any, dict[str, Tensor], Tensor]:
    model = T.ViltModel(T.ViltConfig(**TEXT, **NO_DROPOUT, image_size=16, patch_size=4))
    inputs = {**texts(), "pixel_values": torch.randn(3, 3, 16, 16)}
    return model, inputs, torch.cat([MASK, torch.ones(3, PATCHES + 1, dtype=torch.bool)], 1)


def visual_bert() -> tuple[Any, dict[str, Tensor], Tensor]:
    model = T.VisualBertModel(T.VisualBertConfig(**TEXT, **NO_DROPOUT, visual_embedding_dim=12))
    mask = torch.arange(5) < torch.tensor([[5], [2], [4]])
    inputs = {
        **texts(), "visual_embeds": torch.randn(3, 5, 12), "visual_attention_mask": mask.float(),
    }  # fmt: skip
    return model, inputs, torch.cat([MASK, mask], 1)


def flava() -> tuple[Any, dict[str, Tensor], Tensor]:
    model = T.FlavaMultimodalModel(T.FlavaMultimodalConfig(**SIZES))
    keep = torch.cat([torch.ones(3, 1, dtype=torch.bool), MASK], 1)  # behind a class token
    return model, {"hidden_states": torch.randn(3, 11, 32), "attention_mask": keep.long()}, keep


CASES = {
    "idefics3": idefics3, "smolvlm": lambda: idefics3("SmolVLM"), "vilt": vilt,
    "visual-bert": visual_bert, "flava": flava,
}  # fmt: skip


def built(case: str) -> tuple[Any, dict[str, Tensor], Tensor]:
    torch.manual_seed(0)
    model, inputs, keep = CASES[case]()
    return perturbed(model), inputs, keep


def outputs_and_gradients(model: Any, inputs: Any, keep: Tensor) -> list[Tensor]:
    torch.manual_seed(2)  # ViLT draws the order of patches
    output = model(**inputs)
    found = [output.last_hidden_state[keep]]
    if output.get("pooler_output") is not None:
        found.append(output.pooler_output)
    draw = torch.Generator().manual_seed(3)
    dys = [torch.randn(x.shape, generator=draw).to(x) for x in found]
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(found, parameters, dys, allow_unused=True)
    return [*found, *(g for g in gradients if g is not None)]


@pytest.mark.parametrize("case", CASES)
def test_real_tokens_alone_are_computed(case: str) -> None:
    """With the outputs and gradients of stock, whatever stands at the others."""
    model, inputs, keep = built(case)
    stock, double = copy.deepcopy(model), copy.deepcopy(model).double()
    fusedformer.fuse(model, strict=True)
    wide = {n: x.double() if x.is_floating_point() else x for n, x in inputs.items()}
    truth = outputs_and_gradients(double, wide, keep)
    wanted = outputs_and_gradients(stock, inputs, keep)
    found = outputs_and_gradients(model, inputs, keep)
    assert len(found) == len(wanted)
    for ours, theirs, true in zip(found, wanted, truth, strict=True):
        limit = 8 * (theirs - true).abs().max() + 1e-5 * true.abs().max() + 1e-6
        assert (ours - true).abs().max() <= limit
    assert int(keep.sum()) in rows_of_products(model, inputs)
    rows = rows_of_products(model, inputs)
    assert keep.numel() not in rows
    with torch.no_grad():
        torch.manual_seed(2)
        as_tuple = model(**inputs, return_dict=False)
        assert isinstance(as_tuple, tuple) and near(as_tuple[0][keep], found[0])


@pytest.mark.parametrize("case", ["smolvlm", "visual-bert"])
def test_what_is_asked_for_besides(case: str) -> None:
    """States and weights come from the batch; so do layers that are hooked."""
    model, inputs, keep = built(case)
    model.set_attn_implementation("eager")
    stock = copy.deepcopy(model.eval())
    fusedformer.fuse(model, strict=True)
    same_when_asked(model, stock, inputs)
    for one in (model, stock):
        first = next(m for n, m in one.named_modules() if n.endswith(("self_attn", "layer.0")))
        first.register_forward_hook(lambda module, args, output: None)
        layer = next(m for n, m in one.named_modules() if n.endswith(("mlp.fc1", "output.dense")))
        layer.register_forward_hook(lambda module, args, output: 2 * output)
    with torch.no_grad():
        assert near(model(**inputs)[0][keep], stock(**inputs)[0][keep])


@pytest.mark.parametrize("kind", ["Idefics3", "SmolVLM"])
def test_a_connector_reads_every_patch(kind: str) -> None:
    """So that none is left out beside it, and nothing is missing."""
    text = dict(**SIZES, model_type="llama", vocab_size=99, pad_token_id=0)
    config = getattr(T, f"{kind}Config")(
        vision_config=IMAGE, text_config=text, scale_factor=2, image_token_id=98, pad_token_id=0
    )
    model = perturbed(getattr(T, f"{kind}Model")(config), 0).eval()
    stock = copy.deepcopy(model)
    assert not fusedformer.fuse(model, strict=True).left
    pixels = torch.randn(1, 3, 3, 16, 16)
    mask = torch.zeros(1, 3, 16, 16, dtype=torch.bool)
    for image, (rows, columns) in enumerate(SHAPES):
        mask[0, image, : 4 * rows, : 4 * columns] = True
    ids = torch.cat([torch.full((1, 12), 98), torch.randint(3, 97, (1, 5))], 1)
    given = {"input_ids": ids, "pixel_values": pixels, "pixel_attention_mask": mask}
    with torch.no_grad():
        found, wanted = model(**given), stock(**given)
    assert near(found.last_hidden_state, wanted.last_hidden_state)


def test_which_masks_are_of_keys() -> None:
    keep, least = MASK[:, None, None], torch.finfo(torch.float32).min
    added = torch.zeros(3, 1, 1, 11).masked_fill(~keep, least)
    for mask in (keep, keep.expand(3, 1, 11, 11), added, added.expand(3, 1, 11, 11)):
        found = shared_keys(mask)
        assert found is not None and torch.equal(found, MASK)
    causal = torch.ones(11, 11, dtype=torch.bool).tril()[None, None]
    others = causal, added + 0.5, -torch.rand(3, 1, 11, 11), added.expand(3, 4, 11, 11), MASK, None
    assert all(shared_keys(mask) is None for mask in others)
