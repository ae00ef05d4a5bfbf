"""torch.compile: no graph break, eager's bits, and no more recompilations than shapes demand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import fusedformer
from fusedformer import backend, nn
from fusedformer import functional as F
from fusedformer.parity.cases import Case, all_cases

# Packing.of asks the device how many tokens there are: a graph break, tested below.
CASES = [case for case in all_cases() if case.quick and case.op.name not in ("pack", "unpack")]
N, S, D, H = 3, 9, 16, 2


def inputs_of(case: Case, device: str) -> tuple[dict[str, Any], list[Tensor]]:
    """Arguments of a case, and those with a gradient."""
    made = case.make(torch.Generator().manual_seed(5))
    tensors = {name: tensor.to(device) for name, tensor in made.items()}
    leaves = [t.requires_grad_() for t in tensors.values() if t.is_floating_point()]
    return {**tensors, **case.settings}, leaves


def results(call: Callable[[], Any], leaves: list[Tensor]) -> list[Tensor]:
    """Outputs and gradients, of random output gradients."""
    output = call()
    outputs = [output] if isinstance(output, Tensor) else list(output)
    learned = [o for o in outputs if o.requires_grad]
    generator = torch.Generator(learned[0].device).manual_seed(9)
    grads = [torch.randn(o.shape, generator=generator, device=o.device) for o in learned]
    found = torch.autograd.grad(learned, leaves, grads, allow_unused=True)
    return [*outputs, *(g for g in found if g is not None)]


@pytest.mark.parametrize("name", ["triton", "torch"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.op.name} {case.name}")
def test_every_op(case: Case, dynamic: bool, name: Any, device: str) -> None:
    torch._dynamo.reset()
    given, leaves = inputs_of(case, device)
    compiled = torch.compile(
        case.op.candidate, fullgraph=True, dynamic=dynamic, backend="aot_eager"
    )
    with backend(name):
        eager = results(lambda: case.op.candidate(**given), leaves)
        traced = results(lambda: compiled(**given), leaves)
    assert len(eager) == len(traced)
    if name == "torch" and "norm" in case.op.name:  # eager ones are C++, traced ones ATen
        torch.testing.assert_close(eager, traced)
    else:
        assert all(torch.equal(a, b) for a, b in zip(eager, traced, strict=True))


class Encoder(torch.nn.Module):
    """What is compiled: packing stays outside, as it asks how many tokens there are."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(D, H, 24, 0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, packed: Tensor, packing: F.Packing) -> Tensor:
        return self.encoder.forward_packed(packed, packing)


@pytest.mark.parametrize("name", ["triton", "torch"])
def test_the_packed_encoder_is_compiled_once_for_all_batches(name: Any, device: str) -> None:
    """Whatever the lengths, the number of sequences and the number of tokens."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    stack = Encoder().to(device)
    compiled = torch.compile(stack, fullgraph=True, dynamic=True, backend=counter)
    counts = []  # the first call may analyze twice
    for lengths in ([4, 9, 7], [2, 8, 8, 3], [11, 5]):
        longest = max(lengths)
        keep = torch.arange(longest, device=device) < torch.tensor(lengths, device=device)[:, None]
        packing = F.Packing.of(keep, lengths)
        packed = torch.randn(sum(lengths), D, device=device)
        with backend(name):
            for call in (compiled, stack):
                stack.zero_grad()
                torch.manual_seed(3)
                output = call(packed, packing)
                output.backward(torch.randn_like(output))
                grads = [p.grad.clone() for p in stack.parameters() if p.grad is not None]
                if call is compiled:
                    traced, traced_grads = output, grads
        torch.testing.assert_close(traced, output)
        assert name == "torch" or torch.equal(traced, output)
        pairs = zip(traced_grads, grads, strict=True)
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in pairs)
        counts.append(counter.frame_count)
    assert len(set(counts)) == 1


def test_dropout_of_traced_packed_attention_is_the_same_in_the_backward() -> None:
    """The output is linear in the values: <dy, y> = <dv, v>, if both dropped the same weights."""
    torch._dynamo.reset()
    query, key = torch.randn(2, 12, H, 8)
    value = torch.randn(12, H, 8, requires_grad=True)
    starts = torch.tensor([0, 5, 12], dtype=torch.int32)
    compiled = torch.compile(F.varlen_attention, fullgraph=True, backend="aot_eager")
    with backend("torch"):
        outputs = [compiled(query, key, value, starts, starts, 7, 7, 0.5) for _ in range(2)]
    dy = torch.randn_like(value)
    (dv,) = torch.autograd.grad(outputs[0], value, dy)
    assert torch.allclose((dy * outputs[0]).sum(), (dv * value).sum(), rtol=1e-4)
    assert not torch.equal(*outputs)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_the_padded_encoder(dynamic: bool, device: str) -> None:
    counts = []
    torch._dynamo.reset()
    layer = nn.TransformerEncoderLayer(D, H, 24, 0.0, batch_first=True)
    stack = nn.TransformerEncoder(layer, 2).to(device)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(stack, fullgraph=True, dynamic=dynamic, backend=counter)
    for batch, length in ((3, 9), (2, 7), (5, 8)):
        src = torch.randn(batch, length, D, device=device)
        padding = torch.arange(length, device=device) >= length - torch.arange(batch)[:, None]
        with backend("torch"):
            results = [call(src, src_key_padding_mask=padding) for call in (compiled, stack)]
            dy = torch.randn_like(src)
            grads = [torch.autograd.grad(r, list(stack.parameters()), dy) for r in results]
        assert torch.allclose(results[0], results[1], atol=1e-6)
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*grads, strict=True))
        counts.append(counter.frame_count)
    assert len(set(counts)) == (1 if dynamic else 3)


@pytest.mark.parametrize("name", ["triton", "torch"])
@pytest.mark.parametrize("marked", [False, True], ids=["dynamic", "marked"])
@pytest.mark.parametrize("with_padding", [False, True])
def test_a_transformer_is_compiled_once_for_all_batches(
    with_padding: bool, marked: bool, name: Any, device: str
) -> None:
    torch._dynamo.reset()
    module = nn.Transformer(D, H, 1, 1, 24, 0.0, batch_first=True).to(device)
    counter = CompileCounterWithBackend("eager")
    dynamic = None if marked else True
    compiled = torch.compile(module, fullgraph=True, dynamic=dynamic, backend=counter)
    for batch in (3, 4, 6, 2):
        given = {k: torch.randn(batch, n, D, device=device) for k, n in (("src", 7), ("tgt", 5))}
        if with_padding:
            padding = torch.arange(7, device=device) > torch.arange(batch, device=device)[:, None]
            masks = "src_key_padding_mask", "memory_key_padding_mask"
            given |= {mask: padding.clone() for mask in masks}
        if marked:
            for tensor in given.values():
                torch._dynamo.mark_dynamic(tensor, 0)
        with backend(name):
            got, want = compiled(**given), module(**given)
        assert torch.allclose(got, want, atol=1e-5) and want.abs().max() > 0.5
    assert counter.frame_count == 1


def test_packing_inside_breaks_the_graph_and_is_right() -> None:
    torch._dynamo.reset()

    def packed(input: Tensor, keep: Tensor) -> Tensor:
        return F.pack(input, F.Packing.of(keep))

    input, keep = torch.randn(N, S, D), torch.rand(N, S) > 0.4
    with backend("torch"):
        assert torch.equal(torch.compile(packed, backend="aot_eager")(input, keep), input[keep])


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_a_fused_hugging_face_bert(dynamic: bool) -> None:
    transformers = pytest.importorskip("transformers")
    torch._dynamo.reset()
    config = transformers.BertConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = transformers.BertModel(config)
    fusedformer.fuse(model)
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for length in (9, 12):
        ids = torch.randint(0, 40, (2, length))
        mask = (torch.arange(length) < torch.tensor([[length], [5]])).long()
        with backend("torch"):
            calls = compiled, model  # what they say of padding is their own
            results = [m(ids, attention_mask=mask).last_hidden_state[mask > 0] for m in calls]
            learned = [p for p in model.encoder.parameters() if p.requires_grad]
            dy = torch.randn_like(results[0])
            grads = [torch.autograd.grad(r, learned, dy) for r in results]
        assert torch.allclose(results[0], results[1], atol=1e-5)
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*grads, strict=True))


def test_packed_attention_without_gradients_has_the_bits_of_eager_calls() -> None:
    """Both by the same C++, where there is a compiler for it."""
    torch._dynamo.reset()
    starts = torch.tensor([0, 5, 6, 12], dtype=torch.int32)
    query, key, value = (torch.randn(12, 2, 8) for _ in range(3))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        output: Tensor = F.varlen_attention(q, k, v, starts, starts, 6, 6)
        return output

    with torch.no_grad(), backend("torch"):
        compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")(query, key, value)
        assert torch.equal(compiled, attend(query, key, value))
