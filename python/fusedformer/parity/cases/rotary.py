"""List cases of rotary embedding and QK-norm."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fusedformer import functional, reference
from fusedformer.parity.cases.case import Case, Op, normal

_ROWS, _PAIRS = 9, 8


def _with_angles(function: Any) -> Any:
    """Give ``function`` tables of angles in the dtype of the queries, or wider."""

    def call(query: Tensor, **arguments: Any) -> Any:
        places = torch.arange(_ROWS, dtype=torch.float64, device=query.device)
        speeds = 100.0 ** -(torch.arange(_PAIRS, dtype=torch.float64, device=query.device) / _PAIRS)
        angles = torch.outer(places, speeds)
        wide = torch.promote_types(query.dtype, torch.float32)
        # Rounded once, so that the definition turns by the same angles.
        tables = {"cos": angles.cos().float().to(wide), "sin": angles.sin().float().to(wide)}
        return function(query, **arguments, **tables)

    return call


def _stock(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, **settings: Any) -> Any:
    """Compute it as models of transformers do, in the dtype of the queries."""
    interleaved, norm = settings.pop("interleaved", False), settings.pop("norm", None)
    length = query.shape[2]
    tables = [table[:length].to(query.dtype) for table in (cos, sin)]

    def turned(x: Tensor, weight: Tensor | None) -> Tensor:
        if norm is not None:
            x = torch.nn.functional.rms_norm(x, x.shape[-1:], weight, 1e-6)
        pairs = cos.shape[-1]
        c, s = (torch.stack((t, t), -1).flatten(-2) if interleaved else torch.cat((t, t), -1)
                for t in tables)  # fmt: skip
        rotated, rest = x[..., : 2 * pairs], x[..., 2 * pairs :]
        if interleaved:
            half = torch.stack((-rotated[..., 1::2], rotated[..., ::2]), -1).flatten(-2)
        else:
            half = torch.cat((-rotated[..., pairs:], rotated[..., :pairs]), -1)
        return torch.cat((rotated * c + half * s, rest), -1)

    return turned(query, settings.get("query_weight")), turned(key, settings.get("key_weight"))


def rotary_cases() -> Iterator[Case]:
    op = Op(
        "rotary_embedding",
        _with_angles(functional.rotary_embedding),
        _with_angles(_stock),
        _with_angles(reference.rotary_embedding),
    )
    plain = normal(query=(2, 3, 7, 24), key=(2, 1, 7, 24))
    yield Case(op, "halves", plain, {}, True)
    yield Case(op, "neighbours", plain, {"interleaved": True})
    normed = normal(
        query=(2, 3, 7, 16), key=(2, 1, 7, 16), query_weight=(16,), key_weight=(16,)
    )  # fmt: skip
    yield Case(op, "QK-norm", normed, {"norm": "rms"})
