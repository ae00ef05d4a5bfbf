"""Choose the backend: the Triton kernels, or the fastest composition of ATen calls."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

Backend = Literal["triton", "torch"]

# A plain global, like torch's switches: torch.compile reads it and guards on its value.
_forced: Backend | None = None

# Triton has no wheel for macOS or Windows on Arm.
TRITON_IS_INSTALLED = importlib.util.find_spec("triton") is not None
# Whether kernels run on CPU tensors; read once, as triton does.
INTERPRETER_IS_ON = os.environ.get("TRITON_INTERPRET", "0") == "1"


@contextlib.contextmanager
def backend(name: Backend) -> Iterator[None]:
    """Force one backend inside a ``with`` block, for all threads of the process.

    Args:
        name: ``"triton"`` for the fused kernels (CUDA and ROCm tensors; CPU tensors only when
            ``TRITON_INTERPRET=1`` was set before the process started), ``"torch"`` for the
            composition of ATen calls (any device and dtype, double backward included).

    Raises:
        ValueError: ``name`` is neither.
        RuntimeError: ``"triton"`` is asked for where triton is not installed.
    """
    if name not in ("triton", "torch"):
        raise ValueError(f"backend(): name must be 'triton' or 'torch', but got {name!r}")
    if name == "triton" and not TRITON_IS_INSTALLED:
        raise RuntimeError("backend('triton'): triton is not installed; use backend('torch')")
    global _forced
    previous, _forced = _forced, name
    try:
        yield
    finally:
        _forced = previous


def chosen_backend(tensor: Tensor) -> Backend:
    """Choose the backend of an op on ``tensor``, by its device and :func:`backend`."""
    forced = _forced
    kind = tensor.device.type
    kernels_run_here = kind == "cuda" or (kind in ("cpu", "meta") and INTERPRETER_IS_ON)
    if forced == "torch":
        return "torch"
    if forced == "triton" and not kernels_run_here:
        raise RuntimeError(
            f"backend('triton'): the kernels run on CUDA and ROCm tensors, but got a tensor on "
            f"{tensor.device}; on CPU tensors they run only when TRITON_INTERPRET=1 was set "
            f"before the process started"
        )
    if kernels_run_here and TRITON_IS_INSTALLED:
        if torch._C._are_functorch_transforms_active():
            _check_transforms()
        return "triton"
    return "torch"


def kernels_run_on(tensor: Tensor) -> bool:
    """Whether :func:`chosen_backend` is the kernels, where nothing of torch.func is active."""
    here = tensor.is_cuda or (INTERPRETER_IS_ON and tensor.is_cpu)
    return here and TRITON_IS_INSTALLED and _forced != "torch"


def _check_transforms() -> None:
    """Raise inside a torch.func transform that differentiates; torch.vmap is allowed."""
    names = {interpreter.key().name for interpreter in torch._C._functorch.get_interpreter_stack()}
    if names & {"Grad", "Jvp"}:
        raise RuntimeError(
            "fusedformer: the triton backend's ops have gradients for torch.autograd, not for "
            "torch.func.grad, vjp or jvp; run the function under fusedformer.backend('torch')"
        )
