"""Rotary embedding in layers of transformers' models: what they get, and what it turns."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedformer import functional
from fusedformer.fusion._forms import Form, Parts
from fusedformer.fusion._norms import epsilon, gain, is_rms
from fusedformer.nn.children import weights_and_biases


def tables_of(form: Form, rotary: Any, length: int) -> Any:
    """Return cosines and sines as two tables of ``length`` rows, of what a layer was given."""
    if rotary is None:
        return None
    if form.rotary_in_one:
        sin, cos = rotary.squeeze(1).chunk(2, -1)
        rotary = cos, sin
    return _not_turned_before(rotary, length) if form.rotary_last else rotary


def turns(form: Form, parts: Parts) -> bool:
    """Return whether attention turns queries and keys by the tables that its layer is given."""
    return form.turns is None or form.turns(parts.attention)


def turned(
    form: Form, parts: Parts, q: Tensor, k: Tensor, tables: Any, given: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Turn queries and keys by the angles of their positions, normed before where they are."""
    has_norms = parts.query_norm is not None and not form.norms_all_heads
    if tables is not None and turns(form, parts):
        if form.learned_angles and torch.is_grad_enabled():  # which kernels take no gradient to
            return _turned_by_aten(q, *tables), _turned_by_aten(k, *tables)
        tables = _of_each_angle(form, *tables)
        norms: dict[str, Any] = {}
        if has_norms:
            norms = _norms(parts.query_norm, parts.key_norm)
        q, k = functional.rotary_embedding(q, k, *tables, interleaved=form.interleaved, **norms)
    elif has_norms:
        q = parts.query_norm(q.transpose(1, 2)).transpose(1, 2)
        k = parts.key_norm(k.transpose(1, 2)).transpose(1, 2)
    if form.query_scale is not None:
        q = q * form.query_scale(parts.attention, given).to(q.dtype)
    return q, k


def _of_each_angle(form: Form, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Return tables that have each angle once."""
    if form.angles == "twice":
        half = cos.shape[-1] // 2
        return cos[..., :half], sin[..., :half]
    return (cos[..., ::2], sin[..., ::2]) if form.angles == "pairs" else (cos, sin)


def _turned_by_aten(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn heads by tables that have each angle twice, with gradients to them."""
    first, second = x.float().chunk(2, -1)
    turned = x.float() * cos.float() + torch.cat((-second, first), -1) * sin.float()
    return turned.to(x.dtype)


def _norms(query_norm: Any, key_norm: Any) -> dict[str, Any]:
    """Return the arguments of :func:`rotary_embedding` for norms of heads."""
    found: dict[str, Any] = {"norm": "rms" if is_rms(query_norm) else "layer"}
    for name, norm in (("query", query_norm), ("key", key_norm)):
        if is_rms(norm):
            found[f"{name}_weight"] = gain(norm)
        else:
            found[f"{name}_weight"], found[f"{name}_bias"] = weights_and_biases(norm)
    return {**found, "eps": epsilon(query_norm)}


def _not_turned_before(rotary: tuple[Tensor, Tensor], length: int) -> tuple[Tensor, Tensor]:
    """Return tables of ``length`` rows; those in front turn nothing."""
    cos, sin = rotary
    missing = (0, 0, length - cos.shape[-2], 0)
    return F.pad(cos, missing, value=1.0), F.pad(sin, missing)
