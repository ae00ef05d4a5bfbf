"""Write the parts of a page that is a single file."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

_CSS = """
:root { --ink: #0f172a; --soft: #475569; --line: #e2e8f0; --good: #15803d; --bad: #b91c1c; }
* { box-sizing: border-box; }
body { margin: 0; background: #f8fafc; color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 1000px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 26px; margin: 0 0 4px; } h2 { font-size: 19px; margin: 0 0 8px; }
h3 { font-size: 15px; margin: 20px 0 4px; color: var(--soft); }
p { margin: 8px 0; max-width: 78ch; } .soft { color: var(--soft); font-size: 14px; }
section { background: #fff; border: 1px solid var(--line); border-radius: 10px;
  padding: 20px 24px; margin: 16px 0; overflow-x: auto; }
.verdict { color: #fff; border: 0; } .verdict.pass { background: var(--good); }
.verdict.fail { background: var(--bad); } .verdict p { margin: 4px 0 0; max-width: none; }
.verdict h2 { font-size: 22px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(210px, 1fr)); gap: 12px; }
.tile { background: #fff; border: 1px solid var(--line); border-radius: 10px; padding: 14px 18px; }
.tile b { display: block; font-size: 24px; line-height: 1.3; }
table { border-collapse: collapse; width: 100%; font-size: 14px; margin: 8px 0;
  font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 5px 10px; border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 600; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
.pass { color: var(--good); } .fail { color: var(--bad); font-weight: 700; }
.verdict.pass, .verdict.fail { color: #fff; font-weight: inherit; }
img { width: 100%; height: auto; }
"""


def page(title: str, heading: str, subtitle: str, parts: Iterable[str]) -> str:
    """Write the page."""
    body = "\n".join([f"<h1>{escape(heading)}</h1>", f'<p class="soft">{subtitle}</p>', *parts])
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_CSS}</style></head>\n"
        f"<body><main>\n{body}\n</main></body></html>\n"
    )


def verdict(passed: bool, title: str, lines: Iterable[str]) -> str:
    """Write a coloured box."""
    found = "".join(f"<p>{escape(line)}</p>" for line in lines)
    word = "pass" if passed else "fail"
    return f'<section class="verdict {word}"><h2>{escape(title)}</h2>{found}</section>'


def section(title: str, *parts: str) -> str:
    """Write a box with a title."""
    return f"<section><h2>{escape(title)}</h2>\n" + "\n".join(parts) + "\n</section>"


def table(head: Sequence[str], body: Iterable[Sequence[str | bool]]) -> str:
    """Write a table; booleans become "pass" and "fail"."""

    def cell(value: str | bool) -> str:
        if isinstance(value, bool):
            word = "pass" if value else "fail"
            return f'<td class="{word}">{word}</td>'
        return f"<td>{escape(value)}</td>"

    top = "".join(f"<th>{escape(name)}</th>" for name in head)
    lines = "".join("<tr>" + "".join(map(cell, row)) + "</tr>\n" for row in body)
    return f"<table><thead><tr>{top}</tr></thead><tbody>\n{lines}</tbody></table>"


def image(source: str, alt: str) -> str:
    """Write an image; ``source`` is a data URI."""
    return f'<img src="{source}" alt="{escape(alt)}">'
