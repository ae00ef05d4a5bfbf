"""Rows of docs/differences.md: where stock goes by the path that it happens to take."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from fusedformer import backend, functional, nn

N, S, D = 3, 5, 16
PADDING = torch.arange(S) >= torch.tensor([5, 2, 4])[:, None]


@pytest.fixture(autouse=True)
def _torch_backend() -> Any:
    with backend("torch"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # stock's nested tensors are a prototype
        yield


def _encoder(library: Any) -> Any:
    torch.manual_seed(0)
    layer = library.TransformerEncoderLayer(D, 4, 32, 0.0, batch_first=True)
    return library.TransformerEncoder(layer, 2)


def test_a_floating_mask_is_added_in_eval_too() -> None:
    """Stock's inference path reads it as boolean: nonzero is removed."""
    src, mask = torch.randn(N, S, D), torch.randn(S, S)
    truth = _encoder(torch.nn).double().train()(src.double(), mask.double())
    encoder = _encoder(nn).eval()
    with torch.no_grad():
        assert torch.allclose(encoder(src, mask).double(), truth, atol=1e-5)
        padding = torch.zeros(N, S).masked_fill(PADDING, -1.5)
        truth = _encoder(torch.nn).double()(src.double(), src_key_padding_mask=padding.double())
        assert torch.allclose(encoder(src, src_key_padding_mask=padding).double(), truth, atol=1e-5)


@pytest.mark.parametrize("grad", [False, True])
def test_padding_in_eval_under_cpu_autocast(grad: bool) -> None:
    """Where stock's inference path mixes dtypes and raises."""
    src, encoder = torch.randn(N, S, D), _encoder(nn).eval()
    with torch.no_grad():
        full = encoder(src, src_key_padding_mask=PADDING)
    with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16):
        output = encoder(src, src_key_padding_mask=PADDING)
    assert torch.allclose(output.float(), full, atol=0.1) and not output[PADDING].any()


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_a_query_that_sees_nothing(need_weights: bool, training: bool) -> None:
    """NaN in stock, or finite, by need_weights and by mode; here the output's bias."""
    torch.manual_seed(0)
    module = nn.MultiheadAttention(D, 4, batch_first=True).train(training)
    torch.nn.init.normal_(module.out_proj.bias)
    x = torch.randn(N, S, D, requires_grad=True)
    padding = PADDING.clone()
    padding[1] = True
    output, weights = module(x, x, x, key_padding_mask=padding, need_weights=need_weights)
    assert torch.equal(output[1], module.out_proj.bias.expand(S, D))
    assert weights is None or not weights[1].any()
    (gradient,) = torch.autograd.grad(output, x, torch.randn_like(output))
    assert gradient.isfinite().all() and not gradient[1].any()


def test_a_norm_with_a_bias_and_no_weight() -> None:
    x, bias = torch.randn(4, D), torch.randn(D)
    expected = torch.nn.functional.layer_norm(x, (D,), None, bias)
    assert torch.allclose(functional.layer_norm(x, (D,), None, bias), expected, atol=1e-6)
