"""Attention sinks: a logit of each head that is in the sums of its queries, and has no value."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.ops.judge import DTYPES, check, grad
from torch import Tensor

from fusedformer import backend, reference
from fusedformer import functional as F
from fusedformer.testing import assert_function_parity

NAME = "scaled_dot_product_attention"
BACKENDS: Any = pytest.mark.parametrize("name", ["triton", "torch"])
FORMS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "plain": (70, 70, {}),
    "causal": (37, 37, {"is_causal": True}),
    "window": (70, 70, {"window": (9, 0), "return_lse": True}),
    "few queries": (3, 1100, {"return_lse": True}),
    "one token": (1, 1300, {"is_causal": True, "causal_alignment": "bottom_right"}),
    "grouped": (37, 45, {"enable_gqa": True}),
}


def inputs_of(queries: int, keys: int, device: str, key_heads: int = 4) -> dict[str, Any]:
    shapes = {"query": (2, 4, queries, 16)}
    shapes |= dict.fromkeys(("key", "value"), (2, key_heads, keys, 16))
    return {n: grad(*s, device=device) for n, s in shapes.items()} | {
        "sinks": grad(4, device=device)
    }


def eager(
    query: Tensor, key: Tensor, value: Tensor, sinks: Tensor, hidden: Tensor | None = None
) -> Tensor:
    """What transformers' models with sinks compute."""
    scores = query @ key.mT * query.shape[-1] ** -0.5
    if hidden is not None:
        scores = scores.masked_fill(hidden, -torch.inf)
    column = sinks.reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)
    return torch.cat((scores, column), -1).softmax(-1)[..., :-1] @ value


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_the_criterion(form: str, dtype: torch.dtype, device: str) -> None:
    queries, keys, settings = FORMS[form]
    inputs = inputs_of(queries, keys, device, 2 if form == "grouped" else 4)
    only: Any = (lambda both: both) if "return_lse" in settings else (lambda both: both[0])
    check(NAME, dtype, only=only, **inputs, **settings)


@BACKENDS
def test_beside_the_softmax_of_one_more_column(name: Any, device: str) -> None:
    inputs = inputs_of(37, 45, device)

    def ours(**arguments: Any) -> Any:
        with backend(name):
            return F.scaled_dot_product_attention(**arguments)

    assert_function_parity(ours, eager, eager, inputs, dtype=torch.float32)


@pytest.mark.parametrize("scale", [1.0, 100.0, 1000.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_criterion_at_any_scale(dtype: torch.dtype, scale: float, device: str) -> None:
    """Of scores, and of sinks that are as large."""
    inputs = {n: t.detach() for n, t in inputs_of(37, 70, device).items()}
    inputs["query"] *= scale
    inputs["sinks"] *= 2 * scale
    leaves = {n: t.requires_grad_() for n, t in inputs.items()}
    check(NAME, dtype, return_lse=True, **leaves)


@BACKENDS
@pytest.mark.parametrize("queries", [20, 3], ids=["plain", "few queries"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_sink_is_finite(name: Any, dtype: torch.dtype, queries: int, device: str) -> None:
    tensors = inputs_of(queries, 600, device)
    tensors["sinks"] = torch.tensor([-torch.inf, -1e4, 1e4, 0.0], device=device)
    inputs = {n: t.detach().to(dtype).requires_grad_() for n, t in tensors.items()}
    with backend(name):
        output, lse = F.scaled_dot_product_attention(**inputs, return_lse=True)
        first = {n: t[:, :2] for n, t in inputs.items() if n != "sinks"}
        without = F.scaled_dot_product_attention(**first)
    assert lse.isfinite().all()
    torch.testing.assert_close(output[:, :2], without, atol=2 * torch.finfo(dtype).eps, rtol=0.0)
    assert (output[:, 2] == 0).all()
    assert (output[:, 3] != 0).any()
    both = output, lse
    grads = torch.autograd.grad(both, list(inputs.values()), [torch.randn_like(t) for t in both])
    assert all(g.isfinite().all() for g in grads)
    assert (grads[-1][:2] == 0).all()
    assert (grads[-1][2:] != 0).all()


@pytest.mark.parametrize("queries", [20, 3], ids=["plain", "few queries"])
def test_no_sink_is_minus_infinity_to_the_bit(queries: int, device: str) -> None:
    inputs = inputs_of(queries, 600, device)
    inputs.pop("sinks")
    dy = torch.randn(2, 4, queries, 16, device=device)
    results = []
    for sinks in (None, torch.full((4,), -torch.inf, device=device)):
        output = F.scaled_dot_product_attention(**inputs, sinks=sinks)
        results.append([output, *torch.autograd.grad(output, list(inputs.values()), dy)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@BACKENDS
@pytest.mark.parametrize("keys", [30, 0])
def test_a_query_without_keys_sees_the_sink_alone(name: Any, keys: int, device: str) -> None:
    inputs = inputs_of(20, keys, device)
    lengths = torch.tensor([keys, 0], device=device)
    with backend(name):
        output, lse, weights = F.scaled_dot_product_attention(
            **inputs, key_lengths=lengths, return_lse=True, return_weights="per_head"
        )
        dy = torch.randn_like(output)
        grads = torch.autograd.grad(output, list(inputs.values()), dy, retain_graph=True)
        (by_lse,) = torch.autograd.grad(lse[1].sum(), inputs["sinks"])
    assert (output[1] == 0).all()
    assert (weights[1] == 0).all()
    assert (grads[0][1] == 0).all()
    assert (grads[3] != 0).all() if keys else (grads[3] == 0).all()
    torch.testing.assert_close(lse[1], inputs["sinks"][:, None].expand(4, 20))
    torch.testing.assert_close(by_lse, torch.full_like(by_lse, 20.0))


@BACKENDS
def test_weights_leave_out_what_the_sink_takes(name: Any, device: str) -> None:
    inputs = inputs_of(37, 45, device)
    with backend(name):
        _, lse, weights = F.scaled_dot_product_attention(
            **inputs, return_lse=True, return_weights="per_head"
        )
    taken = (inputs["sinks"][:, None] - lse).exp()
    torch.testing.assert_close(weights.sum(-1), 1 - taken)
    assert (taken > 0.001).all()


@BACKENDS
def test_one_part_of_the_keys_has_the_sink(name: Any, device: str) -> None:
    """Merged with a part that has none, attention is that of all keys with the sink."""
    inputs = inputs_of(37, 70, device)

    def in_parts(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor) -> Any:
        with backend(name):
            parts = [
                F.scaled_dot_product_attention(query, k, v, sinks=s, return_lse=True)
                for k, v, s in zip(key.split(35, 2), value.split(35, 2), (sinks, None), strict=True)
            ]
            return F.merge_attention_states(*parts[0], *parts[1])

    def whole(**arguments: Any) -> Any:
        with backend("torch"):
            return F.scaled_dot_product_attention(**arguments, return_lse=True)

    truth = reference.scaled_dot_product_attention
    assert_function_parity(in_parts, whole, truth, inputs, dtype=torch.float32)


def test_rows_behind_the_last_sequence_do_not_reach_the_gradient(device: str) -> None:
    """As rows are packed without asking the device how many there are; they hold anything."""
    from fusedformer.ops.attention import registered
    from fusedformer.ops.attention.terms import AttentionTerms

    query = torch.randn(1, 4, 30, 16, device=device)
    starts = torch.tensor([0, 9, 20], device=device)
    found = []
    for rows in (20, 30):
        sinks = torch.zeros(4, device=device).requires_grad_()
        own = query[:, :, :rows].clone()
        own[:, :, 20:] = torch.nan
        terms = AttentionTerms(
            sinks=sinks, starts_q=starts, starts_k=starts, max_queries=11, max_keys=11
        )
        output, *_ = registered.attention(own, own, own, False, *terms)
        dy = torch.full_like(output, torch.nan)
        dy[:, :, :20] = query[:, :, :20]
        found.append(torch.autograd.grad(output, sinks, dy)[0])
    assert torch.equal(*found)
    assert (found[0] != 0).all()


# The torch backend.


@pytest.mark.parametrize("form", ["chunked", "causal", "mask", "capped", "dropout", "packed"])
def test_gradients_of_gradients(form: str) -> None:
    """What is in chunks too."""
    tensors = [torch.randn(1, 2, n, 4, dtype=torch.float64) for n in (3, 4, 4)]
    tensors.append(torch.randn(2, dtype=torch.float64))
    forms: dict[str, dict[str, Any]] = {
        "causal": {"is_causal": True}, "capped": {"softcap": 2.0}, "dropout": {"dropout_p": 0.5},
        "mask": {"attn_mask": torch.tensor([[True] * 4, [False] * 4, [True, False] * 2])},
    }  # fmt: skip
    settings = forms.get(form, {})

    def call(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor) -> Any:
        torch.manual_seed(1)
        with backend("torch"):
            if form != "packed":
                return F.scaled_dot_product_attention(query, key, value, sinks=sinks, **settings)
            q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
            starts = torch.tensor([0, 1, 3]), torch.tensor([0, 2, 4])
            return F.varlen_attention(q, k, v, *starts, 2, 2, sinks=sinks)

    leaves = [t.requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)


@pytest.mark.parametrize("chunk", [200, 3000], ids=["of heads", "of sequences"])
def test_chunks_are_the_whole(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fusedformer.ops.attention.chunks.CHUNK", chunk)
    inputs = inputs_of(11, 13, "cpu")
    hidden = torch.rand(2, 1, 11, 13) > 0.7
    hidden[1, :, 3] = True

    def ours(**arguments: Any) -> Any:
        with backend("torch"):
            return F.scaled_dot_product_attention(**arguments, attn_mask=~hidden)

    def stock(**arguments: Any) -> Any:
        return eager(**arguments, hidden=hidden)

    assert_function_parity(ours, stock, stock, inputs, dtype=torch.float32)


def test_a_batch_of_gradients() -> None:
    """Under torch.vmap, where nothing is written in place."""
    inputs = {n: t.detach().double().requires_grad_() for n, t in inputs_of(3, 4, "cpu").items()}
    leaves = list(inputs.values())
    with backend("torch"):
        output = F.scaled_dot_product_attention(**inputs)
    dys = torch.randn(3, *output.shape).double()

    def grads_of(dy: Tensor) -> Any:
        return torch.autograd.grad(output, leaves, dy, retain_graph=True)

    together, alone = torch.vmap(grads_of)(dys), [grads_of(dy) for dy in dys]
    for all_of_one, *each in zip(together, *alone, strict=True):
        torch.testing.assert_close(all_of_one, torch.stack(each))


@BACKENDS
def test_compiled_in_one_graph(name: Any, device: str) -> None:
    inputs = inputs_of(20, 30, device)
    dy = torch.randn(2, 4, 20, 16, device=device)
    results = []
    for call in (
        F.scaled_dot_product_attention,
        torch.compile(F.scaled_dot_product_attention, fullgraph=True, backend="aot_eager"),
    ):
        with backend(name):
            output: Any = call(**inputs)
        results.append([output, *torch.autograd.grad(output, list(inputs.values()), dy)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
