"""Figures of what patch features hold: PCA colors, similarity to a query, places read layer by layer, objects found.

:func:`gallery` puts several into one html page.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from pretrain.analysis.figures import bare, grid_of_axes, plain, query_dot
from pretrain.analysis.pca import Place
from pretrain.results.curves import style_of
from pretrain.results.pages import from_template
from pretrain.results.runs import Figure as Shown

TRUE_COLOR, FOUND_COLORS = "#35d04f", {"lost": "#ff3b30", "tokencut": "#37a7ff"}
MAX_WIDTH_IN = 24.0


def gallery(title: str, about: Mapping[str, Sequence[str]], figures: Sequence[Shown]) -> str:
    """One self-contained html page: texts about the figures, and the figures; every text is escaped."""
    return from_template("gallery.html", title=title, about=about, figures=figures)


def _panels(
    rows: int, widths: Sequence[float], height: float, color_bars: bool = False
) -> tuple[Figure, Any]:
    """A grid of bare axes whose columns are as wide as their images are at one height (in inches)."""
    wide = sum(widths) * height
    shrink = min(1.0, MAX_WIDTH_IN / wide)
    size = (wide * shrink + 0.5 + 0.8 * color_bars, (height * shrink + 0.25) * rows)
    figure, axes = grid_of_axes(rows, len(widths), size, width_ratios=widths)
    for axis in axes.flat:
        bare(axis).spines[:].set_visible(False)
    return figure, axes


def pca_figure(images: Sequence[Tensor], colors: Mapping[str, Sequence[Tensor]]) -> Figure:
    """The images in the first row, and the colors of their patches in one row a checkpoint.

    Args:
        images: uint8 [3, H, W] each.
        colors: {label: [h, w, 3] in [0, 1] an image}.
    """
    figure, axes = _panels(1 + len(colors), [image.shape[2] / image.shape[1] for image in images], 2.0)
    for axis, image in zip(axes[0], images):
        axis.imshow(image.permute(1, 2, 0).numpy())
    for row, (label, maps) in zip(axes[1:], colors.items()):
        row[0].set_ylabel(plain(label, 28), fontsize=9)
        for axis, image, rgb in zip(row, images, maps):
            axis.imshow(rgb.numpy(), interpolation="nearest", extent=(0, image.shape[2], image.shape[1], 0))
    return figure


def similarity_figure(
    image: Tensor, queries: Sequence[Place], maps: Mapping[str, Sequence[Tensor]]
) -> Figure:
    """One image: a column a query patch, marked with a red dot; a row a checkpoint and what is like that patch.

    The colors of a row run from its least similarity, which the bar tells, to 1: features differ in how alike
    they all are.

    Args:
        image: uint8 [3, H, W]; maps: {label: cosine [h, w] a query}.
    """
    height, width = image.shape[1:]
    figure, axes = _panels(1 + len(maps), [width / height] * len(queries), 2.2, color_bars=True)
    extent = (0, width, height, 0)
    grids = [(cosine[0].shape[0], cosine[0].shape[1]) for cosine in maps.values()]
    for number, (axis, query) in enumerate(zip(axes[0], queries), 1):
        axis.imshow(image.permute(1, 2, 0).numpy(), extent=extent)
        axis.set_title(f"query {number}", fontsize=8)
        query_dot(axis, query, grids[0], (height, width))
    for row, (label, cosines) in zip(axes[1:], maps.items()):
        row[0].set_ylabel(plain(label, 28), fontsize=9)
        low = min(float(cosine.min()) for cosine in cosines)
        for axis, query, cosine in zip(row, queries, cosines):
            rows, columns = cosine.shape
            drawn = {"extent": extent, "interpolation": "nearest", "vmin": min(low, 0.99), "vmax": 1}
            shown = axis.imshow(cosine.numpy(), cmap="viridis", **drawn)
            query_dot(axis, query, (rows, columns), (height, width))
        figure.colorbar(shown, ax=row.tolist(), shrink=0.85, pad=0.01, aspect=14).ax.tick_params(labelsize=7)
    return figure


def layers_figure(rows: Sequence[Mapping[str, str]]) -> Figure:
    """The position probe against the layer, from the rows of its csv: error and R^2, checkpoints overlaid.

    Bands are one standard deviation over the draws of the masks; the square is the final norm.

    Args:
        rows: of ``position_layers.csv``, see :func:`pretrain.evaluation.position_layers.csv_rows`.
    """
    figure, ((*axes,),) = grid_of_axes(1, 2, (11, 4.2))
    labels = list(dict.fromkeys(row["checkpoint"] for row in rows))
    for axis, field in zip(axes, ("error", "r2")):
        for label in labels:
            color, _ = style_of(label, labels, 0)
            for patches, dash in (("hidden", "-"), ("given", ":")):
                chosen = [row for row in rows if row["checkpoint"] == label and row["patches"] == patches]
                x = [int(row["layer"]) for row in chosen]
                y, std = (
                    np.array([float(row[name] or 0) for row in chosen]) for name in (field, f"{field}_std")
                )
                name = plain(label) if patches == "hidden" else None
                axis.plot(x, y, dash, color=color, linewidth=1.7, marker="o", markersize=3, label=name)
                axis.fill_between(x, y - std, y + std, color=color, alpha=0.18, linewidth=0)
                if chosen and chosen[-1]["after"] == "norm":
                    axis.plot(x[-1], y[-1], "s", color=color, markersize=5.5)
        axis.set_xlabel("layer (0: embedding; k: after block k; square: after the final norm)", fontsize=9)
        axis.grid(alpha=0.2)
        axis.spines[["top", "right"]].set_visible(False)
    # The patches lie elsewhere, so that their constant guesses differ, too
    for patches, dash in (("hidden", "--"), ("given", ":")):
        for level in {round(float(row["chance"]), 3) for row in rows if row["patches"] == patches}:
            axes[0].axhline(level, color="gray", linestyle=dash, linewidth=1)
    axes[1].axhline(0, color="gray", linestyle="--", linewidth=1)
    axes[0].set(ylabel="mean distance from the true center (sides are 1)", ylim=(0, None))
    axes[1].set(ylabel="$R^2$", ylim=(min(-0.1, axes[1].get_ylim()[0]), 1.03))
    for dash, color, name in (
        ("-", "black", "position hidden"),
        (":", "black", "position given"),
        ("--", "gray", "hidden: constant guess"),
        (":", "gray", "given: constant guess"),
    ):
        axes[0].plot([], [], dash, color=color, label=name)
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return figure


class Boxed(NamedTuple):
    """An image uint8 [H, W, 3], its true boxes [n, 4] in pixels, and the box and hit of each method."""

    name: str
    pixels: np.ndarray
    truth: np.ndarray
    found: Mapping[str, tuple[np.ndarray, bool]]


def boxes_figure(pictures: Sequence[Boxed], columns: int = 4) -> Figure:
    """True boxes (green) and those that were found (LOST red, TokenCut blue), with what hit."""
    columns = min(columns, len(pictures))
    n_rows = -(-len(pictures) // columns)
    figure, axes = grid_of_axes(n_rows, columns, (3.0 * columns, 2.7 * n_rows))
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, one in zip(axes.flat, pictures):
        axis.imshow(one.pixels)
        boxes = [(box, TRUE_COLOR, "-") for box in one.truth]
        boxes += [(box, FOUND_COLORS[method], "--") for method, (box, _) in one.found.items()]
        for (x0, y0, x1, y1), color, dash in boxes:
            line: dict[str, Any] = {"fill": False, "edgecolor": color, "linestyle": dash, "linewidth": 1.8}
            axis.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, **line))
        words = ", ".join(f"{method} {'hit' if hit else 'miss'}" for method, (_, hit) in one.found.items())
        axis.set_title(f"{plain(one.name, 24)}: {words}", fontsize=8)
    return figure
