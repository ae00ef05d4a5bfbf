"""Disentangled attention: its backends."""

from __future__ import annotations

from torch import Tensor

from fusedformer._internal.backend import chosen_backend
from fusedformer._internal.tracing import is_traced_by_jit
from fusedformer.ops._shared import draw_seed, is_transformed
from fusedformer.ops.attention.calls import check_for_kernels
from fusedformer.ops.attention.disentangled_aten import (
    Inputs,
    Settings,
    composed,
    disentangled_attention_aten,
)


def disentangled_attention(inputs: Inputs, settings: Settings) -> Tensor:
    """See :func:`fusedformer.functional.disentangled_attention`; without a seed."""
    if is_traced_by_jit() or is_transformed():
        return composed(inputs, settings)
    if chosen_backend(inputs.query) == "triton":
        check_for_kernels("disentangled_attention", inputs.query, inputs.value)
    settings = settings._replace(seed=draw_seed(settings.p, inputs.query.device))
    found: Tensor = disentangled_attention_aten(*inputs, *settings)
    return found
