"""Fine-tune a pretrained model to say which package a docstring is of: ``... finetune``.

All of the model is trained, its head alone, or a learned prefix. Baselines are the same model from
scratch, the most frequent package, and logistic regression on TF-IDF, which reads whole docstrings
where models read as many tokens as they have positions. The text is that of the pretraining run,
which has not seen the docstrings on which accuracies are measured.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusedformer import finetuning
from fusedformer.tools.training import commands
from fusedformer.tools.training import settings as options
from fusedformer.tools.training.text import CLS, SEP, encode

BATCH = 32
# The largest learning rate of each method.
RATES = {"full": 1e-3, "frozen": 5e-3, "prefix": 3e-2, "scratch": 1e-3}
METHODS = {
    "full": "all weights",
    "frozen": "embeddings and layers frozen",
    "prefix": "all frozen but a prefix",
    "scratch": "all weights, not pretrained",
}


@dataclass(frozen=True)
class Labelled:
    """Docstrings as token ids, and the package of each, an index into ``names``."""

    names: list[str]
    texts: list[str]
    ids: list[list[int]]
    labels: list[int]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 0, or 2 for wrong usage."""
    return commands.run(_parser(), _finetune, argv)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fusedformer finetune",
        description="Which top-level package is a docstring of? A pretrained model learns to tell.",
    )
    parser.add_argument("--pretrained", type=Path, default=Path("pretrained"), metavar="DIR",
                        help="what pretrain wrote (default: pretrained)")  # fmt: skip
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS),
                        help="what is trained (default: all)")  # fmt: skip
    parser.add_argument("--classes", type=int, default=20, help="packages (default: 20)")
    parser.add_argument("--epochs", type=int, default=8, help="(default: 8)")
    parser.add_argument("--prefix-length", type=int, default=16,
                        help="learned keys and values of each layer (default: 16)")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn (default: 0)")
    commands.common_options(parser, "finetuned")
    return parser


def _finetune(given: argparse.Namespace) -> int:
    # Imported here because they need the extras.
    from rich.console import Console

    from fusedformer.tools.environment import describe
    from fusedformer.tools.training import results, terminal
    from fusedformer.tools.training.pretrain import CHECKPOINT, load_task
    from fusedformer.tools.training.trainer import OURS, read_checkpoint

    for name, least in (("classes", 2), ("epochs", 1), ("prefix_length", 1)):
        if getattr(given, name) < least:
            raise ValueError(
                f"expected {options.option(name)} to be at least {least}, "
                f"but got {getattr(given, name)}"
            )
    console, device = Console(), commands.device_of(given.device)
    state = read_checkpoint(given.pretrained / CHECKPOINT)
    given.out.mkdir(parents=True, exist_ok=True)  # fails, if at all, before the work
    settings = options.Settings(**state["settings"])
    task, source, _ = load_task(settings, state)
    train, test = labelled(task, given.classes)
    terminal.say(
        console,
        f"{len(train.ids)} docstrings of {given.classes} packages to train on, {len(test.ids)} to "
        f"test: {', '.join(train.names)}",
    )
    counted = {"majority class": majority, "TF-IDF, logistic regression": tfidf}
    rows: list[dict[str, Any]] = [
        {"method": name, **with_error(of(train, test), test)} for name, of in counted.items()
    ]
    for method in given.methods:
        torch.manual_seed(given.seed)
        model = task.encoder_for_classes(
            None if method == "scratch" else state["runs"][OURS]["model"]
        )
        classifier = prepare(method, model, given.classes, given.prefix_length).to(device)
        batches = -(-len(train.ids) // BATCH)
        with terminal.progress(console, method, given.epochs * batches) as advance:
            row = fit(
                classifier, train, test, given.epochs, RATES[method], given.seed, device, advance
            )
        rows.append({"method": method, "trained": METHODS[method], **row})
    found = {
        "schema": 1, **describe(device), "pretrained": {
            "settings": state["settings"], "steps": len(state["tokens"]), "text": source,
        },
        "classes": train.names, "train": len(train.ids), "test": len(test.ids),
        "epochs": given.epochs, "batch": BATCH, "prefix_length": given.prefix_length,
        "seed": given.seed, "rows": rows,
    }  # fmt: skip
    files = [results.write_figures(given.out, found), given.out / "accuracy.svg"]
    draw(found, files[1])
    terminal.print_table(console, f"accuracy on {len(test.ids)} held-out docstrings", HEAD,
                         list(map(cells, rows)))  # fmt: skip
    terminal.say(console, "wrote " + ", ".join(map(str, files)))
    return 0


def labelled(task: Any, classes: int) -> tuple[Labelled, Labelled]:
    """Take the packages with most docstrings; return those to train on, and held-out ones.

    Raises:
        ValueError: fewer packages, or none of their docstrings held out.
    """
    package: Callable[[Any], str] = lambda passage: passage.name.partition(".")[0]
    counts = Counter(map(package, task.corpus.train))
    names = [name for name, _ in counts.most_common(classes)]
    longest = task.settings.length - 2
    found = []
    for part in (task.corpus.train, task.corpus.held_out):
        chosen = [p for p in part if package(p) in names]
        ids = encode(task.tokenizer, [task.text(p) for p in chosen])
        found.append(
            Labelled(
                names, [p.text for p in chosen], [[CLS, *one[:longest], SEP] for one in ids],
                [names.index(package(p)) for p in chosen],
            )
        )  # fmt: skip
    if len(names) < classes or not found[1].ids:
        raise ValueError(
            f"expected docstrings of {classes} packages (--classes), some of them held out, but "
            f"got {len(names)}, and {len(found[1].ids)} held out"
        )
    return found[0], found[1]


def prepare(
    method: str, model: Any, classes: int, prefix_length: int
) -> finetuning.SequenceClassifier:
    """Make a classifier on ``model``, and freeze what the method does not train."""
    if method == "frozen":
        finetuning.freeze(model, layers=len(model.encoder.layers))
    elif method == "prefix":
        finetuning.prefix_tuning(model, prefix_length)
    return finetuning.SequenceClassifier(model, classes, dropout=0.0)


def fit(
    classifier: finetuning.SequenceClassifier,
    train: Labelled,
    test: Labelled,
    epochs: int,
    rate: float,
    seed: int,
    device: torch.device,
    advance: Callable[[str], None],
) -> dict[str, Any]:
    """Train; return accuracy by epoch, times, and how many numbers were trained."""
    from fusedformer.tools.training.trainer import adamw, descend, set_rate

    parameters = [p for p in classifier.parameters() if p.requires_grad]
    optimizer, steps = adamw(parameters, rate), epochs * -(-len(train.ids) // BATCH)
    generator = torch.Generator().manual_seed(seed)
    accuracies: list[float] = []
    losses: list[float] = []
    seconds: list[float] = []
    for _ in range(epochs):
        classifier.train()
        order = torch.randperm(len(train.ids), generator=generator).tolist()
        for first in range(0, len(order), BATCH):
            ids, mask, labels = _batch(train, order[first : first + BATCH], device)
            set_rate(optimizer, rate, len(losses), steps)
            start = time.perf_counter()
            losses.append(descend(optimizer, classifier.loss(labels, ids, attention_mask=mask)))
            seconds.append(time.perf_counter() - start)
            said = f"  accuracy {accuracies[-1]:.3f}" if accuracies else ""
            advance(f"loss {losses[-1]:.3f}{said}")
        accuracies.append(accuracy(classifier, test, device))
    return {
        **with_error(accuracies[-1], test), "accuracies": accuracies, "losses": losses,
        "ms_per_step": 1e3 * statistics.median(seconds),
        "trained_parameters": sum(p.numel() for p in parameters),
    }  # fmt: skip


@torch.no_grad()
def accuracy(
    classifier: finetuning.SequenceClassifier, test: Labelled, device: torch.device
) -> float:
    """Return the share of ``test`` that is classified rightly."""
    classifier.eval()
    right = 0
    for start in range(0, len(test.ids), 8 * BATCH):
        samples = range(start, min(start + 8 * BATCH, len(test.ids)))
        ids, mask, labels = _batch(test, samples, device)
        right += int((classifier(ids, attention_mask=mask).argmax(1) == labels).sum())
    return right / len(test.ids)


def _batch(
    data: Labelled, samples: Sequence[int], device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    from fusedformer.tools.training.tasks import padded

    ids, mask = padded([data.ids[i] for i in samples])
    labels = torch.tensor([data.labels[i] for i in samples])
    return ids.to(device), mask.to(device), labels.to(device)


def majority(train: Labelled, test: Labelled) -> float:
    """Return the accuracy of always naming the most frequent package."""
    most = Counter(train.labels).most_common(1)[0][0]
    return test.labels.count(most) / len(test.labels)


def tfidf(train: Labelled, test: Labelled) -> float:
    """Return the accuracy of logistic regression on TF-IDF of words."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    from fusedformer.tools.training.pairs import words

    vectorizer = TfidfVectorizer(analyzer=words, sublinear_tf=True)
    model = LogisticRegression(C=10.0, max_iter=1000)
    model.fit(vectorizer.fit_transform(train.texts), train.labels)
    return float(model.score(vectorizer.transform(test.texts), test.labels))


def with_error(share: float, test: Labelled) -> dict[str, float]:
    """Return an accuracy and its standard error."""
    return {
        "accuracy": share, "standard_error": math.sqrt(share * (1.0 - share) / len(test.ids))
    }  # fmt: skip


HEAD = ("", "accuracy", "trained parameters", "ms a step")


def cells(row: dict[str, Any]) -> list[str]:
    """Write a row of the table."""
    name = row["method"] + (f": {row['trained']}" if "trained" in row else "")
    shown = [name, f"{row['accuracy']:.3f} ± {row['standard_error']:.3f}"]
    if "ms_per_step" not in row:
        return [*shown, "", ""]
    return [*shown, f"{row['trained_parameters']:,}", f"{row['ms_per_step']:.1f}"]


def draw(found: dict[str, Any], path: Path) -> None:
    """Draw the accuracy of each method by epoch, and the baselines."""
    from fusedformer._internal.figures import drawn

    with drawn(path) as axis:
        for number, row in enumerate(found["rows"]):
            if "accuracies" in row:
                epochs = range(1, len(row["accuracies"]) + 1)
                axis.plot(epochs, row["accuracies"], marker="o", markersize=4, label=row["method"])
            else:
                style = (":", "--")[number % 2]
                axis.axhline(row["accuracy"], linestyle=style, color="#475569", label=row["method"])
        axis.set_ylim(0.0, 1.0)
        axis.set_xlabel("epoch")
        axis.set_ylabel("accuracy on held-out docstrings")
        axis.legend(fontsize=8)
