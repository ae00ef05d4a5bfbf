"""Packed attention on the torch backend: padding to groups of near lengths, dropout, few calls."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa
from torch.utils._python_dispatch import TorchDispatchMode

from fusedformer import backend, nn
from fusedformer import functional as F
from fusedformer.ops.attention import aten, chunks
from fusedformer.ops.attention.groups import groups_of
from fusedformer.ops.dropout_aten import draw_kept

H, D = 3, 8
SELF = [5, 9, 9, 1, 0, 4], [5, 9, 9, 1, 3, 4]  # some keys behind the last token, too
CROSS = [5, 9, 2, 1, 0, 4], [7, 3, 0, 2, 5, 8]
TERMS: dict[str, dict[str, Any]] = {
    "plain": {}, "causal": {"is_causal": True}, "window": {"window": (2, 1)},
    "bottom right": {"is_causal": True, "causal_alignment": "bottom_right"},
    "softcap": {"softcap": 3.0}, "sinks": {"sinks": torch.tensor([0.3, -1.0, 2.0])},
    "slopes": {"alibi_slopes": torch.tensor([0.1, 0.5, 1.0])},
    "gated table": {"relative_bias": torch.randn(3, 7), "relative_bias_gate": torch.randn(28, 3)},
    "mask": {"attn_mask": torch.arange(54).view(6, 1, 1, 9) % 7 > 1},
    "key lengths": {"key_lengths": torch.tensor([3, 3, 0, 1, 0, 4])},
}  # fmt: skip


@pytest.fixture(autouse=True)
def torch_backend() -> Iterator[None]:
    with backend("torch"):
        yield


def starts(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def attend(tensors: list[Tensor], lengths: tuple[list[int], list[int]], **terms: Any) -> Any:
    most = [max(each) for each in lengths]
    if "attn_mask" in terms:
        terms["attn_mask"] = terms["attn_mask"][..., : most[1]]
    if "relative_bias_gate" in terms:
        terms["relative_bias_gate"] = terms["relative_bias_gate"][: len(tensors[0])]
    call: Any = F.varlen_attention
    return call(*tensors, *map(starts, lengths), *most, **terms)


@pytest.mark.parametrize("lengths", [SELF, CROSS], ids=["self", "cross"])
@pytest.mark.parametrize("name", TERMS)
def test_padding_to_a_group_changes_nothing(
    name: str, lengths: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outputs, log-sum-exps and gradients are those of each sequence alone."""
    batches: list[int] = []
    padded = aten._padded

    def noted(query: Tensor, *others: Any) -> Any:
        batches.append(len(query))
        return padded(query, *others)

    monkeypatch.setattr(aten, "_padded", noted)
    sizes = [sum(lengths[0]), sum(lengths[1]), sum(lengths[1])]
    packed = [torch.randn(n, H, D, requires_grad=True) for n in sizes]
    outputs, lses = attend(packed, lengths, return_lse=True, **TERMS[name])
    output = attend(packed, lengths, **TERMS[name])
    distinct = len(set(zip(*lengths, strict=True)))
    if name != "bottom right" or lengths is SELF:  # else ends would not be aligned
        assert len(batches) < 2 * distinct
    dy = torch.randn_like(output)
    grads = torch.autograd.grad(output, packed, dy)
    parts = [p.detach().split(n) for p, n in zip(packed, (*lengths, lengths[1]), strict=True)]
    for i, (*own, dy_own) in enumerate(zip(*parts, dy.split(lengths[0]), strict=True)):
        alone = [t.requires_grad_() for t in own]
        rows, keys = (slice(sum(each[:i]), sum(each[: i + 1])) for each in lengths)
        own_part = {"attn_mask": slice(i, i + 1), "key_lengths": slice(i, i + 1)}
        own_part["relative_bias_gate"] = rows
        terms = {k: v[own_part[k]] if k in own_part else v for k, v in TERMS[name].items()}
        of_one, lse = attend(alone, ([lengths[0][i]], [lengths[1][i]]), return_lse=True, **terms)
        for ours in (outputs, output):
            torch.testing.assert_close(ours[rows], of_one)
        torch.testing.assert_close(lses[:, rows], lse)
        for ours, own_grad, place in zip(
            grads, torch.autograd.grad(of_one, alone, dy_own), (rows, keys, keys), strict=True
        ):
            torch.testing.assert_close(ours[place], own_grad)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_dropout_of_groups(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the formula with the elements that were drawn, in whole and in small chunks."""
    drawn: list[Tensor] = []

    def noted(x: Tensor, p: float) -> Tensor:
        drawn.append(draw_kept(x, p))
        return drawn[-1]

    monkeypatch.setattr(aten, "draw_kept", noted)
    for chunk in (chunks.CHUNK, 40):
        monkeypatch.setattr(chunks, "CHUNK", chunk)
        drawn.clear()
        lengths = [5, 9, 9, 4]
        packed = [torch.randn(27, H, D, dtype=torch.float64, requires_grad=True) for _ in range(3)]
        output = attend(packed, (lengths, lengths), dropout_p=0.3, is_causal=causal)
        (kept,) = drawn
        assert 0.5 < kept.double().mean() < 0.9
        expected = []
        order = sorted(range(4), key=lambda i: lengths[i], reverse=True)
        for i, parts in enumerate(zip(*(p.split(lengths) for p in packed), strict=True)):
            q, k, v = (part.transpose(0, 1) for part in parts)
            scores = q @ k.mT / D**0.5
            if causal:
                hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
                scores = scores.masked_fill(hidden, -torch.inf)
            own = kept[order.index(i), :, : lengths[i], : lengths[i]] / 0.7
            expected.append((scores.softmax(-1) * own @ v).transpose(0, 1))
        truth, dy = torch.cat(expected), torch.randn_like(output)
        torch.testing.assert_close(output, truth)
        found = torch.autograd.grad(output, packed, dy, create_graph=True)
        wanted = torch.autograd.grad(truth, packed, dy, create_graph=True)
        torch.testing.assert_close(found, wanted)
        first = torch.autograd.grad(output, packed, dy, retain_graph=True)
        torch.testing.assert_close(first, wanted)
        ddy = [torch.randn_like(g) for g in found]
        again = [torch.autograd.grad(each, packed, ddy) for each in (found, wanted)]
        torch.testing.assert_close(*again)


class Shared(TorchDispatchMode):
    """Calls of ATen that read or write whole tensors, which threads share."""

    only_looks = True
    least = 4096

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        some = [t for t in (*args, result) if isinstance(t, Tensor) and t.numel() >= self.least]
        if some and not func.is_view and "empty" not in func.name() and "detach" not in func.name():
            self.names.append(func.name())
        return result


@pytest.mark.parametrize(("train", "most"), [(False, 14), (True, 71)], ids=["inference", "step"])
def test_calls_of_a_layer(train: bool, most: int) -> None:
    """However many sequences of natural lengths; each call is a wait for the slowest thread."""
    lengths = torch.tensor([32, 30, 29, 25, 21, 17, 12, 9, 6, 5, 3, 1])
    padding = torch.arange(32) >= lengths[:, None]
    x = torch.randn(12, 32, 64)
    counts = []
    for layers in (1, 2):
        layer = nn.TransformerEncoderLayer(64, 4, 128, 0.1, "gelu", batch_first=True)
        encoder = nn.TransformerEncoder(layer, layers).train(train)
        with Shared() as seen, torch.set_grad_enabled(train):
            output = encoder(x, src_key_padding_mask=padding)
            if train:
                output.backward(torch.randn_like(output))
        counts.append(len(seen.names))
    assert counts[1] - counts[0] <= most, seen.names


def test_short_sequences_are_not_padded_to_a_long_one() -> None:
    """However many have one length."""
    lengths = (150, *[32] * 1000)
    found = groups_of(lengths, lengths, 12, may_pad=True)
    assert [(len(one.members), one.queries) for one in found] == [(1, 150), (1000, 32)]


@pytest.mark.parametrize("queries", [[0, 3], [3, 3, 0]])
def test_sequences_without_queries_are_not_padded(queries: list[int]) -> None:
    """Nothing could be read in their place."""
    keys = [5, 4, 5][: len(queries)]
    q, k, v = (torch.randn(sum(each), H, D) for each in (queries, keys, keys))
    found = attend([q, k, v], (queries, keys))
    parts = zip(*(t.split(n) for t, n in ((q, queries), (k, keys), (v, keys))), strict=True)
    wanted = [
        sdpa(*(part.transpose(0, 1) for part in own)).transpose(0, 1)
        for own in parts
        if len(own[0])
    ]
    torch.testing.assert_close(found, torch.cat(wanted))
    assert not any(one.is_padded for one in groups_of((0, 3), (5, 4), H, may_pad=True))


@pytest.mark.parametrize("lengths", [[0, 1, 3], [2, 2]])
def test_second_derivatives(lengths: list[int]) -> None:
    """Of float64 as of float32; ATen's own kernel has none."""
    packed = [torch.randn(sum(lengths), 1, 2, dtype=torch.float64) for _ in range(3)]
    inputs = [t.requires_grad_() for t in packed]
    assert torch.autograd.gradgradcheck(lambda *own: attend([*own], (lengths, lengths)), inputs)
