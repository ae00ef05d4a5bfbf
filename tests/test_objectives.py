"""Masking by BERT's recipe, and the losses of language models against what they mean."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Generator, Tensor

from fusedformer import reference
from fusedformer.objectives import causal_lm_loss, mask_tokens
from fusedformer.testing import assert_function_parity

MASK, VOCABULARY = 103, 1000


def masked(ids: Tensor, seed: int = 0, **settings: Any) -> tuple[Tensor, Tensor]:
    generator = Generator(ids.device).manual_seed(seed)
    return mask_tokens(ids, MASK, VOCABULARY, generator=generator, **settings)


def test_shares_of_tokens(device: str) -> None:
    """15% are chosen, of which 80% become the mask, 10% any token and 10% stay: within 5 sigma."""
    count = 200_000
    ids = torch.full((count,), 500, device=device)
    new, labels = masked(ids)
    chosen = labels != -100

    def near(found: Tensor, share: float, of: int) -> bool:
        return abs(int(found.sum()) - share * of) < 5 * (share * (1 - share) * of) ** 0.5

    total = int(chosen.sum())
    assert near(chosen, 0.15, count)
    assert (labels[chosen] == 500).all() and (new[~chosen] == 500).all()
    assert near(new[chosen] == MASK, 0.8 + 0.1 / VOCABULARY, total)
    assert near(new[chosen] == 500, 0.1 + 0.1 / VOCABULARY, total)
    others = new[chosen & (new != MASK) & (new != 500)]
    assert others.min() < VOCABULARY // 50 and others.max() > VOCABULARY * 49 // 50
    assert others.max() < VOCABULARY and others.unique().numel() > 0.9 * VOCABULARY


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64], ids=str)
def test_special_tokens_are_never_chosen(dtype: torch.dtype, device: str) -> None:
    ids = torch.randint(VOCABULARY, (50, 40), device=device)
    special = torch.arange(40, device=device).expand(50, -1) % 3 == 0
    new, labels = masked(ids, special_tokens_mask=special.to(dtype), probability=1.0)
    assert (labels[special] == -100).all() and (new[special] == ids[special]).all()
    assert (labels[~special] == ids[~special]).all()


def test_the_generator_decides(device: str) -> None:
    ids = torch.randint(VOCABULARY, (8, 40), device=device)
    state, before = torch.get_rng_state(), ids.clone()
    first, second, other = masked(ids), masked(ids), masked(ids, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[1], other[1])
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(ids, before)
    none = masked(ids, probability=0.0)
    assert torch.equal(none[0], ids) and (none[1] == -100).all()


def test_masking_asks_for_nothing_that_depends_on_data() -> None:
    """On tensors without data a look at them would raise."""
    ids = torch.empty(2, 3, dtype=torch.int64, device="meta")
    new, labels = mask_tokens(ids, MASK, VOCABULARY, torch.empty_like(ids))
    assert new.shape == labels.shape == (2, 3)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"input_ids": torch.ones(3)}, TypeError, "'input_ids' to be int64"),
        ({"special_tokens_mask": torch.ones(2)}, ValueError, r"'special_tokens_mask' .* \(3,\)"),
        ({"special_tokens_mask": torch.ones(3)}, TypeError, "to be boolean or integer"),
        ({"probability": 1.5}, ValueError, r"'probability' to be in \[0, 1\]"),
        ({"mask_token_id": 10}, ValueError, "'mask_token_id' to be from 0 .* 9, but got 10"),
    ],
    ids=["dtype", "shape", "special dtype", "probability", "mask token"],
)
def test_bad_input_of_masking(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    ids = torch.ones(3, dtype=torch.int64)
    with pytest.raises(error, match=r"mask_tokens\(\): .*" + message):
        mask_tokens(**{"input_ids": ids, "mask_token_id": 1, "vocab_size": 10, **changes})


def each_sequence(
    input: Tensor,
    linear_weight: Tensor,
    labels: Tensor,
    cu_seqlens: Tensor,
    reduction: str,
    **settings: Any,
) -> Tensor:
    """By slices of every sequence of its own; the same as a mean over all that is left."""
    pairs = list(itertools.pairwise(cu_seqlens.tolist()))
    hidden = torch.cat([input[a : b - 1] for a, b in pairs if b > a])
    target = torch.cat([labels[a + 1 : b] for a, b in pairs if b > a])
    return reference.linear_cross_entropy(
        hidden, linear_weight, target, reduction=reduction, **settings
    )


STARTS: dict[str, list[int]] = {
    "one sequence": [0, 12],
    "several, of one token too": [0, 5, 6, 12],
    "empty ones": [0, 0, 4, 4, 12, 12],
    "rows behind the last": [0, 3, 9],
    "nothing but rows behind": [0],
}


@pytest.mark.parametrize("static", [False, True], ids=["dropped", "static"])
@pytest.mark.parametrize("starts", [name for name in STARTS if len(STARTS[name]) > 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packed_sequences(starts: str, dtype: torch.dtype, static: bool, device: str) -> None:
    """No target crosses an end."""
    inputs: dict[str, Any] = dict(
        input=torch.randn(12, 8, device=device).requires_grad_(),
        linear_weight=torch.randn(30, 8, device=device).requires_grad_(),
        labels=torch.randint(30, (12,), device=device),
        cu_seqlens=torch.tensor(STARTS[starts], device=device, dtype=torch.int32),
        reduction="sum",
    )

    def ours(**given: Any) -> Tensor:
        return causal_lm_loss(**given, static_shapes=static)

    assert_function_parity(ours, each_sequence, each_sequence, inputs, dtype=dtype)


def test_no_sequence_at_all(device: str) -> None:
    loss = causal_lm_loss(
        torch.randn(12, 8, device=device), torch.randn(30, 8, device=device),
        torch.randint(30, (12,), device=device), reduction="sum",
        cu_seqlens=torch.tensor(STARTS["nothing but rows behind"], device=device),
    )  # fmt: skip
    assert loss == 0


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_batches_are_as_packed_ones(reduction: str, device: str) -> None:
    hidden, weight = torch.randn(3, 4, 8, device=device), torch.randn(30, 8, device=device)
    labels = torch.randint(30, (3, 4), device=device)
    labels[0, 2:] = -100  # padding
    starts = torch.arange(4, device=device) * 4
    batch = causal_lm_loss(hidden, weight, labels, reduction=reduction)
    packed = causal_lm_loss(
        hidden.flatten(0, 1), weight, labels.flatten(), cu_seqlens=starts, reduction=reduction
    )
    torch.testing.assert_close(batch, packed.reshape(batch.shape))
    if reduction == "none":
        assert (batch[:, -1] == 0).all() and (batch[0, 1:] == 0).all() and (batch != 0).sum() == 7


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"input": torch.ones(6, 4)}, ValueError, r"'input' to have shape \[batch, length, D\]"),
        ({"cu_seqlens": torch.tensor([0, 6])}, ValueError, "with 'cu_seqlens'"),
        ({"labels": torch.ones(2, 3)}, TypeError, "'labels' to be int64"),
        ({"labels": torch.ones(6).long()}, ValueError, r"'labels' to have shape \(2, 3\)"),
        (
            {"input": torch.ones(6, 4), "labels": torch.ones(6).long(),
             "cu_seqlens": torch.ones(2)},
            TypeError, "'cu_seqlens' to be int32 or int64",
        ),
        (
            {"input": torch.ones(6, 4), "labels": torch.ones(6).long(),
             "cu_seqlens": torch.ones(1, 2).long()},
            ValueError, r"'cu_seqlens' to have shape \[sequences \+ 1\]",
        ),
    ],
    ids=["rank", "packed rank", "dtype", "shape", "dtype of starts", "shape of starts"],
)  # fmt: skip
def test_bad_input_of_the_causal_loss(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    given = dict(
        input=torch.ones(2, 3, 4), linear_weight=torch.ones(5, 4),
        labels=torch.ones(2, 3, dtype=torch.int64),
    )  # fmt: skip
    with pytest.raises(error, match=r"causal_lm_loss\(\): .*" + message):
        causal_lm_loss(**{**given, **changes})
