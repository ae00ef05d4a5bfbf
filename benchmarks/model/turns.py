"""What turns cost attention's backward in one pass: ``python benchmarks/model/turns.py``.

Programs run on slots as in ``query_sums.py``: in the order of their tickets, 64 heads side by side,
each from its last tile of queries back. A tile takes one unit of time; a sum may be added to
``hop`` units after the block of keys before has added to it. Printed is the time of all programs,
over that without turns, for 132 SMs with two programs each and blocks of 64 keys.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator

SLOTS, SIDE_BY_SIDE = 2 * 132, 64
HOPS = (0.5, 1.0, 2.0)
# Batch, heads, length, head dim.
SIZES = ((4, 8, 4096, 128), (32, 8, 512, 128), (8, 12, 2048, 64), (1, 12, 2048, 64))


def tickets(heads: int, blocks: int) -> Iterator[tuple[int, int]]:
    """Give the head and the block of keys of each ticket."""
    for first in range(0, heads, SIDE_BY_SIDE):
        others = range(first, min(first + SIDE_BY_SIDE, heads))
        yield from ((head, block) for block in range(blocks) for head in others)


def time_of(heads: int, blocks: int, tiles: int, hop: float | None, causal: bool) -> float:
    """Return when the last program ends; without turns if ``hop`` is None."""
    given: dict[tuple[int, int], float] = {}
    free = [0.0] * SLOTS
    for head, block in tickets(heads, blocks):
        now = heapq.heappop(free)
        first = block * tiles // blocks if causal else 0
        for tile in range(tiles - 1, first - 1, -1):
            now += 1.0
            if hop is not None:
                now = max(now, given.get((head, tile), 0.0))
                given[head, tile] = now + hop
        heapq.heappush(free, now)
    return max(free)


def main() -> None:
    """Print a table."""
    print("| size | " + " | ".join(f"hop {hop}" for hop in HOPS) + " |")
    print("| --- |" + " ---: |" * len(HOPS))
    for batch, heads, length, dim in SIZES:
        blocks, tiles = length // 64, length // (32 if dim == 128 else 64)
        for causal in (False, True):
            alone = time_of(batch * heads, blocks, tiles, None, causal)
            ratios = [time_of(batch * heads, blocks, tiles, h, causal) / alone for h in HOPS]
            name = f"B={batch} H={heads} S={length} d={dim}" + (" causal" if causal else "")
            print(f"| {name} | " + " | ".join(f"{ratio:.2f}" for ratio in ratios) + " |")


if __name__ == "__main__":
    main()
