"""A :class:`Table` as Markdown, csv, LaTeX or html. All that a run says of itself is escaped, in every format."""

import csv
import html
import io
import re

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
}


def render(table: Table, format: str) -> str:
    """The table in one of :data:`FORMATS`, with its foot notes (csv has none: its columns say the same).

    The first two cells of a measured row are bold in md, latex and html. Raises UserError for another format.
    """
    draw = {"md": _markdown, "csv": _csv, "latex": _latex, "html": _html}.get(format)
    if draw is None:
        raise UserError(f"format {format!r} is none of {', '.join(FORMATS)}")
    return draw(table)


def _bold(line: Line, i: int) -> bool:
    return line.source == "measured" and i < 2 and bool(line.cells[i])


def _markdown(table: Table) -> str:
    def row(cells: list[str]) -> str:
        return f"| {' | '.join(cells)} |"

    def cells(line: Line) -> list[str]:
        return [f"**{markdown_text(t)}**" if _bold(line, i) else markdown_text(t) for i, t in enumerate(line.cells)]

    rules = ["---:" if i in table.numeric else "---" for i in range(len(table.columns))]
    lines = [row([markdown_text(name) for name in table.columns]), row(rules)]
    lines += [row(cells(line)) for group in table.groups for line in group]
    notes = [f"- {markdown_text(note)}" for note in table.notes]
    return "\n".join([f"**{markdown_text(table.title)}**", "", *lines, *([""] if notes else []), *notes]) + "\n"


def markdown_text(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    text = html.escape(" ".join(text.split()), quote=False)
    return re.sub(r"([\\`*_\[\]|~#])", r"\\\1", text)


def _csv(table: Table) -> str:
    file = io.StringIO()
    if table.records:
        writer = csv.DictWriter(file, fieldnames=list(table.records[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(table.records)
    return file.getvalue()


def _latex(table: Table) -> str:
    def cells(line: Line) -> list[str]:
        return [rf"\textbf{{{latex_text(t)}}}" if _bold(line, i) else latex_text(t) for i, t in enumerate(line.cells)]

    alignment = "".join("r" if i in table.numeric else "l" for i in range(len(table.columns)))
    lines = [
        "% needs \\usepackage{booktabs}, \\usepackage{graphicx} and \\usepackage[T1]{fontenc}",
        rf"\begin{{table}}\caption{{{latex_text(table.title)}}}\centering",
        rf"\resizebox{{\linewidth}}{{!}}{{\begin{{tabular}}{{{alignment}}}",
        r"\toprule",
        " & ".join(latex_text(name) for name in table.columns) + r" \\",
    ]
    for group in table.groups:
        lines += [r"\midrule", *(" & ".join(cells(line)) + r" \\" for line in group)]
    lines += [r"\bottomrule", r"\end{tabular}}", *(rf"\par\footnotesize {latex_text(note)}" for note in table.notes)]
    return "\n".join([*lines, r"\end{table}"]) + "\n"


def latex_text(text: str) -> str:
    """Text that LaTeX sets as it is, on one line."""
    return "".join(_LATEX.get(character, character) for character in " ".join(text.split()))


def _html(table: Table) -> str:
    def cell(tag: str, i: int, text: str, bold: bool = False) -> str:
        kind = "number" if i in table.numeric else "long" if len(text) > 24 else ""
        words = f"<b>{html.escape(text)}</b>" if bold else html.escape(text)
        return f'<{tag} class="{kind}">{words}</{tag}>' if kind else f"<{tag}>{words}</{tag}>"

    heads = "".join(cell("th", i, name) for i, name in enumerate(table.columns))
    lines = [
        '<div class="table-scroll"><table class="results">',
        f"<caption>{html.escape(table.title)}</caption>",
        f"<thead><tr>{heads}</tr></thead>",
    ]
    for group in table.groups:
        lines.append("<tbody>")
        for line in group:
            cells = "".join(cell("td", i, text, _bold(line, i)) for i, text in enumerate(line.cells))
            lines.append(f'<tr class="{line.source}{" scaled" * line.scaled}">{cells}</tr>')
        lines.append("</tbody>")
    lines.append("</table></div>")
    if table.notes:
        lines.append(f'<ul class="notes">{"".join(f"<li>{html.escape(note)}</li>" for note in table.notes)}</ul>')
    return "\n".join(lines) + "\n"
