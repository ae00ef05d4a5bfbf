"""Configurations and weights from and to Hugging Face, for the models of this package."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusedformer.functional import Activation
from fusedformer.nn import QuickGELU

C = TypeVar("C", bound="ModelConfig")
W = TypeVar("W", bound="HuggingFaceWeights")

# From Hugging Face's names of activations to those of ``functional.bias_activation``.
ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu", "relu": "relu", "silu": "silu",
}  # fmt: skip


def activation_of(name: str) -> Callable[[Tensor], Tensor]:
    """Return the activation, as a layer takes and fuses it, for Hugging Face's ``name``."""
    found: dict[Activation, Callable[[Tensor], Tensor]] = {
        "gelu": F.gelu, "gelu_tanh": nn.GELU("tanh"), "quick_gelu": QuickGELU(), "relu": F.relu,
        "silu": F.silu,
    }  # fmt: skip
    return found[ACTIVATIONS[name]]


@dataclass(frozen=True)
class ModelConfig:
    """A base of configurations, with their checks.

    Fields of type ``int`` are at least 1; those named ``..._token_id`` are at least 0. Fields named
    ``...dropout...`` or ``...pdrop`` are in [0, 1].
    """

    # Hugging Face's settings that these models do not have, with the only value that fits.
    _fixed_settings: ClassVar[dict[str, Any]] = {}
    # Names of the fields for the width, the number of heads, and the activation.
    _checked_names: ClassVar[tuple[str, str, str]] = (
        "hidden_size", "num_attention_heads", "hidden_act",
    )  # fmt: skip

    def __post_init__(self) -> None:
        function = type(self).__name__
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            lowest = 0 if field.name.endswith("_token_id") else 1
            if str(field.type).startswith("int") and value is not None and value < lowest:
                raise ValueError(
                    f"{function}(): expected '{field.name}' to be at least {lowest}, "
                    f"but got {value}"
                )
            if re.search("dropout|pdrop", field.name) and not 0.0 <= value <= 1.0:
                raise ValueError(
                    f"{function}(): expected '{field.name}' to be in [0, 1], but got {value}"
                )
        width_name, heads_name, activation_name = self._checked_names
        width, heads = getattr(self, width_name), getattr(self, heads_name)
        activation = getattr(self, activation_name)
        if width % heads:
            raise ValueError(
                f"{function}(): expected '{heads_name}' to divide {width_name}={width}, "
                f"but got {heads}"
            )
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"{function}(): expected '{activation_name}' to be one of {tuple(ACTIVATIONS)}, "
                f"but got {activation!r}"
            )

    @classmethod
    def from_huggingface(cls: type[C], config: Mapping[str, Any]) -> C:
        """Make one from the content of a ``config.json``, or a configuration's ``to_dict()``.

        Raises:
            ValueError: a setting that this model does not have.
        """
        for name, expected in cls._fixed_settings.items():
            if config.get(name, expected) != expected:
                raise ValueError(
                    f"{cls.__name__}.from_huggingface(): expected {name}={expected!r}, "
                    f"but got {config[name]!r}"
                )
        known = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: config[name] for name in sorted(known & config.keys())})


class Source(NamedTuple):
    """Where one of our parameters is in Hugging Face's state dict."""

    names: tuple[str, ...]  # of tensors that are joined along rows
    transposed: bool = False  # stored as [in, out], as Conv1D does


def weight_and_bias(ours: str, theirs: str, transposed: bool = False) -> dict[str, Source]:
    """Return the sources of a module's weight and bias."""
    return {
        f"{ours}.weight": Source((f"{theirs}.weight",), transposed),
        f"{ours}.bias": Source((f"{theirs}.bias",)),
    }


class HuggingFaceWeights(nn.Module):
    """A base of models whose weights have other names in transformers."""

    # What some of their state dicts put before each name.
    _prefix: ClassVar[str] = ""
    # Beginnings of names that are ignored: parts that this model may lack.
    _ignored_parts: ClassVar[tuple[str, ...]] = ()
    # A pattern of names that are ignored: buffers of positions and masks.
    _ignored_buffers: ClassVar[str] = "$"
    # The class of the constructor's configuration.
    _config: ClassVar[Any]

    @classmethod
    def from_huggingface(
        cls: type[W], state_dict: Mapping[str, Tensor], config: Any, **settings: Any
    ) -> W:
        """Make a model in eval mode with Hugging Face's weights, in their dtype.

        Args:
            state_dict: as for :meth:`load_huggingface_state_dict`.
            config: ours, or the content of a ``config.json``.
            settings: other arguments of the constructor, as BERT's ``heads``, whose weights must
                be in ``state_dict``.
        """
        if not isinstance(config, cls._config):
            config = cls._config.from_huggingface(config)
        dtypes = (t.dtype for t in state_dict.values() if t.is_floating_point())
        model = cls(config, dtype=next(dtypes, None), **settings)
        model.load_huggingface_state_dict(state_dict)
        return model.eval()

    def _sources(self) -> dict[str, Source]:
        """Return where each of our parameters, by name, is at Hugging Face; without prefix."""
        raise NotImplementedError

    def _tied(self) -> dict[str, str]:
        """Return their names of tied weights, each with the name of our parameter."""
        return {}

    def _full_name(self, name: str) -> str:
        """Return one of their names with the prefix that their model with these parts has."""
        return self._prefix + name

    def load_huggingface_state_dict(self, state_dict: Mapping[str, Tensor]) -> list[str]:
        """Copy the weights of a model of transformers that has at least this model's parts.

        Args:
            state_dict: by Hugging Face's names, with or without the leading name of the base model.

        Returns:
            The names in ``state_dict`` of parts that this model does not have.

        Raises:
            KeyError: a weight is missing.
            ValueError: an unknown name, a weight of another shape, or an output layer that is not
                tied; nothing was copied then.
        """
        function, prefix = "load_huggingface_state_dict", self._prefix
        given = {name.removeprefix(prefix): tensor for name, tensor in state_dict.items()}
        ours: dict[str, Tensor] = {}
        used: set[str] = set()
        sources = self._sources()
        for name, source in sources.items():
            missing = [one for one in source.names if one not in given]
            if missing:
                raise KeyError(f"{function}(): missing {', '.join(missing)}")
            parts = [given[one] for one in source.names]
            joined = torch.cat(parts) if len(parts) > 1 else parts[0]
            ours[name] = joined.t() if source.transposed else joined
            used.update(source.names)
        problems = []
        for name, own in self._tied().items():
            if name in given:
                used.add(name)
                if not torch.equal(given[name], ours[own]):
                    problems.append(f"{name} is not tied to {' + '.join(sources[own].names)}")
        left = [n for n in given if n not in used and not re.fullmatch(self._ignored_buffers, n)]
        problems += [f"unknown {name}" for name in left if not name.startswith(self._ignored_parts)]
        problems += [
            f"{' + '.join(sources[name].names)} of shape {tuple(ours[name].shape)}, expected "
            f"{tuple(tensor.shape)}"
            for name, tensor in self.state_dict().items()
            if name in ours and tensor.shape != ours[name].shape
        ]
        if problems:
            raise ValueError(f"{function}(): {'; '.join(problems)}")
        self.load_state_dict(ours, strict=False)
        return left

    def to_huggingface_state_dict(self) -> dict[str, Tensor]:
        """Return the weights by the names and in the shapes of the model of transformers.

        Views of this model's own tensors, tied ones by both of their names. Parts that this model
        lacks are not there: load it with ``strict=False`` into a model that has them.
        """
        own = self.state_dict()
        theirs = self.to_huggingface_layout(own)
        return theirs | {name: own[parameter] for name, parameter in self._tied().items()}

    def to_huggingface_layout(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return tensors, such as gradients, by Hugging Face's names and in its shapes.

        ``tensors`` are by the names of this model's parameters; the result has views of them.
        Learned prompts and prefixes, which transformers' models lack, are left out.
        """
        sources = self._sources()
        theirs: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            if name in sources:
                names, transposed = sources[name]
                tensor = tensor.t() if transposed else tensor
                parts = tensor.chunk(len(names)) if len(names) > 1 else (tensor,)
                theirs.update(zip(map(self._full_name, names), parts, strict=True))
        return theirs
