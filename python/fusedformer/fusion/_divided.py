"""Layers of TimeSformer, whose patches attend over time first, and then within their frames."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from fusedformer import functional
from fusedformer.functional.steps import linear
from fusedformer.fusion._forms import Finder, Parts, probability
from fusedformer.fusion._layers import Call, FusedLayer
from fusedformer.fusion._norms import normed_and_sum
from fusedformer.fusion._residual import pending_sum
from fusedformer.nn.children import Pending, is_plain, project

_NO_DROPOUT = nn.Dropout(0.0)


class DividedLayer(FusedLayer):
    """A base of layers that attend twice; in other modes once, as layers of images do."""

    _over_time: Finder

    def __init_subclass__(cls) -> None:
        """Look up once where the parts of attention over time are."""
        super().__init_subclass__()
        if hasattr(cls, "_form"):
            form, at = cls._form, "temporal_attention"
            paths = {
                name: getattr(form, name).replace("attention", at, 1)
                for name in ("attention", "query", "out", "attention_dropout", "dropout1")
            }
            cls._over_time = Finder(dataclasses.replace(form, norm1="temporal_layernorm", **paths))

    def _fits(self: Any, parts: Parts, x: Tensor) -> bool:
        return super()._fits(parts, x) and self._time_is_plain(self)

    @classmethod
    def is_plain(cls, layer: Any) -> bool:
        """Return whether the fused steps are what the forward of ``layer`` does."""
        return super().is_plain(layer) and cls._time_is_plain(layer)

    @classmethod
    def _time_is_plain(cls, layer: Any) -> bool:
        """Return whether attention over time does no more than its classes say, if there is one."""
        if not _is_divided(layer):
            return True
        parts = cls._over_time.parts(layer)
        return (
            parts is not None and cls.are_plain(parts) and is_plain(layer.temporal_dense, nn.Linear)
        )

    @classmethod
    def calls_children(cls) -> bool:
        """Return False: the layer's own forward calls children that do more."""
        return False

    def _one_node(self, parts: Parts, call: Call) -> Tensor | None:
        return None

    def _attends(
        self: Any, parts: Parts, call: Call, source: Tensor, fork: bool
    ) -> tuple[Tensor, Tensor]:
        return self._joined(parts, source), source

    def _joined(self, parts: Parts, x: Tensor) -> Tensor:
        """Attend within each of ``x`` ``[n, length, width]``; return heads side by side."""
        product, _ = linear(x, parts.query.weight, parts.query.bias)
        heads = product.view(*x.shape[:2], 3, parts.attention.num_heads, -1)
        query, key, value = (one.transpose(1, 2) for one in heads.unbind(2))
        p = probability(parts.attention_dropout, parts.attention)
        found = functional.scaled_dot_product_attention(
            query, key, value, dropout_p=p, scale=parts.attention.scale
        )
        return found.transpose(1, 2).flatten(-2)

    def _half(self, parts: Parts, x: Tensor) -> Tensor:
        """Return what attention within each of ``x`` adds to it."""
        product = parts.out(self._joined(parts, parts.norm1(x)))
        added: Tensor = parts.depth(parts.dropout1(product))  # type: ignore[misc]
        return added

    def _steps(self: Any, parts: Parts, call: Call) -> Tensor:
        if not _is_divided(self):
            return super()._steps(parts, call)
        x, frames = call.x, self.config.num_frames
        batch, _, width = x.shape
        first, patches = x[:, :1], x[:, 1:]  # those of a place lie together, in their order of time
        over_time = self._half(self._over_time.parts(self), patches.reshape(-1, frames, width))
        product = project(over_time.view(batch, -1, width), self.temporal_dense)
        patches = Pending(*product, _NO_DROPOUT, patches).added()
        images = patches.view(batch, -1, frames, width).transpose(1, 2).flatten(0, 1)
        firsts = first.expand(-1, frames, -1).reshape(-1, 1, width)
        within = self._half(parts, torch.cat((firsts, images), 1)).unflatten(0, (batch, frames))
        added = within[:, :, 1:].transpose(1, 2).reshape(batch, -1, width)
        added = torch.cat((within[:, :, 0].mean(1, keepdim=True), added), 1)
        pending = Pending(added, None, _NO_DROPOUT, torch.cat((first, patches), 1))
        source, x = normed_and_sum(pending, parts.norm2)
        inner, bias, _ = self._block(parts, source, fork=False)
        last = self._to_add((inner, bias), parts.dropout2, None, x)
        return pending_sum(last, None, parts.depth).added()


def _is_divided(layer: Any) -> bool:
    return bool(layer.attention_type == "divided_space_time")
