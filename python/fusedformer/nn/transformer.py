"""``torch.nn.Transformer`` on the fused kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedformer._internal import checks
from fusedformer.errors import BadValueError
from fusedformer.nn.layer_norm import LayerNorm
from fusedformer.nn.masks import check_rank, padded_positions
from fusedformer.nn.transformer_decoder import TransformerDecoder
from fusedformer.nn.transformer_decoder_layer import TransformerDecoderLayer
from fusedformer.nn.transformer_encoder import TransformerEncoder
from fusedformer.nn.transformer_encoder_layer import TransformerEncoderLayer


class Transformer(torch.nn.Transformer):
    """Encoder and decoder.

    A drop-in for :class:`torch.nn.Transformer`, of this library's :class:`TransformerEncoder` and
    :class:`TransformerDecoder`; what they say of padding holds here. To have padding of ``src`` not
    computed, pass its mask twice, as ``src_key_padding_mask`` and ``memory_key_padding_mask``:
    without the second the decoder attends to what the encoder makes of padding, as torch's does
    (in training; its inference path may put zeros there), so that padding has to be computed.

    Args:
        d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first,
            norm_first, bias, device, dtype: of all layers, as for
            :class:`TransformerEncoderLayer`.
        num_encoder_layers, num_decoder_layers: numbers of layers.
        custom_encoder, custom_decoder: modules in place of the library's.

    Raises:
        TypeError, ValueError: as :class:`TransformerEncoderLayer`.

    Source: Vaswani et al., Attention Is All You Need, arXiv:1706.03762.
    """

    def __init__(
        self,
        d_model: int = 512,
        nhead: int = 8,
        num_encoder_layers: int = 6,
        num_decoder_layers: int = 6,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = F.relu,
        custom_encoder: Any | None = None,
        custom_decoder: Any | None = None,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        layer: Any = (
            d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first,
            norm_first, bias, device, dtype,
        )  # fmt: skip
        norm: Any = {"eps": layer_norm_eps, "bias": bias, "device": device, "dtype": dtype}
        if custom_encoder is None:
            custom_encoder = TransformerEncoder(
                TransformerEncoderLayer(*layer), num_encoder_layers, LayerNorm(d_model, **norm)
            )
        if custom_decoder is None:
            custom_decoder = TransformerDecoder(
                TransformerDecoderLayer(*layer), num_decoder_layers, LayerNorm(d_model, **norm)
            )
        super().__init__(
            d_model,
            nhead,
            num_encoder_layers,
            num_decoder_layers,
            dim_feedforward,
            dropout,
            activation,
            custom_encoder,
            custom_decoder,
            layer_norm_eps,
            batch_first,
            norm_first,
            bias,
            device,
            dtype,
        )

    def forward(
        self,
        src: Tensor,
        tgt: Tensor,
        src_mask: Tensor | None = None,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        src_is_causal: bool | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """Pass ``src`` through the encoder, and ``tgt`` with its output through the decoder.

        Args:
            src: ``[N, S, E]`` with ``batch_first``, else ``[S, N, E]``; unbatched ``[S, E]``.
            tgt: likewise with length ``T``.
            src_mask, src_key_padding_mask, src_is_causal: as for :class:`TransformerEncoder`.
            tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask, tgt_is_causal,
                memory_is_causal: as for :class:`TransformerDecoder`. Another tensor than
                ``src_key_padding_mask`` is looked at once, for which a GPU is waited for, or where
                that cannot be (in ``torch.compile``, static shapes) padding is computed.

        Returns:
            Tensor of the shape and dtype of ``tgt``.

        Raises:
            TypeError, ValueError: as the two; different batches or a width that is not ``d_model``.
        """
        function = "Transformer"
        for name, tensor in (("src", src), ("tgt", tgt)):
            check_rank(function, name, tensor)
            if tensor.shape[-1] != self.d_model:
                raise BadValueError(
                    f"{function}(): expected the last dimension of '{name}' to be d_model="
                    f"{self.d_model}, but got shape {tuple(tensor.shape)}"
                )
        batch = 0 if self.batch_first else 1
        # Compared as sizes: the symbols of a compiler cannot be hashed.
        if src.dim() != tgt.dim() or (src.dim() == 3 and src.shape[batch] != tgt.shape[batch]):
            raise BadValueError(
                f"{function}(): expected 'src' and 'tgt' to have the same batch, but got shapes "
                f"{tuple(src.shape)} and {tuple(tgt.shape)} with batch_first={self.batch_first}"
            )
        computed = {}
        if hasattr(self.encoder, "compute_padding") and self._attends_to_padding(
            src_key_padding_mask, memory_key_padding_mask
        ):
            computed = {"compute_padding": True}
        memory = self.encoder(
            src,
            mask=src_mask,
            src_key_padding_mask=src_key_padding_mask,
            is_causal=src_is_causal,
            **computed,
        )
        output: Tensor = self.decoder(
            tgt,
            memory,
            tgt_mask=tgt_mask,
            memory_mask=memory_mask,
            tgt_key_padding_mask=tgt_key_padding_mask,
            memory_key_padding_mask=memory_key_padding_mask,
            tgt_is_causal=tgt_is_causal,
            memory_is_causal=memory_is_causal,
        )
        return output

    def _attends_to_padding(self, padding: Tensor | None, of_memory: Tensor | None) -> bool:
        """Return whether ``of_memory``, the decoder's mask, may let it see ``padding``."""
        if padding is None or padding is of_memory:
            return False
        if of_memory is None or padding.shape != of_memory.shape:
            return True
        if not checks.has_values(padding) or getattr(self.encoder, "static_shapes", False):
            return True
        return bool((padded_positions(padding) & ~padded_positions(of_memory)).any())
