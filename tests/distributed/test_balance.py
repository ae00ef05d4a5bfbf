"""Batches of like cost: every sample once, as many steps for all, within the limit."""

from __future__ import annotations

import random
from typing import Any

import pytest

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402

from fusedformer.distributed import LengthBalancedSampler, balanced_batches  # noqa: E402

D_MODEL = 4  # attention costs as much as products from 24 tokens on


def cost(lengths: list[int], samples: list[int]) -> float:
    return sum(lengths[i] + lengths[i] ** 2 / (6 * D_MODEL) for i in samples)


@st.composite
def problems(draw: Any) -> tuple[list[int], int, int]:
    """Lengths, a limit from the least that is possible on, and a number of ranks."""
    replicas = draw(st.integers(1, 5))
    lengths = draw(st.lists(st.integers(1, 60), min_size=replicas, max_size=40))
    least = max(lengths) * (1 if len(lengths) % replicas == 0 else 2)
    return lengths, least + draw(st.integers(0, 200)), replicas


@given(problems(), st.randoms())
def test_steps(problem: tuple[list[int], int, int], shuffled: random.Random) -> None:
    lengths, limit, replicas = problem
    order = list(range(len(lengths)))
    shuffled.shuffle(order)
    steps = balanced_batches(lengths, limit, replicas, order=order, d_model=D_MODEL)
    assert sorted(i for step in steps for batch in step for i in batch) == sorted(order)
    assert all(len(step) == replicas and all(step) for step in steps)
    tokens = [[sum(lengths[i] for i in batch) for batch in step] for step in steps]
    assert max(map(max, tokens)) <= limit
    place = {sample: i for i, sample in enumerate(order)}
    ends = [max(place[i] for batch in step for i in batch) for step in steps]
    assert ends == sorted(ends)  # steps are consecutive samples of the order
    for step, have in zip(steps, tokens, strict=True):
        for giver in step:
            least = min(giver, key=lambda i: lengths[i])
            for receiver, number in zip(step, have, strict=True):
                fits = number + lengths[least] <= limit
                gains = cost(lengths, [*receiver, least]) < cost(lengths, giver) - 1e-6
                assert receiver is giver or not (fits and gains)


def natural(count: int) -> list[int]:
    """Lengths as of sentences."""
    drawn = random.Random(3)
    return [max(3, min(512, int(drawn.lognormvariate(4, 0.8)))) for _ in range(count)]


def test_natural_lengths_fill_batches_and_balance_ranks() -> None:
    lengths = natural(4000)
    steps = balanced_batches(lengths, 4096, 8)
    assert len(steps) <= 1.1 * sum(lengths) / (8 * 4096)
    for step in steps:
        costs = [sum(lengths[i] * (1 + lengths[i] / (6 * 768)) for i in batch) for batch in step]
        assert max(costs) < 1.02 * min(costs)


def samplers(replicas: int, **settings: Any) -> list[LengthBalancedSampler]:
    return [
        LengthBalancedSampler(natural(300), 1500, num_replicas=replicas, rank=r, **settings)
        for r in range(replicas)
    ]


def test_ranks_share_an_epoch_and_epochs_differ() -> None:
    seen = []
    both = samplers(2, seed=5)
    for epoch in (0, 1):
        for sampler in both:
            sampler.set_epoch(epoch)
        assert len(both[0]) == len(both[1]) == len(list(both[0]))
        assert sorted(i for one in both for batch in one for i in batch) == list(range(300))
        seen.append(list(both[0]))
    assert seen[0] != seen[1]
    again = samplers(2, seed=5)[0]
    assert list(again) == seen[0]
    assert list(samplers(2, seed=6)[0]) != seen[0]
    unshuffled = samplers(2, shuffle=False)[0]
    first = list(unshuffled)
    unshuffled.set_epoch(1)
    assert list(unshuffled) == first


def test_an_epoch_goes_on_where_it_was() -> None:
    sampler = samplers(3)[1]
    sampler.set_epoch(4)
    whole = list(sampler)
    resumed = samplers(3)[1]
    resumed.set_epoch(4, 2)
    assert list(resumed) == whole[2:]
    assert len(resumed) == len(whole) - 2
    with pytest.raises(ValueError, match=f"'steps_done' to be from 0 to {len(whole)}"):
        resumed.set_epoch(4, len(whole) + 1)


def test_it_is_a_batch_sampler_of_a_data_loader() -> None:
    sampler = samplers(2)[0]
    loader: DataLoader[Any] = DataLoader(
        natural(300),  # type: ignore[arg-type]
        batch_sampler=sampler,
        collate_fn=list,
    )
    assert len(loader) == len(sampler)
    want = [[natural(300)[i] for i in batch] for batch in sampler]
    assert list(loader) == want


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([3, 4], 4, 3), "at least one sample for each of 3 replicas, but got 2"),
        (([3, 4], 3, 2), "'max_tokens' to be at least 4, for samples of up to 4 tokens"),
        (([3, 4, 4], 7, 2), "'max_tokens' to be at least 8, .* 3 of them on 2 replicas"),
        (([3, 0], 9, 1), "positive 'lengths', but got 0"),
        (([3], 9, 0), "'num_replicas' to be positive, but got 0"),
    ],
)
def test_what_cannot_be_balanced(arguments: tuple[list[int], int, int], message: str) -> None:
    with pytest.raises(ValueError, match=rf"balanced_batches\(\): expected {message}"):
        balanced_batches(*arguments)
    lengths, limit, replicas = arguments
    with pytest.raises(ValueError, match=rf"LengthBalancedSampler\(\): expected {message}"):
        LengthBalancedSampler(lengths, limit, num_replicas=replicas, rank=0)


def test_an_order_that_is_none_and_a_rank_that_is_none() -> None:
    with pytest.raises(ValueError, match="'order' to be a permutation of 2 samples"):
        balanced_batches([1, 2], 9, 1, order=[0, 0])
    with pytest.raises(ValueError, match=r"'rank' to be at least 0 and below 2, .* but got 2"):
        LengthBalancedSampler([1, 2], 9, num_replicas=2, rank=2)
