"""Call the compiled dropout, which draws the numbers of torch's generator."""

from __future__ import annotations

import ctypes
import functools
import threading

import torch
from torch import Tensor

from fusedformer_kernels.cpu import build

_one_at_a_time = threading.Lock()  # from reading the generator's state to writing it


def draw(kept: Tensor, least: int, generator: torch.Generator | None = None) -> None:
    """Set each of contiguous uint8 ``kept`` to whether 16 bits, with a sign, are ``least``."""
    library, generator = build.loaded(), generator or torch.default_generator
    with _one_at_a_time:
        state = generator.get_state()
        library.fusedformer_draw(
            ctypes.c_void_p(state.data_ptr()),
            ctypes.c_void_p(kept.data_ptr()),
            ctypes.c_int64(kept.numel()),
            ctypes.c_int32(least),
        )
        generator.set_state(state)


def draw_by_aten(kept: Tensor, least: int, generator: torch.Generator | None = None) -> None:
    """The same by ATen, which draws one number after another."""
    count = kept.numel()
    bits = torch.empty((count + 3) // 4, dtype=torch.int64, device="cpu")
    bits.random_(-(2**63), None, generator=generator)
    torch.ge(bits.view(torch.int16)[:count].view(kept.shape), least, out=kept)


def draws_as_torch() -> bool:
    """Tell whether there is a library, and it knows the generator of this version of torch."""
    return build.library() is not None and _knows_generator()


@functools.cache
def _knows_generator() -> bool:
    found = []
    for way in draw, draw_by_aten:
        generator = torch.Generator().manual_seed(1)
        odd = torch.empty(3, dtype=torch.int32, device="cpu")
        odd.random_(generator=generator)  # what is drawn then begins at an odd word
        kept = torch.empty(2 * 4096 + 1, dtype=torch.uint8, device="cpu")
        way(kept, 7, generator)
        found.append((kept, generator.get_state()))
    return all(map(torch.equal, *found))


def drop(x: Tensor, residual: Tensor | None, kept: Tensor, factor: float, out: Tensor) -> None:
    """Write ``factor * x * kept``, added to ``residual``; all contiguous and of one dtype."""
    library = build.loaded()
    tensors = (x, residual, kept, out)
    library.fusedformer_drop(
        ctypes.c_int(x.dtype == torch.bfloat16),
        *(ctypes.c_void_p(None if t is None else t.data_ptr()) for t in tensors),
        ctypes.c_int64(x.numel()),
        ctypes.c_float(factor),
        ctypes.c_int(torch.get_num_threads()),
    )
