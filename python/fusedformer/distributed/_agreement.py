"""Checks that raise on all ranks of a group, so that none waits for one that raised."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch.distributed as dist


def agree(
    function: str,
    group: dist.ProcessGroup | None,
    describe: Callable[[], Mapping[str, object]],
    ask: bool = True,
) -> None:
    """Raise on every rank unless ``describe`` returns the same on all, and raises on none.

    Args:
        function: of which the arguments are described.
        group: whose ranks all call this; the default group if None.
        describe: checks the arguments; returns what must be equal, by name.
        ask: whether to ask the others. If not, only this rank's arguments are checked.

    Raises:
        TypeError, ValueError, IndexError, RuntimeError: of ``describe``.
        ValueError: another rank's arguments are bad, or differ.
    """
    mine: Mapping[str, object] | str
    error: Exception | None = None
    try:
        mine = dict(describe())
    except (TypeError, ValueError, IndexError, RuntimeError) as raised:
        mine, error = str(raised), raised
    everyone: list[Any] = []
    if ask and dist.get_world_size(group) > 1:
        everyone = [None] * dist.get_world_size(group)
        dist.all_gather_object(everyone, mine, group)
    if error is not None:
        raise error
    for rank, theirs in enumerate(everyone):
        if isinstance(theirs, str):
            raise ValueError(
                f"{function}(): rank {rank} of the group was called with bad arguments: {theirs}"
            )
        if theirs != mine:
            assert isinstance(mine, dict)
            names = [n for n in {**mine, **theirs} if mine.get(n) != theirs.get(n)]
            differ = "; ".join(f"{n} is {theirs.get(n)} there, {mine.get(n)} here" for n in names)
            raise ValueError(
                f"{function}(): expected all ranks of the group to be called alike, but ranks "
                f"{rank} and {dist.get_rank(group)} differ: {differ}"
            )
