"""Initial values of the models' parameters."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn


@torch.no_grad()
def draw_parameters(
    module: nn.Module, deviation: float, others: Mapping[str, float] | None = None
) -> None:
    """Draw all weights anew from normal distributions; biases are 0, and norms do nothing.

    Args:
        module: whose norms have ``norm`` in their names.
        deviation: of the weights.
        others: deviations of the weights whose names end so, in place of ``deviation``.
    """
    endings = others or {}
    for name, parameter in module.named_parameters():
        if "norm" in name:
            nn.init.constant_(parameter, 1.0 if name.endswith("weight") else 0.0)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
        else:
            found = [other for ending, other in endings.items() if name.endswith(ending)]
            nn.init.normal_(parameter, std=found[0] if found else deviation)
