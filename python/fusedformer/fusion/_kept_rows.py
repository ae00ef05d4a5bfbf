"""What packed encoders share, and what a caller may ask of them for one call.

That is to return packed rows, or to compute padding. Neither can be asked for within a compiled
function, which reads no context variables: there encoders pack and unpack.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from fusedformer import functional
from fusedformer._internal.checks import has_values
from fusedformer.functional import Packing


class KeptRows:
    """Where the encoder that keeps its rows packed leaves their packing; None if it did not."""

    packing: Packing | None = None


_kept: ContextVar[KeptRows | None] = ContextVar("kept", default=None)
_padded: ContextVar[bool] = ContextVar("padded", default=False)


@contextmanager
def rows_kept() -> Iterator[KeptRows]:
    """Have the next packed encoder return its rows ``[1, total, width]`` as they are."""
    kept = KeptRows()
    token = _kept.set(kept)
    try:
        yield kept
    finally:
        _kept.reset(token)


@contextmanager
def padding_computed() -> Iterator[None]:
    """Have encoders compute padded positions as stock does."""
    token = _padded.set(True)
    try:
        yield
    finally:
        _padded.reset(token)


def wants_padding() -> bool:
    """Return whether the caller asked for :func:`padding_computed`."""
    return not torch.compiler.is_compiling() and _padded.get()


def has_no_rows(packing: Packing) -> bool:
    """Return whether all of a batch is padding, which layers cannot compute packed."""
    return not torch.compiler.is_compiling() and packing.total == 0


def sequences_of(packing: Packing) -> dict[str, Any]:
    """Return the arguments that tell attention of packed sequences."""
    return {
        "cu_seq_lens_q": packing.cu_seqlens_q, "cu_seq_lens_k": packing.cu_seqlens_k,
        "max_length_q": packing.max_seqlen, "max_length_k": packing.max_seqlen,
    }  # fmt: skip


def as_sequences(bounds: str, given: dict[str, Any]) -> dict[str, Any]:
    """Return a layer's arguments with states ``[total, width]`` as those of packed sequences.

    The argument ``bounds`` of the layer has the first row of each, and the total.
    """
    starts: Tensor = given.pop(bounds)
    most = given.pop("max_seqlen", None)
    if most is None and not torch.compiler.is_compiling() and has_values(starts):
        most = int(starts.diff().max()) if len(starts) > 1 else 0
    return {
        **given, "hidden_states": given["hidden_states"][None], "cu_seq_lens_q": starts,
        "cu_seq_lens_k": starts, "max_length_q": most, "max_length_k": most,
    }  # fmt: skip


def through_layers(
    model: Any, layers: Any, x: Tensor, packing: Packing, layerdrop: float = 0.0, **kwargs: Any
) -> Tensor:
    """Send packed rows through ``layers`` of ``model``, of which training drops some as a whole."""
    sequences = sequences_of(packing)
    for layer in layers:
        if not is_dropped(model, layerdrop):
            found = layer(x, attention_mask=None, **sequences, **kwargs)
            x = found if isinstance(found, Tensor) else found[0]
    return x


def is_dropped(model: Any, layerdrop: float) -> bool:
    """Draw whether training drops a layer, as transformers draws it."""
    return model.training and layerdrop > 0.0 and bool(torch.rand([]) < layerdrop)


def zeroed(hidden: Tensor, keep: Tensor) -> Tensor:
    """Write zeros to ``hidden`` ``[N, S, d]`` where ``keep`` ``[N, S]`` is False."""
    return hidden.masked_fill(~keep[..., None], 0.0)


def unpacked(rows: Tensor, packing: Packing) -> Tensor:
    """Unpack the rows ``[total, width]`` of an encoder, unless its caller keeps them packed."""
    kept = None if torch.compiler.is_compiling() else _kept.get()
    if kept is None or kept.packing is not None:
        return functional.unpack(rows, packing)
    kept.packing = packing
    return rows[None]


def are_kept(packing: Packing) -> bool:
    """Return whether the rows of ``packing`` were returned to a caller who keeps them packed."""
    kept = None if torch.compiler.is_compiling() else _kept.get()
    return kept is not None and kept.packing is packing
