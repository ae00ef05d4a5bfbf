"""Arguments that one family of models alone has, beside stock."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tests.fusion.models import IMAGE, LENGTHS, MASK, inputs_of, model_of, perturbed
from tests.fusion.test_families import close, rows_of_products
from torch import Tensor

import fusedformer

T: Any = pytest.importorskip("transformers")
TOTAL = sum(LENGTHS)

# Both chains of each protein attend to themselves; -1 is padding.
CHAINS = torch.where(MASK, (torch.arange(11) > 2).long(), -1)
CALLS: dict[str, tuple[str, dict[str, Tensor], int]] = {
    "chains of proteins": ("esmc", {"sequence_id": CHAINS}, MASK.numel()),
    "languages of sequences": ("xmod", {"lang_ids": torch.tensor([0, 1, 1])}, TOTAL),
    "languages of tokens": ("xmod", {"lang_ids": (torch.arange(33) % 2).view(3, 11)}, TOTAL),
    "padding on the left": ("chinese-clip text", {"attention_mask": MASK.flip(1)}, MASK.numel()),
    "the default language": ("xmod, norms first", {}, TOTAL),
}


@pytest.mark.parametrize("case", CALLS)
def test_beside_stock(case: str) -> None:
    name, given, rows = CALLS[case]
    model, inputs = model_of(name).eval(), {**inputs_of(name), **given}
    fused: Any = copy.deepcopy(model)
    fusedformer.fuse(fused, strict=True)
    with torch.no_grad():
        found, wanted = fused(**inputs), model(**inputs)
        assert close(found, wanted, MASK) and found[0][MASK].any()
        other = {**inputs, **{n: 1 - x if n == "lang_ids" else x * 0 for n, x in given.items()}}
        assert not given or not close(fused(**other), wanted, MASK)
    assert rows in rows_of_products(fused, inputs)


def test_patches_that_a_smaller_image_leaves_empty() -> None:
    """Idefics2's are not computed, as its connector does not read them."""
    module = T.models.idefics2.modeling_idefics2
    config = T.models.idefics2.configuration_idefics2.Idefics2VisionConfig(**IMAGE)
    model = perturbed(module.Idefics2VisionTransformer(config), 0)
    fused: Any = copy.deepcopy(model)
    fusedformer.fuse(fused, strict=True)
    rows = torch.arange(4)[:, None] < torch.tensor([4, 3, 2])[:, None, None]
    keep = rows.expand(3, 4, 4).contiguous()
    inputs = {"pixel_values": torch.randn(3, 3, 16, 16), "patch_attention_mask": keep}
    dy = torch.randn(int(keep.sum()), 32)
    found, wanted = (one(**inputs)[0][keep.flatten(1)] for one in (fused, model))
    assert torch.allclose(found, wanted, atol=3e-5, rtol=1e-4)
    ours, theirs = (
        torch.autograd.grad(x, one.encoder.layers[0].mlp.fc1.weight, dy)[0]
        for x, one in ((found, fused), (wanted, model))
    )
    assert torch.allclose(ours, theirs, atol=2e-5 * theirs.abs().max().item())
    assert rows_of_products(fused, inputs) == {len(dy)}
