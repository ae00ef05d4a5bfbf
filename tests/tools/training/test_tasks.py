"""Batches are what their objectives say; models of torch's modules compute the same."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tools.training.conftest import SMALL

from fusedformer import nn
from fusedformer.tools.training import pretrain
from fusedformer.tools.training.pairs import tfidf_retrieval, words
from fusedformer.tools.training.settings import Settings
from fusedformer.tools.training.tasks import TASKS, Causal, Contrastive, MaskedAndNext, padded
from fusedformer.tools.training.text import CLS, MASK, PAD, SEP, SPECIAL_TOKENS
from fusedformer.tools.training.trainer import OURS, STOCK, Trainer

Make = Callable[..., Trainer]


def generator(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


SAMPLES = list(range(200))


class Masked:
    """A batch for BERT, of many lengths, and what it was before tokens were masked."""

    def __init__(self, task: MaskedAndNext) -> None:
        self.task, self.batch = task, task.batch(SAMPLES, generator())
        self.ids, self.labels = self.batch["input_ids"], self.batch["labels"]
        self.chosen = self.labels != -100
        self.original = torch.where(self.chosen, self.labels, self.ids)
        self.real = self.batch["attention_mask"] != 0
        self.changed = self.batch["next_sentence_label"]


@pytest.fixture(scope="module")
def masked(text: Path) -> Masked:
    given: dict[str, Any] = {**SMALL, "text": str(text), "length": 128}
    task = pretrain.load_task(Settings(**given))[0]
    assert isinstance(task, MaskedAndNext)
    return Masked(task)


def test_padding_stands_where_the_mask_says(masked: Masked) -> None:
    assert masked.ids.shape[1] <= masked.task.settings.length
    assert bool((masked.original[~masked.real] == PAD).all())
    assert bool((masked.original[masked.real] != PAD).all())


def test_bert_gets_halves_that_belong_together_or_not(masked: Masked) -> None:
    assert 60 < int(masked.changed.sum()) < 140
    for i in SAMPLES:
        row = masked.original[i][masked.real[i]].tolist()
        assert row[0] == CLS
        assert row[-1] == SEP
        assert row.count(SEP) == 2
        middle = row.index(SEP) + 1
        assert masked.batch["token_type_ids"][i].tolist() == [
            int(middle <= place < len(row)) for place in range(masked.ids.shape[1])
        ]
        whole = row[1 : middle - 1] + row[middle:-1]
        assert (whole == masked.task.windows[i]) == (not masked.changed[i])


def test_lengths_do_not_tell_which_halves_belong_together(masked: Masked) -> None:
    every = masked.task.batch(range(len(masked.task.windows)), generator())
    second = every["token_type_ids"].sum(1)
    apart = 2 * second - every["attention_mask"].sum(1)
    for feature in (apart, apart.abs(), second):
        for bound in range(int(feature.min()), int(feature.max()) + 1):
            right = float(((feature > bound) == every["next_sentence_label"]).double().mean())
            assert 0.4 < right < 0.6


def test_fifteen_of_a_hundred_words_are_to_be_guessed_and_no_special_token(masked: Masked) -> None:
    special = masked.original < len(SPECIAL_TOKENS)
    assert 0.12 < float(masked.chosen[~special].double().mean()) < 0.18
    assert not bool((masked.chosen & special).any())
    assert 0.7 < float((masked.ids[masked.chosen] == MASK).double().mean()) < 0.9


def test_a_batch_is_drawn_by_its_generator(masked: Masked) -> None:
    again, other = (masked.task.batch(SAMPLES, generator(seed)) for seed in (1, 2))
    assert all(torch.equal(masked.batch[name], again[name]) for name in masked.batch)
    assert not torch.equal(other["labels"], masked.labels)


def test_every_window_comes_once_an_epoch_in_another_order(trainer: Make) -> None:
    for objective in ("mlm+nsp", "causal"):
        task = trainer(objective=objective).task
        assert isinstance(task, MaskedAndNext | Causal)
        first, second = task.batches(0), task.batches(1)
        every = list(range(len(task.windows)))
        assert sorted(chain(*first)) == sorted(chain(*second)) == every
        assert first != second and first == task.batches(0)
        longest = max(sum(len(task.windows[i]) + task.special for i in b) for b in first)
        assert longest <= task.settings.batch_tokens


def test_a_call_and_its_docstring_make_a_pair(trainer: Make) -> None:
    task = trainer(objective="contrastive").task
    assert isinstance(task, Contrastive)
    batch = task.batch([3, 1], generator())
    ids, lengths = batch["input_ids"], batch["attention_mask"].sum(1)
    rows = [row[:n].tolist() for row, n in zip(ids, lengths, strict=True)]
    texts = [task.tokenizer.decode(row[1:-1]) for row in rows]
    passages = [task.pairs[i] for i in (3, 1)]
    wanted = [" " + " ".join(words(p.signature)) for p in passages]
    wanted += [p.text.lower() for p in passages]
    for text, whole in zip(texts, wanted, strict=True):  # a part of it, in order
        left = iter(whole)
        assert all(letter in left for letter in text)
    assert sum(map(len, texts)) > 0.5 * sum(len(whole) for whole in wanted)
    assert texts != wanted
    assert all(row[0] == CLS and row[-1] == SEP for row in rows)
    order = [*chain(*task.batches(0))]
    assert len(set(order)) == len(order) and len(order) > len(task.pairs) - task.settings.pairs


@pytest.mark.parametrize("objective", TASKS)
def test_stock_trains_alike_and_a_model_that_is_another_does_not(
    trainer: Make, objective: str
) -> None:
    made = trainer(objective=objective, stock=True)
    assert made.runs[OURS].model.state_dict().keys() == made.runs[STOCK].model.state_dict().keys()
    for _ in range(5):
        made.step()
    report = made.report()
    assert report is not None and report.passed, str(report)
    assert made.runs[OURS].losses[-1] < made.runs[OURS].losses[0]
    other = trainer(objective=objective, stock=True)
    norm = next(m for m in other.model.modules() if isinstance(m, nn.LayerNorm))
    norm.eps = 1e-3
    for _ in range(5):
        other.step()
    report = other.report()
    assert report is not None and not report.passed


@pytest.mark.parametrize("objective", TASKS)
def test_what_is_held_out_is_judged_alike_each_time_and_changes_nothing(
    trainer: Make, objective: str
) -> None:
    made = trainer(objective=objective, dropout=0.1)
    before = torch.get_rng_state()
    assert made.evaluate() == made.evaluate()
    assert torch.equal(before, torch.get_rng_state())
    assert made.model.training
    found = made.evaluations[0]
    chance = made.task.baselines()[made.task.chance]
    if objective == "contrastive":
        assert 0.0 <= found["top-1"] <= found["top-5"] <= 1.0
    else:  # a new model knows less than the counts
        assert chance < found["loss"] < 1.5 * chance
    if objective == "mlm+nsp":
        assert found["loss"] == pytest.approx(found["mlm"] + found["nsp"])


def test_the_causal_loss_is_the_mean_over_held_out_tokens(trainer: Make) -> None:
    made = trainer(objective="causal", layers=1)
    task, model = made.task, made.model
    assert isinstance(task, Causal)
    total, count = 0.0, 0
    for window in task.held_out:
        ids = torch.tensor([[CLS, *window, SEP]])
        logits = model.logits(model(ids))[0, :-1].detach()
        total += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
        count += ids.shape[1] - 1
    assert made.evaluate()["loss"] == pytest.approx(total / count, rel=1e-5)


def test_text_without_functions_has_no_pairs(trainer: Make) -> None:
    with pytest.raises(ValueError, match=r"9999 \(--pairs\) to train on and as many held out"):
        trainer(objective="contrastive", pairs=9999)


def test_the_contrastive_hits_by_a_plain_loop(trainer: Make) -> None:
    made = trainer(objective="contrastive")
    task = made.task
    assert isinstance(task, Contrastive)
    found = made.evaluate()
    places = []
    features = [
        made.model.eval().features(**_padded(pair)).detach().double() for pair in task._ids[1]
    ]
    second = torch.stack([pair[1] for pair in features])
    for i, pair in enumerate(features):
        scores = second @ pair[0]
        places.append(int((scores > scores[i]).sum()))
    for n in (1, 5):
        assert found[f"top-{n}"] == sum(place < n for place in places) / len(places)


def _padded(pair: tuple[list[int], list[int]]) -> dict[str, torch.Tensor]:
    ids, mask = padded(pair)
    return {"input_ids": ids, "attention_mask": mask}


def test_tfidf_finds_what_shares_rare_words() -> None:
    pairs = [
        ("getLineNumber(self)", "The line number."), ("close_file(self)", "Shut the file."),
        ("walk(top)", "Nothing in common with the call."),
    ]  # fmt: skip
    found = tfidf_retrieval(pairs)
    assert found["top-1"] == pytest.approx(2 / 3) and found["top-5"] == 1.0
