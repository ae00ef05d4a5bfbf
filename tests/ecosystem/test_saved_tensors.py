"""Hooks on saved tensors may give them back with other strides: torch promises no more than size.

Offloading to memory or disk, compression: ``torch.autograd.graph.saved_tensors_hooks``.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.bad_arguments import good_leaves
from torch import Tensor

from fusedformer import backend, functional

FORMS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in functional.__all__ if name not in ("pack", "unpack")),
    ("dropout_add_layer_norm", {"p": 0.25, "return_sum": True}),
    ("scaled_dot_product_attention", {"return_lse": True}),
    ("scaled_dot_product_attention", {"return_weights": "averaged"}),
]

# The torch backend is torch's function there, with torch's own backward; of norms of this size.
STOCK = ("cross_entropy", "dropout_add_layer_norm", "embedding_layer_norm", "layer_norm")


def with_other_strides(kept: Tensor) -> Tensor:
    """The same values by columns."""
    if kept.dim() < 2:
        return kept.clone()
    return kept.transpose(0, -1).contiguous().transpose(0, -1)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("name", ["torch", "triton"])
@pytest.mark.parametrize(("function", "settings"), FORMS)
def test_other_strides_give_the_same_gradients(
    function: str, settings: dict[str, Any], name: Any
) -> None:
    if name == "torch" and function in STOCK:
        pytest.skip("torch's own gradients are wrong then, or raise: findings/")
    arguments, leaves = good_leaves(function)

    def run(hooks: Any) -> list[Tensor]:
        torch.manual_seed(2)
        with backend(name), hooks:
            found = getattr(functional, function)(**{**arguments, **settings})
        outputs = found if isinstance(found, tuple) else (found,)
        grads = [torch.randn_like(each) for each in outputs]
        found = torch.autograd.grad(outputs, leaves, grads, allow_unused=True)
        return [grad for grad in found if grad is not None]

    hooks = torch.autograd.graph.saved_tensors_hooks(lambda kept: kept, with_other_strides)
    plain = torch.autograd.graph.saved_tensors_hooks(lambda kept: kept, lambda kept: kept)
    want, got = run(plain), run(hooks)
    assert want
    for have, wanted in zip(got, want, strict=True):
        torch.testing.assert_close(have, wanted)
