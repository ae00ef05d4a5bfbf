"""Checks of the arguments of attention, padded and packed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fusedformer._internal import checks
from fusedformer._internal.jagged import check_jagged, check_same_lengths
from fusedformer.errors import BadTypeError, BadValueError

ALIGNMENTS = ("top_left", "bottom_right")
WEIGHTS = (False, "per_head", "averaged")


@checks.remembered
def check_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    options: Mapping[str, Any],
    function: str = "scaled_dot_product_attention",
) -> tuple[int, ...]:
    """Raise unless the arguments of ``scaled_dot_product_attention`` fit together.

    Return ``(*batch, heads)`` of the scores.

    ``options`` are its arguments after ``value``, by name.
    """
    named = {"query": query, "key": key, "value": value}
    _check_inputs(function, named, min_dims=2)
    for name, tensor in named.items():
        if tensor.is_nested:
            raise BadTypeError(
                f"{function}(): expected 'query', 'key' and 'value' to be all dense or all "
                f"nested, but '{name}' is nested"
            )
    if key.shape[-2] != value.shape[-2]:
        raise BadValueError(
            f"{function}(): expected 'key' and 'value' to have the same sequence length, "
            f"but got {key.shape[-2]} and {value.shape[-2]}"
        )
    batch = attention_batch_shape(query, key, value, options["enable_gqa"], function)
    has_heads = len(batch) > 1 or options["enable_gqa"]
    sequences = math.prod(batch[:-1] if has_heads else batch)
    heads = batch[-1] if has_heads else 1
    scores = (*batch, query.shape[-2], key.shape[-2])
    rows = scores[:-1], "batch, heads, queries"
    _check_terms(function, named, options, scores, sequences, heads, rows)
    key_mask = options["key_mask"]
    if key_mask is not None:
        checks.check_tensor(function, "key_mask", key_mask)
        checks.check_same_device(function, {"query": query, "key_mask": key_mask})
        checks.check_shape(
            function, "key_mask", key_mask, (sequences, key.shape[-2]), "batch, keys"
        )
        if key_mask.dtype != torch.bool:
            raise BadTypeError(
                f"{function}(): expected 'key_mask' to be boolean (True = keep), "
                f"but got {key_mask.dtype}"
            )
    check_return_weights(function, options["return_weights"])
    return batch


def check_return_weights(function: str, return_weights: object) -> None:
    """Raise ``ValueError`` unless ``return_weights`` is one of those there are."""
    if return_weights not in WEIGHTS:
        raise BadValueError(
            f"{function}(): expected 'return_weights' to be one of {WEIGHTS}, "
            f"but got {return_weights!r}"
        )


def check_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    options: Mapping[str, Any],
    function: str = "varlen_attention",
) -> None:
    """Raise unless the arguments of ``varlen_attention`` fit together.

    What is in ``cu_seqlens`` is looked at on the CPU only: elsewhere it would synchronize.
    """
    sides = ("_q", "_k")
    starts = cu_seqlens_q, cu_seqlens_k
    _check_varlen(function, sides, query, key, value, *starts, max_seqlen_q, max_seqlen_k, options)
    for side, tensor, tokens, longest in (
        ("_q", cu_seqlens_q, query, max_seqlen_q), ("_k", cu_seqlens_k, key, max_seqlen_k)
    ):  # fmt: skip
        if tensor.device.type == "cpu" and checks.has_values(tensor):
            _check_starts(function, side, tensor, tokens.shape[0], longest)


def check_spread_rows(
    function: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    options: Mapping[str, Any],
    ranks: int,
) -> None:
    """Raise unless packed rows, of which each of so many ranks has as many, fit together.

    ``cu_seqlens`` is that of the rows of all ranks, of queries and keys alike.
    """
    starts, longest = (cu_seqlens, cu_seqlens), (max_seqlen, max_seqlen)
    _check_varlen(function, ("", ""), query, key, value, *starts, *longest, options)
    if query.shape[0] != key.shape[0]:
        raise BadValueError(
            f"{function}(): expected 'query' and 'key' to have the same number of tokens, "
            f"but got {query.shape[0]} and {key.shape[0]}"
        )
    if cu_seqlens.device.type == "cpu" and checks.has_values(cu_seqlens):
        _check_starts(function, "", cu_seqlens, ranks * query.shape[0], max_seqlen)


@checks.remembered
def _check_varlen(
    function: str,
    sides: tuple[str, str],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    options: Mapping[str, Any],
) -> None:
    named = {"query": query, "key": key, "value": value}
    _check_inputs(function, named, min_dims=3)
    for name, tensor in named.items():
        if tensor.is_nested:
            raise BadTypeError(f"{function}(): expected '{name}' to be dense, but it is nested")
        if tensor.dim() != 3:
            raise BadValueError(
                f"{function}(): expected '{name}' to have shape [tokens, heads, dim], "
                f"but got {tuple(tensor.shape)}"
            )
    if key.shape[0] != value.shape[0]:
        raise BadValueError(
            f"{function}(): expected 'key' and 'value' to have the same number of tokens, "
            f"but got {key.shape[0]} and {value.shape[0]}"
        )
    (heads,) = attention_batch_shape(
        query.transpose(0, 1),
        key.transpose(0, 1),
        value.transpose(0, 1),
        options["enable_gqa"],
        function,
    )
    for side, size in zip(sides, (max_seqlen_q, max_seqlen_k), strict=True):
        name = f"max_seqlen{side}"
        if not isinstance(size, (int, torch.SymInt)) or isinstance(size, bool):
            raise BadTypeError(
                f"{function}(): expected '{name}' to be an int, but got {type(size).__name__}"
            )
        if size < 0:
            raise BadValueError(
                f"{function}(): expected '{name}' not to be negative, but got {size}"
            )
    starts = dict(zip((f"cu_seqlens{s}" for s in sides), (cu_seqlens_q, cu_seqlens_k), strict=True))
    for name, tensor in starts.items():
        checks.check_tensor(function, name, tensor)
        if tensor.dtype not in (torch.int32, torch.int64):
            raise BadTypeError(
                f"{function}(): expected '{name}' to be int32 or int64, but got {tensor.dtype}"
            )
        if tensor.dim() != 1 or tensor.numel() == 0 or tensor.shape != cu_seqlens_q.shape:
            raise BadValueError(
                f"{function}(): expected '{name}' to have shape (sequences + 1,), the same for "
                f"queries and keys, but got {tuple(tensor.shape)}"
            )
    checks.check_same_device(function, {"query": query, **starts})
    sequences = cu_seqlens_q.shape[0] - 1
    scores = (sequences, heads, max_seqlen_q, max_seqlen_k)
    rows = tuple(query.shape[:2]), "tokens, heads"
    _check_terms(function, named, options, scores, sequences, heads, rows)


def _check_starts(function: str, side: str, starts: Tensor, tokens: int, longest: int) -> None:
    values = starts.tolist()
    lengths = [end - start for start, end in itertools.pairwise(values)]
    if values[0] != 0 or values[-1] != tokens or min(lengths, default=0) < 0:
        raise BadValueError(
            f"{function}(): expected 'cu_seqlens{side}' to rise from 0 to the number of "
            f"tokens, {tokens}, but got {_short(values)}"
        )
    if max(lengths, default=0) > longest:
        raise BadValueError(
            f"{function}(): expected 'max_seqlen{side}' to be at least the longest sequence, "
            f"{max(lengths)}, but got {longest}"
        )


def _short(values: Sequence[int]) -> str:
    shown = ", ".join(map(str, values[:8]))
    return f"[{shown}, ... {values[-1]}]" if len(values) > 9 else str(list(values))


@checks.remembered
def check_merge(output1: Tensor, lse1: Tensor, output2: Tensor, lse2: Tensor) -> None:
    """Raise unless the arguments of ``merge_attention_states`` fit together."""
    function = "merge_attention_states"
    for name, tensor in (("output1", output1), ("output2", output2)):
        checks.check_input(function, name, tensor)
    checks.check_same_device(
        function, {"output1": output1, "lse1": lse1, "output2": output2, "lse2": lse2}
    )
    checks.check_shape(function, "output2", output2, output1.shape, "that of 'output1'")
    if output1.dtype != output2.dtype:
        raise BadTypeError(
            f"{function}(): expected 'output1' and 'output2' to have the same dtype, "
            f"but got {output1.dtype} and {output2.dtype}"
        )
    wide = torch.float64 if output1.dtype == torch.float64 else torch.float32
    for name, lse in (("lse1", lse1), ("lse2", lse2)):
        checks.check_shape(function, name, lse, output1.shape[:-1], "'output1' without its last")
        if lse.dtype not in (torch.float32, wide):
            raise BadTypeError(f"{function}(): expected '{name}' to be {wide}, but got {lse.dtype}")


def check_relative_position_bias(weight: Tensor, bidirectional: bool, max_distance: int) -> None:
    """Raise unless the arguments of ``relative_position_bias`` fit together."""
    function = "relative_position_bias"
    checks.check_tensor(function, "weight", weight)
    checks.check_floating(function, "weight", weight)
    least = 4 if bidirectional else 2
    if weight.dim() != 2 or weight.shape[0] < least or (bidirectional and weight.shape[0] % 2):
        even = "an even number of " if bidirectional else ""
        raise BadValueError(
            f"{function}(): expected 'weight' to have shape [buckets, heads] with {even}"
            f"at least {least} buckets, but got {tuple(weight.shape)}"
        )
    exact = weight.shape[0] // (4 if bidirectional else 2)
    if not isinstance(max_distance, int) or max_distance <= exact:
        raise BadValueError(
            f"{function}(): expected 'max_distance' to be an int above {exact}, the distances "
            f"with a bucket each, but got {max_distance!r}"
        )


_NO_TERMS: dict[str, Any] = dict.fromkeys(
    ("attn_mask", "window", "alibi_slopes", "relative_bias", "relative_bias_gate", "sinks",
     "softcap", "key_lengths")
) | {"is_causal": False, "enable_gqa": False, "return_weights": False,
     "causal_alignment": "top_left"}  # fmt: skip


def check_disentangled(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    position_key: Tensor | None,
    position_query: Tensor | None,
    max_distance: int | None,
    key_mask: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    dropout_p: float,
    scale: float | None,
) -> None:
    """Raise unless the arguments of ``disentangled_attention`` fit together."""
    function = "disentangled_attention"
    options = _NO_TERMS | {"dropout_p": dropout_p, "scale": scale, "key_mask": key_mask}
    packing: list[Any] = [cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k]
    if any(one is not None for one in packing):
        if any(one is None for one in packing) or key_mask is not None:
            raise BadValueError(
                f"{function}(): expected all of 'cu_seqlens_q', 'cu_seqlens_k', 'max_seqlen_q' and "
                f"'max_seqlen_k', and no 'key_mask', for packed sequences; or none of the four"
            )
        starts_q, starts_k, longest_q, longest_k = packing
        check_varlen(
            query, key, value, starts_q, starts_k, longest_q, longest_k, options, function
        )  # fmt: skip
    else:
        check_attention(query, key, value, options, function)
        shapes = [tuple(x.shape) for x in (query, key, value)]
        if query.dim() != 4 or len({shape[:2] for shape in shapes}) > 1:
            raise BadValueError(
                f"{function}(): expected 'query', 'key' and 'value' to be [batch, heads, length, "
                f"dim] of one batch and number of heads, but got shapes {shapes}"
            )
    heads, dim = query.shape[1], query.shape[-1]
    tables = {"position_key": position_key, "position_query": position_query}
    given = {name: table for name, table in tables.items() if table is not None}
    if not given:
        raise BadValueError(
            f"{function}(): expected 'position_key' or 'position_query', but got neither"
        )
    checks.check_same_device(function, {"query": query, **given})
    for name, table in given.items():
        if table.dtype != query.dtype:
            raise BadTypeError(
                f"{function}(): expected '{name}' to have the dtype of 'query', {query.dtype}, but "
                f"got {table.dtype}"
            )
        buckets = next(iter(given.values())).shape[1:2]
        wanted = table.dim() == 3 and (table.shape[0], table.shape[2]) == (heads, dim)
        if not wanted or table.shape[1] % 2 or not table.shape[1] or table.shape[1:2] != buckets:
            raise BadValueError(
                f"{function}(): expected '{name}' to have shape ({heads}, 2 * span, {dim}), with "
                f"one span for all, but got {tuple(table.shape)}"
            )
    n_buckets = next(iter(given.values())).shape[1]
    exact = n_buckets // 4
    if max_distance is not None and (
        not isinstance(max_distance, int)
        or n_buckets < 8
        or n_buckets % 4
        or max_distance <= exact + 1
    ):
        raise BadValueError(
            f"{function}(): expected 'max_distance' to be None, or an int above {exact + 1} with a "
            f"multiple of 4 buckets, 8 or more, but got {max_distance!r} with {n_buckets} buckets"
        )


def _check_inputs(function: str, named: Mapping[str, Tensor], min_dims: int) -> None:
    for name, tensor in named.items():
        checks.check_tensor(function, name, tensor)
        checks.check_floating(function, name, tensor)
        if tensor.dim() < min_dims:
            raise BadValueError(
                f"{function}(): expected '{name}' to have at least {min_dims} dimensions, "
                f"but got shape {tuple(tensor.shape)}"
            )
    query, key, value = named["query"], named["key"], named["value"]
    if not query.dtype == key.dtype == value.dtype:
        raise BadTypeError(
            f"{function}(): expected 'query', 'key' and 'value' to have the same dtype, "
            f"but got {query.dtype}, {key.dtype} and {value.dtype}"
        )
    checks.check_same_device(function, named)
    if query.shape[-1] != key.shape[-1]:
        raise BadValueError(
            f"{function}(): expected 'query' and 'key' to have the same last dimension, "
            f"but got {query.shape[-1]} and {key.shape[-1]}"
        )


def _check_terms(
    function: str,
    named: Mapping[str, Tensor],
    options: Mapping[str, Any],
    scores: Sequence[int],
    sequences: int,
    heads: int,
    rows: tuple[tuple[int, ...], str],
) -> None:
    """Check what the two forms of attention share.

    ``scores`` is the shape that masks cover, ``rows`` that of one number a query, and what it is.
    """
    query = named["query"]
    names = (
        "attn_mask", "key_lengths", "alibi_slopes", "relative_bias", "relative_bias_gate", "sinks",
    )  # fmt: skip
    tensors = {name: options[name] for name in names}
    checks.check_same_device(function, {"query": query, **tensors})
    checks.check_probability(function, "dropout_p", options["dropout_p"])
    if options["scale"] is not None:
        checks.check_number(function, "scale", options["scale"])
    if options["softcap"] is not None:
        checks.check_number(function, "softcap", options["softcap"])
        if not options["softcap"] > 0:
            raise BadValueError(
                f"{function}(): expected 'softcap' to be positive, or None for no cap, "
                f"but got {options['softcap']}"
            )
    if options["causal_alignment"] not in ALIGNMENTS:
        raise BadValueError(
            f"{function}(): expected 'causal_alignment' to be one of {ALIGNMENTS}, "
            f"but got {options['causal_alignment']!r}"
        )
    _check_window(function, options["window"])
    mask, lengths = tensors["attn_mask"], tensors["key_lengths"]
    if mask is not None:
        checks.check_mask(function, "attn_mask", mask, scores)
        if mask.dtype not in (torch.bool, torch.float32, query.dtype):
            raise BadTypeError(
                f"{function}(): expected a floating-point 'attn_mask' to be float32 or of the "
                f"dtype of 'query', {query.dtype}, but got {mask.dtype}"
            )
    if lengths is not None:
        checks.check_shape(function, "key_lengths", lengths, (sequences,), "batch")
        if lengths.dtype not in (torch.int32, torch.int64):
            raise BadTypeError(
                f"{function}(): expected 'key_lengths' to be int32 or int64, "
                f"but got {lengths.dtype}"
            )
    slopes, table = tensors["alibi_slopes"], tensors["relative_bias"]
    if slopes is not None:
        checks.check_floating(function, "alibi_slopes", slopes)
        if tuple(slopes.shape) not in ((heads,), (sequences, heads)):
            raise BadValueError(
                f"{function}(): expected 'alibi_slopes' to have shape {(heads,)} (heads) or "
                f"{(sequences, heads)} (batch, heads), but got {tuple(slopes.shape)}"
            )
    if table is not None:
        checks.check_floating(function, "relative_bias", table)
        fits = table.dim() == 2 and table.shape[0] in (1, heads) and table.shape[1] % 2 == 1
        if not fits:
            raise BadValueError(
                f"{function}(): expected 'relative_bias' to have shape [heads, 2 * R + 1] with "
                f"heads = {heads} or 1, one entry for each distance from -R to R, but got "
                f"{tuple(table.shape)}"
            )
    gate = tensors["relative_bias_gate"]
    if gate is not None:
        checks.check_floating(function, "relative_bias_gate", gate)
        checks.check_shape(function, "relative_bias_gate", gate, *rows)
        if table is None:
            raise BadValueError(
                f"{function}(): expected 'relative_bias' beside 'relative_bias_gate', which is a "
                f"factor on it, but got None"
            )
    if tensors["sinks"] is not None:
        checks.check_floating(function, "sinks", tensors["sinks"])
        checks.check_shape(function, "sinks", tensors["sinks"], (heads,), "heads")


def _check_window(function: str, window: object) -> None:
    if window is None:
        return
    pair = isinstance(window, Sequence) and len(window) == 2
    if not pair or any(not isinstance(n, int) or isinstance(n, bool) for n in window):  # type: ignore[attr-defined]
        raise BadTypeError(
            f"{function}(): expected 'window' to be a pair of ints (left, right), "
            f"but got {window!r}"
        )
    if min(window) < -1:  # type: ignore[call-overload]
        raise BadValueError(
            f"{function}(): expected both sides of 'window' to be at least -1 (unbounded), "
            f"but got {window!r}"
        )


def attention_batch_shape(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    enable_gqa: bool,
    function: str = "scaled_dot_product_attention",
) -> tuple[int, ...]:
    """``(*batch, heads)`` of the scores, the leading shapes of the three broadcast together."""
    leading = [tuple(t.shape[:-2]) for t in (query, key, value)]
    if enable_gqa:
        if query.dim() < 3:
            raise BadValueError(f"{function}(): enable_gqa=True needs a dimension of heads at -3")
        heads, key_heads, value_heads = (t.shape[-3] for t in (query, key, value))
        if key_heads != value_heads or key_heads == 0 or heads % key_heads:
            raise BadValueError(
                f"{function}(): expected the number of heads of 'key' and 'value' to be equal and "
                f"to divide that of 'query', {heads}, but got {key_heads} and {value_heads}"
            )
        leading = [(*shape[:-1], heads) for shape in leading]
    if leading[0] == leading[1] == leading[2]:
        return leading[0]
    try:
        return tuple(torch.broadcast_shapes(*leading))  # type: ignore[no-untyped-call]
    except RuntimeError:
        raise BadValueError(
            f"{function}(): expected the batch and head dimensions to broadcast, but got query "
            f"{tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
            + ("" if enable_gqa else "; for fewer key heads than query heads set enable_gqa=True")
        ) from None


def check_nested(
    query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, return_weights: object
) -> None:
    """Raise unless nested tensors can go through the packed form."""
    function = "scaled_dot_product_attention"
    for name, tensor in {"query": query, "key": key, "value": value}.items():
        check_jagged(function, name, tensor, "batch, heads, jagged, dim")
    if query.shape[0] != key.shape[0]:
        raise ValueError(
            f"{function}(): expected 'query' and 'key' to have the same batch, "
            f"but got {query.shape[0]} and {key.shape[0]}"
        )
    check_same_lengths(function, ("key", "value"), key, value)
    if key_mask is not None:
        raise ValueError(f"{function}(): nested tensors have no padding, but got a 'key_mask'")
    if return_weights:
        raise ValueError(
            f"{function}(): expected return_weights=False for nested tensors, whose weights have "
            f"no common shape, but got {return_weights!r}"
        )
