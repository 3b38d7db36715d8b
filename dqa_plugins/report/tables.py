"""Tables as plain text, as rich prints them, and as HTML; methods in few words."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from dqa_plugins.method import Method


@dataclass(frozen=True)
class Table:
    """Rows of text under a title."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[Sequence[str]]

    def __str__(self) -> str:
        lines = [self.columns, *self.rows]
        widths = [max(len(line[k]) for line in lines) for k in range(len(self.columns))]
        text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
        return "\n".join([self.title, *(line.rstrip() for line in text)])

    def __rich__(self) -> Any:
        """The same as a rich Table: `rich.print(table)` calls this."""
        from rich.markup import escape
        from rich.table import Table as RichTable

        table = RichTable(*self.columns, title=self.title, title_justify="left")
        for row in self.rows:
            table.add_row(*map(escape, row))
        return table

    def to_html(self) -> str:
        """A table element, as notebooks show it."""
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in self.columns)
        body = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in self.rows)
        return f"<table><caption>{html.escape(self.title)}</caption><tr>{head}</tr>{body}</table>"


class Tabled:
    """A report that prints as its table: as text, by rich, and in notebooks."""

    def table(self) -> Table:
        """What it prints as."""
        raise NotImplementedError

    def __str__(self) -> str:
        return str(self.table())

    def __rich__(self) -> Any:
        """A rich table: `rich.print(report)` calls this."""
        return self.table().__rich__()

    def _repr_html_(self) -> str:
        return self.table().to_html()


def described(method: Method) -> str:
    """A method with its bits and the fields that are no defaults."""
    given = [(field, getattr(method, field.name)) for field in fields(method)]
    shown = [f"{f.name}={value!r}" for f, value in given if f.name == "bits" or value != f.default]
    return f"{type(method).__name__}({', '.join(shown)})"
