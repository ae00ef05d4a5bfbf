"""Compile a model's kernels before the first request."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fusedformer._internal.outputs import first_tensor

Shape = tuple[int, ...]


def warmup(model: nn.Module, shapes: Iterable[Any], *, backward: bool = False) -> list[float]:
    """Run ``model`` once on made-up inputs of each shape, so that its kernels are compiled.

    Triton compiles a kernel when it is first called, a second or so each, for the dtype and the
    kinds of arguments it is called with; later calls of any batch or length find it compiled, and
    so does the next process, on disk. Parameters, gradients, buffers, mode and the state of the
    random generators are as before.

    Args:
        model: on the device and in the dtype in which it will run.
        shapes: for each run the inputs: a shape for a model of one floating-point argument, or a
            mapping of argument names to shapes or tensors. Names that end in ``ids`` get int64
            zeros; names with ``mask`` a boolean mask of which all rows but the first are padded
            from the middle on, True = masked if they say ``padding``, else True = real; others
            normal random numbers in the model's dtype.
        backward: also the backward, in the mode in which the model is (dropout, in training).

    Returns:
        Seconds that each run took; the first tells what a first request would have.

    Raises:
        TypeError: ``model`` is not a module; an input is neither shape nor tensor.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"warmup(): expected 'model' to be a Module, but got {type(model).__name__}"
        )
    parameters = [p for p in model.parameters() if p.requires_grad]
    some = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    seconds = []
    devices = [some.device] if some.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        for shape in shapes:
            given = shape if isinstance(shape, Mapping) else {"": shape}
            made = {name: _made(name, value, some) for name, value in given.items()}
            start = time.perf_counter()
            with torch.set_grad_enabled(backward):
                result = model(made[""]) if "" in made else model(**made)
                if backward:
                    _backward(result, parameters)
            if some.device.type == "cuda":
                torch.cuda.synchronize(some.device)
            seconds.append(time.perf_counter() - start)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
    return seconds


def _made(name: str, value: Any, like: Tensor) -> Any:
    if isinstance(value, (Tensor, bool)):
        return value
    if not isinstance(value, (tuple, list)) or not all(isinstance(n, int) for n in value):
        raise TypeError(
            f"warmup(): expected the input {name!r} to be a shape or a Tensor, "
            f"but got {type(value).__name__}"
        )
    if name.endswith("ids"):
        return torch.zeros(value, dtype=torch.int64, device=like.device)
    if "mask" in name:
        keep = torch.ones(value, dtype=torch.bool, device=like.device)
        keep[1:, value[-1] // 2 + 1 :] = False  # some padding, so that packing is compiled too
        return ~keep if "padding" in name else keep
    return torch.randn(value, dtype=like.dtype, device=like.device)


def _backward(result: Any, parameters: list[nn.Parameter]) -> None:
    output = first_tensor(result)
    if output is not None and output.requires_grad and parameters:
        torch.autograd.grad(output, parameters, torch.randn_like(output), allow_unused=True)
