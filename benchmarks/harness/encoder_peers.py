"""Hugging Face's BERT encoder with the weights of a stock stack, as a peer."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from harness.case import Program, Unsupported

# Names in a stock layer and in Hugging Face's; the first two hold query, key and value in one.
_NAMES = {
    "self_attn.out_proj": "attention.output.dense", "norm1": "attention.output.LayerNorm",
    "linear1": "intermediate.dense", "linear2": "output.dense", "norm2": "output.LayerNorm",
}  # fmt: skip
_PROJECTED = "attention.self.{}.{}"


def hugging_face(
    stock: nn.Module, program: Callable[[nn.Module], Program], options: dict[str, Any]
) -> Program:
    """Call transformers' BertEncoder with scaled_dot_product_attention, in stock's weights."""
    if importlib.util.find_spec("transformers") is None:
        raise Unsupported("transformers is not installed")
    from transformers import BertConfig
    from transformers.models.bert.modeling_bert import BertEncoder

    weights = dict(stock.named_parameters())
    first = next(iter(weights.values()))
    settings: dict[str, Any] = dict(
        hidden_size=options["width"],
        num_hidden_layers=options["layers"],
        num_attention_heads=options["heads"],
        intermediate_size=options["feedforward"],
        layer_norm_eps=1e-5,
        attn_implementation="sdpa",
    )
    encoder = BertEncoder(BertConfig(**settings)).to(first.device, first.dtype)
    state: dict[str, Tensor] = {}
    for layer in range(options["layers"]):
        ours, theirs = f"layers.{layer}.", f"layer.{layer}."
        for kind in ("weight", "bias"):
            parts = weights[f"{ours}self_attn.in_proj_{kind}"].chunk(3)
            for name, part in zip(("query", "key", "value"), parts, strict=True):
                state[theirs + _PROJECTED.format(name, kind)] = part
            for mine, other in _NAMES.items():
                state[f"{theirs}{other}.{kind}"] = weights[f"{ours}{mine}.{kind}"]
    encoder.load_state_dict(state)

    def forward(src: Tensor, src_key_padding_mask: Tensor | None = None) -> Tensor:
        mask = None
        if src_key_padding_mask is not None:
            mask = ~src_key_padding_mask[:, None, None, :]
            mask = mask.expand(-1, 1, src.shape[1], -1)
        found: Tensor = encoder(src, attention_mask=mask).last_hidden_state
        return found

    def checked(src: Tensor, src_key_padding_mask: Tensor | None = None) -> Tensor:
        output = forward(src, src_key_padding_mask)
        if src_key_padding_mask is None:
            return output
        return output.masked_fill(src_key_padding_mask[:, :, None], 0.0)

    found = program(encoder)
    found.function, found.checked, found.merged = forward, checked, _merged
    return found


def _merged(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """Name gradients as stock does."""
    found: dict[str, Tensor] = {}
    back = {other: mine for mine, other in _NAMES.items()}
    for name, gradient in gradients.items():
        if not name.startswith("layer."):
            found[name] = gradient
            continue
        _, layer, rest = name.split(".", 2)
        part, kind = rest.rsplit(".", 1)
        if part in back:
            found[f"layers.{layer}.{back[part]}.{kind}"] = gradient
        elif part.endswith("query"):
            three = (
                gradients[f"layer.{layer}." + _PROJECTED.format(n, kind)]
                for n in ("query", "key", "value")
            )
            found[f"layers.{layer}.self_attn.in_proj_{kind}"] = torch.cat(list(three))
    return found
