"""Layers of transformers whose tokens attend within windows of an image, as those of Swin do.

The bias by distance is one for all windows, ``[1, heads, tokens, tokens]``. Where windows are
shifted, each has a mask besides, as tokens from opposite edges of the image meet in it. Their sum
is one for all images, and is not expanded over the batch: windows then stand beside heads.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedformer import functional
from fusedformer._internal.tracing import is_eager
from fusedformer.fusion._forms import Parts, probability
from fusedformer.fusion._layers import Call, FusedLayer

_HIDDEN = -100.0  # added to the scores of tokens from different edges
_LARGEST_SCALE = math.log(100.0)  # of cosines, its logarithm


class Windows(NamedTuple):
    """How images of so many rows and columns of tokens are cut into square windows."""

    images: int
    rows: int
    columns: int
    side: int
    shift: int

    def padded(self) -> tuple[int, int]:
        """Return rows and columns of whole windows."""
        rows, columns = (-(-n // self.side) * self.side for n in (self.rows, self.columns))
        return rows, columns

    def cut(self, x: Tensor) -> Tensor:
        """Return ``[images, rows * columns, width]`` as ``[images * windows, tokens, width]``."""
        (rows, columns), side, width = self.padded(), self.side, x.shape[-1]
        x = x.view(self.images, self.rows, self.columns, width)
        if (rows, columns) != (self.rows, self.columns):
            x = F.pad(x, (0, 0, 0, columns - self.columns, 0, rows - self.rows))
        if self.shift:
            x = x.roll((-self.shift, -self.shift), (1, 2))
        x = x.view(self.images, rows // side, side, columns // side, side, width)
        return x.transpose(2, 3).reshape(-1, side**2, width)

    def joined(self, heads: Tensor) -> Tensor:
        """Return the heads of all windows as ``[images, rows * columns, width]``.

        Args:
            heads: ``[images * windows, heads, tokens, dim]``, or with windows beside heads,
                ``[images, windows * heads, tokens, dim]``.
        """
        (rows, columns), side, dim = self.padded(), self.side, heads.shape[-1]
        x = heads.view(self.images, rows // side, columns // side, -1, side, side, dim)
        x = x.permute(0, 1, 4, 2, 5, 3, 6).reshape(self.images, rows, columns, -1)
        if self.shift:
            x = x.roll((self.shift, self.shift), (1, 2))
        x = x[:, : self.rows, : self.columns]
        return x.reshape(self.images, self.rows * self.columns, -1)

    def hidden(self, like: Tensor) -> Tensor:
        """Return the masks ``[windows, 1, tokens, tokens]`` of shifted windows, to be added."""
        # What is made under a mode or a transform is theirs, and must not be kept.
        may_keep = is_eager()
        make = _hidden if may_keep else _hidden.__wrapped__
        return make(*self.padded(), self.side, self.shift, like.dtype, like.device)


@functools.lru_cache(maxsize=64)
def _hidden(
    rows: int, columns: int, side: int, shift: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Hide from each other tokens of a window that come from different parts of the image."""
    places = [torch.arange(n, device=device) - n for n in (rows, columns)]
    first, second = ((x >= -side).int() + (x >= -shift).int() for x in places)
    parts = first[:, None] * 3 + second  # what was rolled over an edge is another part
    parts = parts.view(rows // side, side, columns // side, side).transpose(1, 2)
    parts = parts.reshape(-1, 1, side**2)
    differ = parts[..., None] != parts[:, :, None]
    return torch.zeros(differ.shape, dtype=dtype, device=device).masked_fill_(differ, _HIDDEN)


class WindowedLayer(FusedLayer):
    """A base of layers whose attention is within windows; only heads are moved, never scores."""

    def _attends(
        self: Any, parts: Parts, call: Call, source: Tensor, fork: bool
    ) -> tuple[Tensor, Tensor]:
        windows = self._windows(call)
        query, key, value, _ = self._heads(parts, call, windows.cut(source), fork=False)
        scale = self._scaling(parts.attention)
        if parts.logit_scale is not None:
            query, key = (F.normalize(x, dim=-1) for x in (query, key))
            query, scale = query * parts.logit_scale.clamp(max=_LARGEST_SCALE).exp(), 1.0
        mask = call.mask
        assert mask is not None
        if windows.shift:
            hidden = windows.hidden(mask)  # Swinv2 adds it twice
            mask = mask + (hidden if parts.logit_scale is None else 2 * hidden)
            if windows.images > 1:
                mask = mask.flatten(0, 1)[None]
                query, key, value = (
                    x.unflatten(0, (windows.images, -1)).flatten(1, 2) for x in (query, key, value)
                )
        p = probability(parts.attention_dropout, parts.attention)
        heads = functional.scaled_dot_product_attention(
            query, key, value, mask, dropout_p=p, scale=scale
        )
        return windows.joined(heads), source

    def _windows(self: Any, call: Call) -> Windows:
        """Return the windows of a call, whose images may be smaller than one."""
        rows, columns = size = call.others["input_dimensions"]
        if hasattr(self, "set_shift_and_window_size") and not call.others.get("always_partition"):
            self.set_shift_and_window_size(size)
        return Windows(call.x.shape[0], rows, columns, self.window_size, self.shift_size)

    def _returned(self, found: Tensor, call: Call) -> Any:
        return (found, None) if self._form.returns_weights else (found,)

    def _one_node(self, parts: Parts, call: Call) -> Tensor | None:
        return None

    @classmethod
    def fused_as(cls, layer: Any) -> str:
        """Say in the report how layers are computed."""
        return "fused steps, with attention within windows"
