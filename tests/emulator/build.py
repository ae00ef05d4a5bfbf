"""Builds the emulator's library, once for its sources, with the C++ compiler that Triton uses."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
FOLDER = HERE.parents[1] / "build" / "emulator"
# Products and sums are rounded as PTX says, so nothing may be contracted.
FLAGS = (
    "-std=c++17", "-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fwrapv",
    "-fno-strict-aliasing", "-fvisibility=hidden", "-fPIC", "-shared",
)  # fmt: skip


def compiler() -> str:
    """Find a C++ compiler: $CXX, or that beside $CC, or what is on the path."""
    named = os.environ.get("CXX"), os.environ.get("CC", "").replace("gcc", "g++")
    for name in (*named, "g++", "clang++", "c++"):
        if name and shutil.which(name):
            return name
    raise RuntimeError(
        "the PTX emulator needs a C++ compiler: install g++ or clang++, or name one in $CXX"
    )


def build(sources: list[Path], stem: str, flags: tuple[str, ...] = FLAGS) -> Path:
    """Compile C++ ``sources`` to ``build/emulator/STEM.so``, unless that is there already.

    The file that is loaded has a hash of all that it is made of in its name, so a change makes
    another; ``STEM.so`` is a link to the newest. Several processes may do this at once.
    """
    name = compiler()
    digest = hashlib.sha256(repr((name, flags, os.uname().machine)).encode())
    headers = {header for source in sources for header in source.parent.glob("*.h")}
    for path in sorted({*sources, *headers}):
        digest.update(path.name.encode() + path.read_bytes())
    library = FOLDER / f"{stem}-{digest.hexdigest()[:16]}.so"
    if library.exists():
        return library
    FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
        made = Path(folder) / library.name
        command = [name, *flags, *map(str, sorted(sources)), "-o", str(made)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
        made.replace(library)
        link = Path(folder) / "link"
        link.symlink_to(library.name)
        link.replace(FOLDER / f"{stem}.so")
    return library


def emulator_library() -> Path:
    """Build the emulator's core."""
    return build(list((HERE / "core").glob("*.cpp")), "libemulator")


if __name__ == "__main__":
    print(emulator_library())
