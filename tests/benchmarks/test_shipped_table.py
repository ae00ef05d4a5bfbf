"""The table of tuned configs that is shipped for sm_90: what it says, and whom it reaches."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from fusedformer.tools.compile_report import tuned_entries
from fusedformer_kernels.attention import configs as attention
from fusedformer_kernels.attention.backward import attention_backward
from fusedformer_kernels.attention.forward import attention_forward
from fusedformer_kernels.attention.terms import OF_HEADS_ALONE, AttentionTerms
from fusedformer_kernels.rows import configs as rows
from fusedformer_kernels.runtime import targets, tuned
from fusedformer_kernels.runtime.launch import Launch, recorded_launches
from fusedformer_kernels.runtime.targets import TARGETS, assume_target
from model import demands, tuned_table

HALF = torch.bfloat16
SM_90 = TARGETS["sm_90"]


@pytest.fixture(autouse=True)
def shipped(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """The entries of the shipped table, which is read."""
    monkeypatch.delenv("FUSEDFORMER_TUNED", raising=False)
    tuned.clear_caches()
    yield json.loads(tuned_table.SHIPPED.read_text())["entries"]
    tuned.clear_caches()


def _attention(dim: int, value_dim: int = 0, length: int = 256, **terms: Any) -> list[Launch]:
    """What attention with these head dims launches, forward and backward."""
    q, k = (torch.empty(2, 4, length, dim, dtype=HALF, device="meta") for _ in range(2))
    v = torch.empty(2, 4, length, value_dim or dim, dtype=HALF, device="meta")
    given = AttentionTerms(scale=0.125, **terms)
    with assume_target(SM_90), recorded_launches(run=False) as launches:
        output, _, statistics = attention_forward(q, k, v, given)
        attention_backward(output, None, q, k, v, output, statistics, given, OF_HEADS_ALONE)
    return [each for each in launches if "delta" not in each.name]


def test_the_file_is_what_the_measurements_give() -> None:
    assert tuned_table.SHIPPED.read_text() == tuned_table.text()


def test_each_entry_was_measured_and_beats_the_default(shipped: dict[str, Any]) -> None:
    measured = {w["workload"]: w for w in json.loads(demands.TILES.read_text())}
    assert {"attention_forward half 128 plain full", "attention_backward half 64 plain full",
            "attention_backward half 128 plain full", "attention_forward half 64 heavy full",
            "attention_backward half 64 heavy full",
            "activation_forward 512"} <= set(shipped)  # fmt: skip
    for key, entry in shipped.items():
        assert entry["device"] == "NVIDIA H200" and entry["triton"] == "3.6.0", key
        assert len(entry["commit"]) == 40 and entry["date"].startswith("2026-11-28"), key
        found = measured[entry["measured"]]
        (times,) = (times for times, config, _ in found["tried"] if config == entry["config"])
        gains = [found["default"][size] / us for size, us in times.items()]
        assert math.prod(gains) ** (1 / len(gains)) >= 1.03 and min(gains) >= 1, key


def test_predicted_configs_are_named_and_can_be_left_out(
    shipped: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each beats what was measured by 5% at least; without them that is used, not the default."""
    names = {key for key, entry in shipped.items() if "predicted" in entry}
    assert names == {f"attention_backward half 128 plain {mask}" for mask in ("full", "causal")}
    for name in names:
        predicted = shipped[name]["predicted"]
        assert predicted["config"] != shipped[name]["config"] and predicted["triton"]
        assert all(new <= 0.95 * old for old, new in predicted["predicted_us_of_both"].values())
    said = tuned_entries(["sm_90"]).splitlines()
    marked = {line for line in said if line.endswith("(predicted, not measured)")}
    assert len(marked) == 2 and all(any(name in line for line in marked) for name in names)

    def stages() -> list[int]:
        return [x.config.num_stages for x in _attention(128) if "backward" in x.name]

    assert stages() == [3, 3]
    monkeypatch.setenv("FUSEDFORMER_TUNED", "measured")
    tuned.clear_caches()
    assert stages() == [2, 2]
    assert "predicted" not in tuned_entries(["sm_90"])
    config = attention.attention_backward_config(attention.AttentionKind(128, "half"), SM_90)
    assert config.block_m == 32  # the default has 64


def test_launches_take_the_entries_on_sm_90_alone(
    shipped: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    backward = attention.AttentionKind(64, "half")
    fields = shipped["attention_backward half 64 plain full"]["config"]
    launched = [each.config for each in _attention(64) if "backward" in each.name]
    assert len(launched) == 2
    for config in launched:
        assert {name: getattr(config, name) for name in fields} == fields
    others = {
        name: attention.attention_backward_config(backward, TARGETS[name]) for name in TARGETS
    }
    mine = others.pop("sm_90")
    interpreted = attention.attention_backward_config(backward, targets.INTERPRETED)
    monkeypatch.setenv("FUSEDFORMER_TUNED", "off")
    tuned.clear_caches()
    assert attention.attention_backward_config(backward, SM_90) == interpreted != mine
    for name, config in others.items():
        assert attention.attention_backward_config(backward, TARGETS[name]) == config, name
    monkeypatch.setenv("FUSEDFORMER_TUNED", "no")
    tuned.clear_caches()
    with pytest.raises(ValueError, match="FUSEDFORMER_TUNED: expected 'on', 'measured' or"):
        attention.attention_backward_config(backward, SM_90)


def test_other_forms_keep_the_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values narrower or wider than keys, head dims over 128; backward, a mask of pairs."""
    masks = [torch.empty(1, 1, 256, 256, dtype=d, device="meta") for d in (HALF, torch.bool)]
    forms: list[dict[str, Any]] = [
        {"dim": 128, "value_dim": 32}, {"dim": 64, "value_dim": 128}, {"dim": 256},
    ]  # fmt: skip
    masked: list[dict[str, Any]] = [
        {"dim": dim, "mask": mask} for dim in (64, 128) for mask in masks
    ]

    def found() -> list[list[targets.LaunchConfig]]:
        tiles = [[each.config for each in _attention(**form)] for form in forms]
        backward = [[x for x in _attention(**form) if "backward" in x.name] for form in masked]
        return [*tiles, *([each.config for each in launches] for launches in backward)]

    tables, plain = found(), [each.config for each in _attention(128)]
    monkeypatch.setenv("FUSEDFORMER_TUNED", "off")
    tuned.clear_caches()
    assert found() == tables
    assert [each.config for each in _attention(128)] != plain


def test_length_and_batch_do_not_choose_the_tile() -> None:
    """So that a sequence has the same bits alone, padded and packed."""
    lengths = torch.empty(2, dtype=torch.int32, device="meta")
    starts = torch.empty(3, dtype=torch.int32, device="meta")
    packed: dict[str, Any] = {
        "starts_q": starts,
        "starts_k": starts,
        "max_queries": 200,
        "max_keys": 200,
    }
    for dim in (64, 128):
        tiles = [each.config for each in _attention(dim)]
        for length in (17, 512, 8192):
            assert [each.config for each in _attention(dim, length=length)] == tiles
        assert [each.config for each in _attention(dim, key_lengths=lengths)] == tiles
        q = torch.empty(1, 4, 400, dim, dtype=HALF, device="meta")
        with assume_target(SM_90), recorded_launches(run=False) as launches:
            attention_forward(q, q, q, AttentionTerms(scale=0.125, **packed))
        assert [x.config for x in launches if x.name == "_attention_forward"] == tiles[:1]


def test_the_compile_report_names_the_entries_in_use(shipped: dict[str, Any]) -> None:
    said = tuned_entries(["sm_80", "sm_90"]).splitlines()
    assert len(said) == len(shipped)
    assert any(
        line == "sm_90: activation_forward 512 from sm_90.json: block_m=8 num_warps=4"
        for line in said
    )


def test_a_users_own_table_comes_before_the_shipped_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import triton

    own = tmp_path / "own.json"
    entries = {"activation_forward 512": {"config": {"block_m": 2, "num_warps": 2}}}
    own.write_text(json.dumps({"schema": 1, "triton": triton.__version__, "entries": entries}))
    monkeypatch.setenv("FUSEDFORMER_TUNED_TABLE", str(own))
    tuned.clear_caches()
    here = targets.Target("cuda", 90, 32, 132, 227 * 1024, "NVIDIA Test")
    assert rows.elementwise_tile("activation_forward", 3072, here).block_m == 2
    kind = attention.AttentionKind(128, "half", True)
    assert attention.attention_forward_config(kind, here, 512, 512).num_stages == 3  # shipped
    assert rows.elementwise_tile("activation_forward", 3072, SM_90).block_m == 8
