"""What the parity criterion finds between one of our models and transformers' own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fusedformer import backend
from fusedformer.testing import compare_tensors

NO_GRADIENT = ("key.bias", "k_proj.bias")  # rounding alone: their truth is 0


def perturbed(model: Any, by: float = 0.1) -> Any:
    """Biases and norms are constants when new: a mix-up would not show."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=by)
    return model


def run(
    model: Any, outputs: Callable[[Any, int], Tensor | list[Tensor]], seed: int, names: Any
) -> dict[str, Tensor]:
    """Outputs, and the gradients of all parameters by Hugging Face's names."""
    found = outputs(model, seed)
    found = [found] if isinstance(found, Tensor) else found
    generator = torch.Generator().manual_seed(seed)
    grads = [torch.randn(o.shape, generator=generator).to(o) for o in found]
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    of = torch.autograd.grad(found, list(parameters.values()), grads, allow_unused=True)
    given = {n: g for n, g in zip(parameters, of, strict=True) if g is not None}
    return {**{f"output {i}": o for i, o in enumerate(found)}, **names(given)}


def faults_of(
    ours: Any,
    outputs_of_ours: Callable[[Any, int], Any],
    stock: Any,
    outputs_of_stock: Callable[[Any, int], Any],
    name: Any = "torch",
) -> list[str]:
    """Outputs and gradients that are further from stock in float64 than the criterion allows.

    Outputs are those of a model on the inputs of a seed. Of dozens of tensors, stock is lucky in
    one now and then: luck ends with the draw of the inputs, a fault does not, so that only what
    fails for every draw is one.
    """
    faults: dict[str, str] | None = None
    double = copy.deepcopy(stock).double()
    for seed in (1, 2, 3):
        with backend(name):
            found = run(ours, outputs_of_ours, seed, ours.to_huggingface_layout)
        baseline = run(stock, outputs_of_stock, seed, dict)
        truth = run(double, outputs_of_stock, seed, dict)
        assert found.keys() == truth.keys(), found.keys() ^ truth.keys()
        names = [n for n in truth if not n.endswith(NO_GRADIENT)] if faults is None else faults
        compared = [compare_tensors(n, found[n], baseline[n], truth[n]) for n in names]
        faults = {one.name: one.fault for one in compared if not one.passed}
        if not faults:
            break
    assert faults is not None
    return list(faults.values())
