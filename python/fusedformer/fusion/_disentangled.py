"""Disentangled attention of DeBERTa's layers: by the kernels, with no matrix of all distances."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from torch import Tensor

from fusedformer import functional
from fusedformer.fusion._attention import FULL, for_batch, key_mask_of
from fusedformer.nn.children import dropout_probability

_REACH = 16  # tables of distances are cut to multiples of this, so that few shapes occur


@dataclasses.dataclass(frozen=True)
class Disentangled:
    """Attention of layers by the embeddings of distances that they are given.

    Scores have a term of content to position, and one of position to content, each by a product of
    those embeddings; ``share_att_key`` has the products of content make them.
    """

    position_key: str = "pos_key_proj"
    position_query: str = "pos_query_proj"

    @staticmethod
    def refuses(module: Any) -> str:
        """Say why layers with this attention cannot be fused; empty if they can."""
        buckets = _buckets(module)
        if buckets > 0 and (
            buckets < 4 or buckets % 2 or module.max_relative_positions <= buckets // 2 + 1
        ):
            return "its buckets of positions are none that the kernels know"
        return ""

    @staticmethod
    def takes(given: dict[str, Any]) -> bool:
        """Return whether a layer was given its arguments by this library, and no dense masks."""
        mask = given.get("attention_mask")
        asked = given.get("query_states"), given.get("relative_pos")
        return asked == (None, None) and (mask is None or mask.dtype is FULL)

    def attended(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        others: dict[str, Any],
    ) -> Tensor:
        """Attend by the settings of a module.

        Args:
            module: its DisentangledSelfAttention.
            query, key, value: ``[batch, heads, length, dim]``; packed in a batch of 1.
            mask: of keys; None where all are seen, and of packed sequences.
            others: ``rel_embeddings [2 * span, width]`` or more, None where positions are not
                relative; of packed sequences ``cu_seq_lens_q`` and so on.

        Returns:
            ``[batch, length, heads, dim]``.
        """
        packed = others.get("cu_seq_lens_q") is not None
        kinds = {"c2p", "p2c"} & {*module.pos_att_type}
        settings: dict[str, Any] = {
            "dropout_p": dropout_probability(module.dropout),
            "scale": 1.0 / math.sqrt(query.shape[-1] * (1 + self._terms(module))),
        }
        if packed:
            query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
            settings |= {
                "cu_seqlens_q": others["cu_seq_lens_q"], "max_seqlen_q": others["max_length_q"],
                "cu_seqlens_k": others["cu_seq_lens_k"], "max_seqlen_k": others["max_length_k"],
            }  # fmt: skip
        else:
            settings["key_mask"] = for_batch(key_mask_of(mask), query.shape[0])
        if module.relative_attention and kinds:
            longest = others["max_length_k"] if packed else key.shape[2]
            tables = self._tables(module, kinds, others["rel_embeddings"], longest)
            farthest = module.max_relative_positions if _buckets(module) > 0 else None
            output = functional.disentangled_attention(
                query, key, value, *tables, max_distance=farthest, **settings
            )
        elif packed:
            output = functional.varlen_attention(query, key, value, **settings)
        else:
            output = functional.scaled_dot_product_attention(query, key, value, **settings)
        return output[None] if packed else output.transpose(1, 2)

    def _terms(self, module: Any) -> int:
        """Return how many terms of positions the scale counts."""
        return len({"c2p", "p2c"} & {*module.pos_att_type})

    def _tables(
        self, module: Any, kinds: set[str], embeddings: Tensor, longest: int
    ) -> list[Tensor | None]:
        """Return a key and a query ``[heads, 2 * span, dim]`` for each bucket of distances."""
        is_shared = getattr(module, "share_att_key", False)
        key = "key_proj" if is_shared else self.position_key
        query = "query_proj" if is_shared else self.position_query
        span, buckets = module.max_relative_positions, _buckets(module)
        reach = buckets or min(span, -(-longest // _REACH) * _REACH)  # distances that there are
        middle = buckets or span
        places = module.pos_dropout(embeddings[middle - reach : middle + reach])
        return [
            _heads(module, getattr(module, name)(places)) if kind in kinds else None
            for kind, name in (("c2p", key), ("p2c", query))
        ]


@dataclasses.dataclass(frozen=True)
class WithBiases(Disentangled):
    """The first DeBERTa's: biases of queries and values beside a product that has none."""

    @staticmethod
    def refuses(module: Any) -> str:
        """Say why layers with this attention cannot be fused; empty if they can."""
        return "its heads talk: a product mixes their scores" if module.talking_head else ""

    def attended(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        others: dict[str, Any],
    ) -> Tensor:
        """Attend as :meth:`Disentangled.attended`."""
        q_bias, v_bias = (
            bias.view(module.num_attention_heads, 1, -1) for bias in (module.q_bias, module.v_bias)
        )
        return super().attended(module, query + q_bias, key, value + v_bias, mask, others)

    def _terms(self, module: Any) -> int:
        return len(module.pos_att_type)


def _buckets(module: Any) -> int:
    """Return the number of buckets on either side; 0 where each distance has its own."""
    found: int = getattr(module, "position_buckets", 0) if module.relative_attention else 0
    return max(found, 0)


def _heads(module: Any, x: Tensor) -> Tensor:
    """Split ``[rows, width]`` in ``[heads, rows, dim]``."""
    return x.view(len(x), module.num_attention_heads, -1).transpose(0, 1)
