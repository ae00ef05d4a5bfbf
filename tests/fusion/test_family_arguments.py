"""Arguments that one family of models alone has, beside stock."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tests.fusion.models import LENGTHS, MASK, inputs_of, model_of
from tests.fusion.test_families import close, rows_of_products
from torch import Tensor

import fusedformer

pytest.importorskip("transformers")
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
