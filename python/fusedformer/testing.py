"""Test functions against stock PyTorch and the truth: the criterion, and memory made of NaN.

An error may be at most twice stock's plus two roundings: :mod:`fusedformer.parity.criterion` states
it in full. ``compare`` and ``assert_parity`` are older names of :func:`compare_tensors` and
:func:`assert_function_parity`; :mod:`fusedformer.parity` has functions of those names for modules.
Importing this imports neither pytest nor matplotlib nor transformers.
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
