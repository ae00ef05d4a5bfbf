"""BERT: embeddings, a post-norm stack, and the heads that it is trained with."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusedformer import functional
from fusedformer._internal import checks
from fusedformer.models.huggingface import (
    ACTIVATIONS,
    HuggingFaceWeights,
    ModelConfig,
    Source,
    activation_of,
    weight_and_bias,
)
from fusedformer.models.initialization import draw_parameters
from fusedformer.models.prompts import embedded
from fusedformer.models.text import TextModel
from fusedformer.nn import LayerNorm, TransformerEncoder, TransformerEncoderLayer
from fusedformer.nn.children import is_plain
from fusedformer.objectives import IGNORED

Head = Literal["pooler", "mlm", "nsp"]

# From our names of modules to Hugging Face's; each has a weight and perhaps a bias.
_EMBEDDING_NAMES = {
    "embeddings.word": "embeddings.word_embeddings",
    "embeddings.position": "embeddings.position_embeddings",
    "embeddings.token_type": "embeddings.token_type_embeddings",
    "embeddings.norm": "embeddings.LayerNorm",
}
_LAYER_NAMES = {
    "self_attn.out_proj": "attention.output.dense",
    "norm1": "attention.output.LayerNorm",
    "linear1": "intermediate.dense",
    "linear2": "output.dense",
    "norm2": "output.LayerNorm",
}
_PROJECTIONS = tuple(f"attention.self.{name}" for name in ("query", "key", "value"))
_HEAD_NAMES = {
    "pooler": "pooler.dense",
    "mlm.dense": "cls.predictions.transform.dense",
    "mlm.norm": "cls.predictions.transform.LayerNorm",
    "nsp": "cls.seq_relationship",
}


@dataclass(frozen=True)
class BertConfig(ModelConfig):
    """Sizes and settings of a BERT encoder, by Hugging Face's names; the defaults are BERT-base's.

    Raises:
        ValueError: a size that is not positive, heads that do not divide the width, a dropout
            outside [0, 1], an unknown activation.
    """

    _fixed_settings: ClassVar[dict[str, Any]] = {
        "position_embedding_type": "absolute",
        "is_decoder": False,
    }

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int = 0


class BertEmbeddings(nn.Module):
    """``dropout(norm(word + token type + position))``."""

    def __init__(self, config: BertConfig, device: Any, dtype: torch.dtype | None) -> None:
        super().__init__()
        to: dict[str, Any] = {"device": device, "dtype": dtype}
        width = config.hidden_size
        self.word = nn.Embedding(config.vocab_size, width, config.pad_token_id, **to)
        self.position = nn.Embedding(config.max_position_embeddings, width, **to)
        self.token_type = nn.Embedding(config.type_vocab_size, width, **to)
        self.norm = LayerNorm(width, config.layer_norm_eps, **to)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        token_type_ids: Tensor | None = None,
        prompt: Tensor | None = None,
    ) -> Tensor:
        """Embed integers ``[*]`` of one shape as ``[*, d]``, in one kernel.

        The children are called instead if one is replaced or has hooks, or with a prompt; ids
        beyond the table then stand for its vectors.
        """
        plain = (nn.Embedding, LayerNorm, nn.Dropout)
        if prompt is None and all(is_plain(child, *plain) for child in self.children()):
            return functional.embedding_layer_norm(
                input_ids,
                self.word.weight,
                self.norm.weight,
                self.norm.bias,
                self.norm.eps,
                position_ids=position_ids,
                position_weight=self.position.weight,
                token_type_ids=token_type_ids,
                token_type_weight=self.token_type.weight,
                padding_idx=self.word.padding_idx,
                p=self.dropout.p,
                training=self.training,
            )
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(input_ids)
        total = embedded(self.word, input_ids, prompt) + self.token_type(token_type_ids)
        output: Tensor = self.dropout(self.norm(total + self.position(position_ids)))
        return output


class BertMaskedLMHead(nn.Module):
    """``norm(activation(dense(hidden)))``, and the bias of the projection to the vocabulary."""

    def __init__(self, config: BertConfig, device: Any, dtype: torch.dtype | None) -> None:
        super().__init__()
        to: dict[str, Any] = {"device": device, "dtype": dtype}
        width = config.hidden_size
        self.dense = nn.Linear(width, width, **to)
        self.activation = ACTIVATIONS[config.hidden_act]
        self.norm = LayerNorm(width, config.layer_norm_eps, **to)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size, **to))

    def forward(self, hidden: Tensor) -> Tensor:
        """Compute ``[*, d]``, which word embeddings turn into logits, from hidden states."""
        inner = functional.bias_activation(self.dense(hidden), None, self.activation)
        output: Tensor = self.norm(inner)
        return output


class BertEncoderModel(TextModel, HuggingFaceWeights):
    """Token ids to the hidden states of BERT's last layer, with its heads where they are asked for.

    ``embeddings`` is a :class:`BertEmbeddings`, ``encoder`` a
    :class:`fusedformer.nn.TransformerEncoder` of post-norm layers.

    Args:
        config: sizes and settings.
        device, dtype: of the parameters.
        heads: any of ``"pooler"``, ``"mlm"`` (masked language modelling, its decoder tied to the
            word embeddings) and ``"nsp"`` (next sentence, which brings the pooler with it).

    Source: Devlin et al., BERT, arXiv:1810.04805.
    """

    embeddings: BertEmbeddings

    _config = BertConfig
    _prefix = "bert."
    _ignored_parts = ("pooler.", "cls.", "classifier.", "qa_outputs.")
    _ignored_buffers = r"embeddings\.(position_ids|token_type_ids)"

    def __init__(
        self,
        config: BertConfig,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        heads: Collection[Head] = (),
    ) -> None:
        super().__init__()
        unknown = set(heads) - {"pooler", "mlm", "nsp"}
        if isinstance(heads, str) or unknown:
            raise ValueError(
                f"BertEncoderModel(): expected 'heads' to be a collection of 'pooler', 'mlm' and "
                f"'nsp', but got {heads!r}"
            )
        self.config = config
        self.embeddings = BertEmbeddings(config, device, dtype)
        layer = TransformerEncoderLayer(
            config.hidden_size,
            config.num_attention_heads,
            config.intermediate_size,
            config.hidden_dropout_prob,
            activation_of(config.hidden_act),
            config.layer_norm_eps,
            batch_first=True,
            device=device,
            dtype=dtype,
        )
        # BERT has another rate for attention weights, and no dropout after the activation.
        layer.self_attn.dropout = config.attention_probs_dropout_prob
        layer.dropout.p = 0.0
        self.encoder = TransformerEncoder(layer, config.num_hidden_layers)
        to: dict[str, Any] = {"device": device, "dtype": dtype}
        width = config.hidden_size
        pools = "pooler" in heads or "nsp" in heads
        self.pooler = nn.Linear(width, width, **to) if pools else None
        self.mlm = BertMaskedLMHead(config, device, dtype) if "mlm" in heads else None
        self.nsp = nn.Linear(width, 2, **to) if "nsp" in heads else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all weights anew: normal of deviation ``initializer_range``, biases 0."""
        draw_parameters(self, self.config.initializer_range)
        self.embeddings.word.weight[self.config.pad_token_id].zero_()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        output_rows: Tensor | None = None,
    ) -> Tensor:
        """Compute hidden states of the last layer, of real tokens with an ``attention_mask``.

        Args:
            input_ids: integer ``[B, L]``, each below ``vocab_size``.
            attention_mask: ``[B, L]``, nonzero = real token, 0 = padding; None if all are real.
            token_type_ids: integer ``[B, L]``; 0 if None.
            position_ids: integer, broadcastable to ``[B, L]``; 0, 1, ... if None.
            output_rows: only these, as for :class:`fusedformer.nn.TransformerEncoder`.

        Returns:
            ``[B, L, d]`` in the dtype of the parameters; 0 at padded positions. Or what
            ``output_rows`` says.

        Raises:
            TypeError: ``input_ids`` are not integers.
            ValueError: wrong rank or shape; a sequence longer than ``max_position_embeddings``.
        """
        longest = None if position_ids is not None else self.config.max_position_embeddings
        alike = {"attention_mask": attention_mask, "token_type_ids": token_type_ids}
        self._check(input_ids, longest, **alike)
        if attention_mask is None and self.prompt is None and self.prefix is None:
            if position_ids is None:
                position_ids = self._positions(input_ids, None)
            positions = position_ids.expand(input_ids.shape)
            hidden = self.embeddings(input_ids, positions, token_type_ids)
            output: Tensor = self.encoder(hidden, output_rows=output_rows)
            return output
        return self._encode(
            input_ids, attention_mask, position_ids, output_rows, token_type_ids
        ).padded()

    def pooled(self, input_ids: Tensor, **inputs: Any) -> Tensor:
        """Compute ``tanh(pooler(hidden state of the first token))``, ``[B, d]``.

        Args:
            input_ids, inputs: as for :meth:`forward`; the last layer computes first tokens alone.

        Raises:
            ValueError: the model has no pooler; what :meth:`forward` raises.
        """
        first = torch.zeros(input_ids.shape[0], 1, dtype=torch.int64, device=input_ids.device)
        return self._pool(self(input_ids, **inputs, output_rows=first)[:, 0])

    def masked_lm_logits(self, hidden: Tensor) -> Tensor:
        """Compute logits ``[*, vocab_size]`` of hidden states ``[*, d]`` by the head ``"mlm"``."""
        head = self._head("mlm", self.mlm)
        return F.linear(head(hidden), self.embeddings.word.weight, head.bias)

    def loss(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        next_sentence_label: Tensor | None = None,
        **inputs: Any,
    ) -> Tensor:
        """Compute the sum of BERT's two losses, or the one whose labels are given.

        The last layer computes only tokens with a label and, for next sentences, the first ones; no
        logits of all tokens are in memory. With the encoder's ``static_shapes``, and inside
        ``torch.compile``, all tokens are computed, as the number of labels must decide no shape.

        Args:
            input_ids, inputs: as for :meth:`forward`.
            labels: int64 ``[B, L]``, -100 where nothing was masked (see
                :func:`fusedformer.objectives.mask_tokens`).
            next_sentence_label: int64 ``[B]``: 0 if the second sentence follows the first, else 1.

        Returns:
            A scalar; the mean over masked tokens and the mean over sequences.

        Raises:
            ValueError: no labels, labels of another shape, no head for them; what :meth:`forward`
                raises.
        """
        function = "BertEncoderModel.loss"
        batch_and_length = tuple(input_ids.shape)
        checks.check_shape(function, "labels", labels, batch_and_length, "that of 'input_ids'")
        of = "one for each sequence"
        shape = batch_and_length[:1]
        checks.check_shape(function, "next_sentence_label", next_sentence_label, shape, of)
        if labels is None:
            if next_sentence_label is None:
                raise ValueError(f"{function}(): expected 'labels' or 'next_sentence_label'")
            logits = self._head("nsp", self.nsp)(self.pooled(input_ids, **inputs))
            return functional.cross_entropy(logits, next_sentence_label)
        head = self._head("mlm", self.mlm)
        if self.encoder.static_shapes or not checks.has_values(labels):
            hidden, targets = self(input_ids, **inputs).flatten(0, 1), labels.flatten()
            firsts = torch.arange(input_ids.shape[0], device=hidden.device) * input_ids.shape[1]
        else:
            wanted = labels != IGNORED
            if next_sentence_label is not None:
                wanted[:, 0] = True
            hidden, flat = self(input_ids, **inputs, output_rows=wanted), wanted.flatten()
            places = torch.nonzero_static(flat, size=hidden.shape[0]).flatten()
            targets = labels.flatten()[places]
            firsts = flat.cumsum(0)[:: input_ids.shape[1]] - 1
        loss = functional.linear_cross_entropy(
            head(hidden),
            self.embeddings.word.weight,
            targets,
            linear_bias=head.bias,
            static_shapes=True,  # nearly all of these rows have a label
        )
        if next_sentence_label is None:
            return loss
        logits = self._head("nsp", self.nsp)(self._pool(hidden[firsts]))
        return loss + functional.cross_entropy(logits, next_sentence_label)

    def _pool(self, first: Tensor) -> Tensor:
        return torch.tanh(self._head("pooler", self.pooler)(first))

    def _head(self, name: Head, head: Any) -> Any:
        if head is None:
            raise ValueError(f"BertEncoderModel: made without the head {name!r}; see 'heads'")
        return head

    def _tied(self) -> dict[str, str]:
        decoder = "cls.predictions.decoder"
        tied = {f"{decoder}.weight": "embeddings.word.weight", f"{decoder}.bias": "mlm.bias"}
        return {} if self.mlm is None else tied

    @property
    def token_table(self) -> nn.Embedding:
        """Return the embeddings of tokens."""
        return self.embeddings.word

    def _full_name(self, name: str) -> str:
        # A bare BertModel has no prefix; the models around it have it, but not on their heads.
        bare = self.mlm is None and self.nsp is None
        return name if bare or name.startswith("cls.") else self._prefix + name

    def _sources(self) -> dict[str, Source]:
        sources: dict[str, Source] = {}
        for ours, theirs in _EMBEDDING_NAMES.items():
            sources |= weight_and_bias(ours, theirs)
        for index in range(self.config.num_hidden_layers):
            ours, theirs = f"encoder.layers.{index}", f"encoder.layer.{index}"
            for kind in ("weight", "bias"):
                names = tuple(f"{theirs}.{projection}.{kind}" for projection in _PROJECTIONS)
                sources[f"{ours}.self_attn.in_proj_{kind}"] = Source(names)
            for own, their in _LAYER_NAMES.items():
                sources |= weight_and_bias(f"{ours}.{own}", f"{theirs}.{their}")
        for ours, theirs in _HEAD_NAMES.items():
            sources |= weight_and_bias(ours, theirs)
        sources["mlm.bias"] = Source(("cls.predictions.bias",))
        return {name: sources[name] for name in self.state_dict() if name in sources}
