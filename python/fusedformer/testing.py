"""Test functions against stock PyTorch and the truth: the criterion, and memory made of NaN.

The criterion itself is stated in :mod:`fusedformer.parity.criterion`. This module imports neither
pytest nor matplotlib nor transformers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from fusedformer.parity.criterion import (
    Comparison,
    Function,
    ParityError,
    ProvesNothingError,
    assert_function_parity,
    compare_tensors,
    copied,
    parity,
)

__all__ = [
    "Comparison", "Function", "ParityError", "ProvesNothingError", "assert_function_parity",
    "assert_parity", "compare", "compare_tensors", "copied", "parity", "poisoned_memory",
]  # fmt: skip

# Their names before fusedformer.parity had functions of these names for modules.
compare = compare_tensors
assert_parity = assert_function_parity


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Make ``torch.empty`` and its like return NaN, or the largest integer.

    An element that a kernel does not write then shows. Built on torch's own deterministic mode.
    """
    was_on = torch.are_deterministic_algorithms_enabled()
    was_warn = torch.is_deterministic_algorithms_warn_only_enabled()
    settings: Any = torch.utils.deterministic
    was_filling = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was_on, warn_only=was_warn)
        settings.fill_uninitialized_memory = was_filling
