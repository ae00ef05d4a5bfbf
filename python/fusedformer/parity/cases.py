"""Every public op: our function, stock torch's composition, the definition, and a named grid."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from fusedformer import functional, reference

Function = Callable[..., Any]


@dataclass(frozen=True)
class Op:
    """One op three times; each takes the tensors and settings of a case by name."""

    name: str
    candidate: Function
    stock: Function
    truth: Function


@dataclass(frozen=True)
class Case:
    """Inputs of an op.

    Attributes:
        op: what is called.
        name: the regime that this case stands for.
        make: from a generator the tensors by argument name: float32, cast to the dtype under
            test and given a gradient; or boolean or integer, passed as they are.
        settings: further keyword arguments.
        quick: whether ``--quick`` keeps it.
    """

    op: Op
    name: str
    make: Callable[[Generator], dict[str, Tensor]]
    settings: dict[str, Any] = field(default_factory=dict)
    quick: bool = False


def all_cases() -> list[Case]:
    """The grid: small enough for Triton's interpreter, each case another way through a kernel."""
    return [
        *_softmax_cases(), *_norm_cases(), *_activation_cases(), *_attention_cases(),
        *_packing_cases(), *_embedding_cases(), *_contrastive_cases(), *_cross_entropy_cases(),
    ]  # fmt: skip


def _shapes(**shapes: tuple[int, ...]) -> Callable[[Generator], dict[str, Tensor]]:
    """Normal random tensors of these shapes."""

    def make(generator: Generator) -> dict[str, Tensor]:
        return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}

    return make


# softmax and log_softmax


def _stock_scores(input: Tensor, scale: float, mask: Tensor | None, is_causal: bool) -> Tensor:
    scores = input * scale
    if mask is not None:
        keep = mask.dtype == torch.bool
        scores = scores.masked_fill(~mask, -torch.inf) if keep else scores + mask
    if is_causal:
        ones = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device)
        scores = scores.masked_fill(ones.triu(1), -torch.inf)
    return scores


def _stock_softmax(function: Function) -> Function:
    def stock(
        input: Tensor,
        dim: int,
        scale: float = 1.0,
        mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Any:
        return function(_stock_scores(input, scale, mask, is_causal), dim)

    return stock


def _softmax_cases() -> Iterator[Case]:
    for name in ("softmax", "log_softmax"):
        op = Op(
            name,
            getattr(functional, name),
            _stock_softmax(getattr(F, name)),
            getattr(reference, name),
        )
        last = {"dim": -1}
        yield Case(op, "prime row", _shapes(input=(7, 127)), last, quick=True)
        yield Case(op, "one past a tile", _shapes(input=(3, 1025)), last)
        yield Case(op, "strided dimension", _shapes(input=(5, 9, 6)), {"dim": 1})
        yield Case(
            op,
            "broadcast additive mask, scaled",
            _shapes(input=(2, 3, 5, 17), mask=(1, 3, 1, 17)),
            {**last, "scale": 0.3},
        )
        if name == "softmax":  # a masked logarithm is -inf, which has no error to measure
            yield Case(op, "boolean mask", _boolean_mask, last)
            yield Case(op, "causal", _shapes(input=(2, 19, 19)), {**last, "is_causal": True})


def _boolean_mask(generator: Generator) -> dict[str, Tensor]:
    mask = torch.rand(4, 1, 33, generator=generator) < 0.7
    mask[..., 0] = True
    return {"input": torch.randn(4, 6, 33, generator=generator), "mask": mask}


# norms, and what is fused with them


def _stock_dropout_add(
    input: Tensor, residual: Tensor, *, input_bias: Tensor | None = None
) -> Tensor:
    return (input if input_bias is None else input + input_bias) + residual


def _stock_added_norm(norm: Function) -> Function:
    def stock(
        input: Tensor,
        residual: Tensor,
        normalized_shape: tuple[int, ...],
        *args: Any,
        input_bias: Tensor | None = None,
        return_sum: bool = False,
        **settings: Any,
    ) -> Any:
        total = _stock_dropout_add(input, residual, input_bias=input_bias)
        normed = norm(total, normalized_shape, *args, **settings)
        return (normed, total) if return_sum else normed

    return stock


def _true_added_norm(function: Function) -> Function:
    """The definition returns norm and sum always."""

    def truth(*args: Any, return_sum: bool = False, **settings: Any) -> Any:
        both = function(*args, **settings)
        return both if return_sum else both[0]

    return truth


def _norm_cases() -> Iterator[Case]:
    for name, biased in (("layer_norm", True), ("rms_norm", False)):
        op = Op(name, getattr(functional, name), getattr(F, name), getattr(reference, name))
        for case, rows, width, quick in (
            ("width of MiniLM", 9, 384, True),
            ("prime width", 6, 131, False),
            ("one past a tile", 3, 1025, False),
        ):
            affine = {"weight": (width,), **({"bias": (width,)} if biased else {})}
            tensors = _shapes(input=(rows, width), **affine)
            yield Case(op, case, tensors, {"normalized_shape": (width,)}, quick)
        plain = {"normalized_shape": (3, 20), "eps": 1e-3}
        yield Case(op, "two dimensions, no weight", _shapes(input=(4, 3, 20)), plain)

        fused = f"dropout_add_{name}"
        op = Op(
            fused,
            getattr(functional, fused),
            _stock_added_norm(getattr(F, name)),
            _true_added_norm(getattr(reference, fused)),
        )
        settings: dict[str, Any] = {"normalized_shape": (96,)}
        affine = {"weight": (96,), **({"bias": (96,)} if biased else {})}
        both = {"input": (2, 7, 96), "residual": (2, 7, 96)}
        yield Case(
            op,
            "bias and residual",
            _shapes(**both, input_bias=(96,), **affine),
            settings,
            quick=True,
        )
        yield Case(op, "sum returned", _shapes(**both, **affine), {**settings, "return_sum": True})
    op = Op("dropout_add", functional.dropout_add, _stock_dropout_add, reference.dropout_add)
    shapes = _shapes(input=(5, 77), residual=(5, 77), input_bias=(77,))
    yield Case(op, "bias and residual", shapes, quick=True)


# bias + activation


def _stock_activation(input: Tensor, bias: Tensor, activation: str) -> Tensor:
    x = input + bias
    if activation.startswith("gelu"):
        return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")
    if activation == "quick_gelu":
        return x * torch.sigmoid(1.702 * x)
    return F.relu(x) if activation == "relu" else F.silu(x)


def _activation_cases() -> Iterator[Case]:
    op = Op(
        "bias_activation", functional.bias_activation, _stock_activation, reference.bias_activation
    )
    for activation in functional.ACTIVATIONS:
        shapes = _shapes(input=(13, 130), bias=(130,))
        yield Case(op, activation, shapes, {"activation": activation}, activation == "gelu")


# attention


def _stock_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    key_lengths: Tensor | None = None,
    return_lse: bool = False,
    window: tuple[int, int] | None = None,
    alibi_slopes: Tensor | None = None,
    relative_bias: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    **settings: Any,
) -> Any:
    positions = torch.arange(key.shape[-2], device=key.device)
    distance = positions - torch.arange(query.shape[-2], device=key.device)[:, None]
    if key_lengths is not None:
        attn_mask = (positions < key_lengths[:, None])[:, None, None, :]
    if window is not None:
        attn_mask = (distance >= -window[0]) & (distance <= window[1])
    if alibi_slopes is not None:
        attn_mask = -alibi_slopes[:, None, None] * distance.abs()
    if relative_bias is not None:
        radius = relative_bias.shape[1] // 2
        attn_mask = relative_bias[:, radius + distance.clamp(-radius, radius)]
    if softcap is not None:
        scores = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5
        return (softcap * torch.tanh(scores / softcap)).softmax(-1) @ value
    if sinks is not None:
        scores = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5
        column = sinks[:, None, None].expand(*scores.shape[:3], 1)
        return torch.cat((scores, column), -1).softmax(-1)[..., :-1] @ value
    output = F.scaled_dot_product_attention(query, key, value, attn_mask, **settings)
    if not return_lse:
        return output
    # In at least float32, as the log-sum-exp is kept: in half precision it would be no yardstick.
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = query.to(wide) @ key.to(wide).transpose(-2, -1) * query.shape[-1] ** -0.5
    return output, scores.logsumexp(-1)


def _true_attention(*args: Any, return_lse: bool = False, **settings: Any) -> Any:
    both = reference.scaled_dot_product_attention(*args, **settings)
    return both if return_lse else both[0]


def _attention_cases() -> Iterator[Case]:
    op = Op(
        "scaled_dot_product_attention",
        functional.scaled_dot_product_attention,
        _stock_attention,
        _true_attention,
    )
    plain = {"query": (2, 2, 37, 32), "key": (2, 2, 37, 32), "value": (2, 2, 37, 32)}
    cross = {"query": (1, 2, 19, 24), "key": (1, 2, 45, 24), "value": (1, 2, 45, 40)}
    grouped = {"query": (1, 4, 21, 16), "key": (1, 2, 21, 16), "value": (1, 2, 21, 16)}
    yield Case(op, "odd length", _shapes(**plain), quick=True)
    yield Case(op, "causal", _shapes(**plain), {"is_causal": True})
    yield Case(
        op,
        "one past a tile, log-sum-exp",
        _shapes(query=(1, 1, 65, 64), key=(1, 1, 129, 64), value=(1, 1, 129, 64)),
        {"return_lse": True},
    )
    yield Case(op, "Sq != Sk, Ev != E, odd head dim", _shapes(**cross))
    yield Case(op, "broadcast additive mask", _shapes(**cross, attn_mask=(1, 2, 1, 45)))
    yield Case(op, "boolean mask", _attention_mask)
    yield Case(op, "key lengths", _key_lengths)
    yield Case(op, "grouped queries", _shapes(**grouped), {"enable_gqa": True})
    yield Case(op, "window", _shapes(**plain), {"window": (7, 3)})
    yield Case(
        op,
        "ALiBi slopes",
        lambda g: {**_shapes(**plain)(g), "alibi_slopes": torch.tensor([0.25, 0.0625])},
    )
    yield Case(op, "relative bias", _shapes(**plain, relative_bias=(2, 21)))
    yield Case(op, "softcap", _shapes(**plain), {"softcap": 3.0})
    yield Case(op, "sinks", _shapes(**plain, sinks=(2,)))
    yield Case(
        op,
        "few queries, split keys",
        _shapes(query=(1, 2, 3, 16), key=(1, 2, 1100, 16), value=(1, 2, 1100, 16)),
    )
    packed = Op("varlen_attention", functional.varlen_attention, _stock_packed, _true_packed)
    lengths = {"max_seqlen_q": 37, "max_seqlen_k": 37}
    yield Case(packed, "packed", _packed, lengths, quick=True)
    yield Case(packed, "packed, causal", _packed, {**lengths, "is_causal": True})
    merge = Op(
        "merge_attention_states", _with_wide_lse(functional.merge_attention_states),
        _with_wide_lse(_stock_merge), reference.merge_attention_states,
    )  # fmt: skip
    states = _shapes(output1=(2, 37, 16), output2=(2, 37, 16), lse1=(2, 37), lse2=(2, 37))
    yield Case(merge, "two parts", states, quick=True)
    buckets = Op(
        "relative_position_bias", functional.relative_position_bias,
        reference.relative_position_bias, reference.relative_position_bias,
    )  # fmt: skip
    yield Case(buckets, "T5's buckets", _shapes(weight=(32, 4)), {"max_distance": 40}, quick=True)


def _packed(generator: Generator) -> dict[str, Tensor]:
    tensors = _shapes(query=(50, 2, 16), key=(50, 2, 16), value=(50, 2, 16))(generator)
    starts = torch.tensor([0, 12, 12, 49, 50])
    return {**tensors, "cu_seqlens_q": starts, "cu_seqlens_k": starts}


def _stock_packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    is_causal: bool = False,
    **settings: Any,
) -> Tensor:
    lengths = cu_seqlens_q.diff().tolist()
    heads_first = (torch.split(t.transpose(0, 1), lengths, 1) for t in (query, key, value))
    outputs = [
        F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
        for q, k, v in zip(*heads_first, strict=True)
    ]
    return torch.cat(outputs, 1).transpose(0, 1)


def _true_packed(**arguments: Any) -> Tensor:
    return reference.varlen_attention(**arguments)[0]


def _with_wide_lse(merge: Function) -> Function:
    """``merge`` with log-sum-exps in at least float32, as attention returns them."""

    def call(output1: Tensor, lse1: Tensor, output2: Tensor, lse2: Tensor) -> Any:
        wide = torch.promote_types(lse1.dtype, torch.float32)
        return merge(output1, lse1.to(wide), output2, lse2.to(wide))

    return call


def _stock_merge(output1: Tensor, lse1: Tensor, output2: Tensor, lse2: Tensor) -> Any:
    lse = torch.logaddexp(lse1, lse2)
    first, second = ((part - lse).exp()[..., None] for part in (lse1, lse2))
    return (output1 * first + output2 * second).to(output1.dtype), lse


def _attention_mask(generator: Generator) -> dict[str, Tensor]:
    mask = torch.rand(2, 1, 19, 37, generator=generator) < 0.6
    mask[..., 3] = True  # stock torch has no gradient for a query without keys
    tensors = _shapes(query=(2, 2, 19, 16), key=(2, 2, 37, 16), value=(2, 2, 37, 16))(generator)
    return {**tensors, "attn_mask": mask}


def _key_lengths(generator: Generator) -> dict[str, Tensor]:
    tensors = _shapes(query=(3, 2, 23, 16), key=(3, 2, 23, 16), value=(3, 2, 23, 16))(generator)
    return {**tensors, "key_lengths": torch.tensor([23, 1, 14])}


# packing


def _packing_cases() -> Iterator[Case]:
    def packed(input: Tensor, keep: Tensor) -> Tensor:
        return functional.pack(input, functional.Packing.of(keep))

    def unpacked(input: Tensor, keep: Tensor) -> Tensor:
        return functional.unpack(input, functional.Packing.of(keep))

    def unpadded(generator: Generator) -> dict[str, Tensor]:
        return {"input": torch.randn(3, 7, 20, generator=generator), "keep": keep}

    def rows(generator: Generator) -> dict[str, Tensor]:
        return {"input": torch.randn(int(keep.sum()), 20, generator=generator), "keep": keep}

    keep = torch.arange(21).reshape(3, 7) % 3 != 1
    pack = Op("pack", packed, reference.pack, reference.pack)
    unpack = Op("unpack", unpacked, reference.unpack, reference.unpack)
    yield Case(pack, "holes", unpadded, quick=True)
    yield Case(unpack, "holes", rows, quick=True)


# embeddings


def stock_embedding(
    input: Tensor,
    weight: Tensor,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    position_ids: Tensor | None = None,
    position_weight: Tensor | None = None,
    token_type_ids: Tensor | None = None,
    token_type_weight: Tensor | None = None,
    padding_idx: int | None = None,
) -> Tensor:
    total = F.embedding(input, weight, padding_idx)
    if token_type_weight is not None:
        ids = torch.zeros_like(input) if token_type_ids is None else token_type_ids
        total = total + F.embedding(ids, token_type_weight)
    if position_ids is not None and position_weight is not None:
        total = total + F.embedding(position_ids, position_weight)
    return F.layer_norm(total, weight.shape[1:], norm_weight, norm_bias, eps)


def _embedding_cases() -> Iterator[Case]:
    def ids(generator: Generator) -> dict[str, Tensor]:
        counts = {"input": 50, "position_ids": 16, "token_type_ids": 2}
        return {n: torch.randint(c, (3, 9), generator=generator) for n, c in counts.items()}

    def bert(generator: Generator) -> dict[str, Tensor]:
        tables = _shapes(
            weight=(50, 96),
            position_weight=(16, 96),
            token_type_weight=(2, 96),
            norm_weight=(96,),
            norm_bias=(96,),
        )
        return {**ids(generator), **tables(generator)}

    def tokens(generator: Generator) -> dict[str, Tensor]:
        return {"input": ids(generator)["input"], **_shapes(weight=(50, 131))(generator)}

    name = "embedding_layer_norm"
    op = Op(name, getattr(functional, name), stock_embedding, getattr(reference, name))
    yield Case(op, "token, position and type", bert, quick=True)
    yield Case(op, "tokens alone, padding", tokens, {"padding_idx": 3})


# contrastive losses


def stock_contrastive(
    a: Tensor, b: Tensor, logit_scale: Tensor, label_offset: int = 0, reduction: str = "mean"
) -> Tensor:
    """As CLIP's training computes it under autocast: scores in their dtype, losses in float32."""
    logits = (logit_scale * (a @ b.T)).to(torch.promote_types(a.dtype, torch.float32))
    labels = torch.arange(label_offset, label_offset + a.shape[0], device=a.device)
    rows = F.cross_entropy(logits, labels, reduction=reduction)
    own = torch.arange(a.shape[0], device=a.device)
    columns = F.cross_entropy(logits.T[labels], own, reduction=reduction)
    return (rows + columns) / 2


def stock_sigmoid_contrastive(
    a: Tensor,
    b: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    label_offset: int = 0,
    reduction: str = "mean",
) -> Tensor:
    """As SigLIP's is, with every pair's sign in a matrix."""
    logits = logit_scale * (a @ b.T) + logit_bias
    logits = logits.to(torch.promote_types(a.dtype, torch.float32))
    signs = -torch.ones_like(logits)
    signs.diagonal(label_offset).fill_(1.0)
    losses = -F.logsigmoid(signs * logits).sum(1)
    return losses if reduction == "none" else losses.mean()


def _contrastive_cases() -> Iterator[Case]:
    def pairs(rows: int, columns: int, dims: int, scale: float, **scalars: float) -> Any:
        def make(generator: Generator) -> dict[str, Tensor]:
            shapes = _shapes(a=(rows, dims), b=(columns, dims))
            tensors = {n: F.normalize(t, dim=1) for n, t in shapes(generator).items()}
            given = {"logit_scale": scale, **scalars}
            return {**tensors, **{n: torch.tensor(value) for n, value in given.items()}}

        return make

    for name, stock, scalars in (
        ("contrastive_loss", stock_contrastive, {}),
        ("sigmoid_contrastive_loss", stock_sigmoid_contrastive, {"logit_bias": -4.0}),
    ):
        op = Op(name, getattr(functional, name), stock, getattr(reference, name))
        yield Case(op, "prime rows", pairs(37, 37, 48, 14.3, **scalars), quick=True)
        shifted = {"label_offset": 70, "reduction": "none"}
        yield Case(op, "more columns, shifted", pairs(67, 140, 130, 14.3, **scalars), shifted)
        yield Case(op, "CLIP's largest scale", pairs(129, 129, 64, 100.0, **scalars))


# losses


def _stock_linear_cross_entropy(
    input: Tensor, linear_weight: Tensor, target: Tensor, linear_bias: Tensor, **settings: Any
) -> Tensor:
    return F.cross_entropy(F.linear(input, linear_weight, linear_bias), target, **settings)


def _cross_entropy_cases() -> Iterator[Case]:
    def classes(generator: Generator, rows: int, count: int) -> dict[str, Tensor]:
        target = torch.randint(count, (rows,), generator=generator)
        return {"target": target.masked_fill(torch.arange(rows) % 5 == 1, -100)}

    def logits(rows: int, count: int) -> Callable[[Generator], dict[str, Tensor]]:
        tensors = _shapes(input=(rows, count))
        return lambda generator: {**tensors(generator), **classes(generator, rows, count)}

    def hidden(rows: int, count: int, width: int) -> Callable[[Generator], dict[str, Tensor]]:
        tensors = _shapes(input=(rows, width), linear_weight=(count, width), linear_bias=(count,))
        return lambda generator: {**tensors(generator), **classes(generator, rows, count)}

    op = Op("cross_entropy", functional.cross_entropy, F.cross_entropy, reference.cross_entropy)
    yield Case(op, "prime row", logits(7, 127), quick=True)
    yield Case(op, "one past a tile", logits(3, 4097), {"reduction": "none"})
    yield Case(op, "label smoothing", logits(9, 50), {"label_smoothing": 0.1})
    name = "linear_cross_entropy"
    op = Op(name, getattr(functional, name), _stock_linear_cross_entropy, getattr(reference, name))
    yield Case(op, "chunks of rows", hidden(150, 70, 16), quick=True)
    yield Case(op, "blocks of classes", hidden(30, 200, 16), {"reduction": "none"}, quick=True)
    yield Case(op, "label smoothing", hidden(11, 90, 24), {"label_smoothing": 0.1})
