"""Tables of what the training commands and ``host_cost.py`` write; ``table.py`` prints them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

Document = dict[str, Any]
# What is had without a model, beside which a held-out value stands.
_BASELINES = {
    ("mlm+nsp", "loss"): "unigram + coin",
    ("mlm+nsp", "mlm"): "unigram",
    ("mlm+nsp", "nsp"): "coin",
    ("causal", "loss"): "unigram",
    ("contrastive", "loss"): "uniform",
    ("contrastive", "top-1"): "TF-IDF top-1",
    ("contrastive", "top-5"): "TF-IDF top-5",
}


def is_known(document: Document) -> bool:
    """Say whether one of these commands wrote it."""
    return "settings" in document or _by_row(document) is not None


def tables(documents: Sequence[Document]) -> str:
    """Make the tables of documents, those of ``pretrain`` together."""
    parts = []
    pretrained = [document for document in documents if "settings" in document]
    if pretrained:
        parts.append(pretraining(pretrained))
    for document in documents:
        table = _by_row(document)
        if table is not None:
            parts.append(f"{measured_on(document)}.\n\n{table(document)}")
    return "\n\n".join(parts)


def measured_on(document: Document) -> str:
    """Name the machine, the versions, the commit and the day, in one line."""
    versions, changed = document["versions"], " with changes" if document["dirty"] else ""
    threads = document["threads"]
    return (
        f"{document['device_type'].upper()} {document['device']}, {threads} "
        f"thread{'' if threads == 1 else 's'}, torch {versions['torch']}, triton "
        f"{versions['triton']}, commit {document['commit'][:12]}{changed}, {document['date'][:10]}"
    )


def pretraining(documents: Sequence[Document]) -> str:
    """Show held-out values beside their baselines; of runs with ``--stock`` steps and curves."""
    alone = [document for document in documents if not document["settings"]["stock"]]
    beside = [document for document in documents if document["settings"]["stock"]]
    places: dict[str, list[str]] = {}
    for document in documents:
        names = places.setdefault(measured_on(document), [])
        if _objective(document) not in names:
            names.append(_objective(document))
    parts = ["\n\n".join(f"{', '.join(names)}: {place}." for place, names in places.items())]
    if alone:
        rows = [
            [_objective(d), f"{d['steps']:,}", measure, f"{value:.2f}", *_baseline(d, measure)]
            for d in alone
            for measure, value in d["evaluations"][-1].items()
            if measure != "step"
        ]
        head = ["objective", "steps", "held out", "value", "without a model"]
        parts.append(_table(head, rows, left=3))
    if beside:
        head = ["objective", "steps", "a step", "stock's", "loss curves apart", "limit"]
        parts.append(_table(head, [_beside_stock(document) for document in beside]))
    return "\n\n".join(parts)


def _objective(document: Document) -> str:
    return str(document["settings"]["objective"])


def _baseline(document: Document, measure: str) -> list[str]:
    name = _BASELINES.get((_objective(document), measure))
    return ["" if name is None else f"{document['baselines'][name]:.2f} ({name})"]


def _beside_stock(document: Document) -> list[str]:
    ours, stock = (document["ms_per_step"][name]["median"] for name in ("fusedformer", "stock"))
    parity = document["parity"]
    return [
        _objective(document),
        f"{document['steps']:,}",
        f"{ours:.0f} ms",
        f"{stock:.0f} ms ({stock / ours:.2f}x)",
        f"{max(parity['loss_gaps']['candidate']):.1e}",
        f"{parity['limits']['losses']:.1e}",
    ]


def finetuning(document: Document) -> str:
    """Show the accuracy of each way to fine-tune, and what it trains."""
    rows = [
        [
            row["method"] + (f": {row['trained']}" if "trained" in row else ""),
            f"{row['accuracy']:.3f} ± {row['standard_error']:.3f}",
            f"{row['trained_parameters']:,}" if "trained" in row else "",
            f"{row['ms_per_step']:.0f} ms" if "trained" in row else "",
        ]
        for row in document["rows"]
    ]
    head = ["", "accuracy", "trained parameters", f"a step of {document['batch']}"]
    return _table(head, rows)


def fewshot(document: Document) -> str:
    """Show accuracy by the number of examples in the prompt."""
    rows = document["rows"]
    names = {
        "accuracy": "accuracy",
        "best possible": "best",
        "with letters of the examples at random": "random",
    }
    head = ["examples", *(str(row["shots"]) for row in rows)]
    return _table(head, [[name, *(f"{r[key]:.3f}" for r in rows)] for name, key in names.items()])


def host_cost(document: Document) -> str:
    """Show microseconds of the host's thread by op and direction."""
    rows = document["rows"]
    keys = ["case", "direction", "fusedformer_us", "registered_us", "torch_us"]
    head = ["µs of the host's thread", "", "fusedformer", "by the registered ops", "torch, on CPU"]
    body = [[str(row[key]) for key in keys] for row in rows]
    if "before" in document:
        head += [f"at {document['before']['commit'][:12]}", "ratio"]
        for cells, row in zip(body, rows, strict=True):
            ratio = row["fusedformer_us"] / row["before_us"]
            cells += [str(row["before_us"]), f"{ratio:.2f}x"]
    return _table(head, body, left=2)


_BY_ROW: dict[str, Callable[[Document], str]] = {
    "method": finetuning,
    "shots": fewshot,
    "registered_us": host_cost,
}


def _by_row(document: Document) -> Callable[[Document], str] | None:
    """Find the table for what the rows of a document hold."""
    first: Document = next(iter(document.get("rows", [])), {})
    return next((table for key, table in _BY_ROW.items() if key in first), None)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Write Markdown, with the columns after the first ``left`` flush right."""
    rule = ["---"] * left + ["---:"] * (len(head) - left)
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *rows))
