"""Types of the arguments of commands, with errors that say what was wanted."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def pattern(text: str) -> str:
    """Return a regular expression as it is given."""
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(
            f"expected a regular expression, but got {text!r} ({error})"
        ) from None
    return text


def check_any(parser: argparse.ArgumentParser, given: str, names: Iterable[str]) -> None:
    """Exit where no name matches the pattern of ``--case``."""
    known = list(names)
    if not any(re.search(given, name) for name in known):
        parser.error(f"argument --case: {given!r} matches none of {', '.join(known)}")


def positive(text: str) -> int:
    """Return a positive integer."""
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"expected a positive integer, but got {text!r}")
    return int(text)


def json_file(text: str) -> dict[str, Any]:
    """Return what a JSON file holds."""
    try:
        found: dict[str, Any] = json.loads(Path(text).read_text())
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(
            f"expected a JSON file, but got {text!r} ({error})"
        ) from None
    return found
