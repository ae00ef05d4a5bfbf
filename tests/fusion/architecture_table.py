"""The table of all architectures, by ``make architectures``, or some: ``-m ... bert gpt2``.

It writes ``docs/architectures.md`` for people and ``architectures.json`` beside this file for
``test_architectures.py``: what builds, how, and the level at which it is fused. Of some types it
writes only the second.
"""

from __future__ import annotations

import collections
import concurrent.futures
import json
import multiprocessing
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from tests.fusion.architectures import BUILDABLE, KNOWN, SECONDS, deadline, examine, quiet
from tests.fusion.fused_beside_stock import told
from tests.fusion.small_models import VARIANTS, runnable, types

TABLE = Path(__file__).parents[2] / "docs" / "architectures.md"
LEVELS = {
    "A": "every layer of its encoders by fused steps; packed, or a tower with nothing to pack",
    "B": "packed in part: some layers by attention and norms, or padded",
    "C": "attention and norms, padded; of some the layers too",
    "D": "attention; its norms are its own",
    "E": "norms alone",
    "-": "nothing",
}


def found_of(model_type: str) -> tuple[str, Any]:
    """(why it isn't built, or "", and recipe and what was found)."""
    quiet()
    torch.set_num_threads(1)
    reason = ""
    with deadline(SECONDS):
        try:
            for recipe in ([v, k] for v in range(len(VARIANTS)) for k in (0, 1, 2)):
                try:
                    runnable(model_type, recipe)
                except TimeoutError:
                    raise
                except Exception as error:
                    reason = reason or told(error)
                    continue
                return "", (recipe, examine(model_type, recipe))
        except TimeoutError:
            reason = f"takes more than {SECONDS} seconds"
    return reason, None


def main(names: list[str]) -> None:
    """Examine the types named, or all; write the list of what builds, and with all the table."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(2, mp_context=context) as pool:
        results = {}
        wanted = names or types()
        for name, result in zip(wanted, pool.map(found_of, wanted), strict=True):
            results[name] = result
            reason, found = result
            print(name, reason or f"{found[1].level} {found[0]} {found[1].faults or 'same'} "
                  f"{found[1].notes}", flush=True)  # fmt: skip
    built = {n: found for n, (reason, found) in sorted(results.items()) if not reason}
    _list(built, {} if not names else json.loads(BUILDABLE.read_text()))
    if not names:
        _written(results, built)


def _list(built: dict[str, Any], before: dict[str, Any]) -> None:
    """Write down the levels of what was built, and of what was before."""
    found = {n: {"level": one.level, "recipe": recipe} for n, (recipe, one) in built.items()}
    rows = [f' "{n}": {json.dumps(one)}' for n, one in sorted({**before, **found}.items())]
    BUILDABLE.write_text("{\n" + ",\n".join(rows) + "\n}\n")


def _written(results: dict[str, Any], built: dict[str, Any]) -> None:
    counts = collections.Counter(found.level for _, found in built.values())
    rows = [f"| {level} | {what} | {counts[level]} |" for level, what in LEVELS.items()]
    each = [
        f"| {n} | {found.level} | {_cell(found.below)} "
        f"| {KNOWN.get(n) or '; '.join(found.faults) or 'as stock'} |"
        for n, (_, found) in built.items()
    ]
    left = [f"| {n} | {_cell(reason)} |" for n, (reason, _) in sorted(results.items()) if reason]
    TABLE.write_text(_PAGE.format(
        version=transformers.__version__, levels="\n".join(rows), built=len(built),
        all=len(results), each="\n".join(each), left="\n".join(left),
    ))  # fmt: skip


def _cell(text: str) -> str:
    return text.partition(" from '/")[0].replace("|", "\\|").replace("<", "&lt;")


_PAGE = """# Architectures of transformers, fused

Written by `make architectures` with transformers {version}. Each model is small and random, its
weights spread so that attention is not even; float32 on a CPU. Fused stands beside stock: outputs
and the gradients of all parameters by the error against float64, padded on the right, on the left,
in the middle and not at all; weights of attention; a hook inside a layer; pickled into another
process; unfused to the bit. `tests/fusion/test_architectures.py` holds a ninth of them in CI.
Beside a level below A stands the first place that keeps a model from it.

| level | what is fused | model types |
| --- | --- | ---: |
{levels}

{built} of {all} model types can be built this way:

| model type | level | why not A | beside stock |
| --- | --- | --- | --- |
{each}

The others take inputs or settings that no rule here makes up, or packages that the tests do
without. What stopped the first try:

| model type | why not |
| --- | --- |
{left}
"""


if __name__ == "__main__":
    main(sys.argv[1:])
