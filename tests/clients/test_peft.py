"""LoRA by peft on fused models, beside stock's: gradients, merging, saving, checkpoints."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.fusion.models import MASK, inputs_of, model_of, run
from tests.fusion.test_families import rows_of_products
from torch import Tensor

import fusedformer

pytest.importorskip("transformers")
peft: Any = pytest.importorskip("peft", reason="peft is not installed")

TOTAL = int(MASK.sum())
# Names of products; or all of them.
TARGETS: dict[str, Any] = {
    "bert": "all-linear",
    "modernbert": ["Wqkv", "Wi"],
    "mpnet": "all-linear",
    "deberta-v3": "all-linear",
    "qwen3": ["q_proj", "v_proj", "gate_proj"],
    "t5gemma": ["q_proj", "v_proj", "down_proj"],
}
# Products of two encoders at once, some of whose own attention sees no packed sequences.
OF_TWO: dict[str, Any] = {
    "siglip": ["q_proj", "fc2"], "siglip2": ["k_proj", "fc1"], "clip": ["v_proj", "out_proj"],
    "bart": ["q_proj", "fc1"], "whisper": ["v_proj", "fc2"],
}  # fmt: skip


def adapted(model: Any, name: str) -> Any:
    torch.manual_seed(3)
    config = peft.LoraConfig(
        r=2,
        lora_alpha=4,
        target_modules={**TARGETS, **OF_TWO}[name],
        init_lora_weights=False,
    )
    return peft.get_peft_model(model, config)


def pair(name: str, fuse_first: bool = True) -> tuple[Any, Any]:
    """A model with adapters, fused before or after they were put on; and stock's."""
    model = model_of(name).train()
    stock = adapted(copy.deepcopy(model), name)
    if fuse_first:
        fusedformer.fuse(model)
    model = adapted(model, name)
    fusedformer.fuse(model)
    return model, stock


def near(found: Tensor, wanted: Tensor) -> bool:
    return torch.allclose(found, wanted, atol=2e-5 * wanted.abs().max().item() + 1e-5)


@pytest.mark.parametrize("name", TARGETS)
def test_gradients_of_adapters(name: str) -> None:
    """Those of all adapters, and no others; tokens are still packed, their order is no matter."""
    inputs = inputs_of(name)
    for fuse_first in (True, False):
        model, stock = pair(name, fuse_first)
        wanted, found = run(stock, inputs), run(model, inputs)
        assert found.keys() == wanted.keys()
        assert sum("lora_" in key for key in found) >= 8
        assert all("lora_" in key for key in found if key.startswith("grad of"))
        for key, value in wanted.items():
            assert value.any() and near(found[key], value), key
        rows = rows_of_products(model, inputs)
        assert TOTAL in rows and MASK.numel() not in rows


@pytest.mark.parametrize("name", OF_TWO)
def test_adapters_of_two_encoders(name: str) -> None:
    model, stock = pair(name)
    inputs = inputs_of(name)
    wanted, found = run(stock, inputs), run(model, inputs)
    assert found.keys() == wanted.keys()
    assert all(near(found[key], value) for key, value in wanted.items())
    assert any("grad of" in key for key in wanted)


@pytest.mark.parametrize("name", ["siglip2", "t5gemma"])
def test_layers_that_run_by_themselves_are_computed_padded(name: str) -> None:
    """With a feed-forward block of another kind, where their own forward sees nothing packed."""
    model, inputs = model_of(name).eval(), inputs_of(name)
    for path in [name for name, _ in model.named_modules()]:
        if path.endswith("layers.0.mlp"):
            model.set_submodule(path, torch.nn.Sequential(torch.nn.Linear(32, 32)))
    stock = copy.deepcopy(model)
    left = {one.path: one.reason for one in fusedformer.fuse(model).left}
    encoders = ["encoder"]
    if name == "siglip2":
        encoders = ["text_model.encoder", "vision_model.encoder"]
    for encoder in encoders:
        assert left[encoder] == "computed padded: 'layers.0' runs its own forward"
    ours, theirs = run(model, inputs), run(stock, inputs)
    assert all(near(ours[key], value) for key, value in theirs.items())


@pytest.mark.parametrize("name", TARGETS)
def test_merged_and_saved(name: str, tmp_path: Path) -> None:
    """Merged, split again, merged for good: then layers are fused steps; saved for stock."""
    (model, stock), inputs = pair(name), inputs_of(name)
    base = model_of(name).eval()
    with torch.no_grad():
        model.eval()
        wanted = stock.eval()(**inputs)[0][MASK]
        assert not near(base(**inputs)[0][MASK], wanted)
        model.merge_adapter()
        assert near(model(**inputs)[0][MASK], wanted)
        model.unmerge_adapter()
        assert near(model(**inputs)[0][MASK], wanted)
        model.save_pretrained(tmp_path)
        loaded = peft.PeftModel.from_pretrained(base, tmp_path).eval()
        assert near(loaded(**inputs)[0][MASK], wanted)
        merged = model.merge_and_unload()
        assert near(merged(**inputs)[0][MASK], wanted)
        assert not fusedformer.fuse(merged).left
        assert rows_of_products(merged, inputs) >= {TOTAL}


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable:FutureWarning")
def test_checkpoints_under_adapters_keep_packing() -> None:
    """peft hooks the embeddings for them."""
    model = model_of("bert").train()
    fusedformer.fuse(model)
    model.gradient_checkpointing_enable()
    model, inputs = adapted(model, "bert"), inputs_of("bert")
    assert model.get_input_embeddings()._forward_hooks
    stock = adapted(model_of("bert").train(), "bert")
    wanted, found = run(stock, inputs), run(model, inputs)
    assert found.keys() == wanted.keys()
    assert all(near(found[key], value) for key, value in wanted.items())
    assert MASK.numel() not in rows_of_products(model, inputs)
