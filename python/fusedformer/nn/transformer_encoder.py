"""``torch.nn.TransformerEncoder`` on the fused kernels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fusedformer import functional
from fusedformer.nn._masks import (
    check_padding_mask,
    check_rank,
    is_causal_mask,
    padded_positions,
)
from fusedformer.nn._modules import is_plain
from fusedformer.nn.layer_norm import LayerNorm
from fusedformer.nn.transformer_encoder_layer import TransformerEncoderLayer


class TransformerEncoder(torch.nn.TransformerEncoder):
    """A stack of deep copies of one encoder layer.

    A drop-in for :class:`torch.nn.TransformerEncoder`. It differs in one thing, which torch
    leaves to its choice of path: positions that ``src_key_padding_mask`` removes are always 0 in
    the output, in training as in inference, after ``norm`` too; no gradient comes from them.

    With a boolean ``src_key_padding_mask`` of any pattern, layers that are this library's, and no
    ``mask`` but the causal one, padding is not computed at all: real tokens are packed at the
    entry and unpacked at the exit, in training too. On a GPU that waits for the device once.
    Inside ``torch.compile`` the padded form is computed.

    Args:
        encoder_layer: copied ``num_layers`` times, parameters included.
        num_layers: number of layers; 0 leaves only ``norm``.
        norm: applied at the end, or None. It is not copied.
        enable_nested_tensor: kept as an attribute; nothing is converted to nested tensors.
        mask_check: kept as an attribute; masks of any pattern are handled alike.

    Raises:
        TypeError: ``encoder_layer`` or ``norm`` is not a module.
        ValueError: negative ``num_layers``.

    Source: Vaswani et al., Attention Is All You Need, arXiv:1706.03762.
    """

    def __init__(
        self,
        encoder_layer: nn.TransformerEncoderLayer,
        num_layers: int,
        norm: nn.Module | None = None,
        enable_nested_tensor: bool = True,
        mask_check: bool = True,
    ) -> None:
        for name, module in (("encoder_layer", encoder_layer), ("norm", norm)):
            if not isinstance(module, nn.Module) and not (name == "norm" and module is None):
                raise TypeError(
                    f"TransformerEncoder(): expected '{name}' to be a Module, "
                    f"but got {type(module).__name__}"
                )
        if num_layers < 0:
            raise ValueError(
                f"TransformerEncoder(): expected 'num_layers' to be at least 0, "
                f"but got {num_layers}"
            )
        # torch warns where its nested path is not to be had; ours never takes it.
        super().__init__(
            encoder_layer, num_layers, norm, enable_nested_tensor=False, mask_check=mask_check
        )
        self.enable_nested_tensor = enable_nested_tensor

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        """Pass ``src`` through all layers and the norm.

        Args:
            src: ``[N, S, E]`` if the layers are ``batch_first``, else ``[S, N, E]``; unbatched
                ``[S, E]``.
            mask: ``[S, S]`` or ``[N * nhead, S, S]``; True = masked, or floating-point and added
                to the scores.
            src_key_padding_mask: ``[N, S]`` (unbatched ``[S]``); True = masked, or added.
            is_causal: a hint that ``mask`` is the causal mask, so that it need not be read. None
                looks whether it is, which on a GPU waits for the device once.

        Returns:
            Tensor of the shape and dtype of ``src``, 0 at positions that
            ``src_key_padding_mask`` removes (True or -inf).

        Raises:
            TypeError, ValueError: as :class:`TransformerEncoderLayer`.
        """
        function = "TransformerEncoder"
        check_rank(function, "src", src)
        batched, batch_first = src.dim() == 3, self._batch_first()
        length = src.shape[1 if batched and batch_first else 0]
        batch = src.shape[0 if batch_first else 1] if batched else 1
        if src_key_padding_mask is not None:
            check_padding_mask(
                function, "src_key_padding_mask", src_key_padding_mask, batched, batch, length
            )
        if is_causal is None:
            is_causal = is_causal_mask(mask, length)

        if src_key_padding_mask is not None and self._can_pack(
            src, mask, src_key_padding_mask, is_causal
        ):
            return self._forward_packed(src, ~src_key_padding_mask, is_causal, batch_first)
        output = src
        for layer in self.layers:
            output = layer(
                output, src_mask=mask, is_causal=is_causal,
                src_key_padding_mask=src_key_padding_mask,
            )
        if self.norm is not None:
            output = self.norm(output)
        if src_key_padding_mask is None:
            return output
        padded = padded_positions(src_key_padding_mask)
        if batched and not batch_first:
            padded = padded.transpose(0, 1)
        return output.masked_fill(padded[..., None], 0.0)

    def _can_pack(
        self, src: Tensor, mask: Tensor | None, padding: Tensor, is_causal: bool
    ) -> bool:
        """Whether every layer gives the same on the real tokens alone.

        Not while tracing: how many there are decides the shapes.
        """
        ours = (isinstance(la, TransformerEncoderLayer) and la._can_pack() for la in self.layers)
        return (
            src.dim() == 3
            and padding.dtype == torch.bool
            and (mask is None or (is_causal and not mask.requires_grad))
            and not torch.compiler.is_compiling()
            and all(ours)
            and (self.norm is None or is_plain(self.norm, LayerNorm, nn.LayerNorm))
        )

    def _forward_packed(
        self, src: Tensor, keep: Tensor, is_causal: bool, batch_first: bool
    ) -> Tensor:
        packing = functional.Packing.of(keep)
        output = functional.pack(src if batch_first else src.transpose(0, 1), packing)
        for layer in self.layers:
            output = layer._forward_packed(output, packing, is_causal)
        if self.norm is not None:
            output = self.norm(output)
        output = functional.unpack(output, packing)
        return output if batch_first else output.transpose(0, 1)

    def _batch_first(self) -> bool:
        attention = getattr(self.layers[0], "self_attn", None) if len(self.layers) else None
        return bool(getattr(attention, "batch_first", False))
