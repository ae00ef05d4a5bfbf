"""Images and sound whose tokens attend within windows, fused."""

from __future__ import annotations

import copy
from typing import Any
from unittest import mock

import pytest
import torch
from tests.fusion.models import (
    WINDOWED,
    WINDOWS,
    inputs_of,
    model_of,
    perturbed,
)
from tests.fusion.test_huggingface import faults
from torch import Tensor

import fusedformer

T: Any = pytest.importorskip("transformers")


@pytest.mark.parametrize("name", sorted(WINDOWED))
def test_masks_of_windows_are_not_expanded_over_images(name: str) -> None:
    """Nor are their gradients; and windows of one image are not copied."""
    model = model_of(name)
    fusedformer.fuse(model)
    seen: list[tuple[Tensor, Tensor]] = []
    own = fusedformer.functional.scaled_dot_product_attention

    def spy(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, **settings: Any) -> Any:
        seen.append((q, mask))
        return own(q, k, v, mask, **settings)

    pixels = inputs_of(name)["pixel_values"]
    with mock.patch.object(fusedformer.functional, "scaled_dot_product_attention", spy):
        for images in (pixels, pixels[:1]):
            model(images)
    sizes = [mask.untyped_storage().nbytes() for _, mask in seen]
    half = len(seen) // 2
    assert half >= 3 and sizes[:half] == sizes[half:]
    assert len({*sizes}) > 1  # shifted or not
    for i, (q, mask) in enumerate(seen):
        assert mask.untyped_storage().nbytes() == 4 * mask.numel()
        assert q.shape[2] == mask.shape[2]
        assert mask.shape[0] == 1 or (i >= half and mask.shape[0] == q.shape[0])


def test_windows_on_the_kernels(device: str) -> None:
    """Two images, four windows, shifted or not; a bias with a gradient."""
    sizes = {**WINDOWS, "image_size": 16, "window_size": 2, "depths": [2], "num_heads": [1]}
    model = perturbed(T.Swinv2Model(T.Swinv2Config(**sizes)), 0)
    inputs = {"pixel_values": torch.randn(2, 3, 16, 16, device=device)}
    twin = copy.deepcopy(model.to(device))
    fusedformer.fuse(model, strict=True)
    assert faults(model, twin, inputs, "triton") == []


def test_windows_of_sound() -> None:
    """CLAP's tower, in evaluation mode, as its batch norm counts batches."""
    config = T.ClapAudioConfig(
        spec_size=64, num_mel_bins=16, num_classes=3, patch_size=4, patch_stride=[4, 4],
        window_size=4, hidden_size=64, patch_embeds_hidden_size=16, depths=[2, 1, 1],
        num_attention_heads=[2, 4, 4], num_hidden_layers=3, mlp_ratio=1.5, drop_path_rate=0.0,
    )  # fmt: skip
    model = perturbed(T.ClapAudioModel(config), 0).eval()
    twin, inputs = copy.deepcopy(model), {"input_features": torch.randn(2, 1, 64, 16)}
    report = fusedformer.fuse(model, strict=True)
    assert sum("within windows" in one.after for one in report.replaced) == 4
    assert faults(model, twin, inputs) == []
