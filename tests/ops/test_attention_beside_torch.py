"""Where torch's own attention can express a case, ours is the same function, on both backends."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as stock
from tests.ops.judge import grad

from fusedformer import backend
from fusedformer import functional as F
from fusedformer.testing import assert_function_parity

Shapes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
PLAIN: Shapes = ((2, 2, 20, 16), (2, 2, 30, 16), (2, 2, 30, 24))
SQUARE: Shapes = ((2, 2, 33, 16), (2, 2, 33, 16), (2, 2, 33, 16))
GROUPED: Shapes = ((2, 4, 20, 16), (2, 2, 30, 16), (2, 2, 30, 16))

CASES: dict[str, tuple[Shapes, dict[str, Any]]] = {
    "Sq != Sk, Ev != E": (PLAIN, {}),
    "causal": (SQUARE, {"is_causal": True}),
    "causal, top left": (PLAIN, {"is_causal": True}),
    "scale": (PLAIN, {"scale": 0.7}),
    "boolean mask": (PLAIN, {"attn_mask": (20, 30), "boolean": True}),
    "boolean mask of keys": (PLAIN, {"attn_mask": (2, 1, 1, 30), "boolean": True}),
    "additive mask by head": (PLAIN, {"attn_mask": (1, 2, 20, 30)}),
    "additive mask of queries": (PLAIN, {"attn_mask": (2, 1, 20, 1)}),
    "grouped heads": (GROUPED, {"enable_gqa": True}),
    "grouped heads, causal": (GROUPED, {"enable_gqa": True, "is_causal": True}),
    "2-D": (((20, 16), (30, 16), (30, 16)), {}),
    "3-D": (((3, 20, 16), (3, 30, 16), (3, 30, 16)), {"is_causal": True}),
    "5-D": (((2, 2, 2, 9, 8), (2, 2, 2, 7, 8), (2, 2, 2, 7, 8)), {}),
    "batch of keys broadcasts": (((2, 2, 20, 16), (1, 2, 30, 16), (1, 2, 30, 16)), {}),
}


@pytest.mark.parametrize("name", ["triton", "torch"])
@pytest.mark.parametrize("case", CASES)
def test_the_same_function(case: str, name: Any, device: str) -> None:
    """Outputs and gradients by the parity criterion, the truth being torch's in float64."""
    shapes, settings = CASES[case]
    settings = dict(settings)
    inputs: dict[str, Any] = {
        n: grad(*shape, device=device)
        for n, shape in zip(("query", "key", "value"), shapes, strict=True)
    }
    if "attn_mask" in settings:
        mask = torch.randn(settings.pop("attn_mask"), device=device)
        boolean = settings.pop("boolean", False)
        inputs["attn_mask"] = mask > -1 if boolean else mask.requires_grad_()
        if mask.shape[-1] == 1:  # the same for all keys: no weight changes, no gradient comes
            inputs["attn_mask"] = inputs["attn_mask"].detach()

    def ours(**arguments: Any) -> Any:
        with backend(name):
            return F.scaled_dot_product_attention(**arguments, **settings)

    def torchs(**arguments: Any) -> Any:
        return stock.scaled_dot_product_attention(**arguments, **settings)

    assert_function_parity(ours, torchs, torchs, inputs, dtype=torch.float16)
