"""The corpus: the same each time, and what it promises."""

from __future__ import annotations

from pathlib import Path

import pytest

from fusedformer.tools.report.corpus import stdlib_passages

SOURCE = '''"""A module of some number of words."""

class Shelf:
    """A class that has enough words too."""

    def put(self):
        """Short."""

    async def take(self):
        """Take a thing
        from where it lies."""
'''


def test_docstrings_of_all_kinds_are_found(tmp_path: Path) -> None:
    (tmp_path / "shop.py").write_text(SOURCE)
    (tmp_path / "broken.py").write_text("def (")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "other.py").write_text(SOURCE.replace("A module", "A test"))
    found = {passage.name: passage.text for passage in stdlib_passages(3, tmp_path)}
    assert found == {
        "shop": "A module of some number of words.",
        "shop.Shelf": "A class that has enough words too.",
        "shop.Shelf.take": "Take a thing\nfrom where it lies.",
    }
    with pytest.raises(RuntimeError, match="found 3 docstrings"):
        stdlib_passages(4, tmp_path)


def test_a_text_comes_once(tmp_path: Path) -> None:
    (tmp_path / "one.py").write_text(SOURCE)
    (tmp_path / "two.py").write_text(SOURCE)
    assert len({passage.text for passage in stdlib_passages(3, tmp_path)}) == 3


def test_the_standard_library_gives_the_same_corpus_each_time() -> None:
    first = stdlib_passages(40)
    assert first == stdlib_passages(40)
    lengths = {len(passage.text.split()) for passage in first}
    assert min(lengths) >= 5
    assert len(lengths) > 10  # naturally mixed
