"""Ops as ``torch.library`` knows them, and the short way to them for eager calls.

The dispatcher, its wrappers and a registered autograd formula take longer than a small kernel.
Compilers, dispatch modes (checkpoint policies, fake tensors), tensor subclasses (DTensor) and
``torch.func`` need them; a call on plain tensors does not, and goes to the launcher directly, by
way of an ``autograd.Function`` of the same formula where a gradient is wanted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._C._functorch import unwrap_if_dead
from torch.nn import Parameter
from torch.profiler import record_function

from fusedformer._internal.plans import saved_as_they_are
from fusedformer._internal.tracing import is_eager
from fusedformer_kernels.runtime.steps import recorder

Function = TypeVar("Function", bound=Callable[..., Any])

_OTHERS = frozenset({type(None), bool, int, float, str, list, torch.dtype})


class Op:
    """``torch.ops.fusedformer.<name>``; made by :func:`registered`, called by position."""

    def __init__(self, name: str, implementation: Callable[..., Any], schema: str | None) -> None:
        self.name = f"fusedformer::{name}"
        self._run = implementation
        torch.library.custom_op(
            self.name, _for_dispatcher(implementation), mutates_args=(),
            schema=schema or torch.library.infer_schema(implementation, mutates_args=()),
        )  # fmt: skip
        self._overload = getattr(torch.ops.fusedformer, name).default
        self._differentiable: Any = None

    def __call__(self, *args: Any) -> Any:
        if not is_eager():
            return self._overload(*args)
        wanted = False
        for value in args:
            kind = type(value)
            if kind is Tensor or kind is Parameter:
                # Negative views have a sign that is still to be applied, and torch.func leaves
                # wrappers behind.
                if value.is_meta or value.is_neg() or unwrap_if_dead(value) is not value:
                    return self._overload(*args)
                wanted = wanted or value.requires_grad
            elif kind not in _OTHERS:
                return self._overload(*args)
        run = self._run
        if wanted and torch.is_grad_enabled() and self._differentiable is not None:
            noted = recorder()
            if noted is not None:
                return noted.differentiated(self._differentiable, args)
            run, args = self._differentiable, (*args, None)
        if torch._C._autograd._profiler_enabled():
            with record_function(self.name):
                return run(*args)
        return run(*args)

    def register_fake(self, fake: Function) -> Function:
        """Shapes, dtypes and strides of the results, None for those left out; a decorator."""
        torch.library.register_fake(self.name)(_for_dispatcher(fake))
        return fake

    def register_autograd(
        self,
        backward: Callable[..., Any],
        setup_context: Callable[..., None] | None = None,
        *,
        only_launches: bool = False,
    ) -> None:
        """Register the gradient formula, in the form of ``torch.library.register_autograd``.

        Args:
            backward, setup_context: as there.
            only_launches: says that ``backward`` does what plans of launches hold, and no more.
        """
        torch.library.register_autograd(self.name, backward, setup_context=setup_context)
        members = {
            "forward": _node_forward(self._run, setup_context),
            "backward": _node_backward(backward, only_launches=only_launches),
        }
        function = type(self.name, (torch.autograd.Function,), members)
        self._differentiable = plain_apply(function)


def _node_forward(
    implementation: Callable[..., Any], setup_context: Callable[..., None] | None
) -> Any:
    """Return the forward of a node; it takes the op's inputs, and how a planned call gives them."""

    def forward(ctx: Any, *given: Any) -> Any:
        inputs, call = given[:-1], given[-1]
        if call is None:
            output, ctx.plan = implementation(*inputs), None
        else:
            planned, tensors, pointers = call
            output = planned.run(implementation, inputs, tensors, pointers)
            ctx.plan = planned.plan if saved_as_they_are() else None
        if setup_context is not None:
            setup_context(ctx, inputs, output)
        return output

    return staticmethod(forward)


def _node_backward(formula: Callable[..., Any], *, only_launches: bool) -> Any:
    """Return the backward of a node, by a plan that follows its forward's if there is one."""
    follow: Any = None

    def backward(ctx: Any, *grads: Any) -> Any:
        nonlocal follow
        if (
            not only_launches
            or ctx.plan is None
            or torch.is_grad_enabled()
            or not is_eager()
            or torch._C._autograd._profiler_enabled()
        ):
            return *formula(ctx, *grads), None
        given = [grad for grad in grads if grad is not None]
        if not given:
            return *formula(ctx, *grads), None
        if follow is None:
            from fusedformer_kernels.runtime.plans import follow
        kind = (
            ctx.needs_input_grad,
            *[None if grad is None else (grad.dtype, grad.shape, grad.stride()) for grad in grads],
        )
        others = (*given[1:], *ctx.saved_tensors)
        return *follow(ctx.plan, kind, given[0], others, lambda: formula(ctx, *grads)), None

    return staticmethod(backward)


def plain_apply(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """Its ``apply`` without torch.func's part, which looks at every argument once more."""
    apply: Callable[..., Any] = super(torch.autograd.Function, function).apply  # type: ignore[misc]
    return apply


def registered(name: str, schema: str | None = None) -> Callable[[Callable[..., Any]], Op]:
    """Register a function under ``fusedformer::name``; a decorator.

    It may return None for what it was not asked to compute where the schema says Tensor: the
    dispatcher, which does not allow that, gets an empty tensor.
    """
    return lambda implementation: Op(name, implementation, schema)


def saved_may_be_overwritten() -> bool:
    """Whether a backward formula is the last to see what its forward saved, and nobody traces it.

    If it were not the last, autograd would find the overwritten tensor out and raise.
    """
    return not (
        torch.is_grad_enabled()
        or not is_eager()
        or torch._C._autograd._get_current_graph_task_keep_graph()
    )


def _for_dispatcher(implementation: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        found = implementation(*args, **kwargs)
        if isinstance(found, Tensor):
            return found
        given = (*args, *kwargs.values())
        like = next(value for value in given if isinstance(value, Tensor))
        return tuple(nothing(like) if output is None else output for output in found)

    return run


def nothing(like: Tensor) -> Tensor:
    """The empty tensor that the dispatcher gets for an output that was not asked for."""
    return like.new_empty(0)
