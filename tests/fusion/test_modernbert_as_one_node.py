"""Fused layers of transformers' ModernBERT as one node of autograd: the bits of the steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
transformers = pytest.importorskip("transformers")

import fusedformer  # noqa: E402
from fusedformer.functional.steps import encoder_layer  # noqa: E402
from fusedformer.fusion import _one_node  # noqa: E402

LAYERS = 2  # one with attention over all, one with a window


@pytest.fixture(autouse=True)
def _triton() -> Iterator[None]:
    with fusedformer.backend("triton"):
        yield


def stock(**settings: Any) -> Any:
    config = transformers.ModernBertConfig(
        vocab_size=40, hidden_size=32, num_hidden_layers=LAYERS, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=16, local_attention=4,
        global_attn_every_n_layers=2, pad_token_id=0, **settings,
    )  # fmt: skip
    model = transformers.ModernBertModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def fused(device: str, pack: bool = True, **settings: Any) -> Any:
    model = stock(**settings).to(device)
    fusedformer.fuse(model, pack=pack)
    return model


def given(device: str) -> dict[str, Tensor]:
    ids = torch.randint(5, 40, (2, 7), device=device)
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def results(model: Any, inputs: dict[str, Tensor], one_node: bool = True) -> list[Tensor]:
    """The output and all gradients, of the same random numbers each time."""
    steps = mock.patch.object(_one_node, "encoder_layer_is_one_node", return_value=False)
    torch.manual_seed(3)
    with nullcontext() if one_node else steps:
        output = model(**inputs).last_hidden_state
    if not output.requires_grad:
        return [output]
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    grad = torch.randn(output.shape, device=output.device).to(output.dtype)
    grads = torch.autograd.grad(output, weights, grad, allow_unused=True)
    return [output.detach(), *(grad for grad in grads if grad is not None)]


def check(model: Any, inputs: dict[str, Tensor], layers: int = LAYERS) -> None:
    """One node, recorded and planned, has the bits of the steps."""
    want = results(model, inputs, one_node=False)
    for _ in range(3):
        with mock.patch.object(_one_node, "encoder_layer", side_effect=encoder_layer) as called:
            got = results(model, inputs)
        assert called.call_count == layers
        assert len(got) == len(want)
        assert all(map(torch.equal, got, want))
    assert all(one.any() and one.isfinite().all() for one in want)


@pytest.mark.parametrize("pack", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "not training"])
def test_the_bits_are_those_of_the_steps(training: bool, pack: bool, device: str) -> None:
    model = fused(device, pack, attention_dropout=0.25 if pack else 0.0)
    check(model.train(training), given(device))


def test_values_and_gradients_are_stock_transformers(device: str) -> None:
    model, inputs = stock(attention_bias=True, norm_bias=True).to(device), given(device)
    real = inputs["attention_mask"].bool()
    grad = torch.randn(2, 7, 32, device=device)
    found = []
    for _ in range(2):
        output = model(**inputs).last_hidden_state[real]
        grads = torch.autograd.grad(output, list(model.parameters()), grad[real], allow_unused=True)
        found.append([output.detach(), *(one for one in grads if one is not None)])
        fusedformer.fuse(model, pack=True)
    for want, have in zip(*found, strict=True):
        torch.testing.assert_close(have, want, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("only", [False, True], ids=["frozen", "only trained"])
@pytest.mark.parametrize("name", ["embeddings", "attn_norm", "Wqkv", "Wo", "mlp_norm", "Wi"])
def test_frozen_parameters(name: str, only: bool, device: str) -> None:
    model = fused(device, attention_bias=True, norm_bias=True)
    for key, parameter in model.named_parameters():
        parameter.requires_grad_((name in key) is only)
    check(model, given(device))


def test_under_autocast(device: str) -> None:
    model, inputs = fused(device, norm_bias=True), given(device)
    with torch.autocast(device, torch.bfloat16):
        check(model, inputs)


def test_without_gradients_a_layer_is_planned_whole(device: str) -> None:
    model, inputs = fused(device).eval(), given(device)
    want = results(model, inputs, one_node=False)[0]
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            for _ in range(3):
                assert torch.equal(results(model, inputs)[0], want)


@pytest.mark.parametrize(
    "settings",
    [{"mlp_bias": True}, {"mlp_bias": True, "mlp_dropout": 0.25}, {"hidden_activation": "silu"}],
    ids=["bias of the gated block", "and its dropout", "SwiGLU"],
)
def test_forms_of_the_gated_block(settings: dict[str, Any], device: str) -> None:
    check(fused(device, **settings), given(device))


def test_another_activation_is_computed_by_steps(device: str) -> None:
    model, inputs = fused(device, hidden_activation="tanh"), given(device)
    with mock.patch.object(_one_node, "encoder_layer", side_effect=encoder_layer) as called:
        found = results(model, inputs)
    assert called.call_count == 0
    assert all(map(torch.equal, found, results(model, inputs, one_node=False)))


def test_hooks_added_after_a_call_fire(device: str) -> None:
    model, inputs = fused(device), given(device)
    results(model, inputs)
    seen: list[Any] = []
    model.layers[1].mlp.Wi.register_forward_hook(lambda *args: seen.append(args))
    with mock.patch.object(_one_node, "encoder_layer", side_effect=encoder_layer) as called:
        results(model, inputs)
    assert len(seen) == 1
    assert called.call_count == LAYERS - 1


def test_two_backwards_and_batches_of_gradients(device: str) -> None:
    model, inputs = fused(device), given(device)
    leaves = list(model.layers.parameters())
    output = model(**inputs).last_hidden_state
    grads = torch.randn(2, *output.shape, device=output.device)
    found = torch.autograd.grad(output, leaves, grads, is_grads_batched=True, retain_graph=True)
    for index in range(2):
        for _ in range(2):
            one = torch.autograd.grad(output, leaves, grads[index], retain_graph=True)
            for have, want in zip(found, one, strict=True):
                torch.testing.assert_close(have[index], want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype, device: str) -> None:
    check(fused(device).to(dtype), given(device))
