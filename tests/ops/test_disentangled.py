"""Disentangled attention against its definition, forward and gradients, padded and packed."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from tests.ops.judge import DTYPES, grad

from fusedformer import backend, functional, reference
from fusedformer.parity.cases import stock_disentangled
from fusedformer.reference.disentangled import distance_bucket
from fusedformer.testing import assert_function_parity

HEADS, SPAN = 2, 8


def inputs_of(
    length: int, device: str, *, batch: int = 2, dim: int = 16, value_dim: int = 0, keys: int = 0,
    span: int = SPAN, without: str = "",
) -> dict[str, Any]:  # fmt: skip
    keys, value_dim = keys or length, value_dim or dim
    sizes = {
        "query": (batch, HEADS, length, dim), "key": (batch, HEADS, keys, dim),
        "value": (batch, HEADS, keys, value_dim), "position_key": (HEADS, 2 * span, dim),
        "position_query": (HEADS, 2 * span, dim),
    }  # fmt: skip
    return {name: grad(*size, device=device) for name, size in sizes.items() if name != without}


def check(inputs: dict[str, Any], dtype: torch.dtype, **settings: Any) -> None:
    assert_function_parity(
        lambda **tensors: functional.disentangled_attention(**tensors, **settings),
        lambda **tensors: stock_disentangled(**tensors, **settings),
        lambda **tensors: reference.disentangled_attention(**tensors, **settings),
        inputs,
        dtype=dtype,
    )


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "a bucket each, the ends shared": ({"length": 21}, {}),
    "logarithmic buckets": ({"length": 37}, {"max_distance": 14}),
    "beyond the last bucket": ({"length": 70, "batch": 1}, {"max_distance": 14}),
    "content to position alone": ({"length": 13, "without": "position_query"}, {}),
    "position to content alone": (
        {"length": 13, "without": "position_key"}, {"max_distance": 7},
    ),
    "one token": ({"length": 1}, {}),
    "odd dims": ({"length": 9, "dim": 5, "value_dim": 3, "span": 4}, {"max_distance": 6}),
    "fewer queries than keys": ({"length": 5, "keys": 19}, {"max_distance": 14}),
    "many buckets": ({"length": 19, "span": 40, "batch": 1}, {"max_distance": 64}),
}  # fmt: skip


@pytest.mark.parametrize("backend_name", ["torch", "triton"])
@pytest.mark.parametrize("name", CASES)
def test_forward_and_gradients(name: str, backend_name: Any, device: str) -> None:
    sizes, settings = CASES[name]
    with backend(backend_name):
        check(inputs_of(device=device, **sizes), torch.float32, **settings)


@pytest.mark.parametrize("backend_name", ["torch", "triton"])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_half_precision(dtype: torch.dtype, backend_name: Any, device: str) -> None:
    with backend(backend_name):
        check(inputs_of(37, device), dtype, max_distance=14)


@pytest.mark.parametrize("backend_name", ["torch", "triton"])
def test_masked_keys(backend_name: Any, device: str) -> None:
    """Also of a sequence without any key: zeros, and no gradient."""
    inputs = inputs_of(21, device, batch=3)
    keep = torch.rand(3, 21, device=device) > 0.3
    keep[2] = False
    with backend(backend_name):
        settings: dict[str, Any] = {"max_distance": 14, "key_mask": keep}
        output = functional.disentangled_attention(**inputs, **settings)
        dy = torch.randn_like(output)
        grads = torch.autograd.grad(output, list(inputs.values()), dy)
        assert not output[2].any()
        assert not any(g[2].any() for g in grads[:3])
        seen = {
            name: (x.detach()[:2] if x.dim() == 4 else x.detach()).requires_grad_()
            for name, x in inputs.items()
        }
        check(seen, torch.float32, max_distance=14, key_mask=keep[:2])


@pytest.mark.parametrize("backend_name", ["torch", "triton"])
def test_packed_is_each_sequence_alone(backend_name: Any, device: str) -> None:
    """The same bits, forward and backward; rows behind the last token get zeros."""
    lengths, tail = [21, 0, 1, 34], 3
    total = sum(lengths) + tail
    starts = [0, *itertools.accumulate(lengths)]
    queries = torch.tensor([*starts, total, total], dtype=torch.int32, device=device)
    keys = torch.tensor([*starts, starts[-1], total], dtype=torch.int32, device=device)
    tables = [grad(HEADS, 2 * SPAN, 16, device=device) for _ in range(2)]
    packed = [grad(total, HEADS, 16, device=device) for _ in range(3)]
    dy = torch.randn(total, HEADS, 16, device=device)
    with backend(backend_name):
        output = functional.disentangled_attention(
            *packed, *tables, max_distance=14, cu_seqlens_q=queries, cu_seqlens_k=keys,
            max_seqlen_q=40, max_seqlen_k=40,
        )  # fmt: skip
        grads = torch.autograd.grad(output, [*packed, *tables], dy)
        sums = [torch.zeros_like(table) for table in tables]
        for start, end in itertools.pairwise(starts):
            alone = [x[start:end].detach().transpose(0, 1)[None].requires_grad_() for x in packed]
            found = functional.disentangled_attention(*alone, *tables, max_distance=14)
            assert torch.equal(found[0].transpose(0, 1), output[start:end])
            dy_alone = dy[start:end].transpose(0, 1)[None]
            own = torch.autograd.grad(found, [*alone, *tables], dy_alone)
            for got, want in zip(own[:3], grads[:3], strict=True):
                assert torch.equal(got[0].transpose(0, 1), want[start:end])
            sums = [one + other for one, other in zip(sums, own[3:], strict=True)]
    assert not output[starts[-1] :].any()
    assert not any(g[starts[-1] :].any() for g in grads[:3])
    torch.testing.assert_close(list(grads[3:]), sums, rtol=1e-5, atol=1e-5)


def test_buckets_are_those_of_transformers() -> None:
    from transformers.models.deberta_v2 import modeling_deberta_v2 as theirs

    from fusedformer.ops.relative_position import distance_buckets

    distance = torch.arange(-700, 701)
    for span, longest in ((256, 512), (16, 40), (8, 20)):
        want = theirs.make_log_bucket_position(distance, span, longest).long()
        want = (want + span).clamp(0, 2 * span - 1)
        assert torch.equal(distance_bucket(distance, span, longest), want)
        found, firsts = distance_buckets(span, longest, torch.device("cpu"))
        reach = len(found) // 2
        assert torch.equal(found[distance.clamp(-reach, reach) + reach].long(), want)
        assert torch.equal(torch.searchsorted(firsts, distance, right=True) - 1, want)


@pytest.mark.parametrize("backend_name", ["torch", "triton"])
def test_dropout_drops_the_same_weights_forward_and_backward(
    backend_name: Any, device: str
) -> None:
    """By a value of unit vectors the output is the weights, which tell what was dropped."""
    inputs = inputs_of(32, device, dim=32)
    inputs["value"] = torch.eye(32, device=device).expand(2, HEADS, 32, 32)
    inputs["value"] = inputs["value"].contiguous().requires_grad_()
    dy = torch.randn(2, HEADS, 32, 32, device=device)
    with backend(backend_name):
        torch.manual_seed(3)
        weights = functional.disentangled_attention(**inputs, dropout_p=0.4)
        grads = torch.autograd.grad(weights, list(inputs.values()), dy)
        torch.manual_seed(3)
        assert torch.equal(functional.disentangled_attention(**inputs, dropout_p=0.4), weights)
        torch.manual_seed(4)
        assert not torch.equal(functional.disentangled_attention(**inputs, dropout_p=0.4), weights)
    keep = weights.detach() != 0
    assert 0.5 < keep.double().mean().item() < 0.7
    wide = {name: x.detach().double().requires_grad_() for name, x in inputs.items()}
    want = reference.disentangled_attention(**wide, dropout_p=0.4, keep=keep)
    wanted = torch.autograd.grad(want, list(wide.values()), dy.double())
    torch.testing.assert_close(weights.double(), want, rtol=1e-4, atol=1e-5)
    for got, right in zip(grads, wanted, strict=True):
        torch.testing.assert_close(got.double(), right, rtol=1e-3, atol=1e-4)


def test_gradients_of_gradients_on_the_torch_backend() -> None:
    inputs = inputs_of(5, "cpu", batch=1, dim=3, span=2)
    wide = [x.detach().double().requires_grad_() for x in inputs.values()]
    with backend("torch"):
        call = functional.disentangled_attention
        assert torch.autograd.gradcheck(call, wide)
        assert torch.autograd.gradgradcheck(call, wide)


def test_no_scores_are_kept_for_the_backward(device: str) -> None:
    """Nor products of queries with positions: memory is that of the inputs."""
    inputs = inputs_of(48, device, dim=4)
    output = functional.disentangled_attention(**inputs, max_distance=14)
    saved: Any = output.grad_fn
    held = [t for t in saved.saved_tensors if t is not None]
    assert max(t.numel() for t in held) <= inputs["query"].numel()


@pytest.mark.parametrize("shape", [(0, 2, 5, 8), (2, 2, 0, 8)], ids=str)
def test_nothing_to_attend_to(shape: tuple[int, ...], device: str) -> None:
    query, table = grad(*shape, device=device), grad(2, 4, 8, device=device)
    output = functional.disentangled_attention(query, query, query, table)
    assert output.shape == query.shape
    grads = torch.autograd.grad(output, (query, table), torch.randn_like(output))
    assert not grads[1].any()
