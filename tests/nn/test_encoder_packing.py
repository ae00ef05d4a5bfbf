"""The encoder computes real tokens only, and what it falls back to computes the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fusedformer import backend, functional, nn
from fusedformer.nn.multihead_attention import MultiheadAttention

D, H, N, S = 16, 2, 3, 7
PADDING = torch.arange(S) >= torch.tensor([[S], [2], [5]])


def encoder(dropout: float = 0.0, **settings: Any) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(D, H, 24, dropout, batch_first=True, **settings)
    return nn.TransformerEncoder(layer, 2, nn.LayerNorm(D))


@pytest.fixture
def padded_attention_is_forbidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        pytest.fail("attention ran on the padded batch")

    monkeypatch.setattr(MultiheadAttention, "_attend", fail)


@pytest.mark.usefixtures("padded_attention_is_forbidden")
@pytest.mark.parametrize("name", ["triton", "torch"])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_padding_is_not_computed(training: bool, norm_first: bool, name: Any, device: str) -> None:
    """NaN in it does no harm, forward or backward, with dropout or without."""
    stack = encoder(0.3, norm_first=norm_first).to(device).train(training)
    src = torch.randn(N, S, D, device=device)
    padding = PADDING.to(device)
    dirty = src.masked_fill(padding[..., None], torch.nan)
    outputs, grads = [], []
    for given in (src, dirty):
        leaf = given.clone().requires_grad_()
        torch.manual_seed(3)
        with backend(name):
            output = stack(leaf, src_key_padding_mask=padding)
        dy = torch.randn_like(output, memory_format=torch.contiguous_format)
        grads.append(torch.autograd.grad(output, [leaf, *stack.parameters()], dy))
        outputs.append(output)
    assert torch.equal(*outputs)
    assert (outputs[1][padding] == 0).all()
    assert all(g.isfinite().all() for g in grads[1])
    assert (grads[1][0][padding] == 0).all()


CAUSAL = torch.nn.Transformer.generate_square_subsequent_mask(S)
NOT_PACKED: dict[str, Callable[[nn.TransformerEncoder], dict[str, Any]]] = {
    "a mask that is not causal": lambda stack: {"mask": torch.eye(S).bool().roll(1, 0)},
    "floating padding": lambda stack: {
        "src_key_padding_mask": torch.zeros(N, S).masked_fill(PADDING, -torch.inf)
    },
    "a hook": lambda stack: {"hook": stack.layers[1].register_forward_hook(lambda *args: None)},
    "a hook on a child": lambda stack: {
        "hook": stack.layers[0].linear1.register_forward_hook(lambda *args: None)
    },
}


@pytest.mark.parametrize("reason", NOT_PACKED)
def test_what_cannot_be_packed_is_the_same(reason: str) -> None:
    """Of the real tokens, on the torch backend."""
    stack = encoder().eval()
    src = torch.randn(N, S, D)
    with backend("torch"):
        packed = stack(src, src_key_padding_mask=PADDING)
        settings = NOT_PACKED[reason](stack)
        hook = settings.pop("hook", None)
        output = stack(src, **{"src_key_padding_mask": PADDING, **settings})
    assert (output[PADDING] == 0).all()
    if hook is not None or reason == "floating padding":
        assert torch.allclose(output, packed, atol=1e-6)
    else:
        assert output.isfinite().all()
        assert not torch.allclose(output, packed, atol=1e-3)


def test_causal_and_packed_together() -> None:
    """With holes, the order of tokens is kept."""
    stack = encoder().eval()
    src, holes = torch.randn(1, S, D), torch.tensor([[0, 1, 0, 0, 1, 0, 0]]).bool()
    with backend("torch"):
        output = stack(src, CAUSAL, src_key_padding_mask=holes)
        kept = src[~holes][None]
        alone = stack(kept, torch.nn.Transformer.generate_square_subsequent_mask(kept.shape[1]))
    assert torch.allclose(output[~holes][None], alone, atol=1e-6)


def test_sequence_first_and_empty_batches() -> None:
    layer = nn.TransformerEncoderLayer(D, H, 24, 0.0)
    stack = nn.TransformerEncoder(layer, 1).eval()
    src = torch.randn(S, N, D)
    first = nn.TransformerEncoder(nn.TransformerEncoderLayer(D, H, 24, 0.0, batch_first=True), 1)
    first.load_state_dict(stack.state_dict())
    with backend("torch"):
        output = stack(src, src_key_padding_mask=PADDING)
        other = first.eval()(src.transpose(0, 1), src_key_padding_mask=PADDING)
        assert torch.equal(output, other.transpose(0, 1))
        nobody = stack(src[:, :0], src_key_padding_mask=PADDING[:0])
        assert nobody.shape == (S, 0, D)
        silent = stack(src, src_key_padding_mask=torch.ones(N, S, dtype=torch.bool))
        assert (silent == 0).all()


def test_traced_with_padding_without_a_graph_break() -> None:
    stack = encoder().eval()
    src = torch.randn(N, S, D)
    with backend("torch"):
        eager = stack(src, src_key_padding_mask=PADDING)
        traced: Tensor = torch.compile(stack, fullgraph=True, backend="aot_eager")(
            src, src_key_padding_mask=PADDING
        )
    assert torch.allclose(eager, traced, atol=1e-6)


def test_packed_input_must_fit_the_parameters() -> None:
    """Checked before it is packed, as it would be without padding."""
    stack = encoder()
    with pytest.raises(TypeError, match=r"'src' to have the dtype of the parameters.*float64"):
        stack(torch.randn(N, S, D).double(), src_key_padding_mask=PADDING)
    with pytest.raises(ValueError, match="last dimension of 'src' to be 16"):
        stack(torch.randn(N, S, 8), src_key_padding_mask=PADDING)
    packing, _ = stack.packing(~PADDING)
    with pytest.raises(ValueError, match=r"'input' to have shape \[14, width\]"):
        stack.forward_packed(torch.randn(13, D), packing)
    with pytest.raises(TypeError, match="'input' to have the dtype"):
        stack.forward_packed(torch.randn(14, D).half(), packing)


@pytest.mark.parametrize("name", ["triton", "torch"])
@pytest.mark.parametrize("norm_first", [False, True])
def test_packed_by_the_caller_has_the_bits_of_padded(
    norm_first: bool, name: Any, device: str
) -> None:
    stack = encoder(0.2, norm_first=norm_first).to(device)
    src = torch.randn(N, S, D, device=device)
    padding = PADDING.to(device)
    packing, _ = stack.packing(~padding)
    with backend(name), torch.no_grad():
        torch.manual_seed(1)
        padded = stack(src, src_key_padding_mask=padding)
        torch.manual_seed(1)
        packed = stack.forward_packed(functional.pack(src, packing), packing)
        assert torch.equal(functional.unpack(packed, packing), padded)
