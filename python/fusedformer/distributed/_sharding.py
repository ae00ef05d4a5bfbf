"""How DTensor shards the registered ops: over batch and heads, or over rows, without communication.

Importing this file registers the rules. Each gives the placements of outputs and inputs that fit
together on one dimension of the mesh: everything replicated, and each way to spread the work.
Gradients of what all share (weights, biases, a mask that broadcasts) are partial sums, which
DTensor adds up when and if they are used. What an op was not asked to compute is empty, and
replicated.

A rule gets DTensor's description of each tensor, or None for one that is not given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor._op_schema import RuntimeSchemaInfo
from torch.distributed.tensor.experimental import register_sharding

import fusedformer.functional  # noqa: F401  registers the ops
from fusedformer.ops.attention_terms import AttentionTerms

Way = tuple[Sequence[Placement | None], Sequence[Placement | None]]
_REPLICATE = Replicate()


def _rule(name: str) -> Callable[[Callable[..., Iterator[Way]]], None]:
    """Register the ways that a function yields besides replication of everything; a decorator."""
    op = getattr(torch.ops.fusedformer, name).default
    outputs = [_REPLICATE] * len(op._schema.returns)

    def decorate(ways: Callable[..., Iterator[Way]]) -> None:
        def rule(*args: Any) -> list[Way]:
            found = [(outputs, [_REPLICATE] * len(args)), *ways(*args)]
            return [(list(outs), _of_tensors(ins, args)) for outs, ins in found]

        register_sharding(op)(rule)
        # Every flag and number decides shapes, so that none may be left out of the cache's key.
        propagator: Any = DTensor._op_dispatcher.sharding_propagator
        propagator.op_to_schema_info[op] = RuntimeSchemaInfo(0, needs_pytree=True)

    return decorate


def _of_tensors(places: Sequence[Placement | None], args: Sequence[Any]) -> list[Placement | None]:
    """None for flags and numbers, and for tensors that are not given."""
    return [at if _is_tensor(arg) else None for at, arg in zip(places, args, strict=True)]


def _is_tensor(arg: Any) -> bool:
    return hasattr(arg, "placements")


def _present(arg: Any, placement: Placement) -> Placement:
    """``placement``, unless the tensor is not given or empty for not being asked for."""
    return placement if _is_tensor(arg) and tuple(arg.shape) != (0,) else _REPLICATE


def _if(wanted: bool, placement: Placement) -> Placement:
    return placement if wanted else _REPLICATE


# Row by row: any dimension but those that are normalized.


@_rule("norm")
def _norm(
    input: Any, residual: Any, input_bias: Any, weight: Any, bias: Any, seed: Any, p: float,
    eps: float, kind: str, dims: int, wants_sum: bool, wants_statistics: bool,
) -> Iterator[Way]:  # fmt: skip
    for dim in _rows(input, dims, seed):
        rows, settings = Shard(dim), [None] * 6
        outputs = [
            _if(kind != "none", rows),
            _if(_is_tensor(residual) and wants_sum, rows),
            _if(kind == "layer" and wants_statistics, Shard(0)),
            _if(kind != "none" and wants_statistics, Shard(0)),
        ]
        yield outputs, [rows, rows, *[_REPLICATE] * 4, *settings]


@_rule("norm_backward")
def _norm_backward(
    grad: Any, sum_grad: Any, normed: Any, mean: Any, rstd: Any, weight: Any, seed: Any, p: float,
    kind: str, dims: int, needs_weight: bool, needs_bias: bool, needs_input_bias: bool,
    input_dtype: torch.dtype, parameter_dtype: torch.dtype,
) -> Iterator[Way]:  # fmt: skip
    for dim in _rows(normed, dims, seed):
        rows, settings = Shard(dim), [None] * 8
        statistics = [_present(t, Shard(0)) for t in (mean, rstd)]
        outputs = [
            rows, _if(_is_tensor(seed) or input_dtype != normed.tensor_meta.dtype, rows),
            *(_if(needed, Partial()) for needed in (needs_weight, needs_bias, needs_input_bias)),
        ]  # fmt: skip
        yield outputs, [rows, rows, rows, *statistics, _REPLICATE, _REPLICATE, *settings]


@_rule("softmax")
def _softmax(
    input: Any, mask: Any, scale: float, is_causal: bool, dtype: torch.dtype, log: bool
) -> Iterator[Way]:
    for dim in _rows(input, 2 if is_causal else 1, None):
        yield [Shard(dim)], [Shard(dim), Shard(dim), *[None] * 4]


@_rule("softmax_backward")
def _softmax_backward(grad: Any, output: Any, *settings: Any) -> Iterator[Way]:
    for dim in _rows(output, 1, None):
        yield [Shard(dim)], [Shard(dim), Shard(dim), *[None] * len(settings)]


@_rule("bias_activation")
def _bias_activation(input: Any, bias: Any, seed: Any, p: float, activation: str) -> Iterator[Way]:
    for dim, of_bias, _ in _rows_and_columns(input, seed):
        yield [Shard(dim)], [Shard(dim), of_bias, _REPLICATE, None, None]


@_rule("bias_activation_backward")
def _bias_activation_backward(
    grad: Any, input: Any, bias: Any, seed: Any, p: float, activation: str, needs_bias: bool
) -> Iterator[Way]:
    for dim, of_bias, of_gradient in _rows_and_columns(input, seed):
        outputs = [Shard(dim), _if(_is_tensor(bias) and needs_bias, of_gradient)]
        yield outputs, [Shard(dim), Shard(dim), of_bias, _REPLICATE, None, None, None]


def _rows(tensor: Any, dims: int, seed: Any) -> range:
    """Dimensions of rows. Dropout draws by position in the whole: it is not spread."""
    return range(0 if _is_tensor(seed) else tensor.ndim - dims)


def _rows_and_columns(tensor: Any, seed: Any) -> Iterator[tuple[int, Placement, Placement]]:
    """Dimensions, and the placements of a bias of the last one and of its gradient."""
    for dim in _rows(tensor, 1, seed):
        yield dim, _REPLICATE, Partial()
    if not _is_tensor(seed):
        yield tensor.ndim - 1, Shard(0), Shard(0)


# Attention: batch and heads.


@_rule("attention")
def _attention(query: Any, key: Any, value: Any, *terms: Any) -> Iterator[Way]:
    for dim, of_terms, _ in _batch_and_heads(query.shape[1], key.shape[1], query.mesh, terms):
        yield [Shard(dim)] * 2, [*[Shard(dim)] * 3, *of_terms]


@_rule("attention_backward")
def _attention_backward(
    grad: Any, lse_grad: Any, query: Any, key: Any, value: Any, output: Any, lse: Any,
    needs: list[bool], *terms: Any,
) -> Iterator[Way]:  # fmt: skip
    for dim, of_terms, learned in _batch_and_heads(
        query.shape[1], key.shape[1], query.mesh, terms
    ):
        grads = [*[Shard(dim)] * 3, *learned]
        outputs = [_if(need, placement) for need, placement in zip(needs, grads, strict=True)]
        yield outputs, [*[Shard(dim)] * 7, None, *of_terms]


@_rule("self_attention")
def _self_attention(qkv: Any, *terms: Any) -> Iterator[Way]:
    for dim, of_terms, _ in _batch_and_heads(qkv.shape[3], qkv.shape[3], qkv.mesh, terms):
        yield [Shard(dim)] * 2, [Shard(3 if dim else 0), *of_terms]


@_rule("self_attention_backward")
def _self_attention_backward(
    grad: Any, lse_grad: Any, qkv: Any, output: Any, lse: Any, *terms: Any
) -> Iterator[Way]:
    for dim, of_terms, _ in _batch_and_heads(qkv.shape[3], qkv.shape[3], qkv.mesh, terms):
        projected = Shard(3 if dim else 0)
        yield [projected], [Shard(dim), Shard(dim), projected, Shard(dim), Shard(dim), *of_terms]


@_rule("attention_weights")
def _attention_weights(
    query: Any, key: Any, lse: Any, average: bool, *terms: Any
) -> Iterator[Way]:
    for dim, of_terms, _ in _batch_and_heads(query.shape[1], key.shape[1], query.mesh, terms):
        if not (average and dim):  # the mean is over all heads
            yield [Shard(dim)], [*[Shard(dim)] * 3, None, *of_terms]


@_rule("attention_weights_backward")
def _attention_weights_backward(
    grad: Any, query: Any, key: Any, lse: Any, average: bool, needs: list[bool], *terms: Any
) -> Iterator[Way]:
    for dim, of_terms, learned in _batch_and_heads(
        query.shape[1], key.shape[1], query.mesh, terms
    ):
        grads = [*[Shard(dim)] * 3, *learned]
        outputs = [_if(need, placement) for need, placement in zip(needs, grads, strict=True)]
        if not (average and dim):
            yield outputs, [*[Shard(dim)] * 4, None, None, *of_terms]


@_rule("merge_attention_states")
def _merge(output1: Any, lse1: Any, output2: Any, lse2: Any) -> Iterator[Way]:
    for dim in _rows(output1, 1, None):
        yield [Shard(dim)] * 2, [Shard(dim)] * 4


@_rule("merge_attention_states_backward")
def _merge_backward(grad: Any, lse_grad: Any, output1: Any, *others: Any) -> Iterator[Way]:
    for dim in _rows(output1, 1, None):
        yield [Shard(dim)] * 4, [Shard(dim)] * 6


def _batch_and_heads(
    heads: int, key_heads: int, mesh: Any, terms: tuple[Any, ...]
) -> Iterator[tuple[int, list[Placement | None], list[Placement]]]:
    """(0 or 1, placements of the terms, and of the gradients of mask, slopes and table)."""
    given = AttentionTerms(*terms)
    if _is_tensor(given.seed):
        return
    of: dict[str, Placement]
    if not _is_tensor(given.starts_q):
        mask, slopes = (_broadcast(t, 0) for t in (given.mask, given.slopes))
        of = {"mask": mask, "slopes": slopes, "key_mask": Shard(0), "key_lengths": Shard(0)}
        yield 0, _placed(of), [_gradient(mask), _gradient(slopes), Partial()]
    # A rank has the keys of its queries, where fewer heads of keys serve several of queries.
    if heads == key_heads or key_heads % mesh.size() == 0:
        mask = _broadcast(given.mask, 1)
        of = {"mask": mask, "slopes": Shard(1), "table": Shard(0)}
        yield 1, _placed(of), [_gradient(mask), Shard(1), Shard(0)]


def _placed(of: dict[str, Placement]) -> list[Placement | None]:
    """In the order of the terms; those that are not tensors are seen to by the registration."""
    return [of.get(field, _REPLICATE) for field in AttentionTerms._fields]


def _broadcast(tensor: Any, dim: int) -> Placement:
    return _if(_is_tensor(tensor) and tensor.shape[dim] > 1, Shard(dim))


def _gradient(placement: Placement) -> Placement:
    """Of a term so placed: what all ranks share gets its gradient from all."""
    return Partial() if placement == _REPLICATE else placement
