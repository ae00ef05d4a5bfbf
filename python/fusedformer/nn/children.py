"""Children of layers: whether fused steps may replace their calls, and those steps."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.modules.module import _has_any_global_hook

from fusedformer import functional
from fusedformer._internal.autocast import autocast_dtype
from fusedformer._internal.backend import chosen_backend
from fusedformer.errors import BadTypeError, BadValueError
from fusedformer.functional import Activation
from fusedformer.functional.steps import FeedForward, dropout_add_layer_norm, linear
from fusedformer.nn.layer_norm import LayerNorm
from fusedformer.nn.quick_gelu import QuickGELU

M = TypeVar("M", bound=nn.Module)

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def adopt(module: nn.Module, cls: type[M]) -> M:
    """Return ``module`` as an instance of ``cls``, a subclass of its type that adds no state.

    Parameters, hooks and settings are the same objects, so nothing is initialized a second time.
    """
    adopted = cls.__new__(cls)
    adopted.__dict__.update(module.__dict__)
    return adopted


def is_plain(module: object, *types: type[nn.Module]) -> bool:
    """Return whether calling ``module`` is the forward of one of ``types`` and no more.

    A subclass, a hook or a replaced ``forward`` may do more: then the module must be called.
    """
    cls = type(module)
    if cls not in types and getattr(cls, "_made_of", (cls,))[0] not in types:
        return False
    return not (is_hooked(module) or _has_any_global_hook())  # type: ignore[no-untyped-call]


def is_hooked(module: object) -> bool:
    """Return whether a call of ``module`` runs hooks, or a ``forward`` put on the instance."""
    own = module.__dict__
    return bool(
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or "forward" in own
    )


def is_sharded(module: object) -> bool:
    """Return whether ``torch.distributed.fsdp.fully_shard`` was applied to ``module`` itself.

    Its parameters are then whole only while it is called.
    """
    return hasattr(type(module), "set_reshard_after_forward")


def must_be_called(layer: Any) -> bool:
    """Return whether a layer's parameters are whole only during a call of ``_forward_fused``."""
    return layer._is_parallel or hasattr(type(layer), "set_reshard_after_forward")


def is_plain_or_sharded(module: Any, *types: type[nn.Module]) -> bool:
    """Return whether ``module`` is plain, or was before ``fully_shard`` was applied to it.

    A sharded module must still be called, see :func:`call_fused`.
    """
    if not is_sharded(module):
        return is_plain(module, *types)
    classes = type(module).__mro__[1:]  # fully_shard derives from its mixin and the class
    before = next(one for one in classes if not one.__module__.startswith("torch.distributed."))
    return (
        getattr(before, "_made_of", (before,))[0] in types
        and "forward" not in module.__dict__
        and not list(hooks_of(module))
        and not _has_any_global_hook()  # type: ignore[no-untyped-call]
    )


def hooks_of(module: nn.Module) -> Iterator[Any]:
    """List the hooks of ``module``, without those by which ``fully_shard`` gathers parameters."""
    for hooks in HOOKS:
        for hook in module.__dict__[hooks].values():
            owner = type(getattr(hook, "__self__", None))
            if not owner.__module__.startswith("torch.distributed.fsdp."):
                yield hook


def call_fused(layer: Any, *args: Any) -> Any:
    """Call ``layer._forward_fused``; a sharded layer gathers its parameters for it."""
    if is_sharded(layer) and "_forward_fused" not in layer.__dict__:
        from torch.distributed.fsdp import register_fsdp_forward_method

        register_fsdp_forward_method(layer, "_forward_fused")
    return layer._forward_fused(*args)


def project(x: Tensor, layer: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """Compute ``x @ weight.T``; return it and the bias that is still to be added, if any.

    The kernels add it in the step that follows; ATen adds it for free within the product.
    """
    if chosen_backend(x) == "torch":
        return linear(x, layer.weight, layer.bias)[0], None
    return linear(x, layer.weight, None)[0], layer.bias


def fused_activation(activation: Any) -> Activation | None:
    """Return the name by which ``functional.bias_activation`` knows a callable, or None."""
    if activation is F.relu or activation is torch.relu or is_plain(activation, nn.ReLU):
        return "relu"
    if activation is F.silu or is_plain(activation, nn.SiLU):
        return "silu"
    if activation is F.gelu:
        return "gelu"
    if is_plain(activation, nn.GELU):
        return "gelu_tanh" if activation.approximate == "tanh" else "gelu"
    if is_plain(activation, QuickGELU):
        return "quick_gelu"
    return None


def check_activation(function: str, activation: object) -> None:
    """Raise unless ``activation`` is a name that torch's layers know, or a callable."""
    if isinstance(activation, str) and activation not in ("relu", "gelu"):
        raise BadValueError(
            f"{function}(): expected 'activation' to be 'relu', 'gelu' or a callable, "
            f"but got {activation!r}"
        )
    if not isinstance(activation, str) and not callable(activation):
        raise BadTypeError(
            f"{function}(): expected 'activation' to be 'relu', 'gelu' or a callable, "
            f"but got {type(activation).__name__}"
        )


def are_plain(
    linears: Iterable[nn.Module], norms: Iterable[Any], dropouts: Iterable[nn.Module]
) -> bool:
    """Return whether the fused steps do exactly what calling these children of a layer would do."""
    return (
        all(is_plain(linear, nn.Linear, NonDynamicallyQuantizableLinear) for linear in linears)
        and all(
            is_plain(norm, LayerNorm, nn.LayerNorm) and len(norm.normalized_shape) == 1
            for norm in norms
        )
        and all(is_plain(dropout, nn.Dropout) for dropout in dropouts)
    )


def feed_forward_block(layer: Any) -> FeedForward:
    """Return the parameters and settings of a layer's feed-forward block."""
    name = fused_activation(layer.activation)
    return FeedForward(
        layer.linear1.weight,
        layer.linear1.bias,
        layer.linear2.weight,
        layer.linear2.bias,
        layer.activation if name is None else name,
        dropout_probability(layer.dropout),
        layer.checkpoint_activation,
    )


def dropout_probability(dropout: Any) -> float:
    """Return the probability with which ``dropout`` drops in its mode."""
    return dropout.p if dropout.training else 0.0


def weights_and_biases(*modules: Any) -> list[Any]:
    """List both parameters of linear layers and norms, past ``__getattr__``; of None two None."""
    found: list[Any] = []
    for module in modules:
        own = None if module is None else module._parameters
        if own is None:
            found += (None, None)
        elif "weight" in own and "bias" in own:
            found += (own["weight"], own["bias"])
        else:  # views that a wrapper has put there
            found += (module.weight, module.bias)
    return found


class Pending(NamedTuple):
    """``dropout(x + bias) + residual``, which is computed together with the norm that follows."""

    x: Tensor
    bias: Tensor | None
    dropout: nn.Dropout
    residual: Tensor

    def added(self) -> Tensor:
        """Compute the sum alone."""
        return functional.dropout_add(
            self.x,
            self.residual,
            p=self.dropout.p,
            training=self.dropout.training,
            input_bias=self.bias,
        )

    def normed(self, norm: nn.LayerNorm) -> Tensor:
        """Compute the norm of the sum."""
        output: Tensor = self._call_with_norm(norm, return_sum=False)
        return output

    def normed_and_sum(self, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
        """Compute the norm of the sum, and the sum."""
        both: tuple[Tensor, Tensor] = self._call_with_norm(norm, return_sum=True)
        return both

    def _call_with_norm(self, norm: nn.LayerNorm, *, return_sum: bool) -> Any:
        x, bias, dropout, residual = self
        shape, eps, p = norm.normalized_shape, norm.eps, dropout_probability(dropout)
        weight, offset = weights_and_biases(norm)
        if chosen_backend(x) == "torch":  # without checks, which take longer than a short text
            return dropout_add_layer_norm(
                x,
                residual,
                shape,
                weight,
                offset,
                eps,
                input_bias=bias,
                p=p,
                return_sum=return_sum,
                dtype=autocast_dtype("layer_norm", x, residual),
            )
        call: Any = functional.dropout_add_layer_norm  # its overloads take no variable return_sum
        more: Any = {"input_bias": bias, "p": p, "return_sum": return_sum}
        return call(x, residual, shape, weight, offset, eps, **more)
