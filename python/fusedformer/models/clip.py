"""CLIP: a text tower and an image tower, compared by a contrastive loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusedformer import functional
from fusedformer.models.huggingface import (
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

_LAYER_NAMES = {
    "norm1": "layer_norm1",
    "self_attn.out_proj": "self_attn.out_proj",
    "norm2": "layer_norm2",
    "linear1": "mlp.fc1",
    "linear2": "mlp.fc2",
}


@dataclass(frozen=True)
class CLIPTextConfig(ModelConfig):
    """Sizes and settings of the text tower, by Hugging Face's names; defaults of ViT-B/32.

    As in transformers, an ``eos_token_id`` of 2 stands for the largest id of a text: OpenAI's first
    configurations say 2, which is not the tokenizer's.

    Raises:
        ValueError: a size that is not positive, heads that do not divide the width, a dropout
            outside [0, 1], an unknown activation.
    """

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    attention_dropout: float = 0.0
    eos_token_id: int = 49407


@dataclass(frozen=True)
class CLIPVisionConfig(ModelConfig):
    """Sizes and settings of the image tower, likewise; the patch size divides the image size."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    attention_dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image_size % self.patch_size:
            raise ValueError(
                f"CLIPVisionConfig(): expected 'patch_size' to divide image_size="
                f"{self.image_size}, but got {self.patch_size}"
            )


@dataclass(frozen=True)
class CLIPConfig:
    """Both towers, the width in which they are compared, and where the temperature starts."""

    text_config: CLIPTextConfig = field(default_factory=CLIPTextConfig)
    vision_config: CLIPVisionConfig = field(default_factory=CLIPVisionConfig)
    projection_dim: int = 512
    logit_scale_init_value: float = 2.6592

    @classmethod
    def from_huggingface(cls, config: Mapping[str, Any]) -> CLIPConfig:
        """Make one from the content of a ``config.json``, or a configuration's ``to_dict()``."""
        rest = {n: config[n] for n in ("projection_dim", "logit_scale_init_value") if n in config}
        return cls(
            CLIPTextConfig.from_huggingface(config.get("text_config") or {}),
            CLIPVisionConfig.from_huggingface(config.get("vision_config") or {}),
            **rest,
        )


class CLIPTextEmbeddings(nn.Module):
    """``token + position``."""

    def __init__(self, config: CLIPTextConfig, to: dict[str, Any]) -> None:
        super().__init__()
        self.token = nn.Embedding(config.vocab_size, config.hidden_size, **to)
        self.position = nn.Embedding(config.max_position_embeddings, config.hidden_size, **to)

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, prompt: Tensor | None = None
    ) -> Tensor:
        """Embed integers ``[*]`` as ``[*, d]``; ids past the table are the prompt's."""
        words = embedded(self.token, input_ids, prompt)
        return words + cast(Tensor, self.position(position_ids))


class CLIPImageEmbeddings(nn.Module):
    """``norm([class, patches] + position)``: each patch of an image is a token."""

    def __init__(self, config: CLIPVisionConfig, to: dict[str, Any]) -> None:
        super().__init__()
        width, size = config.hidden_size, config.patch_size
        self.cls = nn.Parameter(torch.empty(width, **to))
        self.patch = nn.Conv2d(config.num_channels, width, size, size, bias=False, **to)
        positions = (config.image_size // size) ** 2 + 1
        self.position = nn.Embedding(positions, width, **to)
        self.norm = LayerNorm(width, config.layer_norm_eps, **to)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Embed images ``[B, channels, size, size]`` as ``[B, 1 + patches, d]``."""
        patches = self.patch(pixel_values).flatten(2).transpose(1, 2)
        first = self.cls.expand(patches.shape[0], 1, -1)
        output: Tensor = self.norm(torch.cat((first, patches), 1) + self.position.weight)
        return output


class CLIPTextTower(TextModel):
    """Token ids to the hidden state of the token that ends each text; causal.

    Tokens behind that one change nothing, so they are not computed: texts are packed up to it,
    and the last layer computes it alone.
    """

    _is_causal = True

    def __init__(self, config: CLIPTextConfig, to: dict[str, Any]) -> None:
        super().__init__()
        self.config = config
        self.embeddings = CLIPTextEmbeddings(config, to)
        self.encoder = _encoder(config, to)
        self.encoder.norm = LayerNorm(config.hidden_size, config.layer_norm_eps, **to)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """Compute ``[B, d]`` of integers ``[B, L]``; mask and positions as for BERT."""
        longest = None if position_ids is not None else self.config.max_position_embeddings
        self._check(input_ids, longest, attention_mask=attention_mask)
        last = self._ends(input_ids)[:, None]
        keep = torch.arange(input_ids.shape[1], device=input_ids.device) <= last
        if attention_mask is not None:
            keep &= attention_mask != 0
        return self._encode(input_ids, keep, position_ids, last).padded()[:, 0]

    pooled = forward

    def _ends(self, input_ids: Tensor) -> Tensor:
        """Return the column of the first token that ends a text; 0 if there is none."""
        # Old configurations have 2 there, which is wrong: the end then is the text's largest id.
        eos = self.config.eos_token_id
        ends = input_ids if eos == 2 else (input_ids == eos).int()
        return ends.argmax(1)


class CLIPImageTower(nn.Module):
    """Images to the normed hidden state of the class token."""

    def __init__(self, config: CLIPVisionConfig, to: dict[str, Any]) -> None:
        super().__init__()
        self.config = config
        self.embeddings = CLIPImageEmbeddings(config, to)
        self.encoder = _encoder(config, to)
        self.norm = LayerNorm(config.hidden_size, config.layer_norm_eps, **to)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Compute ``[B, d]`` of images ``[B, channels, size, size]``."""
        config = self.config
        wanted = (config.num_channels, config.image_size, config.image_size)
        if tuple(pixel_values.shape[1:]) != wanted:
            raise ValueError(
                f"CLIPImageTower(): expected 'pixel_values' of shape [B, {wanted[0]}, {wanted[1]}, "
                f"{wanted[2]}], but got {tuple(pixel_values.shape)}"
            )
        first = torch.zeros(len(pixel_values), 1, dtype=torch.int64, device=pixel_values.device)
        hidden = self.encoder(self.embeddings(pixel_values), output_rows=first)[:, 0]
        return cast(Tensor, self.norm(hidden))

    pooled = forward


class CLIPModel(HuggingFaceWeights):
    """Texts and images as vectors of one space.

    ``text`` is a :class:`CLIPTextTower`, ``image`` a :class:`CLIPImageTower`.

    Args:
        config: sizes and settings.
        device, dtype: of the parameters.

    Source: Radford et al., Learning Transferable Visual Models From Natural Language Supervision,
    arXiv:2103.00020.
    """

    _config = CLIPConfig
    _ignored_buffers = r"(text|vision)_model\.embeddings\.position_ids"

    def __init__(
        self, config: CLIPConfig, device: Any = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        to: dict[str, Any] = {"device": device, "dtype": dtype}
        self.config = config
        text, image, width = config.text_config, config.vision_config, config.projection_dim
        self.text = CLIPTextTower(text, to)
        self.image = CLIPImageTower(image, to)
        self.text_projection = nn.Linear(text.hidden_size, width, bias=False, **to)
        self.image_projection = nn.Linear(image.hidden_size, width, bias=False, **to)
        self.logit_scale = nn.Parameter(torch.empty((), **to))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all weights anew, by width and depth; biases 0."""
        for tower in (self.text, self.image):
            width, layers = tower.config.hidden_size, tower.config.num_hidden_layers
            small = width**-0.5 * (2 * layers) ** -0.5
            deviations = {
                "in_proj_weight": small, "out_proj.weight": width**-0.5,
                "linear1.weight": (2 * width) ** -0.5, "linear2.weight": small,
                "embeddings.cls": width**-0.5,
            }  # fmt: skip
            draw_parameters(tower, 0.02, deviations)
        for projection in (self.text_projection, self.image_projection):
            nn.init.normal_(projection.weight, std=projection.in_features**-0.5)
        self.logit_scale.fill_(self.config.logit_scale_init_value)

    def text_features(self, input_ids: Tensor, **inputs: Any) -> Tensor:
        """Compute ``[B, projection_dim]`` of length 1; token ids are as for the text tower."""
        return F.normalize(self.text_projection(self.text(input_ids, **inputs)), dim=-1)

    def image_features(self, pixel_values: Tensor) -> Tensor:
        """Compute ``[B, projection_dim]`` of length 1; images are as for the image tower."""
        return F.normalize(self.image_projection(self.image(pixel_values)), dim=-1)

    def forward(
        self, input_ids: Tensor, pixel_values: Tensor, attention_mask: Tensor | None = None
    ) -> Tensor:
        """Compute logits ``[texts, images]``: cosines times ``exp(logit_scale)``.

        Args:
            input_ids: integer ``[texts, L]``, each with an ``eos_token_id``.
            pixel_values: ``[images, channels, size, size]``.
            attention_mask: ``[texts, L]``, nonzero = real token; None if all are.

        Raises:
            TypeError, ValueError: ids that are not integers, wrong shapes, too long texts.
        """
        texts = self.text_features(input_ids, attention_mask=attention_mask)
        return self.logit_scale.exp() * texts @ self.image_features(pixel_values).t()

    def loss(
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        attention_mask: Tensor | None = None,
        **settings: Any,
    ) -> Tensor:
        """Compute the contrastive loss of pairs (text i, image i). No matrix of pairs is kept.

        Args:
            input_ids, pixel_values, attention_mask: as for :meth:`forward`, one text for each of
                images.
            settings: ``group`` and others of :func:`fusedformer.functional.contrastive_loss`.
        """
        texts = self.text_features(input_ids, attention_mask=attention_mask)
        images = self.image_features(pixel_values)
        return functional.contrastive_loss(texts, images, self.logit_scale.exp(), **settings)

    def _sources(self) -> dict[str, Source]:
        names = {
            "logit_scale": "logit_scale",
            "text_projection.weight": "text_projection.weight",
            "image_projection.weight": "visual_projection.weight",
            "text.embeddings.token.weight": "text_model.embeddings.token_embedding.weight",
            "text.embeddings.position.weight": "text_model.embeddings.position_embedding.weight",
            "image.embeddings.cls": "vision_model.embeddings.class_embedding",
            "image.embeddings.patch.weight": "vision_model.embeddings.patch_embedding.weight",
            "image.embeddings.position.weight": "vision_model.embeddings.position_embedding.weight",
        }
        sources = {ours: Source((theirs,)) for ours, theirs in names.items()}
        sources |= weight_and_bias("text.encoder.norm", "text_model.final_layer_norm")
        sources |= weight_and_bias("image.embeddings.norm", "vision_model.pre_layrnorm")
        sources |= weight_and_bias("image.norm", "vision_model.post_layernorm")
        text, image = self.config.text_config, self.config.vision_config
        towers = (
            ("text", "text_model", text.num_hidden_layers),
            ("image", "vision_model", image.num_hidden_layers),
        )
        for own, their, layers in towers:
            for index in range(layers):
                ours, theirs = f"{own}.encoder.layers.{index}", f"{their}.encoder.layers.{index}"
                for kind in ("weight", "bias"):
                    sources[f"{ours}.self_attn.in_proj_{kind}"] = Source(
                        tuple(f"{theirs}.self_attn.{one}_proj.{kind}" for one in "qkv")
                    )
                for one, other in _LAYER_NAMES.items():
                    sources |= weight_and_bias(f"{ours}.{one}", f"{theirs}.{other}")
        return sources


def _encoder(config: CLIPTextConfig | CLIPVisionConfig, to: dict[str, Any]) -> TransformerEncoder:
    layer = TransformerEncoderLayer(
        config.hidden_size, config.num_attention_heads, config.intermediate_size, 0.0,
        activation_of(config.hidden_act), config.layer_norm_eps, batch_first=True, norm_first=True,
        **to,
    )  # fmt: skip
    layer.self_attn.dropout = config.attention_dropout
    return TransformerEncoder(layer, config.num_hidden_layers)
