"""Read passages of English, hold some out, and train a tokenizer on the others."""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusedformer.tools.report.corpus import Passage, all_docstrings, files_under

PAD, CLS, MASK, SEP = range(4)
SPECIAL_TOKENS = ("[PAD]", "[CLS]", "[MASK]", "[SEP]")
_PROSE = (".md", ".rst", ".txt")
_SHORTEST_WORDS = 5
_FEWEST = 20  # passages
LEAST_VOCABULARY = 256 + len(SPECIAL_TOKENS)


@dataclass(frozen=True)
class Corpus:
    """Passages to train on, and held-out ones: about a tenth, the same in any corpus."""

    source: str
    train: list[Passage]
    held_out: list[Passage]

    @property
    def digest(self) -> str:
        """A hash of all text, by which a checkpoint knows its corpus."""
        found = hashlib.sha256()
        for passage in (*self.train, *self.held_out):
            found.update(f"{passage.name}\0{passage.signature}\0{passage.text}\0".encode())
        return found.hexdigest()


def read_corpus(root: Path | None = None) -> Corpus:
    """Read docstrings of the ``.py`` files of ``root``, and paragraphs of its text files.

    Args:
        root: folder, searched at all depths (folders of tests are left out); the docstrings of
            Python's standard library if None.

    Raises:
        ValueError: ``root`` is no folder, or has fewer than 20 passages of at least five words.
    """
    if root is not None and not root.is_dir():
        raise ValueError(f"expected a folder of text, but got {root}")
    passages = [*all_docstrings(root), *(() if root is None else _paragraphs(root))]
    source = "docstrings of Python's standard library" if root is None else str(root)
    if len(passages) < _FEWEST:
        raise ValueError(
            f"expected at least {_FEWEST} docstrings or paragraphs of {_SHORTEST_WORDS} words or "
            f"more in .py, {', '.join(_PROSE)} files under {source}, but found {len(passages)} "
            f"(a paragraph ends at an empty line)"
        )
    passages = [Passage(p.name, " ".join(p.text.split()), p.signature) for p in passages]
    held = [hashlib.sha256(passage.text.encode()).digest()[0] < 26 for passage in passages]
    if all(held) or not any(held):
        raise ValueError(
            f"expected more text, by --text: of {len(held)} passages {sum(held)} are held out"
        )
    return Corpus(
        source,
        [p for p, is_held in zip(passages, held, strict=True) if not is_held],
        [p for p, is_held in zip(passages, held, strict=True) if is_held],
    )


def _paragraphs(root: Path) -> list[Passage]:
    """Return each paragraph of at least five words once."""
    unique: dict[str, Passage] = {}
    files = {p: parts for end in _PROSE for parts, p in files_under(root, end).items()}
    for path, parts in sorted(files.items()):
        for text in re.split(r"\n\s*\n", path.read_text("utf-8", errors="replace")):
            if len(text.split()) >= _SHORTEST_WORDS:
                unique.setdefault(text, Passage(".".join(parts), text))
    return list(unique.values())


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Any:
    """Train a ``tokenizers.Tokenizer``: byte-level byte-pair encoding, which is lossless.

    Ids 0 to 3 are ``[PAD]``, ``[CLS]``, ``[MASK]`` and ``[SEP]``.

    Args:
        texts: to count pairs in.
        vocab_size: number of tokens, bytes and special ones included: at least 260. Little text
            gives fewer.

    Raises:
        ValueError: ``vocab_size`` below 260.

    Source: Sennrich et al., arXiv:1508.07909; bytes: Radford et al., GPT-2, 2019.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab_size < LEAST_VOCABULARY:
        raise ValueError(
            f"expected a vocabulary of at least {LEAST_VOCABULARY}, but got {vocab_size}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Return the ids of each text, without special tokens."""
    tokenizer.encode_special_tokens = True  # "[MASK]" within a text is no special token
    return [one.ids for one in tokenizer.encode_batch(list(texts), add_special_tokens=False)]


def unigram_loss(
    train: Iterable[Sequence[int]], held_out: Iterable[Sequence[int]], vocab_size: int
) -> float:
    """Compute the cross entropy in nats of held-out tokens by their counts in ``train`` plus 1."""
    counts = Counter(token for tokens in train for token in tokens)
    total = sum(counts.values()) + vocab_size
    wanted = Counter(token for tokens in held_out for token in tokens)
    nats = sum(n * -math.log((counts[token] + 1) / total) for token, n in wanted.items())
    return nats / max(1, sum(wanted.values()))
