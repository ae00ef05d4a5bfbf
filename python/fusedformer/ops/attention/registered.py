"""The registered attention ops: schemas, fakes and autograd of the kernels.

Every op takes the fields of :class:`~fusedformer.ops.attention.terms.AttentionTerms` last, in
their order, so that torch.compile, export and the dispatcher see plain tensors and numbers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusedformer.ops._registered import nothing, registered
from fusedformer.ops._shared import no_double_backward
from fusedformer.ops.attention.terms import N_TENSORS, OF_HEADS_ALONE, AttentionTerms

TERMS = (
    "Tensor? mask, Tensor? key_mask, Tensor? key_lengths, Tensor? slopes, Tensor? table, "
    "Tensor? gate, Tensor? sinks, Tensor? starts_q, Tensor? starts_k, Tensor? seed, float p, "
    "SymInt? left, SymInt? right, bool align_end, float scale, float? softcap, SymInt max_queries, "
    "SymInt max_keys"
)
N_TERMS = len(AttentionTerms._fields)
LEARNED = (0, 3, 4, 5, 6)  # that may require a gradient: mask, slopes, table, gate, sinks
# Those that weights have a gradient for: the sinks' comes by way of the log-sum-exp.
_OF_WEIGHTS = LEARNED[:4]


def laid_out_like(tensor: Tensor, wanted: bool) -> Tensor:
    """A gradient as the kernels lay it out: [batch, length, heads, dim] in memory."""
    if not wanted:
        return nothing(tensor)
    batch, heads, length, dim = tensor.shape
    return tensor.new_empty(batch, length, heads, dim).transpose(1, 2)


def learned_like(terms: tuple[Any, ...], wanted: list[bool], otherwise: Tensor) -> list[Tensor]:
    tensors = (terms[i] for i in LEARNED[: len(wanted)])
    return [
        nothing(otherwise) if t is None or not want else t.new_empty(t.shape)
        for t, want in zip(tensors, wanted, strict=True)
    ]


def needed(ctx: Any, first_term: int, learned: tuple[int, ...] = LEARNED) -> list[bool]:
    return [bool(ctx.needs_input_grad[first_term + i]) for i in learned]


def term_gradients(grads: tuple[Tensor, ...], needs: list[bool]) -> list[Tensor | None]:
    """Gradients of all terms, from those of the learned ones."""
    found: list[Tensor | None] = [None] * N_TERMS
    for index, grad, need in zip(LEARNED[: len(needs)], grads, needs, strict=True):
        found[index] = grad if need else None
    return found


def save(ctx: Any, tensors: tuple[Tensor, ...], terms: tuple[Any, ...]) -> None:
    """Save ``tensors`` and the terms, whose tensors come first."""
    ctx.save_for_backward(*tensors, *terms[:N_TENSORS])
    ctx.n_saved, ctx.numbers = len(tensors), terms[N_TENSORS:]


def load(ctx: Any) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
    saved = ctx.saved_tensors
    return saved[: ctx.n_saved], (*saved[ctx.n_saved :], *ctx.numbers)


# The attention itself.


@registered(
    "attention",
    schema=f"(Tensor query, Tensor key, Tensor value, bool return_lse, {TERMS}) "
    "-> (Tensor, Tensor, Tensor)",
)  # fmt: skip
def attention(
    query: Tensor, key: Tensor, value: Tensor, return_lse: bool, *terms: Any
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(output, log-sum-exp or None, statistics ``[2, B, H, L]`` of each query's softmax)."""
    from fusedformer_kernels.attention.forward import attention_forward

    return attention_forward(query, key, value, AttentionTerms(*terms), return_lse)


@attention.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, return_lse: bool, *terms: Any
) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, length, _ = query.shape
    # [batch, length, heads, dim] in memory: merging the heads again is then a view.
    output = query.new_empty(batch, length, heads, value.shape[-1]).transpose(1, 2)
    statistics = query.new_empty(2, batch, heads, length, dtype=torch.float32)
    lse = statistics.new_empty(batch, heads, length) if return_lse else nothing(query)
    return output, lse, statistics


@registered(
    "attention_backward",
    schema="(Tensor? grad, Tensor? lse_grad, Tensor query, Tensor key, Tensor value, "
    f"Tensor output, Tensor statistics, bool[] needs, {TERMS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)  # fmt: skip
def attention_backward(
    grad: Tensor | None,
    lse_grad: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    statistics: Tensor,
    needs: list[bool],
    *terms: Any,
) -> tuple[Tensor | None, ...]:
    """Gradients of query, key, value and what is learned; None where ``needs`` says False."""
    from fusedformer_kernels.attention.backward import attention_backward as launch

    given = query, key, value, output, statistics
    return launch(grad, lse_grad, *given, AttentionTerms(*terms), needs)


@attention_backward.register_fake
def _(
    grad: Tensor | None,
    lse_grad: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    statistics: Tensor,
    needs: list[bool],
    *terms: Any,
) -> tuple[Tensor, ...]:
    inputs = zip((query, key, value), needs[:3], strict=True)
    return (*(laid_out_like(t, need) for t, need in inputs), *learned_like(terms, needs[3:], query))


def _attention_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    result, lse, statistics = output
    save(ctx, (*inputs[:3], result, statistics), inputs[4:])
    ctx.set_materialize_grads(False)
    absent = [] if inputs[3] or lse is None else [lse]
    ctx.mark_non_differentiable(statistics, *absent)


def _attention_autograd(
    ctx: Any, grad: Tensor | None, lse_grad: Tensor | None, _: None
) -> tuple[Tensor | None, ...]:
    if grad is None and lse_grad is None:
        return (None,) * (4 + N_TERMS)
    tensors, terms = load(ctx)
    first, learned = list(ctx.needs_input_grad[:3]), needed(ctx, 4)
    grads = attention_backward(grad, lse_grad, *tensors, [*first, *learned], *terms)
    wanted = (g if need else None for g, need in zip(grads[:3], first, strict=True))
    return (*wanted, None, *term_gradients(grads[3:], learned))


attention.register_autograd(_attention_autograd, setup_context=_attention_setup, only_launches=True)
attention_backward.register_autograd(no_double_backward("attention"))


# Self-attention on one projection, whose gradient is written in one piece.


def split_heads(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Views ``[B, H, L, D]`` of query, key and value."""
    query, key, value = (tensor.transpose(1, 2) for tensor in qkv.unbind(2))
    return query, key, value


@registered(
    "self_attention",
    schema=f"(Tensor qkv, {TERMS}) -> (Tensor, Tensor)",
)  # fmt: skip
def self_attention(qkv: Tensor, *terms: Any) -> tuple[Tensor, Tensor]:
    """(output, statistics) of ``[B, L, 3, H, D]``; terms that are learned get no gradient."""
    from fusedformer_kernels.attention.forward import attention_forward

    output, _, statistics = attention_forward(*split_heads(qkv), AttentionTerms(*terms))
    return output, statistics


@self_attention.register_fake
def _(qkv: Tensor, *terms: Any) -> tuple[Tensor, Tensor]:
    batch, length, _, heads, dim = qkv.shape
    output = qkv.new_empty(batch, length, heads, dim).transpose(1, 2)
    return output, qkv.new_empty(2, batch, heads, length, dtype=torch.float32)


@registered(
    "self_attention_backward",
    schema=f"(Tensor grad, Tensor qkv, Tensor output, Tensor statistics, {TERMS}) -> Tensor",
)  # fmt: skip
def self_attention_backward(
    grad: Tensor, qkv: Tensor, output: Tensor, statistics: Tensor, *terms: Any
) -> Tensor:
    """Gradient of qkv, laid out as it is."""
    from fusedformer_kernels.attention.backward import attention_backward as launch

    found = torch.empty_like(qkv)
    launch(
        grad,
        None,
        *split_heads(qkv),
        output,
        statistics,
        AttentionTerms(*terms),
        OF_HEADS_ALONE,
        split_heads(found),
    )
    return found


@self_attention_backward.register_fake
def _(grad: Tensor, qkv: Tensor, output: Tensor, statistics: Tensor, *terms: Any) -> Tensor:
    return torch.empty_like(qkv)


def _self_attention_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    save(ctx, (inputs[0], *output), inputs[1:])
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])


def _self_attention_autograd(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * (1 + N_TERMS)
    tensors, terms = load(ctx)
    return self_attention_backward(grad, *tensors, *terms), *(None,) * N_TERMS


self_attention.register_autograd(_self_attention_autograd, setup_context=_self_attention_setup)
self_attention_backward.register_autograd(no_double_backward("attention"))


# The attention weights, for those who ask for them.


@registered(
    "attention_weights",
    schema="(Tensor query, Tensor key, Tensor lse, Tensor statistics, bool average, "
    f"ScalarType dtype, {TERMS}) -> Tensor",
)  # fmt: skip
def attention_weights(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    statistics: Tensor,
    average: bool,
    dtype: torch.dtype,
    *terms: Any,
) -> Tensor:
    """Weights after dropout [B, H, L, S] in ``dtype``, or their mean over heads [B, 1, L, S].

    They are computed from the statistics. The log-sum-exp is there for its gradient, by which what
    a weight takes from the others of its row reaches the attention's backward.
    """
    from fusedformer_kernels.attention.weights import attention_weights as launch

    return launch(query, key, statistics, AttentionTerms(*terms), average, dtype)


@attention_weights.register_fake
def _(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    statistics: Tensor,
    average: bool,
    dtype: torch.dtype,
    *terms: Any,
) -> Tensor:
    batch, heads, length, _ = query.shape
    return query.new_empty(batch, 1 if average else heads, length, key.shape[2], dtype=dtype)


@registered(
    "attention_weights_backward",
    schema="(Tensor grad, Tensor query, Tensor key, Tensor statistics, bool average, "
    f"bool[] needs, {TERMS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)  # fmt: skip
def attention_weights_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    statistics: Tensor,
    average: bool,
    needs: list[bool],
    *terms: Any,
) -> tuple[Tensor | None, ...]:
    """Gradients of query, key, lse and what is learned; None where ``needs`` says False."""
    from fusedformer_kernels.attention.weights import attention_weights_backward as launch

    return launch(grad, query, key, statistics, AttentionTerms(*terms), average, needs)


@attention_weights_backward.register_fake
def _(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    statistics: Tensor,
    average: bool,
    needs: list[bool],
    *terms: Any,
) -> tuple[Tensor, ...]:
    dlse = statistics.new_empty(statistics.shape[1:]) if needs[2] else nothing(query)
    learned = learned_like(terms, needs[3:], query)
    return laid_out_like(query, needs[0]), laid_out_like(key, needs[1]), dlse, *learned


def _weights_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    query, key, _, statistics, ctx.average = inputs[:5]
    save(ctx, (query, key, statistics), inputs[6:])


def _weights_autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    tensors, terms = load(ctx)
    first, learned = list(ctx.needs_input_grad[:3]), needed(ctx, 6, _OF_WEIGHTS)
    grads = attention_weights_backward(grad, *tensors, ctx.average, [*first, *learned], *terms)
    wanted = (g if need else None for g, need in zip(grads[:3], first, strict=True))
    return (*wanted, None, None, None, *term_gradients(grads[3:], learned))


attention_weights.register_autograd(_weights_autograd, setup_context=_weights_setup)
attention_weights_backward.register_autograd(no_double_backward("attention weights"))


# Attention over parts of the keys, merged.


@registered("merge_attention_states")
def merge_attention_states(
    output1: Tensor, lse1: Tensor, output2: Tensor, lse2: Tensor
) -> tuple[Tensor, Tensor]:
    """(output, log-sum-exp) over both parts, contiguous."""
    from fusedformer_kernels.attention.merge import merge_states

    return merge_states(output1, lse1, output2, lse2)


@merge_attention_states.register_fake
def _(output1: Tensor, lse1: Tensor, output2: Tensor, lse2: Tensor) -> tuple[Tensor, Tensor]:
    return output1.new_empty(output1.shape), lse1.new_empty(lse1.shape, dtype=torch.float32)


@registered("merge_attention_states_backward")
def merge_attention_states_backward(
    grad: Tensor, lse_grad: Tensor, output1: Tensor, lse1: Tensor, output2: Tensor, lse2: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the four inputs."""
    from fusedformer_kernels.attention.merge import merge_states_backward

    first, second, third, fourth = merge_states_backward(
        grad, lse_grad, output1, lse1, output2, lse2
    )
    return first, second, third, fourth


@merge_attention_states_backward.register_fake
def _(
    grad: Tensor, lse_grad: Tensor, output1: Tensor, lse1: Tensor, output2: Tensor, lse2: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    first, second, third, fourth = (t.new_empty(t.shape) for t in (output1, lse1, output2, lse2))
    return first, second, third, fourth


def _merge_setup(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs)


def _merge_autograd(ctx: Any, grad: Tensor, lse_grad: Tensor) -> tuple[Tensor, ...]:
    grads: tuple[Tensor, ...] = merge_attention_states_backward(grad, lse_grad, *ctx.saved_tensors)
    return grads


merge_attention_states.register_autograd(_merge_autograd, setup_context=_merge_setup)
merge_attention_states_backward.register_autograd(no_double_backward("merge_attention_states"))
