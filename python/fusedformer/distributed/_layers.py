"""Layers and stacks whose heads and hidden features are spread over ranks.

The order of their steps is that of the classes they had before. What goes into and out of the
products differs, and the parameters are this rank's parts.
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
from fusedformer.nn.children import feed_forward_block, hooks_of
from fusedformer.nn.layers import Block
from fusedformer.nn.masks import AttentionMasks


class _ParallelLayer:
    """A base of parallel layers; it comes before their class for one process."""

    _is_parallel = True
    _region: Region

    def _children_are_plain(self: Any) -> bool:
        """Return True, as they were plain when they were spread; refuse hooks added since."""
        for name, child in self.named_modules():
            if child is not self and any(True for _ in hooks_of(child)):
                raise RuntimeError(
                    f"{type(self).__name__}: its children's weights are spread over ranks, so that "
                    f"they cannot be called, but '{name}' has a hook; remove it"
                )
        return True

    def _forward_fused(self: Any, *args: Any) -> Any:
        """Compute the fused steps with this rank's parts of the parameters."""
        with self._region.local(self):
            return super()._forward_fused(*args)  # type: ignore[misc]

    def _attend(
        self: Any,
        x: Tensor,
        residual: Tensor,
        masks: AttentionMasks,
        rows: Selection | None,
        *,
        fork: bool,
    ) -> Block:
        """Attend by this rank's heads, and add up the results of all ranks."""
        attention, region = self.self_attn, self._region
        masks = self._masks_of_own_heads(masks, attention)
        with region.own_dropout(x, attention.dropout if attention.training else 0.0):
            x = region.enter(x)
            heads, residual = self._attended_heads(x, residual, masks, rows, fork=False)
        return *self._project(heads, attention), residual

    def _feed_forward(self: Any, x: Tensor, *, fork: bool) -> Block:
        """Compute this rank's hidden features, and add up the results of all ranks."""
        block = feed_forward_block(self)._replace(bias2=None)
        with self._region.own_dropout(x, block.p):
            inner, _, _ = feed_forward(self._region.enter(x), block)
        return self._region.leave(inner), self.linear2.bias, x

    def _project(self: Any, heads: Tensor, attention: Any) -> tuple[Tensor, Tensor | None]:
        """Project this rank's heads; return the sum over ranks, and the bias still to be added."""
        inner, _ = linear(heads, attention.out_proj.weight, None)
        return self._region.leave(inner), attention.out_proj.bias

    def _masks_of_own_heads(self: Any, masks: AttentionMasks, attention: Any) -> AttentionMasks:
        """Narrow ``masks`` to the heads of this rank."""
        mask, heads = masks.attn_mask, attention.num_heads
        if mask is None or mask.shape[1] == 1:
            return masks
        return masks._replace(attn_mask=mask.narrow(1, self._region.rank * heads, heads))


class ParallelEncoderLayer(_ParallelLayer, TransformerEncoderLayer):
    """A :class:`TransformerEncoderLayer` after ``parallelize_module``."""

    _made_of = (TransformerEncoderLayer,)


class ParallelDecoderLayer(_ParallelLayer, TransformerDecoderLayer):
    """A :class:`TransformerDecoderLayer` after ``parallelize_module``."""

    _made_of = (TransformerDecoderLayer,)

    def _attend_to_memory(
        self, x: Tensor, memory: Tensor, masks: AttentionMasks, *, fork: bool
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """Attend by this rank's heads, and add up the results of all ranks."""
        attention: Any = self.multihead_attn
        region, masks = self._region, self._masks_of_own_heads(masks, attention)
        with region.own_dropout(x, attention.dropout if attention.training else 0.0):
            heads, _, _ = attention._attend_to(
                region.enter(x), region.share(memory), masks, fork=False
            )
        return *self._project(heads, attention), x, memory


class _ParallelStack:
    """A base of parallel stacks; it comes before their class for one process."""

    _region: Region

    def _forward_padded(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Call the layers, which take their parts themselves, and the norm with plain tensors."""
        with self._region.local(self.norm):
            output: Tensor = super()._forward_padded(*args, **kwargs)  # type: ignore[misc]
        return output

    def _run(self: Any, x: Tensor, *others: Any) -> Tensor:
        """Compute layers and norm; with ``sequence_parallel``, residuals and norms of own rows."""
        region, run = self._region, super()._run  # type: ignore[misc]
        output: Tensor
        if not region.sequence_parallel:
            with region.local(self.norm):
                output = run(x, *others)
            return output
        with region.spread(x, self.training), region.local(self.norm):
            output = region.join(run(region.split(x), *others))
        return output


class ParallelEncoder(_ParallelStack, TransformerEncoder):
    """A :class:`TransformerEncoder` after ``parallelize_module``."""

    _made_of = (TransformerEncoder,)

    def _run(self, x: Tensor, masks: AttentionMasks, rows: Selection | None) -> Tensor:
        """Compute layers and norm; of rows that are spread, ``rows`` are taken at the end."""
        if rows is None or not self._region.sequence_parallel:
            return super()._run(x, masks, rows)
        return rows.take(super()._run(x, masks, None))


class ParallelDecoder(_ParallelStack, TransformerDecoder):
    """A :class:`TransformerDecoder` after ``parallelize_module``."""

    _made_of = (TransformerDecoder,)
