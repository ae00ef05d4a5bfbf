"""Vectors of the lines of a file: ``python -m fusedformer embed``.

    embed --model DIR --texts FILE --out FILE.npy [--dtype bfloat16] [--normalize] [--stock]

The file is UTF-8 with a text on each line; an empty line is an empty text. What is written is a
float32 array ``[lines, width]``, as ``numpy.load`` reads it.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fusedformer.embedding import embed


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit status: 2 for arguments that cannot be computed with."""
    parser = argparse.ArgumentParser(
        prog="fusedformer embed", description="Vectors of the lines of a file."
    )
    parser.add_argument("--model", required=True, help="a folder that sentence-transformers loads")
    parser.add_argument("--texts", required=True, type=Path, help="a text on each line, UTF-8")
    parser.add_argument("--out", required=True, type=Path, help="the .npy file to write")
    parser.add_argument("--dtype", help="in which the model computes, as bfloat16; the model's own")
    parser.add_argument("--prompt-name", help="which of the model's prompts to put before texts")
    parser.add_argument("--task", help="query or document, for models with a Router")
    parser.add_argument("--normalize", action="store_true", help="scale vectors to length 1")
    parser.add_argument("--batch-tokens", type=int, default=4096, help="tokens in a batch: 4096")
    parser.add_argument("--stock", action="store_true", help="by encode of the model as it is")
    given = parser.parse_args(argv)
    if given.out.suffix != ".npy":
        parser.error(f"expected --out to end in .npy, but got {given.out}")
    try:
        texts = _lines(given.texts)
        given.out.parent.mkdir(parents=True, exist_ok=True)  # before the hours that follow
        started = time.perf_counter()
        found = _by_stock(given, texts) if given.stock else _by_embed(given, texts)
    except (OSError, ValueError, TypeError, ImportError) as error:
        print(f"embed: {error}", file=sys.stderr)
        return 2
    import numpy

    vectors = found.astype("float32")
    numpy.save(given.out, vectors)
    seconds = time.perf_counter() - started
    print(f"{given.out}: float32 {list(vectors.shape)}, {seconds:.1f} s with the model's loading")
    return 0


def _lines(file: Path) -> list[str]:
    try:
        text = file.read_text(encoding="utf-8-sig")  # what some editors put first is no text
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ValueError(f"expected {file} to be UTF-8, but line {line} is not") from error
    return text.removesuffix("\n").split("\n") if text else []


def _by_embed(given: argparse.Namespace, texts: list[str]) -> Any:
    return embed(
        given.model, texts, batch_tokens=given.batch_tokens, prompt_name=given.prompt_name,
        normalize_embeddings=given.normalize, dtype=given.dtype, task=given.task,
    )  # fmt: skip


def _by_stock(given: argparse.Namespace, texts: list[str]) -> Any:
    from fusedformer.embedding import loaded

    model = loaded(given.model, given.dtype, None)
    if not texts:
        return embed(model, texts)  # encode returns an array without width
    task = {} if given.task is None else {"task": given.task}
    return model.encode(
        texts, prompt_name=given.prompt_name, normalize_embeddings=given.normalize,
        show_progress_bar=sys.stderr.isatty(), **task,
    )  # fmt: skip
