"""The table of ``test_bad_input.py``: each row is one call that is right but for one argument."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fusedformer import backend, functional

NAN = float("nan")
HALF = torch.float16


def t(*shape: int, dtype: torch.dtype = torch.float32, device: str | None = None) -> Tensor:
    """A tensor of ones, on the device that the calls run on unless another is named."""
    return torch.ones(shape, dtype=dtype, device=device or DEVICE)


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ATTENTIONS = ("scaled_dot_product_attention", "varlen_attention")
INT, COMPLEX, FLOAT8 = torch.int64, torch.complex64, torch.float8_e4m3fn


def packing() -> functional.Packing:
    """One that is made where no kernel may be launched."""
    with backend("torch"):
        return functional.Packing.of(t(2, 3) > 0)


def good(function: str) -> dict[str, Any]:
    """Arguments that ``function`` takes."""
    softmax = dict(input=t(2, 3, 4), dim=-1, mask=t(3, 4))
    norm = dict(input=t(2, 3, 4), normalized_shape=(4,), weight=t(4))
    fused = dict(residual=t(2, 3, 4), input_bias=t(4), p=0.1)
    arguments: dict[str, dict[str, Any]] = {
        "softmax": softmax,
        "log_softmax": softmax,
        "layer_norm": {**norm, "bias": t(4)},
        "rms_norm": norm,
        "dropout_add_layer_norm": {**norm, **fused, "bias": t(4)},
        "dropout_add_rms_norm": {**norm, **fused},
        "dropout_add": {**fused, "input": t(2, 3, 4)},
        "dropout_scale_add": {**fused, "input": t(2, 3, 4), "scale": t(4)},
        "bias_activation": dict(input=t(2, 3, 4), bias=t(4), activation="gelu", p=0.1),
        "gated_activation": dict(input=t(2, 3, 4), bias=t(4), activation="gelu", p=0.1),
        "rotary_embedding": dict(
            query=t(2, 4, 5, 8),
            key=t(2, 1, 5, 8),
            cos=t(6, 4),
            sin=t(6, 4),
            norm="rms",
            query_weight=t(8),
        ),
        "scaled_dot_product_attention": dict(
            query=t(2, 4, 5, 8), key=t(2, 4, 6, 8), value=t(2, 4, 6, 3)
        ),
        "disentangled_attention": dict(
            query=t(2, 4, 5, 8), key=t(2, 4, 6, 8), value=t(2, 4, 6, 3), position_key=t(4, 8, 8)
        ),
        "merge_attention_states": dict(
            output1=t(2, 5, 8), lse1=t(2, 5), output2=t(2, 5, 8), lse2=t(2, 5)
        ),
        "relative_position_bias": dict(weight=t(32, 4)),
        "pack": dict(input=t(2, 3, 4), packing=packing()),
        "unpack": dict(input=t(6, 4), packing=packing()),
    }
    ids = t(2, 3, dtype=INT)
    arguments["embedding_layer_norm"] = dict(
        input=ids, weight=t(5, 4), norm_weight=t(4), norm_bias=t(4), position_ids=ids,
        position_weight=t(3, 4), token_type_ids=ids, token_type_weight=t(2, 4), p=0.1,
    )  # fmt: skip
    arguments["contrastive_loss"] = dict(a=t(2, 8), b=t(3, 8), logit_scale=t(), label_offset=1)
    arguments["sigmoid_contrastive_loss"] = dict(
        a=t(2, 8), b=t(3, 8), logit_scale=t(1), logit_bias=t()
    )
    arguments["cross_entropy"] = dict(
        input=t(2, 5, 3), target=t(2, 3, dtype=INT), weight=t(5), label_smoothing=0.1
    )
    arguments["linear_cross_entropy"] = dict(
        input=t(2, 3, 4), linear_weight=t(5, 4), target=t(2, 3, dtype=INT), linear_bias=t(5),
        weight=t(5), label_smoothing=0.1,
    )  # fmt: skip
    starts = torch.tensor([0, 2, 5], device=DEVICE)
    arguments["varlen_attention"] = dict(
        query=t(5, 4, 8), key=t(5, 4, 8), value=t(5, 4, 3), cu_seqlens_q=starts,
        cu_seqlens_k=starts, max_seqlen_q=3, max_seqlen_k=3,
    )  # fmt: skip
    return dict(arguments[function])


def good_leaves(function: str) -> tuple[dict[str, Any], list[Tensor]]:
    """Return :func:`good`, and those of them that may learn, which require gradients."""
    arguments = good(function)
    fixed = {"cos", "sin"} | ({"weight"} if "cross_entropy" in function else set())
    leaves = [
        value.requires_grad_()
        for name, value in arguments.items()
        if name not in fixed and isinstance(value, Tensor) and value.is_floating_point()
    ]
    return arguments, leaves


Row = tuple[str, dict[str, Any], type[Exception], str]


def not_tensors() -> Iterator[Row]:
    """Every tensor argument of every function: a list, and a tensor that is sparse."""
    for function in functional.__all__:
        names = [name for name, value in good(function).items() if isinstance(value, Tensor)]
        if function in ATTENTIONS:
            names += ["attn_mask", "key_lengths", "alibi_slopes", "relative_bias", "sinks"]
            names.append("relative_bias_gate")
        for name in names:
            yield function, {name: [1.0]}, TypeError, f"'{name}' must be Tensor, not list"
            sparse = t(2, 3).to_sparse()
            yield function, {name: sparse}, TypeError, f"'{name}' to be dense"


def dtypes_and_devices() -> Iterator[Row]:
    """Every tensor argument: of a dtype that cannot be computed with, and on another device."""
    for function in functional.__all__:
        for name, value in good(function).items():
            if not isinstance(value, Tensor):
                continue
            meta = {name: value.to("meta")}
            if value.is_floating_point():
                for dtype in (INT, COMPLEX, FLOAT8):
                    changed = {name: value.to(dtype)}
                    yield function, changed, TypeError, f"'{name}'.*{dtype}"
            if function != "relative_position_bias":  # of one tensor
                yield function, meta, ValueError, f"one device.*'{name}' on "


def probabilities() -> Iterator[Row]:
    for function in functional.__all__:
        name = "dropout_p" if function in ATTENTIONS else "p"
        if name in good(function) or name == "dropout_p":
            for value in (-0.1, 1.1, NAN, float("inf")):
                yield function, {name: value}, ValueError, rf"'{name}' to be in \[0, 1\].*{value}"
            for other in ("0.1", None, t()):
                yield function, {name: other}, TypeError, f"'{name}' to be a number"


def softmaxes() -> Iterator[Row]:
    for function in ("softmax", "log_softmax"):
        rows: list[tuple[dict[str, Any], type[Exception], str]] = [
            ({"dim": 3}, IndexError, "'dim' out of range"),
            ({"dim": -4}, IndexError, "'dim' out of range"),
            ({"dim": 1, "input": t(), "mask": None}, IndexError, "'dim' out of range"),
            ({"dim": 1.0}, TypeError, "'dim' to be an int, but got float"),
            ({"dtype": INT}, TypeError, "'dtype' to be floating-point"),
            ({"dtype": COMPLEX}, TypeError, "'dtype' to be floating-point"),
            ({"dtype": "float32"}, TypeError, "'dtype' to be floating-point"),
            ({"input": t(2, 3, 4, dtype=COMPLEX), "dtype": HALF}, TypeError, "'input' to be real"),
            ({"scale": None}, TypeError, "'scale' to be a number"),
            ({"scale": t()}, TypeError, "'scale' to be a number"),
            ({"mask": t(3, 5)}, ValueError, r"'mask' to broadcast to \(2, 3, 4\).*\(3, 5\)"),
            ({"mask": t(1, 2, 3, 4)}, ValueError, "'mask' to broadcast"),  # beyond the input
            ({"is_causal": True, "dim": 1}, ValueError, "is_causal=True needs .* the last"),
            ({"is_causal": True, "input": t(4), "mask": None}, ValueError, "at least 2 dimensions"),
        ]
        for changes, error, message in rows:
            yield function, changes, error, message


def norms() -> Iterator[Row]:
    for function in functional.__all__:
        if "normalized_shape" not in good(function):
            continue
        for shape in ((5,), (2, 4), (2, 3, 4, 1), (), (-4,)):
            yield function, {"normalized_shape": shape}, ValueError, "'normalized_shape'"
        for other in (4.0, "4", None):
            message = "'normalized_shape' to be a sequence"
            yield function, {"normalized_shape": other}, TypeError, message
        yield function, {"input": t()}, ValueError, "'input' to have at least 1 dimension"
        yield function, {"eps": "1e-5"}, TypeError, "'eps' to be a number"
        for name in ("weight", "bias"):
            if name in good(function):
                message = rf"'{name}' to have shape \(4,\)"
                yield function, {name: t(3)}, ValueError, message
                yield function, {name: t(1)}, ValueError, message  # no broadcasting, as in torch
    yield "layer_norm", {"eps": None}, TypeError, "'eps' to be a number"


def fused_steps() -> Iterator[Row]:
    for function in functional.__all__:
        if "residual" not in good(function):
            continue
        shape = r"'residual' to have shape \(2, 3, 4\)"
        yield function, {"residual": t(4)}, ValueError, shape  # no broadcasting: a slip, mostly
        yield function, {"residual": t(2, 4, 3)}, ValueError, shape
        yield function, {"residual": t(2, 3, 4).int()}, TypeError, "'residual' .* floating-point"
        yield function, {"input_bias": t(3, 4)}, ValueError, r"'input_bias' to have shape \(4,\)"
    yield "dropout_add", {"input": t()}, ValueError, "'input' to have at least 1 dimension"
    function = "dropout_scale_add"
    yield function, {"scale": t(3)}, ValueError, r"'scale' to have shape \(4,\)"
    yield function, {"scale": t(4).int()}, TypeError, "'scale' .* floating-point"
    yield function, {"sample_scale": t(3)}, ValueError, r"'sample_scale' to have shape \(2,\)"
    function = "disentangled_attention"
    yield function, {"key": t(2, 4, 6, 7)}, ValueError, "'query' and 'key' to have the same last"
    yield (
        function,
        {"key": t(1, 4, 6, 8)},
        ValueError,
        r"\[batch, heads, length, dim\] of one batch",
    )
    yield function, {"position_key": None}, ValueError, "'position_key' or 'position_query'"
    yield function, {"position_key": t(4, 8, 7)}, ValueError, r"shape \(4, 2 \* span, 8\)"
    yield function, {"position_query": t(4, 6, 8)}, ValueError, "with one span for all"
    yield function, {"position_query": t(4, 8, 8).half()}, TypeError, "the dtype of 'query'"
    yield (
        function,
        {"max_distance": 3},
        ValueError,
        "an int above 3 with a multiple of 4 buckets, 8 or more",
    )
    yield function, {"cu_seqlens_q": t(3, dtype=INT)}, ValueError, "expected all of 'cu_seqlens_q'"
    yield function, {"key_mask": t(2, 5) > 0}, ValueError, r"'key_mask' to have shape \(2, 6\)"
    yield function, {"dropout_p": 1.5}, ValueError, r"'dropout_p' to be in \[0, 1\]"
    function = "rotary_embedding"
    yield function, {"key": t(2, 1, 6, 8)}, ValueError, "'key' to have the shape of 'query'"
    yield function, {"key": t(2, 1, 5, 8).half()}, TypeError, "'key' to have the dtype of 'query'"
    yield function, {"query": t(5, 8)}, ValueError, r"'query' to be \[batch, heads, length, dim\]"
    yield function, {"sin": t(6, 3)}, ValueError, "'sin' to have the shape and dtype of 'cos'"
    wide = {"cos": t(6, 5), "sin": t(6, 5)}
    yield function, wide, ValueError, r"'query' to have 2 \* 5 \(pairs of 'cos'\)"
    few = {"cos": t(4, 4), "sin": t(4, 4)}
    yield function, few, ValueError, "'cos' to have a row for each of 5 places"
    yield function, {"cos": t(3, 6, 4)}, ValueError, r"'cos' to be \[rows, pairs\]"
    positions = {"positions": t(2, 4, dtype=INT)}
    yield function, positions, ValueError, r"'positions' to have shape \(2, 5\)"
    yield function, {"positions": t(2, 5)}, TypeError, "'positions' to be int32 or int64"
    yield function, {"norm": "group"}, ValueError, "'norm' to be 'rms', 'layer' or None"
    yield function, {"norm": None}, ValueError, "'norm' to be 'rms' or 'layer' with 'query_weight'"
    yield function, {"key_weight": t(7)}, ValueError, r"'key_weight' to have shape \(8,\)"
    yield function, {"eps": "1"}, TypeError, "'eps'"
    function = "gated_activation"
    yield function, {"activates": "third"}, ValueError, "'activates' .* but got 'third'"
    odd = {"input": t(2, 3), "bias": None}
    yield function, odd, ValueError, r"'input' to be even, but got shape \(2, 3\)"
    yield function, {"bias": t(2)}, ValueError, r"'bias' to have shape \(4,\)"
    yield function, {"activation": "tanh"}, ValueError, "'activation' .* but got 'tanh'"
    function = "bias_activation"
    yield function, {"activation": "tanh"}, ValueError, "'activation' .* but got 'tanh'"
    yield function, {"activation": None}, ValueError, "'activation' .* but got None"
    yield function, {"bias": t(3)}, ValueError, r"'bias' to have shape \(4,\)"
    yield function, {"input": t()}, ValueError, "'input' to have at least 1 dimension"


def attention() -> Iterator[Row]:
    rows: list[tuple[dict[str, Any], type[Exception], str]] = [
        # Ranks and sizes of query, key and value.
        ({"query": t(8)}, ValueError, "'query' to have at least 2 dimensions"),
        ({"key": t(8)}, ValueError, "'key' to have at least 2 dimensions"),
        ({"query": t(3, 5, 8)}, ValueError, "batch and head dimensions to broadcast"),
        ({"key": t(2, 4, 6, 7)}, ValueError, "'query' and 'key' .* last dimension.* 8 and 7"),
        ({"value": t(2, 4, 7, 3)}, ValueError, "'key' and 'value' .* sequence length.* 6 and 7"),
        ({"query": t(3, 4, 5, 8)}, ValueError, "batch and head dimensions to broadcast"),
        ({"key": t(2, 2, 6, 8)}, ValueError, "to broadcast.* set enable_gqa=True"),
        ({"query": t(2, 4, 5, 8, dtype=HALF)}, TypeError, "'query', 'key' and 'value' .* dtype"),
        # Grouped heads.
        (
            {"enable_gqa": True, "key": t(2, 3, 6, 8), "value": t(2, 3, 6, 3)},
            ValueError, "heads of 'key' and 'value' .* divide that of 'query', 4, but got 3 and 3",
        ),
        (
            {"enable_gqa": True, "key": t(2, 2, 6, 8)},
            ValueError, "heads of 'key' and 'value' to be equal .* 2 and 4",
        ),
        (
            {"enable_gqa": True, "query": t(5, 8), "key": t(6, 8), "value": t(6, 3)},
            ValueError, "enable_gqa=True needs a dimension of heads",
        ),
        # Masks.
        ({"attn_mask": t(5, 7)}, ValueError, r"'attn_mask' to broadcast to \(2, 4, 5, 6\)"),
        ({"attn_mask": t(3, 1, 5, 6)}, ValueError, "'attn_mask' to broadcast"),
        ({"attn_mask": t(1, 2, 4, 5, 6)}, ValueError, "'attn_mask' to broadcast"),
        ({"attn_mask": t(5, 6, dtype=INT)}, TypeError, "'attn_mask' to be boolean .*int64"),
        ({"attn_mask": t(5, 6, dtype=COMPLEX)}, TypeError, "'attn_mask' to be boolean .*complex64"),
        ({"attn_mask": t(5, 6, dtype=HALF)}, TypeError, "'attn_mask' to be float32 or .*float16"),
        ({"attn_mask": t(5, 6, device="meta")}, ValueError, "one device.*'attn_mask' on meta"),
        ({"key_mask": t(2, 5) > 0}, ValueError, r"'key_mask' to have shape \(2, 6\)"),
        ({"key_mask": t(6) > 0}, ValueError, r"'key_mask' to have shape \(2, 6\)"),
        ({"key_mask": t(1, 6) > 0}, ValueError, r"'key_mask' to have shape \(2, 6\)"),
        ({"key_mask": t(2, 6)}, TypeError, "'key_mask' to be boolean"),
        ({"key_mask": t(2, 6, device="meta") > 0}, ValueError, "one device.*'key_mask' on meta"),
        ({"key_lengths": t(3, dtype=INT)}, ValueError, r"'key_lengths' to have shape \(2,\)"),
        ({"key_lengths": t(2, 1, dtype=INT)}, ValueError, r"'key_lengths' to have shape \(2,\)"),
        ({"key_lengths": t(2)}, TypeError, "'key_lengths' to be int32 or int64"),
        ({"key_lengths": t(2) > 0}, TypeError, "'key_lengths' to be int32 or int64"),
        (
            {"key_lengths": t(2, dtype=INT, device="meta")},
            ValueError, "one device.*'key_lengths' on meta",
        ),
        # Numbers.
        ({"scale": "1"}, TypeError, "'scale' to be a number"),
        ({"scale": t()}, TypeError, "'scale' to be a number"),  # it would get no gradient
    ]  # fmt: skip
    for changes, error, message in rows:
        yield "scaled_dot_product_attention", changes, error, message


def attention_terms() -> Iterator[Row]:
    """What padded and packed attention share: 2 sequences of 4 heads."""
    rows: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"window": 3}, TypeError, r"'window' to be a pair of ints \(left, right\), but got 3"),
        ({"window": (1, 2, 3)}, TypeError, "'window' to be a pair of ints"),
        ({"window": (1.0, 2)}, TypeError, "'window' to be a pair of ints"),
        ({"window": (-2, 0)}, ValueError, r"'window' to be at least -1 .*\(-2, 0\)"),
        ({"softcap": 0.0}, ValueError, "'softcap' to be positive.* but got 0.0"),
        ({"softcap": NAN}, ValueError, "'softcap' to be positive"),
        ({"softcap": "1"}, TypeError, "'softcap' to be a number"),
        ({"causal_alignment": "top"}, ValueError, "'causal_alignment' .* but got 'top'"),
        ({"alibi_slopes": t(3)}, ValueError, r"'alibi_slopes' to have shape \(4,\).*\(3,\)"),
        ({"alibi_slopes": t(1, 4)}, ValueError, r"'alibi_slopes' to have shape \(4,\)"),
        ({"alibi_slopes": t(4, dtype=INT)}, TypeError, "'alibi_slopes' .*int64"),
        ({"alibi_slopes": t(4, device="meta")}, ValueError, "one device.*'alibi_slopes' on meta"),
        ({"relative_bias": t(4, 8)}, ValueError, r"'relative_bias' to have shape .*\(4, 8\)"),
        ({"relative_bias": t(9)}, ValueError, "'relative_bias' to have shape"),
        ({"relative_bias": t(2, 9)}, ValueError, "'relative_bias' to have shape .* heads = 4"),
        ({"relative_bias": t(4, 9, dtype=INT)}, TypeError, "'relative_bias' .*int64"),
        ({"sinks": t(3)}, ValueError, r"'sinks' to have shape \(4,\) \(heads\), but got \(3,\)"),
        ({"sinks": t(1)}, ValueError, r"'sinks' to have shape \(4,\)"),
        ({"sinks": t(2, 4)}, ValueError, r"'sinks' to have shape \(4,\)"),
        ({"sinks": t(4, dtype=INT)}, TypeError, "'sinks' .*int64"),
        ({"sinks": t(4, device="meta")}, ValueError, "one device.*'sinks' on meta"),
        ({"scale": "1"}, TypeError, "'scale' to be a number"),
        ({"key_lengths": t(3, dtype=INT)}, ValueError, r"'key_lengths' to have shape \(2,\)"),
    ]
    for function in ATTENTIONS:
        for changes, error, message in rows:
            yield function, changes, error, message
        shape = good(function)["query"].shape[:-1]
        for gate, error, message in (
            (t(*shape[:-1], 9), ValueError, r"'relative_bias_gate' to have shape \("),
            (t(*shape, 1), ValueError, r"'relative_bias_gate' to have shape \("),
            (t(*shape, dtype=INT), TypeError, "'relative_bias_gate' .*int64"),
        ):
            changes = {"relative_bias": t(4, 9), "relative_bias_gate": gate}
            yield function, changes, error, message
        message = "'relative_bias' beside 'relative_bias_gate'.* but got None"
        yield function, {"relative_bias_gate": t(*shape)}, ValueError, message
    weights = {"return_weights": "mean"}
    yield ATTENTIONS[0], weights, ValueError, "'return_weights' .* but got 'mean'"


def packed() -> Iterator[Row]:
    def starts(*values: int) -> Tensor:
        return torch.tensor(values, device=DEVICE, dtype=INT)

    rows: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"query": t(5, 8)}, ValueError, "'query' to have at least 3 dimensions"),
        ({"query": t(1, 5, 4, 8)}, ValueError, r"'query' to have shape \[tokens, heads, dim\]"),
        ({"key": t(5, 4, 7)}, ValueError, "'query' and 'key' .* last dimension.* 8 and 7"),
        ({"value": t(6, 4, 3)}, ValueError, "'key' and 'value' .* number of tokens.* 5 and 6"),
        ({"key": t(5, 2, 8), "value": t(5, 2, 3)}, ValueError, "to broadcast.* enable_gqa=True"),
        ({"cu_seqlens_q": t(3)}, TypeError, "'cu_seqlens_q' to be int32 or int64.*float32"),
        ({"cu_seqlens_k": starts(0, 5)}, ValueError, r"'cu_seqlens_k' to have shape .*\(2,\)"),
        ({"cu_seqlens_q": starts()}, ValueError, "'cu_seqlens_q' to have shape"),
        ({"max_seqlen_q": 3.0}, TypeError, "'max_seqlen_q' to be an int, but got float"),
        ({"max_seqlen_k": -1}, ValueError, "'max_seqlen_k' not to be negative"),
        ({"attn_mask": t(4, 3)}, ValueError, r"'attn_mask' to broadcast to \(2, 4, 3, 3\)"),
    ]
    if DEVICE == "cpu":  # elsewhere a look would synchronize
        rise = "'cu_seqlens_q' to rise from 0 to the number of tokens, 5"
        rows += [
            ({"cu_seqlens_q": starts(0, 2, 4)}, ValueError, rise),
            ({"cu_seqlens_q": starts(1, 2, 5)}, ValueError, rise),
            ({"cu_seqlens_q": starts(0, 6, 5)}, ValueError, rise),
            ({"max_seqlen_k": 2}, ValueError, "'max_seqlen_k' .* longest sequence, 3, but got 2"),
        ]
    for changes, error, message in rows:
        yield "varlen_attention", changes, error, message


def around_attention() -> Iterator[Row]:
    function = "merge_attention_states"
    yield function, {"output2": t(2, 5, 7)}, ValueError, r"'output2' to have shape \(2, 5, 8\)"
    yield function, {"lse1": t(5)}, ValueError, r"'lse1' to have shape \(2, 5\)"
    yield function, {"lse2": t(2, 5, dtype=HALF)}, TypeError, "'lse2' to be .*float32.*float16"
    yield function, {"output2": t(2, 5, 8, dtype=HALF)}, TypeError, "'output1' and 'output2'"
    function = "relative_position_bias"
    yield function, {"weight": t(32)}, ValueError, r"'weight' to have shape \[buckets, heads\]"
    yield function, {"weight": t(31, 4)}, ValueError, "an even number of at least 4 buckets"
    yield function, {"max_distance": 8}, ValueError, "'max_distance' to be an int above 8"


def packings() -> Iterator[Row]:
    yield "pack", {"input": t(2, 4, 4)}, ValueError, r"'input' to have shape \(2, 3\) .batch"
    yield "pack", {"input": t(2, 3)}, ValueError, r"'input' to have shape \(2, 3\).*and more"
    yield "unpack", {"input": t(5, 4)}, ValueError, r"'input' to have shape \(6,\) \(total\)"


def contrastive() -> Iterator[Row]:
    for function in ("contrastive_loss", "sigmoid_contrastive_loss"):
        rows: list[tuple[dict[str, Any], type[Exception], str]] = [
            ({"a": t(8)}, ValueError, r"'a' to have shape \[rows, dims\].*\(8,\)"),
            ({"b": t(1, 3, 8)}, ValueError, r"'b' to have shape \[rows, dims\].*\(1, 3, 8\)"),
            ({"b": t(3, 7)}, ValueError, r"'a' \[M, D\] and 'b' \[N, D\].*\(2, 8\).*\(3, 7\)"),
            ({"b": t(1, 8)}, ValueError, r"with M <= N.*\(2, 8\) and \(1, 8\)"),
            ({"b": t(3, 8, dtype=HALF)}, TypeError, "the same dtype.*float32 and torch.float16"),
            ({"logit_scale": t(2)}, ValueError, r"'logit_scale' to have 1 element.*\(2,\)"),
            ({"label_offset": 2}, ValueError, "'label_offset' to be from 0 to N - M = 1.*got 2"),
            ({"label_offset": -1}, ValueError, "'label_offset' to be from 0 to N - M = 1.*got -1"),
            ({"label_offset": 1.0}, TypeError, "'label_offset' to be an int.*float"),
            ({"label_offset": True}, TypeError, "'label_offset' to be an int.*bool"),
            ({"reduction": "max"}, ValueError, "'reduction' to be one of.*'max'"),
            ({"group": 3}, TypeError, "'group' to be a ProcessGroup.*3"),
        ]
        for changes, error, message in rows:
            yield function, changes, error, message
    changes = {"logit_bias": t(1, 2)}
    message = r"'logit_bias' to have 1 element.*\(1, 2\)"
    yield "sigmoid_contrastive_loss", changes, ValueError, message


def embeddings() -> Iterator[Row]:
    rows: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"input": t(2, 3)}, TypeError, "'input' to be int32 or int64.*float32"),
        ({"position_ids": t(2, 3) > 0}, TypeError, "'position_ids' to be int32 or int64.*bool"),
        ({"position_ids": t(3, dtype=INT)}, ValueError, r"'position_ids' to have shape \(2, 3\)"),
        ({"token_type_ids": t(6, dtype=INT)}, ValueError, "'token_type_ids' to have shape"),
        ({"weight": t(4)}, ValueError, r"'weight' to have shape \[vectors, E\].*\(4,\)"),
        ({"position_weight": t(3, 5)}, ValueError, r"'position_weight' .* \[vectors, 4\]"),
        ({"token_type_weight": t(2, 4, dtype=HALF)}, TypeError, "'token_type_weight' .*float16"),
        ({"norm_weight": t(5)}, ValueError, r"'norm_weight' to have shape \(4,\)"),
        ({"norm_bias": t(1)}, ValueError, r"'norm_bias' to have shape \(4,\)"),
        ({"position_ids": None}, ValueError, "together, but got 'position_weight' alone"),
        ({"position_weight": None}, ValueError, "together, but got 'position_ids' alone"),
        ({"token_type_weight": None}, ValueError, "'token_type_weight' with 'token_type_ids'"),
        ({"padding_idx": 5}, ValueError, "'padding_idx' to be within the 5 rows.* but got 5"),
        ({"padding_idx": -6}, ValueError, "'padding_idx' to be within the 5 rows"),
        ({"eps": "1"}, TypeError, "'eps' to be a number"),
    ]
    if DEVICE == "cpu":
        rows += [
            ({"input": t(2, 3, dtype=INT) * 5}, IndexError, "'input' .* 5 rows of 'weight'"),
            ({"position_ids": -t(2, 3, dtype=INT)}, IndexError, "'position_ids' .* but got -1"),
        ]
    for changes, error, message in rows:
        yield "embedding_layer_norm", changes, error, message


def losses() -> Iterator[Row]:
    rows: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"input": t()}, ValueError, "'input' to have at least 1 dimension"),
        ({"target": t(2, 3, dtype=torch.int32)}, TypeError, r"\(int64, uint8\) or .*int32"),
        ({"target": t(2, 3) > 0}, TypeError, "'target' to hold classes .*bool"),
        ({"target": t(3, 2, dtype=INT)}, ValueError, r"'target' to have shape \(2, 3\) .a class"),
        ({"target": t(2, 3)}, ValueError, "'target' to have shape .*a probability for each logit"),
        ({"weight": t(4)}, ValueError, r"'weight' to have shape \(5,\)"),
        ({"weight": t(5).requires_grad_()}, ValueError, "'weight' not to require a gradient"),
        ({"reduction": "max"}, ValueError, "'reduction' to be one of .* but got 'max'"),
        ({"label_smoothing": 1.5}, ValueError, r"'label_smoothing' to be in \[0, 1\].*1.5"),
        ({"label_smoothing": "0"}, TypeError, "'label_smoothing' to be a number"),
    ]
    if DEVICE == "cpu":
        wrong = -t(2, 3, dtype=INT)
        rows += [
            ({"target": 5 * t(2, 3, dtype=INT)}, IndexError, "'target' .* 0 to 4.* but got 5"),
            ({"target": wrong}, IndexError, "'target' .*ignore_index=-100, but got -1"),
        ]
    for function in ("cross_entropy", "linear_cross_entropy"):
        for changes, error, message in rows:
            yield function, changes, error, message
    yield "cross_entropy", {"input": t(2, 0, 3), "weight": None}, ValueError, "at least 1 class"
    function = "linear_cross_entropy"
    for weight in (t(5, 3), t(4), t(1, 5, 4)):
        message = r"'linear_weight' to have shape \[C, 4\]"
        yield function, {"linear_weight": weight}, ValueError, message
    yield function, {"linear_bias": t(4)}, ValueError, r"'linear_bias' to have shape \(5,\)"
    for name in ("linear_weight", "linear_bias"):
        changed = {name: good(function)[name].half()}
        yield function, changed, TypeError, f"'{name}' to have the dtype of 'input'.*float16"


def described(value: object) -> str:
    if isinstance(value, Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        return f"{dtype}{list(value.shape)} {value.device.type} {str(value.layout)[6:]}"
    return repr(value)


def named(row: Row) -> Any:
    function, changes, error, _ = row
    what = ", ".join(f"{name}={described(value)}" for name, value in changes.items())
    return pytest.param(*row, id=f"{function}: {what}: {error.__name__}")


SOURCES: tuple[Callable[[], Iterator[Row]], ...] = (
    not_tensors, dtypes_and_devices, probabilities, softmaxes, norms, fused_steps, attention,
    attention_terms, packed, around_attention, packings, contrastive, embeddings, losses,
)  # fmt: skip
TABLE = [named(row) for source in SOURCES for row in source()]
