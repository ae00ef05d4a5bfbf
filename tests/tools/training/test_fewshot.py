"""Prompts with examples, the bound on what they tell, and a decoder that learns to read them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fusedformer.tools.training import fewshot
from fusedformer.tools.training.fewshot import LETTERS, SHOTS, Task


def test_prompts_follow_an_assignment_that_is_drawn() -> None:
    task = Task(seed=0)
    assert len(task.unseen) + len(task.seen) == 24
    generator = torch.Generator().manual_seed(0)
    ids, letters = task.prompts(50, 5, task.unseen, generator)
    assert ids.shape == (50, 12)
    kind = {word: kind for kind, word in task.words}
    drawn = set()
    for row, letter in zip(ids, letters, strict=True):
        tokens = [task.tokens[i] for i in (*row.tolist()[1:], int(letter))]
        words, given = tokens[::2], tokens[1::2]
        assert len(set(words)) == 6
        meant = {kind[word]: one for word, one in zip(words, given, strict=True)}
        assert all(meant[kind[word]] == one for word, one in zip(words, given, strict=True))
        drawn.add(tuple(sorted(meant.items())))
    assert len(drawn) > 4
    for part in (task.unseen, task.seen):  # no letter is likelier for a kind
        for column in part.T:
            assert len(set(column.bincount().tolist())) == 1
    unseen = {tuple(order) for order in task.unseen.tolist()}
    assert not unseen & {tuple(order) for order in task.seen.tolist()}


@pytest.mark.parametrize("shots", SHOTS)
def test_the_best_accuracy_by_drawing(shots: int) -> None:
    task, count = Task(seed=0), 4000
    generator = torch.Generator().manual_seed(shots)
    order = torch.rand(count, len(task.words), generator=generator).argsort(1)[:, : shots + 1]
    kinds = task.kind[order]
    known = (kinds[:, :-1] == kinds[:, -1:]).any(1)
    others = torch.stack([(kinds[:, :-1] == k).any(1) for k in range(4)]).sum(0)
    share = torch.where(known, 1.0, 1.0 / (len(LETTERS) - others).clamp(min=1))
    assert task.best(shots) == pytest.approx(float(share.mean()), abs=0.02)


def test_the_command_trains_and_judges(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fewshot.main([f"--out={tmp_path}", "--steps=12", "--width=32", "--layers=1"]) == 0
    found = json.loads((tmp_path / "metrics.json").read_text())
    assert [row["shots"] for row in found["rows"]] == list(SHOTS)
    assert found["losses"][-1] < found["losses"][0]
    assert "<svg" in (tmp_path / "accuracy.svg").read_text()
    assert "-> " in capsys.readouterr().out
    assert fewshot.main(["--steps=0"]) == 2
    assert "--steps to be positive, but got 0" in capsys.readouterr().err
    assert fewshot.main(["--width=30", f"--out={tmp_path}"]) == 2
    assert "--width to be a multiple of 4, but got 30" in capsys.readouterr().err
