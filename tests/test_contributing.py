"""Every path, make target, command and option that CONTRIBUTING.md names is there."""

import re
from pathlib import Path

import pytest

from fusedformer.__main__ import COMMANDS, main

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
CODE = re.findall(r"^```\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
WORDS = {word for span in (*CODE, *re.findall(r"`([^`\n]+)`", TEXT)) for word in span.split()}
FILES = sorted(w for w in WORDS if re.search(r"\.(py|md|sh|json|toml|txt)$", w))
FOLDERS = sorted(w for w in WORDS if re.fullmatch(r"[\w.]+/[\w./]*", w) and w not in FILES)
CALLED = re.findall(r"python -m fusedformer ([a-z-]+)([^`]*)", TEXT)


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_named_exists(name: str) -> None:
    """By its path, or by its name alone where the text says which folder is meant."""
    pattern = name.replace("<family>", "*")
    anywhere = [] if "/" in name else [f"python/**/{pattern}", f"kernels/**/{pattern}"]
    assert any(any(ROOT.glob(place)) for place in (pattern, *anywhere))


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_or_script_that_is_named_exists(name: str) -> None:
    assert (ROOT / name).exists()


@pytest.mark.parametrize("target", sorted(set(re.findall(r"`make ([a-z-]+)", TEXT))))
def test_a_make_target_that_is_named_exists(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize(("command", "rest"), CALLED)
def test_a_command_that_is_named_has_its_options(
    command: str, rest: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command in COMMANDS
    with pytest.raises(SystemExit):
        main([command, "--help"])
    known = capsys.readouterr().out
    assert all(option in known for option in re.findall(r"--[a-z-]+", rest))


def test_the_text_names_what_is_looked_for() -> None:
    assert len(FILES) > 40
    assert len(FOLDERS) > 20
    assert len(CALLED) >= 3


def test_the_workflow_calls_what_the_text_asks_for() -> None:
    workflow = (ROOT / ".github/workflows/ci.yml").read_text()
    assert "run: .ci/run" in workflow
    uses = re.findall(r"uses: (\S+)", workflow)
    assert uses
    assert all(re.fullmatch(r"actions/[\w-]+@v\d+", name) for name in uses)
