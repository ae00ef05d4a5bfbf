"""The peers of the suite ``serving`` give what it compares, without a deprecated argument."""

from __future__ import annotations

import importlib
import logging
import warnings
from pathlib import Path

import pytest
import torch

from fusedformer.testing import compare_tensors
from harness.serving_peers import sentence_transformer


def test_sentence_transformers_gives_float32_of_a_bfloat16_model(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("sentence_transformers", reason="sentence-transformers is missing")
    clients = importlib.import_module("tests.clients.small_clients")
    dense = clients.dense_model(tmp_path, "bert", "mean", clients.M.Normalize())
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")
        encode = sentence_transformer(tmp_path, torch.bfloat16, batch=4)
    assert "argument was renamed" not in caplog.text
    texts = clients.TEXTS[:6]  # as many positions as the model has
    found = encode(texts)
    assert found.dtype == torch.float32
    truth = dense.bfloat16().double().encode(texts, convert_to_tensor=True)
    stock = dense.bfloat16().encode(texts, convert_to_tensor=True).float()
    compared = compare_tensors("peer", found, stock, truth)
    assert compared.passed, compared.fault
