"""Checks for modules whose call does no more than their class says."""

from __future__ import annotations

from torch import nn

from fusedformer.nn.children import hooks_of, is_sharded

_CAPTURE = "install_output_capuring_hook.<locals>.output_capturing_hook"


def is_untouched(module: nn.Module) -> bool:
    """Return whether ``module`` has its own forward and no hooks but transformers' idle ones."""
    return is_sharded_at_most(module) and not is_sharded(module)


def is_sharded_at_most(module: nn.Module) -> bool:
    """Return whether ``module`` is untouched but for ``fully_shard``; it must then be called."""
    return "forward" not in module.__dict__ and all(
        getattr(hook, "__qualname__", "") == _CAPTURE for hook in hooks_of(module)
    )
