"""Sharding rules by which DTensor runs the registered ops without communication.

Importing this file registers them. Attention is sharded over batch or heads, other ops over rows.
A rule lists the placements of outputs and inputs that fit together on one dimension of the mesh:
everything replicated, or one dimension of the work sharded. Gradients of inputs that all ranks
share (weights, biases, a mask that broadcasts) are partial sums; DTensor adds them up if they are
used. Outputs that an op was not asked for are empty, and replicated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor._op_schema import RuntimeSchemaInfo
from torch.distributed.tensor.experimental import register_sharding

import fusedformer.functional  # noqa: F401  registers the ops

# Placements of the outputs, and of inputs by name; inputs that are not named are replicated.
Sharding = tuple[Sequence[Placement], dict[str, Placement]]
_REPLICATE = Replicate()


def _rule(name: str) -> Callable[[Callable[[Any], Iterator[Sharding]]], None]:
    """Register the decorated function as the rule of the op ``name``.

    It yields shardings besides the replication of everything. Its argument has the op's arguments
    as attributes: flags and numbers as they are, tensors as DTensor describes them, or None.
    """
    op = getattr(torch.ops.fusedformer, name).default
    names = [argument.name for argument in op._schema.arguments]
    replicated: Sharding = [_REPLICATE] * len(op._schema.returns), {}

    def decorate(shardings: Callable[[Any], Iterator[Sharding]]) -> None:
        def rule(*args: Any) -> list[tuple[list[Placement], list[Placement | None]]]:
            given = dict(zip(names, args, strict=True))
            return [
                (list(outputs), [
                    inputs.get(n, _REPLICATE) if _is_tensor(value) else None
                    for n, value in given.items()
                ])
                for outputs, inputs in [replicated, *shardings(SimpleNamespace(**given))]
            ]  # fmt: skip

        register_sharding(op)(rule)
        # DTensor caches by the arguments from this one on. Any may decide shapes, so all count.
        propagator: Any = DTensor._op_dispatcher.sharding_propagator
        propagator.op_to_schema_info[op] = RuntimeSchemaInfo(0, needs_pytree=True)

    return decorate


def _is_tensor(arg: Any) -> bool:
    return hasattr(arg, "placements")


def _placed_if(wanted: bool, placement: Placement) -> Placement:
    """Return the placement of an output: ``placement`` if it is computed, else replicated."""
    return placement if wanted else _REPLICATE


def _each(placement: Placement, *names: str) -> dict[str, Placement]:
    """Give ``placement`` to each of the inputs ``names``."""
    return dict.fromkeys(names, placement)


# Ops on rows: any dimension that is not reduced can be sharded.


@_rule("norm")
def _norm(op: Any) -> Iterator[Sharding]:
    for dim in _rows(op.input, op.dims, op.seed):
        outputs = [
            _placed_if(op.kind != "none", Shard(dim)),
            _placed_if(_is_tensor(op.residual) and op.wants_sum, Shard(dim)),
            _placed_if(op.kind == "layer" and op.wants_statistics, Shard(0)),
            _placed_if(op.kind != "none" and op.wants_statistics, Shard(0)),
        ]
        yield outputs, _each(Shard(dim), "input", "residual")


@_rule("norm_backward")
def _norm_backward(op: Any) -> Iterator[Sharding]:
    differs = _is_tensor(op.seed) or op.input_dtype != op.normed.tensor_meta.dtype
    needs = op.needs_weight_grad, op.needs_bias_grad, op.needs_input_bias_grad
    for dim in _rows(op.normed, op.dims, op.seed):
        outputs = [
            Shard(dim),
            _placed_if(differs, Shard(dim)),
            *(_placed_if(need, Partial()) for need in needs),
        ]
        inputs = _each(Shard(dim), "grad", "sum_grad", "normed")
        for name in ("mean", "rstd"):  # empty where the forward computed none
            statistics = getattr(op, name)
            if _is_tensor(statistics) and statistics.shape[0]:
                inputs[name] = Shard(0)
        yield outputs, inputs


@_rule("softmax")
def _softmax(op: Any) -> Iterator[Sharding]:
    for dim in _rows(op.input, 2 if op.is_causal else 1, None):
        yield [Shard(dim)], _each(Shard(dim), "input", "mask")


@_rule("softmax_backward")
def _softmax_backward(op: Any) -> Iterator[Sharding]:
    for dim in _rows(op.output, 1, None):
        yield [Shard(dim)], _each(Shard(dim), "grad", "output")


@_rule("bias_activation")
def _bias_activation(op: Any) -> Iterator[Sharding]:
    for dim, bias, _ in _rows_and_columns(op):
        yield [Shard(dim)], {"input": Shard(dim), "bias": bias}


@_rule("bias_activation_backward")
def _bias_activation_backward(op: Any) -> Iterator[Sharding]:
    for dim, bias, gradient in _rows_and_columns(op):
        outputs = [Shard(dim), _placed_if(_is_tensor(op.bias) and op.needs_bias_grad, gradient)]
        yield outputs, {**_each(Shard(dim), "grad", "input"), "bias": bias}


@_rule("scaled_sum")
def _scaled_sum(op: Any) -> Iterator[Sharding]:
    for dim in _rows(op.input, 1, op.seed):
        if dim == 0 or not _is_tensor(op.sample_scale):
            yield [Shard(dim)], _each(Shard(dim), "input", "residual", "sample_scale")


@_rule("scaled_sum_backward")
def _scaled_sum_backward(op: Any) -> Iterator[Sharding]:
    needs = op.needs_scale_grad, op.needs_input_bias_grad
    for dim in _rows(op.grad, 1, op.seed):
        if dim == 0 or not _is_tensor(op.sample_scale):
            outputs = [Shard(dim), *(_placed_if(need, Partial()) for need in needs)]
            yield outputs, _each(Shard(dim), "grad", "input", "sample_scale")


@_rule("gated_activation")
def _gated_activation(op: Any) -> Iterator[Sharding]:
    for dim in _rows(op.input, 1, op.seed):
        yield [Shard(dim)], {"input": Shard(dim), "bias": _REPLICATE}


@_rule("gated_activation_backward")
def _gated_activation_backward(op: Any) -> Iterator[Sharding]:
    for dim in _rows(op.input, 1, op.seed):
        outputs = [Shard(dim), _placed_if(_is_tensor(op.bias) and op.needs_bias_grad, Partial())]
        yield outputs, {**_each(Shard(dim), "grad", "input"), "bias": _REPLICATE}


@_rule("rotary_embedding")
def _rotary_embedding(op: Any) -> Iterator[Sharding]:
    yield [Shard(2), Shard(2)], _each(Shard(2), "query", "key")


@_rule("rotary_embedding_backward")
def _rotary_embedding_backward(op: Any) -> Iterator[Sharding]:
    sums = _placed_if(op.needs_weights and op.norm != "none", Partial())
    yield [Shard(2)] * 2 + [sums], _each(Shard(2), "query_grad", "key_grad", "query", "key")


def _rows(tensor: Any, dims: int, seed: Any) -> range:
    """List the dimensions before the last ``dims``; none with dropout, which needs them all."""
    return range(0 if _is_tensor(seed) else tensor.ndim - dims)


def _rows_and_columns(op: Any) -> Iterator[tuple[int, Placement, Placement]]:
    """List dimensions, each with placements of the bias of the last one and of its gradient."""
    for dim in _rows(op.input, 1, op.seed):
        yield dim, _REPLICATE, Partial()
    if not _is_tensor(op.seed):
        yield op.input.ndim - 1, Shard(0), Shard(0)


# Attention: the batch or the heads can be sharded.


@_rule("attention")
def _attention(op: Any) -> Iterator[Sharding]:
    for dim, terms, _ in _batch_and_heads(op, op.query.shape[1], op.key.shape[1]):
        lse = _placed_if(op.return_lse, Shard(dim))
        outputs = [Shard(dim), lse, Shard(dim + 1)]
        yield outputs, {**terms, **_each(Shard(dim), "query", "key", "value")}


@_rule("attention_backward")
def _attention_backward(op: Any) -> Iterator[Sharding]:
    names = "grad", "lse_grad", "query", "key", "value", "output"
    for dim, terms, learned in _batch_and_heads(op, op.query.shape[1], op.key.shape[1]):
        outputs = _only_needed(op, [*[Shard(dim)] * 3, *learned])
        inputs = {**terms, **_each(Shard(dim), *names), "statistics": Shard(dim + 1)}
        yield outputs, inputs


@_rule("self_attention")
def _self_attention(op: Any) -> Iterator[Sharding]:
    heads = op.qkv.shape[3]
    for dim, terms, _ in _batch_and_heads(op, heads, heads):
        yield [Shard(dim), Shard(dim + 1)], {**terms, "qkv": Shard(3 if dim else 0)}


@_rule("self_attention_backward")
def _self_attention_backward(op: Any) -> Iterator[Sharding]:
    heads = op.qkv.shape[3]
    for dim, terms, _ in _batch_and_heads(op, heads, heads):
        inputs = {**terms, **_each(Shard(dim), "grad", "output"), "statistics": Shard(dim + 1)}
        projected = Shard(3 if dim else 0)
        yield [projected], {**inputs, "qkv": projected}


@_rule("attention_weights")
def _attention_weights(op: Any) -> Iterator[Sharding]:
    for dim, terms, _ in _batch_and_heads(op, op.query.shape[1], op.key.shape[1]):
        if not (op.average and dim):  # a mean over heads needs all of them
            inputs = {**_each(Shard(dim), "query", "key", "lse"), "statistics": Shard(dim + 1)}
            yield [Shard(dim)], {**terms, **inputs}


@_rule("attention_weights_backward")
def _attention_weights_backward(op: Any) -> Iterator[Sharding]:
    for dim, terms, learned in _batch_and_heads(op, op.query.shape[1], op.key.shape[1]):
        if not (op.average and dim):
            outputs = _only_needed(op, [*[Shard(dim)] * 3, *learned[:-1]])
            inputs = {**_each(Shard(dim), "grad", "query", "key"), "statistics": Shard(dim + 1)}
            yield outputs, {**terms, **inputs}


@_rule("merge_attention_states")
def _merge(op: Any) -> Iterator[Sharding]:
    for dim in _rows(op.output1, 1, None):
        yield [Shard(dim)] * 2, _each(Shard(dim), "output1", "lse1", "output2", "lse2")


@_rule("merge_attention_states_backward")
def _merge_backward(op: Any) -> Iterator[Sharding]:
    names = "grad", "lse_grad", "output1", "lse1", "output2", "lse2"
    for dim in _rows(op.output1, 1, None):
        yield [Shard(dim)] * 4, _each(Shard(dim), *names)


def _batch_and_heads(
    op: Any, heads: int, key_heads: int
) -> Iterator[tuple[int, dict[str, Placement], list[Placement]]]:
    """List the shardings of attention: over the batch (0) and over heads (1), where they fit.

    Each is the dimension, placements of the terms, and placements of the gradients of mask, slopes,
    table, gate and sinks.
    """
    if _is_tensor(op.seed):
        return
    if not _is_tensor(op.starts_q):
        mask, slopes = (_shard_unless_broadcast(t, 0) for t in (op.mask, op.slopes))
        terms = {
            "mask": mask,
            "slopes": slopes,
            **_each(Shard(0), "key_mask", "key_lengths", "gate"),
        }
        yield 0, terms, [_gradient(mask), _gradient(slopes), Partial(), Shard(0), Partial()]
    # With fewer heads of keys than of queries, each rank must get the keys of its queries.
    ranks = next(t for t in vars(op).values() if _is_tensor(t)).mesh.size()
    if heads == key_heads or key_heads % ranks == 0:
        mask = _shard_unless_broadcast(op.mask, 1)
        terms = {
            "mask": mask,
            **_each(Shard(1), "slopes", "gate"),
            **_each(Shard(0), "table", "sinks"),
        }
        yield 1, terms, [_gradient(mask), Shard(1), Shard(0), Shard(1), Shard(0)]


def _shard_unless_broadcast(tensor: Any, dim: int) -> Placement:
    """Return the placement of a tensor that may broadcast in ``dim``."""
    return _placed_if(_is_tensor(tensor) and tensor.shape[dim] > 1, Shard(dim))


def _gradient(placement: Placement) -> Placement:
    """Return the placement of a term's gradient: a partial sum if all ranks share the term."""
    return Partial() if placement == _REPLICATE else placement


def _only_needed(op: Any, gradients: list[Placement]) -> list[Placement]:
    """Replace placements of gradients that the op does not compute."""
    return [
        _placed_if(need, placement) for need, placement in zip(op.needs, gradients, strict=True)
    ]
