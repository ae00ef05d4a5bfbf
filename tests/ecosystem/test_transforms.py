"""torch.func: what works on each backend, and the errors where it does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fusedformer import backend, nn
from fusedformer import functional as F


def by_token(loss: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
    """The loss of each token with class 1, as wide as the input."""

    def call(x: Tensor) -> Tensor:
        target = torch.ones(x.shape[:-1], dtype=torch.int64, device=x.device)
        return loss(x, target, reduction="none")[..., None].expand_as(x)

    return call


def rotated(x: Tensor) -> Tensor:
    heads = x.reshape(-1, 1, 5, 8)
    cos, sin = torch.linspace(-1, 1, 40, device=x.device).view(2, 5, 4).unbind()
    return F.rotary_embedding(heads, heads, cos, sin)[0].reshape(x.shape)


OPS: dict[str, Callable[[Tensor], Any]] = {
    "softmax": lambda x: F.softmax(x, -1),
    "layer_norm": lambda x: F.layer_norm(x, (8,)),
    "rms_norm": lambda x: F.rms_norm(x, (8,)),
    "dropout_scale_add": lambda x: F.dropout_scale_add(x, x.tanh(), x.flatten(0, -2)[0]),
    "bias_activation": lambda x: F.bias_activation(x, None, "gelu"),
    "rotary_embedding": lambda x: rotated(x).tanh(),
    "gated_activation": lambda x: F.gated_activation(torch.cat((x, x.flip(-1)), -1)),
    "scaled_dot_product_attention": lambda x: F.scaled_dot_product_attention(x, x, x),
    "cross_entropy": by_token(lambda x, *t, **k: F.cross_entropy(x.movedim(-1, 1), *t, **k)),
    "linear_cross_entropy": by_token(
        lambda x, t, **k: F.linear_cross_entropy(x, torch.eye(9, 8, device=x.device), t, **k)
    ),
}


@pytest.mark.parametrize("op", OPS)
def test_vjp(op: str, device: str) -> None:
    x, dy = torch.randn(2, 1, 3, 5, 8, device=device)
    with backend("torch"):
        vjp = torch.func.vjp(OPS[op], x)[1]
        (got,) = vjp(dy)
        leaf = x.clone().requires_grad_()
        (want,) = torch.autograd.grad(OPS[op](leaf), leaf, dy)
    # Elsewhere these are computed in chunks or by C++.
    if op in ("linear_cross_entropy", "scaled_dot_product_attention") or "norm" in op:
        torch.testing.assert_close(got, want)
    else:
        assert torch.equal(got, want)
    with backend("triton"), pytest.raises(RuntimeError, match=r"torch.func.*backend\('torch'\)"):
        torch.func.vjp(OPS[op], x)


@pytest.mark.parametrize("op", OPS)
def test_jvp(op: str, device: str) -> None:
    """Along a direction the derivative of <dy, y> is that of the gradient with it."""
    x, direction, dy = torch.randn(3, 1, 3, 5, 8, device=device)
    with backend("triton"), pytest.raises(RuntimeError, match=r"torch.func.*backend\('torch'\)"):
        torch.func.jvp(OPS[op], (x,), (direction,))
    if op == "scaled_dot_product_attention":  # ATen's attention has no forward derivative
        return
    with backend("torch"):
        moved = torch.func.jvp(OPS[op], (x,), (direction,))[1]
        vjp = torch.func.vjp(OPS[op], x)[1]
    assert torch.allclose((moved * dy).sum(), (vjp(dy)[0] * direction).sum(), atol=1e-4)


def test_a_gradient_by_parameters_and_of_a_mapped_function(device: str) -> None:
    """The error comes whichever argument is differentiated and whatever is inside."""
    x, weight = torch.randn(2, 5, 8, device=device), torch.randn(8, device=device)

    def loss(weight: Tensor) -> Tensor:
        return torch.func.vmap(lambda each: F.layer_norm(each, (8,), weight))(x).square().sum()

    with backend("triton"), pytest.raises(RuntimeError, match=r"torch\.func"):
        torch.func.grad(loss)(weight)
    with backend("torch"):
        assert torch.func.grad(loss)(weight).isfinite().all()


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("name", ["triton", "torch"])
def test_vmap(op: str, name: Any, device: str) -> None:
    x = torch.randn(3, 1, 2, 5, 8, device=device)
    with backend(name):
        got = torch.func.vmap(OPS[op])(x)
        want = torch.stack([OPS[op](each) for each in x])
    assert torch.allclose(got, want, atol=1e-6)


@pytest.mark.parametrize("name", ["triton", "torch"])
def test_a_gradient_outside_of_vmap(name: Any, device: str) -> None:
    """What is mapped hides that a gradient will be asked for, and is kept all the same."""
    x, residual, dy = torch.randn(3, 3, 4, 16, device=device).unbind()

    def gradients(mapped: bool) -> tuple[Tensor, ...]:
        leaves = [x.clone().requires_grad_(), residual.clone().requires_grad_()]
        each = lambda x, residual: F.dropout_add_layer_norm(F.rms_norm(x, (16,)), residual, (16,))
        call = torch.func.vmap(each) if mapped else each
        return torch.autograd.grad(call(*leaves), leaves, dy)

    with backend(name):
        pairs = zip(gradients(True), gradients(False), strict=True)
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in pairs)


@pytest.mark.parametrize("op", OPS)
def test_double_backward(op: str, device: str) -> None:
    x = torch.randn(1, 2, 5, 8, device=device, requires_grad=True)

    def twice(name: Any) -> Tensor:
        with backend(name):
            output = OPS[op](x)
            (first,) = torch.autograd.grad(output, x, output.detach(), create_graph=True)
            return torch.autograd.grad(first.square().sum(), x)[0]

    with pytest.raises(RuntimeError, match=r"backend\('torch'\)"):
        twice("triton")
    if op != "scaled_dot_product_attention":
        assert twice("torch").isfinite().all()


V, N, S, E = 2, 3, 5, 8  # batches, each of sequences
PADDING = torch.arange(S) >= torch.tensor([[5, 2, 3], [1, 4, 5]])[..., None]
TARGET = torch.tensor([[0, 3, 7, -100, 1], [2, 2, 5, 6, -100]])
Make = Callable[[Any], torch.nn.Module]
Call = Callable[..., Tensor]


def encoder_layer(library: Any) -> torch.nn.Module:
    layer: torch.nn.Module = library.TransformerEncoderLayer(E, 2, 12, batch_first=True)
    return layer


def with_zeros(output: Tensor, padding: Tensor) -> Tensor:
    return output.masked_fill(padding[..., None], 0.0)


# What to make of a library, how to call it on one of the mapped batches, and what is mapped.
MAPPED: dict[str, tuple[Make, Call, tuple[Tensor, ...]]] = {
    "encoder": (
        lambda lib: lib.TransformerEncoder(encoder_layer(lib), 1, enable_nested_tensor=False),
        lambda m, x, p: with_zeros(m(x, src_key_padding_mask=p), p), (PADDING,),
    ),
    "encoder, pre-norm, causal": (
        lambda lib: lib.TransformerEncoder(
            lib.TransformerEncoderLayer(E, 2, 12, 0.0, "gelu", norm_first=True, batch_first=True),
            1, enable_nested_tensor=False,
        ),
        lambda m, x, p: with_zeros(
            m(x, torch.ones(S, S).triu(1) > 0, src_key_padding_mask=p, is_causal=True), p
        ), (PADDING,),
    ),
    "encoder layer": (
        encoder_layer, lambda m, x, p: m(x, src_key_padding_mask=p), (PADDING,)
    ),
    "decoder": (
        lambda lib: lib.TransformerDecoder(
            lib.TransformerDecoderLayer(E, 2, 12, batch_first=True), 1
        ),
        lambda m, x, p: with_zeros(
            m(x, x, tgt_key_padding_mask=p, memory_key_padding_mask=p), p
        ), (PADDING,),
    ),
    "attention": (
        lambda lib: lib.MultiheadAttention(E, 2, batch_first=True),
        lambda m, x, p: m(x, x, x, key_padding_mask=p, need_weights=False)[0], (PADDING,),
    ),
    "attention weights": (
        lambda lib: lib.MultiheadAttention(E, 2, batch_first=True),
        lambda m, x, p: torch.cat(m(x, x, x, key_padding_mask=p), -1), (PADDING,),
    ),
    "layer norm": (lambda lib: lib.LayerNorm(E), lambda m, x: m(x), ()),
    "RMS norm": (lambda lib: lib.RMSNorm(E), lambda m, x: m(x), ()),
    "softmax": (lambda lib: lib.Softmax(-1), lambda m, x: m(x), ()),
    "cross entropy": (
        lambda lib: lib.CrossEntropyLoss(label_smoothing=0.1),
        lambda m, x, t: m(x.mean(0), t)[None], (TARGET,),
    ),
}  # fmt: skip


def vmapped(call: Call, x: Tensor, others: tuple[Tensor, ...], leaves: list[Tensor]) -> Any:
    output = torch.func.vmap(call)(x, *others)
    return output, *torch.autograd.grad(output, leaves, drawn(output.shape))


def of_each_sample(call: Call, x: Tensor, others: tuple[Tensor, ...], leaves: list[Tensor]) -> Any:
    dy = drawn(call(x[0], *(other[0] for other in others)).shape)

    def loss(x: Tensor, *others: Tensor) -> Tensor:
        return (call(x, *others) * dy).sum()

    return torch.func.vmap(torch.func.grad(loss))(x.detach(), *others)


def jacobian(call: Call, x: Tensor, others: tuple[Tensor, ...], leaves: list[Tensor]) -> Any:
    own = [other[0] for other in others]
    return torch.autograd.functional.jacobian(lambda x: call(x, *own), x[0], vectorize=True)


def batched(call: Call, x: Tensor, others: tuple[Tensor, ...], leaves: list[Tensor]) -> Any:
    output = call(x[0], *(other[0] for other in others))
    return torch.autograd.grad(output, leaves, drawn((3, *output.shape)), is_grads_batched=True)


def mapped_gradients(
    call: Call, x: Tensor, others: tuple[Tensor, ...], leaves: list[Tensor]
) -> Any:
    output = call(x[0], *(other[0] for other in others))
    find = lambda dy: torch.autograd.grad(output, leaves, dy, retain_graph=True)
    return torch.func.vmap(find)(drawn((3, *output.shape)))


def drawn(shape: Any) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


WAYS: dict[str, Callable[..., Any]] = {
    "vmap": vmapped, "gradients of each sample": of_each_sample, "jacobian": jacobian,
    "batched gradients": batched, "mapped gradients": mapped_gradients,
}  # fmt: skip
# The interpreter takes seconds for what is mapped: a loop over kernels.
ON_TRITON = {
    ("encoder", "vmap"), ("encoder layer", "batched gradients"), ("layer norm", "jacobian"),
    ("cross entropy", "mapped gradients"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize(
    ("case", "way", "name"),
    [
        *((case, way, "torch") for case in MAPPED for way in WAYS),
        *(
            pytest.param(*pair, "triton", marks=pytest.mark.interpreter)
            for pair in sorted(ON_TRITON)
        ),
    ],
)
def test_padded_batches_and_batches_of_gradients(case: str, way: str, name: Any) -> None:
    """As stock, masks mapped; batches of gradients are torch.vmap's and autograd's own."""
    make, call, others = MAPPED[case]
    stock, ours = make(torch.nn).eval(), make(nn).eval()
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    ours.load_state_dict(stock.state_dict())
    x = torch.randn(V, N, S, E, requires_grad=True)

    def found(module: torch.nn.Module) -> list[Tensor]:
        own = lambda *args: call(module, *args)
        results = WAYS[way](own, x, others, [x, *module.parameters()])
        return [results] if isinstance(results, Tensor) else list(results)

    want = found(stock)
    with backend(name):
        got = found(ours)
    for a, b in zip(got, want, strict=True):
        assert torch.allclose(a, b, atol=2e-5) and b.any()


def test_functional_attention_of_mapped_masks() -> None:
    """Queries of some batches see nothing; boolean and added masks, and lengths."""
    q, k, v = torch.randn(3, V, N, 2, S, E).unbind()
    boolean = torch.rand(V, N, 1, S, S) > 0.4
    boolean[1, 0, 0, 2] = False
    added = torch.randn(V, N, 1, S, S).masked_fill(~boolean, -torch.inf)
    lengths = torch.tensor([[5, 0, 3], [1, 4, 5]])
    for name, own in (("attn_mask", boolean), ("attn_mask", added), ("key_lengths", lengths)):

        def attend(q: Tensor, k: Tensor, v: Tensor, own: Tensor, name: str = name) -> Tensor:
            given: dict[str, Any] = {name: own}
            return F.scaled_dot_product_attention(q, k, v, **given)

        with backend("torch"):
            got = torch.func.vmap(attend)(q, k, v, own)
            want = torch.stack([attend(*each) for each in zip(q, k, v, own, strict=True)])
        assert torch.allclose(got, want, atol=1e-6)
