"""What torch raises for a bad argument catches what is raised here, by the same call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fusedformer import functional, nn
from fusedformer.errors import ArgumentError, BadTypeError, BadValueError

x, half = torch.randn(2, 3, 8), torch.randn(2, 3, 8, dtype=torch.float16)
heads = torch.randn(2, 2, 3, 4)
logits, classes = torch.randn(4, 5), torch.tensor([1, 0, 4, 2])
Call = Callable[[Any, Any], Any]  # of a module of functions and one of classes


def attend(library: Any, *args: Any, **masks: Any) -> Any:
    return library.MultiheadAttention(8, 2, batch_first=True)(*args, **masks)


def layer(library: Any) -> Any:
    return library.TransformerEncoderLayer(8, 2, 12, batch_first=True)


def transform(library: Any, src: Any, tgt: Any) -> Any:
    return library.Transformer(8, 2, 1, 1, 12, batch_first=True)(src, tgt)


CALLS: dict[str, Call] = {
    "layer_norm of an int": lambda f, nn: f.layer_norm(x, 8),
    "rms_norm of an int": lambda f, nn: f.rms_norm(x, 8),
    "layer_norm of another shape": lambda f, nn: f.layer_norm(x, (7,)),
    "layer_norm of no dimension": lambda f, nn: f.layer_norm(x, ()),
    "layer_norm, weight of another shape": lambda f, nn: f.layer_norm(x, (8,), torch.ones(7)),
    "layer_norm of no tensor": lambda f, nn: f.layer_norm([1.0], (1,)),
    "rms_norm of another shape": lambda f, nn: f.rms_norm(x, (7,)),
    "softmax of a dim that is not there": lambda f, nn: f.softmax(x, 3),
    "softmax of a dim that is no int": lambda f, nn: f.softmax(x, "a"),
    "log_softmax of a dim that is not there": lambda f, nn: f.log_softmax(x, -4),
    "cross_entropy of other rows": lambda f, nn: f.cross_entropy(logits, classes[:3]),
    "cross_entropy of int32": lambda f, nn: f.cross_entropy(logits, classes.int()),
    "cross_entropy of no such class": lambda f, nn: f.cross_entropy(logits, classes + 1),
    "cross_entropy, other weights": lambda f, nn: f.cross_entropy(logits, classes, torch.ones(3)),
    "cross_entropy, reduction": lambda f, nn: f.cross_entropy(logits, classes, reduction="max"),
    "cross_entropy, smoothing": lambda f, nn: f.cross_entropy(logits, classes, label_smoothing=1.5),
    "attention of another width": lambda f, nn: f.scaled_dot_product_attention(
        heads, heads[..., :3], heads
    ),
    "attention of two dtypes": lambda f, nn: f.scaled_dot_product_attention(
        heads, heads.half(), heads.half()
    ),
    "attention, an integer mask": lambda f, nn: f.scaled_dot_product_attention(
        heads, heads, heads, torch.ones(3, 3, dtype=torch.int32)
    ),
    "attention, another mask": lambda f, nn: f.scaled_dot_product_attention(
        heads, heads, heads, torch.ones(2, 4)
    ),
    "MultiheadAttention of indivisible heads": lambda f, nn: nn.MultiheadAttention(8, 3),
    "MultiheadAttention of no width": lambda f, nn: nn.MultiheadAttention(0, 1),
    "MultiheadAttention, 4-D": lambda f, nn: attend(nn, x[None], x[None], x[None]),
    "MultiheadAttention, width": lambda f, nn: attend(nn, x[..., :6], x[..., :6], x[..., :6]),
    "MultiheadAttention, keys": lambda f, nn: attend(nn, x, x, x[:, :2]),
    "MultiheadAttention, dtype": lambda f, nn: attend(nn, half, half, half),
    "MultiheadAttention, unbatched key": lambda f, nn: attend(nn, x, x[0], x[0]),
    "MultiheadAttention, mask": lambda f, nn: attend(nn, x, x, x, attn_mask=torch.ones(3, 4)),
    "MultiheadAttention, 1-D mask": lambda f, nn: attend(nn, x, x, x, attn_mask=torch.ones(3)),
    "MultiheadAttention, integer mask": lambda f, nn: attend(
        nn, x, x, x, attn_mask=torch.ones(3, 3).int()
    ),
    "MultiheadAttention, padding": lambda f, nn: attend(
        nn, x, x, x, key_padding_mask=torch.ones(2, 4) > 0
    ),
    "MultiheadAttention, a hint alone": lambda f, nn: attend(
        nn, x, x, x, is_causal=True, need_weights=False
    ),
    "TransformerEncoderLayer, activation": lambda f, nn: nn.TransformerEncoderLayer(
        8, 2, activation="none"
    ),
    "TransformerEncoderLayer, width": lambda f, nn: layer(nn)(x[..., :6]),
    "TransformerEncoderLayer, padding": lambda f, nn: layer(nn)(
        x, src_key_padding_mask=torch.ones(2, 4) > 0
    ),
    "TransformerEncoder, dtype": lambda f, nn: nn.TransformerEncoder(layer(nn), 1)(half),
    "Transformer, batches": lambda f, nn: transform(nn, x, x[:1]),
    "Transformer, width": lambda f, nn: transform(nn, x[..., :6], x[..., :6]),
    "LayerNorm of another shape": lambda f, nn: nn.LayerNorm(7)(x),
    "CrossEntropyLoss of other rows": lambda f, nn: nn.CrossEntropyLoss()(logits, classes[:3]),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_what_torch_raises_catches_what_is_raised_here(call: Call) -> None:
    with pytest.raises(Exception) as stock:
        call(F, torch.nn)
    with pytest.raises((ArgumentError, IndexError)) as ours:
        call(functional, nn)
    assert isinstance(ours.value, type(stock.value)), (stock.value, ours.value)


def test_each_is_what_it_says_and_what_torch_raises() -> None:
    for cls, kind in ((BadValueError, ValueError), (BadTypeError, TypeError)):
        for caught in (kind, RuntimeError, AssertionError, ArgumentError):
            assert issubclass(cls, caught)
