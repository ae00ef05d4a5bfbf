"""What the pages show from outside docs/: the pictures beside the result files."""

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

_RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"


def on_files(files: Any, config: Any) -> Any:
    """Add the pictures to the site, under ``results/``."""
    for picture in sorted(_RESULTS.glob("*/*.svg")):
        uri = f"results/{picture.relative_to(_RESULTS).as_posix()}"
        files.append(File.generated(config, uri, abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Point links to the pictures there; in the repository they lead to the files."""
    return markdown.replace("](../benchmarks/results/", "](results/")
