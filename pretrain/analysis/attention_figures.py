"""The paper's figures of attention, for any number of checkpoints: NMI and MAD by layer (Fig. 5), what
query patches attend to (Fig. 6), and box-wise beside cross-wise position masks (Fig. 7)."""

import math
from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from pretrain.analysis.attention_tables import METRICS, Measured
from pretrain.analysis.figures import GLOBAL_COLOR, LOCAL_COLOR, bare, displayable, heat_map, plain, query_dot
from pretrain.results.curves import style_of

PANELS_A_ROW = 4
LONGEST_NAME = 28
Place = tuple[float, float]


def statistics_figure(measured: Sequence[Measured]) -> Figure:
    """NMI and MAD by layer, all checkpoints overlaid; the bands are one standard deviation over the images
    (paper Fig. 5)."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    names = [m.name for m in measured]
    for axis, (metric, label) in zip(axes, METRICS.items()):
        for i, m in enumerate(measured):
            color, dash = style_of(m.name, names, i // 8)
            mean, std = m.by_layer(metric)
            layers = np.arange(1, len(mean) + 1)
            axis.plot(
                layers, mean, color=color, linestyle=dash, marker="o", markersize=3.5, label=plain(m.name)
            )
            axis.fill_between(layers, mean - std, mean + std, color=color, alpha=0.15, linewidth=0)
        _layer_axis(axis, label)
        from_zero(axis)
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=8
    )
    return figure


def heads_figure(measured: Sequence[Measured], metric: str) -> Figure:
    """One panel a checkpoint: each head a dot (mean over the images) at its layer, and the mean of the heads
    as a line.

    Args:
        metric: a key of :data:`METRICS`.
    """
    columns = min(PANELS_A_ROW, len(measured))
    rows = math.ceil(len(measured) / columns)
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(2.9 * columns + 0.5, 2.5 * rows),
        squeeze=False,
        sharey=True,
        layout="constrained",
    )
    names = [m.name for m in measured]
    for axis in axes.flat[len(measured) :]:
        axis.set_axis_off()
    for axis, m in zip(axes.flat, measured):
        color, _ = style_of(m.name, names, 0)
        heads = getattr(m, metric).mean(0)  # [L, heads]
        layers = np.arange(1, len(heads) + 1)
        axis.plot(layers, heads.mean(1), color=color, linewidth=1.2)
        axis.scatter(
            layers.repeat(heads.shape[1]), heads.flatten(), s=12, color=color, alpha=0.55, linewidths=0
        )
        _layer_axis(axis, METRICS[metric] if axis in axes[:, 0] else "")
        axis.set_title(plain(m.name, LONGEST_NAME), fontsize=8)
    from_zero(axes[0, 0], *axes.flat)  # of all, now that all is drawn
    return figure


def _layer_axis(axis: Any, label: str) -> None:
    axis.set(xlabel="layer", ylabel=label)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(alpha=0.2)
    axis.spines[["top", "right"]].set_visible(False)


def queries_figure(picture: Tensor, maps: Sequence[tuple[str, Tensor]], queries: Sequence[Place]) -> Figure:
    """A column a query patch, marked with a red dot: the image, and below it a row a checkpoint (paper Fig.
    6).

    Args:
        image: uint8 or normalized [3, H, W].
        maps: names, and what the Q queries attend to, [Q, h, w]
            (:func:`pretrain.analysis.attention.query_attention`).
        queries: Q places (x, y) in image units.
    """
    height, width = picture.shape[1:]
    rows, columns = 1 + len(maps), len(queries)
    size = (1.9 * columns + 0.4, 1.9 * rows * height / width)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axis, query in zip(axes[0], queries):
        bare(axis).imshow(displayable(picture), extent=(0, width, height, 0))
        axis.plot(query[0] * width, query[1] * height, "o", color="red", markersize=5)
    axes[0, 0].set_ylabel("image", fontsize=8)
    for row, (name, heats) in zip(axes[1:], maps):
        row[0].set_ylabel(plain(name, LONGEST_NAME), fontsize=7)
        for axis, query, heat in zip(row, queries, heats):
            heat_map(bare(axis), heat, query, (height, width))
    return figure


def masks_comparison_figure(
    pictures: Tensor, boxwise: Tensor, crosswise: Tensor, queries: Sequence[Place]
) -> Figure:
    """One row an image: the query, what it attends to after training with box-wise and with cross-wise
    position masks, and the share of each column of patches, in which vertical lines are spikes (paper Fig. 7,
    appendix C). The queries take turns.

    Args:
        images: [n, 3, H, W]; boxwise, crosswise: [n, Q, h, w], of two checkpoints; queries: Q places.
    """
    height, width = pictures.shape[2:]
    rows = len(pictures)
    figure, axes = plt.subplots(
        rows, 4, figsize=(8.6, 2.1 * rows), squeeze=False, layout="constrained", width_ratios=(1, 1, 1, 1.35)
    )
    for i, (row, picture) in enumerate(zip(axes, pictures)):
        query = queries[i % len(queries)]
        bare(row[0], "image and query").imshow(displayable(picture), extent=(0, width, height, 0))
        for axis, maps, name, color in (
            (row[1], boxwise, "box-wise", GLOBAL_COLOR),
            (row[2], crosswise, "cross-wise", LOCAL_COLOR),
        ):
            heat = maps[i, i % len(queries)]
            heat_map(bare(axis, name), heat, query, (height, width))
            share = heat.sum(0) * heat.shape[1]  # [w]
            row[3].plot(
                (np.arange(len(share)) + 0.5) / len(share), share, color=color, linewidth=1.2, label=name
            )
        query_dot(row[0], query, (boxwise.shape[2], boxwise.shape[3]), (height, width))
        row[3].set_title("attention to each column, left to right (1: even)", fontsize=8)
        row[3].set_xlim(0, 1)
        row[3].tick_params(labelsize=7)
        from_zero(row[3])
        row[3].legend(frameon=False, fontsize=7)
    return figure


def from_zero(axis: Any, *sharing: Any) -> None:
    """The y axis from 0 to a little above all that is drawn, on it and on those that share it: an even
    curve is not at the edge."""
    axis.set_ylim(0, 1.1 * max(each.dataLim.y1 for each in (axis, *sharing)) or 1)
