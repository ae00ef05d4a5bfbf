"""What models do whose forward is written here: states, compiling, hooks of gradients, masks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tests.fusion.models import MASK, inputs_of, model_of, run
from tests.fusion.test_families import close, rows_of_products

import fusedformer

pytest.importorskip("transformers")

COMPOSED = ["mpnet", "megatron-bert", "rembert", "splinter", "roformer", "deberta", "deberta-v2"]
TOTAL = int(MASK.sum())


@pytest.mark.parametrize("name", COMPOSED)
def test_hidden_states(name: str) -> None:
    """Those of stock, from packed rows; zeros at padding."""
    model, inputs = model_of(name).eval(), inputs_of(name)
    asked: dict[str, Any] = {**inputs, "output_hidden_states": True}
    with torch.no_grad():
        wanted, plain = model(**asked), model(**asked, return_dict=False)
        fusedformer.fuse(model, strict=True)
        found, ours = model(**asked), model(**asked, return_dict=False)
        assert rows_of_products(model, asked) >= {TOTAL}
    assert MASK.numel() not in rows_of_products(model, asked)
    assert type(found) is type(wanted) and list(found) == list(wanted)
    assert len(found.hidden_states) == len(wanted.hidden_states) == 3
    for got, want in zip(found.hidden_states, wanted.hidden_states, strict=True):
        assert torch.allclose(got[MASK], want[MASK], atol=3e-5, rtol=1e-4)
        assert got[MASK].any() and not got[~MASK].any()
    assert len(ours) == len(plain) and len(ours[-1]) == 3
    assert torch.equal(ours[-1][-1], found.hidden_states[-1])


@pytest.mark.parametrize("name", COMPOSED)
def test_states_have_the_gradients_of_what_follows_them(name: str) -> None:
    """As attribution and losses of layers want them; packed, and with nothing to pack."""
    model, inputs = model_of(name).eval(), inputs_of(name)
    whole = {**inputs, "attention_mask": torch.ones_like(inputs["attention_mask"])}

    def gradients(given: dict[str, Any]) -> list[torch.Tensor]:
        output = model(**given, output_hidden_states=True)
        last = output.last_hidden_state
        grad = torch.randn(last.shape, generator=torch.Generator().manual_seed(1))
        grad = grad * given["attention_mask"][..., None]
        return [*torch.autograd.grad(last, output.hidden_states, grad)]

    wanted = [gradients(inputs), gradients(whole)]
    asked: dict[str, Any] = {**inputs, "output_hidden_states": True}
    fusedformer.fuse(model, strict=True)
    assert rows_of_products(model, asked) >= {TOTAL}
    for given, stock in zip((inputs, whole), wanted, strict=True):
        keep = given["attention_mask"].bool()
        for got, want in zip(gradients(given), stock, strict=True):
            limit = 2e-5 * want.abs().max().item()
            assert torch.allclose(got[keep], want[keep], atol=limit, rtol=1e-4)


@pytest.mark.parametrize("name", ["bert", "mpnet", "deberta-v2", "llama"])
def test_a_mask_of_one_row_is_that_of_each_row(name: str) -> None:
    model, inputs = model_of(name).eval(), inputs_of(name)
    given = {**inputs, "attention_mask": torch.ones(1, MASK.shape[1], dtype=torch.long)}
    with torch.no_grad():
        wanted = model(**given)[0]
        fusedformer.fuse(model)
        assert torch.allclose(model(**given)[0], wanted, atol=3e-5, rtol=1e-4)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("learns", [False, True])
def test_parameters_that_do_not_fit_are_refused(learns: bool, backend: Any) -> None:
    """Put in place of those that a layer had, after calls of it; not read past their ends."""
    model, inputs = model_of("bert").eval(), inputs_of("bert")
    fusedformer.fuse(model)
    layer = model.encoder.layer[1]
    with fusedformer.backend(backend), torch.set_grad_enabled(learns):
        model(**inputs)
        for module in (layer.output.LayerNorm, layer.intermediate.dense, layer.attention.self.key):
            for name in ("weight", "bias"):
                kept = getattr(module, name)
                setattr(module, name, torch.nn.Parameter(kept[..., :-3].detach().clone()))
                with pytest.raises(RuntimeError):
                    model(**inputs)
                setattr(module, name, kept)
        model(**inputs)


@pytest.mark.parametrize("name", ["mpnet", "deberta"])
def test_compiled_as_one_graph(name: str) -> None:
    model, inputs = model_of(name).eval(), inputs_of(name)
    with torch.no_grad():
        wanted = model(**inputs)
        fusedformer.fuse(model)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert close(compiled(**inputs), wanted, MASK)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("name", ["megatron-bert", "deberta", "gte"])
def test_checkpoints_and_gradients_of_embeddings_keep_packing(name: str) -> None:
    """For both, transformers hooks the embeddings; the hook changes no value."""
    model, inputs = model_of(name).train(), inputs_of(name)
    fusedformer.fuse(model)
    plain = run(model, inputs)
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    again = run(model, inputs)
    assert plain.keys() == again.keys()
    assert all(torch.allclose(plain[n], again[n], atol=1e-5) for n in plain)
    assert rows_of_products(model, inputs) >= {TOTAL}
    assert MASK.numel() not in rows_of_products(model, inputs)
    model.requires_grad_(False)
    assert model(**inputs)[0].requires_grad


@pytest.mark.parametrize("name", ["mpnet", "splinter", "align text"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32], ids=str)
def test_masks_of_pairs_are_added_as_stock_adds_them(name: str, dtype: torch.dtype) -> None:
    """These models add a mask of four dimensions to the scores: True is 1, and hides nothing."""
    model, inputs = model_of(name).eval(), inputs_of(name)
    fused = copy.deepcopy(model)
    fusedformer.fuse(fused)
    keep = torch.rand(len(MASK), 1, 11, 11) < 0.6
    mask = torch.where(keep, 0.0, -1e4) if dtype.is_floating_point else keep.to(dtype)
    with torch.no_grad():
        found, wanted = (one(**{**inputs, "attention_mask": mask})[0] for one in (fused, model))
        plain = model(inputs["input_ids"])[0]
    assert torch.allclose(found, wanted, atol=3e-5, rtol=1e-4)
    assert not torch.allclose(found, plain, atol=1e-2)
