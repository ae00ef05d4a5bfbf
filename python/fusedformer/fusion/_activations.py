"""Activations of other makers, by the names of this library."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F

from fusedformer.nn.children import fused_activation


def activation_name(activation: Any) -> Any:
    """Return the name by which the kernels know an activation, or None."""
    kind = type(activation).__name__
    if kind == "GELUActivation":
        return "gelu" if getattr(activation, "act", None) is F.gelu else None
    if kind in ("NewGELUActivation", "GELUTanh"):
        return "gelu_tanh"
    if kind in ("SiLUActivation", "SiLU"):
        return "silu"
    if kind in ("QuickGELUActivation", "QuickGELU"):
        return "quick_gelu"
    return fused_activation(activation)
