"""Embeddings with norm and dropout in one kernel, against the definition and torch's own steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.ops.judge import DTYPES, grad
from torch import Tensor

from fusedformer import backend, functional, reference
from fusedformer.parity.cases import stock_embedding as stock
from fusedformer.testing import assert_function_parity

TOKENS, POSITIONS, TYPES = 11, 7, 2


def inputs(
    device: str, width: int, *shape: int, leave_out: tuple[str, ...] = (), ids: Any = torch.int64
) -> dict[str, Any]:
    def drawn(count: int) -> Tensor:
        return torch.randint(count, shape, device=device, dtype=ids)

    found = dict(
        input=drawn(TOKENS), weight=grad(TOKENS, width, device=device),
        norm_weight=grad(width, device=device), norm_bias=grad(width, device=device),
        position_ids=drawn(POSITIONS), position_weight=grad(POSITIONS, width, device=device),
        token_type_ids=drawn(TYPES), token_type_weight=grad(TYPES, width, device=device),
    )  # fmt: skip
    return {name: value for name, value in found.items() if name not in leave_out}


def check(dtype: torch.dtype | None, given: dict[str, Any]) -> None:
    for name in ("triton", "torch"):
        with backend(name):
            assert_function_parity(
                functional.embedding_layer_norm,
                stock,
                reference.embedding_layer_norm,
                given,
                dtype=dtype,
            )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [3, 64, 131, 768])
def test_widths(width: int, dtype: torch.dtype, device: str) -> None:
    check(dtype, inputs(device, width, 3, 7))


@pytest.mark.parametrize(("width", "value"), [(100, 1234.567), (768, 1e6)])
def test_rows_of_one_value(width: int, value: float, device: str) -> None:
    """Their mean is that value to the bit, however large it is."""
    given = inputs(device, width, 3, leave_out=("position_ids", "position_weight"))
    given["weight"] = torch.full((TOKENS, width), value, device=device)
    given["token_type_weight"] = torch.zeros(TYPES, width, device=device)
    for name in ("triton", "torch"):
        with backend(name):
            output = functional.embedding_layer_norm(**given)
        assert torch.equal(output, given["norm_bias"].expand_as(output))


@pytest.mark.parametrize("width", [4097, 8192])
def test_long_rows(width: int, device: str) -> None:
    check(torch.bfloat16, inputs(device, width, 5))


@pytest.mark.parametrize(
    "leave_out",
    [
        ("position_ids", "position_weight"),
        ("token_type_ids",),
        ("token_type_ids", "token_type_weight"),
        ("norm_weight",),
        ("norm_bias",),
        ("position_ids", "position_weight", "token_type_ids", "token_type_weight", "norm_weight",
         "norm_bias"),
    ],
    ids=", ".join,
)  # fmt: skip
def test_what_may_be_left_out(leave_out: tuple[str, ...], device: str) -> None:
    check(torch.float32, inputs(device, 24, 13, leave_out=leave_out))


@pytest.mark.parametrize("shape", [(), (1,), (2, 0), (2, 3, 4)])
def test_ids_of_any_shape(shape: tuple[int, ...], device: str) -> None:
    given = inputs(device, 20, *shape, ids=torch.int32)
    for name in ("triton", "torch"):
        with backend(name):
            output = functional.embedding_layer_norm(**given)
            assert output.shape == (*shape, 20)
            wanted = [value for value in given.values() if value.requires_grad]
            grads = torch.autograd.grad(output, wanted, torch.randn_like(output))
            if not output.numel():
                assert not any(g.any() for g in grads)
    if output.numel():
        check(torch.float32, given)


@pytest.mark.parametrize("padding_idx", [0, 4, -1])
def test_padding_has_no_gradient(padding_idx: int, device: str) -> None:
    given = inputs(device, 16, 40)
    given["input"][::7] = padding_idx % TOKENS
    check(torch.float32, {**given, "padding_idx": padding_idx})
    with backend("triton"):
        output = functional.embedding_layer_norm(**given, padding_idx=padding_idx)
        (found,) = torch.autograd.grad(output, given["weight"], torch.randn_like(output))
    assert (given["input"] == padding_idx % TOKENS).any() and not found[padding_idx].any()


def test_strided_tables_and_ids(device: str) -> None:
    """Rows of a wider table, columns of a transposed one, and every second id."""
    given = inputs(device, 16, 4, 6)
    given["weight"] = grad(TOKENS, 40, device=device).detach()[:, :16].requires_grad_()
    given["position_weight"] = grad(16, POSITIONS, device=device).detach().t().requires_grad_()
    ids = torch.randint(TOKENS, (4, 12), device=device)
    check(torch.float32, {**given, "input": ids[:, ::2]})


def test_strided_parameters_of_the_norm(device: str) -> None:
    given = inputs(device, 16, 3, 7)
    every_other = {n: grad(32, device=device).detach()[::2] for n in ("norm_weight", "norm_bias")}
    check(torch.float32, given | {n: t.requires_grad_() for n, t in every_other.items()})


def test_dropout(device: str) -> None:
    """The mask that the seed says, forward and backward."""
    from fusedformer_kernels.rows.dropout import dropout_mask

    given = inputs(device, 131, 9, 5)
    p = 0.3
    state = torch.get_rng_state() if device == "cpu" else torch.cuda.get_rng_state()
    seed = torch.randint(0, 2**63 - 1, (1,), device=device)
    keep = dropout_mask(seed, p, 1, 45, 131, False).view(9, 5, 131)

    def dropped(**settings: Any) -> Tensor:
        if device == "cpu":
            torch.set_rng_state(state)
        else:
            torch.cuda.set_rng_state(state)
        return functional.embedding_layer_norm(**settings, p=p)

    def truth(**settings: Any) -> Tensor:
        return reference.embedding_layer_norm(**settings, p=p, keep=keep)

    def steps(**settings: Any) -> Tensor:
        return torch.where(keep, stock(**settings), 0.0) / (1 - p)

    with backend("triton"):
        assert_function_parity(dropped, steps, truth, given)
        whole = functional.embedding_layer_norm(**given)
        assert torch.equal(functional.embedding_layer_norm(**given, p=p, training=False), whole)
        assert not functional.embedding_layer_norm(**given, p=1.0).any()
    with backend("torch"):
        output = functional.embedding_layer_norm(**given, p=p)
        kept = output != 0
        assert 0.6 < kept.double().mean() < 0.8
        close = torch.isclose(output, functional.embedding_layer_norm(**given) / (1 - p))
        assert close[kept].all()


def test_frozen_parts_cost_nothing(device: str) -> None:
    """No gradient of the sum where all tables are frozen; of one table only, its own."""
    from fusedformer_kernels.runtime.launch import recorded_launches

    given = inputs(device, 16, 20)
    for name in ("weight", "position_weight", "token_type_weight"):
        given[name].requires_grad_(False)
    with backend("triton"):
        output = functional.embedding_layer_norm(**given)
        with recorded_launches(run=True) as launches:
            grads = torch.autograd.grad(
                output, [given["norm_weight"], given["norm_bias"]], torch.randn_like(output)
            )
        assert launches[0].arguments["dz_ptr"] is None and len(launches) == 2
        assert all(g.shape == (16,) for g in grads)
        given["position_weight"].requires_grad_()
        given["norm_weight"].requires_grad_(False)
        given["norm_bias"].requires_grad_(False)
    check(torch.float32, given)


def test_one_launch_forward(device: str) -> None:
    from fusedformer_kernels.runtime.launch import recorded_launches

    with backend("triton"), recorded_launches(run=True) as launches:
        functional.embedding_layer_norm(**inputs(device, 16, 20), p=0.1)
    assert [launch.name for launch in launches] == ["_embedding_forward"]


def test_ids_without_a_vector(device: str) -> None:
    """An error on the CPU. The kernel, which cannot raise, reads nothing and says NaN."""
    for name in ("input", "position_ids", "token_type_ids"):
        for wrong in (-1, 100):
            given = inputs(device, 16, 20)
            given[name][3] = wrong
            if device == "cpu":
                with pytest.raises(IndexError, match=f"'{name}' to be within .* but got {wrong}"):
                    functional.embedding_layer_norm(**given)
    from fusedformer.ops.embedding import embedding_layer_norm

    given = inputs(device, 16, 20)
    given["input"][3], given["position_ids"][7] = TOKENS, -1
    with backend("triton"):
        output = embedding_layer_norm(
            **{**given, "norm_weight": None, "norm_bias": None},
            eps=1e-5,
            padding_idx=None,
            p=0.0,
            dtype=None,
        )
        wanted = torch.zeros(20, dtype=torch.bool, device=device)
        wanted[[3, 7]] = True
        assert torch.equal(output.isnan().all(1), wanted)
        assert torch.equal(output.isnan().any(1), wanted)
        torch.autograd.grad(output, given["weight"], torch.randn_like(output))  # and no crash


def test_too_many_columns(device: str) -> None:
    ids, weight = torch.zeros(2, dtype=torch.int64, device=device), torch.randn(3, 8193)
    with backend("triton"), pytest.raises(ValueError, match=r"up to 8192 columns.*8193"):
        functional.embedding_layer_norm(ids, weight.to(device))
    with backend("torch"):
        assert functional.embedding_layer_norm(ids, weight.to(device)).shape == (2, 8193)


def test_ids_far_into_a_table(device: str) -> None:
    """Offsets beyond 2**31 elements, on a table that is one vector seen at many rows."""
    vector = torch.randn(1, 64, device=device)
    weight = vector.expand(2**26, 64)
    ids = torch.tensor([0, 2**26 - 1], device=device)
    with backend("triton"):
        output = functional.embedding_layer_norm(ids, weight)
    assert torch.equal(output[0], output[1])
