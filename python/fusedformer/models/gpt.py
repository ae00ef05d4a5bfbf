"""GPT-2: embeddings, a causal pre-norm stack, a head tied to the embeddings, and generation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusedformer.models.generation import KeyValueCache, generate
from fusedformer.models.huggingface import (
    HuggingFaceWeights,
    ModelConfig,
    Source,
    activation_of,
    weight_and_bias,
)
from fusedformer.models.initialization import draw_parameters
from fusedformer.models.prompts import embedded
from fusedformer.models.text import Encoded, TextModel
from fusedformer.nn import LayerNorm, TransformerEncoder, TransformerEncoderLayer
from fusedformer.objectives import IGNORED, causal_lm_loss

# From our names to Hugging Face's, and whether its Conv1D keeps the weight transposed.
_LAYER_NAMES = {
    "norm1": ("ln_1", False),
    "self_attn.out_proj": ("attn.c_proj", True),
    "norm2": ("ln_2", False),
    "linear1": ("mlp.c_fc", True),
    "linear2": ("mlp.c_proj", True),
}


@dataclass(frozen=True)
class GPTConfig(ModelConfig):
    """Sizes and settings of GPT-2, by Hugging Face's names; the defaults are GPT-2 small's.

    Raises:
        ValueError: a size that is not positive, heads that do not divide the width, a dropout
            outside [0, 1], an unknown activation.
    """

    _fixed_settings: ClassVar[dict[str, Any]] = {
        "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False, "tie_word_embeddings": True,
    }  # fmt: skip
    _checked_names: ClassVar[tuple[str, str, str]] = "n_embd", "n_head", "activation_function"

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None  # 4 * n_embd
    activation_function: str = "gelu_new"
    resid_pdrop: float = 0.1
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    eos_token_id: int | None = 50256


class GPTEmbeddings(nn.Module):
    """``dropout(token + position)``."""

    def __init__(self, config: GPTConfig, device: Any, dtype: torch.dtype | None) -> None:
        super().__init__()
        to: dict[str, Any] = {"device": device, "dtype": dtype}
        self.token = nn.Embedding(config.vocab_size, config.n_embd, **to)
        self.position = nn.Embedding(config.n_positions, config.n_embd, **to)
        self.dropout = nn.Dropout(config.embd_pdrop)

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, prompt: Tensor | None = None
    ) -> Tensor:
        """Embed integers ``[*]`` as ``[*, d]``; ids past the table are the prompt's."""
        words = embedded(self.token, input_ids, prompt)
        output: Tensor = self.dropout(words + self.position(position_ids))
        return output


class GPTDecoderModel(TextModel, HuggingFaceWeights):
    """Token ids to the hidden states after GPT-2's last norm, its loss, and text that follows.

    ``embeddings`` is a :class:`GPTEmbeddings`, ``encoder`` a
    :class:`fusedformer.nn.TransformerEncoder` of pre-norm layers, run causally, with a final norm.
    Padded batches are packed; the position of a token counts the real tokens before it, so that
    padding may be on either side.

    Args:
        config: sizes and settings.
        device, dtype: of the parameters.

    Source: Radford et al., Language Models are Unsupervised Multitask Learners, 2019.
    """

    config: GPTConfig
    embeddings: GPTEmbeddings

    _is_causal = True
    _config = GPTConfig
    _prefix = "transformer."
    _ignored_parts = ("score.", "multiple_choice_head.", "classifier.")
    _ignored_buffers = r"h\.\d+\.attn\.(bias|masked_bias)"

    generate = generate

    def __init__(
        self, config: GPTConfig, device: Any = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.embeddings = GPTEmbeddings(config, device, dtype)
        to: dict[str, Any] = {"device": device, "dtype": dtype}
        width, eps = config.n_embd, config.layer_norm_epsilon
        layer = TransformerEncoderLayer(
            width, config.n_head, config.n_inner or 4 * width, config.resid_pdrop,
            activation_of(config.activation_function), eps, batch_first=True, norm_first=True, **to,
        )  # fmt: skip
        # GPT-2 has another rate for attention weights, and no dropout after the activation.
        layer.self_attn.dropout = config.attn_pdrop
        layer.dropout.p = 0.0
        self.encoder = TransformerEncoder(layer, config.n_layer, LayerNorm(width, eps, **to))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all weights anew: normal of deviation ``initializer_range``, biases 0.

        Weights whose product is added to the residual stream are smaller, by the square root of the
        number of these additions.
        """
        deviation, additions = self.config.initializer_range, 2 * self.config.n_layer
        small = deviation / math.sqrt(additions)
        draw_parameters(self, deviation, {"out_proj.weight": small, "linear2.weight": small})

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        output_rows: Tensor | None = None,
    ) -> Tensor:
        """Compute hidden states after the last norm, of real tokens with an ``attention_mask``.

        Args:
            input_ids: integer ``[B, L]``, each below ``vocab_size``.
            attention_mask: ``[B, L]``, nonzero = real token, 0 = padding; None if all are real.
            position_ids: integer, broadcastable to ``[B, L]``; if None, how many real tokens come
                before.
            output_rows: only these, as for :class:`fusedformer.nn.TransformerEncoder`.

        Returns:
            ``[B, L, d]`` in the dtype of the parameters; 0 at padded positions. Or what
            ``output_rows`` says.

        Raises:
            TypeError: ``input_ids`` are not integers.
            ValueError: wrong rank or shape; a sequence longer than ``n_positions``.
        """
        return self._hidden(input_ids, attention_mask, position_ids, output_rows).padded()

    def pooled(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """Compute hidden states ``[B, d]`` of last real tokens, the last layer for them alone.

        Arguments and errors are those of :meth:`forward`.
        """
        last = self._last(input_ids, attention_mask)
        hidden: Tensor = self(input_ids, attention_mask, position_ids, output_rows=last)
        return hidden[:, 0]

    def logits(self, hidden: Tensor) -> Tensor:
        """Compute logits ``[*, vocab_size]`` of hidden states ``[*, d]``."""
        return F.linear(hidden, self.embeddings.token.weight)

    def loss(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        **settings: Any,
    ) -> Tensor:
        """Compute the loss of predicting each token; no logits of all tokens are in memory.

        Args:
            input_ids, attention_mask, position_ids: as for :meth:`forward`.
            labels: int64 ``[B, L]``, not shifted, -100 where a token is not to be learned; if None,
                ``input_ids``. Padding is never learned.
            settings: ``label_smoothing``, ``reduction`` and others of
                :func:`fusedformer.objectives.causal_lm_loss`; with ``reduction="none"`` a loss for
                each packed row.

        Returns:
            A scalar: the mean over predicted tokens.

        Raises:
            TypeError, ValueError: as :meth:`forward` and the loss.
        """
        labels = input_ids.long() if labels is None else labels
        self._check(input_ids, None, labels=labels)
        rows, packing, _, count = self._hidden(input_ids, attention_mask, position_ids, None)
        labels, places = F.pad(labels, (count, 0), value=IGNORED), packing.indices
        packed = labels.flatten()[places.clamp(min=0)].masked_fill(places < 0, IGNORED)
        return causal_lm_loss(
            rows, self.embeddings.token.weight, packed, cu_seqlens=packing.cu_seqlens, **settings
        )

    @torch.no_grad()
    def prefill(
        self, input_ids: Tensor, attention_mask: Tensor | None, room: int
    ) -> tuple[Tensor, KeyValueCache]:
        """Read the prompts; return hidden states ``[B, d]`` of their last tokens, and the cache.

        Args:
            input_ids, attention_mask: as for :meth:`forward`; padding on either side.
            room: tokens for which the cache is to have room beside the prompts.

        Raises:
            ValueError: a prompt without tokens; more positions than the model has.
        """
        self._check(input_ids, None, attention_mask=attention_mask)
        keep = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        keep = keep != 0
        shortest, longest = _least_and_most(keep.sum(1) + self._prompt_length)
        if shortest <= self._prompt_length:
            raise ValueError("prefill(): expected a real token in each sequence of 'input_ids'")
        if longest + room > self.config.n_positions:
            raise ValueError(
                f"prefill(): expected at most {self.config.n_positions} positions, but got "
                f"prompts of up to {longest} and room for {room} more"
            )
        last = self._last(input_ids, attention_mask)
        cache = KeyValueCache.of(self.encoder, keep.shape[0], longest, room, self.prefix)
        encoded = self._encode(input_ids, attention_mask, None, last, cache=cache)
        return encoded.padded()[:, 0], cache

    @torch.no_grad()
    def decode(self, input_ids: Tensor, cache: KeyValueCache) -> Tensor:
        """Compute hidden states ``[B, T, d]`` of the next tokens ``[B, T]``; cache their keys.

        Shapes do not depend on how much is in the cache, and nothing is waited for: a CUDA graph
        can capture it.

        Raises:
            ValueError: no room for them in the cache.
        """
        hidden = self.embeddings(input_ids, cache.positions(input_ids.shape[1]))
        return cache.run(self.encoder, hidden)

    def _last(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Return the columns ``[B, 1]`` of last real tokens, -1 where there is none."""
        self._check(input_ids, None, attention_mask=attention_mask)
        columns = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        if attention_mask is not None:
            columns = columns.masked_fill(attention_mask == 0, -1)
        return columns.amax(1, keepdim=True)

    def _hidden(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        output_rows: Tensor | None,
    ) -> Encoded:
        longest = None if position_ids is not None else self.config.n_positions
        self._check(input_ids, longest, attention_mask=attention_mask)
        return self._encode(input_ids, attention_mask, position_ids, output_rows)

    def _positions(self, input_ids: Tensor, keep: Tensor | None) -> Tensor:
        if keep is None:
            return super()._positions(input_ids, keep)
        return (keep.cumsum(1) - 1).clamp(min=0)

    def _tied(self) -> dict[str, str]:
        return {"lm_head.weight": "embeddings.token.weight"}

    def _sources(self) -> dict[str, Source]:
        sources = {
            "embeddings.token.weight": Source(("wte.weight",)),
            "embeddings.position.weight": Source(("wpe.weight",)),
            **weight_and_bias("encoder.norm", "ln_f"),
        }
        for index in range(self.config.n_layer):
            ours, theirs = f"encoder.layers.{index}", f"h.{index}"
            sources[f"{ours}.self_attn.in_proj_weight"] = Source(
                (f"{theirs}.attn.c_attn.weight",), transposed=True
            )
            sources[f"{ours}.self_attn.in_proj_bias"] = Source((f"{theirs}.attn.c_attn.bias",))
            for own, (their, transposed) in _LAYER_NAMES.items():
                sources |= weight_and_bias(f"{ours}.{own}", f"{theirs}.{their}", transposed)
        return sources


def _least_and_most(counts: Tensor) -> tuple[int, int]:
    """Return both of a tensor, (0, 0) if it is empty; waits for the device once."""
    if not counts.numel():
        return 0, 0
    least, most = torch.stack(torch.aminmax(counts)).tolist()
    return least, most
