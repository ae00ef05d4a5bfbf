"""TransformerEncoderLayer beside torch's of the same name, fused and as a composition."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fusedformer import nn
from fusedformer.nn.children import fused_activation

D, H, FF, N, S = 16, 2, 24, 2, 6

causal = torch.nn.Transformer.generate_square_subsequent_mask(S)
padding = torch.arange(S) >= torch.tensor([[S], [4]])


class Case(NamedTuple):
    """One way to construct and to call it."""

    reason: str
    make: dict[str, Any] = {}  # noqa: RUF012 (never changed)
    call: dict[str, Any] = {}  # noqa: RUF012


CASES = [
    Case("post-norm, sequence first, relu: torch's defaults", {"activation": "relu"}),
    Case("pre-norm, relu by name", {"activation": "relu", "norm_first": True}),
    Case("post-norm, padded", {"batch_first": True}, {"src_key_padding_mask": padding}),
    Case("pre-norm", {"norm_first": True}, {"src_key_padding_mask": padding}),
    Case("pre-norm, batch first", {"norm_first": True, "batch_first": True}),
    Case("post-norm, no biases", {"bias": False, "batch_first": True}),
    Case("pre-norm, no biases", {"norm_first": True, "bias": False}),
    Case("gelu as module", {"activation": torch.nn.GELU()}),
    Case("tanh gelu as module", {"activation": torch.nn.GELU(approximate="tanh")}),
    Case("relu as module", {"activation": torch.nn.ReLU(), "norm_first": True}),
    Case("silu", {"activation": F.silu}),
    Case("a callable that is not fused", {"activation": torch.tanh, "batch_first": True}),
    Case("another eps", {"layer_norm_eps": 0.5, "norm_first": True}),
    Case("odd sizes", {"d_model": 15, "nhead": 3, "dim_feedforward": 7, "batch_first": True}),
    Case("boolean mask", {}, {"src_mask": causal < 0}),
    Case("floating mask", {"norm_first": True}, {"src_mask": causal / 2}),
    Case("causal hint", {"batch_first": True}, {"src_mask": causal, "is_causal": True}),
    Case(
        "causal hint and padding",
        {"batch_first": True},
        {"src_mask": causal < 0, "src_key_padding_mask": padding, "is_causal": True},
    ),
]


def build(cls: type, make: dict[str, Any]) -> torch.nn.Module:
    settings = {"d_model": D, "nhead": H, "dim_feedforward": FF, "dropout": 0.0, **make}
    settings.setdefault("activation", "gelu")
    module: torch.nn.Module = cls(**settings)
    return module


def pair(make: dict[str, Any]) -> tuple[Any, Any]:
    """Ours and stock's."""
    return build(nn.TransformerEncoderLayer, make), build(torch.nn.TransformerEncoderLayer, make)


def source(make: dict[str, Any]) -> Tensor:
    width = make.get("d_model", D)
    return torch.randn((N, S, width) if make.get("batch_first") else (S, N, width))


def caller(settings: dict[str, Any]) -> Callable[..., Tensor]:
    def call(module: torch.nn.Module, src: Tensor) -> Tensor:
        given = dict(settings)
        for name, mask in settings.items():
            if isinstance(mask, Tensor):
                given[name] = mask.to(src) if mask.is_floating_point() else mask.to(src.device)
        output: Tensor = module(src, **given)
        return output

    return call


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.reason)
def test_parity(case: Case, dtype: torch.dtype, assert_module_parity: Callable[..., None]) -> None:
    ours, stock = pair(case.make)
    assert ours._children_are_plain()
    # The gradient of a ReLU jumps where rounding changes the sign before it, which in bfloat16
    # happens to either side, and to stock not at the same elements.
    gradients = dtype == torch.float32 or fused_activation(ours.activation) != "relu"
    call, inputs = caller(case.call), {"src": source(case.make)}
    assert_module_parity(ours, stock, call, inputs, dtype, gradients=gradients)


@pytest.mark.parametrize("norm_first", [False, True])
def test_unbatched(norm_first: bool, assert_module_parity: Callable[..., None]) -> None:
    make = {"norm_first": norm_first, "batch_first": True}
    layers = pair(make)
    call = caller({"src_key_padding_mask": padding[1]})
    assert_module_parity(*layers, call, {"src": torch.randn(S, D)}, torch.float32)


# What keeps a layer from being fused: each must act as it does in a stock layer.


def hook_doubles(module: torch.nn.Module, args: Any, output: Any) -> Any:
    return (2 * output[0], *output[1:]) if isinstance(output, tuple) else 2 * output


def pre_hook_doubles(module: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (2 * args[0], *args[1:])


class Doubled(torch.nn.Linear):
    """A subclass that does more than a plain product."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def replace_linear(layer: Any) -> None:
    layer.linear2 = Doubled(FF, D)


def replace_norm(layer: Any) -> None:
    layer.norm1 = torch.nn.RMSNorm(D)


def replace_dropout(layer: Any) -> None:
    layer.dropout = torch.nn.Tanh()


def replace_forward(layer: Any) -> None:
    layer.linear1.forward = lambda x: 2 * F.linear(x, layer.linear1.weight, layer.linear1.bias)


def parametrize(layer: Any) -> None:
    torch.nn.utils.parametrizations.weight_norm(layer.linear1)


def activation_with_hook(layer: Any) -> None:
    layer.activation = torch.nn.ReLU()
    layer.activation.register_forward_hook(hook_doubles)


CHANGES: list[Callable[[Any], Any]] = [
    replace_linear,
    replace_norm,
    replace_dropout,
    parametrize,
    activation_with_hook,
]
HOOKED = ["self_attn", "linear1", "linear2", "norm1", "norm2", "dropout", "dropout1", "dropout2"]


@pytest.mark.parametrize("norm_first", [False, True], ids=["post", "pre"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_changed_children_are_called(
    change: Callable[[Any], Any], norm_first: bool, assert_module_parity: Callable[..., None]
) -> None:
    make = {"norm_first": norm_first}
    layers = pair(make)
    for layer in layers:
        change(layer)
    assert_module_parity(*layers, caller({}), {"src": source(make)}, torch.float32)


def test_a_forward_replaced_on_the_instance_is_called() -> None:
    layer, src = build(nn.TransformerEncoderLayer, {}), torch.randn(S, N, D)
    before = layer(src)
    replace_forward(layer)
    assert not torch.allclose(layer(src), before)


@pytest.mark.parametrize("norm_first", [False, True], ids=["post", "pre"])
@pytest.mark.parametrize("child", HOOKED)
def test_hooks_on_children_fire_and_may_change_what_they_see(
    child: str, norm_first: bool, assert_module_parity: Callable[..., None]
) -> None:
    make = {"norm_first": norm_first}
    layers = pair(make)
    for layer in layers:
        module = layer.get_submodule(child)
        module.register_forward_hook(hook_doubles)
        if child != "self_attn":
            module.register_forward_pre_hook(pre_hook_doubles)
    # float64 truth is a deep copy of stock, hooks included
    assert_module_parity(*layers, caller({}), {"src": source(make)}, torch.float32)


def test_backward_hooks_on_children_fire() -> None:
    layer: Any = build(nn.TransformerEncoderLayer, {})
    seen: list[Any] = []
    layer.linear1.register_full_backward_hook(lambda module, *grads: seen.append(module))
    layer(torch.randn(S, N, D)).backward(torch.randn(S, N, D))
    assert seen == [layer.linear1]


def test_global_hooks_see_every_child() -> None:
    layer: Any = build(nn.TransformerEncoderLayer, {})
    seen: list[Any] = []
    handle = torch.nn.modules.module.register_module_forward_hook(
        lambda module, args, output: seen.append(module)
    )
    try:
        layer(torch.randn(S, N, D))
    finally:
        handle.remove()
    assert {id(child) for child in seen} == {id(child) for child in layer.modules()}


def test_an_overridden_block_is_used() -> None:
    class WithoutAttention(nn.TransformerEncoderLayer):
        def _sa_block(self, x: Tensor, *masks: Any, **settings: Any) -> Tensor:
            return torch.zeros_like(x)

    layer, src = build(WithoutAttention, {}), torch.randn(S, N, D)
    changed = src.clone()
    changed[0] += 1.0
    assert torch.equal(layer(src)[1:], layer(changed)[1:])


@pytest.mark.parametrize("norm_first", [False, True], ids=["post", "pre"])
def test_a_plain_layer_calls_no_child_but_the_first_norm(
    norm_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fused path is taken: were it the composition, it would go through these."""
    layer = build(nn.TransformerEncoderLayer, {"norm_first": norm_first})
    src = torch.randn(S, N, D)

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("called")

    monkeypatch.setattr(nn.MultiheadAttention, "forward", refuse)
    monkeypatch.setattr(torch.nn.Linear, "forward", refuse)
    monkeypatch.setattr(torch.nn.Dropout, "forward", refuse)
    layer(src)


@pytest.mark.parametrize(
    ("activation", "name"),
    [
        (F.relu, "relu"), (torch.relu, "relu"), (torch.nn.ReLU(), "relu"), (F.gelu, "gelu"),
        (torch.nn.GELU(), "gelu"), (torch.nn.GELU(approximate="tanh"), "gelu_tanh"),
        (F.silu, "silu"), (torch.nn.SiLU(), "silu"), (nn.QuickGELU(), "quick_gelu"),
        (torch.tanh, None), (torch.nn.ReLU6(), None),
    ],
)  # fmt: skip
def test_recognized_activations(activation: Any, name: str | None) -> None:
    assert fused_activation(activation) == name


# Dropout


@pytest.mark.parametrize("norm_first", [False, True], ids=["post", "pre"])
def test_dropout_in_training_only_and_repeated_by_the_seed(norm_first: bool) -> None:
    layer = build(nn.TransformerEncoderLayer, {"dropout": 0.3, "norm_first": norm_first})
    src = torch.randn(S, N, D)

    def run(seed: int) -> Tensor:
        torch.manual_seed(seed)
        output: Tensor = layer(src)
        return output

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))
    layer.eval()
    assert torch.equal(run(1), run(2))


@pytest.mark.parametrize("place", ["attention", "dropout", "dropout1", "dropout2"])
@pytest.mark.parametrize("norm_first", [False, True], ids=["post", "pre"])
def test_each_of_the_four_dropouts_acts_where_it_stands(place: str, norm_first: bool) -> None:
    """With p = 1 a dropout cuts one branch off, which a stock layer shows without chance."""
    make = {"norm_first": norm_first}
    ours, stock = pair(make)
    for layer in (ours, stock):
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    ours.load_state_dict(stock.state_dict())
    src = torch.randn(S, N, D)
    untouched = ours(src)
    for layer in (ours, stock):
        if place == "attention":
            layer.self_attn.dropout = 1.0
        else:
            layer.get_submodule(place).p = 1.0
    cut, expected = ours(src), stock(src)
    assert not torch.allclose(cut, untouched, rtol=0.1)
    truth = copy.deepcopy(stock).double()(src.double())
    limit = 2 * (expected - truth).abs().max() + 2 * torch.finfo(src.dtype).eps * truth.abs().max()
    assert (cut - truth).abs().max() <= limit


@pytest.mark.parametrize("child", ["self_attn", "dropout", "dropout1", "dropout2"])
def test_a_dropout_in_training_within_a_layer_in_eval_drops(child: str) -> None:
    """Monte Carlo dropout: the flag that counts is the child's own."""
    layer, src = build(nn.TransformerEncoderLayer, {"dropout": 0.5}).eval(), torch.randn(S, N, D)
    assert torch.equal(layer(src), layer(src))
    layer.get_submodule(child).train()
    assert not torch.equal(layer(src), layer(src))


def test_dropout_keeps_the_mean() -> None:
    p, draws = 0.2, 300
    make = {"norm_first": True, "activation": torch.nn.Identity()}
    layer: Any = build(nn.TransformerEncoderLayer, make)
    layer.dropout2.p = p  # after it nothing is nonlinear, so means can be compared
    src = torch.randn(1, 1, D)
    with torch.no_grad():
        samples = layer(src.expand(draws, 1, D))[:, 0]  # equal tokens attend to equal values
        expected = layer.eval()(src)[0, 0]
    # 16 means of 300 draws each: 5 standard errors are passed by chance once in 100,000 seeds.
    assert ((samples.mean(0) - expected).abs() <= 5 * samples.std(0) / draws**0.5).all()


# Everything else


@pytest.mark.parametrize("norm_first", [False, True], ids=["post", "pre"])
def test_cpu_autocast_keeps_the_dtype_of_the_residual_stream(norm_first: bool) -> None:
    make = {"norm_first": norm_first, "batch_first": True}
    ours, stock = pair(make)
    ours.load_state_dict(stock.state_dict())
    src = torch.randn(N, S, D)
    truth = copy.deepcopy(stock).double()(src.double(), src_key_padding_mask=padding)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = (m(src, src_key_padding_mask=padding) for m in (ours, stock))
    assert found.dtype == expected.dtype == torch.float32
    limit = 2 * (expected - truth).abs().max()
    assert 0 < limit and (found - truth).abs().max() <= limit


def test_frozen_parameters_get_no_gradient_and_the_input_still_does() -> None:
    layer, src = build(nn.TransformerEncoderLayer, {}), torch.randn(S, N, D, requires_grad=True)
    layer.requires_grad_(False)
    layer(src).backward(torch.randn(S, N, D))
    assert all(p.grad is None for p in layer.parameters())
    assert src.grad is not None and src.grad.abs().max() > 0


BAD_CALLS = [
    ("1-D", ValueError, "src", dict(src=torch.randn(D))),
    ("another width", ValueError, "src", dict(src=torch.randn(N, S, D + 1))),
    ("another dtype", TypeError, "src", dict(src=torch.randn(N, S, D).double())),
    ("mask", ValueError, "src_mask", dict(src_mask=torch.zeros(S, S + 1))),
    ("mask of integers", TypeError, "src_mask", dict(src_mask=torch.zeros(S, S).int())),
    ("padding", ValueError, "src_key_padding_mask", dict(src_key_padding_mask=padding.T)),
    ("hint without a mask", ValueError, "src_mask", dict(is_causal=True)),
]  # fmt: skip


@pytest.mark.parametrize("norm_first", [False, True], ids=["post", "pre"])
@pytest.mark.parametrize(
    ("error", "argument", "change"), [c[1:] for c in BAD_CALLS], ids=[c[0] for c in BAD_CALLS]
)
def test_bad_calls_name_the_argument(
    error: type[Exception], argument: str, change: dict[str, Any], norm_first: bool
) -> None:
    layer = build(nn.TransformerEncoderLayer, {"batch_first": True, "norm_first": norm_first})
    with pytest.raises(error, match=rf"TransformerEncoderLayer\(\): .*'{argument}'"):
        layer(**{"src": torch.randn(N, S, D), **change})


@pytest.mark.parametrize(
    ("error", "make"),
    [
        (ValueError, dict(nhead=3)), (ValueError, dict(activation="swish")),
        (TypeError, dict(activation=3)), (ValueError, dict(dropout=-0.1)),
    ],
)  # fmt: skip
def test_bad_construction(error: type[Exception], make: dict[str, Any]) -> None:
    with pytest.raises(error, match=next(iter(make))):
        build(nn.TransformerEncoderLayer, make)
