"""Norms of transformers' models in place of theirs, and norms as steps of fused layers.

Nearly every model has a class of its own for the one formula. What a class computes is told by the
code of its ``forward``, which is compared with that of classes whose formula is known.
"""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from fusedformer import functional
from fusedformer._internal.backend import chosen_backend
from fusedformer.fusion._residual import Scaled
from fusedformer.nn import LayerNorm
from fusedformer.nn.children import Pending, is_plain
from fusedformer.nn.tracers import introduce


class RMSNorm:
    """Llama's and T5's: with a weight at most, and the epsilon as ``variance_epsilon``."""

    FUNCTION = "rms_norm"

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        """Compute what the class behind this one computes."""
        weight = gain(self)
        if not dtypes_fit((self,), hidden_states) or not _takes_gain(self, hidden_states):
            own: Tensor = super().forward(hidden_states)  # type: ignore[misc]
            return own
        shape = hidden_states.shape[-1:] if weight is None else weight.shape
        found = functional.rms_norm(hidden_states, shape, weight, epsilon(self))
        return found.to(hidden_states.dtype)  # autocast may have widened it


class CenteredRMSNorm(RMSNorm):
    """Gemma's: the gain is one more than the weight, and the epsilon is ``eps``."""


class PlainLayerNorm:
    """DeBERTa's, ESM-C's and Cohere's: torch's formula, and the dtype of the input.

    DeBERTa's is computed in float32 whatever the dtype, and rounded before the weight multiplies.
    Cohere's has no bias, and for heads a weight of each.
    """

    FUNCTION = "layer_norm"

    @property
    def normalized_shape(self: Any) -> tuple[int, ...]:
        """Return what torch's class keeps."""
        shape: tuple[int, ...] = self.weight.shape
        return shape

    @property
    def eps(self: Any) -> float:
        """Return what torch's class keeps."""
        return epsilon(self)

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        """Compute what the class behind this one computes."""
        if not dtypes_fit((self,), hidden_states) or self.weight.dim() > 1:
            own: Tensor = super().forward(hidden_states)  # type: ignore[misc]
            return own
        shape, bias = self.weight.shape, getattr(self, "bias", None)
        found = functional.layer_norm(hidden_states, shape, self.weight, bias, epsilon(self))
        return found.to(hidden_states.dtype)  # autocast may have widened it


introduce([RMSNorm, PlainLayerNorm])

_RMS = RMSNorm, CenteredRMSNorm

_MODELS = "transformers.models."
# Classes whose formula is known, by what computes them.
_KNOWN: tuple[tuple[type[Any], str, str], ...] = (
    (RMSNorm, "llama.modeling_llama", "LlamaRMSNorm"),
    (RMSNorm, "olmo2.modeling_olmo2", "Olmo2RMSNorm"),
    (RMSNorm, "helium.modeling_helium", "HeliumRMSNorm"),
    (RMSNorm, "t5.modeling_t5", "T5LayerNorm"),
    (RMSNorm, "embedding_gemma2.modeling_embedding_gemma2", "EmbeddingGemma2RMSNorm"),
    (CenteredRMSNorm, "gemma3.modeling_gemma3", "Gemma3RMSNorm"),
    (PlainLayerNorm, "deberta.modeling_deberta", "DebertaLayerNorm"),
    (PlainLayerNorm, "esmc.modeling_esmc", "EsmcLayerNorm"),
    (PlainLayerNorm, "cohere.modeling_cohere", "CohereLayerNorm"),
)


_computed_by: dict[Any, Any] = {}  # a dictionary, as compiled calls can read it


def norm_of(cls: Any) -> Any:
    """Return the class here that computes what a norm of transformers does; None if none does."""
    if cls not in _computed_by:
        _computed_by[cls] = _looked_up(getattr(cls, "_made_of", (cls,))[0])
    return _computed_by[cls]


def _looked_up(cls: Any) -> Any:
    if cls in (*_RMS, PlainLayerNorm):
        return cls
    if not cls.__module__.startswith(_MODELS) or not inspect.isfunction(cls.forward):
        return None
    code = _code_of(cls)
    for ours, module, name in _KNOWN:
        known = getattr(importlib.import_module(_MODELS + module), name, None)
        if known is not None and cls.__bases__ == known.__bases__ and code == _code_of(known):
            return ours
    return None


def _code_of(cls: Any) -> list[Any]:
    """Return what the methods of a norm compute, whatever their variables are called."""
    codes = [
        inspect.unwrap(method).__code__
        for method in (getattr(cls, "_norm", None), cls.forward)
        if inspect.isfunction(method)
    ]
    return [(code.co_code, code.co_names, _numbers(code.co_consts)) for code in codes]


def _numbers(constants: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the constants without names and docstrings."""
    return tuple(one for one in constants if not isinstance(one, str))


def is_plain_norm(norm: Any) -> bool:
    """Return whether ``norm`` is one that the fused steps know, or none at all."""
    if is_plain(norm, LayerNorm, nn.LayerNorm):
        return len(norm.normalized_shape) == 1
    if norm_of(type(norm)) is not None:
        return is_plain(norm, getattr(type(norm), "_made_of", (type(norm),))[0])
    return is_plain(norm, nn.Identity)


def is_rms(norm: Any) -> bool:
    """Return whether ``norm`` is an RMS norm, replaced or still to be replaced."""
    return norm_of(type(norm)) in _RMS


def gain(norm: Any) -> Any:
    """Return what an RMS norm multiplies with, if anything; in float32 at least if it is a sum."""
    weight: Any = getattr(norm, "weight", None)
    if norm_of(type(norm)) is not CenteredRMSNorm:
        return weight
    return weight.to(torch.promote_types(weight.dtype, torch.float32)) + 1


def epsilon(norm: Any) -> float:
    """Return the epsilon of a norm."""
    own = norm.__dict__
    found: float = own["variance_epsilon"] if "variance_epsilon" in own else own["eps"]
    return found


def normed(pending: Pending | Scaled, norm: Any) -> Tensor:
    """Compute the norm of a sum that is pending."""
    if isinstance(pending, Scaled) or isinstance(norm, nn.Identity):
        return norm(pending.added())  # type: ignore[no-any-return]
    if not is_rms(norm):
        return pending.normed(norm)
    output: Tensor = _call(pending, norm, return_sum=False)
    return output


def normed_and_sum(pending: Pending | Scaled, norm: Any | None) -> tuple[Tensor, Tensor]:
    """Compute the norm of a sum that is pending, and the sum; the sum twice without a norm."""
    if norm is None or isinstance(norm, nn.Identity):
        total = pending.added()
        return total, total
    if isinstance(pending, Scaled):
        total = pending.added()
        return norm(total), total
    if not is_rms(norm):
        return pending.normed_and_sum(norm)
    both: tuple[Tensor, Tensor] = _call(pending, norm, return_sum=True)
    return both


def _takes_gain(norm: Any, x: Tensor) -> bool:
    """Return whether the backend norms ``x`` with the gain; ATen's warns of one that is wider."""
    is_wider = norm_of(type(norm)) is CenteredRMSNorm and x.dtype.itemsize < 4
    return not is_wider or chosen_backend(x) != "torch"


def _call(pending: Pending, norm: Any, *, return_sum: bool) -> Any:
    if not _takes_gain(norm, pending.x):
        total = pending.added()
        return (norm(total), total) if return_sum else norm(total)
    weight = gain(norm)
    call: Any = functional.dropout_add_rms_norm  # its overloads take no variable return_sum
    return call(
        pending.x,
        pending.residual,
        weight.shape,
        weight,
        epsilon(norm),
        p=pending.dropout.p,
        training=pending.dropout.training,
        input_bias=pending.bias,
        return_sum=return_sum,
    )


def dtypes_fit(norms: tuple[Any, ...], x: Tensor) -> bool:
    """Return whether norms with casts have the dtype of ``x``, so that these change nothing."""
    known = [norm for norm in norms if norm is not None and norm_of(type(norm)) is not None]
    return all(getattr(norm, "weight", x).dtype == x.dtype for norm in known)
