"""The torch backend on packed sequences, whose lengths it reads: one op, which can be traced."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from fusedformer._internal.autocast import autocast_off
from fusedformer.ops._registered import nothing, registered
from fusedformer.ops._shared import no_double_backward
from fusedformer.ops.attention.aten import attention_aten
from fusedformer.ops.attention.registered import (
    LEARNED,
    N_TERMS,
    TERMS,
    laid_out_like,
    learned_like,
    load,
    needed,
    save,
    term_gradients,
)
from fusedformer.ops.attention.terms import AttentionTerms


def seeded_aten(given: list[Any], return_lse: bool, wide_lse: bool = False) -> list[Tensor]:
    """[output], or [output, log-sum-exp], of tensors and terms; as :func:`attention_aten`."""
    how = {"return_lse": return_lse, "wide_lse": wide_lse}
    query, key, value, *others = given
    terms = AttentionTerms(*others)
    if terms.seed is None:
        found = attention_aten(query, key, value, terms, **how)
    else:
        with torch.random.fork_rng([query.device] if query.is_cuda else []):
            torch.manual_seed(int(terms.seed))
            found = attention_aten(query, key, value, terms, **how)
    return [t for t in found[: 1 + return_lse] if t is not None]


@registered(
    "packed_attention_aten",
    schema="(Tensor query, Tensor key, Tensor value, bool return_lse, "
    f"{TERMS}) -> (Tensor, Tensor)",
)  # fmt: skip
def packed_attention_aten(
    query: Tensor, key: Tensor, value: Tensor, return_lse: bool, *terms: Any
) -> tuple[Tensor, Tensor | None]:
    """(output, log-sum-exp or None) of the packed form."""
    output, *lse = seeded_aten([query, key, value, *terms], return_lse)
    output = output.transpose(1, 2).contiguous().transpose(1, 2)
    return output, lse[0].contiguous() if lse else None


@packed_attention_aten.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, return_lse: bool, *terms: Any
) -> tuple[Tensor, Tensor]:
    batch, heads, length, _ = query.shape
    output = query.new_empty(batch, length, heads, value.shape[-1]).transpose(1, 2)
    wide = torch.promote_types(query.dtype, torch.float32)
    lse = query.new_empty(batch, heads, length, dtype=wide) if return_lse else nothing(query)
    return output, lse


@contextlib.contextmanager
def _differentiable() -> Iterator[None]:
    """Let autograd see the body of an op, where it is off for as long as the op runs.

    Another thread would not do: the backward of CUDA tensors runs in one thread for each device,
    which would wait for that other thread, and that one for it.
    """
    with torch._C._ForceDispatchKeyGuard(*_OF_A_NEW_THREAD), torch.enable_grad():
        yield


def _dispatched() -> tuple[Any, Any]:
    """Return the keys that this thread dispatches to whatever the tensors, and those it skips."""
    return torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()


with ThreadPoolExecutor(1) as _thread:
    _OF_A_NEW_THREAD = _thread.submit(_dispatched).result()


@registered(
    "packed_attention_aten_backward",
    schema="(Tensor? grad, Tensor? lse_grad, Tensor query, Tensor key, Tensor value, "
    f"bool[] needs, {TERMS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)  # fmt: skip
def packed_attention_aten_backward(
    grad: Tensor | None,
    lse_grad: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    needs: list[bool],
    *terms: Any,
) -> tuple[Tensor | None, ...]:
    """Gradients of query, key, value and what is learned; the forward is computed again."""
    given: list[Any] = [query, key, value, *terms]
    places = [0, 1, 2, *(3 + i for i in LEARNED)]
    wanted = [place for place, need in zip(places, needs, strict=True) if need]
    for place in wanted:
        given[place] = given[place].detach()
    leaves = [given[place] for place in wanted]
    with _differentiable(), autocast_off(query):
        for leaf in leaves:
            leaf.requires_grad_()
        outputs = seeded_aten(given, lse_grad is not None)
        pairs = zip(outputs, (grad, lse_grad), strict=False)
        known = [(output, grad) for output, grad in pairs if grad is not None]
        outputs, grads = (list(each) for each in zip(*known, strict=True))
        found = torch.autograd.grad(
            outputs, leaves, grads, allow_unused=True, materialize_grads=True
        )
    own = dict(zip(wanted, found, strict=True))
    first = (
        own[i].transpose(1, 2).contiguous().transpose(1, 2) if i in own else None for i in range(3)
    )
    learned = (own[place].contiguous() if place in own else None for place in places[3:])
    return (*first, *learned)


@packed_attention_aten_backward.register_fake
def _(
    grad: Tensor | None,
    lse_grad: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    needs: list[bool],
    *terms: Any,
) -> tuple[Tensor, ...]:
    inputs = zip((query, key, value), needs[:3], strict=True)
    return (*(laid_out_like(t, need) for t, need in inputs), *learned_like(terms, needs[3:], query))


def _packed_aten_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    save(ctx, inputs[:3], inputs[4:])
    ctx.set_materialize_grads(False)
    if not inputs[3] and output[1] is not None:
        ctx.mark_non_differentiable(output[1])


def _packed_aten_autograd(
    ctx: Any, grad: Tensor | None, lse_grad: Tensor | None
) -> tuple[Tensor | None, ...]:
    if grad is None and lse_grad is None:
        return (None,) * (4 + N_TERMS)
    tensors, terms = load(ctx)
    first, learned = list(ctx.needs_input_grad[:3]), needed(ctx, 4)
    grads = packed_attention_aten_backward(grad, lse_grad, *tensors, [*first, *learned], *terms)
    wanted = (g if need else None for g, need in zip(grads[:3], first, strict=True))
    return (*wanted, None, *term_gradients(grads[3:], learned))


packed_attention_aten.register_autograd(_packed_aten_autograd, setup_context=_packed_aten_setup)
packed_attention_aten_backward.register_autograd(no_double_backward("compiled packed attention"))
