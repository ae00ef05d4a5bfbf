"""TransformerDecoderLayer, TransformerDecoder and Transformer beside torch's, padded and packed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from fusedformer import backend, functional, nn
from fusedformer.nn.multihead_attention import MultiheadAttention

D, H, FF, N, T, S, LAYERS = 16, 2, 24, 3, 6, 5, 2

causal = torch.nn.Transformer.generate_square_subsequent_mask(T)
ragged = torch.arange(T) >= torch.tensor([[T], [4], [1]])
holes = torch.tensor([[0, 1, 0, 1, 1, 0], [1, 0, 0, 0, 1, 1], [0, 0, 0, 0, 0, 0]]).bool()
of_memory = torch.arange(S) >= torch.tensor([[2], [S], [4]])
across = torch.rand(T, S, generator=torch.Generator().manual_seed(0)) < 0.3
across[:, 1] = False
BATCH_FIRST = {"batch_first": True}
BOTH = {"tgt_key_padding_mask": ragged, "memory_key_padding_mask": of_memory}
IS_CAUSAL = {"tgt_mask": causal, "tgt_is_causal": True}


class Case(NamedTuple):
    """One way to construct and to call it."""

    reason: str
    make: dict[str, Any] = {}  # noqa: RUF012 (never changed)
    call: dict[str, Any] = {}  # noqa: RUF012
    norm: bool = False


CASES = [
    Case("no mask, sequence first, relu", {"activation": "relu"}),
    Case("pre-norm with a last norm", {"norm_first": True}, {}, norm=True),
    Case("both padded", BATCH_FIRST, BOTH),
    Case("both padded, pre-norm, sequence first", {"norm_first": True}, BOTH, norm=True),
    Case("only memory padded", BATCH_FIRST, {"memory_key_padding_mask": of_memory}, norm=True),
    Case(
        "only tgt padded, holes, no biases", {"norm_first": True, "bias": False, **BATCH_FIRST},
        {"tgt_key_padding_mask": holes}, norm=True,
    ),
    Case("causal by hint", BATCH_FIRST, IS_CAUSAL),
    Case("causal and padded", {}, {**IS_CAUSAL, **BOTH}),
    Case("boolean causal mask is not read", BATCH_FIRST, {"tgt_mask": causal < 0, **BOTH}),
    Case("masks of both", BATCH_FIRST, {"tgt_mask": causal.T.clone(), "memory_mask": across}),
    Case("mask across, padded", {"norm_first": True}, {"memory_mask": across.float(), **BOTH}),
    Case(
        "causal across", BATCH_FIRST,
        {"memory_mask": causal[:, :S] < 0, "memory_is_causal": True},
    ),
    Case("mask per head", {}, {"memory_mask": across.expand(N * H, T, S)}),
    Case("floating padding", BATCH_FIRST, {
        "memory_key_padding_mask": torch.zeros(N, S).masked_fill(of_memory, -torch.inf),
    }),
]  # fmt: skip


def layer(library: Any, **make: Any) -> Any:
    settings = {"d_model": D, "nhead": H, "dim_feedforward": FF, "dropout": 0.0} | make
    return library.TransformerDecoderLayer(**{"activation": "gelu", **settings})


def decoder(library: Any, case: Case) -> Any:
    norm = library.LayerNorm(D, bias=case.make.get("bias", True)) if case.norm else None
    return library.TransformerDecoder(layer(library, **case.make), LAYERS, norm)


def sequences(batch_first: bool, batch: int = N) -> dict[str, Tensor]:
    lengths = {"tgt": T, "memory": S}
    return {
        name: torch.randn((batch, length, D) if batch_first else (length, batch, D))
        for name, length in lengths.items()
    }


def beside(x: Tensor, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings with masks on the device of ``x``, floating ones in its dtype."""

    def convert(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(x) if value.is_floating_point() else value.to(x.device)

    return {name: convert(value) for name, value in settings.items()}


def caller(case: Case, padded: Tensor) -> Callable[..., Tensor]:
    def call(module: torch.nn.Module, tgt: Tensor, memory: Tensor) -> Tensor:
        output: Tensor = module(tgt, memory, **beside(tgt, case.call))
        here = padded.to(tgt.device)
        if isinstance(module, nn.TransformerDecoder):
            assert (output.masked_select(here) == 0).all()
            return output
        return output.masked_fill(here, 0.0)  # torch leaves them arbitrary

    return call


def padded_of(case: Case) -> Tensor:
    padding = case.call.get("tgt_key_padding_mask", torch.zeros(N, T, dtype=torch.bool))
    return (padding if case.make.get("batch_first") else padding.T)[..., None]


ALL = [pytest.param(case, torch.float32, id=case.reason) for case in CASES]
SOME = [pytest.param(c, torch.bfloat16, id=f"{c.reason}, bfloat16") for c in CASES[1:4]]


@pytest.mark.parametrize(("case", "dtype"), ALL + SOME)
def test_parity_of_the_stack(
    case: Case, dtype: torch.dtype, assert_module_parity: Callable[..., None]
) -> None:
    inputs = sequences(case.make.get("batch_first", False))
    ours, stock = decoder(nn, case), decoder(torch.nn, case)
    assert_module_parity(ours, stock, caller(case, padded_of(case)), inputs, dtype)


@pytest.mark.parametrize("case", CASES[:2] + CASES[7:12], ids=lambda case: case.reason)
def test_parity_of_a_layer(case: Case, assert_module_parity: Callable[..., None]) -> None:
    inputs = sequences(case.make.get("batch_first", False))
    ours, stock = layer(nn, **case.make), layer(torch.nn, **case.make)
    call = caller(case, padded_of(case))
    assert_module_parity(ours, stock, call, inputs, torch.float32)


@pytest.mark.parametrize("stacked", [False, True])
def test_unbatched(stacked: bool, assert_module_parity: Callable[..., None]) -> None:
    case = Case("", {"norm_first": stacked}, norm=True)
    build: Any = decoder if stacked else lambda library, case: layer(library, **case.make)
    masks = {"tgt_mask": causal, "memory_key_padding_mask": of_memory[0], "tgt_is_causal": True}
    assert_module_parity(
        build(nn, case), build(torch.nn, case),
        lambda module, **x: module(**x, **beside(x["tgt"], masks)),
        {"tgt": torch.randn(T, D), "memory": torch.randn(S, D)}, torch.float32,
    )  # fmt: skip


@pytest.fixture
def padded_attention_is_forbidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        pytest.fail("attention ran on the padded batch")

    monkeypatch.setattr(functional, "scaled_dot_product_attention", fail)
    monkeypatch.setattr(MultiheadAttention, "_attend", fail)


@pytest.mark.usefixtures("padded_attention_is_forbidden")
@pytest.mark.parametrize("name", ["triton", "torch"])
@pytest.mark.parametrize(
    ("norm_first", "masks"), [(False, BOTH), (True, {**BOTH, **IS_CAUSAL})], ids=["post", "causal"]
)
def test_padding_is_not_computed(
    masks: dict[str, Any], norm_first: bool, name: Any, device: str
) -> None:
    """NaN in it does no harm, forward or backward, with dropout; static shapes give the same."""
    case = Case("", {"norm_first": norm_first, "dropout": 0.3, **BATCH_FIRST}, norm=True)
    stack = decoder(nn, case).to(device)
    clean = {n: x.to(device) for n, x in sequences(True).items()}
    paddings = {"tgt": ragged.to(device), "memory": of_memory.to(device)}
    dirty = {n: x.masked_fill(paddings[n][..., None], torch.nan) for n, x in clean.items()}
    runs = []
    for given, static in ((clean, False), (dirty, False), (dirty, True)):
        if static and name == "torch":
            continue  # padded: see the next test
        stack.static_shapes = static
        leaves = {n: x.clone().requires_grad_() for n, x in given.items()}
        torch.manual_seed(3)
        with backend(name):
            output = stack(**leaves, **beside(clean["tgt"], masks))
        dy = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output)
        grads = torch.autograd.grad(output, [*leaves.values(), *stack.parameters()], dy)
        runs.append([output, *grads])
    for run in runs[1:]:
        assert all(t.isfinite().all() for t in run)
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(runs[0], run, strict=True))
    assert all(map(torch.equal, runs[0], runs[1]))
    for tensor, padding in zip(runs[1][:3], ("tgt", "tgt", "memory"), strict=True):
        assert (tensor[paddings[padding]] == 0).all()


def test_static_shapes_on_the_torch_backend_are_padded() -> None:
    stack = decoder(nn, Case("", BATCH_FIRST)).eval()
    inputs = sequences(True)
    packed = stack(**inputs, **BOTH)
    stack.static_shapes = True
    with backend("torch"):
        assert not stack.packs(inputs["tgt"])
        assert torch.allclose(stack(**inputs, **BOTH), packed, atol=1e-5)


@pytest.mark.parametrize("name", ["triton", "torch"])
def test_alone_packed_and_padded_agree(name: Any, device: str) -> None:
    """By the caller packed the bits are those of the padded batch; alone, products differ."""
    stack = decoder(nn, Case("", {"norm_first": True, **BATCH_FIRST}, norm=True)).to(device).eval()
    inputs = {n: x.to(device) for n, x in sequences(True).items()}
    masks = beside(inputs["tgt"], {**BOTH, **IS_CAUSAL})
    with backend(name), torch.no_grad():
        padded = stack(**inputs, **masks)
        packings = [functional.Packing.of(~masks[f"{n}_key_padding_mask"]) for n in inputs]
        rows = [functional.pack(x, p) for x, p in zip(inputs.values(), packings, strict=True)]
        packed = stack.forward_packed(
            rows[0], packings[0], rows[1], packings[1], tgt_is_causal=True
        )
        assert torch.equal(functional.unpack(packed, packings[0]), padded)
        for i in range(N):
            own = [inputs[n][i][~masks[f"{n}_key_padding_mask"][i]] for n in inputs]
            length = own[0].shape[0]
            alone = stack(*own, tgt_mask=masks["tgt_mask"][:length, :length], tgt_is_causal=True)
            assert torch.allclose(alone, padded[i, :length], atol=1e-5)


def test_a_sequence_without_memory(device: str) -> None:
    """Attention to nothing is 0, with finite gradients."""
    stack = decoder(nn, Case("", BATCH_FIRST)).to(device)
    inputs = {n: x.to(device).requires_grad_() for n, x in sequences(True).items()}
    nothing = of_memory.clone().to(device)
    nothing[1] = True
    output = stack(**inputs, memory_key_padding_mask=nothing)
    grads = torch.autograd.grad(output, list(inputs.values()), torch.randn_like(output))
    assert output.isfinite().all() and all(g.isfinite().all() for g in grads)
    assert (grads[1][nothing] == 0).all() and grads[1][~nothing].any()


def test_memory_gradients_are_added_up_over_layers() -> None:
    """The memory is handed from layer to layer; used elsewhere too, its gradient is whole."""
    for norm_first in (False, True):
        case = Case("", {"norm_first": norm_first, **BATCH_FIRST})
        ours, stock = decoder(nn, case).double(), decoder(torch.nn, case).double()
        ours.load_state_dict(stock.state_dict())
        found = []
        for module in (ours, stock):
            torch.manual_seed(0)
            inputs = {n: x.double().requires_grad_() for n, x in sequences(True).items()}
            memory = inputs["memory"] * 2
            with backend("torch"):
                output = module(inputs["tgt"], memory) + memory.sum()
            dy = torch.randn_like(output)
            found.append(torch.autograd.grad(output, list(inputs.values()), dy))
        assert all(map(torch.allclose, *found))


CHANGES: dict[str, Callable[[Any], Any]] = {
    "a hook": lambda la: la.multihead_attn.register_forward_hook(lambda m, a, o: (o[0] * 2, o[1])),
    "another norm": lambda la: setattr(la, "norm2", torch.nn.Identity()),
    "keys appended": lambda la: setattr(
        la, "self_attn", type(la.self_attn)(D, H, add_bias_kv=True, batch_first=True)
    ),
    "a replaced forward": lambda la: setattr(la.linear2, "forward", lambda x: x[..., :D]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_children_are_called(change: str) -> None:
    for norm_first in (False, True):
        make = {"norm_first": norm_first, **BATCH_FIRST}
        ours, stock = layer(nn, **make), layer(torch.nn, **make)
        ours.load_state_dict(stock.state_dict())
        for module in (ours, stock):
            torch.manual_seed(1)
            CHANGES[change](module)
        inputs = sequences(True)
        assert not ours._can_pack()
        assert torch.allclose(ours(**inputs), stock(**inputs), atol=1e-5)
        stack = nn.TransformerDecoder(ours, 1)
        if change != "a replaced forward":  # torch deep-copies the layer, and with it the lambda
            assert torch.allclose(stack(**inputs), stock(**inputs), atol=1e-5)


@pytest.mark.parametrize("place", ["self_attn", "multihead_attn", "", "1", "2", "3"])
def test_each_dropout_acts_in_training(place: str) -> None:
    for norm_first in (False, True):
        one = layer(nn, norm_first=norm_first, **BATCH_FIRST)
        inputs, before = sequences(True), None
        before = one(**inputs)
        if place.endswith("attn"):
            getattr(one, place).dropout = 0.5
        else:
            getattr(one, f"dropout{place}").p = 0.5
        torch.manual_seed(1)
        first = one(**inputs)
        torch.manual_seed(1)
        assert torch.equal(one(**inputs), first) and not torch.allclose(first, before)
        assert torch.allclose(one.eval()(**inputs), before)


def test_checkpoint_activation_changes_no_bit() -> None:
    plain = layer(nn, dropout=0.2, **BATCH_FIRST)
    again = copy.deepcopy(plain)
    again.checkpoint_activation = True
    inputs, found = sequences(True), []
    for one in (plain, again):
        torch.manual_seed(2)
        output = one(**inputs)
        dy = torch.randn(output.shape, generator=torch.Generator().manual_seed(0))
        found.append([output, *torch.autograd.grad(output, list(one.parameters()), dy)])
    assert all(map(torch.equal, *found))


# Transformer


def test_transformer_parity(assert_module_parity: Callable[..., None]) -> None:
    masks = {
        "tgt_mask": causal, "src_key_padding_mask": of_memory,
        "memory_key_padding_mask": of_memory, "tgt_key_padding_mask": ragged,
        "src_mask": torch.nn.Transformer.generate_square_subsequent_mask(S),
    }  # fmt: skip
    make: Any = dict(
        d_model=D,
        nhead=H,
        num_encoder_layers=1,
        num_decoder_layers=1,
        dim_feedforward=FF,
        dropout=0.0,
        activation="gelu",
        batch_first=True,
    )

    def call(module: torch.nn.Module, src: Tensor, tgt: Tensor) -> Tensor:
        output: Tensor = module(src, tgt, **beside(src, masks))
        return output.masked_fill(ragged.to(src.device)[..., None], 0.0)

    inputs = {"src": torch.randn(N, S, D), "tgt": torch.randn(N, T, D)}
    ours, stock = nn.Transformer(**make), torch.nn.Transformer(**make)
    assert_module_parity(ours, stock, call, inputs, torch.float32)


SEEN: dict[str, tuple[Tensor, Tensor | None]] = {
    "no mask of memory": (of_memory, None),
    "a mask of less": (of_memory, of_memory & (torch.arange(S) > S - 2)),
    "an equal mask": (of_memory, of_memory.clone()),
    "floating": (torch.zeros(N, S).masked_fill(of_memory, -torch.inf), None),
}


@pytest.mark.parametrize("seen", SEEN)
@pytest.mark.parametrize("make", [{"batch_first": True}, {"norm_first": True}], ids=str)
def test_padding_that_the_decoder_of_a_transformer_sees_is_computed(
    seen: str, make: dict[str, Any], assert_module_parity: Callable[..., None]
) -> None:
    """Where memory_key_padding_mask leaves it in, as models were trained by torch."""
    padding, of_its_memory = SEEN[seen]

    def call(module: torch.nn.Module, src: Tensor, tgt: Tensor) -> Tensor:
        masks = {"src_key_padding_mask": padding, "memory_key_padding_mask": of_its_memory}
        output: Tensor = module(src, tgt, **beside(src, masks))
        return output

    inputs = {"src": torch.randn(N, S, D), "tgt": torch.randn(N, T, D)}
    if "batch_first" not in make:
        inputs = {name: x.transpose(0, 1) for name, x in inputs.items()}
    sizes: Any = (D, H, 1, 1, FF, 0.0)
    ours, stock = nn.Transformer(*sizes, **make), torch.nn.Transformer(*sizes, **make)
    assert_module_parity(ours, stock, call, inputs, torch.float32)


@pytest.mark.parametrize("of_its_memory", [of_memory, of_memory.clone()], ids=["same", "equal"])
def test_padding_that_is_masked_twice_is_not_computed(of_its_memory: Tensor) -> None:
    module = nn.Transformer(D, H, 1, 1, FF, 0.0, batch_first=True)
    src = torch.randn(N, S, D).masked_fill(of_memory[..., None], torch.nan)
    output = module(
        src, torch.randn(N, T, D), src_key_padding_mask=of_memory,
        memory_key_padding_mask=of_its_memory,
    )  # fmt: skip
    assert output.isfinite().all()


def test_an_encoder_called_alone_computes_padding_if_asked() -> None:
    torch.manual_seed(0)
    settings = (D, H, FF, 0.0)
    stock = torch.nn.TransformerEncoder(
        torch.nn.TransformerEncoderLayer(*settings, batch_first=True), 2
    )
    ours = nn.TransformerEncoder(nn.TransformerEncoderLayer(*settings, batch_first=True), 2)
    ours.load_state_dict(stock.state_dict())
    src = torch.randn(N, S, D)
    truth = stock.double()(src.double(), src_key_padding_mask=of_memory).float()
    asked = ours(src, src_key_padding_mask=of_memory, compute_padding=True)
    torch.testing.assert_close(asked, truth, rtol=1e-4, atol=1e-5)
    ours.compute_padding = True
    assert torch.equal(ours(src, src_key_padding_mask=of_memory), asked)
    zeros = ours(src, src_key_padding_mask=of_memory, compute_padding=False)
    assert not zeros[of_memory].any()


def test_custom_parts_and_bad_batches() -> None:
    encoder, stack = torch.nn.Identity(), torch.nn.Identity()
    module = nn.Transformer(D, H, custom_encoder=encoder, custom_decoder=stack)
    assert module.encoder is encoder and module.decoder is stack
    module = nn.Transformer(D, H, 1, 1, FF, batch_first=True)
    src, tgt = torch.randn(N, S, D), torch.randn(N, T, D)
    with pytest.raises(ValueError, match="'src' and 'tgt' to have the same batch"):
        module(src, tgt[:2])
    with pytest.raises(ValueError, match="'src' and 'tgt' to have the same batch"):
        module(src[0], tgt)
    with pytest.raises(ValueError, match="dimension of 'tgt' to be d_model=16"):
        module(src, tgt[..., :8])


BAD_CALLS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"memory": torch.randn(2, S, D)}, ValueError, r"'memory' to have the batch of 'tgt'"),
    ({"memory": torch.randn(N, S, 8)}, ValueError, "last dimension of 'memory' to be 16"),
    ({"memory": torch.randn(S, D)}, ValueError, "'memory' to have the batch of 'tgt'"),
    ({"tgt": torch.randn(N, T, 3, D)}, ValueError, "'tgt' to be 3-D"),
    ({"memory": None}, TypeError, "'memory' must be Tensor"),
    ({"memory": torch.randn(N, S, D).double()}, TypeError, "'memory' to have the dtype"),
    ({"tgt_mask": causal[:3]}, ValueError, r"'tgt_mask' to have shape \(6, 6\)"),
    ({"memory_mask": causal}, ValueError, r"'memory_mask' to have shape \(6, 5\)"),
    ({"memory_key_padding_mask": ragged}, ValueError, "'memory_key_padding_mask' to have shape"),
    ({"tgt_key_padding_mask": of_memory}, ValueError, "'tgt_key_padding_mask' to have shape"),
    ({"tgt_key_padding_mask": ragged.long()}, TypeError, "'tgt_key_padding_mask' to be boolean"),
    ({"tgt_is_causal": True}, ValueError, "is_causal=True is a hint that 'tgt_mask'"),
    ({"memory_is_causal": True}, ValueError, "is_causal=True is a hint that 'memory_mask'"),
]


@pytest.mark.parametrize(("changes", "error", "message"), BAD_CALLS)
@pytest.mark.parametrize("kind", ["layer", "stack", "padded stack"])
def test_bad_calls_name_the_argument(
    kind: str, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    one = layer(nn, **BATCH_FIRST)
    module = one if kind == "layer" else nn.TransformerDecoder(one, 1)
    masks = BOTH if kind == "padded stack" else {}
    with pytest.raises(error, match=message):
        module(**{**sequences(True), **masks, **changes})


def test_bad_construction_and_packed_calls() -> None:
    bad: Any = "layer"
    with pytest.raises(TypeError, match="'decoder_layer' to be a Module, but got str"):
        nn.TransformerDecoder(bad, 1)
    with pytest.raises(ValueError, match="'num_layers' to be at least 0"):
        nn.TransformerDecoder(layer(nn), -1)
    with pytest.raises(ValueError, match="'activation' to be 'relu', 'gelu' or a callable"):
        layer(nn, activation="tanh")
    with pytest.raises(ValueError, match="'nhead'"):
        layer(nn, nhead=3)
    stack = nn.TransformerDecoder(layer(nn, **BATCH_FIRST), 1)
    whole = functional.Packing.of(torch.ones(N, T, dtype=torch.bool))
    fewer = functional.Packing.of(torch.ones(2, S, dtype=torch.bool))
    rows = torch.randn(N * T, D)
    with pytest.raises(ValueError, match=r"'memory' to have shape \[18, width\]"):
        stack.forward_packed(rows, whole, rows[1:], whole)
    with pytest.raises(ValueError, match="as many sequences, but got 3 and 2"):
        stack.forward_packed(rows, whole, rows[: 2 * S], fewer)
    stack.layers[0].linear1.register_forward_hook(lambda *args: None)
    with pytest.raises(ValueError, match="without hooks"):
        stack.forward_packed(rows, whole, rows, whole)


def test_traced_with_padding_without_a_graph_break() -> None:
    stack = decoder(nn, Case("", BATCH_FIRST, norm=True)).eval()
    inputs = sequences(True)
    with backend("torch"), torch.no_grad():
        wanted = stack(**inputs, **BOTH)
        traced = torch.compile(stack, backend="aot_eager", fullgraph=True)
        assert torch.allclose(traced(**inputs, **BOTH), wanted, atol=1e-5)
