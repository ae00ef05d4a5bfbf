"""Training objectives of language models: masked tokens, and the loss of the next token.

The losses are :func:`fusedformer.functional.linear_cross_entropy`: no logits of all tokens are in
memory, and tokens without a label are not projected.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from fusedformer import functional
from fusedformer._internal import checks

__all__ = ["causal_lm_loss", "mask_tokens"]

IGNORED = -100


def mask_tokens(
    input_ids: Tensor,
    mask_token_id: int,
    vocab_size: int,
    special_tokens_mask: Tensor | None = None,
    probability: float = 0.15,
    generator: Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Choose and replace tokens as BERT is trained; the labels are the tokens before.

    Of the tokens that are chosen, each with ``probability``, 80% become the mask token, 10% any
    token, and 10% stay. One random number decides for a token; nothing waits for the device.

    Args:
        input_ids: int64, any shape.
        mask_token_id: the id that replaces a token.
        vocab_size: random tokens are drawn from 0 to ``vocab_size - 1``.
        special_tokens_mask: where a token is never chosen: boolean or integer (not 0), of the shape
            of ``input_ids``. Padding belongs there.
        probability: that a token is chosen, in [0, 1].
        generator: of the device of ``input_ids``; the same state gives the same result.

    Returns:
        (ids, labels), of the shape of ``input_ids``; labels are -100 where nothing was chosen, as
        the losses expect.

    Raises:
        TypeError: ``input_ids`` is not int64, ``special_tokens_mask`` not boolean or integer.
        ValueError: shapes or devices differ; ``probability`` outside [0, 1]; ``mask_token_id`` not
            below ``vocab_size``.

    Source: Devlin et al., BERT, arXiv:1810.04805.
    """
    function = "mask_tokens"
    _check_ids(function, "input_ids", input_ids)
    checks.check_probability(function, "probability", probability)
    if not 0 <= mask_token_id < vocab_size:
        raise ValueError(
            f"{function}(): expected 'mask_token_id' to be from 0 to vocab_size - 1, "
            f"{vocab_size - 1}, but got {mask_token_id}"
        )
    draw = torch.rand(input_ids.shape, device=input_ids.device, generator=generator)
    random = torch.randint(
        vocab_size, input_ids.shape, device=input_ids.device, generator=generator
    )
    chosen = draw < probability
    if special_tokens_mask is not None:
        of = "that of 'input_ids'"
        name = "special_tokens_mask"
        checks.check_shape(function, name, special_tokens_mask, input_ids.shape, of)
        if special_tokens_mask.is_floating_point() or special_tokens_mask.is_complex():
            raise TypeError(
                f"{function}(): expected '{name}' to be boolean or integer, "
                f"but got {special_tokens_mask.dtype}"
            )
        checks.check_same_device(function, {"input_ids": input_ids, name: special_tokens_mask})
        chosen &= special_tokens_mask == 0
    # The random number of a chosen token is uniform below ``probability``.
    ids = torch.where(chosen & (draw < 0.9 * probability), random, input_ids)
    ids = torch.where(chosen & (draw < 0.8 * probability), mask_token_id, ids)
    return ids, torch.where(chosen, input_ids, IGNORED)


def causal_lm_loss(
    input: Tensor,
    linear_weight: Tensor,
    labels: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    linear_bias: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = IGNORED,
    label_smoothing: float = 0.0,
    static_shapes: bool = True,
) -> Tensor:
    """Compute the loss of predicting each token from the hidden state before it.

    It is the labels that are shifted: the last position of each sequence gets none, and
    ``input`` is neither sliced nor copied.

    Args:
        input: hidden states ``[batch, length, D]``, or of packed sequences ``[total, D]``.
        linear_weight: ``[vocabulary, D]``.
        labels: int64 ``[batch, length]`` or ``[total]``: the token ids, or ``ignore_index`` where a
            token is not to be learned (padding, a prompt).
        cu_seqlens: where packed sequences begin and end, ``[sequences + 1]``: no target crosses an
            end, and rows behind the last have none. Goes with 2-D ``input``, and only with it.
        linear_bias, reduction, ignore_index, label_smoothing: see
            :func:`fusedformer.functional.linear_cross_entropy`. Of ``reduction="none"`` the result
            is shaped as ``labels``.
        static_shapes: compute all positions, which waits for nothing. False is better where many
            labels are ``ignore_index``: those positions are then dropped before any product.

    Raises:
        TypeError: ``labels`` is not int64, ``cu_seqlens`` not int32 or int64; what the loss raises.
        ValueError: shapes that do not belong together; what the loss raises.

    Source: Radford et al., Language Models are Unsupervised Multitask Learners, 2019.
    """
    function = "causal_lm_loss"
    checks.check_input(function, "input", input)
    _check_ids(function, "labels", labels)
    wanted = 3 if cu_seqlens is None else 2
    if input.dim() != wanted:
        form = "[batch, length, D]" if cu_seqlens is None else "[total, D] with 'cu_seqlens'"
        raise ValueError(
            f"{function}(): expected 'input' to have shape {form}, but got {tuple(input.shape)}"
        )
    checks.check_shape(function, "labels", labels, input.shape[:-1], "a label for each row")
    shifted = torch.full_like(labels, ignore_index)
    shifted[..., :-1] = labels[..., 1:]
    if cu_seqlens is not None:
        shifted = _within_sequences(function, shifted, cu_seqlens, ignore_index)
    return functional.linear_cross_entropy(
        input,
        linear_weight,
        shifted,
        linear_bias=linear_bias,
        reduction=reduction,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        static_shapes=static_shapes,
    )


def _within_sequences(
    function: str, shifted: Tensor, cu_seqlens: Tensor, ignore_index: int
) -> Tensor:
    """Ignore the targets at last positions, and of rows that are in no sequence."""
    name = "cu_seqlens"
    checks.check_tensor(function, name, cu_seqlens)
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(
            f"{function}(): expected '{name}' to be int32 or int64, but got {cu_seqlens.dtype}"
        )
    if cu_seqlens.dim() != 1 or not cu_seqlens.shape[0]:
        raise ValueError(
            f"{function}(): expected '{name}' to have shape [sequences + 1], "
            f"but got {tuple(cu_seqlens.shape)}"
        )
    checks.check_same_device(function, {"labels": shifted, name: cu_seqlens})
    positions = torch.arange(shifted.shape[0], device=shifted.device, dtype=cu_seqlens.dtype)
    # Position p is the last of its sequence if a sequence ends at p + 1.
    ends = torch.searchsorted(cu_seqlens, positions + 1)
    last = cu_seqlens[ends.clamp(max=cu_seqlens.shape[0] - 1)] == positions + 1
    return shifted.masked_fill(last | (positions >= cu_seqlens[-1]), ignore_index)


def _check_ids(function: str, name: str, ids: Tensor) -> None:
    checks.check_tensor(function, name, ids)
    if ids.dtype != torch.int64:
        raise TypeError(f"{function}(): expected '{name}' to be int64, but got {ids.dtype}")
