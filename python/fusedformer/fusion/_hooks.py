"""Checks for modules whose call does no more than their class says."""

from __future__ import annotations

from torch import nn

from fusedformer.nn.children import hooks_of, is_hooked, is_sharded

_CAPTURE = "install_output_capuring_hook.<locals>.output_capturing_hook"
# Hooks of transformers and peft that have gradients of embeddings computed, and change no value.
_OF_GRADIENTS = (
    "PreTrainedModel.enable_input_require_grads.<locals>.make_inputs_require_grads",
    "PeftModel._prepare_model_for_gradient_checkpointing.<locals>.make_inputs_require_grad",
    "prepare_model_for_kbit_training.<locals>.make_inputs_require_grad",
)


def is_untouched(module: nn.Module) -> bool:
    """Return whether ``module`` has its own forward and no hooks but transformers' idle ones."""
    return (not is_hooked(module) or _has_only(module, _CAPTURE)) and not is_sharded(module)


def changes_no_value(module: nn.Module) -> bool:
    """Return whether ``module`` is untouched but for hooks of gradients and ``fully_shard``."""
    return not is_hooked(module) or _has_only(module, _CAPTURE, *_OF_GRADIENTS)


def _has_only(module: nn.Module, *hooks: str) -> bool:
    """Return whether ``module`` has its own forward, and hooks of these names at most."""
    return "forward" not in module.__dict__ and all(
        getattr(hook, "__qualname__", "") in hooks for hook in hooks_of(module)
    )
