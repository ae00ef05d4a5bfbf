"""Rows of the output on request, jagged batches, and packing with static shapes."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from fusedformer import backend, nn
from fusedformer.nn.multihead_attention import MultiheadAttention

D, H, N, S = 16, 2, 4, 7
CAUSAL = torch.nn.Transformer.generate_square_subsequent_mask(S)
LENGTHS = [S, 2, 0, 5]
PADDING: dict[str, Tensor | None] = {
    "right": torch.arange(S) >= torch.tensor(LENGTHS)[:, None],
    "left": torch.arange(S) < torch.tensor([[0], [4], [7], [1]]),
    "holes": torch.tensor([[0, 1, 0, 1, 1, 0, 0]] * 2 + [[1] * 7, [0] * 7]).bool(),
    "none": None,
}
WANTED: dict[str, Tensor] = {
    "first": torch.zeros(N, 1, dtype=torch.int64),
    "two columns": torch.tensor([[0, 3], [1, 1], [5, 0], [6, 2]]),
    "some": torch.tensor([[0, 1, 0, 0, 0, 0, 1], [1] * 7, [0, 1, 0, 0, 0, 0, 0], [0] * 7]).bool(),
    "no row": torch.zeros(N, S, dtype=torch.bool),
}


def encoder(dropout: float = 0.0, layers: int = 2, **settings: Any) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(D, H, 24, dropout, batch_first=True, **settings)
    return nn.TransformerEncoder(layer, layers, nn.LayerNorm(D))


def chosen(output: Tensor, rows: Tensor) -> Tensor:
    if rows.dtype == torch.bool:
        return output[rows]
    return output.take_along_dim(rows[..., None], 1)


def close(a: Tensor, b: Tensor) -> bool:
    """Products of other sizes round otherwise."""
    return torch.allclose(a, b, rtol=1e-4, atol=1e-5)


ROWS = [
    *itertools.product(PADDING, WANTED, (False, True), (False, True), ("torch",)),
    *(("holes", wanted, False, False, "triton") for wanted in WANTED),
    ("right", "two columns", True, False, "triton"),
    ("right", "some", True, True, "triton"),
]


@pytest.mark.parametrize(("padding", "wanted", "norm_first", "causal", "name"), ROWS)
def test_rows_of_the_output(
    padding: str, wanted: str, norm_first: bool, causal: bool, name: Any, device: str
) -> None:
    """As if all had been computed, with the same gradients; rows of padding are zeros."""
    stack = encoder(norm_first=norm_first).to(device)
    mask = PADDING[padding]
    settings: dict[str, Any] = {
        "src_key_padding_mask": None if mask is None else mask.to(device),
        "mask": CAUSAL.to(device) if causal else None,
    }
    rows = WANTED[wanted].to(device)
    src = torch.randn(N, S, D, device=device, requires_grad=True)
    with backend(name):
        whole = chosen(stack(src, **settings), rows)
        only = stack(src, output_rows=rows, **settings)
    assert only.shape == whole.shape and close(only, whole)
    assert (only[whole == 0] == 0).all()
    dy = torch.randn_like(whole)
    leaves = [src, *stack.parameters()]
    for got, want in zip(
        torch.autograd.grad(only, leaves, dy), torch.autograd.grad(whole, leaves, dy), strict=True
    ):
        assert close(got, want)


def test_the_last_layer_computes_only_these_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = []
    linear1 = torch.nn.functional.linear

    def spy(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        rows.append((x.shape[0], weight.shape[0]))
        return linear1(x, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", spy)
    padding = PADDING["right"]
    assert padding is not None
    with backend("torch"), torch.no_grad():
        encoder()(torch.randn(N, S, D), src_key_padding_mask=padding, output_rows=WANTED["first"])
    tokens = sum(LENGTHS)
    first = [(tokens, 3 * D), (tokens, D), (tokens, 24), (tokens, D)]
    last = [(N, D), (tokens, 2 * D), (N, D), (N, 24), (N, D)]
    assert rows == first + last


def test_rows_where_the_batch_is_not_packed() -> None:
    """Computed wholly, then chosen."""
    stack = encoder().eval()
    src, mask = torch.randn(N, S, D), torch.rand(S, S) > 0.8
    for settings in ({"mask": mask.fill_diagonal_(False)}, {"src_key_padding_mask": CAUSAL[:N]}):
        for rows in WANTED.values():
            with backend("torch"):
                only = stack(src, output_rows=rows, **settings)
                assert torch.equal(only, chosen(stack(src, **settings), rows))
    alone = stack(src[0], output_rows=WANTED["first"][:1])
    assert close(alone, stack(src[0])[None, :1])


def test_rows_of_sequence_first_input_are_batch_first() -> None:
    stack = encoder().eval()
    first = nn.TransformerEncoder(nn.TransformerEncoderLayer(D, H, 24), 2, nn.LayerNorm(D)).eval()
    first.load_state_dict(stack.state_dict())
    src = torch.randn(N, S, D)
    for rows in WANTED.values():
        for padding in PADDING.values():
            settings = {"src_key_padding_mask": padding, "output_rows": rows}
            with backend("torch"):
                assert close(first(src.transpose(0, 1), **settings), stack(src, **settings))


@pytest.mark.parametrize("name", ["triton", "torch"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_jagged_in_and_out(training: bool, causal: bool, name: Any, device: str) -> None:
    """The bits of the padded batch, gradients and dropout included."""
    stack = encoder(0.3).to(device).train(training)
    padding = PADDING["right"]
    assert padding is not None
    padding = padding.to(device)
    src = torch.randn(N, S, D, device=device)
    parts = [src[i, :length].clone().requires_grad_() for i, length in enumerate(LENGTHS)]
    leaf = src.clone().requires_grad_()
    settings = {"mask": CAUSAL.to(device), "is_causal": True} if causal else {}
    with backend(name):
        torch.manual_seed(2)
        padded = stack(leaf, src_key_padding_mask=padding, **settings)
        torch.manual_seed(2)
        jagged = torch.nested.as_nested_tensor(parts, layout=torch.jagged)
        output = stack(jagged, **settings)
    assert output.is_nested and output.layout == torch.jagged
    assert output.to_padded_tensor(0.0).shape == (N, max(LENGTHS), D)
    assert torch.equal(output.values(), padded[~padding])
    dy = torch.randn_like(padded)
    wanted = torch.autograd.grad(padded, [leaf, *stack.parameters()], dy)
    found = torch.autograd.grad(output.values(), [*parts, *stack.parameters()], dy[~padding])
    assert torch.equal(torch.cat(found[:N]), wanted[0][~padding])
    assert all(map(torch.equal, found[N:], wanted[1:]))


@pytest.mark.parametrize(("padding", "norm_first"), [("right", False), ("holes", True)])
def test_static_shapes(padding: str, norm_first: bool, device: str) -> None:
    """The same, dropout included, with NaN in the padding and poisoned memory; nothing asked."""
    stack = encoder(0.3, norm_first=norm_first).to(device)
    mask = PADDING[padding]
    assert mask is not None
    mask = mask.to(device)
    src = torch.randn(N, S, D, device=device).masked_fill(mask[..., None], torch.nan)
    dy = torch.randn(N, S, D, device=device)
    columns = WANTED["two columns"].to(device)
    outputs, grads = [], []
    for static in (False, True):
        stack.static_shapes = static
        for settings in ({}, {"output_rows": columns}):
            leaf = src.clone().requires_grad_()
            torch.manual_seed(3)
            with backend("triton"):
                output = stack(leaf, src_key_padding_mask=mask, **settings)
            outputs.append(output)
            flat = dy.flatten()[: output.numel()].view_as(output)
            grads.append(torch.autograd.grad(output, [leaf, *stack.parameters()], flat))
    for i in (0, 1):
        assert close(outputs[i], outputs[i + 2])
        assert all(map(close, grads[i], grads[i + 2]))
    rows = WANTED["some"].to(device)
    with backend("triton"), pytest.raises(ValueError, match="output_rows"):
        stack(src, src_key_padding_mask=mask, output_rows=rows)


def test_static_shapes_on_the_torch_backend_are_padded() -> None:
    stack, mask = encoder().eval(), PADDING["right"]
    src = torch.randn(N, S, D)
    with backend("torch"):
        packed = stack(src, src_key_padding_mask=mask)
        stack.static_shapes = True
        assert close(stack(src, src_key_padding_mask=mask), packed)


def test_traced_kernels_pack_with_static_shapes(
    monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    """Without a graph break; traced attention sees packed rows."""
    stack, mask = encoder().to(device).eval(), PADDING["right"]
    assert mask is not None
    src = torch.randn(N, S, D, device=device)
    shapes = []
    attend = MultiheadAttention._attend_to_itself

    def spy(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        shapes.append(x.shape)
        return attend(self, x, *args, **kwargs)

    monkeypatch.setattr(MultiheadAttention, "_attend_to_itself", spy)
    with backend("triton"):
        eager = stack(src, src_key_padding_mask=mask.to(device))
        traced = torch.compile(stack, fullgraph=True, backend="aot_eager")(
            src, src_key_padding_mask=mask.to(device)
        )
    assert close(eager, traced)
    assert {len(shape) for shape in shapes} == {2}


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_autocast_on_the_cpu(training: bool, norm_first: bool) -> None:
    """bfloat16 products with a padding mask, where torch's encoder crashes in inference."""
    stack = encoder(norm_first=norm_first).train(training)
    src, mask = torch.randn(N, S, D), PADDING["right"]
    assert mask is not None
    leaves = [src.requires_grad_(), *stack.parameters()]
    dy = torch.randn(N, S, D)
    exact = stack(src, src_key_padding_mask=mask)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = stack(src, src_key_padding_mask=mask)
        with torch.no_grad():
            assert torch.equal(stack(src, src_key_padding_mask=mask), narrow)
    assert narrow.dtype == torch.float32
    assert 0 < (narrow - exact).norm() < 0.02 * exact.norm()
    grads = zip(
        torch.autograd.grad(narrow, leaves, dy), torch.autograd.grad(exact, leaves, dy), strict=True
    )
    for got, want in grads:
        assert got.dtype == want.dtype
        assert (got - want).norm() < 0.04 * want.norm()


def test_rows_of_a_stack_of_one_layer_several_times() -> None:
    """Only the last call computes the rows alone, though all calls are of the same module."""
    stack = encoder().eval()
    stack.layers[1] = stack.layers[0]
    src = torch.randn(N, S, D)
    with backend("torch"):
        whole = stack(src)
        for rows in WANTED.values():
            assert close(stack(src, output_rows=rows), chosen(whole, rows))
