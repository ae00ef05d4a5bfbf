"""Bad arguments: a clear error that names function and argument, before any kernel runs."""

import re
from typing import Any

import pytest
import torch
from tests.bad_arguments import TABLE, good, t
from torch import Tensor

from fusedformer import backend, functional
from fusedformer._internal.backend import TRITON_IS_INSTALLED, Backend
from fusedformer.errors import BadTypeError, BadValueError

# Arguments of the table are on the GPU where there is one.
pytestmark = pytest.mark.usefixtures("device")

OURS = {ValueError: BadValueError, TypeError: BadTypeError}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((t(2, 3),), TypeError, "'keep' to be boolean .* but got torch.float32"),
        ((t(3) > 0,), ValueError, r"'keep' to have shape \[batch, length\]"),
        ((t(2, 3) > 0, [3]), ValueError, "'lengths' to have 2 entries, .* but got 1"),
        (([True],), TypeError, "'keep' must be Tensor, not list"),
    ],
    ids=["dtype", "rank", "lengths", "list"],
)
def test_bad_packing(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        functional.Packing.of(*arguments)


@pytest.fixture(params=["torch", "triton"])
def chosen(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Backend:
    """Each backend, with nothing allowed to run: no kernel, and no seed drawn."""
    if request.param == "triton":
        if not TRITON_IS_INSTALLED:
            pytest.skip("triton is not installed")
        from fusedformer_kernels.runtime import launch

        def launched(record: launch.Launch) -> None:
            pytest.fail(f"{record.name} was launched")

        monkeypatch.setattr(launch, "_observer", launched)
    name: Backend = request.param
    return name


@pytest.mark.parametrize("function", functional.__all__)
def test_the_arguments_that_the_table_changes_are_right(function: str) -> None:
    """Otherwise every row would pass for the wrong reason."""
    outputs = getattr(functional, function)(**good(function))
    for output in outputs if isinstance(outputs, tuple) else (outputs,):
        assert torch.isfinite(output).all()


@pytest.mark.parametrize(("function", "changes", "error", "message"), TABLE)
def test_bad_input(
    function: str, changes: dict[str, Any], error: type[Exception], message: str, chosen: Backend
) -> None:
    before = torch.get_rng_state()
    with backend(chosen), pytest.raises(error) as caught:
        getattr(functional, function)(**{**good(function), **changes})
    text = str(caught.value)
    assert isinstance(caught.value, OURS.get(error, error))
    assert text.startswith(f"{function}(): ")
    assert re.search(message, text), text
    assert torch.equal(before, torch.get_rng_state())


ATTENTION = "scaled_dot_product_attention"


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"query": t(2, 4, 5, 0), "key": t(2, 4, 6, 0)}, "query"),
        ({"query": t(2, 4, 5, 257), "key": t(2, 4, 6, 257)}, "query"),
        ({"value": t(2, 4, 6, 0)}, "value"),
        ({"value": t(2, 4, 6, 257)}, "value"),
    ],
    ids=["E=0", "E=257", "Ev=0", "Ev=257"],
)
def test_head_dims_that_the_kernels_do_not_have(changes: dict[str, Tensor], name: str) -> None:
    arguments = {**good(ATTENTION), **changes}
    if TRITON_IS_INSTALLED:
        message = rf"{ATTENTION}\(\): .* head dims from 1 to 256.*'{name}'.*backend\('torch'\)"
        with backend("triton"), pytest.raises(ValueError, match=message):
            functional.scaled_dot_product_attention(**arguments)
    with backend("torch"):
        output = functional.scaled_dot_product_attention(**arguments)
    assert output.shape == (2, 4, 5, arguments["value"].shape[-1])


ANY_DTYPE = {"relative_position_bias", "pack", "unpack"}


@pytest.mark.parametrize("function", sorted({*functional.__all__} - ANY_DTYPE))
@pytest.mark.skipif(not TRITON_IS_INSTALLED, reason="triton is not installed")
def test_the_kernels_refuse_float64_that_the_torch_backend_takes(function: str) -> None:
    arguments = {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in good(function).items()
    }
    message = rf"{function}\(\): the triton backend supports float32.*float64.*backend\('torch'\)"
    with backend("triton"), pytest.raises(TypeError, match=message):
        getattr(functional, function)(**arguments)
    with backend("torch"):
        outputs = getattr(functional, function)(**arguments)
        first = outputs[0] if isinstance(outputs, tuple) else outputs
        assert first.dtype == torch.float64


@pytest.mark.parametrize("name", ["cuda", "", None])
def test_an_unknown_backend(name: Any) -> None:
    with pytest.raises(ValueError, match="'triton' or 'torch'"), backend(name):
        pytest.fail("entered")
