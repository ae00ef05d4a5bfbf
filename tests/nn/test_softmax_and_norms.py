"""Softmax, LogSoftmax, LayerNorm, RMSNorm and ScaledDotProductAttention as modules."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fusedformer import functional, nn

DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"]
)

NORMS: list[tuple[str, str, tuple[Any, ...], dict[str, Any], tuple[int, ...]]] = [
    ("one dimension", "LayerNorm", (17,), {}, (2, 3, 17)),
    ("two dimensions", "LayerNorm", ([3, 5],), {}, (4, 3, 5)),
    ("no bias", "LayerNorm", (16,), {"bias": False}, (4, 16)),
    ("no parameters", "LayerNorm", (16,), {"elementwise_affine": False}, (4, 16)),
    ("an eps that matters", "LayerNorm", (16,), {"eps": 0.7}, (4, 16)),
    ("rms", "RMSNorm", (17,), {}, (2, 3, 17)),
    ("rms, two dimensions", "RMSNorm", ([3, 5],), {}, (4, 3, 5)),
    ("rms, an eps that matters", "RMSNorm", (16,), {"eps": 0.7}, (4, 16)),
    ("rms, no parameters", "RMSNorm", (16,), {"elementwise_affine": False}, (4, 16)),
]


@DTYPES
@pytest.mark.parametrize(
    ("name", "args", "settings", "shape"), [c[1:] for c in NORMS], ids=[c[0] for c in NORMS]
)
def test_norm_parity(
    name: str, args: tuple[Any, ...], settings: dict[str, Any], shape: tuple[int, ...],
    dtype: torch.dtype, assert_module_parity: Callable[..., None],
) -> None:  # fmt: skip
    class Wrapped(torch.nn.Module):
        """A norm after a product, so that the one without parameters has a dtype too."""

        def __init__(self, norm: torch.nn.Module) -> None:
            super().__init__()
            self.norm, self.gain = norm, torch.nn.Parameter(torch.ones(shape[-1]))

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x * self.gain)

    modules = (Wrapped(getattr(library, name)(*args, **settings)) for library in (nn, torch.nn))
    call = lambda module, x: module(x)
    assert_module_parity(*modules, call, {"x": torch.randn(shape)}, dtype)


@pytest.mark.parametrize("dim", [-1, 0, 1])
@pytest.mark.parametrize("name", ["Softmax", "LogSoftmax"])
def test_softmax_is_the_functional_form(name: str, dim: int) -> None:
    x = torch.randn(3, 5, 7)
    function = functional.softmax if name == "Softmax" else functional.log_softmax
    assert torch.equal(getattr(nn, name)(dim)(x), function(x, dim))
    torch.testing.assert_close(getattr(nn, name)(dim)(x), getattr(torch.nn, name)(dim)(x))


@pytest.mark.parametrize("name", ["Softmax", "LogSoftmax"])
def test_softmax_without_dim_warns_at_the_line_of_the_call(name: str) -> None:
    x = torch.randn(3, 5)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = getattr(nn, name)()(x)
        line = inspect.currentframe().f_lineno - 1  # type: ignore[union-attr]
    torch.testing.assert_close(found, getattr(torch.nn, name)(1)(x))
    assert [(w.filename, w.lineno) for w in caught] == [(__file__, line)]


def test_attention_module_passes_its_settings_on() -> None:
    query, key, value = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 6, 8), torch.randn(2, 2, 6, 3)
    keep = torch.rand(2, 6) > 0.3
    keep[:, 0] = True
    module = nn.ScaledDotProductAttention(is_causal=True, scale=0.3, enable_gqa=True)
    mask = keep[:, None, None, :] & torch.ones(5, 6).tril().bool()
    expected = F.scaled_dot_product_attention(query, key, value, mask, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(module(query, key, value, key_mask=keep), expected)
    torch.testing.assert_close(module(query, key, value, keep[:, None, None, :]), expected)
    lengths = torch.tensor([6, 3])
    by_length = torch.arange(6) < lengths[:, None]
    expected = module(query, key, value, key_mask=by_length)
    assert torch.equal(module(query, key, value, key_lengths=lengths), expected)


def test_attention_module_keeps_all_its_settings() -> None:
    settings: dict[str, Any] = dict(window=(3, 1), softcap=2.0, causal_alignment="bottom_right")
    terms: dict[str, Any] = {"alibi_slopes": torch.rand(2), "relative_bias": torch.randn(2, 5)}
    terms |= {"relative_bias_gate": torch.randn(2, 2, 5), "sinks": torch.randn(2)}
    query, key = torch.randn(2, 2, 5, 8), torch.randn(2, 2, 7, 8)
    expected = functional.scaled_dot_product_attention(query, key, key, **settings, **terms)
    module = nn.ScaledDotProductAttention(**settings)
    assert torch.equal(module(query, key, key, **terms), expected)


def test_attention_module_drops_in_training_only() -> None:
    module, x = nn.ScaledDotProductAttention(dropout_p=0.5), torch.randn(2, 2, 5, 8)
    assert not torch.equal(module(x, x, x), module(x, x, x))
    torch.manual_seed(1)
    first = module(x, x, x)
    torch.manual_seed(1)
    assert torch.equal(first, module(x, x, x))
    module.eval()
    assert torch.equal(module(x, x, x), functional.scaled_dot_product_attention(x, x, x))
    assert repr(module) == (
        "ScaledDotProductAttention(dropout_p=0.5, is_causal=False, scale=None, enable_gqa=False, "
        "window=None, softcap=None, causal_alignment='top_left')"
    )
    with pytest.raises(ValueError, match="dropout_p"):
        nn.ScaledDotProductAttention(dropout_p=1.1)
