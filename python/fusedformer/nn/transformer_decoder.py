"""``torch.nn.TransformerDecoder`` on the fused kernels."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from fusedformer import functional
from fusedformer.errors import BadValueError
from fusedformer.functional import Packing
from fusedformer.functional.steps import seeds_drawn_at_once
from fusedformer.nn.children import Pending, call_fused, must_be_called
from fusedformer.nn.masks import (
    AttentionMasks,
    Names,
    check_attn_mask,
    check_padding_mask,
    check_rank,
    is_causal_mask,
)
from fusedformer.nn.stacks import (
    FusedStack,
    are_boolean,
    batch_and_length,
    can_pack,
    check_is_fused,
    check_padding,
    check_rows,
    check_sequences,
    check_stack,
    end_stack,
    heads_in_stack,
    is_batch_first,
    is_fused,
    is_only_causal,
    packing_of_padding,
    start_layer,
    swap_unless_batch_first,
    zeros_at_padding,
)
from fusedformer.nn.transformer_decoder_layer import DROPOUTS, TransformerDecoderLayer

_FUNCTION = "TransformerDecoder"
_NAMES = Names(_FUNCTION, "tgt", "tgt", "tgt", "tgt_mask", "tgt_key_padding_mask")


class TransformerDecoder(FusedStack, torch.nn.TransformerDecoder):
    """A stack of deep copies of one decoder layer.

    A drop-in for :class:`torch.nn.TransformerDecoder`. It differs in one thing: positions that
    ``tgt_key_padding_mask`` removes are 0 in the output, and no gradient comes from them.

    With boolean padding masks of any pattern, layers that are this library's, no ``tgt_mask`` but
    the causal one and no ``memory_mask``, padding is not computed at all: real tokens of ``tgt``
    and of ``memory`` are packed at the entry, those of ``tgt`` unpacked at the exit, in training
    too. On a GPU that waits for the device once for each padding mask.

    Args:
        decoder_layer: copied ``num_layers`` times, parameters included.
        num_layers: number of layers; 0 leaves only ``norm``.
        norm: applied at the end, or None. It is not copied.
        static_shapes: pack without waiting, as :class:`TransformerEncoder`.

    Raises:
        TypeError: ``decoder_layer`` or ``norm`` is not a module.
        ValueError: negative ``num_layers``.

    Source: Vaswani et al., Attention Is All You Need, arXiv:1706.03762.
    """

    def __init__(
        self,
        decoder_layer: nn.TransformerDecoderLayer,
        num_layers: int,
        norm: nn.Module | None = None,
        *,
        static_shapes: bool = False,
    ) -> None:
        check_stack(_FUNCTION, "decoder_layer", decoder_layer, num_layers, norm)
        super().__init__(decoder_layer, num_layers, norm)
        if static_shapes:
            self.static_shapes = True

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """Pass ``tgt`` through all layers and the norm.

        Args:
            tgt, memory, tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask,
                memory_is_causal: as for :class:`TransformerDecoderLayer`.
            tgt_is_causal: a hint that ``tgt_mask`` is the causal mask, so that it need not be read.
                None looks whether it is, which on a GPU waits for the device once.

        Returns:
            Tensor of the shape and dtype of ``tgt``, 0 at positions that
            ``tgt_key_padding_mask`` removes (True or -inf).

        Raises:
            TypeError, ValueError: as :class:`TransformerDecoderLayer`.
        """
        for name, tensor in (("tgt", tgt), ("memory", memory)):
            check_rank(_FUNCTION, name, tensor)
        _, length = check_padding(self, _NAMES, tgt, tgt_key_padding_mask)
        if tgt_is_causal is None:
            tgt_is_causal = is_causal_mask(tgt_mask, length)
        paddings = tgt_key_padding_mask, memory_key_padding_mask
        if (
            (self._always_packs or any(padding is not None for padding in paddings))
            and are_boolean(*paddings)
            and memory_mask is None
            and is_only_causal(tgt_mask, tgt_is_causal)
            and tgt.dim() == memory.dim() == 3
            and self.packs(tgt, memory, *paddings)
        ):
            self._check(
                tgt, memory, tgt_mask, memory_key_padding_mask, tgt_is_causal, memory_is_causal
            )
            return self._pack_and_run(tgt, memory, *paddings, tgt_is_causal)
        output = self._forward_padded(
            tgt,
            memory,
            tgt_mask=tgt_mask,
            memory_mask=memory_mask,
            tgt_key_padding_mask=tgt_key_padding_mask,
            memory_key_padding_mask=memory_key_padding_mask,
            tgt_is_causal=tgt_is_causal,
            memory_is_causal=memory_is_causal,
        )
        return zeros_at_padding(self, output, tgt_key_padding_mask)

    def packs(self, tgt: Tensor, *others: Tensor | None) -> bool:
        """Return whether :meth:`forward` packs padded batches on the device of ``tgt``.

        As :meth:`TransformerEncoder.packs`; ``others`` are the memory and the masks.
        """
        return is_fused(self, TransformerDecoderLayer) and can_pack(
            tgt, self.static_shapes, *others
        )

    def forward_packed(
        self,
        tgt: Tensor,
        tgt_packing: Packing,
        memory: Tensor,
        memory_packing: Packing,
        *,
        tgt_is_causal: bool = False,
    ) -> Tensor:
        """Run the decoder on packed rows, as :meth:`forward` does between packing and unpacking.

        Args:
            tgt: ``[total, E]``, of :func:`functional.pack` with ``tgt_packing`` or made packed.
            tgt_packing, memory_packing: of two batches with the same number of sequences.
            memory: likewise.
            tgt_is_causal: tokens of ``tgt`` see themselves and those before them.

        Returns:
            ``[total, E]``.

        Raises:
            ValueError: ``tgt`` or ``memory`` is not ``[total, E]``; batches of different size; the
                decoder's modules cannot pack.
        """
        function = f"{_FUNCTION}.forward_packed"
        check_is_fused(function, self, TransformerDecoderLayer)
        for name, rows, packing in (("tgt", tgt, tgt_packing), ("memory", memory, memory_packing)):
            check_rank(function, name, rows)
            check_sequences(function, self, {name: rows})
            check_rows(function, name, rows, packing)
        if tgt_packing.batch != memory_packing.batch:
            raise BadValueError(
                f"{function}(): expected 'tgt_packing' and 'memory_packing' to be of as many "
                f"sequences, but got {tgt_packing.batch} and {memory_packing.batch}"
            )
        own = AttentionMasks.packed(tgt_packing, tgt_packing, tgt_is_causal)
        cross = AttentionMasks.packed(tgt_packing, memory_packing, False)
        with seeds_drawn_at_once(DROPOUTS * len(self.layers)):
            return self._run(tgt, memory, own, cross)

    def _pack_and_run(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_padding: Tensor | None,
        memory_padding: Tensor | None,
        is_causal: bool,
    ) -> Tensor:
        """Pack both batches, run the decoder, and unpack."""
        tgt, memory = (swap_unless_batch_first(self, x) for x in (tgt, memory))
        of_tgt = packing_of_padding(tgt, tgt_padding, self.static_shapes)
        of_memory = packing_of_padding(memory, memory_padding, self.static_shapes)
        rows = self.forward_packed(
            functional.pack(tgt, of_tgt),
            of_tgt,
            functional.pack(memory, of_memory),
            of_memory,
            tgt_is_causal=is_causal,
        )
        return swap_unless_batch_first(self, functional.unpack(rows, of_tgt))

    def _run(self, x: Tensor, memory: Tensor, own: AttentionMasks, cross: AttentionMasks) -> Tensor:
        """Compute all layers and the norm on packed rows."""
        pending: Pending | None = None
        for layer in self.layers:
            is_called = must_be_called(layer)
            x, normed = start_layer(layer, x, pending, is_called)
            if normed is None:
                run = partial(call_fused, layer) if is_called else layer._forward_fused
                (x, memory), pending = run(x, memory, own, cross), None
            else:
                pending, memory = layer._pre_norm(x, normed, memory, own, cross)
        return end_stack(x, pending, self.norm)

    def _check(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None,
        memory_padding: Tensor | None,
        is_causal: bool,
        memory_is_causal: bool,
    ) -> None:
        """Check the arguments of a packed run that :meth:`forward` has not checked yet."""
        check_sequences(_FUNCTION, self, {"tgt": tgt, "memory": memory})
        batch, length = batch_and_length(self, tgt)
        memories, keys = batch_and_length(self, memory)
        sizes = {"batch": batch, "heads": heads_in_stack(self), "rows": length}
        check_attn_mask(_NAMES, tgt_mask, is_causal, keys=length, **sizes)
        across = _NAMES._replace(attn_mask="memory_mask")
        check_attn_mask(across, None, memory_is_causal, keys=keys, **sizes)
        if memories != batch:
            raise BadValueError(
                f"{_FUNCTION}(): expected 'memory' to have the batch of 'tgt', but got shapes "
                f"{tuple(memory.shape)} and {tuple(tgt.shape)} with "
                f"batch_first={is_batch_first(self)}"
            )
        if memory_padding is not None:
            check_padding_mask(
                _FUNCTION, "memory_key_padding_mask", memory_padding, True, batch, keys
            )
