"""Tracers: what jit.trace and make_fx record holds for other lengths; our modules are leaves."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import fusedformer
from fusedformer import backend, nn
from fusedformer import functional as F
from fusedformer.models import BertConfig, BertEncoderModel

N, S, D, H = 3, 9, 16, 2
Inputs = tuple[Tensor, ...]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tracing checks on shapes, which stock causes too
        yield


def padding(*lengths: int) -> Tensor:
    return torch.arange(S) >= torch.tensor(lengths)[:, None]


def encoder() -> nn.TransformerEncoder:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(D, H, 24, batch_first=True), 2)


def hugging_face() -> torch.nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=40,
        hidden_size=D,
        num_hidden_layers=2,
        num_attention_heads=H,
        intermediate_size=24,
        max_position_embeddings=16,
    )
    model: torch.nn.Module = transformers.BertModel(config)
    fusedformer.fuse(model)
    return model


class Called(torch.nn.Module):
    def __init__(self, module: torch.nn.Module, call: Callable[..., Tensor]) -> None:
        super().__init__()
        self.module, self.call = module, call

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.call(self.module, *inputs)


X, Y = torch.randn(2, N, S, D, generator=torch.Generator().manual_seed(4)).unbind()
IDS = torch.arange(N * S).view(N, S)
FIRST, SECOND = padding(9, 4, 6), padding(3, 9, 7)
CAUSAL, BAND = torch.ones(2, S, S).triu(1).bool().unbind()
BAND = BAND.triu(3)

# What to make, how to call it, the example, and other inputs.
CASES: dict[str, tuple[Callable[[], torch.nn.Module], Callable[..., Tensor], Inputs, Inputs]] = {
    "encoder": (
        encoder, lambda m, x, p: m(x, src_key_padding_mask=p), (X, FIRST), (Y, SECOND)
    ),
    "encoder, some rows": (
        encoder, lambda m, x, p, rows: m(x, src_key_padding_mask=p, output_rows=rows),
        (X, FIRST, torch.tensor([[0], [1], [0]])), (Y, SECOND, torch.tensor([[2], [5], [1]])),
    ),
    "encoder, a mask that is causal by chance": (
        encoder, lambda m, x, mask, p: m(x, mask, src_key_padding_mask=p), (X, CAUSAL, FIRST),
        (Y, BAND, SECOND),
    ),
    "a query that sees nothing by chance": (
        lambda: nn.MultiheadAttention(D, H, batch_first=True),
        lambda m, x, mask: m(x, x, x, attn_mask=mask, need_weights=False)[0],
        (X, torch.zeros(S, S) > 0), (Y, (torch.arange(S) == 1)[:, None].expand(S, S)),
    ),
    "decoder": (
        lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(D, H, 24, batch_first=True), 1),
        lambda m, x, p, q: m(x, x, tgt_key_padding_mask=p, memory_key_padding_mask=q),
        (X, FIRST, SECOND), (Y, SECOND, FIRST),
    ),
    "transformer": (
        lambda: nn.Transformer(D, H, 1, 1, 24, batch_first=True),
        lambda m, x, p: m(x, x, src_key_padding_mask=p, memory_key_padding_mask=p), (X, FIRST),
        (Y, SECOND),
    ),
    "linear cross entropy": (
        lambda: torch.nn.Linear(D, 30),
        lambda m, x, t: F.linear_cross_entropy(x, m.weight, t, linear_bias=m.bias),
        (X, IDS), (Y, IDS.flip(0).masked_fill(SECOND, -100)),
    ),
    "BERT": (
        lambda: BertEncoderModel(BertConfig(40, D, 1, H, 24, max_position_embeddings=S)),
        lambda m, ids, p: m(ids, attention_mask=~p), (IDS, FIRST), (IDS.flip(0), SECOND),
    ),
    "a fused BERT": (  # what its padded form says of padding is its own
        hugging_face,
        lambda m, ids, p: m(ids, attention_mask=(~p).long()).last_hidden_state[:, :3],
        (IDS, FIRST), (IDS.flip(0), SECOND),
    ),
}  # fmt: skip


def by_jit(module: torch.nn.Module, example: Inputs) -> Any:
    traced = torch.jit.trace(module, example, check_trace=False)
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    return torch.jit.load(file)


def by_make_fx(
    mode: Literal["real", "symbolic"], pre_dispatch: bool
) -> Callable[[torch.nn.Module, Inputs], Any]:
    def trace(module: torch.nn.Module, example: Inputs) -> Any:
        with torch.no_grad():
            return make_fx(
                module, tracing_mode=mode, pre_dispatch=pre_dispatch, _allow_non_fake_inputs=True
            )(*example)

    return trace


TRACERS = {
    "jit": by_jit, "make_fx": by_make_fx("real", False),
    "make_fx, symbolic": by_make_fx("symbolic", False),
    "make_fx, pre-dispatch": by_make_fx("real", True),
}  # fmt: skip


@pytest.mark.parametrize("name", ["torch", "triton"])
@pytest.mark.parametrize("tracer", TRACERS)
@pytest.mark.parametrize("case", CASES)
def test_other_lengths_and_masks(case: str, tracer: str, name: Any, device: str) -> None:
    make, call, example, other = CASES[case]
    module = Called(make().eval(), call).to(device)
    example, other = (tuple(t.to(device) for t in given) for given in (example, other))
    with backend(name):
        traced = TRACERS[tracer](module, example)
        want = module(*other)
        got = traced(*other)
        assert want.abs().max() > 0.5
        assert torch.allclose(got, want, atol=2e-6)
        if tracer == "jit":
            other = tuple(t if t.shape[0] != N else t[:2] for t in other)
            assert torch.allclose(traced(*other), module(*other), atol=2e-6)


@pytest.mark.parametrize("name", ["torch", "triton"])
def test_packing_by_an_examples_lengths_is_refused(name: Any) -> None:
    def packed(x: Tensor, keep: Tensor) -> Tensor:
        return F.pack(x, F.Packing.of(keep))

    with backend(name):
        for trace in (
            lambda: torch.jit.trace(packed, (X, ~FIRST)), lambda: make_fx(packed)(X, ~FIRST),
            lambda: torch.func.vmap(packed)(torch.stack((X, Y)), torch.stack((~FIRST, ~SECOND))),
        ):  # fmt: skip
            with pytest.raises(RuntimeError, match=r"Packing\.of.*static_shapes=True"):
                trace()


class OwnNorm(torch.nn.LayerNorm):
    """A subclass, which fuse makes another subclass of."""


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = torch.nn.TransformerEncoderLayer(D, H, 24, batch_first=True)
        self.norm = OwnNorm(D)
        self.encoder = torch.nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.attention = torch.nn.MultiheadAttention(D, H, batch_first=True)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        x = self.encoder(self.norm(x), src_key_padding_mask=padding)
        output: Tensor = self.attention(x, x, x, padding)[0]
        return output


def test_fused_modules_are_leaves_of_a_symbolic_trace() -> None:
    net = Net().eval()
    fusedformer.fuse(net, strict=True)
    traced = torch.fx.symbolic_trace(net)
    called = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert called == ["norm", "encoder", "attention"]
    for given in ((X, FIRST), (Y, SECOND)):
        assert torch.equal(traced(*given), net(*given))


def test_what_is_no_module_of_ours_is_traced_through() -> None:
    class Twice(nn.LayerNorm):
        def forward(self, input: Tensor) -> Tensor:
            return input * 2

    found = torch.fx.symbolic_trace(torch.nn.Sequential(Twice(D), nn.LayerNorm(D)))
    assert [n.op for n in found.graph.nodes if n.op.startswith("call")] == [
        "call_function", "call_module"
    ]  # fmt: skip


@pytest.mark.parametrize("make", [Net, lambda: OwnNorm(D), lambda: torch.nn.Softmax(-1)])
def test_scripting_says_what_to_do(make: Callable[[], torch.nn.Module]) -> None:
    net = make()
    fusedformer.fuse(net)
    with pytest.raises(TypeError, match=r"torch\.export, torch\.jit\.trace.*unfuse"):
        torch.jit.script(net)
    fusedformer.unfuse(net)
    assert isinstance(torch.jit.script(net), torch.jit.ScriptModule)
