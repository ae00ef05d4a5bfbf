"""Layers and stacks whose heads and hidden features are spread over ranks.

Their steps are those of the layers that they were: only what goes in and out of the products, and
whose parameters are taken, differs.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fusedformer.distributed._region import Region
from fusedformer.functional import Selection
from fusedformer.functional.steps import feed_forward, linear
from fusedformer.nn import (
    TransformerDecoder,
    TransformerDecoderLayer,
    TransformerEncoder,
    TransformerEncoderLayer,
)
from fusedformer.nn.children import block_of, hooks_of
from fusedformer.nn.masks import AttentionMasks

Step = tuple[Tensor, Tensor | None, Tensor]


class _ParallelLayer:
    """What encoder and decoder layers share."""

    _is_parallel = True
    _region: Region

    def _children_are_plain(self: Any) -> bool:
        """They were when they were spread, and cannot be called since."""
        for name, child in self.named_modules():
            if child is not self and any(True for _ in hooks_of(child)):
                raise RuntimeError(
                    f"{type(self).__name__}: its children's weights are spread over ranks, so that "
                    f"they cannot be called, but '{name}' has a hook; remove it"
                )
        return True

    def _feed_forward(self: Any, x: Tensor, fork: bool) -> Step:
        block = block_of(self)._replace(bias2=None)
        with self._region.own_dropout(x, block.p):
            inner, _, _ = feed_forward(self._region.enter(x), block)
        return self._region.leave(inner), self.linear2.bias, x

    def _projected(self: Any, heads: Tensor, attention: Any) -> tuple[Tensor, Tensor | None]:
        inner, _ = linear(heads, attention.out_proj.weight, None)
        return self._region.leave(inner), attention.out_proj.bias

    def _own_heads(self: Any, masks: AttentionMasks, attention: Any) -> AttentionMasks:
        """``masks`` of this rank's heads alone."""
        mask, heads = masks.attn_mask, attention.num_heads
        if mask is None or mask.shape[1] == 1:
            return masks
        return masks._replace(attn_mask=mask.narrow(1, self._region.rank * heads, heads))


class ParallelEncoderLayer(_ParallelLayer, TransformerEncoderLayer):
    """A :class:`TransformerEncoderLayer` after ``parallelize_module``."""

    _made_of = (TransformerEncoderLayer,)

    def _packed(self, x: Tensor, masks: AttentionMasks, rows: Selection | None = None) -> Tensor:
        with self._region.local(self):
            return super()._packed(x, masks, rows)

    def _attend(
        self, x: Tensor, residual: Tensor, masks: AttentionMasks, rows: Selection | None, fork: bool
    ) -> Step:
        attention: Any = self.self_attn
        masks = self._own_heads(masks, attention)
        with self._region.own_dropout(x, attention.dropout if attention.training else 0.0):
            heads, residual = self._heads(self._region.enter(x), residual, masks, rows, False)
        return *self._projected(heads, attention), residual


class ParallelDecoderLayer(_ParallelLayer, TransformerDecoderLayer):
    """A :class:`TransformerDecoderLayer` after ``parallelize_module``."""

    _made_of = (TransformerDecoderLayer,)

    def _packed(
        self, x: Tensor, memory: Tensor, own: AttentionMasks, cross: AttentionMasks
    ) -> tuple[Tensor, Tensor]:
        with self._region.local(self):
            return super()._packed(x, memory, own, cross)

    def _attend(self, x: Tensor, masks: AttentionMasks, fork: bool) -> Step:
        attention: Any = self.self_attn
        masks = self._own_heads(masks, attention)
        with self._region.own_dropout(x, attention.dropout if attention.training else 0.0):
            heads, _ = attention._attend_to_itself(self._region.enter(x), masks, fork=False)
        return *self._projected(heads, attention), x

    def _attend_to_memory(
        self, x: Tensor, memory: Tensor, masks: AttentionMasks, fork: bool
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        attention: Any = self.multihead_attn
        region, masks = self._region, self._own_heads(masks, attention)
        with region.own_dropout(x, attention.dropout if attention.training else 0.0):
            heads, _, _ = attention._attend_to(
                region.enter(x), region.share(memory), masks, fork=False
            )
        return *self._projected(heads, attention), x, memory


class ParallelEncoder(TransformerEncoder):
    """A :class:`TransformerEncoder` after ``parallelize_module``."""

    _made_of = (TransformerEncoder,)
    _region: Region

    def _forward_padded(self, *args: Any) -> Tensor:
        with self._region.local(self.norm):
            return super()._forward_padded(*args)

    def _run(self, x: Tensor, masks: AttentionMasks, rows: Selection | None) -> Tensor:
        region = self._region
        if not region.sequence_parallel:
            with region.local(self.norm):
                return super()._run(x, masks, rows)
        with region.spread(x, self.training), region.local(self.norm):
            output = region.join(super()._run(region.split(x), masks, None))
        return output if rows is None else rows.take(output)


class ParallelDecoder(TransformerDecoder):
    """A :class:`TransformerDecoder` after ``parallelize_module``."""

    _made_of = (TransformerDecoder,)
    _region: Region

    def _forward_padded(self, *args: Any, **kwargs: Any) -> Tensor:
        with self._region.local(self.norm):
            return super()._forward_padded(*args, **kwargs)

    def _run(self, x: Tensor, memory: Tensor, own: AttentionMasks, cross: AttentionMasks) -> Tensor:
        region = self._region
        if not region.sequence_parallel:
            with region.local(self.norm):
                return super()._run(x, memory, own, cross)
        with region.spread(x, self.training), region.local(self.norm):
            return region.join(super()._run(region.split(x), memory, own, cross))
