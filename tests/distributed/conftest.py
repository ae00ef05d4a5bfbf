"""The processes that all distributed tests share."""

from collections.abc import Iterator

import pytest
from tests.distributed.ranks import Ranks


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Four ranks; ``ranks.run(function, *args, size=2)`` uses the first two of them."""
    started = Ranks(4)
    yield started
    started.close()
