"""A base of models of token ids, which pack ids, then embed and encode them."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusedformer import functional
from fusedformer._internal import checks
from fusedformer.functional import Packing, Selection
from fusedformer.functional.selection import check_output_rows
from fusedformer.models.generation import KeyValueCache
from fusedformer.models.prompts import PrefixTuning, PromptTuning
from fusedformer.nn import TransformerEncoder
from fusedformer.nn.children import is_plain
from fusedformer.nn.stacks import packing_of_padding


class Encoded(NamedTuple):
    """Hidden states of packed rows, or of the rows in ``selection``.

    The packing is that of ``[B, prompt + L]``.
    """

    rows: Tensor
    packing: Packing
    selection: Selection | None
    prompt: int

    def padded(self) -> Tensor:
        """Return ``[B, L, d]`` with zeros at padding, or the selected rows of it."""
        if self.selection is not None:
            return self.selection.result(self.rows)
        return functional.unpack(self.rows, self.packing)[:, self.prompt :]


class TextModel(nn.Module):
    """A base of models with ``embeddings``, which take packed ids, and an ``encoder``.

    :mod:`fusedformer.finetuning` sets ``prompt`` and ``prefix``, which are None before.
    """

    _is_causal: ClassVar[bool] = False

    embeddings: Any
    encoder: TransformerEncoder
    prompt: PromptTuning | None
    prefix: PrefixTuning | None

    def __init__(self) -> None:
        super().__init__()
        self.prompt = None
        self.prefix = None

    def _encode(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        output_rows: Tensor | None,
        *others: Tensor | None,
        cache: KeyValueCache | None = None,
    ) -> Encoded:
        """Compute hidden states of checked ids; ``others`` are further inputs of the embeddings."""
        keep = None if attention_mask is None else attention_mask != 0
        if output_rows is not None:
            check_output_rows(type(self).__name__, output_rows, *input_ids.shape)
        count = self._prompt_length
        learned: dict[str, Tensor] = {}
        if self.prompt is not None:
            learned["prompt"] = self.prompt.weight
            input_ids = _with_prompt_ids(input_ids, count, self.token_table.num_embeddings)
            others = tuple(None if t is None else F.pad(t, (count, 0)) for t in others)
            keep = None if keep is None else F.pad(keep, (count, 0), value=True)
            if position_ids is not None:
                position_ids = _with_prompt_ids(position_ids + count, count, 0)
            if output_rows is not None and output_rows.dtype == torch.bool:
                output_rows = F.pad(output_rows, (count, 0), value=False)
            elif output_rows is not None:
                output_rows = output_rows + count
        shape = input_ids.shape
        if position_ids is None:
            position_ids = self._positions(input_ids, keep)
        selection: Selection | None = None
        if keep is None and output_rows is None:
            packing = packing_of_padding(input_ids, None, self.encoder.static_shapes)
        else:
            real = torch.ones(shape, dtype=torch.bool, device=input_ids.device)
            real = real if keep is None else keep
            packing, selection = self.encoder.packing(real, output_rows)
        ids = [None if t is None else t.expand(shape) for t in (input_ids, position_ids, *others)]
        whole = is_plain(self.encoder, TransformerEncoder)
        # A hook on the embeddings may need the batch.
        whole = whole and is_plain(self.embeddings, type(self.embeddings))
        attend = None if self.prefix is None else self.prefix.attention()
        if cache is not None:
            attend = cache.filling(packing, attend)
        whole = whole and self.encoder.packs(self._example(), keep, output_rows)
        if attend is None and not whole:
            rows = self._run_padded(self.embeddings(*ids, **learned), keep, packing, selection)
            return Encoded(rows, packing, selection, count)
        # Rows after the last token, if any, get the first token's ids.
        places = packing.indices.clamp(min=0)
        packed = [t if t is None or packing.is_whole else t.flatten()[places] for t in ids]
        packed = [t if t is None else t.flatten() for t in packed]
        rows = self.encoder.forward_packed(
            self.embeddings(*packed, **learned),
            packing,
            selection,
            is_causal=self._is_causal,
            attend=attend,
        )
        return Encoded(rows, packing, selection, count)

    def _run_padded(
        self, hidden: Tensor, keep: Tensor | None, packing: Packing, selection: Selection | None
    ) -> Tensor:
        """Compute the rows where the encoder does not pack: with hooks, say, or traced."""
        padding = None if keep is None else ~keep
        mask: Tensor | None = None
        if self._is_causal:
            size = hidden.shape[1]
            mask = torch.ones(size, size, dtype=torch.bool, device=hidden.device).triu(1)
        output = self.encoder(hidden, mask, src_key_padding_mask=padding, is_causal=self._is_causal)
        rows = functional.pack(output, packing)
        return rows if selection is None else selection.take(rows)

    @property
    def token_table(self) -> nn.Embedding:
        """Return the embeddings of tokens."""
        table: nn.Embedding = self.embeddings.token
        return table

    @property
    def _prompt_length(self) -> int:
        """Return the number of learned vectors in front of each sequence."""
        return 0 if self.prompt is None else self.prompt.length

    def _positions(self, input_ids: Tensor, keep: Tensor | None) -> Tensor:
        """Return the default positions of tokens: their columns."""
        return torch.arange(input_ids.shape[1], device=input_ids.device)

    def _example(self) -> Tensor:
        """Return any tensor on the model's device."""
        return next(self.encoder.parameters())

    def _check(self, input_ids: Tensor, longest: int | None, **alike: Tensor | None) -> None:
        """Check that ids are ``[B, L]``, L at most ``longest``, and the others of that shape."""
        function = type(self).__name__
        checks.check_tensor(function, "input_ids", input_ids)
        if input_ids.dim() != 2:
            raise ValueError(
                f"{function}(): expected 'input_ids' of shape [B, L], "
                f"but got {tuple(input_ids.shape)}"
            )
        if input_ids.dtype not in (torch.int32, torch.int64):
            raise TypeError(
                f"{function}(): expected 'input_ids' to be int32 or int64, but got "
                f"{input_ids.dtype}"
            )
        if longest is not None and input_ids.shape[1] + self._prompt_length > longest:
            behind = f" behind a prompt of {self._prompt_length}" if self._prompt_length else ""
            raise ValueError(
                f"{function}(): expected at most {longest} positions, "
                f"but got input_ids of shape {tuple(input_ids.shape)}{behind}"
            )
        for name, tensor in alike.items():
            of = "that of 'input_ids'"
            checks.check_shape(function, name, tensor, tuple(input_ids.shape), of)


def _with_prompt_ids(ids: Tensor, count: int, first: int) -> Tensor:
    """Put ``count`` ids, counted from ``first``, before ``ids``: ``[*, count + L]``."""
    others = torch.arange(first, first + count, dtype=ids.dtype, device=ids.device)
    return torch.cat((others.expand(*ids.shape[:-1], count), ids), -1)
