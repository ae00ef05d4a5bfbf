"""Positional encodings and token embeddings."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch

from fusedformer import nn

D, N, S = 6, 2, 5
BOTH = pytest.mark.parametrize(
    "cls", [nn.SinusoidalPositionalEncoding, nn.LearnedPositionalEncoding]
)


@pytest.mark.parametrize("d_model", [1, 2, 6, 7])
def test_sinusoidal_table_by_its_formula(d_model: int) -> None:
    module = nn.SinusoidalPositionalEncoding(d_model, max_len=50)
    expected = torch.empty(50, d_model, dtype=torch.float64)
    for position in range(50):
        for column in range(d_model):
            angle = position / 10000 ** (2 * (column // 2) / d_model)
            expected[position, column] = math.cos(angle) if column % 2 else math.sin(angle)
    # The table is the float64 value rounded once: within half an eps of a number below 1.
    assert (module.weight - expected).abs().max() <= torch.finfo(torch.float32).eps / 2


def test_sinusoidal_table_is_exact_far_out_too() -> None:
    module = nn.SinusoidalPositionalEncoding(2, max_len=100_001)
    expected = torch.tensor([math.sin(100_000), math.cos(100_000)], dtype=torch.float64)
    assert (module.weight[-1] - expected).abs().max() <= torch.finfo(torch.float32).eps / 2


def test_sinusoidal_table_is_neither_trained_nor_saved_but_follows_the_module() -> None:
    module = nn.SinusoidalPositionalEncoding(D, max_len=8)
    assert not list(module.parameters()) and not module.state_dict()
    assert module.to(torch.float64).weight.dtype == torch.float64
    assert torch.equal(copy.deepcopy(module).weight, module.weight)


def test_sinusoidal_table_can_be_restored_after_meta() -> None:
    with torch.device("meta"):
        module = nn.SinusoidalPositionalEncoding(D, max_len=8)
    module.to_empty(device="cpu").reset_parameters()
    assert torch.equal(module.weight, nn.SinusoidalPositionalEncoding(D, max_len=8).weight)


def test_learned_table_is_one_trained_parameter() -> None:
    module = nn.LearnedPositionalEncoding(D, max_len=8, dropout=0.0)
    assert {k: v.shape for k, v in module.named_parameters()} == {"weight": (8, D)}
    x, grad = torch.randn(S, N, D), torch.randn(S, N, D)
    module(x).backward(grad)
    assert module.weight.grad is not None
    torch.testing.assert_close(module.weight.grad[:S], grad.sum(1))
    assert torch.equal(module.weight.grad[S:], torch.zeros(8 - S, D))
    wide = nn.LearnedPositionalEncoding(64, max_len=512)
    # 32768 draws: their deviation is within 5 standard errors, 0.02 * 5 / sqrt(2 * 32768).
    assert abs(wide.weight.std().item() - 0.02) < 0.02 * 5 / 256


@BOTH
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_rows_are_added_along_the_sequence(cls: Any, batch_first: bool, dtype: torch.dtype) -> None:
    module = cls(D, max_len=8, batch_first=batch_first).eval()
    x = torch.randn((N, S, D) if batch_first else (S, N, D)).to(dtype)
    rows = module.weight[:S].to(dtype)
    expected = x + (rows[None] if batch_first else rows[:, None])
    assert module(x).dtype == dtype and torch.equal(module(x), expected)
    alone = x[0] if batch_first else x[:, 0]
    assert torch.equal(module(alone), alone + rows)


@BOTH
def test_positions_that_are_given(cls: Any) -> None:
    module = cls(D, max_len=8, batch_first=True).eval()
    packed, restarting = torch.randn(S, D), torch.tensor([0, 1, 2, 0, 1])
    assert torch.equal(module(packed, restarting), packed + module.weight[restarting])
    batch, shared = torch.randn(N, S, D), torch.tensor([[3, 4, 5, 6, 7]], dtype=torch.int32)
    assert torch.equal(module(batch, shared), batch + module.weight[3:])
    assert torch.equal(module(batch, torch.arange(S).expand(N, S)), module(batch))


@BOTH
def test_dropout_of_the_sum_in_training_only(cls: Any) -> None:
    module, x = cls(D, max_len=8, dropout=0.5), torch.randn(S, N, D)
    kept = module.eval()(x)
    dropped = module.train()(x)
    assert ((dropped == 0) | (dropped == 2 * kept)).all()
    assert (dropped == 0).any() and (dropped != 0).any()


@BOTH
@pytest.mark.parametrize(
    ("error", "argument", "x", "positions"),
    [
        (ValueError, "input", torch.randn(9, N, D), None),
        (ValueError, "input", torch.randn(S, N, D + 1), None),
        (ValueError, "input", torch.randn(D), None),
        (TypeError, "input", torch.ones(S, D).long(), None),
        (TypeError, "positions", torch.randn(S, D), torch.ones(S)),
        (ValueError, "positions", torch.randn(S, D), torch.arange(S + 1)),
        (ValueError, "positions", torch.randn(S, D), torch.zeros(S, D).long()),
    ],
    ids=["too long", "width", "1-D", "integers", "floating", "too many", "per element"],
)
def test_bad_calls_name_the_argument(
    cls: Any, error: type[Exception], argument: str, x: torch.Tensor, positions: Any
) -> None:
    with pytest.raises(error, match=rf"{cls.__name__}\(\): expected '{argument}'"):
        cls(D, max_len=8)(x, positions)


@BOTH
@pytest.mark.parametrize("settings", [dict(d_model=0), dict(max_len=0), dict(dropout=2.0)], ids=str)
def test_bad_construction(cls: Any, settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"expected '{next(iter(settings))}'"):
        cls(**{"d_model": D, **settings})


@pytest.mark.parametrize("scale", [False, True])
def test_token_embedding_is_torchs_times_its_scale(scale: bool) -> None:
    torch.manual_seed(1)
    ours = nn.TokenEmbedding(10, 9, padding_idx=0, scale=scale)
    torch.manual_seed(1)
    stock = torch.nn.Embedding(10, 9, padding_idx=0)
    assert isinstance(ours, torch.nn.Embedding) and torch.equal(ours.weight, stock.weight)
    tokens, grad = torch.tensor([[1, 2, 0], [9, 1, 3]]), torch.randn(2, 3, 9)
    factor = 3.0 if scale else 1.0
    ours(tokens).backward(grad)
    (factor * stock(tokens)).backward(grad)
    assert torch.equal(ours(tokens), factor * stock(tokens))
    assert ours.weight.grad is not None
    assert stock.weight.grad is not None
    assert torch.equal(ours.weight.grad, stock.weight.grad)
    assert repr(ours) == f"TokenEmbedding(10, 9, padding_idx=0{', scale=True' if scale else ''})"


def test_token_embedding_from_given_vectors() -> None:
    vectors = torch.randn(5, 4)
    module = nn.TokenEmbedding.from_pretrained(vectors, freeze=False, padding_idx=2, scale=True)
    assert type(module) is nn.TokenEmbedding and module.padding_idx == 2
    assert module.weight.requires_grad
    assert torch.equal(module(torch.arange(5)), 2 * vectors)
