"""softmax and log_softmax against their definitions, forward and gradients."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.ops.judge import DTYPES, check, grad
from torch import Tensor

from fusedformer import functional as F
from fusedformer_kernels.runtime import targets
from fusedformer_kernels.runtime.launch import recorded_launches

NAMES = ["softmax", "log_softmax"]
WIDTHS = {
    1: "a row of one element is 1, its gradient 0",
    2: "the least that can be normalized",
    17: "odd",
    127: "prime, just below a tile",
    128: "a tile",
    129: "just above a tile",
    1000: "not a power of two",
    4097: "just above the rows that share a program",
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", NAMES)
def test_widths(name: str, width: int, dtype: torch.dtype, device: str) -> None:
    check(name, dtype, input=grad(5, width, device=device), dim=-1)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("width", [16385, 20480, 32769, 70001])
def test_rows_beyond_one_pass(name: str, width: int, device: str) -> None:
    """Longer than registers hold: backward from 16,385 columns, forward from 32,769."""
    # A spread of scores, so that single probabilities stand out of the criterion's eps.
    x = (3 * torch.randn(2, width, device=device)).requires_grad_()
    check(name, torch.float32, input=x, dim=-1)
    check(name, torch.bfloat16, input=x, dim=-1)


def test_longest_row(device: str) -> None:
    check("softmax", torch.float32, input=grad(1, 262144, device=device), dim=-1)


LONG: dict[str, tuple[str, int, Callable[[Tensor], dict[str, Any]]]] = {
    "whole chunks": ("softmax", 49152, lambda x: {"input": x}),
    "chunks and a rest": ("log_softmax", 50001, lambda x: {"input": x}),
    "wider output": ("softmax", 50001, lambda x: {"input": x.bfloat16(), "dtype": torch.float32}),
    "narrower output": ("log_softmax", 49152, lambda x: {"input": x, "dtype": torch.bfloat16}),
    "every other column": (
        "softmax",
        49155,
        lambda x: {"input": x.repeat_interleave(2, 1)[:, ::2]},
    ),
    "unaligned rows": ("log_softmax", 49152, lambda x: {"input": x.repeat(1, 2)[:, 1:49153]}),
    "boolean mask": ("softmax", 50001, lambda x: {"input": x, "mask": x > -1.0}),
    "additive mask": (
        "log_softmax",
        49152,
        lambda x: {"input": x.bfloat16(), "mask": x.flip(1), "scale": 0.5},
    ),
    "causal": ("softmax", 50001, lambda x: {"input": x, "is_causal": True}),
    "large numbers": ("log_softmax", 50001, lambda x: {"input": x.sign() * 3e38}),
    "rows that begin with -inf": ("softmax", 50001, lambda x: {"input": x.sort().values.log()}),
    "a row of -inf": (
        "log_softmax",
        50001,
        lambda x: {"input": torch.where(x[:, :1] < x[0, 0], x, -torch.inf)},
    ),
}


@pytest.mark.parametrize("name", ["sm_80", "sm_90"])
def test_the_second_launch_of_split_rows_begins_while_the_first_ends(
    name: str, device: str
) -> None:
    """It waits, and the first one lets it; where a GPU cannot, and of whole rows, neither does."""
    can = name == "sm_90"
    for n_rows, expected in ((2, [(can, False), (False, can)]), (100, [(False, False)])):
        x = torch.empty(1, device=device).expand(n_rows, 131072)
        with (
            targets.assume_target(targets.TARGETS[name]),
            recorded_launches(run=False) as launches,
        ):
            F.softmax(x, -1)
        assert [(one.arguments["LETS"], one.arguments["WAITS"]) for one in launches] == expected
        early = ["launch_pdl" in one.config.options() for one in launches]
        assert early == [waits for _, waits in expected]


@pytest.mark.parametrize("form", LONG)
def test_long_rows_have_the_same_bits_split_and_whole(form: str, device: str) -> None:
    """Few rows are split among programs, many are not: what is in a row does not depend on it."""
    name, width, make = LONG[form]
    inputs = make(3 * torch.randn(2, width, device=device))
    x = inputs["input"] = inputs["input"].detach().requires_grad_()
    target = targets.target_of(x.device)
    found, programs = [], []
    for multiprocessors in (1, 132):
        with (
            targets.assume_target(dataclasses.replace(target, multiprocessors=multiprocessors)),
            recorded_launches(run=True) as launches,
        ):
            y = getattr(F, name)(dim=-1, **inputs)
            torch.manual_seed(1)
            found.append((y, *torch.autograd.grad(y, x, torch.randn_like(y))))
        programs.append([launch.grid[0] for launch in launches])
    assert programs[0] == [2, 2] and len(programs[1]) == 4 and min(programs[1]) > 2
    for whole, split in zip(*found, strict=True):
        assert torch.equal(whole.isnan(), split.isnan())
        assert torch.equal(whole.nan_to_num(), split.nan_to_num())
    if set(inputs) == {"input"}:
        torch.testing.assert_close(found[0][0], getattr(torch, name)(x, -1), equal_nan=True)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dim", [0, 1, 2, -1, -3])
def test_any_dimension(name: str, dim: int, device: str) -> None:
    check(name, torch.float32, input=grad(5, 7, 9, device=device), dim=dim)


LAYOUTS = {
    "transposed": lambda x: x.transpose(0, 2),
    "every other column": lambda x: x[..., ::2],
    "reversed order of rows": lambda x: x.permute(1, 0, 2),
    "one row for all": lambda x: x[:1].expand(4, -1, -1),
    "five dimensions that do not merge": lambda x: x.reshape(2, 3, 2, 3, 10).permute(2, 0, 3, 1, 4),
    "no dimension": lambda x: x[0, 0, 0],
    "one dimension": lambda x: x[0, 0],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", NAMES)
def test_layouts_are_read_in_place(name: str, layout: str, device: str) -> None:
    x = LAYOUTS[layout](torch.randn(6, 6, 10, device=device)).requires_grad_()
    check(name, torch.float32, input=x, dim=-1)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0,), (2, 0, 4)])
@pytest.mark.parametrize("name", NAMES)
def test_empty(name: str, shape: tuple[int, ...], device: str) -> None:
    x = torch.randn(shape, device=device, requires_grad=True)
    y = getattr(F, name)(x, -1)
    assert y.shape == shape
    (gradient,) = torch.autograd.grad(y, x, torch.randn_like(y))
    assert gradient.shape == shape


MASKS = {
    "full size": (2, 3, 9, 11),
    "rows and columns": (9, 11),
    "columns": (11,),
    "batch": (2, 1, 1, 11),
    "rows": (3, 9, 1),
    "one value": (1, 1, 1, 1),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", MASKS)
@pytest.mark.parametrize("name", NAMES)
def test_additive_masks_broadcast(name: str, shape: str, dtype: torch.dtype, device: str) -> None:
    if shape == "one value":
        mask = torch.randn(MASKS[shape], device=device)  # shifts all: its gradient is 0
    else:
        mask = grad(*MASKS[shape], device=device)
    if shape == "rows":
        mask = mask.detach()
    x = grad(2, 3, 9, 11, device=device)
    check(name, dtype, input=x, dim=-1, mask=mask, scale=0.5)


@pytest.mark.parametrize("shape", MASKS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("causal", [False, True])
def test_boolean_masks_broadcast(name: str, shape: str, causal: bool, device: str) -> None:
    mask = torch.rand(MASKS[shape], device=device) > 0.3
    x = grad(2, 3, 9, 11, device=device)
    check(name, torch.float32, input=x, dim=-1, mask=mask, is_causal=causal, scale=-2.0)


@pytest.mark.parametrize("kind", ["boolean", "additive"])
def test_removed_rows_are_zero(kind: str, device: str) -> None:
    """Not NaN, as a row of -inf without a mask is."""
    keep = torch.ones(4, 6, dtype=torch.bool, device=device)
    keep[1] = False
    mask = keep if kind == "boolean" else keep.float().log()
    x = grad(4, 6, device=device)
    y = F.softmax(x, -1, mask=mask)
    log_y = F.log_softmax(x, -1, mask=mask)
    assert (y[1] == 0).all()
    assert (log_y[1] == -torch.inf).all()
    for output in (y, log_y):
        (gradient,) = torch.autograd.grad(output, x, torch.randn_like(output))
        assert (gradient[1] == 0).all()
        assert gradient.isfinite().all()
    check("softmax", torch.float32, input=x, dim=-1, mask=mask)


def test_row_of_minus_infinity_is_nan_as_in_torch(device: str) -> None:
    x = torch.full((2, 5), -torch.inf, device=device)
    x[1] = 0.0
    y = F.softmax(x, -1)
    assert y[0].isnan().all()
    assert (y[1] == 0.2).all()


def test_late_first_score(device: str) -> None:
    """A long row whose first tiles are -inf throughout."""
    x = torch.full((1, 40000), -torch.inf, device=device)
    x[0, 39000:] = torch.randn(1000, device=device)
    torch.testing.assert_close(F.softmax(x, -1), torch.softmax(x, -1))


@pytest.mark.parametrize("width", [50, 40000])
def test_shift_does_not_cost_accuracy(width: int, device: str) -> None:
    x = 3 * torch.randn(3, width, device=device) + 1000.0
    check("log_softmax", torch.float32, input=x.requires_grad_(), dim=-1)


def test_dtype_is_cast_to_before_computing(device: str) -> None:
    x = torch.randn(3, 40, device=device, dtype=torch.bfloat16)
    y = F.softmax(x, -1, dtype=torch.float32)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, torch.softmax(x, -1, dtype=torch.float32))
    integers = torch.arange(5, device=device)
    torch.testing.assert_close(
        F.softmax(integers, 0, dtype=torch.float32), torch.softmax(integers, 0, dtype=torch.float32)
    )


def test_dim_none_warns_and_chooses_as_torch(device: str) -> None:
    x = torch.randn(3, 4, 5, device=device)
    with pytest.warns(UserWarning, match="Implicit dimension choice for softmax"):
        y = F.softmax(x)
    torch.testing.assert_close(y, torch.softmax(x, 0))
