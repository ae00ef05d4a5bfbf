"""Towers whose images or sounds are rows of one sequence, one behind another."""

from __future__ import annotations

import copy
import dataclasses
import importlib
from typing import Any
from unittest import mock

import pytest
import torch
from tests.fusion.models import perturbed
from tests.fusion.test_families import are_seen, near
from tests.fusion.test_huggingface import faults
from torch import Tensor, nn

import fusedformer
from fusedformer import functional
from fusedformer.fusion import _attention, _forms, _layers
from fusedformer.fusion._seen import SEEN

pytest.importorskip("transformers")

SIZES = dict(hidden_size=32, num_heads=4, intermediate_size=48, depth=2, patch_size=4)
QWEN: dict[str, Any] = dict(SIZES, out_hidden_size=32, temporal_patch_size=1, in_channels=3)
QWEN2_5: dict[str, Any] = dict(QWEN, window_size=16, fullatt_block_indexes=[1])
CLIP: dict[str, Any] = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, patch_size=4,
)  # fmt: skip
SOUND: dict[str, Any] = dict(
    d_model=32, encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=48, num_mel_bins=8,
    n_window=50, n_window_infer=100, downsample_hidden_size=4, output_dim=32,
    max_source_positions=60,
)  # fmt: skip
# The module, and the names of its model and configuration.
KINDS: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "qwen2.5-vl": (
        "qwen2_5_vl", "Qwen2_5_VisionTransformerPretrainedModel", "Qwen2_5_VLVisionConfig", QWEN2_5,
    ),
    "exaone 4.5": (
        "exaone4_5", "Exaone4_5_VisionModel", "Exaone4_5_VisionConfig",
        dict(QWEN2_5, num_key_value_heads=2),
    ),
    "qwen3-vl": (
        "qwen3_vl", "Qwen3VLVisionModel", "Qwen3VLVisionConfig",
        dict(QWEN, deepstack_visual_indexes=[0], num_position_embeddings=16),
    ),
    "videollama 3": ("video_llama_3", "VideoLlama3VisionModel", "VideoLlama3VisionConfig", CLIP),
    "paddleocr": (
        "paddleocr_vl", "PaddleOCRVisionModel", "PaddleOCRVisionConfig", dict(CLIP, image_size=16),
    ),
    "qwen3-asr": ("qwen3_asr", "Qwen3ASREncoder", "Qwen3ASREncoderConfig", SOUND),
}  # fmt: skip
GRIDS = torch.tensor([[1, 4, 4], [1, 4, 8], [1, 2, 4]])  # three images, windows of 4 x 4 patches


def tower(kind: str) -> tuple[Any, dict[str, Tensor]]:
    name, cls, config, settings = KINDS[kind]
    modeling = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    torch.manual_seed(0)
    model = perturbed(getattr(modeling, cls)(vars(modeling)[config](**settings)))
    draw = torch.Generator().manual_seed(1)
    total = int(GRIDS.prod(1).sum())
    if kind == "qwen3-asr":
        mask = (torch.arange(200) < torch.tensor([[200], [120], [90]])).long()
        features = torch.randn(3, 8, 200, generator=draw)
        return model, {"input_features": features, "input_features_mask": mask}
    rows = torch.randn(total, 48, generator=draw)
    if kind == "paddleocr":
        return model, {"pixel_values": rows.view(1, total, 3, 4, 4), "grid_thw": GRIDS}
    if kind == "videollama 3":
        merges = torch.ones(3, dtype=torch.long)
        return model, {"pixel_values": rows, "grid_thw": GRIDS, "merge_sizes": merges}
    return model, {"hidden_states": rows, "grid_thw": GRIDS}


@pytest.mark.parametrize("kind", KINDS)
def test_sequences_are_attended_to_at_once(kind: str) -> None:
    """Outputs and all gradients; one call of attention a layer, where stock has one an image."""
    model, inputs = tower(kind)
    twin = copy.deepcopy(model)
    report = fusedformer.fuse(model, strict=True)
    assert sum("fused steps" in one.after for one in report.replaced) == 2
    assert faults(model, twin, inputs) == []
    with mock.patch.object(functional, "scaled_dot_product_attention") as one_by_one:
        model(**inputs)
        with torch.no_grad():
            assert near(model(**inputs)[0], twin(**inputs)[0])
    assert not one_by_one.called
    weights = model(**inputs, output_attentions=True).attentions
    assert len(weights) == 2 and one_by_one.call_count == 0


@pytest.mark.parametrize("kind", ["qwen2.5-vl", "exaone 4.5"])
def test_on_the_kernels(kind: str, device: str) -> None:
    model, inputs = tower(kind)
    inputs = {n: x.to(device) for n, x in inputs.items()}
    twin = copy.deepcopy(model.to(device))
    fusedformer.fuse(model, strict=True)
    assert faults(model, twin, inputs, "triton") == []


@pytest.mark.parametrize(
    ("kind", "fault"),
    [
        ("qwen2.5-vl", {"gate": "mlp.up_proj", "linear1": "mlp.gate_proj"}),
        ("qwen3-vl", {"rotary": None}),
        ("paddleocr", {"norm1": "layer_norm2", "norm2": "layer_norm1"}),
        ("qwen3-asr", {"scaling": "head_dim"}),
    ],
)
def test_faults_in_the_table_are_seen(kind: str, fault: dict[str, Any]) -> None:
    model, inputs = tower(kind)
    twin = copy.deepcopy(model)
    fusedformer.fuse(model)
    cls: Any = next(type(m) for m in model.modules() if isinstance(m, _layers.FusedLayer))
    wrong = dataclasses.replace(cls._form, **fault)
    with (
        mock.patch.object(cls, "_form", wrong),
        mock.patch.object(cls, "_finder", _forms.Finder(wrong)),
    ):
        assert are_seen(model, twin, inputs)
    for module in model.modules():
        module.__dict__.pop(SEEN, None)
    assert not are_seen(model, twin, inputs)


def test_one_image_an_empty_one_and_half_precision() -> None:
    """Bounds of one sequence, and of one without rows; bfloat16."""
    model, _ = tower("qwen2.5-vl")
    twin = copy.deepcopy(model)
    fusedformer.fuse(model, strict=True)
    block, stock = model.blocks[0], twin.blocks[0]
    for bounds in ([0, 7], [0, 3, 10], [0, 0, 4]):
        total = bounds[-1]
        angles = torch.randn(total, 4).repeat(1, 2)
        given = {
            "cu_seqlens": torch.tensor(bounds, dtype=torch.int32),
            "position_embeddings": (angles.cos(), angles.sin()),
        }
        x = torch.randn(total, 32)
        if bounds[1]:  # else stock can't
            assert near(block(x, **given), stock(x, **given))
        told = dict(given, max_seqlen=max(1, total))
        assert torch.equal(block(x, **told), block(x, **given))
    half, wide = copy.deepcopy(model).bfloat16(), model
    inputs = tower("qwen2.5-vl")[1]
    found = half(inputs["hidden_states"].bfloat16(), GRIDS)[0]
    assert found.dtype == torch.bfloat16
    wanted = wide(**inputs)[0]
    assert (found - wanted).abs().max() < 0.05 * wanted.abs().max()


def test_what_is_hooked_runs_by_itself() -> None:
    model, inputs = tower("qwen3-vl")
    twin = copy.deepcopy(model)
    fusedformer.fuse(model)
    for one in (model, twin):
        one.blocks[0].attn.qkv.register_forward_hook(lambda module, args, output: 2 * output)
    assert near(model(**inputs)[0], twin(**inputs)[0])
    with mock.patch.object(_attention, "scaled_attention", return_value=None):
        assert near(model(**inputs)[0], twin(**inputs)[0])
    assert isinstance(model.blocks[0].attn.qkv, nn.Linear)
