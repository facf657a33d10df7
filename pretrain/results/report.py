"""One self-contained html page of some runs: no script, no external file, the same bytes each time."""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pretrain.results.choose import tables_of
from pretrain.results.curves import MOST_POINTS, Curve, panel, style_of, terms_of
from pretrain.results.merge import backbone_label, seeds_of
from pretrain.results.render import render_all
from pretrain.results.runs import Figure, Run, run_names
from pretrain.results.schema import KINDS
from pretrain.results.tables import NONE, duration_text, epochs_text

_TITLES = {  # by the stage of a result
    "pretrain": "Pre-training",
    "posttrain": "Post-training",
    "detection": "Detection and instance segmentation",
    "segmentation": "Semantic segmentation",
    "dense": "Dense evaluation without fine-tuning",
    "analysis": "Analysis",
}
LARGE_BYTES = 200_000
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""


def build_report(
    runs: Sequence[Run], title: str = "Results", table: str = "", layout: str = "list", against: str = ""
) -> str:
    """The page: summary, curves, tables, figures and what is needed to repeat the runs.

    Args:
        runs: in any order: they are sorted by kind, method, backbone and seed.
        table: the published tables to show beside the measured rows: "1", "1,2,7" or "all"; "": 1.
        layout, against: of :func:`pretrain.results.choose.tables_of`.

    Raises:
        UserError: an unknown table.
    """

    def order(run: Run) -> tuple:
        r = run.result
        return (
            list(_TITLES).index(r.stage),
            r.method,
            r.backbone,
            r.protocol.label,
            r.seed,
            r.created,
            r.config_hash,
        )

    runs = sorted(runs, key=order)
    names = run_names([run.result for run in runs])
    sections = {
        "Summary": _summary(runs, names),
        "Curves": _curves(runs, names),
        "Results": render_all(
            tables_of([run.result for run in runs], layout, table or "1" * (layout == "paper"), against),
            "html",
        ),
        "Figures": _figures(runs, names),
        "Reproducibility": _reproducibility(runs, names),
    }
    return page(title, sections)


def page(title: str, sections: Mapping[str, str]) -> str:
    """A page with its style: the sections {head (one word): html} that are not empty, and links to them."""
    sections = {head: body for head, body in sections.items() if body}
    links = "".join(f'<a href="#{head.lower()}">{head}</a>' for head in sections)
    parts = [
        f'<section id="{head.lower()}">\n<h2>{head}</h2>\n{body}\n</section>'
        for head, body in sections.items()
    ]
    style = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    return _PAGE.format(
        title=html.escape(title), policy=_POLICY, style=style, body="\n".join([f"<nav>{links}</nav>", *parts])
    )


# --- summary ----------------------------------------------------------------------------------------------


def _summary(runs: Sequence[Run], names: Sequence[str]) -> str:
    results = [run.result for run in runs]
    scaled = sum(bool(result.protocol.deviations) for result in results)
    lines = [f'<p class="soft">{len(runs)} run{"s" * (len(runs) != 1)}, {_dates(runs)}</p>']
    if scaled:
        lines.append(
            f'<p class="warn">{scaled} of {len(runs)} runs were scaled down from their protocol. '
            "Their numbers are not comparable with the published ones.</p>"
        )
    rows = [
        [
            r.kind, name, backbone_label(r.backbone), epochs_text(r.effective_epochs), r.protocol.label,
            duration_text(r.wall_time_s),
            NONE if r.peak_memory_mib is None else f"{r.peak_memory_mib:,.0f} MiB",
        ]
        for r, name in zip(results, names)
    ]  # fmt: skip
    heads = ["kind", "run", "backbone", "eff. epochs", "protocol", "wall time", "peak memory"]
    lines.append(html_table("What was run", heads, rows, numeric={3, 5, 6}))
    stages = []
    for kind in KINDS:
        times = [result.wall_time_s for result in results if result.kind == kind]
        if times:
            stages.append([kind, str(len(times)), duration_text(sum(times))])
    stages.append(["all", str(len(results)), duration_text(sum(result.wall_time_s for result in results))])
    lines.append(
        html_table("Time by kind of run", ["kind", "runs", "wall time, summed"], stages, numeric={1, 2})
    )
    owners = [f"{r.kind}: {name}" for r, name in zip(results, names)]
    lines.append("<h3>Hardware</h3>" + _distinct([r.hardware for r in results], owners))
    lines.append("<h3>Versions</h3>" + _distinct([r.packages for r in results], owners))
    return "\n".join(lines)


def _dates(runs: Sequence[Run]) -> str:
    days = sorted({run.result.created[:10] for run in runs})
    return html.escape(days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}")


def _distinct(mappings: Sequence[dict[str, Any]], owners: Sequence[str]) -> str:
    """Equal mappings once, with the runs that share them where there are several."""
    shared: dict[str, list[str]] = {}
    for mapping, owner in zip(mappings, owners):
        text = _list({key: _words(value) for key, value in sorted(mapping.items())})
        shared.setdefault(text, []).append(owner)
    if len(shared) == 1:
        return next(iter(shared))
    return "\n".join(
        f'<p class="soft">{html.escape("; ".join(who))}</p>{text}' for text, who in shared.items()
    )


# --- curves, tables, figures ------------------------------------------------------------------------------


def _curves(runs: Sequence[Run], names: Sequence[str]) -> str:
    methods = list(dict.fromkeys(sorted(run.result.method for run in runs)))
    parts = []
    for stage, title in _TITLES.items():
        curves: list[Curve] = []
        seen: list[str] = []
        for run, name in zip(runs, names):
            if run.result.stage == stage and run.log:
                method = run.result.method
                curves.append(
                    Curve(run.result, name, run.log, *style_of(method, methods, seen.count(method)))
                )
                seen.append(method)
        if curves:
            parts.append(f"<h3>{title}</h3>\n{_curve_figure(stage, curves)}")
    return "\n".join(parts)


def _curve_figure(stage: str, curves: Sequence[Curve]) -> str:
    shown, others = terms_of(curves)
    panels = {term: panel(term, curves, f"{stage}-{i}") for i, term in enumerate([*shown, *others])}
    lines = [
        f'<figure><ul class="legend">{"".join(map(_legend, curves))}</ul>',
        _grid([panels[term] for term in shown]),
    ]
    if others:
        grid = _grid([panels[term] for term in others])
        lines.append(f"<details><summary>Other terms ({len(others)})</summary>{grid}</details>")
    if max(len(curve.log) for curve in curves) > MOST_POINTS:
        lines.append(
            "<figcaption>Long curves: means of neighboring values, in the band that they span.</figcaption>"
        )
    return "\n".join([*lines, "</figure>"])


def _legend(curve: Curve) -> str:
    line = f'<span style="border-top-style:{curve.dash};border-color:{curve.color}"></span>'
    return f"<li>{line}{html.escape(curve.name)}</li>"


def _grid(panels: Sequence[str]) -> str:
    return f'<div class="panels">{"".join(f"<div>{svg}</div>" for svg in panels)}</div>'


def _figures(runs: Sequence[Run], names: Sequence[str]) -> str:
    """Run by run: every number that it measured, and its images."""
    parts = []
    for run, name in zip(runs, names):
        pictures = "".join(picture(figure) for figure in run.figures)
        if pictures:
            head = f"{_TITLES[run.result.stage]}: {name}"
            parts.append(
                f"<h3>{html.escape(head)}</h3>\n"
                f'<p class="soft">{html.escape(run.result.protocol.label)}</p>\n'
                f'<div class="pictures">{pictures}</div>'
            )
    return "\n".join(parts)


def picture(figure: Figure) -> str:
    """A <figure> that holds its image itself, a large one as WebP; title and caption are escaped."""
    kind, pixels = _light(figure.png)
    data = base64.b64encode(pixels).decode("ascii")
    title, caption = html.escape(figure.title), html.escape(figure.caption)
    image = f'<img alt="{title}" src="data:image/{kind};base64,{data}">'
    return f"<figure>{image}<figcaption><b>{title}</b> {caption}</figcaption></figure>"


def _light(png: bytes) -> tuple[str, bytes]:
    """(type, file) of an image: photographs, which PNG keeps badly, in a quarter of the bytes."""
    from PIL import Image, features

    if len(png) < LARGE_BYTES or not features.check("webp"):
        return "png", png
    file = io.BytesIO()
    Image.open(io.BytesIO(png)).save(file, "WEBP", quality=90)
    return ("webp", file.getvalue()) if len(file.getvalue()) < len(png) / 2 else ("png", png)


# --- what it takes to repeat the runs ---------------------------------------------------------------------


def _reproducibility(runs: Sequence[Run], names: Sequence[str]) -> str:
    rows, details = [], []
    for run, name in zip(runs, names):
        r = run.result
        commit, _, dirty = (r.git_commit or NONE).partition("+")
        hashes = [r.config_hash, r.weights_hash or NONE, commit[:12] + f"+{dirty}" * bool(dirty)]
        rows.append([r.kind, name, seeds_of([r]), *hashes, r.created[:19].replace("T", " ")])
        metrics = _list({key: _words(value) for key, value in sorted(_flat(r.metrics).items())})
        details.append(
            f"<details><summary>{html.escape(f'{_TITLES[r.stage]}: {name}')}</summary>\n"
            f"<p>{html.escape(r.protocol.text)}</p>\n{metrics}</details>"
        )
    heads = ["kind", "run", "seed", "config hash", "weights hash", "commit", "created (UTC)"]
    table = html_table("Seeds, and the first 12 digits of each hash", heads, rows, numeric={2})
    return "\n".join([table, "<h3>Protocol and every metric, run by run</h3>", *details])


def _flat(metrics: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"per_class": {"cat": 1.0}} -> {"per_class / cat": 1.0}."""
    flat: dict[str, Any] = {}
    for name, value in metrics.items():
        flat |= _flat(value, f"{prefix}{name} / ") if isinstance(value, dict) else {prefix + name: value}
    return flat


def _words(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_words, value)) or "none"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def html_table(caption: str, heads: Sequence[str], rows: Sequence[Sequence[str]], numeric: set[int]) -> str:
    """A <table> that scrolls. Cells are escaped, the caption is html; ``numeric``: columns set right."""

    def cells(tag: str, texts: Sequence[str]) -> str:
        return "".join(
            f"<{tag}{' class=number' if i in numeric else ''}>{html.escape(t)}</{tag}>"
            for i, t in enumerate(texts)
        )

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    head = f"<thead><tr>{cells('th', heads)}</tr></thead>"
    table = f"<table><caption>{caption}</caption>{head}<tbody>{body}</tbody></table>"
    return f'<div class="table-scroll">{table}</div>'


def _list(entries: dict[str, str]) -> str:
    items = "".join(
        f"<dt>{html.escape(key)}</dt><dd>{html.escape(value)}</dd>" for key, value in entries.items()
    )
    return f"<dl>{items}</dl>"
