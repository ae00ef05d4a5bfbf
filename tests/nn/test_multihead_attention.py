"""MultiheadAttention beside ``torch.nn.MultiheadAttention``: arguments, masks, weights, dropout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from fusedformer import nn

E, H, N, L, S = 16, 4, 2, 5, 7


nested = torch.nested.nested_tensor([torch.randn(L, E)], layout=torch.jagged)
other_batch = torch.randn(N + 1, L, E)


def causal(length: int) -> Tensor:
    return torch.nn.Transformer.generate_square_subsequent_mask(length)


def some_masked(*shape: int) -> Tensor:
    """Boolean, True = masked, with the first key of every row visible."""
    mask = torch.rand(shape) > 0.6
    mask[..., 0] = False
    return mask


class Case(NamedTuple):
    """One way to construct and to call it."""

    reason: str
    make: dict[str, Any] = {}  # noqa: RUF012 (never changed)
    inputs: str = "self"  # or "kv": key is value; or "all": three tensors
    attn_mask: Callable[[], Tensor] | None = None
    key_padding_mask: Callable[[], Tensor] | None = None
    call: dict[str, Any] = {}  # noqa: RUF012


def bool_padding() -> Tensor:
    return torch.arange(L) >= torch.tensor([[L], [2]])


def long_padding() -> Tensor:
    return torch.arange(S) >= torch.tensor([[S], [3]])


def float_mask() -> Tensor:
    return torch.randn(L, S)


def float_padding() -> Tensor:
    return torch.randn(N, S)


CASES = [
    Case("self-attention, one product", {"batch_first": True}),
    Case("sequence first is the default layout"),
    Case("no biases anywhere", {"bias": False, "batch_first": True}),
    Case("a single head", {"num_heads": 1, "batch_first": True}),
    Case("head dim 1", {"embed_dim": 4, "batch_first": True}),
    Case("odd head dim 5", {"embed_dim": 15, "num_heads": 3, "batch_first": True}),
    Case("cross-attention, key is value", {"batch_first": True}, "kv"),
    Case("cross-attention, key is value, no bias", {"bias": False}, "kv"),
    Case("three tensors, sequence first", {}, "all"),
    Case("kdim and vdim: separate weights", {"kdim": 6, "vdim": 9, "batch_first": True}, "all"),
    Case("kdim only", {"kdim": 6, "bias": False}, "all"),
    Case("learned key and value", {"add_bias_kv": True, "batch_first": True}, "all"),
    Case("zero key and value", {"add_zero_attn": True}, "kv"),
    Case(
        "both appended, both masks",
        {"add_bias_kv": True, "add_zero_attn": True},
        "kv",
        lambda: some_masked(L, S),
        long_padding,
    ),
    Case(
        "appended keys stay visible under the causal hint",
        {"add_zero_attn": True},
        attn_mask=lambda: causal(L),
        call={"is_causal": True, "need_weights": True},
    ),
    Case("boolean 2-D mask", {"batch_first": True}, "all", lambda: some_masked(L, S)),
    Case("boolean 3-D mask, one per head", {}, "all", lambda: some_masked(N * H, L, S)),
    Case("floating 2-D mask", {}, "all", float_mask),
    Case("floating 3-D mask", {"batch_first": True}, "all", lambda: torch.randn(N * H, L, S)),
    Case("boolean padding", {"batch_first": True}, key_padding_mask=bool_padding),
    Case("floating padding is added", {}, "kv", None, float_padding),
    Case("boolean mask and padding", {}, "kv", lambda: some_masked(L, S), long_padding),
    Case("floating mask and padding", {}, "kv", float_mask, float_padding),
    Case("kinds mixed: floating mask", {}, "kv", lambda: torch.randn(N * H, L, S), long_padding),
    Case("kinds mixed: boolean mask", {}, "kv", lambda: some_masked(L, S), float_padding),
    Case("causal hint", attn_mask=lambda: causal(L), call={"is_causal": True}),
    Case(
        "causal hint and padding",
        {},
        attn_mask=lambda: causal(L) < 0,
        key_padding_mask=bool_padding,
        call={"is_causal": True},
    ),
]


def build(cls: type, make: dict[str, Any]) -> torch.nn.Module:
    module: torch.nn.Module = cls(**{"embed_dim": E, "num_heads": H, **make})
    return module


def inputs_of(case: Case) -> dict[str, Tensor]:
    width, batch_first = case.make.get("embed_dim", E), case.make.get("batch_first", False)

    def sequence(length: int, size: int) -> Tensor:
        return torch.randn((N, length, size) if batch_first else (length, N, size))

    inputs = {"query": sequence(L, width)}
    if case.inputs != "self":
        inputs["key"] = sequence(S, case.make.get("kdim", width))
    if case.inputs == "all":
        inputs["value"] = sequence(S, case.make.get("vdim", width))
    return inputs


def attend(module: torch.nn.Module, inputs: dict[str, Tensor], **settings: Any) -> Any:
    query = inputs["query"]
    key = inputs.get("key", query)
    return module(query, key, inputs.get("value", key), **settings)


@pytest.mark.filterwarnings("ignore:Support for mismatched")  # torch's; ours takes both kinds
@pytest.mark.parametrize(
    ("dtype", "need_weights"),
    [(torch.float32, False), (torch.float32, True), (torch.bfloat16, False)],
    ids=["fused", "weights", "fused bfloat16"],
)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.reason)
def test_parity(
    case: Case, dtype: torch.dtype, need_weights: bool, assert_module_parity: Callable[..., None]
) -> None:
    masks = {
        name: make()
        for name in ("attn_mask", "key_padding_mask")
        if (make := getattr(case, name)) is not None
    }

    def call(module: torch.nn.Module, **inputs: Tensor) -> tuple[Tensor, ...]:
        # A floating mask is no input here: stock's float64 run needs it in float64.
        query = inputs["query"]
        given = {
            k: m.to(query) if m.is_floating_point() else m.to(query.device)
            for k, m in masks.items()
        }
        settings = {"need_weights": need_weights, "average_attn_weights": False, **case.call}
        return tuple(t for t in attend(module, inputs, **given, **settings) if t is not None)

    for name, mask in masks.items():
        masks[name] = mask.to(dtype) if mask.is_floating_point() else mask
    ours = build(nn.MultiheadAttention, case.make)
    stock = build(torch.nn.MultiheadAttention, case.make)
    assert_module_parity(ours, stock, call, inputs_of(case), dtype)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("mask_dim", [2, 3])
def test_unbatched(
    mask_dim: int, batch_first: bool, assert_module_parity: Callable[..., None]
) -> None:
    mask = some_masked(L, S) if mask_dim == 2 else some_masked(H, L, S)
    padding = torch.arange(S) >= 5

    def call(module: torch.nn.Module, query: Tensor, key: Tensor) -> tuple[Tensor, ...]:
        output, weights = module(
            query,
            key,
            key,
            attn_mask=mask.to(query.device),
            key_padding_mask=padding.to(query.device),
        )
        assert output.shape == (L, E) and weights.shape == (L, S)
        return output, weights

    ours = nn.MultiheadAttention(E, H, batch_first=batch_first)
    stock = torch.nn.MultiheadAttention(E, H, batch_first=batch_first)
    inputs = {"query": torch.randn(L, E), "key": torch.randn(S, E)}
    assert_module_parity(ours, stock, call, inputs, torch.float32)


def test_a_mask_that_is_learned_gets_its_gradient_even_where_it_starts_out_causal(
    assert_module_parity: Callable[..., None],
) -> None:
    mask = torch.zeros(L, L).masked_fill(torch.ones(L, L).triu(1).bool(), -1e4)

    def call(module: torch.nn.Module, query: Tensor, mask: Tensor) -> Tensor:
        output: Tensor = module(
            query,
            query,
            query,
            attn_mask=mask,
            need_weights=False,
            is_causal=isinstance(module, nn.MultiheadAttention),  # stock would drop the mask
        )[0]
        return output

    ours, stock = nn.MultiheadAttention(E, H), torch.nn.MultiheadAttention(E, H)
    inputs = {"query": torch.randn(L, N, E), "mask": mask}
    assert_module_parity(ours, stock, call, inputs, torch.float32)


def test_returned_forms() -> None:
    module, x = nn.MultiheadAttention(E, H, batch_first=True), torch.randn(N, L, E)
    assert module(x, x, x, need_weights=False)[1] is None
    averaged = module(x, x, x)[1]
    apart = module(x, x, x, average_attn_weights=False)[1]
    assert averaged.shape == (N, L, L) and apart.shape == (N, H, L, L)
    torch.testing.assert_close(averaged, apart.mean(1), rtol=0, atol=0)


def test_output_has_the_same_bits_with_and_without_weights(device: str) -> None:
    module = nn.MultiheadAttention(E, H, device=device).eval()
    x = torch.randn(L, N, E, device=device)
    with torch.no_grad():
        assert torch.equal(module(x, x, x)[0], module(x, x, x, need_weights=False)[0])


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("floating", [False, True], ids=["boolean", "floating"])
def test_a_query_without_visible_keys_gets_only_the_output_bias(
    floating: bool, need_weights: bool
) -> None:
    module, x = nn.MultiheadAttention(E, H, batch_first=True), torch.randn(N, L, E)
    torch.nn.init.normal_(module.out_proj.bias)
    x.requires_grad_()
    padding = torch.zeros(N, L, dtype=torch.bool)
    padding[1] = True
    if floating:
        padding = torch.zeros(N, L).masked_fill(padding, -torch.inf)
    output, weights = module(x, x, x, key_padding_mask=padding, need_weights=need_weights)
    assert torch.equal(output[1], module.out_proj.bias.expand(L, E))
    output.backward(torch.randn_like(output))
    assert x.grad is not None
    assert torch.equal(x.grad[1], torch.zeros(L, E))
    assert x.grad.isfinite().all() and x.grad[0].abs().min() > 0
    assert not need_weights or torch.equal(weights[1], torch.zeros(L, L))


def test_masked_keys_have_no_influence() -> None:
    module, x = nn.MultiheadAttention(E, H, batch_first=True), torch.randn(N, L, E)
    key, changed = torch.randn(N, S, E), torch.randn(N, S, E)
    padding = long_padding()
    changed[~padding] = key[~padding]
    first, second = (module(x, k, k, key_padding_mask=padding)[0] for k in (key, changed))
    assert torch.equal(first, second)


@pytest.mark.parametrize("need_weights", [False, True])
def test_dropout_in_training_only_and_repeated_by_the_seed(need_weights: bool) -> None:
    module, x = nn.MultiheadAttention(E, H, dropout=0.5), torch.randn(L, N, E)

    def run(seed: int) -> Tensor:
        torch.manual_seed(seed)
        output: Tensor = module(x, x, x, need_weights=need_weights)[0]
        return output

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))
    module.eval()
    assert torch.equal(run(1), run(2))


def test_returned_weights_are_those_that_were_used_after_dropout() -> None:
    module, x = nn.MultiheadAttention(E, 1, dropout=0.5, batch_first=True), torch.randn(1, L, E)
    output, weights = module(x, x, x)
    value = torch.nn.functional.linear(x, module.in_proj_weight[2 * E :])
    assert (weights == 0).any()
    torch.testing.assert_close(output, module.out_proj(weights @ value))


@pytest.mark.parametrize("need_weights", [False, True])
def test_dropout_keeps_the_mean(need_weights: bool) -> None:
    p, draws = 0.25, 200
    module = nn.MultiheadAttention(E, H, dropout=p, batch_first=True)
    query, key = torch.randn(1, 1, E), torch.randn(1, 3, E)
    with torch.no_grad():
        equal = query.expand(1, draws, E)
        samples = module(equal, key, key, need_weights=need_weights)[0][0]
        expected = module.eval()(query, key, key)[0][0, 0]
    error = (samples.mean(0) - expected).abs()
    assert samples.std(0).min() > 0
    # 16 means of 200 draws each: 5 standard errors are passed by chance once in 100,000 seeds.
    assert (error <= 5 * samples.std(0) / draws**0.5).all()


BAD_CALLS: list[tuple[str, type[Exception], str, dict[str, Any]]] = [
    ("4-D query", ValueError, "query", dict(query=torch.randn(1, N, L, E))),
    ("query of another width", ValueError, "query", dict(query=torch.randn(N, L, E - 1))),
    ("key of another width", ValueError, "key", dict(key=torch.randn(N, L, E - 1))),
    ("query of another dtype", TypeError, "query", dict(query=torch.randn(N, L, E).double())),
    ("query is no tensor", TypeError, "query", dict(query=[1.0])),
    ("nested query", TypeError, "query", dict(query=nested)),
    ("key and value of two lengths", ValueError, "value", dict(value=torch.randn(N, L + 1, E))),
    ("key of another batch", ValueError, "key", dict.fromkeys(("key", "value"), other_batch)),
    ("unbatched key", ValueError, "key", dict.fromkeys(("key", "value"), other_batch[0])),
    ("mask of another length", ValueError, "attn_mask", dict(attn_mask=torch.zeros(L, L + 1))),
    ("4-D mask", ValueError, "attn_mask", dict(attn_mask=torch.zeros(N, H, L, L))),
    ("integer mask", TypeError, "attn_mask", dict(attn_mask=torch.ones(L, L).int())),
    ("3-D mask, not per head", ValueError, "attn_mask", dict(attn_mask=torch.ones(N, L, L))),
    (
        "padding of another length", ValueError, "key_padding_mask",
        dict(key_padding_mask=torch.zeros(N, S)),
    ),
    ("unbatched padding", ValueError, "key_padding_mask", dict(key_padding_mask=torch.zeros(L))),
    (
        "integer padding", TypeError, "key_padding_mask",
        dict(key_padding_mask=torch.ones(N, L).int()),
    ),
    ("causal hint without a mask", ValueError, "attn_mask", dict(is_causal=True)),
]  # fmt: skip


@pytest.mark.parametrize(
    ("error", "argument", "change"), [c[1:] for c in BAD_CALLS], ids=[c[0] for c in BAD_CALLS]
)
def test_bad_calls_name_the_argument(
    error: type[Exception], argument: str, change: dict[str, Any]
) -> None:
    x = torch.randn(N, L, E)
    arguments = {"query": x, "key": x, "value": x, **change}
    with pytest.raises(error, match=rf"MultiheadAttention\(\): .*'{argument}'"):
        nn.MultiheadAttention(E, H, batch_first=True)(**arguments)


@pytest.mark.parametrize("given", ["flat", "parted"])
@pytest.mark.parametrize("own", ["flat", "parted"])
@pytest.mark.parametrize("assign", [False, True])
def test_a_projection_is_loaded_in_one_dimension_or_in_three_parts(
    given: str, own: str, assign: bool
) -> None:
    """In the latter it is where ranks share it."""
    module = nn.MultiheadAttention(E, H)
    state = {name: torch.randn_like(value) for name, value in module.state_dict().items()}
    parted = {n: t.unflatten(0, (3, E)) if "in_proj" in n else t for n, t in state.items()}
    if own == "parted":
        for name in ("in_proj_weight", "in_proj_bias"):
            setattr(module, name, torch.nn.Parameter(torch.zeros_like(parted[name])))
    module.load_state_dict(state if given == "flat" else parted, assign=assign)
    for name, value in module.state_dict().items():
        assert torch.equal(value, (state if own == "flat" else parted)[name])


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("in_proj_weight", torch.zeros(E, 3 * E), "size mismatch for in_proj_weight"),
        ("in_proj_weight", torch.zeros(3 * E * E), "size mismatch for in_proj_weight"),
        ("in_proj_weight", torch.zeros(E, 3, E), "size mismatch for in_proj_weight"),
        ("in_proj_weight", torch.zeros(1, 3 * E, E), "size mismatch for in_proj_weight"),
        ("in_proj_bias", torch.zeros(E, 3), "size mismatch for in_proj_bias"),
        ("in_proj_bias", torch.zeros(3 * E, 1), "size mismatch for in_proj_bias"),
        ("in_proj_weight", [1.0], "in_proj_weight.*expected torch.Tensor"),
        ("in_proj_bias", "no tensor", "in_proj_bias.*expected torch.Tensor"),
    ],
)
def test_a_state_of_another_shape_is_refused(name: str, value: Any, message: str) -> None:
    """As torch refuses it, whatever the number of elements; nothing of the parameter changes."""
    module = nn.MultiheadAttention(E, H)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    for one in (module, torch.nn.MultiheadAttention(E, H)):
        with pytest.raises(RuntimeError, match=message):
            one.load_state_dict({**before, name: value})
    assert torch.equal(module.state_dict()[name], before[name])


def test_self_attention_needs_equal_widths() -> None:
    x = torch.randn(L, N, E)
    with pytest.raises(ValueError, match="expected the last dimension of 'key' to be 6"):
        nn.MultiheadAttention(E, H, kdim=6)(x, x, x)


@pytest.mark.parametrize(
    "make", [dict(num_heads=3), dict(num_heads=0), dict(embed_dim=0), dict(dropout=1.5)], ids=str
)
def test_bad_construction(make: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"MultiheadAttention\(\): expected '(embed_dim|dropout)'"):
        build(nn.MultiheadAttention, make)
