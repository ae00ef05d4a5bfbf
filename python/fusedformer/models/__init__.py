"""Pretrained model families on the drop-in modules, one small file each."""

from fusedformer.models.bert import BertConfig, BertEncoderModel
from fusedformer.models.clip import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig
from fusedformer.models.generation import KeyValueCache, generate, next_token
from fusedformer.models.gpt import GPTConfig, GPTDecoderModel
from fusedformer.models.pooling import mean_pooling, sentence_embeddings

__all__ = [
    "BertConfig",
    "BertEncoderModel",
    "CLIPConfig",
    "CLIPModel",
    "CLIPTextConfig",
    "CLIPVisionConfig",
    "GPTConfig",
    "GPTDecoderModel",
    "KeyValueCache",
    "generate",
    "mean_pooling",
    "next_token",
    "sentence_embeddings",
]
