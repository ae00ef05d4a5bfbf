"""Build the models of :mod:`fusedformer.models` of torch's own modules: padded, with all logits.

Parameters have the same names and shapes, so either loads the other's ``state_dict``; ``loss``
takes the same arguments.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusedformer.models import BertConfig, CLIPTextConfig, GPTConfig
from fusedformer.models.huggingface import activation_of
from fusedformer.objectives import IGNORED


def _encoder(
    width: int, heads: int, inner: int, activation: str, eps: float, layers: int, pre_norm: bool,
    final_norm: bool,
) -> nn.TransformerEncoder:  # fmt: skip
    layer = nn.TransformerEncoderLayer(
        width, heads, inner, 0.0, activation_of(activation), eps, batch_first=True,
        norm_first=pre_norm,
    )  # fmt: skip
    norm = nn.LayerNorm(width, eps) if final_norm else None
    return nn.TransformerEncoder(layer, layers, norm, enable_nested_tensor=False)


class StockBert(nn.Module):
    """``BertEncoderModel`` with its heads ``"mlm"`` and ``"nsp"``, without dropout."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        self.embeddings: Any = nn.ModuleDict({
            "word": nn.Embedding(config.vocab_size, width, config.pad_token_id),
            "position": nn.Embedding(config.max_position_embeddings, width),
            "token_type": nn.Embedding(config.type_vocab_size, width),
            "norm": nn.LayerNorm(width, eps),
        })  # fmt: skip
        self.encoder = _encoder(
            width, config.num_attention_heads, config.intermediate_size, config.hidden_act, eps,
            config.num_hidden_layers, pre_norm=False, final_norm=False,
        )  # fmt: skip
        self.pooler = nn.Linear(width, width)
        self.mlm: Any = nn.ModuleDict({
            "dense": nn.Linear(width, width), "norm": nn.LayerNorm(width, eps)
        })  # fmt: skip
        self.mlm.register_parameter("bias", nn.Parameter(torch.zeros(config.vocab_size)))
        self.nsp = nn.Linear(width, 2)
        self.activation = activation_of(config.hidden_act)

    def loss(
        self, input_ids: Tensor, labels: Tensor, next_sentence_label: Tensor,
        attention_mask: Tensor, token_type_ids: Tensor,
    ) -> Tensor:  # fmt: skip
        """Add the losses of masked language modelling and next sentence."""
        tables, head = self.embeddings, self.mlm
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = tables["word"](input_ids) + tables["token_type"](token_type_ids)
        x = tables["norm"](x + tables["position"](positions))
        hidden = self.encoder(x, src_key_padding_mask=attention_mask == 0)
        inner = head["norm"](self.activation(head["dense"](hidden)))
        logits = F.linear(inner, tables["word"].weight, head.bias)
        masked = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
        follows = self.nsp(torch.tanh(self.pooler(hidden[:, 0])))
        return masked + F.cross_entropy(follows, next_sentence_label)


class _Causal(nn.Module):
    """A causal pre-norm stack; padding is on the right, where no token sees it."""

    def __init__(self, vocab_size: int, positions: int, width: int, **encoder: Any) -> None:
        super().__init__()
        self.embeddings: Any = nn.ModuleDict({
            "token": nn.Embedding(vocab_size, width), "position": nn.Embedding(positions, width)
        })  # fmt: skip
        self.encoder = _encoder(width, pre_norm=True, final_norm=True, **encoder)

    def hidden(self, input_ids: Tensor) -> Tensor:
        """Return hidden states ``[B, L, d]``."""
        length = input_ids.shape[1]
        positions = torch.arange(length, device=input_ids.device)
        x = self.embeddings["token"](input_ids) + self.embeddings["position"](positions)
        mask = nn.Transformer.generate_square_subsequent_mask(length, device=x.device)
        hidden: Tensor = self.encoder(x, mask, is_causal=True)
        return hidden


class StockGPT(_Causal):
    """``GPTDecoderModel`` without dropout."""

    def __init__(self, config: GPTConfig) -> None:
        width = config.n_embd
        super().__init__(
            config.vocab_size, config.n_positions, width, heads=config.n_head,
            inner=config.n_inner or 4 * width, activation=config.activation_function,
            eps=config.layer_norm_epsilon, layers=config.n_layer,
        )  # fmt: skip

    def loss(self, input_ids: Tensor, labels: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the loss of predicting each token from those before it."""
        logits = F.linear(self.hidden(input_ids)[:, :-1], self.embeddings["token"].weight)
        wanted = labels[:, 1:].masked_fill(attention_mask[:, 1:] == 0, IGNORED)
        return F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=IGNORED)


class StockTextTower(_Causal):
    """CLIP's text tower, which returns the hidden state of the last real token."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__(
            config.vocab_size, config.max_position_embeddings, config.hidden_size,
            heads=config.num_attention_heads, inner=config.intermediate_size,
            activation=config.hidden_act, eps=config.layer_norm_eps,
            layers=config.num_hidden_layers,
        )  # fmt: skip

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return ``[B, d]``."""
        last = attention_mask.sum(1) - 1
        return self.hidden(input_ids)[torch.arange(len(last), device=last.device), last]


class StockContrastive(nn.Module):
    """``ContrastiveLoss`` with the matrix of all scores."""

    def __init__(self) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the mean of both directions' cross entropies."""
        with torch.no_grad():
            self.logit_scale.clamp_(max=math.log(100))
        scores = self.logit_scale.exp() * a @ b.t()
        labels = torch.arange(len(a), device=a.device)
        return (F.cross_entropy(scores, labels) + F.cross_entropy(scores.t(), labels)) / 2
