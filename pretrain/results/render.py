"""A :class:`Table` as Markdown, csv, LaTeX or html. All that a run says of itself is escaped, in every
format."""

import csv
import html
import io
import re
from collections.abc import Sequence
from dataclasses import replace

from pretrain.errors import UserError
from pretrain.results.pages import from_template
from pretrain.results.tables import Line, Table

FORMATS = ("md", "csv", "latex", "html")

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
    draw = {
        "md": _markdown,
        "csv": _csv,
        "latex": _latex,
        "html": lambda table: from_template("table.html", table=table),
    }.get(format)
    if draw is None:
        raise UserError(f"format {format!r} is none of {', '.join(FORMATS)}")
    return draw(table)


def render_all(tables: Sequence[Table], format: str) -> str:
    """Several tables, one below the other. As csv, those with other columns than the first one are left
    out."""
    if format == "csv":
        records = [record for table in tables for record in table.records]
        alike = tuple(record for record in records if record.keys() == records[0].keys())
        return render(replace(tables[0], records=alike), format)
    return "\n".join(render(table, format) for table in tables)


def _markdown(table: Table) -> str:
    def row(cells: list[str]) -> str:
        return f"| {' | '.join(cells)} |"

    def cells(line: Line) -> list[str]:
        texts = map(markdown_text, line.cells)
        return [f"**{text}**" if line.is_bold(i) else text for i, text in enumerate(texts)]

    rules = ["---:" if i in table.numeric else "---" for i in range(len(table.columns))]
    lines = [row([markdown_text(name) for name in table.columns]), row(rules)]
    lines += [row(cells(line)) for group in table.groups for line in group]
    notes = [f"- {markdown_text(note)}" for note in table.notes]
    return "\n".join([f"**{markdown_text(table.title)}**", "", *lines, *[""] * bool(notes), *notes]) + "\n"


def markdown_text(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    text = html.escape(" ".join(text.split()), quote=False)
    return re.sub(r"([\\`*_\[\]|~#$])", r"\\\1", text)


def _csv(table: Table) -> str:
    file = io.StringIO()
    if table.records:
        writer = csv.DictWriter(file, fieldnames=list(table.records[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(table.records)
    return file.getvalue()


def _latex(table: Table) -> str:
    def cells(line: Line) -> list[str]:
        texts = map(latex_text, line.cells)
        return [rf"\textbf{{{text}}}" if line.is_bold(i) else text for i, text in enumerate(texts)]

    alignment = "".join("r" if i in table.numeric else "l" for i in range(len(table.columns)))
    lines = [
        "% needs \\usepackage{booktabs}, \\usepackage{graphicx}, \\usepackage{amssymb} and \\usepackage[T1]{fontenc}",
        rf"\begin{{table}}\caption{{{latex_text(table.title)}}}\centering",
        # Shrinks alone
        rf"\resizebox{{\ifdim\width>\linewidth\linewidth\else\width\fi}}{{!}}{{\begin{{tabular}}{{{alignment}}}",
        r"\toprule",
        *_latex_heads(table),
        " & ".join(latex_text(name) for name in table.columns) + r" \\",
    ]
    for group in table.groups:
        lines += [r"\midrule", *(" & ".join(cells(line)) + r" \\" for line in group)]
    lines += [r"\bottomrule", r"\end{tabular}}"]
    lines += [rf"\par\footnotesize {latex_text(note)}" for note in table.notes]
    return "\n".join([*lines, r"\end{table}"]) + "\n"


def _latex_heads(table: Table) -> list[str]:
    """The line above the columns, and a rule under each of its texts."""
    first, rules = 1, ""
    for text, span in table.heads:
        rules += rf"\cmidrule(lr){{{first}-{first + span - 1}}}" if text else ""
        first += span
    cells = [rf"\multicolumn{{{span}}}{{c}}{{{latex_text(text)}}}" for text, span in table.heads]
    return [" & ".join(cells) + r" \\", rules] if cells else []


def latex_text(text: str) -> str:
    """Text that LaTeX sets as it is, on one line."""
    return "".join(_LATEX.get(character, character) for character in " ".join(text.split()))


def _html(table: Table) -> str:
    return from_template("table.html", table=table)
