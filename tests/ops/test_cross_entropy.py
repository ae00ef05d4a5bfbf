"""cross_entropy of given logits against its definition, forward and gradients."""

from typing import Any

import pytest
import torch
from tests.ops.judge import DTYPES, check, grad

from fusedformer import backend
from fusedformer import functional as F

NAN = float("nan")
WIDTHS = {
    1: "one class: loss 0, gradient 0",
    2: "the least there is to decide",
    17: "odd, many rows to a program",
    127: "prime, just below a tile",
    4097: "just above a tile: more than one pass over a row",
    9001: "three tiles, prime",
}


def classes(*shape: int, of: int, device: str, ignored: int | None = -100) -> torch.Tensor:
    """Random classes; every third is ignored."""
    target = torch.randint(of, shape, device=device)
    if ignored is not None:
        target.view(-1)[1::3] = ignored
    return target


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_widths(width: int, dtype: torch.dtype, device: str) -> None:
    x = (3 * torch.randn(7, width, device=device)).requires_grad_()
    target = classes(7, of=width, device=device)
    check("cross_entropy", dtype, input=x, target=target, reduction="none")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_settings(
    reduction: str, smoothing: float, weighted: bool, dtype: torch.dtype, device: str
) -> None:
    settings: dict[str, Any] = dict(reduction=reduction, label_smoothing=smoothing, ignore_index=3)
    check(
        "cross_entropy", dtype, input=grad(19, 40, device=device),
        target=classes(19, of=40, device=device, ignored=3),
        weight=torch.rand(40, device=device) if weighted else None, **settings,
    )  # fmt: skip


LAYOUTS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "one row": (lambda x: x[0, 0], ()),
    "classes in the middle": (lambda x: x, (6, 7)),
    "two more dimensions": (lambda x: x.unflatten(2, (7, 1)), (6, 7, 1)),
    "classes last in memory": (lambda x: x.transpose(1, 2).contiguous().transpose(1, 2), (6, 7)),
    "every other class": (lambda x: x[:, ::2], (6, 7)),
    "one row for all": (lambda x: x[:1, :, 0].expand(5, -1), (5,)),
    "no row": (lambda x: x[:0], (0, 7)),
    "no position": (lambda x: x[..., :0], (6, 0)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_are_read_in_place(layout: str, device: str) -> None:
    view, positions = LAYOUTS[layout]
    x = view(torch.randn(6, 10, 7, device=device)).requires_grad_()
    target = torch.randint(5 if x.dim() > 1 else x.shape[0], positions, device=device)
    check("cross_entropy", torch.float32, input=x, target=target, reduction="none")


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_shift_does_not_cost_accuracy(smoothing: float, device: str) -> None:
    """As it would if the log-sum-exp were kept as one number."""
    x = (3 * torch.randn(5, 5000, device=device) + 1000.0).requires_grad_()
    target = classes(5, of=5000, device=device)
    settings: dict[str, Any] = dict(reduction="none", label_smoothing=smoothing)
    check("cross_entropy", torch.float32, input=x, target=target, **settings)


def test_classes_of_no_probability(device: str) -> None:
    """Logits of -inf, also before the first finite one of a long row, and at its start."""
    x = torch.randn(4, 5000, device=device)
    x[0, :4500] = x[1, ::2] = -torch.inf
    target = torch.tensor([4600, 1, 2, 3], device=device)
    check("cross_entropy", torch.float32, input=x.requires_grad_(), target=target, reduction="none")
    loss = F.cross_entropy(x, torch.tensor([0, 1, 2, 3], device=device), reduction="none")
    assert loss[0] == torch.inf and loss[1:].isfinite().all()


def test_a_row_that_does_not_count_may_hold_anything(device: str) -> None:
    x = torch.randn(3, 9, device=device)
    x[1] = NAN
    target = torch.tensor([2, -100, 4], device=device)
    loss = F.cross_entropy(x.requires_grad_(), target)
    (found,) = torch.autograd.grad(loss, x)
    assert loss.isfinite() and found.isfinite().all() and (found[1] == 0).all()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_no_row_that_counts(reduction: str, device: str) -> None:
    x = torch.randn(3, 9, device=device, requires_grad=True)
    loss = F.cross_entropy(x, torch.full((3,), -100, device=device), reduction=reduction)
    assert loss.isnan() if reduction == "mean" else loss == 0
    assert (torch.autograd.grad(loss, x)[0] == 0).all()


def test_a_target_that_is_no_class_is_nan_where_nothing_may_be_looked_at(device: str) -> None:
    from fusedformer_kernels.rows.cross_entropy import cross_entropy_gradient, cross_entropy_rows

    x, one = torch.randn(3, 9, device=device), torch.ones((), device=device)
    target = torch.tensor([9, -1, 8], device=device)
    given = target, torch.rand(9, device=device), None
    losses, statistics = cross_entropy_rows(x, *given, -100, 0.0)
    dx = cross_entropy_gradient(x, *given, statistics, one, -100, 0.0, first_class=0, n_classes=9)
    assert losses.isnan().tolist() == [True, True, False]
    assert dx.isnan().all(1).tolist() == [True, True, False]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_probabilities(reduction: str, weighted: bool, dtype: torch.dtype, device: str) -> None:
    check(
        "cross_entropy", dtype, input=grad(4, 9, 3, device=device),
        target=torch.rand(4, 9, 3, device=device).requires_grad_(),
        weight=torch.rand(9, device=device) if weighted else None, reduction=reduction,
        label_smoothing=0.1,
    )  # fmt: skip


def test_dtypes_are_those_of_torch(device: str) -> None:
    target = torch.tensor([1, 2], device=device)
    half = torch.randn(2, 5, device=device, dtype=torch.bfloat16)
    assert F.cross_entropy(half, target).dtype == torch.bfloat16
    assert F.cross_entropy(half, torch.rand(2, 5, device=device)).dtype == torch.float32
    with torch.autocast(device, torch.bfloat16):
        assert F.cross_entropy(half, target).dtype == torch.float32
    with pytest.warns(UserWarning, match="reduction='sum'"):
        assert F.cross_entropy(half, target, None, False).dtype == torch.bfloat16


def test_strided_targets_and_weights(device: str) -> None:
    target = classes(14, of=9, device=device)[::2]
    weight = torch.rand(18, device=device)[::2]
    cases: list[dict[str, Any]] = [{"weight": weight}, {"weight": weight[:1].expand(9)}, {}]
    for given in cases:
        logits = grad(7, 9, device=device)
        check("cross_entropy", torch.float32, input=logits, target=target, **given)
        judged: dict[str, Any] = dict(
            input=grad(7, 5, device=device), linear_weight=grad(9, 5, device=device)
        )
        check("linear_cross_entropy", torch.float32, target=target, **judged, **given)


@pytest.mark.parametrize("name", ["torch", "triton"])
@pytest.mark.parametrize("settings", [{}, {"label_smoothing": 0.1}, {"reduction": "none"}])
def test_classes_in_uint8(settings: dict[str, Any], name: Any, device: str) -> None:
    """As torch takes them of rows; 255 may be the class that is ignored."""
    x = torch.randn(4, 5, device=device, requires_grad=True)
    target = torch.tensor([1, 255, 3, 0], device=device, dtype=torch.uint8)
    weight = torch.eye(5, device=device)
    expected = torch.nn.functional.cross_entropy(x, target, ignore_index=255, **settings)
    with backend(name):
        loss = F.cross_entropy(x, target, ignore_index=255, **settings)
        projected = F.linear_cross_entropy(x, weight, target, ignore_index=255, **settings)
    grad = torch.randn_like(expected)
    (truth,) = torch.autograd.grad(expected, x, grad)
    for found in (loss, projected):
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(torch.autograd.grad(found, x, grad)[0], truth)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_kernels_round_once(dtype: torch.dtype, device: str) -> None:
    """As the docstring says: of half precision the loss is that of float32, rounded."""
    x = (5 * torch.randn(64, 300, device=device)).to(dtype)
    target = torch.randint(300, (64,), device=device)
    with backend("triton"):
        half = F.cross_entropy(x, target, reduction="none")
        wide = F.cross_entropy(x.float(), target, reduction="none")
    assert half.dtype == dtype and half.any()
    assert torch.equal(half, wide.to(dtype))
