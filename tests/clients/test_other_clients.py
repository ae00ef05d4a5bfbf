"""Libraries that stand on sentence-transformers and transformers, with fused models.

None is among the packages that CI installs; each test is skipped where its own is missing.
"""

from __future__ import annotations

import copy
import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fusedformer

TEXTS = [
    "the big red dog runs fast and the small blue cat sat on the mat",
    "cat",
    "the dog sat on a mat in the big red mat",
    "a small dog",
    "the cat sat",
    "red",
]


def library(name: str) -> Any:
    return pytest.importorskip(name, reason=f"{name} is not installed", exc_type=ImportError)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("differentiable", [False, True])
def test_setfit_trains_body_and_head(tmp_path: Path, differentiable: bool) -> None:
    """Three steps of its Trainer, by a logistic regression and by a head of torch; then saved."""
    setfit, datasets = library("setfit"), library("datasets")
    clients = importlib.import_module("tests.clients.small_clients")
    clients.dense_model(tmp_path / "bert").save_pretrained(str(tmp_path / "body"))
    data = datasets.Dataset.from_dict({"text": TEXTS * 2, "label": [0, 1, 0, 1, 1, 0] * 2})
    found = []
    for fused in (False, True):
        torch.manual_seed(0)
        model = setfit.SetFitModel.from_pretrained(
            str(tmp_path / "body"), device="cpu", use_differentiable_head=differentiable,
            head_params={"out_features": 2} if differentiable else {},
        )  # fmt: skip
        before = model.model_body.encode(TEXTS)
        if fused:
            assert "pools packed tokens" in str(fusedformer.fuse(model.model_body))
        arguments = setfit.TrainingArguments(
            output_dir=str(tmp_path / "run"), batch_size=(4, 2), num_epochs=(1, 2), max_steps=3,
            report_to="none", seed=1, end_to_end=differentiable, save_strategy="no",
        )  # fmt: skip
        setfit.Trainer(model=model, args=arguments, train_dataset=data).train()
        assert np.abs(model.model_body.encode(TEXTS) - before).max() > 1e-4
        found.append(torch.as_tensor(model.predict_proba(TEXTS)).detach())
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-5)
    assert found[0].std() > 1e-5
    model.save_pretrained(str(tmp_path / "saved"))
    loaded = setfit.SetFitModel.from_pretrained(str(tmp_path / "saved"), device="cpu")
    assert not fusedformer.fusion.is_fused(loaded.model_body)
    again = torch.as_tensor(loaded.predict_proba(TEXTS)).detach()
    torch.testing.assert_close(again, found[1], rtol=1e-3, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("attend", [False, True])
def test_pylate_encodes_queries_and_documents(tmp_path: Path, attend: bool) -> None:
    """Queries are expanded at padded positions, so that its models are fused and not packed."""
    models = library("pylate.models")
    if int(library("sentence_transformers").__version__.split(".")[0]) > 5:
        pytest.skip("PyLate's ColBERT can't be made with sentence-transformers 6")
    transformers = library("transformers")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(set(" ".join(TEXTS).split()))]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizerFast(
        vocab_file=str(tmp_path / "vocab.txt"), model_max_length=32
    ).save_pretrained(tmp_path)
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=40, vocab_size=len(words),
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.BertModel(config).save_pretrained(tmp_path)
    stock = models.ColBERT(
        str(tmp_path), device="cpu", embedding_size=16, query_length=12,
        attend_to_expansion_tokens=attend,
    )  # fmt: skip
    model = copy.deepcopy(stock)
    report = str(fusedformer.fuse(model))
    assert "four fused steps" in report and "ColBERT reads padded positions" in report
    for is_query in (True, False):
        ours, theirs = (m.encode(TEXTS, is_query=is_query) for m in (model, stock))
        for one, other in zip(ours, theirs, strict=True):
            assert np.ptp(other) > 0.1
            np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backbone", ["deberta", "bert", "modernbert"])
def test_gliner_finds_the_same_spans(tmp_path: Path, backbone: str) -> None:
    gliner = library("gliner")
    clients = importlib.import_module("tests.clients.small_clients")
    config = gliner.GLiNERConfig(
        model_name=clients.saved(tmp_path, backbone), hidden_size=32, max_width=4, max_len=30,
        dropout=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    both = clients.three(gliner.GLiNER.from_config(config).eval())
    assert "packed: real tokens only" in str(fusedformer.fuse(copy.deepcopy(both.stock)))
    settings = dict(labels=["cat", "red dog"], threshold=0.0, flat_ner=False)
    found = [m.inference(TEXTS, **settings) for m in both[:2]]
    spans = [[{k: s[k] for k in ("start", "end", "label")} for t in f for s in t] for f in found]
    assert spans[0] == spans[1] and len(spans[0]) > 50
    scores = [np.array([s["score"] for t in f for s in t]) for f in found]
    assert np.ptp(scores[1]) > 0.003
    np.testing.assert_allclose(scores[0], scores[1], rtol=0, atol=1e-6)
