"""Encoders of sound, of which only real frames are computed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tests.fusion.models import MASK, SIZES, SOUND, SOUNDS, inputs_of, model_of, perturbed, run
from tests.fusion.test_families import rows_of_products

import fusedformer

T: Any = pytest.importorskip("transformers")


ROW = torch.tensor([[True], [False], [True]])  # whose second one is padding alone


@pytest.mark.parametrize("name", sorted(SOUNDS))
def test_padding_is_not_computed(name: str) -> None:
    """Behind the features, and their projection; hidden states at padding are 0."""
    model, inputs = model_of(name).eval(), inputs_of(name)
    fusedformer.fuse(model, strict=True)
    frames = int(MASK.sum())
    of_heads = {4 * frames} if name.startswith("wavlm") else set()  # the products of gates
    assert rows_of_products(model, inputs) == {MASK.numel(), frames} | of_heads
    with torch.no_grad():
        states = model(**inputs).last_hidden_state
    assert not states[~MASK].any() and states[MASK].any(-1).all()


def test_what_asks_for_the_batch_gets_it() -> None:
    """Hidden states, hooks, no mask; a row that is all padding, and a batch of such rows."""
    model, inputs = model_of("wav2vec2").eval(), inputs_of("wav2vec2")
    stock = copy.deepcopy(model)
    fusedformer.fuse(model)
    calls: list[dict[str, Any]] = [
        {**inputs, "output_hidden_states": True},
        {"input_values": inputs["input_values"]},
        {**inputs, "attention_mask": inputs["attention_mask"] * ROW},
    ]
    with torch.no_grad():
        for call, real in zip(calls, (MASK, torch.ones_like(MASK), MASK & ROW), strict=True):
            found, wanted = model(**call), stock(**call)
            states = [(found.last_hidden_state, wanted.last_hidden_state)]
            states += zip(found.hidden_states or (), wanted.hidden_states or (), strict=True)
            for ours, theirs in states:
                assert torch.allclose(ours[real], theirs[real], atol=3e-5, rtol=1e-4)
        nothing = model.encoder(torch.randn(2, 4, 32), attention_mask=torch.zeros(2, 4).bool())
        assert not nothing.last_hidden_state.any()
    for one in (model, stock):
        one.encoder.layers[0].feed_forward.output_dense.register_forward_hook(
            lambda module, args, output: output * 2
        )
    results = run(model, inputs)
    for key, value in run(stock, inputs).items():
        scale = value.abs().max().item()
        assert torch.allclose(results[key], value, atol=2e-5 * scale + 2e-5), key


@pytest.mark.parametrize("name", ["Hubert", "WavLM"])
def test_layers_are_dropped_as_stock_drops_them(name: str) -> None:
    settings = {**SOUND, "layerdrop": 0.5, "attention_dropout": 0.0}
    config = getattr(T, f"{name}Config")(**SIZES, **settings)
    model = perturbed(getattr(T, f"{name}Model")(config), 0).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    stock, inputs = copy.deepcopy(model), inputs_of("hubert")
    fusedformer.fuse(model)
    seen = set()
    for seed in range(6):
        states = []
        for one in (model, stock):
            torch.manual_seed(seed)
            states.append(one(**inputs).last_hidden_state[MASK])
        assert torch.allclose(states[0], states[1], atol=3e-5, rtol=1e-4)
        seen.add(states[1].sum().item())
    assert len(seen) > 1


@pytest.mark.parametrize(
    ("cls", "changes", "reason"),
    [
        ("Wav2Vec2Model", {"add_adapter": True}, "Wav2Vec2Model reads padded"),
        (
            "Wav2Vec2ForXVector",
            {"tdnn_dim": [8, 8], "tdnn_kernel": [3, 2], "tdnn_dilation": [2, 1]},
            "ForXVector reads padded",
        ),
    ],
)
def test_models_that_convolve_padding_are_left_padded(
    cls: str, changes: dict[str, Any], reason: str
) -> None:
    """The report says so, and they compute what stock does."""
    config = T.Wav2Vec2Config(**SIZES, **SOUND, **changes)
    model = perturbed(getattr(T, cls)(config), 0).eval()
    stock, inputs = copy.deepcopy(model), inputs_of("wav2vec2")
    left = fusedformer.fuse(model).left
    assert len(left) == 1 and reason in left[0].reason
    with torch.no_grad():
        found, wanted = model(**inputs)[0], stock(**inputs)[0]
    assert torch.allclose(found, wanted, atol=1e-4, rtol=1e-4, equal_nan=True)


def test_a_gate_without_a_bias() -> None:
    model, inputs = model_of("wavlm").eval(), inputs_of("wavlm")
    for layer in model.encoder.layers:
        layer.attention.gru_rel_pos_linear.bias = None
    wanted = model(**inputs)[0][MASK]
    fusedformer.fuse(model)
    assert torch.allclose(model(**inputs)[0][MASK], wanted, atol=2e-5)


LENGTHS = (40, 27, 9)  # of sounds, of which layers get half


def pooled(kind: str) -> tuple[Any, dict[str, torch.Tensor]]:
    """An encoder that halves the frames behind its layers, and sounds padded to its length."""
    config = getattr(T, f"{kind}EncoderConfig")(
        d_model=32, encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=48, num_mel_bins=6,
        max_source_positions=20,
    )  # fmt: skip
    model = perturbed(getattr(T, f"{kind}Encoder")(config), 0).eval()
    features = torch.randn(3, 6, 40)
    mask = (torch.arange(40) < torch.tensor(LENGTHS)[:, None]).long()
    if kind == "AudioFlamingo3":
        return model, {"input_features": features, "input_features_mask": mask}
    frames = (torch.arange(20) < (torch.tensor(LENGTHS)[:, None] - 1) // 2 + 1)[:, None, None]
    return model, {"input_features": features, "attention_mask": frames}


def halved(model: Any, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The frames that those who read the output take, and the gradients of all parameters."""
    frames = ((torch.tensor(LENGTHS) - 1) // 2 + 1 - 2) // 2 + 1
    output = model(**inputs)
    found = output.last_hidden_state[torch.arange(10) < frames[:, None]]
    dy = torch.randn(found.shape, generator=torch.Generator().manual_seed(3)).to(found)
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(found, list(parameters.values()), dy)
    return {type(output).__name__: found, **dict(zip(parameters, grads, strict=True))}


@pytest.mark.parametrize("kind", ["Qwen2Audio", "AudioFlamingo3"])
def test_frames_that_are_halved(kind: str) -> None:
    """Of real frames alone; all of them where a layer is hooked, or without a mask."""
    model, inputs = pooled(kind)
    stock = copy.deepcopy(model)
    fusedformer.fuse(model, strict=True)
    wide = {n: x.double() if x.is_floating_point() else x for n, x in inputs.items()}
    for rows in (sum((n - 1) // 2 + 1 for n in LENGTHS), 60):
        truth = halved(copy.deepcopy(stock).double(), wide)
        wanted, found = halved(stock, inputs), halved(model, inputs)
        assert found.keys() == wanted.keys() == truth.keys()
        for name, true in truth.items():
            limit = 8 * (wanted[name] - true).abs().max() + 1e-5 * true.abs().max()
            assert (found[name] - true).abs().max() <= limit, name
        assert rows_of_products(model, inputs) == {rows}
        for one in (model, stock):
            one.layers[0].fc1.register_forward_hook(lambda module, args, output: output * 2)
    with torch.no_grad():
        whole = {"input_features": inputs["input_features"]}
        if kind == "AudioFlamingo3":
            whole["input_features_mask"] = torch.ones(3, 40).long()
        assert torch.allclose(model(**whole)[0], stock(**whole)[0], atol=3e-5, rtol=1e-4)
        states, own = (one(**inputs, output_hidden_states=True) for one in (model, stock))
        assert len(states.hidden_states) == len(own.hidden_states) == 3
    with pytest.raises((ValueError, RuntimeError), match=r"length|size"):
        model(**{n: x[..., :-2] for n, x in inputs.items()})
