"""Training of a part of a pretrained model: last layers, a head, a learned prompt or prefix."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fusedformer import functional
from fusedformer._internal import checks
from fusedformer.models.prompts import PrefixTuning, PromptTuning
from fusedformer.models.text import TextModel

__all__ = ["SequenceClassifier", "freeze", "prefix_tuning", "prompt_tuning"]

_DEVIATION = 0.02  # of initial values, as in the models


def freeze(model: nn.Module, layers: int) -> list[str]:
    """Train all but the embeddings and the first ``layers`` layers of the encoder.

    The forward keeps nothing for what is frozen, and the backward stops at the first layer that
    is trained. ``model.requires_grad_(True)`` trains all of it.

    Args:
        model: of :mod:`fusedformer.models` (of CLIP a tower), or any with an ``encoder`` of
            ``layers`` and perhaps ``embeddings``; or such an encoder itself.
        layers: from 0 to the number of layers, which leaves heads alone.

    Returns:
        The names of the parameters that are trained.

    Raises:
        TypeError: ``model`` has no encoder with layers.
        ValueError: ``layers`` out of range.
    """
    encoder = getattr(model, "encoder", model)
    stack = getattr(encoder, "layers", None)
    if not isinstance(stack, nn.ModuleList):
        raise TypeError(
            f"freeze(): expected 'model' to have an 'encoder' with 'layers', "
            f"but got {type(model).__name__}"
        )
    if not 0 <= layers <= len(stack):
        raise ValueError(
            f"freeze(): expected 'layers' to be from 0 to {len(stack)}, but got {layers}"
        )
    model.requires_grad_(True)
    embeddings = getattr(model, "embeddings", None)
    if embeddings is not None:
        embeddings.requires_grad_(False)
    for layer in stack[:layers]:
        layer.requires_grad_(False)
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def prompt_tuning(
    model: TextModel, length: int, *, start_ids: Tensor | None = None
) -> PromptTuning:
    """Put ``length`` learned vectors in front of every input of ``model``, and train only these.

    They take the place of token embeddings, at the first positions; tokens move back by ``length``.
    They are packed with the tokens, so padding is as it was; outputs are of the tokens alone.

    Args:
        model: whose ``prompt`` becomes the module that is returned; all else is frozen.
        length: number of vectors.
        start_ids: int64 ``[length]``, tokens from whose embeddings to start; drawn if None.

    Raises:
        TypeError: ``model`` is not a text model of :mod:`fusedformer.models`.
        ValueError: ``length`` is not positive; ``start_ids`` is not of it.

    Source: Lester et al., arXiv:2104.08691.
    """
    function = "prompt_tuning"
    _check_text_model(function, model, length)
    checks.check_shape(function, "start_ids", start_ids, (length,), "length")
    weight = model.token_table.weight.detach()
    if start_ids is None:
        start = weight.new_empty(length, weight.shape[1]).normal_(std=_DEVIATION)
    else:
        start = weight[start_ids]
    model.requires_grad_(False)
    model.prompt = PromptTuning(start)
    return model.prompt


def prefix_tuning(model: TextModel, length: int) -> PrefixTuning:
    """Give every layer of ``model`` ``length`` learned keys and values, and train only these.

    Positions stay as they are. In generation they are the first entries of the cache.

    Args:
        model: whose ``prefix`` becomes the module that is returned; all else is frozen.
        length: number of keys of each layer and head; they start from small random values.

    Raises:
        TypeError: ``model`` is not a text model of :mod:`fusedformer.models`.
        ValueError: ``length`` is not positive.

    Source: Li and Liang, arXiv:2101.00190.
    """
    _check_text_model("prefix_tuning", model, length)
    first: Any = model.encoder.layers[0].self_attn
    shape = (len(model.encoder.layers), first.num_heads, length, first.head_dim)
    weight = first.out_proj.weight
    key, value = (weight.new_empty(shape).normal_(std=_DEVIATION) for _ in range(2))
    model.requires_grad_(False)
    model.prefix = PrefixTuning(key, value)
    return model.prefix


def _check_text_model(function: str, model: object, length: int) -> None:
    if not isinstance(model, TextModel):
        raise TypeError(
            f"{function}(): expected 'model' to be a text model of fusedformer.models, "
            f"but got {type(model).__name__}"
        )
    if length < 1:
        raise ValueError(f"{function}(): expected 'length' to be positive, but got {length}")


class SequenceClassifier(nn.Module):
    """A linear layer on what ``model.pooled`` returns, after dropout.

    Args:
        model: of :mod:`fusedformer.models`: BERT with its pooler, GPT (its last token's hidden
            state), or a tower of CLIP.
        num_labels: number of classes.
        dropout: probability before the layer, in [0, 1].

    Source: Devlin et al., BERT, arXiv:1810.04805, section 4.
    """

    def __init__(self, model: Any, num_labels: int, dropout: float = 0.1) -> None:
        checks.check_probability("SequenceClassifier", "dropout", dropout)
        super().__init__()
        self.model = model
        weight = model.encoder.layers[0].linear1.weight
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(
            weight.shape[1], num_labels, device=weight.device, dtype=weight.dtype
        )

    def forward(self, *inputs: Any, **named: Any) -> Tensor:
        """Compute logits ``[B, num_labels]``; arguments are those of the model's ``pooled``."""
        logits: Tensor = self.classifier(self.dropout(self.model.pooled(*inputs, **named)))
        return logits

    def loss(self, labels: Tensor, *inputs: Any, **named: Any) -> Tensor:
        """Compute the cross entropy of int64 ``labels`` ``[B]``; the rest as :meth:`forward`."""
        return functional.cross_entropy(self(*inputs, **named), labels)
