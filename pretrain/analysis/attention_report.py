"""One self-contained html page of an attention analysis: the numbers by checkpoint and layer, the figures,
what was left out."""

import html
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from pretrain.analysis.attention_figures import (
    Place,
    heads_figure,
    masks_comparison_figure,
    queries_figure,
    statistics_figure,
)
from pretrain.analysis.attention_tables import METRICS, Measured
from pretrain.analysis.figures import Shown, forget, keep, scales_figure
from pretrain.results.report import html_table, page, picture
from pretrain.results.schema import Result
from pretrain.views.boxes import PositionSettings


def draw(
    folder: Path,
    measured: Sequence[Measured],
    names: Sequence[str],
    pictures: Tensor,
    maps: Mapping[str, Tensor],
    queries: Sequence[Place],
    compared: tuple[str, str] | None = None,
) -> list[Shown]:
    """All figures as PNG and SVG, with their captions; those of an earlier analysis are removed.

    Args:
        names, images: of the n images shown, [n, 3, S, S].
        maps: {checkpoint: [n, Q, h, w]} of the Q queries.
        compared: the checkpoints trained with box-wise and with cross-wise position masks, for Fig. 7.
    """
    forget(folder, r"queries_\d+|masks")
    heads = "Each dot is a head, mean over the images; the line is the mean of the heads."
    figures = {
        "statistics": (
            statistics_figure(measured),
            "Attention by layer",
            "Normalized mutual information (diversity) and mean attention distance (reach) of the patch-to-patch attention, mean "
            "of the heads; bands: one standard deviation over the images (paper Fig. 5).",
        ),
        "heads_nmi": (heads_figure(measured, "nmi"), "NMI of every head", heads),
        "heads_mad": (heads_figure(measured, "mad_px"), "Attention distance of every head", heads),
    }
    for i, (name, picture_) in enumerate(zip(names, pictures)):
        figures[f"queries_{i + 1:02}"] = (
            queries_figure(picture_, [(who, of_all[i]) for who, of_all in maps.items()], queries),
            f"What query patches attend to: {name}",
            "Last-layer attention of the patch under the red dot, mean of the heads; each map has its own scale (paper Fig. 6).",
        )
    if compared:
        figures["masks"] = (
            masks_comparison_figure(pictures, maps[compared[0]], maps[compared[1]], queries),
            "Position masks: box-wise and cross-wise",
            "Last-layer attention of the patch under the red dot after training with either; vertical lines in a map are spikes on "
            "the right (paper Fig. 7).",
        )
    figures["scales"] = (
        scales_figure(PositionSettings()),
        "Scale s",
        "Distributions of s as drawn in training with the default settings (paper Fig. 3).",
    )
    return [keep(figure, folder, name, title, caption) for name, (figure, title, caption) in figures.items()]


def build_page(
    measured: Sequence[Measured], results: Sequence[Result], figures: Sequence[Shown], broken: Sequence[str]
) -> str:
    """The page. Every name in it is escaped, and it loads no external file.

    Args:
        results: of the same checkpoints.
        figures: as :func:`draw` gives them.
        broken: images that could not be read, with the reason.
    """
    pictures = "".join(map(picture, figures))
    sections = {
        "Summary": _summary(measured, results, broken),
        "Figures": f'<div class="pictures">{pictures}</div>',
        "Layers": "\n".join(_layers(m) for m in measured),
        "Reproducibility": _reproducibility(measured, results),
    }
    return page("Attention analysis", sections)


def _summary(measured: Sequence[Measured], results: Sequence[Result], broken: Sequence[str]) -> str:
    rows = []
    for m, result in zip(measured, results):
        (nmi, _), (mad, _) = m.by_layer("nmi"), m.by_layer("mad_px")
        numbers = [f"{nmi.mean():.4f}", f"{nmi[-1]:.4f}", f"{mad.mean():.1f}", f"{mad[-1]:.1f}"]
        rows.append(
            [m.name, result.method, result.backbone, str(len(m.nmi)), *numbers, result.protocol.label]
        )
    heads = [
        "weights",
        "method",
        "backbone",
        "images",
        "NMI",
        "last layer",
        "MAD (px)",
        "last layer",
        "protocol",
    ]
    parts = [
        html_table(
            "Patch-to-patch attention, means over images, heads and layers", heads, rows, {3, 4, 5, 6, 7}
        )
    ]
    parts.append(
        '<p class="soft">NMI: normalized mutual information of query and key; 0: all queries look at the same keys. MAD: mean '
        "distance from a query to its keys. Every number: statistics.csv and summary.csv beside this page.</p>"
    )
    scaled = next((result.protocol for result in results if result.protocol.deviations), None)
    if scaled:
        parts.insert(0, f'<p class="warn">Departs from the protocol: {html.escape(scaled.changes)}.</p>')
    if broken:
        items = "".join(f"<li>{html.escape(line)}</li>" for line in broken)
        parts.append(
            f"<details><summary>Images that could not be read: {len(broken)}</summary><ul>{items}</ul></details>"
        )
    return "\n".join(parts)


def _layers(m: Measured) -> str:
    (nmi, nmi_std), (mad, mad_std) = m.by_layer("nmi"), m.by_layer("mad_px")
    rows = [
        [str(i + 1), f"{nmi[i]:.4f} ± {nmi_std[i]:.4f}", f"{mad[i]:.1f} ± {mad_std[i]:.1f}"]
        for i in range(len(nmi))
    ]
    caption = "Mean of the heads: its mean and standard deviation over the images"
    table = html_table(caption, ["layer", *METRICS.values()], rows, {0, 1, 2})
    return f"<details><summary>{html.escape(m.name)}</summary>\n{table}</details>"


def _reproducibility(measured: Sequence[Measured], results: Sequence[Result]) -> str:
    rows = [
        [m.name, r.weights_hash or "–", r.config_hash, (r.git_commit or "–")[:12], str(r.packages.get("torch", "–")),
         f"{r.wall_time_s:.0f}", f"{r.peak_memory_mib or 0:,.0f}", r.created[:19].replace("T", " ")]
        for m, r in zip(measured, results)
    ]  # fmt: skip
    heads = [
        "weights",
        "weights hash",
        "config hash",
        "commit",
        "torch",
        "time (s)",
        "peak memory (MiB)",
        "created (UTC)",
    ]
    return html_table("The first 12 digits of each hash", heads, rows, {5, 6})
