"""Pipelines of transformers with fused models, in padded batches."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.clients.small_clients import TEXTS, T, assert_same, saved, three

import fusedformer

SHORT = [text for text in TEXTS[:-1] if text]
AUTO = {
    "feature-extraction": ("bert", T.AutoModel),
    "text-classification": ("classifier", T.AutoModelForSequenceClassification),
    "token-classification": ("tokens", T.AutoModelForTokenClassification),
    "fill-mask": ("masked", T.AutoModelForMaskedLM),
}


def outputs(folder: str, task: str, model: Any, texts: list[str]) -> list[Any]:
    tokenizer = T.AutoTokenizer.from_pretrained(folder)
    run = T.pipeline(task, model=model, tokenizer=tokenizer, device="cpu", batch_size=3)
    return list(run(texts))


@pytest.mark.parametrize("task", AUTO)
def test_a_pipeline_returns_what_stocks_does(tmp_path: Path, task: str) -> None:
    backbone, auto = AUTO[task]
    folder = saved(tmp_path, backbone)
    both = three(auto.from_pretrained(folder).eval())
    assert "packed: real tokens only" in str(fusedformer.fuse(copy.deepcopy(both.stock)))
    texts = [f"{text} [MASK]" for text in SHORT] if task == "fill-mask" else SHORT
    sizes = [len(ids) for ids in T.AutoTokenizer.from_pretrained(folder)(texts)["input_ids"]]
    found = [outputs(folder, task, m, texts) for m in both]
    for size, *three_outputs in zip(sizes, *found, strict=True):
        ours, stock, truth = (_numbers(one, size) for one in three_outputs)
        assert_same(task, ours.float(), stock.float(), truth)
        assert _labels(three_outputs[0]) == _labels(three_outputs[2])


def test_zero_shot_classification(tmp_path: Path) -> None:
    """Pairs of text and label; where an answer is wanted of each label by itself too."""
    folder = saved(tmp_path, "bert")
    labels = {"contradiction": 0, "neutral": 1, "entailment": 2}
    names = {index: name for name, index in labels.items()}
    auto = T.AutoModelForSequenceClassification
    model = auto.from_pretrained(folder, num_labels=3, label2id=labels, id2label=names).eval()
    torch.nn.init.normal_(model.classifier.weight)
    both = three(model)
    tokenizer = T.AutoTokenizer.from_pretrained(folder)
    task = "zero-shot-classification"
    asked = [T.pipeline(task, model=m, tokenizer=tokenizer, device="cpu") for m in both]
    for multi_label in (False, True):
        settings = dict(candidate_labels=["cat", "big dog"], multi_label=multi_label, batch_size=3)
        found = [run(SHORT, **settings) for run in asked]
        scores = [
            torch.tensor([[one["scores"][one["labels"].index(n)] for n in ("cat", "big dog")]
                          for one in each], dtype=torch.float64) for each in found
        ]  # fmt: skip
        assert scores[2].std() > 1e-3
        assert_same(task, scores[0].float(), scores[1].float(), scores[2])


def _numbers(output: Any, size: int) -> torch.Tensor:
    """Return scores, or the features of real tokens; this pipeline returns padding's too."""
    listed = [output] if isinstance(output, dict) else output
    if isinstance(listed[0], dict):
        return torch.tensor([one["score"] for one in listed], dtype=torch.float64)
    return torch.tensor(listed[0][:size], dtype=torch.float64)


def _labels(output: Any) -> Any:
    if isinstance(output, dict):
        return output["label"]
    keys = "label", "entity", "token", "index"
    return [[one.get(k) for k in keys] for one in output if isinstance(one, dict)]
