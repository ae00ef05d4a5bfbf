"""Packed attention in C++ on the CPU: values, bits, what it leaves to ATen, and how it is built."""

from __future__ import annotations

import itertools
import stat
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import profile

from fusedformer import backend, functional
from fusedformer.testing import compare_tensors
from fusedformer_kernels.cpu import build

# Ends of every kind: of a vector, of a pair, of six rows, of the queries of an item; and nothing.
LENGTHS = [80, 0, 67, 1, 2, 481, 16]
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def by_torch() -> Iterator[None]:
    if build.attention() is None:
        pytest.skip("no compiler")
    with backend("torch"), torch.no_grad():
        yield


def starts_of(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def attend(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], keys: list[int]) -> Tensor:
    starts = starts_of(lengths)
    starts_k = starts if keys is lengths else starts_of(keys)
    return functional.varlen_attention(q, k, v, starts, starts_k, max(lengths), max(keys))


def by_sequence(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], keys: list[int]) -> Tensor:
    """What torch computes, sequence by sequence."""
    parts = zip(q.split(lengths), k.split(keys), v.split(keys), strict=True)
    found = []
    for part in parts:
        one = [x.transpose(0, 1) for x in part]
        found.append(torch.nn.functional.scaled_dot_product_attention(*one).transpose(0, 1))
    return torch.cat(found)


def calls_aten(function: Any) -> bool:
    with profile() as seen:
        function()
    return any("scaled_dot_product" in event.name for event in seen.events())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("dim", "value_dim"), [(32, 32), (64, 80), (7, 5)])
def test_values_are_attentions(dtype: torch.dtype, dim: int, value_dim: int) -> None:
    """Scores up to a hundred, where rounded ones would show; also with other numbers of keys."""
    keys = [33, 0, 67, 300, 5, 19, 4]
    for those in (LENGTHS, keys):
        q = (torch.randn(sum(LENGTHS), 3, dim) * 8).to(dtype)
        k = (torch.randn(sum(those), 3, dim)).to(dtype)
        v = torch.randn(sum(those), 3, value_dim).to(dtype)
        truth = by_sequence(q.double(), k.double(), v.double(), LENGTHS, those)
        stock = by_sequence(q, k, v, LENGTHS, those)
        found = attend(q, k, v, LENGTHS, those)
        assert not calls_aten(lambda a=(q, k, v, LENGTHS, those): attend(*a))
        comparison = compare_tensors("output", found, stock, truth)
        assert comparison.passed, comparison


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_sequence_has_the_bits_that_it_has_alone(dtype: torch.dtype) -> None:
    """From slices of one projection too, and with other numbers of threads."""
    qkv = torch.randn(sum(LENGTHS), 3, 2, 32).to(dtype)
    q, k, v = qkv.unbind(1)
    together = attend(q, k, v, LENGTHS, LENGTHS)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        again = attend(q.clone(), k.clone(), v.clone(), LENGTHS, LENGTHS)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(together, again)
    for part, own in zip(qkv.split(LENGTHS), together.split(LENGTHS), strict=True):
        if len(part):
            q, k, v = part.unbind(1)
            assert torch.equal(attend(q, k, v, [len(part)], [len(part)]), own)


def test_threads_are_those_of_torch() -> None:
    """Whatever other packages have loaded theirs."""
    pytest.importorskip("sklearn.cluster", reason="scikit-learn brings an OpenMP of its own")
    found = build.openmp_of_torch()
    assert len(found) <= 1
    assert all("scikit_learn" not in file for file in found)


def test_nan_and_infinity_stay_with_their_queries_and_sequences() -> None:
    q, k, v = torch.randn(3, 40, 2, 16)
    clean = attend(q, k, v, [30, 10], [30, 10])
    q[3, 0, 0], k[35, 1, 2], v[33, 0, 1] = torch.nan, torch.inf, torch.nan
    found = attend(q, k, v, [30, 10], [30, 10])
    wanted = by_sequence(q, k, v, [30, 10], [30, 10])
    assert torch.equal(found.isnan(), wanted.isnan())
    assert torch.equal(found[:30, 1], clean[:30, 1])


@pytest.mark.parametrize(
    "settings",
    [{"is_causal": True}, {"window": (3, 3)}, {"scale": -1.0}, {"softcap": 2.0}],
    ids=str,
)
def test_what_has_more_terms_is_left_to_aten(settings: dict[str, Any]) -> None:
    q, k, v = torch.randn(3, 20, 2, 16)
    starts = starts_of([20])
    wide = [x.double() for x in (q, k, v)]
    call: Any = functional.varlen_attention
    with profile() as seen:
        found = call(q, k, v, starts, starts, 20, 20, **settings)
    assert "aten::bmm" in {event.name for event in seen.events()} or any(
        "scaled_dot_product" in event.name for event in seen.events()
    )
    truth = call(*wide, starts, starts, 20, 20, **settings)
    torch.testing.assert_close(found, truth.float())


def test_with_gradients_on_attention_is_atens() -> None:
    """Of tensors that require none too: frozen layers have the bits of trained ones."""
    q, k, v = torch.randn(3, 20, 2, 16)
    found = attend(q, k, v, [20], [20])
    with torch.enable_grad():
        assert calls_aten(lambda: attend(q, k, v, [20], [20]))
        trained = attend(q.requires_grad_(), k, v, [20], [20])
    assert trained.requires_grad
    torch.testing.assert_close(found, trained.detach())


def test_what_does_not_compile_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And whoever wants none gets none, without a word."""
    compiler = tmp_path / "bad"
    compiler.write_text("#!/bin/sh\necho no such thing >&2\nexit 1\n")
    compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", f"{compiler} -O0")
    monkeypatch.setenv("FUSEDFORMER_CACHE_DIR", str(tmp_path))
    with pytest.warns(RuntimeWarning, match=r"attention\.cpp[^$]*no such thing"):
        assert build.attention.__wrapped__() is None
    assert not list(tmp_path.glob("cpu/*"))
    monkeypatch.setenv("CXX", "nothing-of-that-name -O0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert build.attention.__wrapped__() is None
    monkeypatch.setenv("FUSEDFORMER_CPU_KERNELS", "no")
    with pytest.raises(ValueError, match="expected 'on' or 'off', but got 'no'"):
        build.attention.__wrapped__()
