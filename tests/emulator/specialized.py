"""Attention by specialized warps beside the other kernel, both emulated, for the tests."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import torch
from tests.emulator.machine import Compiled, Machine
from torch import Tensor

Results = tuple[Tensor, Tensor | None, Tensor]


def cases() -> dict[str, tuple[list[Tensor], dict[str, Any], dict[str, int]]]:
    """Name calls: query, key and value, terms, and fields of the config."""
    torch.manual_seed(0)

    def heads(dim: int, dtype: torch.dtype, batch: int, length: int, *counts: int) -> list[Tensor]:
        # Views of a projection, as attention reads them in place.
        packed = torch.randn(batch, length, sum(counts), dim).to(dtype)
        return [part.transpose(1, 2) for part in packed.split(counts, 2)]

    lengths = torch.tensor([77, 0, 200])
    starts = torch.tensor([0, 130, 130, 149, 290], dtype=torch.int32)
    padded = heads(128, torch.bfloat16, 3, 200, 2, 1, 1)
    for tensor in padded[1:]:
        for sequence, length in zip(tensor, lengths.tolist(), strict=True):
            sequence[:, length:] = torch.nan  # which nobody may use
    keep = torch.rand(3, 200) < 0.7
    at_the_end = heads(128, torch.float16, 1, 330, 1, 1, 1), {"right": 0, "align_end": True}
    packed_terms = {"starts_q": starts, "starts_k": starts, "max_queries": 141, "max_keys": 141}
    return {
        "lengths, key mask, groups, sinks": (
            padded, {"key_lengths": lengths, "key_mask": keep, "sinks": torch.randn(2)},
            {"block_n": 128},
        ),
        "packed, causal": (
            heads(64, torch.float16, 1, 290, 2, 2, 2), {"right": 0, **packed_terms},
            {"block_n": 64, "num_stages": 3},
        ),
        "causal at the end": (*at_the_end, {"block_n": 64}),
        "causal at the end, by TMA": (*at_the_end, {"block_n": 64, "tma": True}),
        # Of queries heads lie within rows, of keys there is one.
        "groups, by TMA": (
            heads(64, torch.bfloat16, 2, 150, 2, 1, 1), {}, {"block_n": 64, "tma": True},
        ),
    }  # fmt: skip


def compare(name: str, orders: tuple[int, ...]) -> tuple[list[bool], float, list[str]]:
    """Tell whether results are those of the other kernel, by order, their error, and findings."""
    (query, key, value), terms, _ = _call(name)
    wanted, findings = _run(name, 0, warps=8, specialized=False)
    equal, error = [], 0.0
    for order in orders:
        results, found = _run(name, order, warps=4, specialized=True)
        findings += found
        equal.append(all(map(_same, results, wanted)))
        error = max(error, _error(results[0], query, key, value, terms))
    return equal, error, findings


def findings_of(name: str, old: str, new: str) -> list[str]:
    """Run a case with a fault in its kernel: what ``old`` finds in the PTX becomes ``new``."""

    def edited(kernel: Compiled) -> Compiled:
        ptx, times = re.subn(old, new, kernel.ptx)
        assert times, old
        return replace(kernel, ptx=ptx)

    return _run(name, 0, warps=4, specialized=True, edited=edited)[1]


def _call(name: str) -> tuple[list[Tensor], Any, dict[str, Any]]:
    from fusedformer_kernels.attention.terms import AttentionTerms

    tensors, terms, fields = cases()[name]
    scale = tensors[0].shape[3] ** -0.5
    config = {"block_m": 128, "num_stages": 2, **fields}
    return tensors, AttentionTerms(scale=scale, **terms), config


def _run(
    name: str, order: int, warps: int, specialized: bool, edited: Any = None
) -> tuple[Results, list[str]]:
    from fusedformer_kernels.attention import configs
    from fusedformer_kernels.attention.forward import attention_forward
    from fusedformer_kernels.runtime import tuned

    (query, key, value), terms, fields = _call(name)
    kind = configs.AttentionKind(query.shape[3], "half", causal=terms.right is not None)
    chosen = {**fields, "num_warps": warps, "specialized": specialized}

    def checked(launch: Any) -> Any:
        assert launch.arguments.get("TMA", False) is (specialized and fields.get("tma", False))
        return launch

    machine = Machine(order=order)
    with (
        machine.taking_launches("sm_90", checked, edited),
        tuned.forced(("attention_forward", *kind.words), chosen),
    ):
        results: Results = attention_forward(query, key, value, terms, return_lse=True)
    return results, machine.findings()


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    assert one is not None and other is not None and not one.isnan().any()
    return torch.equal(one, other)


def _error(output: Tensor, query: Tensor, key: Tensor, value: Tensor, terms: Any) -> float:
    """Find the largest error, as a part of the criterion's limit: 1 is just within it."""
    from fusedformer import backend
    from fusedformer.ops.attention.aten import attention_aten

    def exact(dtype: torch.dtype) -> Tensor:
        q, k, v = (tensor.nan_to_num().to(dtype) for tensor in (query, key, value))
        more = {} if terms.sinks is None else {"sinks": terms.sinks.to(dtype)}
        with backend("torch"):
            return attention_aten(q, k, v, terms._replace(**more), return_lse=False)[0]

    truth, stock = exact(torch.float64), exact(query.dtype)
    largest = float(truth.abs().max())
    limit = 2 * (stock - truth).abs().max() + 2 * torch.finfo(query.dtype).eps * largest
    return float((output - truth).abs().max() / limit)
