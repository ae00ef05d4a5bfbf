"""WavLM and LayoutLMv3, whose layers add biases of their own to their scores."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tests.fusion.models import (
    LAYOUT,
    MASK,
    SIZES,
    SOUND,
    TEXT,
    inputs_of,
    model_of,
    perturbed,
    run,
)
from tests.fusion.test_families import HOLE, rows_of_products, same_when_asked
from tests.fusion.test_huggingface import faults
from torch import Tensor

import fusedformer
from fusedformer import backend

T: Any = pytest.importorskip("transformers")

PIXELS = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(3))
BOTH = {"has_spatial_attention_bias": True, "has_relative_attention_bias": True}
NONE = dict.fromkeys(BOTH, False)


def near(found: Tensor, wanted: Tensor) -> bool:
    return found.shape == wanted.shape and torch.allclose(found, wanted, atol=5e-5, rtol=1e-4)


def layout_model(**settings: Any) -> Any:
    torch.manual_seed(0)
    return perturbed(T.LayoutLMv3Model(T.LayoutLMv3Config(**TEXT, **LAYOUT, **settings))).eval()


@pytest.mark.parametrize("settings", [BOTH, {**BOTH, "has_spatial_attention_bias": False}, NONE])
def test_texts_and_images(settings: dict[str, Any]) -> None:
    """With pixels behind the padding, a mask with a hole or padded on the left, or none."""
    model, inputs = layout_model(**settings), inputs_of("layoutlmv3")
    fused = copy.deepcopy(model)
    fusedformer.fuse(fused, strict=True)
    seen = torch.cat((MASK, torch.ones(3, 5, dtype=torch.bool)), 1)
    whole = torch.ones_like(MASK)
    with torch.no_grad():
        for mask, pixels in ((MASK, True), (HOLE, False), (MASK.flip(1), False), (whole, False)):
            call = {**inputs, "attention_mask": mask.long()}
            call |= {"pixel_values": PIXELS} if pixels else {}
            real = seen if pixels else mask
            found, wanted = fused(**call)[0], model(**call)[0]
            assert near(found[real], wanted[real])
            assert not found[~real].any()
            if mask is not whole:
                assert rows_of_products(fused, call) == {int(real.sum())}
        many = {n: x.repeat(32, *[1] * (x.dim() - 1)) for n, x in inputs.items()}
        mask = MASK.repeat(32, 1)
        assert near(fused(**many)[0][mask], model(**many)[0][mask])
        mixed = (torch.rand(3, 11, 11) < 0.8) | torch.eye(11, dtype=torch.bool)
        added = torch.zeros(mixed.shape).masked_fill(~mixed, torch.finfo(torch.float32).min)
        call = {**inputs, "attention_mask": added[:, None]}  # not one mask of keys
        assert near(fused(**call)[0], model(**call)[0])
        assert 33 in rows_of_products(fused, call)


def test_what_needs_the_batch_gets_it() -> None:
    """Outputs of layers, and hooks inside them, of which the report tells."""
    model, inputs = layout_model(**BOTH), inputs_of("layoutlmv3")
    fused = copy.deepcopy(model)
    fusedformer.fuse(fused, strict=True)
    asked = {"output_hidden_states": True, "output_attentions": True}
    with torch.no_grad():
        wanted, found = model(**inputs, **asked), fused(**inputs, **asked)
        for kind in ("hidden_states", "attentions"):
            assert len(found[kind]) == len(wanted[kind]) > 1
            for ours, theirs in zip(found[kind], wanted[kind], strict=True):
                theirs, ours = (x.transpose(1, -2)[MASK] for x in (theirs, ours))
                assert near(ours, theirs)
        before = model(**inputs)[0]
        for one in (model, fused):
            one.encoder.layer[1].intermediate.register_forward_hook(lambda *given: 2 * given[2])
        assert near(fused(**inputs)[0][MASK], model(**inputs)[0][MASK])
        assert not near(model(**inputs)[0][MASK], before[MASK])
    left = fusedformer.fuse(model).left
    assert {one.path for one in left} == {"encoder", "encoder.layer.1"}
    assert all("hook" in one.reason for one in left)


def test_a_head_on_layoutlmv3() -> None:
    torch.manual_seed(0)
    config = T.LayoutLMv3Config(**TEXT, **LAYOUT, **BOTH, hidden_dropout_prob=0.0)
    model = perturbed(T.LayoutLMv3ForTokenClassification(config)).eval()
    twin, inputs = copy.deepcopy(model), {**inputs_of("layoutlmv3"), "pixel_values": PIXELS}
    fusedformer.fuse(model, strict=True)
    assert faults(model, twin, inputs) == []


HOOKED = ["attention.gru_rel_pos_linear", "attention.rel_attn_embed", "feed_forward.output_dense"]


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("path", HOOKED)
def test_layers_of_both_kinds_hand_biases_on(path: str, layer: int) -> None:
    """A layer of WavLM with a hook runs by its own forward, between fused ones."""
    torch.manual_seed(0)
    sizes = {**SIZES, **SOUND, "num_hidden_layers": 3, "num_buckets": 8, "max_bucket_distance": 6}
    model, inputs = perturbed(T.WavLMModel(T.WavLMConfig(**sizes)).eval()), inputs_of("wavlm")
    where = f"encoder.layers.{layer}.{path}"
    if "embed" in path and layer:  # the first layer has the table
        return
    fused = copy.deepcopy(model)
    fusedformer.fuse(fused, strict=True)
    before = model(**inputs)[0]
    for one in (model, fused):
        one.get_submodule(where).register_forward_hook(lambda *given: 2 * given[2])
    found, wanted = run(fused, inputs), run(model, inputs)
    assert not near(wanted["last_hidden_state"], before)
    for key, value in wanted.items():
        scale = value.abs().max().item()
        assert torch.allclose(found[key], value, atol=2e-5 * scale + 2e-5), key
    left = [one.path for one in fusedformer.fuse(model).left]
    assert left == ["encoder", f"encoder.layers.{layer}"]


def test_what_wavlm_goes_on_doing() -> None:
    """Checkpointed, and asked for states and weights."""
    model, inputs = model_of("wavlm, norms first").eval(), inputs_of("wavlm")
    twin = copy.deepcopy(model)
    fusedformer.fuse(model, strict=True)
    same_when_asked(model, twin, inputs)
    plain = run(model.train(), inputs)
    model.gradient_checkpointing_enable()
    again = run(model, inputs)
    assert plain.keys() == again.keys()
    assert all(torch.allclose(plain[n], again[n], atol=1e-5) for n in plain)
    assert near(again["last_hidden_state"], run(twin.train(), inputs)["last_hidden_state"])


def test_distances_of_frames_count_what_a_mask_hides() -> None:
    """Masks with a hole, padded on the left, of whole rows."""
    model = model_of("wavlm").eval()
    encoder, twin = model.encoder, copy.deepcopy(model).encoder
    fusedformer.fuse(model, strict=True)
    frames = torch.randn(3, 11, 32)
    with torch.no_grad():
        for mask in (MASK, HOLE, MASK.flip(1), torch.ones_like(MASK)):
            wanted = twin(frames.clone(), attention_mask=mask)[0]
            found = encoder(frames.clone(), attention_mask=mask)[0]
            assert near(found[mask], wanted[mask]) and not found[~mask].any()


def test_frames_of_static_shapes(device: str) -> None:
    """On the kernels, which alone pack them: a mask with a hole."""
    model = model_of("wavlm").eval().to(device)
    encoder, twin = model.encoder, copy.deepcopy(model).encoder
    fusedformer.fuse(model, strict=True)
    encoder.static_shapes = True
    mask, frames = HOLE.to(device), torch.randn(3, 11, 32, device=device)
    with torch.no_grad(), backend("triton"):
        found = encoder(frames.clone(), attention_mask=mask)[0]
        wanted = twin(frames.clone(), attention_mask=mask)[0]
    assert near(found[mask], wanted[mask]) and not found[~mask].any()


@pytest.mark.parametrize("change", ["gates", "table", "gradient"])
def test_faults_of_gates_are_seen(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = model_of("wavlm").train(), inputs_of("wavlm")
    twin = copy.deepcopy(model)
    fusedformer.fuse(model, strict=True)
    varlen_attention = fusedformer.functional.varlen_attention

    def faulty(*args: Any, **given: Any) -> Any:
        gate, table = given["relative_bias_gate"], given["relative_bias"]
        if change == "gradient":
            given["relative_bias_gate"] = gate.detach() + 1.02 * (gate - gate.detach())
        elif change == "table":
            given["relative_bias"] = table.flip(1)
        else:
            given["relative_bias_gate"] = gate.flip(1)
        return varlen_attention(*args, **given)

    monkeypatch.setattr(fusedformer.functional, "varlen_attention", faulty)
    assert faults(model, twin, inputs)
