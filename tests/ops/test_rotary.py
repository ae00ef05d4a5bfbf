"""Rotary embedding, with and without QK-norm, against its definition, forward and gradients."""

from typing import Any

import pytest
import torch
from tests.ops.judge import DTYPES, grad
from torch import Tensor

from fusedformer import backend, functional, ops, reference
from fusedformer.testing import assert_function_parity

NORMS: dict[str, dict[str, Any]] = {
    "no norm": {},
    "rms": {"norm": "rms", "weights": 1},
    "rms without weights": {"norm": "rms"},
    "layer": {"norm": "layer", "weights": 2},
}


def tables(rows: int, pairs: int, device: str, batch: int = 0) -> dict[str, Any]:
    angles = torch.outer(torch.arange(rows), 100.0 ** -(torch.arange(pairs) / pairs)) + 0.5
    if batch:
        angles = angles + torch.arange(batch)[:, None, None]
    return {"cos": angles.cos().to(device), "sin": angles.sin().to(device)}


def norm_of(name: str, dim: int, device: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Inputs that get gradients, and options."""
    options = dict(NORMS[name])
    names = ["query_weight", "key_weight", "query_bias", "key_bias"][
        : 2 * options.pop("weights", 0)
    ]
    return {name: grad(dim, device=device) for name in names}, options


def check(inputs: dict[str, Tensor], dtype: torch.dtype, **fixed: Any) -> None:
    """Compare with the definition in float64, beside the composition of ATen calls."""

    def stock(**arguments: Any) -> Any:
        with backend("torch"):
            return functional.rotary_embedding(**arguments, **fixed)

    wide: dict[str, Any] = {
        name: value.double() if name in ("cos", "sin") else value for name, value in fixed.items()
    }
    assert_function_parity(
        lambda **arguments: functional.rotary_embedding(**arguments, **fixed),
        stock,
        lambda **arguments: reference.rotary_embedding(**arguments, **wide),
        inputs,
        dtype=dtype,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "neighbours"])
def test_rotary_embedding(norm: str, interleaved: bool, dtype: torch.dtype, device: str) -> None:
    inputs = {"query": grad(2, 3, 7, 16, device=device), "key": grad(2, 1, 7, 16, device=device)}
    weights, options = norm_of(norm, 16, device)
    check(
        inputs | weights, dtype, **tables(9, 8, device), **options, interleaved=interleaved,
    )  # fmt: skip


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("dim", "pairs"), [(16, 4), (40, 20), (72, 17), (6, 1), (256, 128)])
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "neighbours"])
def test_partial_rotation_and_odd_head_dims(
    dim: int, pairs: int, interleaved: bool, norm: str, device: str
) -> None:
    inputs = {"query": grad(1, 2, 5, dim, device=device), "key": grad(1, 2, 5, dim, device=device)}
    weights, options = norm_of(norm, dim, device)
    check(
        inputs | weights, torch.float32, **tables(5, pairs, device), **options,
        interleaved=interleaved,
    )  # fmt: skip


@pytest.mark.parametrize("batch", [0, 1, 2])
def test_positions_of_a_padded_batch(batch: int, device: str) -> None:
    inputs = {"query": grad(2, 2, 5, 8, device=device), "key": grad(2, 2, 5, 8, device=device)}
    positions = torch.tensor([[0, 1, 2, 3, 4], [7, 7, 0, 2, 1]], device=device)
    check(inputs, torch.float32, **tables(9, 4, device, batch), positions=positions)


def test_packed_tokens_rotate_as_in_their_sequences(device: str) -> None:
    lengths, total = (4, 1, 3), 8
    inputs: Any = {
        "query": grad(total, 2, 8, device=device),
        "key": grad(total, 1, 8, device=device),
    }
    positions = torch.cat([torch.arange(n) for n in lengths]).to(device)
    given: Any = tables(5, 4, device)
    check(inputs, torch.float32, **given, positions=positions)
    packed = functional.rotary_embedding(**inputs, **given, positions=positions)
    for start, length in ((0, 4), (4, 1), (5, 3)):
        alone = {name: t[start : start + length] for name, t in inputs.items()}
        for got, want in zip(packed, functional.rotary_embedding(**alone, **given), strict=True):
            assert torch.equal(got[start : start + length], want)


def test_projections_are_read_in_place(device: str) -> None:
    """Interleaved projections, and columns that are not neighbours in memory."""
    qkv = torch.randn(2, 6, 3, 2, 8, device=device)
    query, key, _ = (t.transpose(1, 2).requires_grad_() for t in qkv.unbind(2))
    check({"query": query, "key": key}, torch.float32, **tables(6, 4, device), norm="rms")
    wide = torch.randn(2, 2, 6, 16, device=device)
    inputs = {"query": wide[..., ::2].requires_grad_(), "key": wide[..., 1::2].requires_grad_()}
    check(inputs, torch.float32, **tables(6, 4, device))


@pytest.mark.parametrize("shape", [(0, 2, 5, 8), (2, 0, 5, 8), (2, 2, 0, 8)], ids=str)
def test_nothing_to_rotate(shape: tuple[int, ...], device: str) -> None:
    query = torch.randn(shape, device=device, requires_grad=True)
    key, weight = torch.randn(shape, device=device), torch.ones(8, device=device).requires_grad_()
    found = functional.rotary_embedding(
        query, key, **tables(5, 4, device), norm="rms", query_weight=weight
    )
    assert [one.shape for one in found] == [query.shape, key.shape]
    grads = torch.autograd.grad(found[0], (query, weight), torch.randn_like(found[0]))
    assert grads[0].shape == query.shape
    assert not grads[1].any()


def test_frozen_weights_and_one_wanted_output(device: str) -> None:
    query, key = (grad(1, 2, 5, 8, device=device) for _ in range(2))
    weight = torch.randn(8, device=device)
    given: Any = {**tables(5, 4, device), "norm": "rms", "query_weight": weight}
    first, _ = functional.rotary_embedding(query, key, **given)
    (got,) = torch.autograd.grad(first, query, torch.ones_like(first) * weight)
    with backend("torch"):
        first, _ = functional.rotary_embedding(query, key, **given)
        (want,) = torch.autograd.grad(first, query, torch.ones_like(first) * weight)
    torch.testing.assert_close(got, want)


def test_one_launch_each_way(device: str) -> None:
    from fusedformer_kernels.runtime.launch import recorded_launches

    query, key = grad(2, 3, 7, 16, device=device), grad(2, 1, 7, 16, device=device)
    with recorded_launches(run=True) as launches:
        found = functional.rotary_embedding(query, key, **tables(7, 8, device))
        torch.autograd.backward(found, [torch.randn_like(one) for one in found])
    assert [launch.name for launch in launches] == ["_rotary_forward", "_rotary_backward"]


def test_written_over_queries_and_keys_of_one_product(device: str) -> None:
    """As layers do that compute both in one: the bits of other memory, and values as they were."""
    from fusedformer_kernels.rows.rotary import rotary_backward, rotary_forward

    cos, sin = (table[None] for table in tables(9, 8, device).values())
    rest = cos, sin, None, (None,) * 4, "none", 0.0, False
    calls: list[tuple[Any, tuple[bool, ...]]] = [(rotary_forward, ()), (rotary_backward, (False,))]
    for call, last in calls:
        qkv = torch.randn(2, 9, 3, 3, 16, device=device)
        query, key, value = (part.clone() for part in qkv.unbind(2))
        given = [query, key] * (1 + len(last))
        wanted = call(*given, *rest, *last)
        for _ in range(2):
            found = qkv.clone()
            parts = [found[:, :, 0], found[:, :, 1]]
            call(*parts * (1 + len(last)), *rest, *last, True)
            assert torch.equal(parts[0], wanted[0]) and torch.equal(parts[1], wanted[1])
            assert torch.equal(found[:, :, 2], value) and not torch.equal(parts[0], query)


def test_heads_by_tables_that_have_each_angle_twice() -> None:
    half = tables(9, 8, "cpu")
    twice = [torch.cat((table, table), -1)[None] for table in half.values()]
    query, key = torch.randn(2, 4, 9, 16), torch.randn(2, 4, 9, 16)
    with backend("torch"):
        wanted = functional.rotary_embedding(query, key, **half)
        both = torch.stack((query, key), 1).permute(0, 3, 1, 2, 4)  # [batch, length, 2, heads, dim]
        found = ops.rotated(both, *twice).permute(0, 2, 3, 1, 4).unbind(1)
    assert all(map(torch.equal, found, wanted))


def test_tables_that_want_a_gradient_are_refused_by_the_kernels(device: str) -> None:
    query, key = grad(1, 2, 5, 8, device=device), grad(1, 2, 5, 8, device=device)
    given = tables(5, 4, device)
    given["cos"].requires_grad_()
    with pytest.raises(ValueError, match="no gradient of 'cos' and 'sin'"):
        functional.rotary_embedding(query, key, **given)
    with backend("torch"):
        found, _ = functional.rotary_embedding(query, key, **given)
    (got,) = torch.autograd.grad(found, given["cos"], torch.randn_like(found))
    assert got.any()


def test_positions_outside_the_tables(device: str) -> None:
    if device != "cpu":
        pytest.skip("looking at values would wait for the GPU")
    query, key = torch.randn(2, 1, 2, 8), torch.randn(2, 1, 2, 8)
    for wrong in (-1, 5):
        positions = torch.tensor([[0, wrong], [0, 1]])
        with pytest.raises(IndexError, match=r"0 to 4, but got"):
            functional.rotary_embedding(query, key, **tables(5, 4, device), positions=positions)


def test_heads_by_whole_tables() -> None:
    """As models of transformers make them: both halves of the angles are the same."""
    x, half = torch.randn(2, 5, 3, 8), torch.randn(1, 5, 4)
    cos, sin = (torch.cat((t, t), -1) for t in (half.cos(), half.sin()))
    by_head = x.transpose(1, 2)
    wanted, _ = functional.rotary_embedding(by_head, by_head, half.cos(), half.sin())
    torch.testing.assert_close(ops.rotated(x, cos, sin), wanted.transpose(1, 2))
