"""Run the grid of all ops, and keep the errors as records."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from fusedformer._internal import backend as backends
from fusedformer.parity.cases import Case, all_cases
from fusedformer.parity.criterion import parity

Record = dict[str, Any]


def run_case(case: Case, dtype: torch.dtype, device: torch.device) -> list[Record]:
    """Return a record for each output and each gradient of the case."""
    made = case.make(torch.Generator().manual_seed(0))
    inputs = {
        name: tensor.to(device).requires_grad_(tensor.is_floating_point())
        for name, tensor in made.items()
    }
    functions = (case.op.candidate, case.op.stock, case.op.truth)
    ours, stock, truth = (partial(function, **case.settings) for function in functions)
    # Not the seed of the inputs: a gradient equal to the input vanishes in a norm.
    found = parity(ours, stock, truth, inputs, dtype=dtype, seed=1)
    return [{"op": case.op.name, "case": case.name, "tensor": c.name, **c.as_dict()} for c in found]


def run_all(
    dtypes: Sequence[torch.dtype],
    device: torch.device,
    backend: backends.Backend,
    *,
    quick: bool = False,
    advance: Callable[[Case, list[Record]], None] = lambda case, records: None,
) -> dict[str, Any]:
    """Run every case in every dtype; return the records, and where and how they were made.

    Args:
        dtypes: each case is run in each.
        device: where the tensors are.
        backend: of the candidate, forced.
        quick: one case of each op.
        advance: called after each case and dtype, with its records.
    """
    start = time.perf_counter()
    records: list[Record] = []
    with backends.backend(backend):
        for case, dtype in _grid(dtypes, quick):
            found = run_case(case, dtype, device)
            records += found
            advance(case, found)
    return {
        "schema": 1,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "backend": backend,
        "interpreter": backend == "triton" and device.type == "cpu",
        "torch": torch.__version__,
        "seconds": time.perf_counter() - start,
        "passed": all(record["passed"] for record in records),
        "records": records,
    }


def _grid(dtypes: Sequence[torch.dtype], quick: bool) -> Iterator[tuple[Case, torch.dtype]]:
    for case in all_cases():
        if case.quick or not quick:
            yield from ((case, dtype) for dtype in dtypes)


def worst_of(records: Iterable[Record]) -> list[dict[str, Any]]:
    """Summarize each op and dtype: number of tensors, how many pass, and the worst.

    The worst is the record that used up most of its limit (see :func:`share_of_limit`).
    """
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        groups.setdefault((record["op"], record["dtype"]), []).append(record)
    return [
        {
            "op": op,
            "dtype": dtype,
            "tensors": len(group),
            "passed": sum(record["passed"] for record in group),
            "worst": max(group, key=share_of_limit),
        }
        for (op, dtype), group in groups.items()
    ]


def share_of_limit(record: Record) -> float:
    """Return the error as a share of its limit; above 1 the record fails."""
    if not record["passed"]:
        return float("inf")
    shares = [
        record[error] / record[limit] if record[limit] else 0.0
        for error, limit in (("error", "limit"), ("rms_error", "rms_limit"))
    ]
    return float(max(shares))
