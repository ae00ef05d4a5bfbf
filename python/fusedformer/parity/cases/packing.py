"""List cases of packing and unpacking."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Generator, Tensor

from fusedformer import functional, reference
from fusedformer.parity.cases.case import Case, Op


def packing_cases() -> Iterator[Case]:
    def packed(input: Tensor, keep: Tensor) -> Tensor:
        return functional.pack(input, functional.Packing.of(keep))

    def unpacked(input: Tensor, keep: Tensor) -> Tensor:
        return functional.unpack(input, functional.Packing.of(keep))

    def unpadded(generator: Generator) -> dict[str, Tensor]:
        return {"input": torch.randn(3, 7, 20, generator=generator), "keep": keep}

    def rows(generator: Generator) -> dict[str, Tensor]:
        return {"input": torch.randn(int(keep.sum()), 20, generator=generator), "keep": keep}

    keep = torch.arange(21).reshape(3, 7) % 3 != 1
    pack = Op("pack", packed, reference.pack, reference.pack)
    unpack = Op("unpack", unpacked, reference.unpack, reference.unpack)
    yield Case(pack, "holes", unpadded, quick=True)
    yield Case(unpack, "holes", rows, quick=True)
