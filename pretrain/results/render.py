"""A :class:`Table` as Markdown, csv, LaTeX or html. All that a run says of itself is escaped, in every
format."""

import csv
import html
import io
import re
from collections.abc import Sequence
from dataclasses import replace

from pretrain.errors import UserError
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
    draw = {"md": _markdown, "csv": _csv, "latex": _latex, "html": _html}.get(format)
    if draw is None:
        raise UserError(f"format {format!r} is none of {', '.join(FORMATS)}")
    return draw(table)


def render_all(tables: Sequence[Table], format: str) -> str:
    """Several tables, one below the other. As csv, those with other columns than the first one are left
    out."""
    if format == "csv":
        records = [record for table in tables for record in table.records]
        return render(
            replace(tables[0], records=tuple(r for r in records if r.keys() == records[0].keys())), format
        )
    return "\n".join(render(table, format) for table in tables)


def _bold(line: Line, i: int) -> bool:
    return line.source == "measured" and i < 2 and bool(line.cells[i])


def _markdown(table: Table) -> str:
    def row(cells: list[str]) -> str:
        return f"| {' | '.join(cells)} |"

    def cells(line: Line) -> list[str]:
        return [
            f"**{markdown_text(t)}**" if _bold(line, i) else markdown_text(t)
            for i, t in enumerate(line.cells)
        ]

    rules = ["---:" if i in table.numeric else "---" for i in range(len(table.columns))]
    lines = [row([markdown_text(name) for name in table.columns]), row(rules)]
    lines += [row(cells(line)) for group in table.groups for line in group]
    notes = [f"- {markdown_text(note)}" for note in table.notes]
    return (
        "\n".join([f"**{markdown_text(table.title)}**", "", *lines, *([""] if notes else []), *notes]) + "\n"
    )


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
        return [
            rf"\textbf{{{latex_text(t)}}}" if _bold(line, i) else latex_text(t)
            for i, t in enumerate(line.cells)
        ]

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
    lines += [
        r"\bottomrule",
        r"\end{tabular}}",
        *(rf"\par\footnotesize {latex_text(note)}" for note in table.notes),
    ]
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
    def cell(tag: str, i: int, text: str, bold: bool = False) -> str:
        kind = "number" if i in table.numeric else "long" if len(text) > 24 else ""
        kind += " measured" * (i in table.measured)
        words = f"<b>{html.escape(text)}</b>" if bold else html.escape(text)
        return f'<{tag} class="{kind}">{words}</{tag}>' if kind else f"<{tag}>{words}</{tag}>"

    above = "".join(
        f'<th class="over" colspan="{span}">{html.escape(text)}</th>' for text, span in table.heads
    )
    heads = "".join(cell("th", i, name) for i, name in enumerate(table.columns))
    lines = [
        '<div class="table-scroll"><table class="results">',
        f"<caption>{html.escape(table.title)}</caption>",
        f"<thead>{f'<tr>{above}</tr>' * bool(above)}<tr>{heads}</tr></thead>",
    ]
    for group in table.groups:
        lines.append("<tbody>")
        for line in group:
            cells = "".join(cell("td", i, text, _bold(line, i)) for i, text in enumerate(line.cells))
            lines.append(f'<tr class="{line.source}{" scaled" * line.scaled}">{cells}</tr>')
        lines.append("</tbody>")
    lines.append("</table></div>")
    if table.notes:
        lines.append(
            f'<ul class="notes">{"".join(f"<li>{html.escape(note)}</li>" for note in table.notes)}</ul>'
        )
    return "\n".join(lines) + "\n"
