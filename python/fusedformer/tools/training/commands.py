"""Share options, the choice of device, and exit statuses between the commands."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

EXTRAS = ("matplotlib", "rich", "safetensors", "sklearn", "tokenizers")


def run(
    parser: argparse.ArgumentParser,
    command: Callable[[argparse.Namespace], int],
    argv: Sequence[str] | None,
    extras: Sequence[str] = EXTRAS,
) -> int:
    """Run ``command``; return its exit status, or 2 after printing what is wrong."""
    given = parser.parse_args(argv)
    if getattr(given, "text", None) is not None:  # a run may be resumed in another folder
        given.text = str(Path(given.text).resolve())
    missing = [name for name in extras if importlib.util.find_spec(name) is None]
    try:
        if missing:
            raise ValueError(
                f"this needs {', '.join(missing)}; install with\n"
                f"    pip install 'fusedformer[report]'"
            )
        return command(given)
    except (OSError, ValueError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted", file=sys.stderr)
        return 130


def common_options(parser: argparse.ArgumentParser, out: str) -> None:
    """Add the options ``--out`` and ``--device``."""
    parser.add_argument("--out", type=Path, default=Path(out), metavar="DIR",
                        help=f"for all that a run writes (default: {out})")  # fmt: skip
    parser.add_argument("--device", help="cuda or cpu (default: cuda where there is one)")


def device_of(name: str | None) -> torch.device:
    """Return the device that is asked for, else a GPU if there is one.

    Raises:
        ValueError: there is none of that name.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f"expected --device to be cuda or cpu, but got {name}: {error}") from None
    return device
