"""What could be imported or called once can be still: names, modules and commands.

``public_names.json`` is the list. A new name is added to it; one that leaves it breaks somebody.
"""

import importlib
import json
from pathlib import Path

import pytest

from fusedformer.__main__ import COMMANDS, main

HELD = json.loads(Path(__file__).with_name("public_names.json").read_text())


@pytest.mark.parametrize("module", HELD["names"])
def test_every_held_name_can_be_imported(module: str) -> None:
    found = importlib.import_module(module)
    assert not [name for name in HELD["names"][module] if not hasattr(found, name)]


@pytest.mark.parametrize("module", HELD["names"])
def test_a_name_that_is_public_is_held(module: str) -> None:
    public = getattr(importlib.import_module(module), "__all__", [])
    assert not set(public) - set(HELD["names"][module]), "add them to tests/public_names.json"


@pytest.mark.parametrize("module", HELD["modules"])
def test_every_held_module_can_be_imported(module: str) -> None:
    assert importlib.import_module(module).__doc__


def test_the_commands_are_those_that_are_held() -> None:
    assert sorted(COMMANDS) == HELD["commands"]


@pytest.mark.parametrize("command", HELD["commands"])
def test_every_held_command_says_how_it_is_used(
    command: str, capfd: pytest.CaptureFixture[str]
) -> None:
    try:
        status = main([command, "--help"])
    except SystemExit as stopped:  # argparse's, where the command runs in this process
        status = int(stopped.code or 0)
    assert status == 0
    assert "usage:" in capfd.readouterr().out
