"""Learned prompts: vectors in front of the input, or keys and values in front of every layer's."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusedformer import functional
from fusedformer.nn.masks import Attend, AttentionMasks


class PromptTuning(nn.Module):
    """Learned vectors ``weight`` ``[length, width]`` in front of each sequence.

    Made by :func:`fusedformer.finetuning.prompt_tuning`.

    Source: Lester et al., The Power of Scale for Parameter-Efficient Prompt Tuning,
    arXiv:2104.08691.
    """

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(start)

    @property
    def length(self) -> int:
        """Return the number of vectors."""
        return self.weight.shape[0]


def embedded(table: nn.Embedding, ids: Tensor, prompt: Tensor | None) -> Tensor:
    """Embed ``ids`` as ``[*, width]``; ids beyond the table are the prompt's vectors."""
    if prompt is None:
        found: Tensor = table(ids)
        return found
    learned = ids >= table.num_embeddings
    vectors = F.embedding((ids - table.num_embeddings).clamp(min=0), prompt)
    return torch.where(learned[..., None], vectors, table(ids.masked_fill(learned, 0)))


class PrefixTuning(nn.Module):
    """Learned ``key`` and ``value`` ``[layers, heads, length, head_dim]`` for all tokens.

    Attention over them and over a sequence's own keys are two calls, merged by their log-sum-exp:
    the prefix is neither copied for each sequence nor joined with its keys. Made by
    :func:`fusedformer.finetuning.prefix_tuning`.

    Source: Li and Liang, Prefix-Tuning: Optimizing Continuous Prompts for Generation,
    arXiv:2101.00190; without its reparametrization.
    """

    def __init__(self, key: Tensor, value: Tensor) -> None:
        super().__init__()
        self.key = nn.Parameter(key)
        self.value = nn.Parameter(value)

    @property
    def length(self) -> int:
        """Return the number of keys in a layer and head."""
        return self.key.shape[2]

    def attention(self) -> Attend:
        """Make attention of packed rows, for ``TransformerEncoder.forward_packed``."""
        return functools.partial(_attend_to, self.key.unbind(), self.value.unbind())


def _attend_to(
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    qkv: Tensor,
    dropout_p: float,
    masks: AttentionMasks,
) -> Tensor:
    query, key, value = qkv.squeeze(0).unbind(1)
    assert masks.cu_seqlens_q is not None and masks.cu_seqlens_k is not None
    own, own_lse = functional.varlen_attention(
        query,
        key,
        value,
        masks.cu_seqlens_q,
        masks.cu_seqlens_k,
        masks.max_seqlen_q,
        masks.max_seqlen_k,
        dropout_p,
        masks.is_causal,
        return_lse=True,
    )
    # All sequences have the same prefix, so that rows attend to it as one sequence.
    found, lse = functional.scaled_dot_product_attention(
        query.transpose(0, 1)[None],
        keys[masks.layer][None].to(query.dtype),
        values[masks.layer][None].to(query.dtype),
        dropout_p=dropout_p,
        return_lse=True,
    )
    own = own.transpose(0, 1)[None]
    merged, _ = functional.merge_attention_states(own, own_lse[None], found, lse)
    return merged.transpose(1, 2)
