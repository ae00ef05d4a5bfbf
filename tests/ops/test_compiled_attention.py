"""Packed attention in C++ on the CPU: values, gradients, bits, what is left to ATen, the build."""

from __future__ import annotations

import itertools
import stat
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import profile

from fusedformer import functional
from fusedformer.ops.attention.calls import self_attention
from fusedformer.ops.attention.terms import self_attention_terms
from fusedformer.testing import compare_tensors
from fusedformer_kernels.cpu import build

pytestmark = pytest.mark.usefixtures("by_compiled_torch")

# Ends of every kind: of a vector, of a pair, of six rows, of the queries of an item; and nothing.
LENGTHS = [80, 0, 67, 1, 2, 481, 16]
DTYPES = [torch.float32, torch.bfloat16]


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
    return any("scaled_dot_product" in event.name or "bmm" in event.name for event in seen.events())


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


def gradients(
    tensors: list[Tensor], lengths: list[int], keys: list[int], p: float, **how: Any
) -> tuple[Tensor, ...]:
    """Output, and what an output gradient gives those of the tensors that require one."""
    torch.manual_seed(3)
    q, k, v = tensors
    starts, starts_k = starts_of(lengths), starts_of(keys)
    with torch.enable_grad():
        output = functional.varlen_attention(
            q, k, v, starts, starts_k, max(lengths), max(keys), dropout_p=p
        )
        dy = torch.randn(output.shape, generator=torch.Generator().manual_seed(4))
        wanted = [t for t in tensors if t.requires_grad]
        return output, *torch.autograd.grad(output, wanted, dy.to(output.dtype), **how)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("dim", "value_dim", "p"), [(32, 32, 0.3), (64, 80, 0.0), (7, 5, 0.001)])
def test_gradients_are_attentions(
    dtype: torch.dtype, dim: int, value_dim: int, p: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dropout draws the numbers of ATen's batches: by it and in float64 the same are kept."""
    lengths, keys = [16, 0, 7, 1, 101, 50], [33, 0, 7, 0, 98, 50]
    sizes = (sum(lengths), dim, 8), (sum(keys), dim, 1), (sum(keys), value_dim, 1)
    tensors = [(torch.randn(n, 3, d) * s).to(dtype).requires_grad_() for n, d, s in sizes]
    wide = [t.detach().double().requires_grad_() for t in tensors]
    found = gradients(tensors, lengths, keys, p)
    assert not calls_aten(lambda: gradients(tensors, lengths, keys, p))
    monkeypatch.setattr(build, "library", lambda: None)
    stock, truth = (gradients(each, lengths, keys, p) for each in (tensors, wide))
    for name, *own in zip(("output", "q", "k", "v"), found, stock, truth, strict=True):
        comparison = compare_tensors(name, *own)
        assert comparison.passed, comparison
    for at in range(3):  # what is not wanted changes no bit of the others
        part = [t.detach().requires_grad_(i == at) for i, t in enumerate(tensors)]
        monkeypatch.undo()
        assert torch.equal(gradients(part, lengths, keys, p)[1], found[1 + at])


def test_gradients_have_the_same_bits_alone_in_a_projection_and_by_more_threads() -> None:
    lengths = [5, 90, 17]
    qkv = torch.randn(sum(lengths), 3, 2, 32)
    tensors = [t.requires_grad_() for t in qkv.clone().unbind(1)]
    together = gradients(tensors, lengths, lengths, 0.0)
    dropped = gradients(tensors, lengths, lengths, 0.2)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        again = gradients(tensors, lengths, lengths, 0.2)
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, dropped, again))
    starts = starts_of(lengths)
    terms = self_attention_terms(
        32, 0.2, attn_mask=None, key_mask=None, is_causal=False, cu_seqlens_q=starts,
        cu_seqlens_k=starts, max_seqlen_q=90, max_seqlen_k=90,
    )  # fmt: skip
    qkv.requires_grad_()
    torch.manual_seed(3)
    with torch.enable_grad():
        output = self_attention(qkv[None], terms)[0]
        dy = torch.randn(output.shape, generator=torch.Generator().manual_seed(4))
        (grad,) = torch.autograd.grad(output, qkv, dy)
    assert all(map(torch.equal, dropped, (output, *grad.unbind(1))))
    parts = [each.split(lengths) for each in (*tensors, *together)]
    dys = torch.randn(together[0].shape, generator=torch.Generator().manual_seed(4)).split(lengths)
    for q, k, v, *wanted, dy in zip(*parts, dys, strict=True):
        q, k, v = own = [t.detach().requires_grad_() for t in (q, k, v)]
        with torch.enable_grad():
            alone = attend(q, k, v, [len(q)], [len(q)])
            found = alone, *torch.autograd.grad(alone, own, dy)
        assert all(map(torch.equal, found, wanted))


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_gradients_of_gradients_and_batches_of_them(p: float) -> None:
    """By ATen, with what dropout kept; against float64, which is ATen's from the start."""
    lengths = [7, 0, 12]
    narrow = [torch.randn(19, 2, 5, requires_grad=True) for _ in range(3)]
    wide = [t.detach().double().requires_grad_() for t in narrow]
    probes = [torch.randn(19, 2, 5) for _ in range(3)]
    found = []
    for tensors in (narrow, wide):
        _, *first = gradients(tensors, lengths, lengths, p, create_graph=True)
        given = [probe.to(first[0].dtype) for probe in probes]
        found.append([*first, *torch.autograd.grad(first, tensors, given)])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want.float(), rtol=1e-4, atol=1e-5)
    with torch.enable_grad():
        q, k, v = narrow
        output = attend(q, k, v, lengths, lengths)
        dys = torch.randn(2, *output.shape)
        mapped = torch.autograd.grad(output, narrow, dys, is_grads_batched=True, retain_graph=True)
        for i, dy in enumerate(dys):
            single = torch.autograd.grad(output, narrow, dy, retain_graph=True)
            for got, want in zip(mapped, single, strict=True):
                torch.testing.assert_close(got[i], want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_frozen_layers_have_the_bits_of_trained_ones(dtype: torch.dtype) -> None:
    """And under autocast those of its dtype."""
    q, k, v = torch.randn(3, 20, 2, 16).to(dtype)
    found = attend(q, k, v, [20], [20])
    with torch.enable_grad():
        assert torch.equal(attend(q, k, v, [20], [20]), found)
        trained = attend(q.clone().requires_grad_(), k, v, [20], [20])
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            assert torch.equal(attend(q, k, v, [20], [20]), found)
            assert not calls_aten(lambda: attend(q, k, v, [20], [20]))
    assert trained.requires_grad and torch.equal(trained, found)


def test_what_does_not_compile_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And whoever wants none gets none, without a word."""
    compiler = tmp_path / "bad"
    compiler.write_text("#!/bin/sh\necho no such thing >&2\nexit 1\n")
    compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", f"{compiler} -O0")
    monkeypatch.setenv("FUSEDFORMER_CACHE_DIR", str(tmp_path))
    with pytest.warns(RuntimeWarning, match=r"attention\.cpp[^$]*no such thing"):
        assert build.library.__wrapped__() is None
    assert not list(tmp_path.glob("cpu/*"))
    monkeypatch.setenv("CXX", "nothing-of-that-name -O0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert build.library.__wrapped__() is None
    monkeypatch.setenv("CXX", 'g++ "')
    with pytest.raises(ValueError, match="CXX: expected a command, but got 'g"):
        build.library.__wrapped__()
    assert build._command(" ") == ["g++"]
    monkeypatch.setenv("FUSEDFORMER_CPU_KERNELS", "no")
    with pytest.raises(ValueError, match="expected 'on' or 'off', but got 'no'"):
        build.library.__wrapped__()
