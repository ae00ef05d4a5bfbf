"""BERT's encoder: embeddings, then a post-norm stack, and its weights in Hugging Face's layout."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fusedformer import functional
from fusedformer.functional._selection import check_output_rows
from fusedformer.nn import LayerNorm, TransformerEncoder, TransformerEncoderLayer
from fusedformer.nn._modules import is_plain

# Ours: Hugging Face's. Names of modules, each with a weight and, where it has one, a bias.
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
_NOT_OURS = ("pooler.", "cls.", "classifier.", "qa_outputs.")
_POSITION_BUFFERS = ("embeddings.position_ids", "embeddings.token_type_ids")


@dataclass(frozen=True)
class BertConfig:
    """Sizes and settings of a BERT encoder, by Hugging Face's names; the defaults are BERT-base's.

    Raises:
        ValueError: a size that is not positive, heads that do not divide the width, a dropout
            outside [0, 1].
    """

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

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            lowest = 0 if field.name == "pad_token_id" else 1
            if field.type == "int" and value < lowest:
                raise ValueError(
                    f"BertConfig(): expected '{field.name}' to be at least {lowest}, "
                    f"but got {value}"
                )
            if field.name.endswith("dropout_prob") and not 0.0 <= value <= 1.0:
                raise ValueError(
                    f"BertConfig(): expected '{field.name}' to be in [0, 1], but got {value}"
                )
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"BertConfig(): expected 'num_attention_heads' to divide hidden_size="
                f"{self.hidden_size}, but got {self.num_attention_heads}"
            )
        if self.hidden_act not in ("gelu", "relu"):
            raise ValueError(
                f"BertConfig(): expected 'hidden_act' to be 'gelu' or 'relu', "
                f"but got {self.hidden_act!r}"
            )

    @classmethod
    def from_huggingface(cls, config: Mapping[str, Any]) -> BertConfig:
        """From the content of a ``config.json``, or a configuration's ``to_dict()``.

        Raises:
            ValueError: a setting that this encoder does not have (relative positions, a decoder).
        """
        for name, expected in (("position_embedding_type", "absolute"), ("is_decoder", False)):
            if config.get(name, expected) != expected:
                raise ValueError(
                    f"BertConfig.from_huggingface(): expected {name}={expected!r}, "
                    f"but got {config[name]!r}"
                )
        known = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: config[name] for name in sorted(known & config.keys())})


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
        self, input_ids: Tensor, token_type_ids: Tensor | None, position_ids: Tensor | None
    ) -> Tensor:
        """Integers ``[B, L]`` to ``[B, L, d]``; or packed ``[total]``, positions given, to 2-D.

        One kernel, unless a child is replaced or has hooks.
        """
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)
        position_ids = position_ids.expand(input_ids.shape)
        plain = (nn.Embedding, LayerNorm, nn.Dropout)
        if all(is_plain(child, *plain) for child in self.children()):
            return functional.embedding_layer_norm(
                input_ids, self.word.weight, self.norm.weight, self.norm.bias, self.norm.eps,
                position_ids=position_ids, position_weight=self.position.weight,
                token_type_ids=token_type_ids, token_type_weight=self.token_type.weight,
                padding_idx=self.word.padding_idx, p=self.dropout.p, training=self.training,
            )
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(input_ids)
        total = self.word(input_ids) + self.token_type(token_type_ids)
        output: Tensor = self.dropout(self.norm(total + self.position(position_ids)))
        return output


class BertEncoderModel(nn.Module):
    """Token ids to the hidden states of BERT's last layer.

    ``embeddings`` is a :class:`BertEmbeddings`, ``encoder`` a
    :class:`fusedformer.nn.TransformerEncoder` of post-norm layers.

    Args:
        config: sizes and settings.
        device, dtype: of the parameters.

    Source: Devlin et al., BERT, arXiv:1810.04805.
    """

    def __init__(
        self, config: BertConfig, device: Any = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.embeddings = BertEmbeddings(config, device, dtype)
        layer = TransformerEncoderLayer(
            config.hidden_size,
            config.num_attention_heads,
            config.intermediate_size,
            config.hidden_dropout_prob,
            config.hidden_act,
            config.layer_norm_eps,
            batch_first=True,
            device=device,
            dtype=dtype,
        )
        # BERT drops attention weights at a rate of their own, and nothing after the activation.
        layer.self_attn.dropout = config.attention_probs_dropout_prob
        layer.dropout.p = 0.0
        self.encoder = TransformerEncoder(layer, config.num_hidden_layers)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all weights anew: normal of deviation ``initializer_range``, biases 0."""
        for name, parameter in self.named_parameters():
            if "norm" in name:
                nn.init.constant_(parameter, 1.0 if name.endswith("weight") else 0.0)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, std=self.config.initializer_range)
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
        """Hidden states of the last layer; with an ``attention_mask``, of real tokens alone.

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
        function = "BertEncoderModel"
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
        longest = self.config.max_position_embeddings
        if position_ids is None and input_ids.shape[1] > longest:
            raise ValueError(
                f"{function}(): expected at most {longest} positions, "
                f"but got input_ids of shape {tuple(input_ids.shape)}"
            )
        alike = {"attention_mask": attention_mask, "token_type_ids": token_type_ids}
        for name, tensor in alike.items():
            if tensor is not None and tensor.shape != input_ids.shape:
                raise ValueError(
                    f"{function}(): expected '{name}' to have the shape of 'input_ids', "
                    f"{tuple(input_ids.shape)}, but got {tuple(tensor.shape)}"
                )
        whole = is_plain(self.encoder, TransformerEncoder)
        whole = whole and is_plain(self.embeddings, BertEmbeddings)  # a hook may want the batch
        packs = whole and self.encoder.packs(self.embeddings.word.weight)
        if attention_mask is None or not packs:
            padding = None if attention_mask is None else attention_mask == 0
            hidden = self.embeddings(input_ids, token_type_ids, position_ids)
            output: Tensor = self.encoder(
                hidden, src_key_padding_mask=padding, output_rows=output_rows
            )
            return output
        if output_rows is not None:
            check_output_rows(function, output_rows, *input_ids.shape)
        packing, selection = self.encoder.packing(attention_mask != 0, output_rows)
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)
        # Rows behind the last token, if any, take the first token's ids.
        places = packing.indices.clamp(min=0)
        ids = [
            None if t is None else t.expand(input_ids.shape).flatten()[places]
            for t in (input_ids, token_type_ids, position_ids)
        ]
        packed = self.encoder.forward_packed(self.embeddings(*ids), packing, selection)
        if selection is not None:
            return selection.result(packed)
        return functional.unpack(packed, packing)

    @classmethod
    def from_huggingface(
        cls, state_dict: Mapping[str, Tensor], config: BertConfig | Mapping[str, Any]
    ) -> BertEncoderModel:
        """A model in eval mode with the weights of a Hugging Face ``BertModel``, in their dtype.

        Args:
            state_dict: as for :meth:`load_huggingface_state_dict`.
            config: ours, or the content of a ``config.json``.
        """
        if not isinstance(config, BertConfig):
            config = BertConfig.from_huggingface(config)
        dtype = next((t.dtype for t in state_dict.values() if t.is_floating_point()), None)
        model = cls(config, dtype=dtype)
        model.load_huggingface_state_dict(state_dict)
        return model.eval()

    def load_huggingface_state_dict(self, state_dict: Mapping[str, Tensor]) -> list[str]:
        """Copy the weights of a Hugging Face ``BertModel`` into this model.

        Args:
            state_dict: by Hugging Face's names, with or without a leading ``bert.``.

        Returns:
            The names in ``state_dict`` of parts that this model does not have: pooler and heads.

        Raises:
            KeyError: a weight is missing.
            ValueError: an unknown name, or a weight of another shape; nothing was copied then.
        """
        prefix = "bert." if any(name.startswith("bert.") for name in state_dict) else ""
        given = {name.removeprefix(prefix): tensor for name, tensor in state_dict.items()}
        ours: dict[str, Tensor] = {}
        used: set[str] = set()
        all_sources = self._sources()
        for name, sources in all_sources.items():
            missing = [source for source in sources if source not in given]
            if missing:
                raise KeyError(f"load_huggingface_state_dict(): missing {', '.join(missing)}")
            parts = [given[source] for source in sources]
            ours[name] = torch.cat(parts) if len(parts) > 1 else parts[0]
            used.update(sources)
        left = [name for name in given if name not in used and name not in _POSITION_BUFFERS]
        unknown = [name for name in left if not name.startswith(_NOT_OURS)]
        wrong = [
            f"{' + '.join(all_sources[name])} of shape {tuple(ours[name].shape)}, expected "
            f"{tuple(tensor.shape)}"
            for name, tensor in self.state_dict().items()
            if tensor.shape != ours[name].shape
        ]
        if unknown or wrong:
            problems = [f"unknown {name}" for name in unknown] + wrong
            raise ValueError(f"load_huggingface_state_dict(): {'; '.join(problems)}")
        self.load_state_dict(ours)
        return left

    def to_huggingface_state_dict(self) -> dict[str, Tensor]:
        """The weights by the names and in the shapes of a Hugging Face ``BertModel``.

        Views of this model's own tensors, without pooler: load them with ``strict=False``, or
        into a ``BertModel`` with ``add_pooling_layer=False``.
        """
        return self.to_huggingface_layout(self.state_dict())

    def to_huggingface_layout(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors by the names of this model's parameters, such as gradients, by Hugging Face's.

        Views of the given tensors.
        """
        sources = self._sources()
        theirs: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            parts = tensor.chunk(len(sources[name]))
            theirs.update(zip(sources[name], parts, strict=True))
        return theirs

    def _sources(self) -> dict[str, list[str]]:
        """For each of our parameters the names of Hugging Face's, concatenated along rows."""
        modules = dict(_EMBEDDING_NAMES)
        sources: dict[str, list[str]] = {}
        for index in range(self.config.num_hidden_layers):
            ours, theirs = f"encoder.layers.{index}", f"encoder.layer.{index}"
            modules |= {f"{ours}.{a}": f"{theirs}.{b}" for a, b in _LAYER_NAMES.items()}
            for kind in ("weight", "bias"):
                sources[f"{ours}.self_attn.in_proj_{kind}"] = [
                    f"{theirs}.{projection}.{kind}" for projection in _PROJECTIONS
                ]
        for ours, theirs in modules.items():
            kinds = ("weight",) if theirs.endswith("_embeddings") else ("weight", "bias")
            sources |= {f"{ours}.{kind}": [f"{theirs}.{kind}"] for kind in kinds}
        return sources
