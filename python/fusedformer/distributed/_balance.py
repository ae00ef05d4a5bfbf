"""Batches of packed sequences with equal work on all ranks, so that none waits for another."""

from __future__ import annotations

import bisect
import heapq
import itertools
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch.utils.data import Sampler


def balanced_batches(
    lengths: Sequence[int],
    max_tokens: int,
    num_replicas: int,
    *,
    order: Sequence[int] | None = None,
    d_model: int = 768,
) -> list[list[list[int]]]:
    """Put every sample into one batch, so that in each step all ranks have about equal work.

    Consecutive samples of ``order`` make a step; within it the most costly go first, each to the
    rank that has the least so far. A sample of length l costs ``l + l**2 / (6 * d_model)``, for the
    products and the attention of an encoder layer with ``dim_feedforward = 4 * d_model``.

    Args:
        lengths: of all samples, positive.
        max_tokens: that a batch may have, all its samples together; at least twice the longest
            sample, or as much as it where ``num_replicas`` divides the number of samples.
        num_replicas: number of ranks; at most the number of samples.
        order: a permutation of the samples; as they come if None.
        d_model: width of the encoder, which says from which length on attention costs more than
            products.

    Returns:
        ``batches[step][rank]``, lists of indices of samples. None is empty. Between two ranks of a
        step no sample could be moved to a gain: the receiver would have at least what the giver
        had, or more than ``max_tokens``.

    Raises:
        ValueError: arguments that are not as above.

    Source: longest processing time first: Graham, Bounds on Multiprocessing Timing Anomalies, SIAM
    Journal on Applied Mathematics 17 (1969).
    """
    _check("balanced_batches", lengths, max_tokens, num_replicas, d_model)
    order = range(len(lengths)) if order is None else order
    if sorted(order) != list(range(len(lengths))):
        raise ValueError(
            f"balanced_batches(): expected 'order' to be a permutation of {len(lengths)} samples"
        )
    until = list(itertools.accumulate(lengths[i] for i in order))
    most = len(lengths) // num_replicas
    steps = -(-until[-1] // (num_replicas * max_tokens))
    while True:
        found = _steps(lengths, order, until, steps, max_tokens, num_replicas, d_model)
        if found is not None:
            return found
        assert steps < most  # at ``most`` steps a rank has one or two samples; _check: they fit
        steps = min(most, steps + -(-steps // 64))


def _steps(
    lengths: Sequence[int],
    order: Sequence[int],
    until: list[int],
    steps: int,
    max_tokens: int,
    ranks: int,
    d_model: int,
) -> list[list[list[int]]] | None:
    """Cut ``order`` into steps of similar numbers of tokens; None if a batch has too many."""
    found, start = [], 0
    for step in range(1, steps + 1):
        end = bisect.bisect_left(until, step * until[-1] / steps) + 1
        # Every rank gets a sample in this step and in all later ones.
        end = min(max(end, start + ranks), len(order) - ranks * (steps - step))
        end = len(order) if step == steps else end
        batches = _dealt(lengths, order[start:end], max_tokens, ranks, d_model)
        if batches is None:
            return None
        found.append(batches)
        start = end
    return found


def _dealt(
    lengths: Sequence[int], samples: Sequence[int], max_tokens: int, ranks: int, d_model: int
) -> list[list[int]] | None:
    """Distribute the samples of a step over the ranks; None if they do not fit."""
    batches: list[list[int]] = [[] for _ in range(ranks)]
    tokens = [0] * ranks
    waiting = [(0.0, rank) for rank in range(ranks)]
    for sample in sorted(samples, key=lambda sample: -lengths[sample]):
        length = lengths[sample]
        full = []
        while waiting and tokens[waiting[0][1]] + length > max_tokens:
            full.append(heapq.heappop(waiting))
        if not waiting:
            return None
        cost, rank = waiting[0]
        heapq.heapreplace(waiting, (cost + length + length**2 / (6 * d_model), rank))
        batches[rank].append(sample)
        tokens[rank] += length
        for entry in full:
            heapq.heappush(waiting, entry)
    return batches


class LengthBalancedSampler(Sampler[list[int]]):
    """A ``batch_sampler`` for data-parallel training on packed sequences.

    Each step gives every rank a batch with about the same tokens and the same attention: see
    :func:`balanced_batches`. Every sample comes once an epoch, on one rank; all ranks have as many
    steps. Batches differ in their number of samples and tokens: divide the loss by the number of
    tokens of all ranks, not by the rank's own.

    Everything follows from ``(seed, epoch)``. To go on in the middle of an epoch:
    ``sampler.set_epoch(epoch, steps_done)``.

    Args:
        lengths: number of tokens of each sample.
        max_tokens: that a batch may have: see :func:`balanced_batches`.
        num_replicas, rank: of the default process group if None.
        shuffle: whether samples come in another order each epoch.
        seed: of the order; the same on every rank.
        d_model: width of the encoder, by which attention is weighed.

    Raises:
        ValueError: as :func:`balanced_batches`; ``rank`` is not one of ``num_replicas``.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        max_tokens: int,
        *,
        num_replicas: int | None = None,
        rank: int | None = None,
        shuffle: bool = True,
        seed: int = 0,
        d_model: int = 768,
    ) -> None:
        function = "LengthBalancedSampler"
        num_replicas = dist.get_world_size() if num_replicas is None else num_replicas
        rank = dist.get_rank() if rank is None else rank
        _check(function, lengths, max_tokens, num_replicas, d_model)
        if not 0 <= rank < num_replicas:
            raise ValueError(
                f"{function}(): expected 'rank' to be at least 0 and below {num_replicas}, the "
                f"number of replicas, but got {rank}"
            )
        self.lengths, self.max_tokens = list(lengths), max_tokens
        self.num_replicas, self.rank = num_replicas, rank
        self.shuffle, self.seed, self.d_model = shuffle, seed, d_model
        self.set_epoch(0)

    def set_epoch(self, epoch: int, steps_done: int = 0) -> None:
        """Set the next iteration to ``epoch``, without its first ``steps_done`` steps.

        Raises:
            ValueError: the epoch has fewer steps.
        """
        order = None
        if self.shuffle:
            generator = torch.Generator().manual_seed(self.seed + epoch)
            order = torch.randperm(len(self.lengths), generator=generator).tolist()
        steps = balanced_batches(
            self.lengths, self.max_tokens, self.num_replicas, order=order, d_model=self.d_model
        )
        if not 0 <= steps_done <= len(steps):
            raise ValueError(
                f"LengthBalancedSampler.set_epoch(): expected 'steps_done' to be from 0 to "
                f"{len(steps)}, the steps of the epoch, but got {steps_done}"
            )
        self._batches = [batches[self.rank] for batches in steps[steps_done:]]

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self._batches)

    def __len__(self) -> int:
        """Return the number of steps of the next iteration."""
        return len(self._batches)


def _check(
    function: str, lengths: Sequence[int], max_tokens: int, num_replicas: int, d_model: int
) -> None:
    """Raise unless as many steps as leave each rank one sample or two are possible."""
    for name, number in (("num_replicas", num_replicas), ("d_model", d_model)):
        if number < 1:
            raise ValueError(f"{function}(): expected '{name}' to be positive, but got {number}")
    if len(lengths) < num_replicas:
        raise ValueError(
            f"{function}(): expected at least one sample for each of {num_replicas} replicas, "
            f"but got {len(lengths)} 'lengths'"
        )
    if min(lengths) < 1:
        raise ValueError(f"{function}(): expected positive 'lengths', but got {min(lengths)}")
    needed = max(lengths) * (1 if len(lengths) % num_replicas == 0 else 2)
    if max_tokens < needed:
        raise ValueError(
            f"{function}(): expected 'max_tokens' to be at least {needed}, for samples of up to "
            f"{max(lengths)} tokens, {len(lengths)} of them on {num_replicas} replicas, "
            f"but got {max_tokens}"
        )
