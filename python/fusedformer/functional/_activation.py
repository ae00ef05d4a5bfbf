"""Add a bias and apply an activation."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from fusedformer import ops
from fusedformer._internal import checks
from fusedformer._internal.plans import planned
from fusedformer.errors import BadValueError

Activation = Literal["gelu", "gelu_tanh", "quick_gelu", "relu", "silu"]
ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu", "relu", "silu")


@planned
def bias_activation(
    input: Tensor,
    bias: Tensor | None = None,
    activation: Activation = "gelu",
    *,
    p: float = 0.0,
    training: bool = True,
) -> Tensor:
    """Compute ``dropout(activation(input + bias))`` in one kernel, inside a feed-forward block.

    Args:
        input: ``[..., d]``, the output of a product without its bias.
        bias: ``[d]``, or None. Its gradient comes from the same kernel as that of ``input``.
        activation: ``"gelu"`` (exact, by erf), ``"gelu_tanh"``, ``"quick_gelu"``
            (``x * sigmoid(1.702 * x)``), ``"relu"`` or ``"silu"``.
        p: probability that an element is dropped, in [0, 1].
        training: no dropout if False.

    Returns:
        Tensor of the shape and dtype of ``input``.

    Raises:
        TypeError: ``input`` or ``bias`` is not floating-point; ``p`` is not a number.
        ValueError: unknown ``activation``; ``bias`` not of shape ``[d]``; ``p`` outside [0, 1].

    Source: Hendrycks and Gimpel, Gaussian Error Linear Units, arXiv:1606.08415.
    """
    _check_bias_activation(input, bias, activation, p)
    return ops.bias_activation(input, bias, activation, p if training else 0.0)


@planned
def gated_activation(
    input: Tensor,
    bias: Tensor | None = None,
    activation: Activation = "gelu",
    *,
    activates: Literal["first", "second"] = "first",
    p: float = 0.0,
    training: bool = True,
) -> Tensor:
    """Compute ``dropout(activation(a) * b)`` in one kernel, with a, b = halves of input + bias.

    It is GeGLU (``"gelu"``, ``"gelu_tanh"``), SwiGLU (``"silu"``) and ReGLU (``"relu"``) on the
    output of one product for both halves.

    Args:
        input: ``[..., 2 * d]``, the output of a product without its bias.
        bias: ``[2 * d]``, or None. Its gradient comes from the same kernel as that of ``input``.
        activation: as for :func:`bias_activation`.
        activates: which half goes through the activation; the other one is its factor.
        p: probability that an element of the result is dropped, in [0, 1].
        training: no dropout if False.

    Returns:
        Tensor ``[..., d]`` in the dtype of ``input``.

    Raises:
        TypeError: ``input`` or ``bias`` is not floating-point; ``p`` is not a number.
        ValueError: unknown ``activation`` or ``activates``; the last dimension of ``input`` is odd;
            ``bias`` not of shape ``[2 * d]``; ``p`` outside [0, 1].

    Source: Shazeer, GLU Variants Improve Transformer, arXiv:2002.05202.
    """
    _check_gated_activation(input, bias, activation, activates, p)
    return ops.gated_activation(
        input, bias, activation, p if training else 0.0, activates_second=activates == "second"
    )


@checks.remembered
def _check_gated_activation(
    input: Tensor, bias: Tensor | None, activation: Activation, activates: str, p: float
) -> None:
    function = "gated_activation"
    _check_activation(function, input, bias, activation, p)
    if activates not in ("first", "second"):
        raise BadValueError(
            f"{function}(): expected 'activates' to be 'first' or 'second', but got {activates!r}"
        )
    if input.shape[-1] % 2:
        raise BadValueError(
            f"{function}(): expected the last dimension of 'input' to be even, but got shape "
            f"{tuple(input.shape)}"
        )


@checks.remembered
def _check_bias_activation(
    input: Tensor, bias: Tensor | None, activation: Activation, p: float
) -> None:
    _check_activation("bias_activation", input, bias, activation, p)


def _check_activation(
    function: str, input: Tensor, bias: Tensor | None, activation: Activation, p: float
) -> None:
    checks.check_input(function, "input", input)
    if activation not in ACTIVATIONS:
        raise BadValueError(
            f"{function}(): expected 'activation' to be one of {ACTIVATIONS}, "
            f"but got {activation!r}"
        )
    of = "the last dimension of 'input'"
    checks.check_parameter(function, "bias", bias, input.shape[-1:], of)
    checks.check_same_device(function, {"input": input, "bias": bias})
    checks.check_probability(function, "p", p)
