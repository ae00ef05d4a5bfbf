"""The Python of the README and of the pages in docs/ runs as printed."""

import re
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = ["README.md", *(str(p.relative_to(ROOT)) for p in sorted((ROOT / "docs").glob("*.md")))]
TEXTS = {page: (ROOT / page).read_text() for page in PAGES}
FOUND = {
    page: re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    for page, text in TEXTS.items()
}
BLOCKS = FOUND["README.md"]


@pytest.mark.parametrize(("page", "number"), [(p, n) for p in PAGES for n in range(len(FOUND[p]))])
def test_an_example_runs_as_printed(page: str, number: int) -> None:
    block = FOUND[page][number]
    line = TEXTS[page][: TEXTS[page].index(block)].count("\n")
    code = compile("\n" * line + block, page, "exec")  # so that lines agree
    with warnings.catch_warnings():
        # Stock's own: its nested tensors are a prototype.
        warnings.filterwarnings("ignore", message=".*nested tensor.*")
        exec(code, {"__name__": f"readme_{number}"})


def test_there_is_a_drop_in_example_of_about_ten_lines() -> None:
    assert len(BLOCKS) >= 2
    assert len([line for line in BLOCKS[0].splitlines() if line]) <= 12


@pytest.mark.parametrize("command", re.findall(r"python -m fusedformer ([a-z-]+)", README))
def test_a_command_that_is_named_exists(command: str) -> None:
    from fusedformer.__main__ import COMMANDS

    assert command in COMMANDS


@pytest.mark.parametrize("target", re.findall(r"^make (\w+)", README, re.MULTILINE))
def test_a_make_target_that_is_named_exists(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_every_public_name_is_in_the_support_tables() -> None:
    from fusedformer import functional, nn

    missing = [name for name in (*functional.__all__, *nn.__all__) if f"`{name}`" not in README]
    assert not missing


@pytest.mark.parametrize("name", [*PAGES, "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_to_files_lead_somewhere(name: str) -> None:
    for link in re.findall(r"\]\(([^)#:]+)\)", (ROOT / name).read_text()):
        assert ((ROOT / name).parent / link).exists(), link
