"""Softmax over the last axis: rows of 128 to 131,072 columns, log-softmax, and a masked one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from harness import counting
from harness.case import REFERENCE, Case, Inputs, Program, Provider, Sizes, Suite
from harness.providers import compiled, liger, present

COLUMNS = (128, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
HEADLINE = (128, 4096, 131072)


def cases(sizes: Sizes, dtype: torch.dtype) -> list[Case]:
    """List cases of about ``sizes.elements`` elements, whatever the length of a row."""
    found = [
        _case(sizes.elements // columns, columns, dtype, headline=columns in HEADLINE)
        for columns in COLUMNS
        if columns <= sizes.elements
    ]
    columns = min(32768, sizes.elements // 4)
    found.append(_case(sizes.elements // columns, columns, dtype, log=True))
    columns = min(1024, sizes.elements // 64)
    found.append(_case(sizes.elements // columns, columns, dtype, masked=True))
    return found


def _case(
    rows: int,
    columns: int,
    dtype: torch.dtype,
    *,
    headline: bool = False,
    log: bool = False,
    masked: bool = False,
) -> Case:
    sequences = max(rows // columns, 1)

    def make(device: torch.device) -> Inputs:
        shape = (sequences, rows // sequences, columns) if masked else (rows, columns)
        inputs = {"input": torch.randn(shape, device=device, dtype=dtype).requires_grad_()}
        if masked:  # padding by sequence: the last keys of each are hidden
            lengths = torch.linspace(columns // 4, columns, sequences, device=device)
            inputs["mask"] = (torch.arange(columns, device=device) < lengths[:, None])[:, None]
        return inputs

    kind = "masked softmax" if masked else "log_softmax" if log else "softmax"
    return Case(
        "softmax",
        f"{kind} {rows}x{columns}",
        dtype,
        make,
        counting.softmax(rows, columns, dtype.itemsize),
        {"log": log, "masked": masked},
        headline,
    )


def fused(case: Case) -> Program:
    """Call the library's op, which takes the mask along."""
    from fusedformer import functional as F

    op = F.log_softmax if case.options["log"] else F.softmax
    return Program(lambda input, mask=None: op(input, -1, mask=mask))


def eager(case: Case) -> Program:
    """Call torch with the mask filled in beforehand."""
    op = torch.log_softmax if case.options["log"] else torch.softmax

    def call(input: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is not None:
            input = input.masked_fill(~mask, -torch.inf)
        return op(input, -1)

    return Program(call)


def truth(case: Case, device: torch.device) -> Program:
    """Compute the library's definition."""
    from fusedformer import reference

    op = reference.log_softmax if case.options["log"] else reference.softmax
    return Program(lambda input, mask=None: op(input, -1, mask=mask))


def providers(device: torch.device, compile: str) -> dict[str, Provider]:
    """List who computes it, those that are here."""
    found: dict[str, Any] = {
        "fusedformer": fused,
        REFERENCE: eager,
        "torch.compile": lambda case: compiled(eager(case)),
        "liger_kernel": liger("softmax"),
    }
    return present(found, device, compile)


SUITE = Suite("softmax", cases, providers, truth)


def test_softmax(benchmark: Any, contest: Any) -> None:
    """Time one provider of one case in one direction; see conftest.py."""
    contest(benchmark)
