"""Text generation: a cache of keys and values, the choice of the next token, and the loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor

from fusedformer import functional
from fusedformer._internal import checks
from fusedformer.functional import Packing
from fusedformer.functional.steps import self_attention
from fusedformer.models.prompts import PrefixTuning
from fusedformer.nn import TransformerEncoder
from fusedformer.nn.masks import Attend, AttentionMasks
from fusedformer.nn.stacks import check_is_fused
from fusedformer.nn.transformer_encoder_layer import TransformerEncoderLayer

_TOKENS_BETWEEN_LOOKS = 8  # looking whether all sequences ended waits for the device


class KeyValueCache:
    """Keys and values of all layers, with room for more, and the lengths in use.

    Attributes:
        keys, values: ``[layers, B, heads, room + 1, head_dim]``; the last position takes what
            belongs to no sequence.
        lengths: int32 ``[B]``, on the device: positions in use, those of a learned prefix included.
    """

    def __init__(
        self,
        layers: int,
        batch: int,
        heads: int,
        room: int,
        head_dim: int,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        shape = (layers, batch, heads, room + 1, head_dim)
        # Zeros, as ATen's attention multiplies masked values by 0, which keeps NaN.
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.lengths = torch.zeros(batch, dtype=torch.int32, device=device)
        self._most = 0  # a bound of the lengths that the host knows
        self._prefix = 0  # how many of them are a prefix's, without tokens

    @staticmethod
    def of(
        encoder: TransformerEncoder,
        batch: int,
        longest: int,
        room: int,
        prefix: PrefixTuning | None = None,
    ) -> KeyValueCache:
        """Make a cache in the dtype of the encoder's products, empty but for a learned prefix.

        Args:
            batch: number of sequences.
            longest: number of tokens of the longest prompt.
            room: number of tokens behind it.
        """
        attention: Any = encoder.layers[0].self_attn
        weight = attention.out_proj.weight
        kind = weight.device.type
        autocast = torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if autocast else weight.dtype
        heads, dim = attention.num_heads, attention.head_dim
        more = 0 if prefix is None else prefix.length
        sizes = len(encoder.layers), batch, heads, more + longest + room, dim
        cache = KeyValueCache(*sizes, weight.device, dtype)
        cache._most, cache._prefix = more + longest, more
        if prefix is not None:
            cache.keys[:, :, :, :more] = prefix.key.detach()[:, None]
            cache.values[:, :, :, :more] = prefix.value.detach()[:, None]
            cache.lengths.fill_(more)
        return cache

    @property
    def room(self) -> int:
        """Return the number of positions that fit."""
        return self.keys.shape[3] - 1

    def positions(self, count: int) -> Tensor:
        """Return the positions ``[B, count]`` of the next tokens; a prefix does not count."""
        return self._places(count) - self._prefix

    def _places(self, count: int) -> Tensor:
        return self.lengths[:, None] + torch.arange(count, device=self.lengths.device)

    def filling(self, packing: Packing, attend: Attend | None = None) -> Attend:
        """Make attention for ``forward_packed`` that also stores the keys and values of prompts.

        Args:
            packing: of the prompts.
            attend: takes the place of self-attention.
        """
        starts, ends = packing.cu_seqlens[:-1], packing.cu_seqlens[1:]
        rows = torch.arange(packing.total, dtype=ends.dtype, device=ends.device)
        sequences = torch.searchsorted(ends, rows, right=True)
        tail = sequences >= ends.shape[0]  # rows behind the last token
        sequences = sequences.clamp(max=ends.shape[0] - 1)
        places = (self._prefix + rows - starts[sequences]).masked_fill(tail, self.room).long()
        self.lengths += packing.cu_seqlens.diff()

        def fill(qkv: Tensor, dropout_p: float, masks: AttentionMasks) -> Tensor:
            self._store(masks.layer, sequences, places, *qkv[0].unbind(1)[1:])
            if attend is None:
                return self_attention(qkv, masks.terms(qkv.shape[-1], dropout_p))
            return attend(qkv, dropout_p, masks)

        return fill

    def run(self, encoder: TransformerEncoder, hidden: Tensor) -> Tensor:
        """Run the encoder on the next tokens' ``[B, T, d]`` and append them, without autograd."""
        check_is_fused("KeyValueCache.run", encoder, TransformerEncoderLayer)
        batch, count = hidden.shape[:2]
        if self._most + count > self.room:
            raise ValueError(
                f"KeyValueCache.run(): expected at most {self.room - self._most} tokens, for which "
                f"there is room, but got {count}"
            )
        places = self._places(count)
        sequences = torch.arange(batch, device=hidden.device)[:, None]
        lengths = self.lengths + count

        def append(qkv: Tensor, dropout_p: float, masks: AttentionMasks) -> Tensor:
            query, key, value = qkv.unbind(2)
            self._store(masks.layer, sequences, places, key, value)
            heads = functional.scaled_dot_product_attention(
                query.transpose(1, 2),
                self.keys[masks.layer],
                self.values[masks.layer],
                is_causal=count > 1,
                key_lengths=lengths,
                causal_alignment="bottom_right",
            )
            return heads.transpose(1, 2)

        masks = AttentionMasks(None, None, False, attend=append)
        output = encoder._run(hidden, masks, None)
        self.lengths.copy_(lengths)
        self._most += count
        return output

    def _store(
        self, layer: int, sequences: Tensor, places: Tensor, key: Tensor, value: Tensor
    ) -> None:
        """Write ``[*, heads, head_dim]`` at ``places`` ``[*]`` of ``sequences`` ``[*]``."""
        self.keys[layer][sequences, :, places] = key
        self.values[layer][sequences, :, places] = value


def next_token(
    logits: Tensor,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: Generator | None = None,
) -> Tensor:
    """Choose the most likely token of each row, or draw one; nothing waits for the device.

    Args:
        logits: ``[B, V]``.
        temperature: 0 takes the most likely; else logits are divided by it and a token is drawn.
        top_k: draw among the ``top_k`` most likely tokens only, and those that are as likely as
            the last of them.
        top_p: draw among the fewest most likely tokens whose probabilities, after ``top_k``, sum up
            to at least this.
        generator: to draw from, of the device of ``logits``; torch's own if None.

    Returns:
        int64 ``[B]``.

    Raises:
        ValueError: negative ``temperature``, or 0 with another setting; ``top_k`` below 1;
            ``top_p`` outside (0, 1].

    Source: Fan et al., arXiv:1805.04833 (top-k); Holtzman et al., arXiv:1904.09751 (top-p).
    """
    _check_settings("next_token", temperature, top_k, top_p)
    if temperature == 0.0:
        return logits.argmax(-1)
    scores = logits.float() / temperature
    if top_k is not None:
        least = scores.topk(min(top_k, scores.shape[-1])).values[:, -1:]
        scores = scores.masked_fill(scores < least, -torch.inf)
    probabilities = scores.softmax(-1)
    if top_p is not None:
        ordered, order = probabilities.sort(-1, descending=True)
        beyond = ordered.cumsum(-1) - ordered >= top_p
        removed = torch.zeros_like(beyond).scatter_(-1, order, beyond)
        probabilities = probabilities.masked_fill(removed, 0.0)
    # An exponential variable divided by its rate is smallest with probability in proportion to it.
    clocks = torch.empty_like(probabilities).exponential_(generator=generator)
    return (probabilities / clocks).argmax(-1)


@torch.no_grad()
def generate(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_token_id: int | None = None,
    pad_token_id: int | None = None,
    generator: Generator | None = None,
) -> Tensor:
    """Generate the tokens that follow each prompt, with a cache of keys and values.

    The prompts are read packed, once; after that each token is one step of few kernels whose
    shapes stay the same. Whether all sequences have ended is asked every few tokens.

    Args:
        input_ids: integer ``[B, L]``: the prompts.
        attention_mask: ``[B, L]``, nonzero = real token, padding on either side; None if all are.
        max_new_tokens: the most tokens for each prompt.
        temperature, top_k, top_p, generator: as for :func:`next_token`; greedy by default.
        eos_token_id: ends a sequence, and is its last token; None is the configuration's.
        pad_token_id: what follows in sequences that have ended; None is ``eos_token_id``.

    Returns:
        The new tokens alone, int64 ``[B, n]``, n the longest sequence's and at most
        ``max_new_tokens``.

    Raises:
        TypeError, ValueError: as the model; ``max_new_tokens`` not positive, or more positions
            than the model has; a model in training mode; settings as :func:`next_token`.
    """
    function = "generate"
    _check_settings(function, temperature, top_k, top_p)
    if max_new_tokens < 1:
        raise ValueError(
            f"{function}(): expected 'max_new_tokens' to be positive, but got {max_new_tokens}"
        )
    if model.training:
        raise ValueError(f"{function}(): expected a model in eval mode; call .eval() first")
    eos = model.config.eos_token_id if eos_token_id is None else eos_token_id
    pad = pad_token_id if pad_token_id is not None else 0 if eos is None else eos
    choose: Callable[[Tensor], Tensor] = lambda logits: next_token(
        logits, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator
    )
    hidden, cache = model.prefill(input_ids, attention_mask, max_new_tokens - 1)
    batch = input_ids.shape[0]
    tokens = torch.full((batch, max_new_tokens), pad, dtype=torch.int64, device=input_ids.device)
    counts = torch.zeros(batch, dtype=torch.int64, device=input_ids.device)
    going = torch.ones(batch, dtype=torch.bool, device=input_ids.device)
    for step in range(max_new_tokens):
        token = torch.where(going, choose(model.logits(hidden)), pad)
        tokens[:, step] = token
        counts += going
        if eos is not None:
            going &= token != eos
        looks = eos is not None and step % _TOKENS_BETWEEN_LOOKS == _TOKENS_BETWEEN_LOOKS - 1
        if step + 1 == max_new_tokens or (looks and not bool(going.any())):
            break
        hidden = model.decode(token[:, None], cache)[:, 0]
    return tokens[:, : int(counts.max())]


def _check_settings(
    function: str, temperature: float, top_k: int | None, top_p: float | None
) -> None:
    checks.check_number(function, "temperature", temperature)
    if not temperature >= 0.0:
        raise ValueError(
            f"{function}(): expected 'temperature' to be at least 0, but got {temperature}"
        )
    for name, value in (("top_k", top_k), ("top_p", top_p)):
        if value is not None and temperature == 0.0:
            raise ValueError(
                f"{function}(): expected a positive 'temperature' with '{name}', but got 0, which "
                f"takes the most likely token"
            )
    if top_k is not None and top_k < 1:
        raise ValueError(f"{function}(): expected 'top_k' to be at least 1, but got {top_k}")
    if top_p is not None and not 0.0 < top_p <= 1.0:
        raise ValueError(f"{function}(): expected 'top_p' to be in (0, 1], but got {top_p}")
