"""The Python of the README and of the pages in docs/ runs as printed."""

import re
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", *(str(p.relative_to(ROOT)) for p in sorted((ROOT / "docs").glob("*.md")))]
TEXTS = {page: (ROOT / page).read_text() for page in PAGES}
FOUND = {
    page: re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    for page, text in TEXTS.items()
}
README, BLOCKS = TEXTS["README.md"], FOUND["README.md"]
EVERYTHING = "\n".join(TEXTS.values())


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


def test_the_readme_is_short() -> None:
    assert 150 <= README.count("\n") <= 180
    assert len(README.encode()) < 10_000


@pytest.mark.parametrize(
    "command", sorted(set(re.findall(r"python -m fusedformer ([a-z-]+)", EVERYTHING)))
)
def test_a_command_that_is_named_exists(command: str) -> None:
    from fusedformer.__main__ import COMMANDS

    assert command in COMMANDS


@pytest.mark.parametrize(
    "target", sorted(set(re.findall(r"(?:^|`)make (\w+)", EVERYTHING, re.MULTILINE)))
)
def test_a_make_target_that_is_named_exists(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_every_public_name_is_in_the_support_tables() -> None:
    from fusedformer import functional, nn

    tables = TEXTS["docs/kernels.md"] + TEXTS["docs/attention.md"]
    assert not [name for name in (*functional.__all__, *nn.__all__) if f"`{name}`" not in tables]


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2]
    pages = (ROOT / "docs").rglob("*.md")
    assert sorted(re.findall(r"\S+\.md", navigation)) == sorted(
        page.relative_to(ROOT / "docs").as_posix() for page in pages
    )


@pytest.mark.parametrize("file", re.findall(r"benchmarks/results/[\w/.-]+\.json", EVERYTHING))
def test_a_result_file_that_is_named_exists(file: str) -> None:
    assert (ROOT / file).exists()


def test_the_readmes_times_are_those_of_the_results_page() -> None:
    table = README.partition("\n## Results\n")[2].partition("\n## ")[0]
    rows = [line.split(" | ")[1:] for line in table.splitlines() if "x) |" in line]
    assert len(rows) >= 5
    for stock, ours in rows:
        ours = ours.strip(" |")
        assert any(
            f"| {ours}" in line and f"| {stock.partition(' (')[0]}" in line
            and f"({stock.partition(' (')[2]}" in line
            for line in (TEXTS["docs/results.md"] + TEXTS["docs/results-cpu.md"]).splitlines()
        ), (stock, ours)  # fmt: skip


def test_an_error_that_is_explained_exists() -> None:
    files = [file for root in ("python", "kernels") for file in (ROOT / root).rglob("*.py")]
    joined = (re.sub(r'"\s*\n\s*f?"', "", file.read_text()) for file in files)
    source = re.sub(r"\{[^{}]*\}", "", "".join(joined))
    page = TEXTS["docs/troubleshooting.md"].partition("## No error")[0]
    errors = re.findall(r"^\| `(.+?)` \|", page, re.MULTILINE)
    assert len(errors) > 20
    for error in errors:  # names, numbers and what "..." stands for are filled in
        for part in re.split(r"\.\.\.|'[^']*'|\d+|\bcpu$|\)$", error):
            assert part.strip(", ()") in source, error


OTHERS = sorted(str(page.relative_to(ROOT)) for page in (ROOT / "benchmarks").rglob("*.md"))


@pytest.mark.parametrize("name", [*PAGES, "CONTRIBUTING.md", "CHANGELOG.md", *OTHERS])
def test_links_to_files_lead_somewhere(name: str) -> None:
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", (ROOT / name).read_text()):
        assert ((ROOT / name).parent / link).exists(), link
