"""The one place where kernels are launched, so that launches can be counted or compiled instead."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from fusedformer_kernels.configs import LaunchConfig


@dataclass(frozen=True)
class Launch:
    """One kernel launch: what :func:`launch` was called with."""

    kernel: Any
    grid: tuple[int, ...]
    config: LaunchConfig
    arguments: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.kernel.__name__)


_replacement: Callable[[Launch], None] | None = None
_observer: Callable[[Launch], None] | None = None


def launch(
    kernel: Any, grid: tuple[int, ...], config: LaunchConfig, *args: Any, **constants: Any
) -> None:
    """Run ``kernel`` on ``grid``: ``args`` are its parameters in order, ``constants`` the rest."""
    if _replacement is not None or _observer is not None:
        names = dict(zip(kernel.arg_names, args, strict=False))
        record = Launch(kernel, grid, config, {**names, **constants})
        if _observer is not None:
            _observer(record)
        if _replacement is not None:
            _replacement(record)
            return
    device = next(a.device for a in args if isinstance(a, torch.Tensor))
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[grid](*args, **constants, **config.options())
    else:
        kernel[grid](*args, **constants, **config.options())


@contextlib.contextmanager
def recorded_launches(*, run: bool) -> Iterator[list[Launch]]:
    """Collect every launch made inside; with ``run=False`` nothing runs (meta tensors will do)."""
    global _observer, _replacement
    previous = _observer, _replacement
    launches: list[Launch] = []
    _observer = launches.append
    _replacement = None if run else (lambda launch: None)
    try:
        yield launches
    finally:
        _observer, _replacement = previous
