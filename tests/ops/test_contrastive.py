"""Contrastive losses over all pairs, against their definition and as CLIP's training has them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.ops.judge import DTYPES, check
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fusedformer import backend, reference
from fusedformer import functional as F
from fusedformer.ops import contrastive as ops
from fusedformer.ops import contrastive_aten
from fusedformer.parity.cases import stock_contrastive, stock_sigmoid_contrastive
from fusedformer.testing import assert_function_parity

NAMES = ["contrastive_loss", "sigmoid_contrastive_loss"]
STOCK: dict[str, Callable[..., Any]] = {
    "contrastive_loss": stock_contrastive,
    NAMES[1]: stock_sigmoid_contrastive,
}


def pairs(
    name: str, rows: int, columns: int, dims: int, device: str, *, scale: float = 14.3, **more: Any
) -> dict[str, Any]:
    """Normalized embeddings, every gradient wanted."""
    a, b = (
        torch.nn.functional.normalize(torch.randn(n, dims, device=device), dim=1).requires_grad_()
        for n in (rows, columns)
    )
    given = {"a": a, "b": b, "logit_scale": torch.tensor(scale, device=device).requires_grad_()}
    if name == "sigmoid_contrastive_loss":
        given["logit_bias"] = torch.tensor(-4.0, device=device).requires_grad_()
    return {**given, **more}


SHAPES = {
    "one pair": (1, 1, 16),
    "odd, one small tile": (37, 37, 19),
    "prime, just above a tile, more dims than a block": (131, 131, 67),
    "large tiles": (300, 300, 130),
    "more columns": (33, 301, 24),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", NAMES)
def test_shapes(name: str, shape: str, dtype: torch.dtype, device: str) -> None:
    rows, columns, dims = SHAPES[shape]
    offset = (columns - rows) // 2
    check(name, dtype, **pairs(name, rows, columns, dims, device, label_offset=offset))


@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("name", NAMES)
def test_strips(name: str, reduction: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """More rows than a launch takes: columns are merged, and their gradients added up."""
    from fusedformer_kernels.rows import contrastive

    monkeypatch.setattr(contrastive, "FORWARD_ROWS", 48)
    monkeypatch.setattr(contrastive, "BACKWARD_ROWS", 32)
    monkeypatch.setattr(contrastive_aten, "STRIP_ROWS", 16)
    given = pairs(name, 101, 140, 24, device, label_offset=39, reduction=reduction)
    check(name, torch.float32, **given)
    definition = getattr(reference, name)
    with backend("torch"):
        assert_function_parity(getattr(F, name), definition, definition, given, dtype=torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_beside_what_training_code_does(name: str, dtype: torch.dtype, device: str) -> None:
    given = pairs(name, 70, 70, 32, device, scale=100.0)
    assert_function_parity(
        getattr(F, name), STOCK[name], getattr(reference, name), given, dtype=dtype
    )


@pytest.mark.parametrize("scale", [-3.0, 0.0, 1000.0])
@pytest.mark.parametrize("name", NAMES)
def test_scales_and_sizes_of_any_kind(name: str, scale: float, device: str) -> None:
    """Nothing relies on scores being bounded, nor on the scale's sign."""
    given = pairs(name, 40, 40, 16, device, scale=scale)
    given["a"] = (3 * given["a"]).detach().requires_grad_()
    check(name, torch.float32, **given)


def test_sure_pairs_lose_no_digits(device: str) -> None:
    """Probabilities within a rounding of 1, whose gradients are what is left."""
    given = pairs("contrastive_loss", 40, 40, 64, device, scale=60.0)
    given["b"] = given["a"].detach().clone().requires_grad_()
    check("contrastive_loss", torch.float32, **given)


LAYOUTS = {
    "transposed": lambda x: x.T.contiguous().T,
    "dims apart": lambda x: torch.stack((x, x), 2).flatten(1)[:, ::2],
    "rows apart": lambda x: torch.cat((x, x), 1)[:, : x.shape[1]],
    "one row for all": lambda x: x[:1].expand(x.shape),
    "unaligned": lambda x: torch.cat((x.flatten()[:1], x.flatten()))[1:].view(x.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, device: str) -> None:
    given = pairs("contrastive_loss", 20, 20, 64, device)
    given["b"] = LAYOUTS[layout](given["b"].detach()).requires_grad_()
    check("contrastive_loss", torch.float32, **given)


@pytest.mark.parametrize("learned", ["a", "b", "logit_scale", "logit_bias"])
@pytest.mark.parametrize("name", NAMES)
def test_each_gradient_alone(
    name: str, learned: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A frozen tower costs no product, and the scale's gradient then comes of the other's."""
    from fusedformer_kernels.rows import contrastive

    monkeypatch.setattr(contrastive, "BACKWARD_ROWS", 16)
    given = pairs(name, 37, 37, 16, device)
    if learned in given:
        for key, value in given.items():
            value.requires_grad_(key == learned)
        check(name, torch.float32, **given)


@pytest.mark.parametrize("name", NAMES)
def test_numbers_in_place_of_tensors(name: str, device: str) -> None:
    given = pairs(name, 9, 9, 16, device)
    numbers = {k: v.item() if v.dim() == 0 else v for k, v in given.items()}
    for which in ("triton", "torch"):
        with backend(which):
            assert torch.equal(getattr(F, name)(**given), getattr(F, name)(**numbers))


def test_float16_holds_the_gradients_of_a_mean_over_many(device: str) -> None:
    """Each pair's share is below what float16 resolves; their sum is not."""
    given = pairs("contrastive_loss", 300, 300, 16, device, scale=1.0)

    def less(function: Any) -> Any:  # as in a mean over 64 times as many
        return lambda **arguments: function(**arguments) / 64

    def exact(**arguments: Any) -> Any:
        with backend("torch"):
            return F.contrastive_loss(**arguments)

    definition = less(reference.contrastive_loss)
    assert_function_parity(
        less(F.contrastive_loss), less(exact), definition, given, dtype=torch.float16
    )


@pytest.mark.parametrize("name", NAMES)
def test_autocast_narrows_embeddings_as_it_does_products(name: str, device: str) -> None:
    given = pairs(name, 20, 20, 16, device)
    narrow = {k: v.detach().bfloat16() if v.dim() else v for k, v in given.items()}
    for which in ("triton", "torch"):
        with backend(which):
            want = getattr(F, name)(**narrow)
            with torch.autocast(device, dtype=torch.bfloat16):
                found = getattr(F, name)(**given)
            assert found.dtype == torch.float32
            assert torch.equal(found, want)
            (grad,) = torch.autograd.grad(found, given["a"])
            assert grad.dtype == torch.float32


@pytest.mark.parametrize("name", NAMES)
def test_determinism(name: str, device: str) -> None:
    given = pairs(name, 150, 150, 40, device)
    leaves = [v for v in given.values() if v.requires_grad]
    runs = []
    for _ in range(2):
        loss = getattr(F, name)(**given)
        runs.append([loss, *torch.autograd.grad(loss, leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("columns", [0, 3])
@pytest.mark.parametrize("name", NAMES)
def test_no_rows(name: str, columns: int, device: str) -> None:
    given = pairs(name, 0, columns, 8, device, reduction="sum")
    leaves = [v for v in given.values() if isinstance(v, Tensor)]
    for which in ("triton", "torch"):
        with backend(which):
            loss = getattr(F, name)(**given)
            grads = torch.autograd.grad(loss, leaves)
            assert loss == 0
            assert [g.shape for g in grads] == [t.shape for t in leaves]
            assert all((g == 0).all() for g in grads)
            assert getattr(F, name)(**{**given, "reduction": "mean"}).isnan()


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that is made."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and not func.is_view:
            self.elements = max(self.elements, result.numel())
        return result


@pytest.mark.parametrize("which", ["triton", "torch"])
@pytest.mark.parametrize("name", NAMES)
def test_memory_grows_linearly(name: str, which: str) -> None:
    """Forward and backward, on tensors without memory: at four times the batch no tensor is more
    than four times as large, and at 65,536 none has more than 4,096 rows of scores."""
    from fusedformer_kernels.runtime.launch import recorded_launches

    largest = []
    dtype = torch.bfloat16 if which == "triton" else torch.float32
    for n in (16384, 65536):
        x, scale = torch.empty(n, 512, dtype=dtype, device="meta"), torch.empty((), device="meta")
        bias = scale if name == NAMES[1] else None
        with recorded_launches(run=False), Largest() as seen:
            if bias is None:
                row, column, matched = ops._row_and_column_lse._run(x, x, scale, 0, which)
                grads, lse = (row, column, matched), (row, column)
            else:
                losses = ops._softplus_sums._run(x, x, scale, bias, 0, which)
                grads, lse = (losses, None, None), (None, None)
            needs = [True, True, True, bias is not None]
            ops._pairs_backward._run(*grads, x, x, scale, bias, *lse, 0, needs, which)
        largest.append(seen.elements)
    assert 65536 * 512 <= largest[1] <= 4 * largest[0]
    assert largest[1] <= 4096 * 65536


@pytest.mark.parametrize("name", NAMES)
def test_kernels_of_a_call(name: str, device: str) -> None:
    from fusedformer_kernels.runtime.launch import recorded_launches

    given = pairs(name, 20, 20, 16, device)
    with recorded_launches(run=True) as launches:
        loss = getattr(F, name)(**given)
    forward = [launch.name for launch in launches]
    parts = "_score_parts _merge_parts _merge_parts" if name == NAMES[0] else (
        "_softplus_parts _sum_partials"
    )  # fmt: skip
    assert forward == parts.split()
    with recorded_launches(run=True) as launches:
        loss.backward()
    assert [launch.name for launch in launches] == ["_score_gradients"]


@pytest.mark.parametrize("name", NAMES)
def test_differentiated_again_and_by_transforms_on_the_torch_backend(name: str) -> None:
    given = pairs(name, 5, 7, 8, "cpu", label_offset=1)
    wide = {k: v.detach().double().requires_grad_() if isinstance(v, Tensor) else v
            for k, v in given.items()}  # fmt: skip
    names = [k for k, v in wide.items() if isinstance(v, Tensor)]

    def loss(*tensors: Tensor) -> Tensor:
        found: Tensor = getattr(F, name)(**{**wide, **dict(zip(names, tensors, strict=True))})
        return found

    leaves = [wide[k] for k in names]
    with backend("torch"):
        assert torch.autograd.gradcheck(loss, leaves)
        assert torch.autograd.gradgradcheck(loss, leaves)
        want = torch.autograd.grad(loss(*leaves), leaves)
        found = torch.func.grad(loss, tuple(range(len(names))))(*(v.detach() for v in leaves))
    assert all(torch.allclose(a, b) for a, b in zip(found, want, strict=True))
