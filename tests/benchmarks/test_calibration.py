"""The prediction's factors are those that the measurements give, and so are its errors."""

from __future__ import annotations

import dataclasses

import pytest

pytest.importorskip("triton")

from fusedformer.tools.tune import search
from fusedformer_kernels.compiler.prediction import Factors, Worth
from model import TABLES, calibrate


def test_a_refit_gives_the_factors_and_the_error_of_what_it_did_not_see() -> None:
    data = calibrate.Data()
    held = data.mask(lambda m: m.held_out)
    assert len(data.us) / 15 < int(held.sum()) < len(data.us) / 7
    # Sizes of one candidate are kept out together.
    candidates = {(m.workload, m.config) for m in data.measurements if m.held_out}
    assert all(m.held_out for m in data.measurements if (m.workload, m.config) in candidates)
    found = calibrate.fit(data, ~held)
    for name, value in dataclasses.asdict(Factors()).items():
        assert getattr(found, name) == pytest.approx(value, rel=0.02), name
    assert len(dataclasses.fields(Factors)) <= 12
    worth = Worth()
    assert worth.held_out == int(held.sum())
    median = calibrate.median_error(data.predicted(Factors()), data, held)
    assert median == pytest.approx(worth.median_error, abs=0.001) and median < 0.2


def test_a_workload_that_no_factor_was_fitted_to_is_ranked() -> None:
    data = calibrate.Data()
    name = "attention_backward half 128 plain full"
    factors = calibrate.fit(data, data.mask(lambda m: m.workload != name and not m.held_out))
    for size, rank in calibrate.ranks(data.predicted(factors), data, name).items():
        assert rank > 0.95, size


def test_the_table_and_the_dry_run_say_what_the_code_does() -> None:
    written, worth = (TABLES / "calibration.md").read_text(), Worth()
    for name, value in dataclasses.asdict(Factors()).items():
        assert f"| {name} | {value:g} |" in written
    assert f"of the {worth.held_out} kept out of it: {worth.median_error:.1%}" in written
    assert f"median {worth.ranks_median:.2f}, least {worth.ranks_least:.2f}" in written
    said = search.worth()
    assert f"{worth.median_error:.0%} of {worth.held_out} times" in said
    assert f"{worth.ranks_median:.2f}, at least {worth.ranks_least:.2f}" in said


def test_ranks_agree_or_are_reversed() -> None:
    assert calibrate.rank_correlation([1.0, 2.0, 9.0], [3.0, 5.0, 7.0]) == pytest.approx(1)
    assert calibrate.rank_correlation([1.0, 2.0, 9.0], [7.0, 5.0, 3.0]) == pytest.approx(-1)
