"""``torch.nn.TransformerEncoder`` on the fused kernels."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fusedformer import functional
from fusedformer._internal.backend import kernels_run_on
from fusedformer._internal.jagged import check_jagged, jagged_like
from fusedformer._internal.tracing import is_eager
from fusedformer.errors import BadValueError
from fusedformer.functional import Selection
from fusedformer.functional.selection import check_output_rows
from fusedformer.functional.steps import seeds_drawn_at_once
from fusedformer.nn.children import Pending, call_fused, must_be_called
from fusedformer.nn.masks import (
    Attend,
    AttentionMasks,
    Names,
    check_attn_mask,
    check_rank,
    is_causal_mask,
)
from fusedformer.nn.stacks import (
    FusedStack,
    are_boolean,
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
    packing_for,
    packing_of_padding,
    start_layer,
    swap_unless_batch_first,
    zeros_at_padding,
)
from fusedformer.nn.transformer_encoder_layer import DROPOUTS, TransformerEncoderLayer

_FUNCTION = "TransformerEncoder"
_NAMES = Names(_FUNCTION, "src", "src", "src", "mask", "src_key_padding_mask")


class TransformerEncoder(FusedStack, torch.nn.TransformerEncoder):
    """A stack of deep copies of one encoder layer.

    A drop-in for :class:`torch.nn.TransformerEncoder`. It differs in one thing, which torch
    leaves to its choice of path: positions that ``src_key_padding_mask`` removes are always 0 in
    the output, in training as in inference, after ``norm`` too; no gradient comes from them. For a
    model that reads them, set the attribute ``compute_padding``, or pass it to the call: they are
    then computed as torch does it in training, in the padded form.

    With a boolean ``src_key_padding_mask`` of any pattern, layers that are this library's, and no
    ``mask`` but the causal one, padding is not computed at all: real tokens are packed at the
    entry and unpacked at the exit, in training too. On a GPU that waits for the device once;
    jagged nested tensors need no packing and no waiting.

    Args:
        encoder_layer: copied ``num_layers`` times, parameters included.
        num_layers: number of layers; 0 leaves only ``norm``.
        norm: applied at the end, or None. It is not copied.
        enable_nested_tensor: kept as an attribute; nothing is converted to nested tensors.
        mask_check: kept as an attribute; masks of any pattern are handled alike.
        static_shapes: pack without waiting, so that a CUDA graph can capture the encoder: the
            tokens come first and attention skips what is behind them, which the products and norms
            do not. Inside ``torch.compile`` it is always so. On the torch backend the padded form
            is computed instead. May be set as an attribute.

    Raises:
        TypeError: ``encoder_layer`` or ``norm`` is not a module.
        ValueError: negative ``num_layers``.

    Source: Vaswani et al., Attention Is All You Need, arXiv:1706.03762.
    """

    compute_padding = False  # at positions that a padding mask removes, rather than write 0

    def __init__(
        self,
        encoder_layer: nn.TransformerEncoderLayer,
        num_layers: int,
        norm: nn.Module | None = None,
        enable_nested_tensor: bool = True,
        mask_check: bool = True,
        *,
        static_shapes: bool = False,
    ) -> None:
        check_stack(_FUNCTION, "encoder_layer", encoder_layer, num_layers, norm)
        # With True torch may warn that it cannot use nested tensors, which this class never does.
        super().__init__(
            encoder_layer, num_layers, norm, enable_nested_tensor=False, mask_check=mask_check
        )
        self.enable_nested_tensor = enable_nested_tensor
        if static_shapes:
            self.static_shapes = True

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
        *,
        output_rows: Tensor | None = None,
        compute_padding: bool | None = None,
    ) -> Tensor:
        """Pass ``src`` through all layers and the norm.

        Args:
            src: ``[N, S, E]`` if the layers are ``batch_first``, else ``[S, N, E]``; unbatched
                ``[S, E]``. Or jagged ``torch.nested`` ``[N, jagged, E]``, which is packed already.
            mask: ``[S, S]`` or ``[N * nhead, S, S]``; True = masked, or floating-point and added
                to the scores.
            src_key_padding_mask: ``[N, S]`` (unbatched ``[S]``); True = masked, or added.
            is_causal: a hint that ``mask`` is the causal mask, so that it need not be read. None
                looks whether it is, which on a GPU waits for the device once.
            output_rows: only these rows of the output, batch first for any input: boolean
                ``[N, S]`` (masked positions, say), or int64 ``[N, R]``, columns of each sequence
                (0 for the CLS token). What follows attention in the last layer, its queries
                included, is then computed for them alone wherever batches are packed, and also
                without padding. Torch's encoder does not have it.
            compute_padding: whether positions that ``src_key_padding_mask`` removes are computed;
                None takes the attribute.

        Returns:
            Tensor of the shape and dtype of ``src``, 0 at positions that
            ``src_key_padding_mask`` removes (True or -inf), unless they are computed. With
            ``output_rows`` ``[number of True, E]`` in the order of the batch, or ``[N, R, E]``.

        Raises:
            TypeError, ValueError: as :class:`TransformerEncoderLayer`.
            ValueError: boolean ``output_rows`` with ``static_shapes``.
            IndexError: ``output_rows`` on the CPU with columns that do not exist.
        """
        if isinstance(src, Tensor) and src.is_nested:
            self._check_nested(src, mask, src_key_padding_mask, is_causal, output_rows)
            return self._forward_nested(src, mask is not None)
        padding = src_key_padding_mask
        check_rank(_FUNCTION, "src", src)
        batch, length = check_padding(self, _NAMES, src, padding)
        if output_rows is not None:
            check_output_rows(_FUNCTION, output_rows, batch, length)
        if is_causal is None:
            is_causal = is_causal_mask(mask, length)
        if compute_padding is None:
            compute_padding = self.compute_padding
        if padding is None:
            saves_work = output_rows is not None or self._always_packs
        else:
            saves_work = not compute_padding
        if (
            saves_work
            and src.dim() == 3
            and are_boolean(padding)
            and is_only_causal(mask, is_causal)
            and self.packs(src, padding, output_rows)
        ):
            check_sequences(_FUNCTION, self, {"src": src})
            sizes = {"batch": batch, "heads": heads_in_stack(self), "rows": length, "keys": length}
            check_attn_mask(_NAMES, mask, is_causal, **sizes)
            x = swap_unless_batch_first(self, src)
            if output_rows is None:
                packing = packing_of_padding(x, padding, self.static_shapes)
                selection = None
            else:
                if padding is None:
                    keep = torch.ones(batch, length, dtype=torch.bool, device=src.device)
                else:
                    keep = ~padding
                packing, selection = self.packing(keep, output_rows)
            rows = functional.pack(x, packing)
            rows = self._run_packed(rows, packing, selection, is_causal, None)
            if selection is not None:
                return selection.result(rows)
            return swap_unless_batch_first(self, functional.unpack(rows, packing))
        if self._looks_once(src):
            masks = self.layers[0]._check(src, mask, padding, is_causal)
            with seeds_drawn_at_once(DROPOUTS * len(self.layers)):
                output = self._run(src, masks, None)
        else:
            output = self._forward_padded(
                src, src_mask=mask, is_causal=is_causal, src_key_padding_mask=padding
            )
        if not compute_padding:
            output = zeros_at_padding(self, output, padding)
        return output if output_rows is None else self._rows_of(output, output_rows)

    def _looks_once(self, x: Tensor) -> bool:
        """Return whether what is checked of one layer's call holds for all, and nobody looks on.

        Exporters and profilers name what they see by the calls of layers.
        """
        if (
            type(x) is not Tensor
            or not len(self.layers)
            or not kernels_run_on(x)
            or torch.compiler.is_compiling()
            or not is_eager()
            or torch._C._autograd._profiler_enabled()
            or not is_fused(self, TransformerEncoderLayer)
        ):
            return False
        sizes = None
        for layer in self.layers:
            own: Any = layer.self_attn
            if must_be_called(layer):
                return False
            if sizes not in (None, (own.embed_dim, own.num_heads, own.batch_first)):
                return False
            sizes = own.embed_dim, own.num_heads, own.batch_first
        return True

    def packs(self, src: Tensor, *masks: Tensor | None) -> bool:
        """Return whether :meth:`forward` packs padded batches on the device of ``src``.

        The layers and the norm are this library's, without hooks or replaced children; layers may
        be sharded by ``fully_shard``, children of layers and the norm not by themselves. With
        ``static_shapes``, and where tracers look on (``torch.compile``, ``torch.export``,
        ``torch.jit.trace``, ``make_fx``), the torch backend does not pack. Nothing is packed where
        ``torch.vmap`` maps over ``src`` or one of ``masks``, those of :meth:`forward`.
        """
        return is_fused(self, TransformerEncoderLayer) and can_pack(src, self.static_shapes, *masks)

    def packing(
        self, keep: Tensor, output_rows: Tensor | None = None
    ) -> tuple[functional.Packing, Selection | None]:
        """Return how :meth:`forward` packs a batch, to pack already what comes before the encoder.

        Args:
            keep: boolean ``[N, S]``, True = real token.
            output_rows: as for :meth:`forward`.

        Returns:
            The packing, and where ``output_rows`` is given which packed rows it asks for.

        Raises:
            TypeError, ValueError: as :meth:`functional.Packing.of`.
            ValueError: boolean ``output_rows`` with static shapes.
        """
        return packing_for(_FUNCTION, keep, output_rows, self.static_shapes)

    def forward_packed(
        self,
        input: Tensor,
        packing: functional.Packing,
        selection: Selection | None = None,
        *,
        is_causal: bool = False,
        attend: Attend | None = None,
    ) -> Tensor:
        """Run the encoder on packed rows, as :meth:`forward` does between packing and unpacking.

        An encoder that ``fully_shard`` was applied to itself needs
        ``torch.distributed.fsdp.register_fsdp_forward_method(encoder, "forward_packed")``.

        Args:
            input: ``[total, E]``, of :func:`functional.pack` with ``packing`` or made packed.
            packing: of the batch.
            selection: from :meth:`packing`; the last layer computes these rows alone.
            is_causal: tokens see themselves and those before them.
            attend: what computes the heads ``[1, total, heads, dim]`` of a layer from its
                projection ``[1, total, 3, heads, dim]``, the probability of dropout and the masks,
                whose ``layer`` it is, in place of attention: a cache, a learned prefix.

        Returns:
            ``[total, E]``, or the rows of ``selection``, on which ``selection.result`` is the
            output that ``output_rows`` asks :meth:`forward` for.

        Raises:
            ValueError: ``input`` is not ``[total, E]``; the encoder's modules cannot pack.
        """
        function = f"{_FUNCTION}.forward_packed"
        check_is_fused(function, self, TransformerEncoderLayer)
        check_rank(function, "input", input)
        check_rows(function, "input", input, packing)
        check_sequences(function, self, {"input": input})
        return self._run_packed(input, packing, selection, is_causal, attend)

    def _run_packed(
        self,
        input: Tensor,
        packing: functional.Packing,
        selection: Selection | None,
        is_causal: bool,
        attend: Attend | None,
    ) -> Tensor:
        """Compute :meth:`forward_packed` of arguments that are checked."""
        masks = AttentionMasks.packed(packing, packing, is_causal)._replace(attend=attend)
        with seeds_drawn_at_once(DROPOUTS * len(self.layers)):
            return self._run(input, masks, selection)

    def _rows_of(self, output: Tensor, output_rows: Tensor) -> Tensor:
        """Take ``output_rows`` from the output for a padded batch, or for one sequence."""
        output = swap_unless_batch_first(self, output) if output.dim() == 3 else output[None]
        if output_rows.dtype == torch.bool:
            return output[output_rows]
        return output.take_along_dim(output_rows[..., None], 1)

    def _forward_nested(self, src: Tensor, is_causal: bool) -> Tensor:
        """Run the encoder on jagged ``[N, jagged, E]``, which is packed already."""
        jagged: Any = src
        values, starts = jagged.values(), jagged.offsets()
        check_sequences(_FUNCTION, self, {"src": values})
        # The longest length is on the device; the number of tokens is a bound that needs no wait.
        longest = values.shape[0]
        masks = AttentionMasks(None, None, is_causal, starts, starts, longest, longest)
        with seeds_drawn_at_once(DROPOUTS * len(self.layers)):
            output = self._run(values, masks, None)
        return jagged_like(output, src)

    def _run(self, x: Tensor, masks: AttentionMasks, rows: Selection | None) -> Tensor:
        """Compute all layers and the norm on packed rows; in the last layer only ``rows``."""
        pending: Pending | None = None
        for index, layer in enumerate(self.layers, 1):
            wanted = rows if index == len(self.layers) else None
            if masks.attend is not None:
                masks = masks._replace(layer=index - 1)
            is_called = must_be_called(layer)
            x, normed = start_layer(layer, x, pending, is_called)
            if normed is None:
                run = partial(call_fused, layer) if is_called else layer._forward_fused
                x, pending = run(x, masks, wanted), None
            else:
                pending = layer._pre_norm(x, normed, masks, wanted)
        if rows is not None and not len(self.layers):
            x = rows.take(x)
        return end_stack(x, pending, self.norm)

    def _check_nested(
        self,
        src: Tensor,
        mask: Tensor | None,
        padding: Tensor | None,
        is_causal: bool | None,
        output_rows: Tensor | None,
    ) -> None:
        """Check the arguments that may go with a nested ``src``, and that the encoder can pack."""
        check_jagged(_FUNCTION, "src", src, "batch, jagged, width")
        given = {"src_key_padding_mask": padding, "output_rows": output_rows}
        for name, tensor in given.items():
            if tensor is not None:
                raise BadValueError(f"{_FUNCTION}(): expected no '{name}' with a nested 'src'")
        if mask is not None and not is_causal:
            raise BadValueError(
                f"{_FUNCTION}(): expected no 'mask' with a nested 'src' but the causal one, "
                f"together with is_causal=True"
            )
        if not is_batch_first(self) or not is_fused(self, TransformerEncoderLayer):
            raise BadValueError(
                f"{_FUNCTION}(): a nested 'src' needs layers of this library with "
                f"batch_first=True, without hooks or replaced children"
            )
