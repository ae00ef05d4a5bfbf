"""Packed sequences: the same bits as alone and padded, whatever else is in the batch."""

from __future__ import annotations

import itertools
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from tests.ops.judge import grad
from torch import Tensor

from fusedformer import backend
from fusedformer import functional as F

LENGTHS = [80, 0, 67, 1, 33]
HEADS, DIM = 2, 16


def starts_of(lengths: list[int], device: str) -> Tensor:
    starts = [0, *itertools.accumulate(lengths)]
    return torch.tensor(starts, dtype=torch.int32, device=device)


def packed_call(tensors: list[Tensor], lengths: list[int], **settings: Any) -> Tensor:
    starts = starts_of(lengths, str(tensors[0].device))
    longest = max(lengths)
    torch.manual_seed(5)
    query, key, value = tensors
    return F.varlen_attention(query, key, value, starts, starts, longest, longest, **settings)


SETTINGS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"is_causal": True},
    "window": {"window": (30, 20)},
    "capped": {"softcap": 3.0},
    "slopes": {"alibi_slopes": torch.tensor([0.5, 0.1])},
    "table": {"relative_bias": torch.linspace(-1, 1, 2 * 41).view(2, 41)},
    "sinks": {"sinks": torch.tensor([0.7, -0.3])},
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.bfloat16) for name in SETTINGS), ("full", torch.float32)],
    ids=str,
)
def test_alone_padded_and_packed_are_the_same_bits(
    name: str, dtype: torch.dtype, device: str
) -> None:
    """Forward and backward, of every sequence."""
    settings: dict[str, Any] = {
        key: value.to(device) if isinstance(value, Tensor) else value
        for key, value in SETTINGS[name].items()
    }
    total, longest = sum(LENGTHS), max(LENGTHS)
    packed = [torch.randn(total, HEADS, DIM, device=device, dtype=dtype) for _ in range(3)]
    packed = [tensor.requires_grad_() for tensor in packed]
    dy = torch.randn(total, HEADS, DIM, device=device, dtype=dtype)
    output = packed_call(packed, LENGTHS, **settings)
    results = [output, *torch.autograd.grad(output, packed, dy)]

    def rows(tensor: Tensor, sequence: int) -> Tensor:
        """[1, heads, length, dim] of one packed sequence."""
        begin = sum(LENGTHS[:sequence])
        return tensor[begin : begin + LENGTHS[sequence]].transpose(0, 1)[None]

    padded = [torch.zeros(len(LENGTHS), HEADS, longest, DIM, device=device, dtype=dtype)
              for _ in range(4)]  # fmt: skip
    for sequence, length in enumerate(LENGTHS):
        for whole, tensor in zip(padded, [*packed, dy], strict=True):
            whole[sequence, :, :length] = rows(tensor.detach(), sequence)[0]
    leaves = [tensor.requires_grad_() for tensor in padded[:3]]
    lengths = torch.tensor(LENGTHS, device=device)
    real: dict[str, Any] = {"key_lengths": lengths}
    if name == "full":  # the other way to say it
        real = {"key_mask": torch.arange(longest, device=device) < lengths[:, None]}
    query, key, value = leaves
    together = F.scaled_dot_product_attention(query, key, value, **real, **settings)
    in_batch = [together, *torch.autograd.grad(together, leaves, padded[3])]
    for sequence, length in enumerate(LENGTHS):
        if length == 0:
            continue
        single = [rows(t.detach(), sequence).requires_grad_() for t in packed]
        query, key, value = single
        alone = F.scaled_dot_product_attention(query, key, value, **settings)
        alone_grads = torch.autograd.grad(alone, single, rows(dy, sequence))
        for own, pack, pad in zip((alone, *alone_grads), results, in_batch, strict=True):
            assert torch.equal(own, rows(pack, sequence))
            assert torch.equal(own[0], pad[sequence, :, :length])


def test_dropout_is_the_same_packed_and_padded(device: str) -> None:
    """The mask is a function of sequence, head, row and column."""
    lengths = [30, 70]
    packed = [torch.randn(100, HEADS, DIM, device=device) for _ in range(3)]
    output = packed_call(packed, lengths, dropout_p=0.5)
    padded = [torch.zeros(2, HEADS, 70, DIM, device=device) for _ in range(3)]
    for whole, tensor in zip(padded, packed, strict=True):
        whole[0, :, :30] = tensor[:30].transpose(0, 1)
        whole[1] = tensor[30:].transpose(0, 1)
    torch.manual_seed(5)
    real = torch.tensor(lengths, device=device)
    query, key, value = padded
    together = F.scaled_dot_product_attention(query, key, value, dropout_p=0.5, key_lengths=real)
    assert torch.equal(together[0, :, :30], output[:30].transpose(0, 1))
    assert torch.equal(together[1], output[30:].transpose(0, 1))
    plain = packed_call(packed, lengths)
    assert not torch.equal(output, plain)


def test_what_lies_in_other_sequences_does_not_matter(device: str) -> None:
    """Not even NaN."""
    lengths = [37, 21, 70]
    packed = [grad(sum(lengths), HEADS, DIM, device=device) for _ in range(3)]
    clean = packed_call(packed, lengths)
    dirty = [tensor.detach().clone() for tensor in packed]
    for tensor in dirty:
        tensor[37:58] = torch.nan
        tensor.requires_grad_()
    output = packed_call(dirty, lengths)
    dy = torch.randn_like(output)
    grads = torch.autograd.grad(output, dirty, dy)
    wanted = torch.autograd.grad(clean, packed, dy)
    for got, want in zip((output, *grads), (clean, *wanted), strict=True):
        assert torch.equal(got[:37], want[:37])
        assert torch.equal(got[58:], want[58:])


@pytest.mark.parametrize("sequences", [0, 1, 3])
def test_nothing_but_empty_sequences(sequences: int, device: str) -> None:
    q, k, v = tensors = [grad(0, HEADS, DIM, device=device) for _ in range(3)]
    starts = torch.zeros(sequences + 1, dtype=torch.int32, device=device)
    output, lse = F.varlen_attention(q, k, v, starts, starts, 0, 0, return_lse=True)
    assert output.shape == (0, HEADS, DIM)
    assert lse.shape == (HEADS, 0)
    for gradient in torch.autograd.grad(output, tensors, torch.randn_like(output)):
        assert gradient.shape == (0, HEADS, DIM)


def test_sequences_without_keys_or_queries(device: str) -> None:
    query, key, value = (grad(n, HEADS, DIM, device=device) for n in (7, 9, 9))
    starts_q, starts_k = starts_of([7, 0], device), starts_of([0, 9], device)
    output, lse = F.varlen_attention(query, key, value, starts_q, starts_k, 7, 9, return_lse=True)
    assert (output == 0).all()
    assert (lse == -torch.inf).all()
    grads = torch.autograd.grad(output, (query, key, value), torch.randn_like(output))
    assert all((gradient == 0).all() for gradient in grads)


def test_a_bound_on_the_longest_is_enough(device: str) -> None:
    q, k, v = (torch.randn(107, HEADS, DIM, device=device) for _ in range(3))
    starts = starts_of([37, 70], device).long()
    exact = F.varlen_attention(q, k, v, starts, starts, 70, 70)
    assert torch.equal(exact, F.varlen_attention(q, k, v, starts, starts, 1000, 512))


def test_a_bound_too_low_touches_no_memory_outside(device: str) -> None:
    """It is an error where lengths can be seen; neither blocks nor biases go by it elsewhere."""
    query, key, value = torch.randn(3, 900, HEADS, DIM, device=device)
    starts = starts_of([900], device)
    bias = torch.randn(2, 41, device=device)
    seen = device == "cpu"
    with backend("triton"), pytest.raises(ValueError, match="900") if seen else nullcontext():
        out = F.varlen_attention(query, key, value, starts, starts, 1, 1, relative_bias=bias)
        assert out[0].isfinite().all()


def test_long_sequences_start_first(device: str) -> None:
    """Every block once; those that walk most first; the rest of the list says so."""
    from fusedformer_kernels.attention.schedule import work_list

    lengths = [3, 0, 300, 130, 64, 300]
    starts = starts_of(lengths, device)
    work = work_list(starts, starts, sum(lengths), 300, 64, False).tolist()
    wanted = [[s, b] for s in (2, 5, 3, 4, 0) for b in range(-(-lengths[s] // 64))]
    assert work[: len(wanted)] == wanted
    assert all(sequence == -1 for sequence, _ in work[len(wanted) :])
    reversed_blocks = work_list(starts, starts, sum(lengths), 300, 64, True).tolist()
    assert [b for s, b in reversed_blocks if s == 2] == [4, 3, 2, 1, 0]
    assert len(work) == len(reversed_blocks) == sum(lengths) // 64 + len(lengths)


def test_more_sequences_than_one_chunk_of_the_schedule(device: str) -> None:
    from fusedformer_kernels.attention.schedule import work_list

    lengths = [1 + (37 * i) % 90 for i in range(600)]
    starts = starts_of(lengths, device)
    work = work_list(starts, starts, sum(lengths), 90, 16, False).tolist()
    listed = [(s, b) for s, b in work if s >= 0]
    assert sorted(listed) == [(s, b) for s, n in enumerate(lengths) for b in range(-(-n // 16))]
    costs = [lengths[s] for s, _ in listed]
    assert costs == sorted(costs, reverse=True)


def test_jagged_in_and_out(device: str) -> None:
    """A nested tensor comes back with the query's own ragged dimension, and gradients flow."""
    q, k, v = values = [grad(107, HEADS, DIM, device=device) for _ in range(3)]
    offsets = starts_of([37, 0, 70], device).long()
    query, key, value = (
        torch.nested.nested_tensor_from_jagged(v, offsets).transpose(1, 2) for v in values
    )
    output = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    assert output.is_nested
    assert output.shape == query.shape
    total = query + output  # the same ragged dimension
    flat = total.transpose(1, 2).values() - values[0]
    direct = F.varlen_attention(q, k, v, offsets, offsets, 70, 70, is_causal=True)
    assert torch.allclose(flat, direct, atol=1e-6)
    dy = torch.randn_like(direct)
    through = torch.autograd.grad(output.transpose(1, 2).values(), values, dy)
    for got, want in zip(through, torch.autograd.grad(direct, values, dy), strict=True):
        assert torch.equal(got, want)


def jagged(lengths: list[int], device: str = "cpu") -> Tensor:
    """``[batch, heads, jagged, dim]``."""
    parts = [torch.randn(length, 2, 4, device=device) for length in lengths]
    return torch.nested.nested_tensor(parts, layout=torch.jagged).transpose(1, 2)


@pytest.mark.parametrize("name", ["triton", "torch"])
def test_jagged_results_are_padded_as_their_query_is(name: Any, device: str) -> None:
    """To the longest sequence, or to what the query was given as its most."""
    query = jagged([3, 7, 5], device)
    rows: Any = query.transpose(1, 2)
    settings: dict[str, Any] = {"min_seqlen": 0, "max_seqlen": 9}
    wider = torch.nested.nested_tensor_from_jagged(rows.values(), rows.offsets(), **settings)
    for given, length in ((query, 7), (wider.transpose(1, 2), 9)):
        with backend(name):
            output = F.scaled_dot_product_attention(given, given, given)
        padded = output.transpose(1, 2).to_padded_tensor(7.5)
        assert padded.shape == (3, length, 2, 4)
        for own, whole in zip(query.unbind(), padded, strict=True):
            want = torch.nn.functional.scaled_dot_product_attention(own, own, own)
            assert torch.allclose(whole[: own.shape[1]], want.transpose(0, 1), atol=1e-5)
            assert (whole[own.shape[1] :] == 7.5).all()


def with_holes() -> Tensor:
    starts, lengths = torch.tensor([1, 0]), torch.tensor([1, 3])
    parts = torch.randn(2, 4, 2, 4)
    return torch.nested.narrow(parts, 1, starts, lengths, layout=torch.jagged).transpose(1, 2)


def test_a_narrowed_jagged_tensor_is_what_it_is_once_contiguous() -> None:
    narrowed = with_holes().transpose(1, 2)
    whole = narrowed.contiguous().transpose(1, 2)
    output = F.scaled_dot_product_attention(whole, whole, whole)
    for own, got in zip(narrowed.unbind(), output.unbind(), strict=True):
        q = own.transpose(0, 1)
        want = torch.nn.functional.scaled_dot_product_attention(q, q, q)
        assert torch.allclose(got, want, atol=1e-6)


def test_key_and_value_of_the_same_lengths_by_offsets_of_their_own() -> None:
    query, key, value = jagged([4, 1]), jagged([2, 3]), jagged([2, 3])
    output = F.scaled_dot_product_attention(query, key, value)
    parts = zip(*(t.unbind() for t in (query, key, value)), strict=True)
    for got, own in zip(output.unbind(), parts, strict=True):
        want = torch.nn.functional.scaled_dot_product_attention(*own)
        assert torch.allclose(got, want, atol=1e-6)


strided = torch.nested.nested_tensor([torch.randn(2, 3, 4)] * 2, layout=torch.strided)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"key_mask": torch.ones(2, 5) > 0}, ValueError, "no padding"),
        ({"return_weights": "averaged"}, ValueError, "return_weights=False"),
        ({"key": torch.ones(2, 2, 5, 4)}, TypeError, "all dense or all nested"),
        ({"value": jagged([3, 2])}, ValueError, r"'key' and 'value'.*\[0, 2, 5\] and \[0, 3, 5\]"),
        ({"key": with_holes()}, TypeError, r"'key'.*without holes.*key\.contiguous\(\)"),
        ({"query": with_holes()}, TypeError, r"'query'.*query\.contiguous\(\)"),
        ({"query": jagged([2, 1, 2])}, ValueError, "'query' and 'key'.*batch.*3 and 2"),
        ({"value": jagged([2, 3]).transpose(1, 2)}, TypeError, "'value'.*at 1 is jagged"),
        ({"value": strided}, TypeError, r"'value'.*as_nested_tensor\(list\(value\.unbind"),
    ],
    ids=[
        "key_mask",
        "return_weights",
        "mixed",
        "lengths of value",
        "holes in key",
        "holes in query",
        "batch",
        "jagged in heads",
        "strided",
    ],
)
def test_what_nested_tensors_cannot_be_asked_for(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    nested = torch.nested.nested_tensor_from_jagged(torch.randn(5, 2, 4), torch.tensor([0, 2, 5]))
    tensors = dict.fromkeys(("query", "key", "value"), nested.transpose(1, 2))
    with pytest.raises(error, match=message):
        F.scaled_dot_product_attention(**{**tensors, **changes})


def test_no_recompilation_by_length_and_no_graph_break(device: str) -> None:
    compiled = torch.compile(F.varlen_attention, fullgraph=True, dynamic=True, backend="aot_eager")
    for lengths in ([20, 33], [9, 50], [41, 41]):
        q, k, v = tensors = [grad(sum(lengths), HEADS, DIM, device=device) for _ in range(3)]
        starts = starts_of(lengths, device)
        longest = max(lengths)
        output = compiled(q, k, v, starts, starts, longest, longest)
        want = F.varlen_attention(q, k, v, starts, starts, longest, longest)
        assert torch.equal(output, want)
        dy = torch.randn_like(output)
        pairs = zip(
            torch.autograd.grad(output, tensors, dy), torch.autograd.grad(want, tensors, dy),
            strict=True,
        )  # fmt: skip
        assert all(torch.equal(a, b) for a, b in pairs)


def test_starts_and_lengths_that_are_every_other_element(device: str) -> None:
    """As views of a table of batches are."""
    starts = starts_of([3, 4], device)
    apart = torch.stack((starts, torch.full_like(starts, 99)), 1)[:, 0]
    q, k, v = torch.randn(3, 7, 2, 8, device=device)
    got = F.varlen_attention(q, k, v, apart, apart, 4, 4)
    assert torch.equal(got, F.varlen_attention(q, k, v, starts, starts, 4, 4))
    q, k, v = torch.randn(3, 2, 2, 6, 8, device=device)
    lengths = torch.tensor([3, 99, 5, 99], device=device)[::2]
    got = F.scaled_dot_product_attention(q, k, v, key_lengths=lengths)
    want = F.scaled_dot_product_attention(q, k, v, key_lengths=lengths.contiguous())
    assert torch.equal(got, want)
