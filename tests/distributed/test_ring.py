"""Ring attention on 1, 2 and 4 ranks: what one process computes, forward and gradients."""

from __future__ import annotations

import os
import re
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.distributed.ranks import RankError, Ranks
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fusedformer import backend, functional, ops, reference
from fusedformer.distributed import (
    join_sequence,
    ring_attention,
    ring_varlen_attention,
    split_sequence,
)
from fusedformer.testing import compare_tensors

B, H, E, EV, L = 2, 2, 8, 16, 24
NAMES = ("output", "lse", "grad of query", "grad of key", "grad of value")
FIRST = ("query", "key", "value")


def made(queries: int = L, keys: int = L, *, key_heads: int = H) -> dict[str, Tensor]:
    return {
        "query": torch.randn(B, H, queries, E), "key": torch.randn(B, key_heads, keys, E),
        "value": torch.randn(B, key_heads, keys, EV), "dy": torch.randn(B, H, queries, EV),
        "dlse": torch.randn(B, H, queries),
    }  # fmt: skip


def results(
    attend: Callable[..., Any], inputs: dict[str, Tensor], settings: dict[str, Any]
) -> list[Tensor]:
    """Output, log-sum-exp and gradients."""
    leaves = [inputs[name].detach().requires_grad_() for name in FIRST]
    outputs = attend(*leaves, return_lse=True, **settings)
    grads = torch.autograd.grad(outputs, leaves, [inputs["dy"], inputs["dlse"].to(outputs[1])])
    return [t.detach() for t in (*outputs, *grads)]


def on_ranks(
    mesh: DeviceMesh, name: Any, inputs: dict[str, Tensor], settings: dict[str, Any]
) -> list[Tensor]:
    """The results joined, from what each rank computed of its part."""
    group, order = mesh.get_group(), {"load_balance": settings.get("load_balance", False)}
    own = {k: split_sequence(t, group, 2, **order) for k, t in inputs.items()}
    settings = dict(settings, group=group)
    if "key_mask" in settings:
        settings["key_mask"] = split_sequence(settings["key_mask"], group, 1, **order)
    torch.manual_seed(3)
    with backend(name):
        found = results(ring_attention, own, settings)
    return [join_sequence(t, group, 2, **order) for t in found]


def definition(query: Tensor, key: Tensor, value: Tensor, return_lse: bool, **settings: Any) -> Any:
    return reference.scaled_dot_product_attention(query, key, value, **settings)


def judge(found: list[Tensor], stock: list[Tensor], truth: list[Tensor]) -> None:
    """By the parity criterion."""
    faults = [compare_tensors(*each).fault for each in zip(NAMES, found, stock, truth, strict=True)]
    assert not any(faults), "\n".join(faults)


def check(
    ranks: Ranks, size: int, name: str, inputs: dict[str, Tensor], settings: dict[str, Any]
) -> None:
    """The ranks beside one process in the same dtype, both against the definition."""
    plain = {k: v for k, v in settings.items() if k != "load_balance"}
    with backend("torch"):
        stock = results(functional.scaled_dot_product_attention, inputs, plain)
    truth = results(definition, {k: t.double() for k, t in inputs.items()}, plain)
    judge(ranks.run(on_ranks, name, inputs, settings, size=size)[0], stock, truth)


MASK = torch.rand(B, L, generator=torch.Generator().manual_seed(1)) > 0.4
MASK[1, : L // 2] = False  # all that the first of two ranks holds
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "causal, balanced": {"is_causal": True, "load_balance": True},
    "window over three parts": {"window": (8, 3)},
    "window, causal, balanced": {"window": (7, -1), "is_causal": True, "load_balance": True},
    "key mask": {"key_mask": MASK},
    "key lengths, none in one, scale, cap, balanced": {
        "key_lengths": torch.tensor([17, 0]), "scale": -0.5, "softcap": 2.0, "is_causal": True,
        "load_balance": True,
    },
}  # fmt: skip


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("case", CASES)
def test_is_what_one_process_computes(ranks: Ranks, case: str, size: int) -> None:
    check(ranks, size, "torch", made(), CASES[case])


@pytest.mark.parametrize("case", ["window, causal, balanced", "key mask"])
def test_kernels(ranks: Ranks, case: str) -> None:
    check(ranks, 2, "triton", made(), CASES[case])


def test_fewer_keys_than_queries_fewer_heads_and_half_precision(ranks: Ranks) -> None:
    inputs = {k: t.bfloat16() for k, t in made(keys=16, key_heads=1).items()}
    check(ranks, 4, "torch", inputs, {"enable_gqa": True, "window": (9, -1)})


def autocast(mesh: DeviceMesh, inputs: dict[str, Tensor]) -> list[Tensor]:
    with torch.autocast("cpu", torch.bfloat16):
        return on_ranks(mesh, "torch", inputs, {"is_causal": True})


def test_autocast_casts_as_on_one_process(ranks: Ranks) -> None:
    inputs, settings = made(), {"is_causal": True}
    with backend("torch"), torch.autocast("cpu", torch.bfloat16):
        stock = results(functional.scaled_dot_product_attention, inputs, settings)
    truth = results(definition, {k: t.double() for k, t in inputs.items()}, settings)
    found = ranks.run(autocast, inputs, size=2)[0]
    assert found[0].dtype == torch.bfloat16
    judge(found, stock, truth)


def twice(mesh: DeviceMesh, inputs: dict[str, Tensor]) -> bool:
    first, second = (on_ranks(mesh, "torch", inputs, {"is_causal": True}) for _ in range(2))
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_same_bits_every_time(ranks: Ranks) -> None:
    assert all(ranks.run(twice, made()))


def pairs(mesh: DeviceMesh, load_balance: bool) -> int:
    """Pairs of query and key that this rank computes of 16 causal positions."""
    computed = []
    attend = ops.attention_part

    def counted(query: Tensor, key: Tensor, *others: Any) -> Any:
        computed.append(query.shape[2] * key.shape[2])
        return attend(query, key, *others)

    group, order = mesh.get_group(), {"load_balance": load_balance}
    q, k, v = (split_sequence(torch.randn(1, 1, 16, 4), group, 2, **order) for _ in range(3))
    with pytest.MonkeyPatch.context() as patch, backend("torch"):
        patch.setattr(ops, "attention_part", counted)
        ring_attention(q, k, v, group=group, is_causal=True, load_balance=load_balance)
    return sum(computed)


def test_causal_parts_are_skipped_and_balanced(ranks: Ranks) -> None:
    assert ranks.run(pairs, False) == [16, 32, 48, 64]
    assert ranks.run(pairs, True) == [36, 36, 36, 36]


# Packed rows.

STARTS = torch.tensor([0, 5, 5, 7, 20, 24])  # on one rank, on none, over two and over three
SAME = torch.bucketize(torch.arange(L), STARTS[1:], right=True)
SAME = SAME == SAME[:, None]


def packed_on_ranks(
    mesh: DeviceMesh, name: Any, inputs: dict[str, Tensor], settings: dict[str, Any]
) -> list[Tensor]:
    group, order = mesh.get_group(), {"load_balance": settings.get("load_balance", False)}
    own = {k: split_sequence(t[0].transpose(0, 1), group, 0, **order) for k, t in inputs.items()}
    own["dlse"] = own["dlse"].t()

    def attend(query: Tensor, key: Tensor, value: Tensor, **settings: Any) -> Any:
        return ring_varlen_attention(query, key, value, STARTS, 13, group=group, **settings)

    with backend(name):
        found = results(attend, own, settings)
    found[1] = found[1].t()
    return [join_sequence(t, group, 0, **order).transpose(0, 1)[None] for t in found]


@pytest.mark.parametrize(
    ("name", "size", "settings"),
    [
        ("torch", 4, {}),
        ("torch", 4, {"is_causal": True}),
        ("torch", 2, {"is_causal": True, "load_balance": True}),
        ("triton", 2, {"is_causal": True, "load_balance": True}),
    ],
    ids=str,
)
def test_packed(ranks: Ranks, name: str, size: int, settings: dict[str, Any]) -> None:
    inputs = {k: t[:1] for k, t in made().items()}
    plain = {"is_causal": settings.get("is_causal", False), "attn_mask": SAME}
    with backend("torch"):
        stock = results(functional.scaled_dot_product_attention, inputs, plain)
    truth = results(definition, {k: t.double() for k, t in inputs.items()}, plain)
    judge(ranks.run(packed_on_ranks, name, inputs, settings, size=size)[0], stock, truth)


# Dropout.


@pytest.mark.parametrize("name", ["torch", "triton"])
def test_dropout_is_a_mask_of_its_own_for_each_part_and_the_same_in_the_backward(
    ranks: Ranks, name: str
) -> None:
    inputs = {k: t[:1] for k, t in made(EV, EV).items()}
    settings = {"dropout_p": 0.5}
    unit = dict(inputs, value=torch.eye(EV).expand_as(inputs["value"]))
    keep = ranks.run(on_ranks, name, unit, settings, size=2)[0][0] != 0  # the weights themselves
    assert 0.3 < keep.double().mean() < 0.7
    half = EV // 2
    parts = [keep[..., i : i + half, j : j + half] for i in (0, half) for j in (0, half)]
    assert not any(torch.equal(parts[0], part) for part in parts[1:])

    def kept(query: Tensor, key: Tensor, value: Tensor, **settings: Any) -> Any:
        return definition(query, key, value, keep=keep, **settings)

    stock = results(kept, inputs, settings)
    truth = results(kept, {k: t.double() for k, t in inputs.items()}, settings)
    judge(ranks.run(on_ranks, name, inputs, settings, size=2)[0], stock, truth)


# Memory.


class Peak(TorchDispatchMode):
    """The most bytes of storages made inside that are alive at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.most = self.now = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.known:
                    self.known.add(storage._cdata)
                    self.now += storage.nbytes()
                    self.most = max(self.most, self.now)
                    weakref.finalize(storage, self.gone, storage._cdata, storage.nbytes())
        return result

    def gone(self, which: int, size: int) -> None:
        self.known.discard(which)
        self.now -= size


def peak(mesh: DeviceMesh, inputs: dict[str, Tensor]) -> int:
    """Of forward and backward with inputs of this size on every rank."""
    with backend("torch"), Peak() as used:
        results(ring_attention, inputs, {"group": mesh.get_group()})
    return used.most


def test_memory_does_not_grow_with_the_number_of_ranks(ranks: Ranks) -> None:
    inputs = made(8, 64)
    three, four = (ranks.run(peak, inputs, size=n) for n in (3, 4))
    assert three == four[:3]


# Errors.


def error_of(call: Callable[[], object]) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def misfit(mesh: DeviceMesh, change: dict[str, Any], settings: dict[str, Any]) -> str:
    """What a rank is told where the third is called otherwise."""
    inputs: dict[str, Any] = {name: torch.randn(1, 2, 4, 8) for name in FIRST}
    if mesh.get_local_rank() != 2:
        change, settings = {}, {}
    inputs |= change
    return error_of(lambda: ring_attention(**inputs, group=mesh.get_group(), **settings))


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        (dict.fromkeys(FIRST, torch.zeros(1, 2, 6, 8)), {}, r"'query' is .*\(1, 2, 6, 8\)"),
        ({"key": torch.zeros(1, 2, 4, 8).requires_grad_()}, {}, "'key' is .*True"),
        ({}, {"is_causal": True}, "'is_causal' is .*True"),
        ({}, {"key_lengths": torch.tensor([3])}, r"'key_lengths' is .*\[3\]"),
        ({"key": torch.zeros(1, 2, 5, 8)}, {}, "'key' and 'value' to have the same sequence len"),
        ({"query": torch.zeros(2, 4, 8)}, {}, r"\[batch, heads, length, dim\] .*\(2, 4, 8\)"),
        ({}, {"dropout_p": 2.0}, r"'dropout_p' to be in \[0, 1\]"),
    ],
)
def test_what_one_rank_does_otherwise_is_an_error_on_all(
    ranks: Ranks, change: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    for said in ranks.run(misfit, change, settings):
        assert re.match(rf"(Bad)?ValueError: ring_attention\(\): .*{message}", said), said


def packed_misfit(mesh: DeviceMesh, starts: list[int]) -> str:
    x = torch.randn(3, 2, 8)
    group = mesh.get_group()
    return error_of(lambda: ring_varlen_attention(x, x, x, torch.tensor(starts), 9, group=group))


@pytest.mark.parametrize(
    ("starts", "message"),
    [
        ([0, 2, 3], r"'cu_seqlens' to rise from 0 to the number of tokens, 12, but got \[0, 2"),
        ([0, 10, 12], "'max_seqlen' to be at least the longest sequence, 10, but got 9"),
    ],
)
def test_packed_rows_that_do_not_fit_all_ranks(
    ranks: Ranks, starts: list[int], message: str
) -> None:
    for said in ranks.run(packed_misfit, starts):
        assert re.match(rf"(Bad)?ValueError: ring_varlen_attention\(\): .*{message}", said), said


def split_misfit(mesh: DeviceMesh) -> list[str]:
    group, x = mesh.get_group(), torch.zeros(2, 12)
    odd, heads = torch.zeros(2, 3), torch.zeros(1, 1, 3, 4)
    return [
        error_of(lambda: split_sequence(x, group, load_balance=True)),
        error_of(lambda: join_sequence(odd, group, load_balance=True)),
        error_of(lambda: join_sequence(odd.requires_grad_(), group)),
        error_of(lambda: ring_attention(*[heads] * 3, group=group, load_balance=True)),
    ]


def test_lengths_that_cannot_be_split(ranks: Ranks) -> None:
    messages = [
        r"ValueError: split_sequence\(\): .*dimension 1 of 'tensor' to be a multiple of 8, for 4",
        r"ValueError: join_sequence\(\): .*to be even with load_balance=True.*\(2, 3\)",
        r"RuntimeError: join_sequence\(\): has no gradient",
        r"ValueError: ring_attention\(\): expected an even length of 'query'.*but got 3",
    ]
    for said in ranks.run(split_misfit):
        assert all(re.match(m, text) for m, text in zip(messages, said, strict=True)), said


def dies(mesh: DeviceMesh) -> None:
    """The forward is done, the backward waits for what a dead rank does not send."""
    q, k, v = (torch.randn(1, 2, 4, 8, requires_grad=True) for _ in range(3))
    output = ring_attention(q, k, v, group=mesh.get_group())
    if mesh.get_local_rank() == 1:
        os._exit(3)
    output.backward(torch.randn_like(output))


def test_a_rank_that_dies_is_an_error_on_its_neighbour(ranks: Ranks) -> None:
    with pytest.raises(RankError) as raised:
        ranks.run(dies, size=2)
    errors = raised.value.errors
    assert "exit code 3" in errors[1]
    assert re.search("pass_on|arrived", errors[0]) and "RuntimeError" in errors[0], errors[0]
