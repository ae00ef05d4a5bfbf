"""The table of fine-tuning: what is trained, on what, and what it is compared with."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tools.training.conftest import PACKAGES, words

from fusedformer.tools.training import finetune, pretrain
from fusedformer.tools.training.finetune import Labelled
from fusedformer.tools.training.settings import Settings
from fusedformer.tools.training.text import CLS, SEP
from fusedformer.tools.training.trainer import OURS, read_checkpoint


@pytest.fixture(scope="module", params=["mlm+nsp", "causal", "contrastive"])
def pretrained(request: Any, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from fusedformer import backend

    folder = tmp_path_factory.mktemp("pretrained")
    with backend("torch"):
        given = words(steps=3, objective=request.param)
        assert pretrain.main([f"--out={folder}", f"--text={text}", *given]) == 0
    return folder


def test_the_table(pretrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [f"--pretrained={pretrained}", f"--out={tmp_path}", "--classes=3", "--epochs=2"]
    assert finetune.main([*arguments, "--prefix-length=4"]) == 0
    said = capsys.readouterr().out
    found = json.loads((tmp_path / "metrics.json").read_text())
    assert sorted(found["classes"]) == sorted(PACKAGES)
    rows = {row["method"]: row for row in found["rows"]}
    assert [*rows] == ["majority class", "TF-IDF, logistic regression", *finetune.METHODS]
    assert all(0.0 <= row["accuracy"] <= 1.0 for row in rows.values())
    assert rows["TF-IDF, logistic regression"]["accuracy"] > rows["majority class"]["accuracy"]
    width, layers, classes = 32, 2, 3
    counts = {name: row.get("trained_parameters", 0) for name, row in rows.items()}
    assert counts["prefix"] == 2 * layers * 4 * width + classes * (width + 1)
    assert classes * (width + 1) <= counts["frozen"] < 3000 < counts["full"] == counts["scratch"]
    for name in finetune.METHODS:
        assert rows[name]["losses"][-1] < rows[name]["losses"][0]
        assert name in said
    assert "<svg" in (tmp_path / "accuracy.svg").read_text()


def test_the_test_is_on_what_pretraining_has_not_seen(pretrained: Path) -> None:
    state = read_checkpoint(pretrained / pretrain.CHECKPOINT)
    task, _, _ = pretrain.load_task(Settings(**state["settings"]), state)
    train, test = finetune.labelled(task, 2)
    seen = {passage.text for passage in task.corpus.train}
    assert test.texts and not seen & set(test.texts)
    assert set(train.texts) <= seen
    counts = Counter(p.name.partition(".")[0] for p in task.corpus.train)
    assert train.names == [name for name, _ in counts.most_common(2)]
    for data, part in ((train, task.corpus.train), (test, task.corpus.held_out)):
        whose = {passage.text: passage.name.partition(".")[0] for passage in part}
        assert [whose[text] for text in data.texts] == [data.names[i] for i in data.labels]
        assert all(ids[0] == CLS and ids[-1] == SEP for ids in data.ids)
    most = Counter(train.labels).most_common(1)[0][0]
    share = sum(label == most for label in test.labels) / len(test.labels)
    assert finetune.majority(train, test) == share


def test_pretrained_weights_are_used_and_frozen_ones_stay(pretrained: Path) -> None:
    state = read_checkpoint(pretrained / pretrain.CHECKPOINT)
    task, _, _ = pretrain.load_task(Settings(**state["settings"]), state)
    weights = state["runs"][OURS]["model"]
    train, test = finetune.labelled(task, 2)
    for method in ("full", "frozen", "prefix"):
        model = task.encoder_for_classes(weights)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        for name, tensor in before.items():
            whole = name if name in weights else f"tower.{name}"
            assert torch.equal(tensor, weights[whole])
        classifier = finetune.prepare(method, model, 2, 4)
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        few = Labelled(train.names, train.texts[:40], train.ids[:40], train.labels[:40])
        finetune.fit(classifier, few, test, 1, 1e-2, 0, torch.device("cpu"), lambda said: None)
        for name, tensor in model.state_dict().items():
            if name in before:
                assert torch.equal(tensor, before[name]) == (name not in trained), name
    other = task.encoder_for_classes(None).state_dict()
    assert any(not torch.equal(other[name], before[name]) for name in other)


def test_wrong_usage_says_what_to_do(
    pretrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*arguments: object) -> str:
        assert finetune.main([f"--out={tmp_path}", *map(str, arguments)]) == 2
        return capsys.readouterr().err

    assert "there is no" in refused("--pretrained=nowhere")
    given = f"--pretrained={pretrained}"
    assert "docstrings of 9 packages (--classes)" in refused(given, "--classes=9")
    assert "--classes to be at least 2, but got 1" in refused(given, "--classes=1")
    assert "--epochs to be at least 1, but got 0" in refused(given, "--epochs=0")
    assert "--prefix-length to be at least 1" in refused(given, "--prefix-length=0")
