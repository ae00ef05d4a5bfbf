"""Configurations of transformers' models, which name the attention function to use.

Models and their layers look the name up in a configuration that other models may hold too. So a
fused model gets copies that name this library's attention, and keeps the originals beside them.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Iterator
from types import FunctionType
from typing import Any, NamedTuple

from torch import nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.masking_utils import eager_mask

from fusedformer.fusion._attention import KEPT, attention, attention_mask, attention_mask_4d

# The second is for models that read a 4-D mask, the third for models that read it only as numbers
# added to scores.
NAMES = "fusedformer", "fusedformer_4d_masks", "fusedformer_added_masks"
NAME, NAME_4D, NAME_ADDED = NAMES
_NAMED = "_attn_implementation_internal"
_MASKS: tuple[Any, ...] = (attention_mask, attention_mask_4d, eager_mask)
# On import, so that it is done before a process uses a model that it unpickled.
for _name, _masks in zip(NAMES, _MASKS, strict=True):
    AttentionInterface.register(_name, attention)
    AttentionMaskInterface.register(_name, _masks)


_attends: dict[Any, bool] = {}


class Exchanged(NamedTuple):
    """A configuration of a module, and the one that it had before."""

    config: Any
    original: Any
    attends: bool  # whether attention uses it, and not only masks


def named(config: Any) -> Any:
    """Return the name of the attention in ``config``."""
    return getattr(config, _NAMED, None)


def attends(cls: Any) -> bool:
    """Return whether modules of a class look attention up by the name in their configuration."""
    if cls not in _attends:  # a dictionary, as compiled calls can read it
        names = (name for code in _functions_of(cls) for name in code.__code__.co_names)
        _attends[cls] = "ALL_ATTENTION_FUNCTIONS" in names
    return _attends[cls]


@functools.cache
def asks_for_name(cls: Any) -> bool:
    """Return whether modules of a class compute otherwise for unknown names."""
    constants = [one for code in _functions_of(cls) for one in code.__code__.co_consts]
    return any(isinstance(one, tuple) and {"eager", "sdpa"} <= {*one} for one in constants)


def computes_attention(module: nn.Module) -> bool:
    """Return whether a module of a model has its own attention, and looks none up."""
    cls: Any = type(module)
    elsewhere = f"{cls.__module__}.".startswith(("torch.", "timm.", "fusedformer."))
    return not elsewhere and "Attention" in cls.__name__ and _has_attention(cls)


@functools.cache
def _has_attention(cls: Any) -> bool:
    known = {"softmax", "Softmax", "scaled_dot_product_attention"}
    found = any(known & {*code.__code__.co_names} for code in _functions_of(cls))
    return found and not attends(cls) and not hasattr(cls, "_made_of")


def _functions_of(cls: type[Any]) -> Iterator[FunctionType]:
    """List the functions that a class defines, without their decorators."""
    for base in cls.__mro__:
        if base in (nn.Module, PreTrainedModel, object):
            continue
        for name in vars(base):
            if name in vars(PreTrainedModel):
                continue
            found = inspect.unwrap(getattr(cls, name)) if callable(getattr(cls, name)) else None
            if isinstance(found, FunctionType):
                yield found


def configs_of(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """List the attributes of ``module`` that are configurations."""
    for attribute, value in module.__dict__.items():
        if isinstance(value, PretrainedConfig):
            yield attribute, value


def exchange(model: nn.Module, names: dict[int, str], attending: set[int]) -> None:
    """Give the modules of ``model`` copies of their configurations.

    Args:
        model: whose modules hold them.
        names: by the ``id`` of a configuration, the attention that its copy names.
        attending: ids of those by which attention is computed.
    """
    copies: dict[int, Any] = {}

    def concerns(config: Any) -> bool:
        return id(config) in names or any(concerns(one) for one in _inner_configs(config).values())

    def copied(config: Any) -> Any:
        if id(config) not in copies:
            twin = copies[id(config)] = copy.copy(config)
            inner = {n: copied(one) for n, one in _inner_configs(config).items() if concerns(one)}
            twin.__dict__.update(inner)
            if id(config) in names:
                twin.__dict__[_NAMED] = names[id(config)]
        return copies[id(config)]

    for module in model.modules():
        for attribute, config in list(configs_of(module)):
            if concerns(config):
                module.__dict__[attribute] = copied(config)
                kept = Exchanged(copied(config), config, id(config) in attending)
                module.__dict__.setdefault(KEPT, {}).setdefault(attribute, kept)


def restore(model: nn.Module) -> int:
    """Give the modules of ``model`` their configurations back, with what was set in the copies.

    Returns:
        The number of configurations by which attention was computed.
    """
    before: dict[int, Any] = {}
    attending: set[int] = set()
    for module in model.modules():
        for attribute, (twin, original, is_attending) in module.__dict__.pop(KEPT, {}).items():
            if id(twin) not in before:
                _carry_over(twin, original)
            before[id(twin)] = original
            attending |= {id(twin)} if is_attending else set()
            if module.__dict__.get(attribute) is twin:
                module.__dict__[attribute] = original
    usual = next(map(named, before.values()), "sdpa")
    for module in model.modules():  # modules made since then got our copies
        for _, config in configs_of(module):
            for one in (config, *_inner_configs(config).values()):
                if named(one) in NAMES:
                    one.__dict__[_NAMED] = usual
    return len(attending)


def _carry_over(twin: Any, original: Any) -> None:
    for name, value in vars(twin).items():
        if name != _NAMED and not isinstance(value, PretrainedConfig):
            original.__dict__[name] = value


def _inner_configs(config: Any) -> dict[str, Any]:
    return {n: one for n, one in vars(config).items() if isinstance(one, PretrainedConfig)}
