"""When attention is launched with specialized warps, and how it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from fusedformer.tools.tune.search import reason_against
from fusedformer.tools.tune.workloads import workloads
from fusedformer_kernels.attention import configs
from fusedformer_kernels.attention.forward import attention_forward
from fusedformer_kernels.attention.forward_specialized import BOX_LAYOUT
from fusedformer_kernels.attention.terms import AttentionTerms
from fusedformer_kernels.runtime import targets, tuned
from fusedformer_kernels.runtime.boxes import Boxes
from fusedformer_kernels.runtime.launch import Launch, recorded_launches

FIELDS = {"block_m": 128, "block_n": 128, "num_warps": 4, "num_stages": 2, "specialized": True}
SPECIALIZED = "_attention_forward_specialized"


def launched(
    query: torch.Tensor,
    fields: dict[str, Any] | None = None,
    target: targets.Target = targets.TARGETS["sm_90"],
    keys: torch.Tensor | None = None,
    **terms: Any,
) -> Launch:
    """The launch of attention when a table has these fields for its kind."""
    heavy, causal = "seed" in terms, "right" in terms
    kind = configs.AttentionKind(configs.padded_dim(query.shape[3]), "half", heavy, causal)
    key = query if keys is None else keys
    with (
        targets.assume_target(target),
        recorded_launches(run=False) as launches,
        tuned.forced(("attention_forward", *kind.words), fields or {}),
    ):
        attention_forward(query, key, key, AttentionTerms(scale=0.1, **terms))
    return next(launch for launch in launches if "attention" in launch.name)


def heads(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def test_only_a_table_asks_for_specialized_warps() -> None:
    causal_and_not: list[dict[str, Any]] = [{}, {"right": 0}]
    for dim in (64, 128):
        for terms in causal_and_not:
            x = heads(2, 4, 300, dim)
            assert launched(x, **terms).name == "_attention_forward"
            launch = launched(x, FIELDS, **terms)
            assert launch.name == SPECIALIZED and launch.grid == (24,)
            assert (launch.arguments["BLOCK_N"], launch.arguments["STAGES"]) == (128, 2)


def test_no_shipped_table_names_a_kernel_that_nobody_has_timed() -> None:
    tables = [tuned.read(path) for path in tuned.SHIPPED.glob("*.json")]
    assert tables
    configs = [dict(entry.fields) for table in tables for entry in table.values()]
    assert not any("specialized" in fields or "passes" in fields for fields in configs)


def test_rows_that_cannot_be_copied_take_the_default() -> None:
    kind = configs.AttentionKind(64, "half")
    default = configs.attention_forward_default(kind, targets.TARGETS["sm_90"])
    # Rows of 68 elements, every second element, and heads of 60.
    for x in (
        heads(2, 300, 4, 68).transpose(1, 2)[..., :64],
        heads(2, 4, 300, 128)[..., ::2],
        heads(2, 4, 300, 64)[..., :60],
    ):
        launch = launched(x, FIELDS)
        assert launch.name == "_attention_forward" and launch.config == default


def boxes(x: torch.Tensor, **terms: Any) -> Boxes | None:
    """What TMA is given of the keys where a table asks for it; None where cp.async copies."""
    launch = launched(x, {**FIELDS, "tma": True}, **terms)
    assert launch.name == SPECIALIZED
    assert launch.arguments["TMA"] is isinstance(launch.arguments["k_source"], Boxes)
    return launch.arguments["k_source"] if launch.arguments["TMA"] else None


def test_boxes_have_the_order_of_strides() -> None:
    whole = boxes(heads(2, 4, 300, 80), right=0)
    assert whole is not None and whole.layout == BOX_LAYOUT
    assert (whole.shape, whole.block_shape) == ((2, 4, 300, 80), (1, 1, 128, 128))
    assert whole.strides == (96000, 24000, 80, 1)
    within = boxes(heads(2, 300, 12, 64).transpose(1, 2)[:, 4:8])
    assert within is not None and within.shape == (2, 300, 4, 64)
    assert within.strides == (300 * 768, 768, 64, 1) and within.block_shape == (1, 128, 1, 64)
    # Of one sequence and one head the strides are anybody's.
    one = boxes(heads(1, 1, 300, 64).as_strided((1, 1, 300, 64), (8, 8, 64, 1)))
    assert one is not None and one.strides == (19200, 19200, 64, 1)


def test_tma_copies_only_what_ends_with_its_tensor() -> None:
    starts = torch.empty(3, dtype=torch.int32, device="meta")
    x = heads(1, 4, 300, 64)
    packed = {"starts_q": starts, "starts_k": starts, "max_queries": 200, "max_keys": 200}
    assert boxes(x) is not None
    assert boxes(x, **packed) is None
    assert boxes(heads(2, 4, 300, 64), key_lengths=starts[1:]) is None


def test_tma_copies_only_strides_that_descriptors_take() -> None:
    memory = heads(2 * 300 * 4 * 72)
    for strides in (
        (300 * 64, 0, 64, 1),  # one head for all
        (300 * 64, 64 * 64, 16, 1),  # rows that overlap
        (300 * 264, 64, 264, 1),  # that are no multiple of a head apart
        (64, 2 * 300 * 64, 2 * 64, 1),  # sequences within heads
    ):
        assert boxes(memory.as_strided((2, 4, 300, 64), strides)) is None, strides


def test_few_queries_are_split_as_ever() -> None:
    launch = launched(heads(2, 4, 3, 64), FIELDS, keys=heads(2, 4, 2000, 64))
    assert launch.name == "_attention_forward" and launch.grid[1] == 4


def test_what_the_kernel_is_not_for_is_refused() -> None:
    seed = heads(1, dtype=torch.int64)
    x = heads(2, 4, 300, 64)
    for target in (targets.TARGETS["sm_80"], targets.INTERPRETED):
        with pytest.raises(ValueError, match="specialized warps, which is for sm_90"):
            launched(x, FIELDS, target)
    with pytest.raises(ValueError, match="specialized warps, which is for sm_90"):
        launched(x, FIELDS, seed=seed, p=0.1)
    with pytest.raises(ValueError, match="specialized warps, which is for sm_90"):
        launched(heads(2, 4, 300, 256), FIELDS)
    with pytest.raises(ValueError, match="block_m=128 and num_warps=4, but got block_m=64"):
        launched(x, {**FIELDS, "block_m": 64})


def test_tuning_tries_it_on_sm_90_alone() -> None:
    tried = {
        workload.name: [fields for fields in workload.candidates if fields.get("specialized")]
        for workload in workloads()
    }
    assert {name for name, fields in tried.items() if fields} == {
        f"attention_forward half {dim} plain {form}"
        for dim in (64, 128)
        for form in ("full", "causal")
    }
    workload = next(w for w in workloads() if w.name == "attention_forward half 64 plain full")
    reason = reason_against(workload, tried[workload.name][0], targets.TARGETS["sm_80"])
    assert reason == "specialized warps are for sm_90"
