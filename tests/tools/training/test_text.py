"""Passages, what is held out, the tokenizer, and the loss of counting."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from fusedformer.tools.training.text import (
    SPECIAL_TOKENS,
    encode,
    read_corpus,
    train_tokenizer,
    unigram_loss,
)


def test_docstrings_and_paragraphs_are_read_and_a_tenth_is_held_out(
    text: Path, tmp_path: Path
) -> None:
    paragraphs = [f"Paragraph number {i} of\na short book." for i in range(400)]
    (tmp_path / "book.txt").write_text("\n\n".join([*paragraphs, "Too short."]))
    (tmp_path / "code.py").write_text('def f(a, *, b=1):\n    """Do what f does here."""\n')
    corpus = read_corpus(tmp_path)
    assert len(corpus.train) + len(corpus.held_out) == 401
    assert 0.05 < len(corpus.held_out) / 401 < 0.16
    assert not {p.text for p in corpus.train} & {p.text for p in corpus.held_out}
    [function] = [p for p in corpus.train + corpus.held_out if p.signature]
    assert (function.name, function.signature) == ("code.f", "f(a, *, b=1)")
    assert "Paragraph number 7 of a short book." in {p.text for p in corpus.train + corpus.held_out}


def test_what_is_held_out_does_not_depend_on_the_rest(text: Path, tmp_path: Path) -> None:
    whole = read_corpus(text)
    for name in ("logging", "email"):
        (tmp_path / name).symlink_to(text / name)
    part = read_corpus(tmp_path / "email")
    held_out = {p.text for p in whole.held_out}
    assert part.held_out and {p.text for p in part.held_out} <= held_out
    assert not {p.text for p in part.train} & held_out


def test_the_digest_tells_texts_apart(tmp_path: Path) -> None:
    lines = [f"Line number {i} of this text." for i in range(30)]
    digests = set()
    for changed in (lines, lines[:-1], [*lines[:-1], "Line number 29 of that text."]):
        (tmp_path / "a.md").write_text("\n\n".join(changed))
        digests.add(read_corpus(tmp_path).digest)
    assert len(digests) == 3


def test_too_little_text_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Only one paragraph is in here.")
    with pytest.raises(ValueError, match=r"at least 20 docstrings or paragraphs.*found 1"):
        read_corpus(tmp_path)
    with pytest.raises(ValueError, match=r"expected a folder of text, but got .*nowhere"):
        read_corpus(tmp_path / "nowhere")


def test_odd_files_are_left_out(tmp_path: Path) -> None:
    lines = "\n\n".join(f"Line number {i} of this text." for i in range(60))
    (tmp_path / "a.txt").write_text(lines)
    (tmp_path / "folder.py").mkdir()
    (tmp_path / ".#lock.py").symlink_to(tmp_path / "nowhere")
    (tmp_path / "deep.py").write_text("x = " + "+".join(["1"] * 30_000))
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "b.txt").write_text(lines.replace("this", "that"))
    (tmp_path / "half.py").write_text('"""Half of a pair: \\ud800 and more."""')
    corpus = read_corpus(tmp_path)
    assert len(corpus.train) + len(corpus.held_out) == 61
    assert len(corpus.digest) == 64


def test_the_tokenizer_writes_any_text_back() -> None:
    tokenizer = train_tokenizer(["the cat sat on the mat"] * 3, 300)
    text = "The naïve mat — 数, [MASK] and all"
    [ids] = encode(tokenizer, [text])
    assert tokenizer.decode(ids) == text
    assert min(ids) >= len(SPECIAL_TOKENS)  # what is written like one is not one
    [pieces] = encode(tokenizer, ["the mat"])
    assert len(pieces) < len("the mat")
    with pytest.raises(ValueError, match="vocabulary of at least 260, but got 100"):
        train_tokenizer([text], 100)


def test_the_unigram_loss() -> None:
    # Of 2 + 1 + 3 counts with one more each: token 0 has 3 of 6, token 1 has 2, token 2 one.
    expected = -(math.log(3 / 6) + 2 * math.log(1 / 6)) / 3
    assert unigram_loss([[0, 0, 1]], [[0], [2, 2]], 3) == pytest.approx(expected)
