"""Modules whose sequence is spread over the ranks of a group."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fusedformer.distributed._agreement import agree
from fusedformer.distributed._ring import ring_attention
from fusedformer.nn import MultiheadAttention

M = TypeVar("M", bound=nn.Module)


def context_parallel(
    module: M,
    group: dist.ProcessGroup | None = None,
    *,
    load_balance: bool = False,
    check: bool = True,
) -> M:
    """Let all attention in ``module`` go over the sequence of a whole group; in place.

    Every rank has the module, calls it with its part of the sequence (:func:`split_sequence`) and
    gets its part of the output. Products, norms and activations work on the rank's own rows;
    attention is :func:`ring_attention`. Every rank's backward starts from the loss of its own rows;
    :func:`sum_gradients` then adds up the gradients of the parameters, and every rank takes the
    same step; ``DistributedDataParallel`` takes their mean, so multiply the loss by the number of
    ranks there. Positions are to be added before the sequence is split.

    ``src_key_padding_mask`` (boolean) is that of the rank's part. A causal mask is given as for one
    process, of the size of the part, with ``is_causal=True`` where the module asks for it; it then
    goes by position in the whole sequence. Padding is computed, as all parts must have one shape.
    Dropout outside attention draws from each rank's generator: seed the ranks differently.

    Args:
        module: a :class:`~fusedformer.nn.MultiheadAttention`, or a module that contains some: a
            ``TransformerEncoder`` or its layer. ``fuse`` a stock module first.
        group: over which the sequence is spread; the default group if None.
        load_balance: whether parts are those of ``split_sequence(..., load_balance=True)``.
        check: as for :func:`ring_attention`.

    Returns:
        ``module``.

    Raises:
        ValueError: it contains no such attention, or one of ``torch.nn``, or one that appends
            keys (``add_bias_kv``, ``add_zero_attn``). When called: attention weights that are asked
            for, and masks other than by padding and causality.
    """
    function = "context_parallel"
    found = []
    for name, child in module.named_modules():
        if not isinstance(child, nn.MultiheadAttention):
            continue
        if not isinstance(child, MultiheadAttention):
            raise ValueError(
                f"{function}(): {name or 'the module'} is a torch.nn.MultiheadAttention; call "
                f"fusedformer.fuse() on the module first"
            )
        if child.bias_k is not None or child.add_zero_attn:
            raise ValueError(
                f"{function}(): {name or 'the module'} appends keys (add_bias_kv or "
                f"add_zero_attn), which every rank would do"
            )
        found.append(child)
    if not found:
        raise ValueError(
            f"{function}(): expected a module with a fusedformer.nn.MultiheadAttention in it, "
            f"but got {type(module).__name__}"
        )
    for child in found:
        child.ring = _Attention(group, load_balance, check)
    return module


@dataclass(frozen=True)
class _Attention:
    """The function that modules call in place of ``functional.scaled_dot_product_attention``."""

    group: dist.ProcessGroup | None
    load_balance: bool
    check: bool

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None,
        dropout_p: float,
        is_causal: bool,
        *,
        key_mask: Tensor | None,
        return_weights: bool | str = False,
    ) -> Tensor:
        if attn_mask is not None or return_weights:
            what = "attention weights" if return_weights else "a mask of queries and keys"
            raise ValueError(
                f"context_parallel(): attention over a group has no place for {what}; it takes a "
                f"boolean padding mask, the causal mask with is_causal=True, need_weights=False"
            )
        output: Tensor = ring_attention(
            query,
            key,
            value,
            group=self.group,
            is_causal=is_causal,
            dropout_p=dropout_p,
            key_mask=key_mask,
            load_balance=self.load_balance,
            check=self.check,
        )
        return output

    def __deepcopy__(self, memo: Any) -> _Attention:
        return self  # a process group cannot be copied


def sum_gradients(
    parameters: Iterable[Tensor],
    group: dist.ProcessGroup | None = None,
    *,
    check: bool = True,
) -> None:
    """Add up the gradients of ``parameters`` over the ranks of a group, in place.

    For what each rank computed of its own part of a sequence, or of a batch whose loss is divided
    by what all ranks have of tokens: call it between the backward and the optimizer's step.

    Args:
        parameters: of the module, in the same order on every rank. Those without a gradient are
            left alone.
        group: over which to add up; the default group if None.
        check: ask all ranks whether they have gradients of the same parameters.

    Raises:
        ValueError: on every rank, if they have not.
    """
    grads = [p.grad for p in parameters if p.grad is not None]

    def describe() -> dict[str, object]:
        return {"the shapes of gradients": [(tuple(g.shape), str(g.dtype)) for g in grads]}

    agree("sum_gradients", group, describe, check)
    with torch.no_grad():
        works = [dist.all_reduce(grad, group=group, async_op=True) for grad in grads]
        for work in works:
            if work is not None:
                work.wait()
