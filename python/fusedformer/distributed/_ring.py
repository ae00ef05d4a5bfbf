"""Attention over a sequence that is spread over the ranks of a group: ring attention.

Every rank keeps its queries. Keys and values travel from rank to rank; each rank attends to what it
holds while the next is under way, and merges the parts by their log-sum-exp in float32. In the
backward keys and values travel again, and behind them their gradients, to which every rank adds its
part before they are home. A rank holds two parts of keys and values at a time, and in the backward
two of their gradients, however many ranks there are.

Source: Liu et al., Ring Attention with Blockwise Transformers, arXiv:2310.01889.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from fusedformer import ops
from fusedformer._internal import attention_checks
from fusedformer._internal.autocast import autocast_dtype, autocast_off, cast
from fusedformer._internal.backend import chosen_backend
from fusedformer.distributed._agreement import agree
from fusedformer.distributed._sequence import Span, spans_of
from fusedformer.ops.attention.terms import N_TENSORS, AttentionTerms

Function = TypeVar("Function", bound=Callable[..., Any])
Part = tuple[Span, Span, AttentionTerms]  # queries, keys, and the terms of their scores


def _not_compiled(function: Function) -> Function:
    """Disable the compiler, typed: sending and receiving cannot be traced."""
    called: Function = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
    return called


@_not_compiled
def ring_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    is_causal: bool = False,
    window: tuple[int, int] | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    enable_gqa: bool = False,
    softcap: float | None = None,
    key_mask: Tensor | None = None,
    key_lengths: Tensor | None = None,
    load_balance: bool = False,
    return_lse: bool = False,
    check: bool = True,
) -> Any:
    """:func:`~fusedformer.functional.scaled_dot_product_attention` over the ranks of a group.

    Every rank calls it with its part of the sequence (see :func:`split_sequence`) and gets the
    output for its queries, as if it had all keys. Gradients of keys and values are complete: what
    the losses of all ranks together give. All ranks of the group must run the backward, too. Inside
    ``torch.compile`` it breaks the graph.

    Args:
        query: ``[batch, heads, L, E]``, where the whole sequence has ``L`` times as many queries as
            there are ranks.
        key: ``[batch, heads, S, E]``, likewise.
        value: ``[batch, heads, S, Ev]``.
        group: the ranks over which the sequence is spread; the default group if None.
        is_causal, window: as for ``scaled_dot_product_attention``, by position in the whole
            sequence.
        dropout_p, scale, enable_gqa, softcap: likewise. Dropout draws one seed on each rank and
            gives it another mask for each part; it is not the mask of one process.
        key_mask: boolean ``[batch, S]``, True = keep: of this rank's keys.
        key_lengths: integer ``[batch]``: keys at and beyond a sequence's length, counted in the
            whole sequence, are masked. The same on every rank.
        load_balance: whether the parts are those of ``split_sequence(..., load_balance=True)``.
        return_lse: also return the logarithm of the softmax denominator over all keys.
        check: ask all ranks whether they were called alike, so that all raise if they were not,
            rather than wait for each other until the group's timeout. It costs a small collective,
            and on a GPU a wait. Turn it off once the shapes of a program are known to agree.

    Returns:
        ``[batch, heads, L, Ev]`` in the dtype of ``query``; with ``return_lse`` the pair of it and
        the log-sum-exp ``[batch, heads, L]`` in float32 (float64 of float64). Both are
        differentiable, once.

    Raises:
        TypeError, ValueError: as ``scaled_dot_product_attention``, on every rank.
        ValueError: tensors that are not 4-D or whose batches broadcast; shapes, dtypes, settings or
            the need of gradients that differ from rank to rank; odd lengths with ``load_balance``.
        RuntimeError: from ``torch.distributed``, if a rank died or the group's timeout passed.
    """
    function = "ring_attention"
    query, key, value = _autocast(query, key, value)
    options = _options(is_causal, window, dropout_p, scale, enable_gqa, softcap)
    options |= {"key_mask": key_mask, "key_lengths": key_lengths, "return_weights": False}

    def describe() -> dict[str, object]:
        attention_checks.check_attention(query, key, value, options, function)
        _check_dense_batch(function, query, key, value, enable_gqa)
        lengths = {"query": query.shape[2], "key": key.shape[2]}
        _check_balanced(function, lengths, load_balance)
        return _description(function, (query, key, value), {
            **options, "key_mask": key_mask is not None, "key_lengths": _comparable(key_lengths),
            "load_balance": load_balance, "return_lse": return_lse,
        })  # fmt: skip

    agree(function, group, describe, check)
    left, right = ops.window_bounds(window, is_causal)
    terms = AttentionTerms(
        key_mask=key_mask,
        key_lengths=key_lengths,
        seed=ops.draw_seed(dropout_p, query.device),
        p=dropout_p,
        left=left,
        right=right,
        scale=ops.scale_of(scale, query),
        softcap=softcap,
    )
    ring = _Ring(group, load_balance, _padded_terms)
    output, lse = _attend(query, key, value, ring, terms)
    return (output, lse) if return_lse else output


@_not_compiled
def ring_varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    group: dist.ProcessGroup | None = None,
    is_causal: bool = False,
    dropout_p: float = 0.0,
    scale: float | None = None,
    enable_gqa: bool = False,
    softcap: float | None = None,
    load_balance: bool = False,
    return_lse: bool = False,
    check: bool = True,
) -> Any:
    """:func:`~fusedformer.functional.varlen_attention` of packed rows spread over a group.

    Sequences lie one after another over all ranks, and each attends to itself, on as many ranks as
    it lies on. A rank spends nothing on keys of sequences that it has no queries of, but they
    travel through it.

    Args:
        query: ``[tokens, heads, E]``: this rank's rows, as many on every rank.
        key, value: ``[tokens, heads, E]`` and ``[tokens, heads, Ev]``.
        cu_seqlens: int32 or int64 ``[sequences + 1]``: where each sequence begins, counted in the
            rows of all ranks; the same on every rank.
        max_seqlen: length of the longest sequence, or any bound on it.
        group, is_causal, dropout_p, scale, enable_gqa, softcap: as for :func:`ring_attention`.
        load_balance, return_lse, check: likewise.

    Returns:
        ``[tokens, heads, Ev]``; with ``return_lse`` the pair of it and the log-sum-exp
        ``[heads, tokens]``.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`ring_attention`.
    """
    function = "ring_varlen_attention"
    query, key, value = _autocast(query, key, value)
    ranks = dist.get_world_size(group)
    options = _options(is_causal, None, dropout_p, scale, enable_gqa, softcap)

    def describe() -> dict[str, object]:
        attention_checks.check_spread_rows(
            function, query, key, value, cu_seqlens, max_seqlen, options, ranks
        )
        _check_balanced(function, {"query": query.shape[0]}, load_balance)
        return _description(function, (query, key, value), {
            **options, "cu_seqlens": _comparable(cu_seqlens), "max_seqlen": max_seqlen,
            "load_balance": load_balance, "return_lse": return_lse,
        })  # fmt: skip

    agree(function, group, describe, check)
    terms = AttentionTerms(
        starts_q=cu_seqlens,
        starts_k=cu_seqlens,
        p=dropout_p,
        right=0 if is_causal else None,
        seed=ops.draw_seed(dropout_p, query.device),
        scale=ops.scale_of(scale, query),
        softcap=softcap,
        max_queries=max_seqlen,
        max_keys=max_seqlen,
    )
    q, k, v = (tensor.transpose(0, 1)[None] for tensor in (query, key, value))
    ring = _Ring(group, load_balance, _packed_terms)
    output, lse = _attend(q, k, v, ring, terms)
    output = output[0].transpose(0, 1)
    return (output, lse[0]) if return_lse else output


def _padded_terms(terms: AttentionTerms, queries: Span, keys: Span) -> AttentionTerms | None:
    """Move ``terms``, which count positions in the whole sequence, to two spans of it.

    Return None if no query sees a key.
    """
    ahead = keys.position - queries.position
    left, right = terms.left, terms.right
    least, most = ahead - queries.length + 1, ahead + keys.length - 1  # distances
    if (right is not None and least > right) or (left is not None and most < -left):
        return None
    lengths = terms.key_lengths
    return terms._replace(
        left=None if left is None or least >= -left else left + ahead,
        right=None if right is None or most <= right else right - ahead,
        key_lengths=None if lengths is None else (lengths - keys.position).clamp(0, keys.length),
    )


def _packed_terms(terms: AttentionTerms, queries: Span, keys: Span) -> AttentionTerms | None:
    """Move ``terms`` of packed rows to two spans: each sequence keeps its rows within them.

    Return None if no query sees a key. Keys of an earlier span come before all queries, so
    causality only hides keys if both are the same span.
    """
    if terms.right is not None and keys.position > queries.position:
        return None
    starts: Any = terms.starts_q  # the same for queries and keys
    return terms._replace(
        starts_q=(starts - queries.position).clamp(0, queries.length),
        starts_k=(starts - keys.position).clamp(0, keys.length),
        right=terms.right if keys.position == queries.position else None,
        max_queries=min(terms.max_queries, queries.length),
        max_keys=min(terms.max_keys, keys.length),
    )


class _Ring(NamedTuple):
    """Which rank holds which spans, and how keys and values move from rank to rank."""

    group: dist.ProcessGroup | None
    load_balance: bool
    terms_within: Callable[[AttentionTerms, Span, Span], AttentionTerms | None]

    @property
    def ranks(self) -> int:
        return dist.get_world_size(self.group)

    def parts(self, step: int, query: Tensor, key: Tensor, terms: AttentionTerms) -> Iterator[Part]:
        """List the parts computed at ``step``, with the keys of the rank ``step`` before this."""
        rank, ranks = dist.get_rank(self.group), self.ranks
        source = (rank - step) % ranks
        own = spans_of(rank, ranks, query.shape[2], self.load_balance)
        held = spans_of(source, ranks, key.shape[2], self.load_balance)
        for index, (queries, keys) in enumerate((q, k) for q in own for k in held):
            found = self.terms_within(terms, queries, keys)
            if found is None:
                continue
            if found.key_mask is not None:
                found = found._replace(key_mask=keys.of(found.key_mask, 1))
            if found.seed is not None:  # each part drops other weights; the ranks share a seed
                found = found._replace(seed=found.seed + 4 * (rank * ranks + source) + index)
            yield queries, keys, found

    def pass_on(self, tensors: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
        """Send to the next rank, receive from the one before; the result waits when called."""
        if self.ranks == 1:
            return lambda: list(tensors)
        rank = dist.get_rank(self.group)
        onward, before = (rank + 1) % self.ranks, (rank - 1) % self.ranks
        sent = [t.contiguous() for t in tensors]
        received = [torch.empty_like(t) for t in sent]
        sends = [dist.P2POp(dist.isend, t, group=self.group, group_peer=onward) for t in sent]
        receives = [
            dist.P2POp(dist.irecv, t, group=self.group, group_peer=before) for t in received
        ]
        works = dist.batch_isend_irecv([*sends, *receives])

        def arrived() -> list[Tensor]:
            for work in works:
                work.wait()
            del sent[:]  # frees what was sent: the closure lives longer
            return received

        return arrived

    def walk(self, held: list[Tensor]) -> Iterator[tuple[int, list[Tensor]]]:
        """Yield each step and the tensors held then, while the next ones are received."""
        for step in range(self.ranks):
            arriving = self.pass_on(held) if step < self.ranks - 1 else None
            yield step, held
            if arriving is not None:
                held = arriving()


class _RingAttention(torch.autograd.Function):
    """Output and log-sum-exp of ``[B, H, L, E]`` queries and the keys of all ranks."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        ring: _Ring,
        terms: AttentionTerms,
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(query.dtype, torch.float32)
        output = query.new_zeros((*query.shape[:3], value.shape[3]), dtype=wide)
        lse = query.new_full(query.shape[:3], -torch.inf, dtype=torch.float64)
        with autocast_off(query):
            for step, (k, v, *mask) in ring.walk(_tensors_to_send(key, value, terms)):
                given = _with_mask(terms, mask)
                for queries, keys, own in ring.parts(step, query, key, given):
                    part, part_lse = ops.attention_part(
                        queries.of(query), keys.of(k), keys.of(v), own
                    )
                    merged, merged_lse = ops.merge_parts(
                        queries.of(output), queries.of(lse), part.to(wide), part_lse
                    )
                    queries.of(output).copy_(merged)
                    queries.of(lse).copy_(merged_lse)
        output = output.to(query.dtype)
        ctx.save_for_backward(query, key, value, output, lse, *terms[:N_TENSORS])
        ctx.numbers, ctx.ring, ctx.backend = terms[N_TENSORS:], ring, chosen_backend(query)
        return output, lse.to(wide)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, lse_grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, lse, *tensors = ctx.saved_tensors
        terms = AttentionTerms(*tensors, *ctx.numbers)
        ring, needs = ctx.ring, list(ctx.needs_input_grad[:3])

        def zeros(tensor: Tensor, needed: bool) -> Tensor | None:
            wide = torch.promote_types(tensor.dtype, torch.float32)
            return torch.zeros_like(tensor, dtype=wide) if needed else None

        dq = zeros(query, needs[0])
        arriving: Callable[[], list[Tensor]] | None = None
        with autocast_off(query):
            for step, (k, v, *mask) in ring.walk(_tensors_to_send(key, value, terms)):
                sums = [dq, zeros(k, needs[1]), zeros(v, needs[2])]
                given = _with_mask(terms, mask)
                for queries, keys, own in ring.parts(step, query, key, given):
                    found = ops.attention_part_backward(
                        ctx.backend,
                        queries.of(grad),
                        queries.of(lse_grad),
                        queries.of(query),
                        keys.of(k),
                        keys.of(v),
                        queries.of(output),
                        queries.of(lse),
                        needs,
                        own,
                    )
                    for total, part, span in zip(sums, found, (queries, keys, keys), strict=True):
                        if total is not None and part is not None:
                            span.of(total).add_(part)
                # Gradients of these keys follow them around the ring; each rank adds its own.
                theirs = [total for total in sums[1:] if total is not None]
                if arriving is not None:
                    theirs = [a.add_(b) for a, b in zip(theirs, arriving(), strict=True)]
                if theirs:
                    arriving = ring.pass_on(theirs)
        home = iter(arriving() if arriving is not None else ())
        dk, dv = (next(home) if need else None for need in needs[1:])
        inputs = zip((dq, dk, dv), (query, key, value), strict=True)
        return *(None if g is None else g.to(t.dtype) for g, t in inputs), None, None


def _attend(
    query: Tensor, key: Tensor, value: Tensor, ring: _Ring, terms: AttentionTerms
) -> tuple[Tensor, Tensor]:
    found: tuple[Tensor, Tensor] = _RingAttention.apply(  # type: ignore[no-untyped-call]
        query, key, value, ring, terms
    )
    return found


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast query, key and value as ``scaled_dot_product_attention`` would."""
    dtype = autocast_dtype("scaled_dot_product_attention", tensors[0])
    return tensors if dtype is None else tuple(cast(tensor, dtype) for tensor in tensors)


def _tensors_to_send(key: Tensor, value: Tensor, terms: AttentionTerms) -> list[Tensor]:
    """List the tensors to send; not every backend sends booleans."""
    mask = terms.key_mask
    return [key, value] if mask is None else [key, value, mask.view(torch.uint8)]


def _with_mask(terms: AttentionTerms, mask: list[Tensor]) -> AttentionTerms:
    return terms._replace(key_mask=mask[0].view(torch.bool)) if mask else terms


def _options(
    is_causal: bool,
    window: tuple[int, int] | None,
    dropout_p: float,
    scale: float | None,
    enable_gqa: bool,
    softcap: float | None,
) -> dict[str, Any]:
    """Return settings by the names that the checks of attention in one process expect."""
    return {
        "is_causal": is_causal, "window": window, "dropout_p": dropout_p, "scale": scale,
        "enable_gqa": enable_gqa, "softcap": softcap, "attn_mask": None, "key_lengths": None,
        "alibi_slopes": None, "relative_bias": None, "relative_bias_gate": None, "sinks": None,
        "causal_alignment": "top_left",
    }  # fmt: skip


def _check_dense_batch(
    function: str, query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool
) -> None:
    shapes = {"query": query.shape, "key": key.shape, "value": value.shape}
    heads = 1 if enable_gqa else 2
    if any(len(s) != 4 or s[:heads] != query.shape[:heads] for s in shapes.values()):
        found = ", ".join(f"'{name}' {tuple(shape)}" for name, shape in shapes.items())
        raise ValueError(
            f"{function}(): expected [batch, heads, length, dim] tensors of the same batch and "
            f"heads, but got {found}"
        )


def _check_balanced(function: str, lengths: dict[str, int], load_balance: bool) -> None:
    for name, length in lengths.items():
        if load_balance and length % 2:
            raise ValueError(
                f"{function}(): expected an even length of '{name}' with load_balance=True, which "
                f"gives each rank two slices, but got {length}"
            )


def _description(
    function: str, tensors: tuple[Tensor, ...], settings: dict[str, object]
) -> dict[str, object]:
    """Check for kernels; return what must be the same on all ranks."""
    differentiated = torch.is_grad_enabled()
    backend = chosen_backend(tensors[0])
    if backend == "triton":
        ops.check_for_kernels(function, tensors[0], tensors[2])
    found = {
        f"'{name}'": (tuple(t.shape), str(t.dtype), differentiated and t.requires_grad)
        for name, t in zip(("query", "key", "value"), tensors, strict=True)
    }
    return {
        **found, **{f"'{name}'": value for name, value in settings.items()}, "the backend": backend
    }  # fmt: skip


def _comparable(tensor: Tensor | None) -> object:
    """Return what ranks can compare of a tensor without waiting for the device."""
    if tensor is None:
        return None
    return tensor.tolist() if tensor.device.type == "cpu" else tuple(tensor.shape)
