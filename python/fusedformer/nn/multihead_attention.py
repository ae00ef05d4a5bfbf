"""``torch.nn.MultiheadAttention`` on the fused kernels."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedformer import functional
from fusedformer._internal import checks
from fusedformer.errors import BadValueError
from fusedformer.functional import Selection
from fusedformer.functional.steps import linear, self_attention
from fusedformer.nn.masks import AttentionMasks, Names, attention_masks, check_sequence

_NAMES = Names("MultiheadAttention", "query", "key", "value", "attn_mask", "key_padding_mask")


def check_heads(function: str, width_name: str, width: int, heads_name: str, heads: int) -> None:
    """Check that both are positive and ``heads`` divides ``width``."""
    if width <= 0 or heads <= 0 or width % heads:
        raise BadValueError(
            f"{function}(): expected '{width_name}' to be a positive multiple of a positive "
            f"'{heads_name}', but got {width_name}={width} and {heads_name}={heads}"
        )


class MultiheadAttention(torch.nn.MultiheadAttention):
    """``concat(head_1, ...) @ W_o`` with ``head_i = attention(q @ W_q_i, k @ W_k_i, v @ W_v_i)``.

    A drop-in for :class:`torch.nn.MultiheadAttention`: constructor, parameters, initialization
    and arguments are its own. The fused attention reads the projections in place, and computes
    the output whether weights are asked for or not; weights are computed again from the
    log-sum-exp, and take no more memory than they are. It differs where torch's own paths disagree:

    - A query with no visible key attends to nothing: its heads are 0, never NaN.
    - Masks of different kinds, one boolean and one floating, may be mixed without a warning.
    - Bad arguments raise ``ValueError`` or ``TypeError``.

    Args:
        embed_dim: total width ``E`` of the model.
        num_heads: number of heads; divides ``embed_dim``.
        dropout: probability that an attention weight is dropped while training, in [0, 1].
        bias: whether the projections have biases.
        add_bias_kv: append one learned key and value, seen by every query.
        add_zero_attn: append a key and value of zeros, seen by every query.
        kdim, vdim: widths of key and value; ``embed_dim`` if None.
        batch_first: batched input is ``[batch, length, width]`` rather than
            ``[length, batch, width]``.
        device, dtype: of the parameters.

    Raises:
        ValueError: ``num_heads`` does not divide ``embed_dim``; ``dropout`` outside [0, 1].

    Source: Vaswani et al., Attention Is All You Need, arXiv:1706.03762.
    """

    # Replaces functional.scaled_dot_product_attention where the sequence is spread over processes;
    # set by fusedformer.distributed.context_parallel.
    ring: Callable[..., Any] | None = None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_heads("MultiheadAttention", "embed_dim", embed_dim, "num_heads", num_heads)
        checks.check_probability("MultiheadAttention", "dropout", dropout)
        super().__init__(
            embed_dim,
            num_heads,
            dropout,
            bias,
            add_bias_kv,
            add_zero_attn,
            kdim,
            vdim,
            batch_first,
            device,
            dtype,
        )

    def reset_parameters(self) -> None:
        """Initialize as the constructor does, after ``to_empty`` of a module on "meta", say.

        The output projection has a method of its own, to be called before: ``Module.apply`` goes
        through children first.
        """
        self._reset_parameters()
        weight = self.in_proj_weight
        if weight is not None and weight.dim() == 3:  # parallel; initialized as in two dimensions
            bound = math.sqrt(6.0 / (weight.shape[0] * weight.shape[1] + weight.shape[2]))
            torch.nn.init.uniform_(weight, -bound, bound)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Take the projection's three parts in one dimension, as torch has them, or in two."""
        for name, dims in (("in_proj_weight", 2), ("in_proj_bias", 1)):
            own, given = self._parameters.get(name), state_dict.get(prefix + name)
            if own is None or not isinstance(given, Tensor):
                continue
            rows, *rest = own.shape[own.dim() - dims :]
            rows *= 3 if own.dim() > dims else 1
            forms = (rows, *rest), (3, rows // 3, *rest)
            if given.shape != own.shape and tuple(given.shape) in forms:
                state_dict[prefix + name] = given.reshape(own.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from ``query`` to ``key`` and ``value``.

        Args:
            query: ``[N, L, E]`` with ``batch_first``, else ``[L, N, E]``; unbatched ``[L, E]``.
            key, value: likewise with length ``S`` and widths ``kdim`` and ``vdim``. Passing the
                same tensor object lets one product project them together.
            key_padding_mask: ``[N, S]`` (unbatched ``[S]``); True = masked, or floating-point and
                added to the scores.
            need_weights: also return the attention weights, at the cost of one more product.
            attn_mask: ``[L, S]`` or ``[N * num_heads, L, S]``; True = masked, or added.
            average_attn_weights: return the mean of the weights over the heads.
            is_causal: a hint that ``attn_mask``, which must be given, is the causal mask; it is
                then not read.

        Returns:
            The output, of the shape of ``query``, and None or the weights after dropout:
            ``[N, L, S]``, or ``[N, num_heads, L, S]`` if they are not averaged (no ``N`` for
            unbatched input).

        Raises:
            TypeError: dtypes that do not fit the parameters; masks neither boolean nor floating.
            ValueError: shapes or devices that do not fit; ``is_causal`` without ``attn_mask``.
        """
        asked: Literal[False, "per_head", "averaged"] = False
        if need_weights:
            asked = "averaged" if average_attn_weights else "per_head"
        heads, weights = self._attend(
            query, key, value, key_padding_mask, attn_mask, is_causal, asked
        )
        output: Tensor = self.out_proj(heads)
        if weights is not None and query.dim() == 2:
            weights = weights[0]
        return output, weights

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        is_causal: bool,
        return_weights: Literal[False, "per_head", "averaged"],
        names: Names = _NAMES,
    ) -> tuple[Tensor, Tensor | None]:
        """Compute the merged heads ``[..., E]`` that the output projection gets, and weights."""
        batch, rows, keys = self._check_inputs(query, key, value, names)
        appended = int(self.bias_k is not None) + int(self.add_zero_attn)
        masks = attention_masks(
            names,
            attn_mask,
            key_padding_mask,
            is_causal,
            batched=query.dim() == 3,
            batch=batch,
            heads=self.num_heads,
            rows=rows,
            keys=keys,
            appended=appended,
        )
        if query is key and key is value and self._can_pack() and not return_weights:
            return self._attend_to_itself(query, masks, fork=False)[0], None
        q, k, v = (self._split_heads(x) for x in self._project(query, key, value))
        if appended:
            k, v = self._append(k, self.bias_k), self._append(v, self.bias_v)

        result = self._attention(q, k, v, masks, return_weights=return_weights)
        output, weights = result if return_weights else (result, None)
        return self._merge_heads(output, query.dim()), weights

    def _attention(
        self, query: Tensor, key: Tensor, value: Tensor, masks: AttentionMasks, **asked: Any
    ) -> Any:
        """Attend with heads ``[batch, heads, length, head_dim]``."""
        attend = self.ring or functional.scaled_dot_product_attention
        dropout_p = self.dropout if self.training else 0.0
        return attend(
            query,
            key,
            value,
            masks.attn_mask,
            dropout_p,
            masks.is_causal,
            key_mask=masks.key_mask,
            **asked,
        )

    def _can_pack(self) -> bool:
        """Return whether self-attention is one projection and appends nothing to the keys."""
        return self._qkv_same_embed_dim and self.bias_k is None and not self.add_zero_attn

    def _attend_to_itself(
        self, x: Tensor, masks: AttentionMasks, *, fork: bool
    ) -> tuple[Tensor, Tensor]:
        """Compute the merged heads, shaped like ``x``, of attention from ``x`` to itself.

        Needs :meth:`_can_pack`. Also returns ``x`` as ``ops.linear`` does with ``fork``.
        ``x`` is a batch, one sequence, or packed rows ``[total, E]``.
        """
        projected, x = linear(x, self.in_proj_weight, self.in_proj_bias, fork=fork)
        qkv = torch.unflatten(projected, -1, (3, self.num_heads, self.head_dim))
        sequence_first = x.dim() == 3 and not self.batch_first
        if x.dim() == 2:
            qkv = qkv[None]
        elif sequence_first:
            qkv = qkv.transpose(0, 1)
        dropout_p = self.dropout if self.training else 0.0
        if masks.attend is not None:
            heads = masks.attend(qkv, dropout_p, masks)
        elif self.ring is None:
            heads = self_attention(qkv, masks.terms(qkv.shape[-1], dropout_p))
        else:
            q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
            heads = self._attention(q, k, v, masks).transpose(1, 2)
        if x.dim() == 2:
            heads = heads.squeeze(0)
        elif sequence_first:
            heads = heads.transpose(0, 1)
        return heads.flatten(-2), x

    def _attend_to(
        self, x: Tensor, memory: Tensor, masks: AttentionMasks, *, fork: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the merged heads, shaped like ``x``, of attention from ``x`` to ``memory``.

        Needs :meth:`_can_pack`. Also returns ``x`` and ``memory`` as ``ops.linear`` does with
        ``fork``. One product gives keys and values. ``x`` and ``memory`` are batches, single
        sequences, or packed rows.
        """
        (weight_q, weight_kv), (bias_q, bias_kv) = self._split_projection()
        query, x = linear(x, weight_q, bias_q, fork=fork)
        pair, memory = linear(memory, weight_kv, bias_kv, fork=True)
        if masks.cu_seqlens_q is None or masks.cu_seqlens_k is None:
            q, k, v = (self._split_heads(part) for part in (query, *pair.chunk(2, -1)))
            heads = self._attention(q, k, v, masks)
            return self._merge_heads(heads, x.dim()), x, memory
        key, value = torch.unflatten(pair, -1, (2, self.num_heads, -1)).unbind(1)
        output: Tensor = functional.varlen_attention(
            torch.unflatten(query, -1, (self.num_heads, -1)),
            key,
            value,
            masks.cu_seqlens_q,
            masks.cu_seqlens_k,
            masks.max_seqlen_q,
            masks.max_seqlen_k,
            self.dropout if self.training else 0.0,
            is_causal=masks.is_causal,
        )
        return output.flatten(1), x, memory

    def _split_projection(self) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
        """Split weight and bias in two: for queries, and for keys and values together."""
        width, bias = self.num_heads * self.head_dim, self.in_proj_bias
        sizes = [width, 2 * width]
        biases = (None, None) if bias is None else torch.split(bias, sizes)
        return torch.split(self.in_proj_weight, sizes), biases

    def _attend_from(self, x: Tensor, rows: Selection, masks: AttentionMasks) -> Tensor:
        """Attend from ``rows`` of packed ``x`` to its sequences; needs :meth:`_can_pack`."""
        weights, biases = self._split_projection()
        query = F.linear(rows.take(x), weights[0], biases[0])
        pair = F.linear(x, weights[1], biases[1])
        key, value = torch.unflatten(pair, -1, (2, self.num_heads, -1)).unbind(1)
        assert masks.cu_seqlens_k is not None
        output: Tensor = functional.varlen_attention(
            torch.unflatten(query, -1, (self.num_heads, -1)),
            key,
            value,
            rows.cu_seqlens,
            masks.cu_seqlens_k,
            rows.max_seqlen,
            masks.max_seqlen_k,
            self.dropout if self.training else 0.0,
        )
        return output.flatten(1)

    def _check_inputs(
        self, query: Tensor, key: Tensor, value: Tensor, names: Names
    ) -> tuple[int, int, int]:
        """Check the inputs; return the batch size and the numbers of queries and keys."""
        function, weight = names.function, self.out_proj.weight
        check_sequence(function, names.query, query, self.embed_dim, weight)
        batch, rows = self._sizes(query)
        if key is query and value is query and self._qkv_same_embed_dim:
            return batch, rows, rows
        check_sequence(function, names.key, key, self.kdim, weight)
        check_sequence(function, names.value, value, self.vdim, weight)
        if key.shape[:-1] != value.shape[:-1]:
            raise BadValueError(
                f"{function}(): expected '{names.key}' and '{names.value}' to have the same batch "
                f"and length, but got shapes {tuple(key.shape)} and {tuple(value.shape)}"
            )
        key_batch, keys = self._sizes(key)
        if key.dim() != query.dim() or key_batch != batch:
            raise BadValueError(
                f"{function}(): expected '{names.key}' to have the batch of '{names.query}', but "
                f"got shapes {tuple(key.shape)} and {tuple(query.shape)} with "
                f"batch_first={self.batch_first}"
            )
        return batch, rows, keys

    def _sizes(self, sequence: Tensor) -> tuple[int, int]:
        """Return (batch, length), with a batch of 1 for unbatched input."""
        if sequence.dim() == 2:
            return 1, sequence.shape[0]
        first, second = sequence.shape[:2]
        return (first, second) if self.batch_first else (second, first)

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """Project query, key and value to ``[..., E]``, by one product for equal inputs."""
        weight, bias = self.in_proj_weight, self.in_proj_bias
        if weight is not None and query is key and key is value:
            return F.linear(query, weight, bias).chunk(3, -1)
        if weight is not None and key is value:
            weights, biases = self._split_projection()
            return (
                F.linear(query, weights[0], biases[0]),
                *F.linear(key, weights[1], biases[1]).chunk(2, -1),
            )
        if weight is None:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        else:
            weights = weight.chunk(3)
        biases = (None, None, None) if bias is None else bias.chunk(3)
        return tuple(map(F.linear, (query, key, value), weights, biases))

    def _split_heads(self, projected: Tensor) -> Tensor:
        """Return a view ``[batch, heads, length, head_dim]``."""
        split = torch.unflatten(projected, -1, (self.num_heads, self.head_dim))
        if projected.dim() == 2:
            return split.transpose(0, 1)[None]
        return split.transpose(1, 2) if self.batch_first else split.permute(1, 2, 0, 3)

    def _merge_heads(self, output: Tensor, dim: int) -> Tensor:
        """Undo :meth:`_split_heads`; a view of a kernel's result if the batch comes first."""
        if dim == 2:
            return output[0].transpose(0, 1).flatten(1)
        order = (0, 2, 1, 3) if self.batch_first else (2, 0, 1, 3)
        return output.permute(order).flatten(2)

    def _append(self, heads: Tensor, bias: Tensor | None) -> Tensor:
        """Append the learned key or value, and zeros, as the settings say."""
        shape = (heads.shape[0], self.num_heads, 1, self.head_dim)
        parts = [heads]
        if bias is not None:
            parts.append(bias.view(1, *shape[1:]).expand(shape).to(heads.dtype))
        if self.add_zero_attn:
            parts.append(heads.new_zeros(shape))
        return torch.cat(parts, -2)
