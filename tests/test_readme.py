"""The README's Python runs as printed."""

import re
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_an_example_runs_as_printed(number: int) -> None:
    line = README[: README.index(BLOCKS[number])].count("\n")
    code = compile("\n" * line + BLOCKS[number], "README.md", "exec")  # so that lines agree
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


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_to_files_lead_somewhere(name: str) -> None:
    for link in re.findall(r"\]\(([^)#:]+)\)", (ROOT / name).read_text()):
        assert (ROOT / link).exists(), link
