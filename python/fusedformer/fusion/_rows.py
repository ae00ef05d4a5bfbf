"""What below an encoder needs sequences in a batch, where real tokens alone would be computed."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from fusedformer.fusion._configs import NAMES, attends, named
from fusedformer.nn._modules import hooks_of, is_sharded

_CAPTURE = "install_output_capuring_hook.<locals>.output_capturing_hook"
_HOOKS = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
# Packages whose modules in a layer compute each token by itself, or attend as layers know it.
_TOKENWISE = (
    "torch.nn.", "torch.ao.", "torch.distributed.", "torchao.", "bitsandbytes.", "transformers.",
    "fusedformer.", "peft.tuners.lora.", "peft.tuners.adalora.", "peft.tuners.ia3.",
)  # fmt: skip


def is_untouched(module: nn.Module) -> bool:
    """Whether no hooks but transformers' own, idle ones, and no other forward are on it."""
    return is_sharded_at_most(module) and not is_sharded(module)


def is_sharded_at_most(module: nn.Module) -> bool:
    """The same, but for ``fully_shard``, of a module that is called."""
    return "forward" not in module.__dict__ and all(
        getattr(hook, "__qualname__", "") == _CAPTURE for hook in hooks_of(module)
    )


def needs_batch(encoder: nn.Module, by_ours: bool = True) -> str:
    """Say what below ``encoder`` may need the batch that it was given; empty if nothing does.

    Args:
        encoder: whose layers would get the tokens of all sequences as one.
        by_ours: whether its attention has to be this library's by now.
    """
    if _has_any_global_hook():  # type: ignore[no-untyped-call]
        return "a hook on all modules"
    left = [(encoder, "")]
    while left:
        module, path = left.pop()
        for name, child in module.__dict__["_modules"].items():
            if child is None or name == "parametrizations":  # these compute weights
                continue
            own, where = child.__dict__, f"{path}{name}"
            cls: Any = type(child)
            if not f"{cls.__module__}.".startswith(_TOKENWISE):
                return f"'{where}' is a {cls.__name__}, which may need the batch"
            if ("forward" in own or any(own[n] for n in _HOOKS)) and not is_sharded_at_most(child):
                return f"'{where}' has a hook, or its forward was replaced"
            if own.get("chunk_size_feed_forward"):
                return f"'{where}' computes sequences in chunks"
            if by_ours and attends(cls) and named(own.get("config")) not in NAMES:
                return f"'{where}' attends by {named(own.get('config'))!r}"
            left.append((child, f"{where}."))
    return ""

