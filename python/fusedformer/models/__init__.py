"""Pretrained model families on the drop-in modules, one small file each."""

from fusedformer.models.bert import BertConfig, BertEncoderModel
from fusedformer.models.pooling import mean_pooling, sentence_embeddings

__all__ = ["BertConfig", "BertEncoderModel", "mean_pooling", "sentence_embeddings"]
