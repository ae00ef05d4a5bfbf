"""Run the benchmark suites of the checkout: ``python -m fusedformer bench``.

They are not installed with the package: their code is in ``benchmarks/`` of the source.

    bench [--suite NAME ...] [--quick] [--out FILE]   check and time the library beside its peers
    bench report FILE...                              one page of result files, with pictures
    bench compare OLD NEW                             what became faster or slower beyond the spread
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

SCRIPTS = {"report": "reporting/page.py", "compare": "reporting/compare.py"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its script's exit status, or 2 outside a checkout."""
    words = list(sys.argv[1:] if argv is None else argv)
    folder = Path(__file__).resolve().parents[3] / "benchmarks"
    if not (folder / "run.py").exists():
        print(
            "bench: the benchmark suites are in a checkout of the source, not in the installed "
            "package; there: python -m fusedformer bench",
            file=sys.stderr,
        )
        return 2
    script = "run.py"
    if words and words[0] in SCRIPTS:
        script = SCRIPTS[words.pop(0)]
    before = sys.argv
    sys.argv = [str(folder / script), *words]
    try:
        runpy.run_path(str(folder / script), run_name="__main__")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        sys.argv = before
    return 0
