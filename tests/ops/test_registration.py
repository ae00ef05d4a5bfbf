"""Every registered op, forward and backward: schema, fake, autograd formula and tracing agree."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fusedformer.ops  # noqa: F401 (registers the ops)
from fusedformer.ops.attention.terms import OF_HEADS_ALONE, AttentionTerms


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=dtype).requires_grad_()


def seed() -> Tensor:
    return torch.tensor([77], dtype=torch.int64)


def softmax_case(masked: bool, log: bool) -> tuple[Any, ...]:
    return leaf(3, 5, 7), leaf(3, 5, 7) if masked else None, 0.5, False, torch.float32, log


def softmax_backward_case(log: bool) -> tuple[Any, ...]:
    y = torch.log_softmax(torch.randn(3, 7), -1)
    return torch.randn(3, 7), y if log else y.exp(), 0.5, torch.bfloat16, log, False


def norm_case(
    kind: str, *, fused: bool, p: float = 0.0, dtype: torch.dtype | None = None
) -> tuple[Any, ...]:
    residual, input_bias = (leaf(4, 6), leaf(6)) if fused else (None, None)
    bias = leaf(6) if kind == "layer" else None
    weight = None if kind == "none" else leaf(6)
    drawn = seed() if p else None
    wants = (kind, 1, True, True, dtype)
    return leaf(4, 6), residual, input_bias, weight, bias, drawn, p, 1e-5, *wants


def norm_backward_case(
    kind: str, p: float = 0.0, dtype: torch.dtype = torch.float32, narrow: bool = False
) -> tuple[Any, ...]:
    grad = None if kind == "none" else torch.randn(4, 6)
    normed = torch.randn(4, 6, dtype=torch.bfloat16 if narrow else torch.float32)
    mean = torch.randn(4) if kind == "layer" else torch.empty(0)
    rstd = torch.empty(0) if kind == "none" else torch.rand(4)
    weight = None if kind == "none" else torch.randn(6)
    drawn = seed() if p else None
    wants = (kind != "none", kind == "layer", True, dtype, torch.float32)
    return grad, torch.randn(4, 6), normed, mean, rstd, weight, drawn, p, kind, 1, *wants


def activation_case(bias: bool, p: float = 0.0) -> tuple[Any, ...]:
    return leaf(4, 6), leaf(6) if bias else None, seed() if p else None, p, "gelu"


def scaled_sum_case() -> tuple[Any, ...]:
    return leaf(4, 6), leaf(4, 6), leaf(6), torch.rand(4), leaf(6), seed(), 0.5


def scaled_sum_backward_case() -> tuple[Any, ...]:
    tensors = torch.randn(4, 6), torch.randn(4, 6), torch.randn(6), torch.rand(4), torch.randn(6)
    return *tensors, seed(), 0.5, True, True, torch.float32, torch.float32


def rotary_case(norm: str, backward: bool = False) -> tuple[Any, ...]:
    make = torch.randn if backward else leaf
    weights = (None,) * 4 if norm == "none" else (make(8), None, make(8), None)
    query, key = make(2, 5, 2, 8), make(2, 5, 1, 8)
    grads = (torch.randn(2, 5, 2, 8), torch.randn(2, 5, 1, 8)) if backward else ()
    tables = torch.rand(1, 6, 4), torch.rand(1, 6, 4), torch.randint(6, (2, 5))
    return *grads, query, key, *tables, *weights, norm, 1e-6, True


def activation_backward_case(bias: bool) -> tuple[Any, ...]:
    given = torch.randn(6) if bias else None
    return torch.randn(4, 6), torch.randn(4, 6), given, None, 0.0, "silu", bias


def attention_case(*, packed: bool = False, **terms: Any) -> tuple[Any, ...]:
    if packed:
        starts = torch.tensor([0, 3, 3, 7], dtype=torch.int32)
        terms |= dict(starts_q=starts, starts_k=starts, max_queries=4, max_keys=4)
        leaves = leaf(1, 2, 7, 8), leaf(1, 1, 7, 8), leaf(1, 1, 7, 4)
    else:
        leaves = leaf(2, 2, 5, 8), leaf(2, 1, 7, 8), leaf(2, 1, 7, 4)
    return (*leaves, True, *AttentionTerms(**{"scale": 0.5, **terms}))


def self_attention_case(**terms: Any) -> tuple[Any, ...]:
    """Sequence first in memory."""
    qkv = torch.randn(5, 2, 3, 2, 8).transpose(0, 1).requires_grad_()
    return qkv, *AttentionTerms(**{"scale": 0.5, "right": 0, **terms})


def self_attention_backward_case(**terms: Any) -> tuple[Any, ...]:
    qkv, *others = detached(self_attention_case(**terms))
    output, statistics = torch.ops.fusedformer.self_attention(qkv, *others)
    return torch.randn_like(output), qkv, output, statistics, *others


def keys() -> dict[str, Any]:
    mask = torch.rand(2, 7) > 0.2
    return dict(key_mask=mask, key_lengths=torch.tensor([3, 7]), right=0, align_end=True)


def learned() -> dict[str, Any]:
    """All that may be learned, and dropout."""
    terms = dict(mask=leaf(1, 2, 5, 7), slopes=leaf(1, 2), table=leaf(2, 5), gate=leaf(2, 2, 5))
    return {**terms, "sinks": leaf(2), "seed": seed(), "p": 0.5, "softcap": 2.0}


def detached(case: tuple[Any, ...]) -> list[Any]:
    return [t.detach() if isinstance(t, Tensor) else t for t in case]


def attention_backward_case(needs: list[bool], **terms: Any) -> tuple[Any, ...]:
    query, key, value, _, *others = detached(attention_case(**terms))
    output, lse, statistics = torch.ops.fusedformer.attention(query, key, value, True, *others)
    grads = torch.randn_like(output), torch.randn_like(lse)
    return (*grads, query, key, value, output, statistics, needs, *others)


def chunked_case(
    mask: Tensor | None,
    dtype: torch.dtype = torch.float32,
    sinks: Tensor | None = None,
    p: float = 0.0,
) -> tuple[Any, ...]:
    shapes = (2, 2, 5, 8), (2, 2, 7, 8), (2, 2, 7, 4)
    leaves = (leaf(*shape).detach().to(dtype).requires_grad_() for shape in shapes)
    kept = (torch.rand(2, 2, 5, 7) > p).to(torch.uint8) if p else None
    return *leaves, mask, sinks, kept, 0.5, mask is None, p


def chunked_backward_case() -> tuple[Any, ...]:
    case = detached(chunked_case(None, sinks=torch.randn(2)))
    return torch.randn(2, 2, 5, 4), *case, [True, False, True, True]


def disentangled_case(packed: bool, p: float = 0.0) -> tuple[Any, ...]:
    starts = torch.tensor([0, 3, 7], dtype=torch.int32) if packed else None
    keep = None if packed else torch.rand(2, 7) > 0.2
    leading = (1, 7) if packed else (2, 7)
    heads = (leaf(*leading, 2, 8).transpose(1, 2) for _ in range(3))
    numbers = (4, 4, p, 0.25)
    tables = leaf(2, 8, 8), leaf(2, 8, 8) if packed else None
    dropped = seed() if p else None
    return *heads, *tables, 6 if packed else 0, keep, starts, starts, dropped, *numbers


def disentangled_backward_case(packed: bool, by_aten: bool = False) -> tuple[Any, ...]:
    case = detached(disentangled_case(packed))
    grad = torch.randn_like(case[0])
    if by_aten:
        return grad, *case
    return grad, *torch.ops.fusedformer.disentangled_attention(*case), *case


def packed_aten_case(return_lse: bool, **terms: Any) -> tuple[Any, ...]:
    query, key, value, _, *others = attention_case(packed=True, **terms)
    return query, key, value, return_lse, *others


def packed_aten_backward_case(needs: list[bool], *, with_lse: bool = False) -> tuple[Any, ...]:
    shape = dict(table=leaf(2, 5), gate=leaf(1, 2, 7), sinks=leaf(2), seed=seed(), p=0.3)
    query, key, value, _, *others = detached(attention_case(packed=True, **shape))
    lse_grad = torch.randn(1, 2, 7) if with_lse else None
    return torch.randn(1, 2, 7, 4), lse_grad, query, key, value, needs, *others


def weights_case(
    average: bool, dtype: torch.dtype = torch.float32, **terms: Any
) -> tuple[Any, ...]:
    query, key, _, _, *others = attention_case(**terms)
    lse, statistics = torch.randn(2, 2, 5).requires_grad_(), torch.rand(2, 2, 2, 5) + 0.5
    return query, key, lse, statistics, average, dtype, *others


def weights_backward_case(needs: list[bool], **terms: Any) -> tuple[Any, ...]:
    query, key, _, statistics, average, _, *others = detached(weights_case(True, **terms))
    return torch.randn(2, 1, 5, 7), query, key, statistics, average, needs, *others


def states() -> tuple[Tensor, ...]:
    return leaf(2, 3, 4), leaf(2, 3), leaf(2, 3, 4), leaf(2, 3)


def tables() -> list[Any]:
    ids = torch.tensor([0, 3, 1, 3, 2])
    return [ids, leaf(4, 6), ids % 3, leaf(3, 6), None, leaf(2, 6)]


def embedding_case(p: float = 0.0, dtype: torch.dtype | None = None) -> tuple[Any, ...]:
    return *tables(), leaf(6), leaf(6), seed() if p else None, p, 1e-5, 3, dtype


def embedding_backward_case(needs: list[bool]) -> tuple[Any, ...]:
    given = detached(tuple(tables()))
    statistics = torch.randn(5), torch.rand(5)
    return torch.randn(5, 6), *given, *statistics, None, None, 0.0, needs, torch.float16


def pairs_case(sigmoid: bool, backend: str) -> tuple[Any, ...]:
    return leaf(3, 8), leaf(4, 8), leaf(), *([leaf()] if sigmoid else []), 1, backend


def pairs_backward_case(sigmoid: bool, needs: list[bool], backend: str) -> tuple[Any, ...]:
    a, b, scale = torch.randn(3, 8), torch.randn(4, 8), torch.tensor(2.0)
    if sigmoid:
        return torch.randn(3), None, None, a, b, scale, scale, None, None, 1, needs, backend
    grads = torch.randn(3), torch.randn(4), torch.randn(3)
    return *grads, a, b, scale, None, torch.randn(3), torch.randn(4), 1, needs, backend


def classes() -> Tensor:
    return torch.tensor([0, 3, -100, 2])


def cross_entropy_case(reduction: str) -> tuple[Any, ...]:
    return leaf(4, 6), classes(), torch.rand(6), -100, 0.1, reduction, torch.float32


def cross_entropy_backward_case(reduction: str) -> tuple[Any, ...]:
    grad, total = torch.randn(4 if reduction == "none" else ()), torch.tensor(3.0)
    divisor = total if reduction == "mean" else None
    return grad, torch.randn(4, 6), classes(), None, torch.rand(2, 4), divisor, -100, 0.0


def projection_settings(reduction: str, needs: list[bool], triton: bool) -> tuple[Any, ...]:
    single = torch.float32
    return single, single, reduction, -100, 0.1, False, triton, needs


def projection_case(reduction: str, *, triton: bool = True) -> tuple[Any, ...]:
    tensors = leaf(4, 3), leaf(6, 3), classes(), leaf(6), torch.rand(6)
    return *tensors, *projection_settings(reduction, [True] * 3, triton)


def projection_backward_case(reduction: str, needs: list[bool]) -> tuple[Any, ...]:
    case = detached(projection_case(reduction))
    loss, statistics, total, *_ = torch.ops.fusedformer.linear_cross_entropy(*case)
    divisor = total if reduction == "mean" else None
    settings = projection_settings(reduction, needs, True)
    return torch.randn_like(loss), *case[:5], statistics, divisor, *settings


CASES: dict[str, tuple[str, Any]] = {
    "softmax": ("softmax", lambda: softmax_case(False, False)),
    "log_softmax, mask": ("softmax", lambda: softmax_case(True, True)),
    "softmax backward": ("softmax_backward", lambda: softmax_backward_case(False)),
    "log_softmax backward": ("softmax_backward", lambda: softmax_backward_case(True)),
    "layer norm": ("norm", lambda: norm_case("layer", fused=False)),
    "layer norm, residual, dropout": ("norm", lambda: norm_case("layer", fused=True, p=0.5)),
    "rms norm, residual": ("norm", lambda: norm_case("rms", fused=True)),
    "rms norm, another dtype": (
        "norm", lambda: norm_case("rms", fused=True, dtype=torch.bfloat16),
    ),
    "sum alone": ("norm", lambda: norm_case("none", fused=True)),
    "layer norm backward": ("norm_backward", lambda: norm_backward_case("layer")),
    "rms norm backward, dropout": ("norm_backward", lambda: norm_backward_case("rms", 0.5)),
    "rms norm backward, autocast": (
        "norm_backward", lambda: norm_backward_case("rms", dtype=torch.bfloat16),
    ),
    "rms norm backward, wider gradient": (
        "norm_backward", lambda: norm_backward_case("rms", dtype=torch.bfloat16, narrow=True),
    ),
    "sum alone backward": ("norm_backward", lambda: norm_backward_case("none")),
    "scaled sum": ("scaled_sum", scaled_sum_case),
    "scaled sum backward": ("scaled_sum_backward", scaled_sum_backward_case),
    "activation": ("bias_activation", lambda: activation_case(False)),
    "activation, bias, dropout": ("bias_activation", lambda: activation_case(True, 0.5)),
    "rotary": ("rotary_embedding", lambda: rotary_case("none")),
    "rotary, QK-norm": ("rotary_embedding", lambda: rotary_case("rms")),
    "rotary backward": (
        "rotary_embedding_backward", lambda: (*rotary_case("none", backward=True), False),
    ),
    "rotary backward, QK-norm": (
        "rotary_embedding_backward", lambda: (*rotary_case("rms", backward=True), True),
    ),
    "gated activation": (
        "gated_activation", lambda: (*activation_case(True, 0.5), True),
    ),
    "gated activation backward": (
        "gated_activation_backward",
        lambda: (torch.randn(4, 3), *activation_backward_case(True)[1:-1], False, True),
    ),
    "activation backward": ("bias_activation_backward", lambda: activation_backward_case(False)),
    "activation backward, bias": (
        "bias_activation_backward", lambda: activation_backward_case(True),
    ),
    "attention": ("attention", lambda: attention_case(right=0)),
    "attention, all learned": ("attention", lambda: attention_case(**learned())),
    "attention, keys": ("attention", lambda: attention_case(**keys())),
    "attention, packed": ("attention", lambda: attention_case(packed=True, left=2, right=1)),
    "attention backward": (
        "attention_backward", lambda: attention_backward_case([True] * 8, **learned()),
    ),
    "attention backward, frozen keys": (
        "attention_backward",
        lambda: attention_backward_case([True, False] * 4, **learned()),
    ),
    "attention backward, packed": (
        "attention_backward",
        lambda: attention_backward_case(OF_HEADS_ALONE, packed=True),
    ),
    "self attention": ("self_attention", self_attention_case),
    "self attention, packed": (
        "self_attention",
        lambda: (leaf(1, 7, 3, 2, 8), *attention_case(packed=True, seed=seed(), p=0.5)[4:]),
    ),
    "self attention backward": ("self_attention_backward", self_attention_backward_case),
    "chunked attention": ("chunked_attention", lambda: chunked_case(torch.rand(2, 1, 5, 7) > 0.3)),
    "chunked attention, causal": ("chunked_attention", lambda: chunked_case(None)),
    "chunked attention, added mask": (
        "chunked_attention", lambda: chunked_case(torch.randn(5, 7)[None, None], torch.bfloat16),
    ),
    "chunked attention, sinks": (
        "chunked_attention", lambda: chunked_case(torch.rand(2, 1, 5, 7) > 0.3, sinks=leaf(2)),
    ),
    "chunked attention, dropout": ("chunked_attention", lambda: chunked_case(None, p=0.3)),
    "chunked attention backward": ("chunked_attention_backward", chunked_backward_case),
    "disentangled": ("disentangled_attention", lambda: disentangled_case(False)),
    "disentangled, packed": ("disentangled_attention", lambda: disentangled_case(True, 0.3)),
    "disentangled backward": (
        "disentangled_attention_backward", lambda: disentangled_backward_case(False),
    ),
    "disentangled ATen, packed": (
        "disentangled_attention_aten", lambda: disentangled_case(True, 0.3),
    ),
    "disentangled ATen backward": (
        "disentangled_attention_aten_backward", lambda: disentangled_backward_case(False, True),
    ),
    "packed ATen": ("packed_attention_aten", lambda: packed_aten_case(False, seed=seed(), p=0.3)),
    "packed ATen, log-sum-exp, learned": (
        "packed_attention_aten", lambda: packed_aten_case(True, table=leaf(2, 5), softcap=2.0),
    ),
    "packed ATen backward": (
        "packed_attention_aten_backward",
        lambda: packed_aten_backward_case([*OF_HEADS_ALONE[:5], *[True] * 3], with_lse=True),
    ),
    "packed ATen backward, frozen": (
        "packed_attention_aten_backward",
        lambda: packed_aten_backward_case([False, *OF_HEADS_ALONE[1:]]),
    ),
    "weights": ("attention_weights", lambda: weights_case(False, **learned())),
    "weights, averaged": ("attention_weights", lambda: weights_case(True, torch.bfloat16)),
    "weights backward": (
        "attention_weights_backward", lambda: weights_backward_case([True] * 7, **learned()),
    ),
    "weights backward, frozen": (
        "attention_weights_backward",
        lambda: weights_backward_case([False, True] * 3 + [False], **learned()),
    ),
    "pack": ("gather_rows", lambda: (leaf(3, 4), torch.tensor([0, 2]), torch.tensor([0, -1, 1]))),
    "unpack": ("gather_rows", lambda: (leaf(2, 4), torch.tensor([0, -1, 1]), torch.tensor([0, 2]))),
    "embedding": ("embedding_norm", embedding_case),
    "embedding, dropout": ("embedding_norm", lambda: embedding_case(0.5, torch.bfloat16)),
    "embedding backward": (
        "embedding_norm_backward", lambda: embedding_backward_case([True, True, False]),
    ),
    "embedding backward, frozen tables": (
        "embedding_norm_backward", lambda: embedding_backward_case([False, True, True]),
    ),
    "row and column log-sum-exp": ("row_and_column_lse", lambda: pairs_case(False, "triton")),
    "row and column log-sum-exp, ATen": (
        "row_and_column_lse", lambda: pairs_case(False, "torch"),
    ),
    "softplus sums": ("softplus_sums", lambda: pairs_case(True, "triton")),
    "softplus sums, ATen": ("softplus_sums", lambda: pairs_case(True, "torch")),
    "pairs backward": (
        "pairs_backward", lambda: pairs_backward_case(False, [True, True, True, False], "triton"),
    ),
    "pairs backward, sigmoid, frozen": (
        "pairs_backward", lambda: pairs_backward_case(True, [False, True, False, True], "triton"),
    ),
    "pairs backward, ATen": (
        "pairs_backward", lambda: pairs_backward_case(True, [True, False, True, True], "torch"),
    ),
    "cross entropy": ("cross_entropy", lambda: cross_entropy_case("none")),
    "cross entropy, mean": ("cross_entropy", lambda: cross_entropy_case("mean")),
    "cross entropy backward": (
        "cross_entropy_backward", lambda: cross_entropy_backward_case("none"),
    ),
    "cross entropy backward, mean": (
        "cross_entropy_backward", lambda: cross_entropy_backward_case("mean"),
    ),
    "projection": ("linear_cross_entropy", lambda: projection_case("mean")),
    "projection, each row": ("linear_cross_entropy", lambda: projection_case("none")),
    "projection ATen": ("linear_cross_entropy", lambda: projection_case("sum", triton=False)),
    "projection backward": (
        "linear_cross_entropy_backward",
        lambda: projection_backward_case("none", [True, True, True]),
    ),
    "projection backward, frozen": (
        "linear_cross_entropy_backward",
        lambda: projection_backward_case("mean", [False, True, False]),
    ),
    "projection scaled": (
        "linear_cross_entropy_scaled",
        lambda: (torch.randn(()), torch.randn(4, 3), None, torch.randn(6)),
    ),
    "merge": ("merge_attention_states", states),
    "merge backward": (
        "merge_attention_states_backward",
        lambda: (torch.randn(2, 3, 4), torch.randn(2, 3), *detached(states())),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_opcheck(case: str, device: str) -> None:
    name, arguments = CASES[case]
    with torch.device(device):  # a backward's case runs the forward
        given = arguments()
    torch.library.opcheck(getattr(torch.ops.fusedformer, name).default, tuple(given))


def test_every_registered_op_is_checked() -> None:
    registered = {
        name.split("::")[1].split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("fusedformer::")
    }
    assert registered == {name for name, _ in CASES.values()}
