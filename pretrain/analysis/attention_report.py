"""The paper's figures of attention of any checkpoints, and their html page: NMI and MAD by layer (Fig. 5), what
query patches attend to (Fig. 6), box-wise beside cross-wise position masks (Fig. 7)."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from pretrain.analysis import figures as drawn
from pretrain.analysis.attention_study import METRICS, Measured
from pretrain.analysis.figures import Shown, bare, displayable, grid_of_axes, heat_map, plain
from pretrain.analysis.pca import Place
from pretrain.results.curves import style_of
from pretrain.results.pages import from_template
from pretrain.results.schema import Result
from pretrain.views.boxes import PositionSettings

PANELS_A_ROW = 4
LONGEST_NAME = 28


def statistics_figure(measured: Sequence[Measured]) -> Figure:
    """NMI and MAD by layer, checkpoints overlaid (paper Fig. 5); bands: one deviation over the images."""
    figure, axes = grid_of_axes(1, 2, (9, 3.4))
    names = [m.name for m in measured]
    for axis, (metric, label) in zip(axes[0], METRICS.items()):
        for i, m in enumerate(measured):
            color, dash = style_of(m.name, names, i // 8)
            mean, std = m.by_layer(metric)
            layers = np.arange(1, len(mean) + 1)
            line = dict(color=color, linestyle=dash, marker="o", markersize=3.5)
            axis.plot(layers, mean, label=plain(m.name), **line)
            axis.fill_between(layers, mean - std, mean + std, color=color, alpha=0.15, linewidth=0)
        _layer_axis(axis, label)
        from_zero(axis)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    return figure


def heads_figure(measured: Sequence[Measured], metric: str) -> Figure:
    """One panel a checkpoint: each head a dot (mean over the images) at its layer; a line: the heads' mean.

    Args:
        metric: a key of :data:`METRICS`.
    """
    columns = min(PANELS_A_ROW, len(measured))
    rows = math.ceil(len(measured) / columns)
    figure, axes = grid_of_axes(rows, columns, (2.9 * columns + 0.5, 2.5 * rows), sharey=True)
    names = [m.name for m in measured]
    for axis in axes.flat[len(measured) :]:
        axis.set_axis_off()
    for axis, m in zip(axes.flat, measured):
        color, _ = style_of(m.name, names, 0)
        heads = getattr(m, metric).mean(0)  # [L, heads]
        layers = np.arange(1, len(heads) + 1)
        axis.plot(layers, heads.mean(1), color=color, linewidth=1.2)
        x = layers.repeat(heads.shape[1])
        axis.scatter(x, heads.flatten(), s=12, color=color, alpha=0.55, linewidths=0)
        _layer_axis(axis, METRICS[metric] if axis in axes[:, 0] else "")
        axis.set_title(plain(m.name, LONGEST_NAME), fontsize=8)
    from_zero(axes[0, 0], *axes.flat)  # of all, now that all is drawn
    return figure


def _layer_axis(axis: Any, label: str) -> None:
    axis.set(xlabel="layer", ylabel=label)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(alpha=0.2)
    axis.spines[["top", "right"]].set_visible(False)


def queries_figure(image: Tensor, maps: Sequence[tuple[str, Tensor]], queries: Sequence[Place]) -> Figure:
    """A column a query patch, marked with a red dot: the image, below it a row a checkpoint (paper Fig. 6).

    Args:
        image: uint8 or normalized [3, H, W].
        maps: names, and what the Q queries attend to, [Q, h, w]
            (:func:`pretrain.analysis.attention.query_attention`).
        queries: Q places (x, y) in image units.
    """
    (height, width), rows = image.shape[1:], 1 + len(maps)
    size = (1.9 * len(queries) + 0.4, 1.9 * rows * height / width)
    figure, axes = grid_of_axes(rows, len(queries), size)
    grid = (maps[0][1].shape[1], maps[0][1].shape[2])
    for number, (axis, query) in enumerate(zip(axes[0], queries), 1):
        bare(axis, f"query {number}").imshow(displayable(image), extent=(0, width, height, 0))
        drawn.query_dot(axis, query, grid, (height, width))
    axes[0, 0].set_ylabel("image", fontsize=8)
    for row, (name, heats) in zip(axes[1:], maps):
        row[0].set_ylabel(plain(name, LONGEST_NAME), fontsize=7)
        for axis, query, heat in zip(row, queries, heats):
            heat_map(bare(axis), heat, query, (height, width))
    return figure


def masks_comparison_figure(
    images: Tensor, boxwise: Tensor, crosswise: Tensor, queries: Sequence[Place]
) -> Figure:
    """One row an image: the query, what it attends to after training with box-wise and with cross-wise
    position masks, and the share of each column of patches, in which vertical lines are spikes (paper Fig. 7,
    appendix C). The queries take turns.

    Args:
        images: [n, 3, H, W]; boxwise, crosswise: [n, Q, h, w], of two checkpoints; queries: Q places.
    """
    height, width = images.shape[2:]
    figure, axes = grid_of_axes(len(images), 4, (8.6, 2.1 * len(images)), width_ratios=(1, 1, 1, 1.35))
    for i, (row, image) in enumerate(zip(axes, images)):
        query = queries[i % len(queries)]
        bare(row[0], "image and query").imshow(displayable(image), extent=(0, width, height, 0))
        kinds = ((boxwise, "box-wise", drawn.GLOBAL_COLOR), (crosswise, "cross-wise", drawn.LOCAL_COLOR))
        for axis, (maps, name, color) in zip(row[1:], kinds):
            heat = maps[i, i % len(queries)]
            heat_map(bare(axis, name), heat, query, (height, width))
            share = heat.sum(0) * heat.shape[1]  # [w]
            x = (np.arange(len(share)) + 0.5) / len(share)
            row[3].plot(x, share, color=color, linewidth=1.2, label=name)
        drawn.query_dot(row[0], query, (boxwise.shape[2], boxwise.shape[3]), (height, width))
        row[3].set_title("attention to each column, left to right (1: even)", fontsize=8)
        row[3].set_xlim(0, 1)
        row[3].tick_params(labelsize=7)
        from_zero(row[3])
        row[3].legend(frameon=False, fontsize=7)
    return figure


def from_zero(axis: Any, *sharing: Any) -> None:
    """The y axis from 0 to a little above all that is drawn, on it and on those that share it."""
    axis.set_ylim(0, 1.1 * max(each.dataLim.y1 for each in (axis, *sharing)) or 1)


def draw(
    folder: Path, measured: Sequence[Measured], names: Sequence[str], images: Tensor,
    maps: Mapping[str, Tensor], queries: Sequence[Place], compared: tuple[str, str] | None = None,
) -> list[Shown]:  # fmt: skip
    """All figures as PNG and SVG, with their captions; those of an earlier analysis are removed.

    Args:
        names, images: of the n images shown, [n, 3, S, S].
        maps: {checkpoint: [n, Q, h, w]} of the Q queries.
        compared: the checkpoints trained with box-wise and with cross-wise position masks, for Fig. 7.
    """
    drawn.forget(folder, r"queries_\d+|masks")
    shown = []

    def add(stem: str, figure: Figure, title: str, caption: str) -> None:
        shown.append(drawn.keep(figure, folder, stem, title, caption))

    about = "Normalized mutual information (diversity) and mean attention distance (reach) of the patch-to-patch attention, "
    about += "mean of the heads; bands: one standard deviation over the images (paper Fig. 5)."
    add("statistics", statistics_figure(measured), "Attention by layer", about)
    for metric, title in (("nmi", "NMI of every head"), ("mad_px", "Attention distance of every head")):
        about = "Each dot is a head, mean over the images; the line is the mean of the heads."
        add(f"heads_{metric.removesuffix('_px')}", heads_figure(measured, metric), title, about)
    about = "Last-layer attention of the patch under the red dot"
    for i, (name, image) in enumerate(zip(names, images)):
        figure = queries_figure(image, [(who, of_all[i]) for who, of_all in maps.items()], queries)
        title = f"What query patches attend to: {name}"
        own_scale = ", mean of the heads; each map has its own scale (paper Fig. 6)."
        add(f"queries_{i + 1:02}", figure, title, about + own_scale)
    if compared:
        figure = masks_comparison_figure(images, maps[compared[0]], maps[compared[1]], queries)
        spikes = "vertical lines in a map are spikes on the right (paper Fig. 7)."
        told = f"{about} after training with either; {spikes}"
        add("masks", figure, "Position masks: box-wise and cross-wise", told)
    about = "Distributions of s as drawn in training with the default settings (paper Fig. 3)."
    add("scales", drawn.scales_figure(PositionSettings()), "Scale s", about)
    return shown


def spread(mean: float, std: float, decimals: int) -> str:
    """ "0.5 ± 0.1"; of one image the mean alone."""
    return f"{mean:.{decimals}f}" + ("" if np.isnan(std) else f" ± {std:.{decimals}f}")


def build_page(
    measured: Sequence[Measured], results: Sequence[Result], figures: Sequence[Shown], broken: Sequence[str]
) -> str:
    """The page. Every name in it is escaped, and it loads no external file.

    Args:
        results: of the same checkpoints.
        figures: as :func:`draw` gives them.
        broken: images that could not be read, with the reason.
    """
    scaled = (result.protocol.changes for result in results if result.protocol.deviations)
    means, by_layer, origins = [], [], []
    for m, r in zip(measured, results):
        (nmi, nmi_std), (mad, mad_std) = m.by_layer("nmi"), m.by_layer("mad_px")
        numbers = [f"{nmi.mean():.4f}", f"{nmi[-1]:.4f}", f"{mad.mean():.1f}", f"{mad[-1]:.1f}"]
        means.append([m.name, r.method, r.network, len(m.nmi), *numbers, r.protocol.label])
        layers = enumerate(zip(nmi, nmi_std, mad, mad_std), 1)
        rows = [[i, spread(a, a_std, 4), spread(b, b_std, 1)] for i, (a, a_std, b, b_std) in layers]
        by_layer.append((m.name, rows))
        versions = [(r.git_commit or "–")[:12], r.packages.get("torch", "–")]
        cost = [f"{r.wall_time_s:.0f}", f"{r.peak_memory_mib or 0:,.0f}", r.created[:19].replace("T", " ")]
        origins.append([m.name, r.weights_hash or "–", r.config_hash, *versions, *cost])
    lists = dict(means=means, by_layer=by_layer, origins=origins, metrics=METRICS)
    about = dict(deviations=next(scaled, ""), figures=figures, broken=broken)
    return from_template("attention.html", title="Attention analysis", **lists, **about)
