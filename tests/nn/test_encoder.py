"""TransformerEncoder beside ``torch.nn.TransformerEncoder``: masks, padding, layers, settings."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from fusedformer import nn
from fusedformer.nn.masks import is_causal_mask

D, H, FF, N, S, LAYERS = 16, 2, 24, 3, 6, 2

causal = torch.nn.Transformer.generate_square_subsequent_mask(S)
ragged = torch.arange(S) >= torch.tensor([[S], [4], [1]])
left = ragged.flip(1)
jagged = torch.nested.nested_tensor([torch.randn(S, D)], layout=torch.jagged)
strided = torch.nested.nested_tensor([torch.randn(S, D)], layout=torch.strided)
with_holes = torch.nested.narrow(
    torch.randn(2, S, D), 1, torch.tensor([1, 0]), torch.tensor([2, S]), layout=torch.jagged
)
holes = torch.tensor([[0, 1, 0, 1, 1, 0], [1, 0, 0, 0, 1, 1], [0, 0, 0, 0, 0, 0]]).bool()


class Case(NamedTuple):
    """One way to construct and to call it."""

    reason: str
    make: dict[str, Any] = {}  # noqa: RUF012 (never changed)
    call: dict[str, Any] = {}  # noqa: RUF012
    norm: bool = False


BATCH_FIRST = {"batch_first": True}
CASES = [
    Case("no mask, sequence first"),
    Case("pre-norm with a last norm", {"norm_first": True}, {}, norm=True),
    Case("padded on the right", BATCH_FIRST, {"src_key_padding_mask": ragged}),
    Case("padded on the left, sequence first", {}, {"src_key_padding_mask": left}, norm=True),
    Case(
        "holes, pre-norm, no biases", {"norm_first": True, "bias": False, **BATCH_FIRST},
        {"src_key_padding_mask": holes}, norm=True,
    ),
    Case("causal mask is found out", BATCH_FIRST, {"mask": causal}),
    Case("boolean causal mask is found out", {"norm_first": True}, {"mask": causal < 0}),
    Case("causal by hint, and padding", {}, {
        "mask": causal < 0, "is_causal": True, "src_key_padding_mask": ragged,
    }),
    Case("mask that is not causal", BATCH_FIRST, {"mask": causal.flip(0, 1)}),
    Case("mask per head", {}, {"mask": torch.eye(S).bool().roll(1, 0).expand(N * H, S, S)}),
    Case("floating padding", BATCH_FIRST, {
        "src_key_padding_mask": torch.zeros(N, S).masked_fill(ragged, -torch.inf),
    }),
]  # fmt: skip


def layer(library: Any, **make: Any) -> Any:
    settings = {"d_model": D, "nhead": H, "dim_feedforward": FF, "dropout": 0.0} | make
    return library.TransformerEncoderLayer(**{"activation": "gelu", **settings})


def encoder(library: Any, case: Case) -> Any:
    norm = library.LayerNorm(D, bias=case.make.get("bias", True)) if case.norm else None
    return library.TransformerEncoder(
        layer(library, **case.make), LAYERS, norm, enable_nested_tensor=False
    )


def beside(src: Tensor, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings with masks on the device of ``src``, floating ones in its dtype."""

    def convert(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(src) if value.is_floating_point() else value.to(src.device)

    return {name: convert(value) for name, value in settings.items()}


def padded_of(settings: dict[str, Any], batch_first: bool) -> Tensor:
    padding = settings.get("src_key_padding_mask", torch.zeros(N, S))
    padded = padding if padding.dtype == torch.bool else padding == -torch.inf
    return (padded if batch_first else padded.T)[..., None]


@pytest.mark.parametrize(
    ("case", "dtype"),
    [pytest.param(case, torch.float32, id=case.reason) for case in CASES]
    + [pytest.param(c, torch.bfloat16, id=f"{c.reason}, bfloat16") for c in CASES[1:3]],
)
def test_parity(case: Case, dtype: torch.dtype, assert_module_parity: Callable[..., None]) -> None:
    batch_first = case.make.get("batch_first", False)
    padded = padded_of(case.call, batch_first)

    def call(module: torch.nn.Module, src: Tensor) -> Tensor:
        output: Tensor = module(src, **beside(src, case.call))
        here = padded.to(src.device)
        if isinstance(module, nn.TransformerEncoder):
            assert (output.masked_select(here) == 0).all()
            return output
        return output.masked_fill(here, 0.0)  # stock leaves them arbitrary

    src = torch.randn((N, S, D) if batch_first else (S, N, D))
    ours, stock = encoder(nn, case), encoder(torch.nn, case)
    assert_module_parity(ours, stock, call, {"src": src}, dtype)


def test_unbatched(assert_module_parity: Callable[..., None]) -> None:
    case = Case("", BATCH_FIRST, norm=True)
    padded = ragged[1]

    def call(module: torch.nn.Module, src: Tensor) -> Tensor:
        masks = {"mask": causal, "src_key_padding_mask": padded.float() * -1e30}
        output: Tensor = module(src, **beside(src, masks))
        return output

    ours, stock = encoder(nn, case), encoder(torch.nn, case)
    assert_module_parity(ours, stock, call, {"src": torch.randn(S, D)}, torch.float32)
    output = ours.cpu()(torch.randn(S, D), src_key_padding_mask=padded)
    assert torch.equal(output == 0, padded[:, None].expand(S, D))


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_padded_positions_are_zero_and_have_no_influence(training: bool) -> None:
    case = Case("", BATCH_FIRST, norm=True)
    module = encoder(nn, case).train(training)
    src = torch.randn(N, S, D)
    changed = torch.where(ragged[..., None], torch.randn(N, S, D), src).requires_grad_()
    src.requires_grad_()
    outputs = [module(x, src_key_padding_mask=ragged) for x in (src, changed)]
    assert torch.equal(*outputs)
    assert torch.equal(outputs[0] == 0, ragged[..., None].expand(N, S, D))
    outputs[0].backward(torch.randn(N, S, D))
    assert src.grad is not None
    assert (src.grad[ragged] == 0).all() and (src.grad[~ragged].abs().amax(-1) > 0).all()


def test_a_sequence_that_is_padding_altogether_is_zero_with_finite_gradients() -> None:
    padding = ragged.clone()
    padding[0] = True
    module, src = encoder(nn, Case("", BATCH_FIRST)), torch.randn(N, S, D, requires_grad=True)
    output = module(src, src_key_padding_mask=padding)
    output.backward(torch.randn(N, S, D))
    assert src.grad is not None
    assert (output[0] == 0).all() and (src.grad[0] == 0).all() and src.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in module.parameters())


def test_alone_or_padded_a_sequence_comes_out_the_same(
    assert_module_parity: Callable[..., None],
) -> None:
    """Stock gets each sequence alone, without a mask; ours gets them as one padded batch."""
    lengths = (~ragged).sum(1).tolist()

    def call(module: torch.nn.Module, src: Tensor) -> Tensor:
        if isinstance(module, nn.TransformerEncoder):
            padding = ragged.to(src.device)
            return module(src, src_key_padding_mask=padding)[~padding]
        return torch.cat([module(src[i : i + 1, :length])[0] for i, length in enumerate(lengths)])

    case = Case("", BATCH_FIRST)
    ours, stock = encoder(nn, case), encoder(torch.nn, case)
    assert_module_parity(ours, stock, call, {"src": torch.randn(N, S, D)}, torch.float32)


@pytest.mark.parametrize(
    ("reason", "mask", "found"),
    [
        ("floating", causal, True),
        ("boolean", causal < 0, True),
        ("bfloat16", causal.bfloat16(), True),
        ("none", None, False),
        ("transposed", causal.T, False),
        ("finite", causal.clamp(min=-1e4), False),
        ("one more position hidden", (causal < 0).index_fill(1, torch.tensor([0]), True), False),
        ("per head", causal.expand(N * H, S, S), False),
        ("another length", causal[:-1, :-1], False),
    ],
)
def test_detection_of_the_causal_mask(reason: str, mask: Tensor | None, found: bool) -> None:
    assert is_causal_mask(mask, S) is found


@pytest.mark.parametrize(
    ("hint", "expected"), [(None, True), (False, False), (True, True)], ids=str
)
def test_layers_get_the_hint_and_the_masks(hint: bool | None, expected: bool) -> None:
    module, seen = encoder(nn, Case("", BATCH_FIRST)), []
    module.layers[1].register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True
    )
    module(torch.randn(N, S, D), causal, ragged, is_causal=hint)
    assert seen == [{"src_mask": causal, "is_causal": expected, "src_key_padding_mask": ragged}]


def test_layers_are_deep_copies_and_the_norm_is_not() -> None:
    first, norm = layer(nn), nn.LayerNorm(D)
    module = nn.TransformerEncoder(first, 3, norm)
    assert module.norm is norm and module.num_layers == len(module.layers) == 3
    parameters = [p for one in (first, *module.layers) for p in one.parameters()]
    assert len({id(p) for p in parameters}) == len(parameters)
    for one in module.layers:
        assert type(one) is nn.TransformerEncoderLayer
        assert all(map(torch.equal, one.state_dict().values(), first.state_dict().values()))


def test_stock_layers_and_other_modules_may_be_stacked() -> None:
    class Shift(torch.nn.Module):
        def forward(self, src: Tensor, **masks: Any) -> Tensor:
            return src + 1

    src = torch.randn(S, N, D)
    assert torch.equal(nn.TransformerEncoder(Shift(), 2)(src), src + 1 + 1)  # type: ignore[arg-type]
    assert torch.equal(nn.TransformerEncoder(Shift(), 0)(src), src)  # type: ignore[arg-type]
    stock = layer(torch.nn, dropout=0.0)
    expected = torch.nn.TransformerEncoder(stock, 2, enable_nested_tensor=False)(src)
    assert torch.equal(nn.TransformerEncoder(stock, 2)(src), expected)


@pytest.mark.parametrize("enable", [False, True])
def test_nested_tensor_setting_is_kept_without_a_warning(enable: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module = nn.TransformerEncoder(
            layer(nn, norm_first=True), 1, enable_nested_tensor=enable, mask_check=False
        )
    assert module.enable_nested_tensor is enable and module.mask_check is False
    assert module.use_nested_tensor is False


def test_checkpointing_a_layer_draws_the_same_dropout_again() -> None:
    module = nn.TransformerEncoder(layer(nn, dropout=0.3), 1)
    src, grad = torch.randn(S, 1, D), torch.randn(S, 1, D)
    found = []
    for again in (False, True):
        module.zero_grad()
        torch.manual_seed(3)
        x = src
        for one in module.layers:
            x = torch.utils.checkpoint.checkpoint(one, x, use_reentrant=False) if again else one(x)
        x.backward(grad)
        found.append([x.detach()])
        for parameter in module.parameters():
            assert parameter.grad is not None
            found[-1].append(parameter.grad.clone())
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize(
    ("error", "argument", "settings"),
    [
        (ValueError, "src", dict(src=torch.randn(D))),
        (TypeError, "src", dict(src=[1.0])),
        (TypeError, "src", dict(src=strided)),
        (ValueError, "src_key_padding_mask", dict(src=jagged, src_key_padding_mask=ragged)),
        (ValueError, "output_rows", dict(src=jagged, output_rows=ragged)),
        (ValueError, "mask", dict(src=jagged, mask=torch.zeros(S, S))),
        (ValueError, "output_rows", dict(output_rows=ragged[0])),
        (TypeError, "output_rows", dict(output_rows=ragged.int())),
        (IndexError, "output_rows", dict(output_rows=torch.full((N, 1), S))),
        (ValueError, "mask", dict(is_causal=True, src_key_padding_mask=ragged)),
        (ValueError, "src_key_padding_mask", dict(src_key_padding_mask=ragged.T)),
        (TypeError, "src_key_padding_mask", dict(src_key_padding_mask=ragged.int())),
        (ValueError, "mask", dict(mask=torch.zeros(S, S + 1))),
        (ValueError, "mask", dict(is_causal=True)),
    ],
)  # fmt: skip
def test_bad_calls_name_the_argument(
    error: type[Exception], argument: str, settings: dict[str, Any]
) -> None:
    module = encoder(nn, Case("", BATCH_FIRST))
    with pytest.raises(error, match=rf"TransformerEncoder(Layer)?\(\): .*{argument}'"):
        module(**{"src": torch.randn(N, S, D), **settings})


def test_bad_construction() -> None:
    with pytest.raises(ValueError, match="num_layers"):
        nn.TransformerEncoder(layer(nn), -1)
    with pytest.raises(TypeError, match="encoder_layer"):
        nn.TransformerEncoder(3, 1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="norm"):
        nn.TransformerEncoder(layer(nn), 1, norm=3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("src", "message"),
    [
        (strided, r"as_nested_tensor\(list\(src\.unbind"),
        (with_holes, r"without holes.*src\.contiguous\(\)"),
        (jagged.transpose(1, 2), "at 2 is jagged"),
    ],
    ids=["strided", "holes", "jagged in width"],
)
def test_nested_tensors_that_are_refused(src: torch.Tensor, message: str) -> None:
    with pytest.raises(TypeError, match=f"TransformerEncoder.*'src'.*{message}"):
        encoder(nn, Case("", BATCH_FIRST))(src)
    encoder(nn, Case("", BATCH_FIRST))(with_holes.contiguous())
