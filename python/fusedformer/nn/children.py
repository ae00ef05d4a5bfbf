"""What the composite modules ask about their children: may they be fused, and how."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.modules.module import _has_any_global_hook

from fusedformer import functional
from fusedformer._internal.backend import chosen_backend
from fusedformer.errors import BadTypeError, BadValueError
from fusedformer.functional import Activation
from fusedformer.functional.steps import FeedForward, feed_forward, linear
from fusedformer.nn.layer_norm import LayerNorm
from fusedformer.nn.quick_gelu import QuickGELU

M = TypeVar("M", bound=nn.Module)

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def adopt(module: nn.Module, cls: type[M]) -> M:
    """``module`` as an instance of ``cls``, a subclass of its type that adds no state.

    Parameters, hooks and settings are the same objects, so nothing is initialized a second time.
    """
    adopted = cls.__new__(cls)
    adopted.__dict__.update(module.__dict__)
    return adopted


def is_plain(module: object, *types: type[nn.Module]) -> bool:
    """Whether ``module`` does what the forward of one of ``types`` does, and nothing besides.

    A subclass, a hook or a replaced ``forward`` may do more; such a module must be called.
    """
    cls = type(module)
    if getattr(cls, "_made_of", (cls,))[0] not in types:
        return False
    own = module.__dict__
    if "forward" in own or own["_forward_hooks"] or own["_forward_pre_hooks"]:
        return False
    if own["_backward_hooks"] or own["_backward_pre_hooks"]:
        return False
    return not _has_any_global_hook()  # type: ignore[no-untyped-call]


def is_sharded(module: object) -> bool:
    """Whether ``torch.distributed.fsdp.fully_shard`` was applied to ``module`` itself.

    Its parameters are then whole only while it is called.
    """
    return hasattr(type(module), "set_reshard_after_forward")


def must_be_called(layer: Any) -> bool:
    """Whether the parameters of a layer are plain tensors only within its ``_packed``."""
    return layer._is_parallel or is_sharded(layer)


def is_plain_or_sharded(module: Any, *types: type[nn.Module]) -> bool:
    """:func:`is_plain`, or what :func:`is_sharded` and was so before: what must be called still."""
    if not is_sharded(module):
        return is_plain(module, *types)
    classes = type(module).__mro__[1:]  # fully_shard made a subclass of its own mixin and of this
    before = next(one for one in classes if not one.__module__.startswith("torch.distributed."))
    return (
        getattr(before, "_made_of", (before,))[0] in types
        and "forward" not in module.__dict__
        and not list(hooks_of(module))
        and not _has_any_global_hook()  # type: ignore[no-untyped-call]
    )


def hooks_of(module: nn.Module) -> Iterator[Any]:
    """The hooks of ``module``, but those by which :func:`is_sharded` makes parameters whole."""
    for hooks in _HOOKS:
        for hook in module.__dict__[hooks].values():
            owner = type(getattr(hook, "__self__", None))
            if not owner.__module__.startswith("torch.distributed.fsdp."):
                yield hook


def call_packed(layer: Any, *args: Any) -> Any:
    """``layer._packed(*args)`` of what :func:`must_be_called`, as one of its calls."""
    if is_sharded(layer) and "_packed" not in layer.__dict__:
        from torch.distributed.fsdp import register_fsdp_forward_method

        register_fsdp_forward_method(layer, "_packed")
    return layer._packed(*args)


def project(x: Tensor, layer: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """``x @ weight.T``, and the bias that is still to be added, if any.

    The kernels add it on their way; ATen adds it for free within the product.
    """
    if chosen_backend(x) == "torch":
        return linear(x, layer.weight, layer.bias)[0], None
    return linear(x, layer.weight, None)[0], layer.bias


def fused_activation(activation: Any) -> Activation | None:
    """The name under which :func:`fusedformer.functional.bias_activation` knows a callable."""
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
    """Raise unless it is a name that torch's layers know, or a callable."""
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
    """Whether the fused steps do exactly what calling these children of a layer would do."""
    return (
        all(is_plain(linear, nn.Linear, NonDynamicallyQuantizableLinear) for linear in linears)
        and all(
            is_plain(norm, LayerNorm, nn.LayerNorm) and len(norm.normalized_shape) == 1
            for norm in norms
        )
        and all(is_plain(dropout, nn.Dropout) for dropout in dropouts)
    )


def feed_forward_of(layer: Any, x: Tensor, *, fork: bool) -> tuple[Tensor, Tensor | None, Tensor]:
    """The block of a layer without its last dropout, the bias still to be added, and ``x``."""
    return feed_forward(x, block_of(layer), fork=fork)


def block_of(layer: Any) -> FeedForward:
    """What :func:`feed_forward_of` computes."""
    name = fused_activation(layer.activation)
    return FeedForward(
        layer.linear1.weight,
        layer.linear1.bias,
        layer.linear2.weight,
        layer.linear2.bias,
        layer.activation if name is None else name,
        layer.dropout.p if layer.dropout.training else 0.0,
        layer.checkpoint_activation,
    )


class Pending(NamedTuple):
    """``dropout(x + bias) + residual``, not yet computed: the norm after it comes along."""

    x: Tensor
    bias: Tensor | None
    dropout: nn.Dropout
    residual: Tensor

    def added(self) -> Tensor:
        """The sum."""
        return functional.dropout_add(
            self.x, self.residual, input_bias=self.bias, **self._dropout()
        )

    def normed(self, norm: nn.LayerNorm) -> Tensor:
        """The norm of the sum."""
        output: Tensor = functional.dropout_add_layer_norm(
            self.x,
            self.residual,
            norm.normalized_shape,
            norm.weight,
            norm.bias,
            norm.eps,
            input_bias=self.bias,
            **self._dropout(),
        )
        return output

    def normed_and_sum(self, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
        """Both."""
        return functional.dropout_add_layer_norm(
            self.x,
            self.residual,
            norm.normalized_shape,
            norm.weight,
            norm.bias,
            norm.eps,
            input_bias=self.bias,
            return_sum=True,
            **self._dropout(),
        )

    def _dropout(self) -> dict[str, Any]:
        return {"p": self.dropout.p, "training": self.dropout.training}
