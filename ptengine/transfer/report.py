"""A report as Markdown, JSON and one HTML page that needs nothing beside it.

What is in it is decided elsewhere: sentences, tables and figures come in, files go out. Knows no prompt and no model.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ptengine.files import json_bytes, make_directory, write_together

__all__ = ["Figure", "Report", "Table", "write_report"]

Cell = str | int | float | None


@dataclass(frozen=True)
class Table:
    """Attributes: `title`, column names, and rows of cells: text as it is, numbers with four decimals, None blank."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]


@dataclass(frozen=True)
class Figure:
    """Attributes: `name` of its file, `caption`, and the picture as SVG text."""

    name: str
    caption: str
    svg: str


@dataclass(frozen=True)
class Report:
    """Attributes:
    title: of the page.
    summary: sentences that say what was found, most important first.
    tables, figures: in order.
    notes: how to read them, and what was dropped.
    data: everything as json values.
    """

    title: str
    summary: Sequence[str]
    tables: Sequence[Table]
    figures: Sequence[Figure] = field(default=())
    notes: Sequence[str] = field(default=())
    data: Mapping[str, Any] = field(default_factory=dict)


def write_report(folder: str | Path, report: Report) -> dict[str, Path]:
    """Write ``report.md``, ``report.json``, ``report.html`` and the figures as SVG files into `folder`.

    All are written before any takes its place; ``report.html`` comes last.

    Returns:
        Path by format: "markdown", "json", "html".

    Raises:
        InputError: the folder cannot be made.
        OSError: as `ptengine.files.write_together`.
    """
    target = make_directory(folder)
    contents = {f"{figure.name}.svg": figure.svg.encode() for figure in report.figures}
    contents["report.md"] = _markdown(report).encode()
    contents["report.json"] = json_bytes(dict(report.data))
    contents["report.html"] = _html(report).encode()
    write_together(target, contents)
    return {"markdown": target / "report.md", "json": target / "report.json", "html": target / "report.html"}


def _markdown(report: Report) -> str:
    parts = [f"# {_inline(report.title)}", "\n".join(f"- {_inline(line)}" for line in report.summary)]
    for table in report.tables:
        head = "| " + " | ".join(_inline(column) for column in table.columns) + " |"
        rule = "|" + "|".join("---:" if index else "---" for index in range(len(table.columns))) + "|"
        body = ["| " + " | ".join(_inline(_cell(cell)) for cell in row) + " |" for row in table.rows]
        parts += [f"## {_inline(table.title)}", "\n".join([head, rule, *body])]
    parts += [f"![{_inline(figure.caption)}]({figure.name}.svg)" for figure in report.figures]
    if report.notes:
        parts += ["## Notes", "\n".join(f"- {_inline(note)}" for note in report.notes)]
    return "\n\n".join(parts) + "\n"


def _inline(text: str) -> str:
    """Text that is shown as it is, and cannot end a list item or a table cell."""
    for letter, shown in (("&", "&amp;"), ("<", "&lt;"), ("\\", "\\\\"), ("|", "\\|")):
        text = text.replace(letter, shown)
    return " ".join(text.split())


_STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;margin:.5rem 0 1.5rem}th,td{padding:.25rem .75rem;border-bottom:1px solid #ddd}
td+td,th+th{text-align:right}figure{margin:1.5rem 0}figcaption{color:#555}svg{max-width:100%;height:auto}"""


def _html(report: Report) -> str:
    body = [f"<h1>{html.escape(report.title)}</h1>", _list(report.summary)]
    for table in report.tables:
        head = "".join(f"<th>{html.escape(column)}</th>" for column in table.columns)
        rows = "".join(
            "<tr>" + "".join(f"<td>{html.escape(_cell(cell))}</td>" for cell in row) + "</tr>" for row in table.rows
        )
        body.append(f"<h2>{html.escape(table.title)}</h2><table><tr>{head}</tr>{rows}</table>")
    for figure in report.figures:
        body.append(f"<figure>{figure.svg}<figcaption>{html.escape(figure.caption)}</figcaption></figure>")
    if report.notes:
        body += ["<h2>Notes</h2>", _list(report.notes)]
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(report.title)}</title>'
        f"<style>{_STYLE}</style></head><body>{''.join(body)}</body></html>\n"
    )


def _list(lines: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in lines) + "</ul>"


def _cell(value: Cell) -> str:
    if value is None:
        return ""
    return f"{value:.4f}" if isinstance(value, float) else str(value)
