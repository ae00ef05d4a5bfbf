"""What the cases must take at least, and are predicted to take on an H200; nothing runs.

Each module prints a table, or with ``--write`` puts it into ``tables/``, where nothing else stands.
"""

from pathlib import Path

TABLES = Path(__file__).parent / "tables"


def page(title: str, module: str, about: str, table: str) -> str:
    """Write the text of a file: what the table is, which command writes it, and the table."""
    command = f"python benchmarks/model/{module}.py --write"
    return f"# {title}\n\nWritten by `{command}`. {about}\n\n{table}\n"
