"""What all module tests share: seeds, torch's slow paths, and parity of a module with stock."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import fusedformer
from fusedformer._internal.backend import Backend, chosen_backend
from fusedformer.testing import ParityError, assert_function_parity

Call = Callable[..., Tensor | tuple[Tensor, ...]]


@pytest.fixture(autouse=True)
def _stock_takes_its_plain_path() -> Iterator[None]:
    """Torch's inference path has defects of its own; the composition is what we compare with."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(before)


class Called(torch.nn.Module):
    """A module and the way to call it."""

    def __init__(self, module: torch.nn.Module, call: Call) -> None:
        super().__init__()
        self.module, self.call = module, call

    def forward(self, **inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        return self.call(self.module, **inputs)

    def as_function(self, backend: Backend) -> Callable[..., Tensor | tuple[Tensor, ...]]:
        """A function of the inputs and, by their names, of the parameters."""

        def function(**tensors: Tensor) -> Tensor | tuple[Tensor, ...]:
            parameters = {n: tensors.pop(n) for n, _ in self.named_parameters()}
            with fusedformer.backend(backend):
                found: Tensor = torch.func.functional_call(self, parameters, kwargs=tensors)
            return found

        return function


@pytest.fixture
def assert_module_parity(device: str) -> Callable[..., None]:
    """Ours, on each backend, against a stock module of the same parameters.

    The truth is stock in float64. ``call(module, **inputs)`` runs a module. Outputs are compared,
    and with ``gradients`` those of all parameters and floating inputs.
    """

    def check(
        ours: torch.nn.Module,
        stock: torch.nn.Module,
        call: Call,
        inputs: dict[str, Tensor],
        dtype: torch.dtype,
        *,
        gradients: bool = True,
    ) -> None:
        with torch.no_grad():  # zero biases and unit gains would hide that they are not applied
            for parameter in stock.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        stock, ours = stock.to(device, dtype), ours.to(device, dtype)
        ours.load_state_dict(stock.state_dict())
        modules = [Called(m, call) for m in (ours, stock, copy.deepcopy(stock).double())]
        tensors = {name: tensor.detach().to(device) for name, tensor in inputs.items()}
        tensors |= {f"module.{n}": p.detach() for n, p in stock.named_parameters()}
        for tensor in tensors.values():
            tensor.requires_grad_(gradients and tensor.is_floating_point())
        backends: set[Backend] = {"torch", chosen_backend(torch.empty(0, device=device))}
        for backend in sorted(backends):
            fused, torchs, truth = (module.as_function(backend) for module in modules)
            # Dozens of tensors of a few elements each, with errors that move together: now and
            # then stock is lucky in one of them. Luck ends with the draw, a fault does not.
            for seed in (1, 2, 3):
                try:
                    assert_function_parity(fused, torchs, truth, tensors, dtype=dtype, seed=seed)
                    break
                except ParityError:
                    if seed == 3:
                        raise

    return check
