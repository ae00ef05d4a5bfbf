"""What is captured as a CUDA graph: cases of ops and small encoders."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fusedformer import nn
from fusedformer.models import BertConfig, BertEncoderModel
from fusedformer.parity.cases import Case, all_cases

HAS_GPU = torch.cuda.is_available()
N, S, D, H = 3, 8, 16, 2
LENGTHS = [5, 8, 2]
# Their cases ask how many tokens there are; packing with static shapes is tested in the encoder.
CASES = [case for case in all_cases() if case.op.name not in ("pack", "unpack")]


def padding_of(lengths: list[int], device: str) -> Tensor:
    return torch.arange(S, device=device) >= torch.tensor(lengths, device=device)[:, None]


def encoder(dropout: float = 0.0, **settings: Any) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(D, H, 24, dropout, batch_first=True, **settings)
    return nn.TransformerEncoder(layer, 2, nn.LayerNorm(D), static_shapes=True)


def bert(dropout: float = 0.0) -> BertEncoderModel:
    config = BertConfig(
        40, D, 2, H, 24, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
        max_position_embeddings=S,
    )  # fmt: skip
    model = BertEncoderModel(config)
    model.encoder.static_shapes = True
    return model


class Padded(torch.nn.Module):
    """An encoder of tensors by position, as ``make_graphed_callables`` takes them."""

    def __init__(self, encoder: torch.nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, src: Tensor, padding: Tensor) -> Tensor:
        output: Tensor = self.encoder(src, src_key_padding_mask=padding)
        return output


def inputs_of(case: Case, device: str, seed: int) -> dict[str, Tensor]:
    """Tensors of a case, on the device."""
    made = case.make(torch.Generator().manual_seed(seed))
    return {name: tensor.to(device) for name, tensor in made.items()}


def results_of(call: Callable[[], Any], leaves: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    """Outputs and gradients."""
    found = call()
    outputs = [found] if isinstance(found, Tensor) else list(found)
    learned = [output for output in outputs if output.requires_grad]
    back = torch.autograd.grad(learned, leaves, grads, allow_unused=True)
    return [*(output.detach() for output in outputs), *(g for g in back if g is not None)]
