"""What a process that compiles says of our kernels' forms; run by test_forms.py."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget

from fusedformer_kernels.attention.forward import attention_forward
from fusedformer_kernels.attention.terms import AttentionTerms
from fusedformer_kernels.compiler import ahead_of_time, compile_cases
from fusedformer_kernels.rows.norm import norm_forward
from fusedformer_kernels.runtime import primitives
from fusedformer_kernels.runtime.launch import Launch, recorded_launches
from fusedformer_kernels.runtime.targets import TARGETS, LaunchConfig, assume_target

TARGET = TARGETS["sm_90"]


def forms(call: Callable[..., None], *calls: tuple[int, ...]) -> int:
    """How many differ of what these calls compile."""
    found = set()
    for sizes in calls:
        with assume_target(TARGET), recorded_launches(run=False) as launches:
            call(*sizes)
        found.add(tuple(ahead_of_time.ast_source(each).hash() for each in launches))
    return len(found)


def attend(queries: int, keys: int, heads: int) -> None:
    # Rows of a longer tensor, so that no stride depends on the lengths.
    whole = torch.empty(4, 64, 8, 64, device="meta", dtype=torch.bfloat16)
    q, k = whole[:, :queries, :heads].transpose(1, 2), whole[:, :keys, :heads].transpose(1, 2)
    attention_forward(q, k, k, AttentionTerms(scale=0.125, right=0))


def normalize(rows: int) -> None:
    x, parameter = (torch.empty(*s, 768, device="meta") for s in ((rows,), ()))
    norm_forward(x, None, None, parameter, parameter, None, 0.0, 1e-5, "layer", 1, True, True)


@triton.jit
def _subtract(a_ptr, b_ptr, c_ptr, FUSED: tl.constexpr):
    at = tl.arange(0, 128)
    a, b, c = tl.load(a_ptr + at), tl.load(b_ptr + at), tl.load(c_ptr + at)
    if FUSED:
        c = primitives.fma(a, b, primitives.negative(c))
    else:
        c = a * b - c
    tl.store(c_ptr + at, c)


def multiply_adds(fused: bool) -> int:
    """How many the machine code of ``a * b - c`` has."""
    x = torch.empty(128, device="meta")
    arguments = dict(a_ptr=x, b_ptr=x, c_ptr=x, FUSED=fused)
    launch = Launch(_subtract, (1,), LaunchConfig(4, 2), arguments)
    compiled = triton.compile(
        ahead_of_time.ast_source(launch), options=launch.config.options(),
        target=GPUTarget(TARGET.backend, TARGET.arch, TARGET.warp_size),
    )  # fmt: skip
    return len(re.findall(r"\bfma\.rn", compiled.asm["ptx"]))


def main() -> None:
    unfused = []
    for case in compile_cases.compile_cases():
        with assume_target(TARGET), recorded_launches(run=False) as launches:
            case.call()
        unfused += [each.config.options()["enable_fp_fusion"] for each in launches]
    print(
        json.dumps(
            {
                "lengths": forms(attend, *((n, n, heads) for n in (1, 2, 7) for heads in (1, 3))),
                "sixteens": forms(attend, *((n, n, 2) for n in (16, 32, 64))),
                "rows": forms(normalize, (1,), (5,), (16,)),
                "fusion": sorted(set(unfused)),
                "multiply-adds": [multiply_adds(False), multiply_adds(True)],
            }
        )
    )


if __name__ == "__main__":
    main()
