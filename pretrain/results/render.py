"""A :class:`Table` as Markdown, csv, LaTeX or html. All that a run says of itself is escaped in each."""

import html
import re
import unicodedata
from collections.abc import Sequence
from itertools import accumulate

from pretrain.errors import UserError
from pretrain.files import csv_text
from pretrain.results.pages import FILTERS, from_template
from pretrain.results.tables import Table

FORMATS = ("md", "csv", "latex", "html")
# Unicode's characters of the direction of writing
TURNING = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")

_LATEX = {character: "\\" + character for character in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "|": r"\textbar{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    '"': r"\textquotedbl{}",
    "–": "--",
    "±": r"$\pm$",
    "†": r"$^\dagger$",
    "‡": r"$^\ddagger$",
    "→": r"$\rightarrow$",
    "−": "$-$",
    "×": r"$\times$",
    "Δ": r"$\Delta$",
    "✓": r"$\checkmark$",
}


def render(table: Table, format: str) -> str:
    """The table in one of :data:`FORMATS`, with its foot notes (csv has none: its columns say the same).

    The first two cells of a measured row are bold in md, latex and html. Raises UserError for another format.
    """
    if format not in FORMATS:
        raise UserError(f"format {format!r} is none of {', '.join(FORMATS)}")
    if format == "csv":
        return csv_text(table.records)
    ends = list(accumulate(span for _, span in table.heads))
    return from_template(
        f"table.{'tex' if format == 'latex' else format}",
        table=table,
        alignment="".join("r" if i in table.numeric else "l" for i in range(len(table.columns))),
        spans=[(text, end - span + 1, end) for (text, span), end in zip(table.heads, ends)],
    )


def render_all(tables: Sequence[Table], format: str) -> str:
    """Several tables, one below the other. As csv, those with other columns than the first are left out."""
    if format == "csv":
        records = [record for table in tables for record in table.records]
        return csv_text(record for record in records if record.keys() == records[0].keys())
    return "\n".join(render(table, format) for table in tables)


def _plain_line(text: str) -> str:
    """On one line; what a terminal acts on, or what turns the direction of writing, becomes "?"."""

    def is_hidden(c: str) -> bool:
        return unicodedata.category(c) in ("Cc", "Cs") or unicodedata.bidirectional(c) in TURNING

    line = " ".join(text.split())
    return line if line.isprintable() else "".join("?" if is_hidden(c) else c for c in line)


def markdown_text(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    text = html.escape(_plain_line(text), quote=False)
    return re.sub(r"([\\`*_\[\]|~#$])", r"\\\1", text)


def latex_text(text: str) -> str:
    """Text that LaTeX sets as it is, on one line."""
    text = "".join(_LATEX.get(character, character) for character in _plain_line(text))
    # Behind \\ or a rule these would be its options
    return f"{{{text[0]}}}{text[1:]}" if text.startswith(("[", "*")) else text


FILTERS |= {"md": markdown_text, "tex": latex_text}
