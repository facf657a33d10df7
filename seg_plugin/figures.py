"""Images of segmentations: image, ground truth, prediction, and prediction over image, in the classes' colors."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image

from pretrain.files import replacing
from pretrain.results.runs import add_caption
from seg_plugin.predict import Segmented

IGNORED_COLOR = (225, 225, 225)
MAX_LEGEND = 24  # classes, the largest ones; nobody would read more
OVERLAY = 0.55  # the colors' share
COLUMN_IN = 2.7  # width of an image, in inches


def draw_page(
    path: Path, rows: Sequence[Segmented], metainfo: Any, *, title: str, caption: str, overlay: bool = False
) -> None:
    """Draw a page and enter it into ``captions.json`` beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draw(path, rows, palette_of(metainfo), metainfo["classes"], overlay=overlay)
    add_caption(path, title, caption)


def palette_of(metainfo: Any) -> np.ndarray:
    """Colors of the classes, [classes, 3] uint8: easy to tell apart if there are few. MMSegmentation may have drawn
    its own at random."""
    count = len(metainfo["classes"])
    if count > 20:
        return np.array(metainfo["palette"], np.uint8)
    strong_first = [*range(0, 20, 2), *range(1, 20, 2)]
    return np.array(colormaps["tab20"](strong_first[:count])[:, :3] * 255, np.uint8)


def draw(
    path: Path, rows: Sequence[Segmented], palette: np.ndarray, names: Sequence[str], *, overlay: bool = False
) -> None:
    """Draw one row an image, with the truth if there is any, and below a legend of the classes, the largest first.

    Args:
        palette: [classes, 3] uint8.
        overlay: add a column with the prediction over the image.
    """
    has_truth = any(row.truth is not None for row in rows)
    titles = ["image", *["ground truth"] * has_truth, "prediction", *["prediction over the image"] * overlay]
    maps = [labels for row in rows for labels in (row.truth, row.predicted) if labels is not None]
    counts = [np.bincount(labels[labels < len(names)], minlength=len(names)) for labels in maps]
    pixels = np.sum(counts, axis=0)  # of each class; larger labels are ignored
    present = [k for k in np.argsort(-pixels, kind="stable").tolist() if pixels[k]]
    shown = present[:MAX_LEGEND]
    aspects = [row.pixels.shape[0] / row.pixels.shape[1] for row in rows]  # height of each row, in widths
    legend_rows = -(-len(shown) // (2 * len(titles)))
    size = (COLUMN_IN * len(titles), sum(aspects) * COLUMN_IN + 0.35 + 0.2 * legend_rows + 0.1 * len(rows))
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    axes = figure.subplots(len(rows), len(titles), squeeze=False, gridspec_kw={"height_ratios": aspects})
    for line, row in zip(axes, rows):
        over = blended(row.pixels, row.predicted, palette) if overlay else None
        truth = None if row.truth is None else colored(row.truth, palette)
        pictures = [row.pixels, *[truth] * has_truth, colored(row.predicted, palette), *[over] * overlay]
        for axis, picture in zip(line, pictures):
            axis.set_axis_off()
            if picture is not None:
                axis.imshow(picture)
    for axis, title in zip(axes[0], titles):
        axis.set_title(title, fontsize=10)
    patches = [Patch(facecolor=palette[k] / 255, edgecolor="0.6", label=names[k]) for k in shown]
    more = f"and {len(present) - MAX_LEGEND} smaller classes" if len(present) > MAX_LEGEND else None
    place: dict[str, Any] = dict(loc="outside lower center", ncols=2 * len(titles), fontsize=8, frameon=False)
    figure.legend(handles=patches, title=more, **place)
    FigureCanvasAgg(figure).print_png(str(path))


def colored(labels: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """[H, W] -> [H, W, 3] uint8. Ignored pixels are light gray."""
    colors = np.concatenate([palette, np.array([IGNORED_COLOR], np.uint8)])
    return colors[np.minimum(labels, len(palette))]


def blended(pixels: np.ndarray, labels: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """A prediction over its image, [H, W, 3] uint8."""
    return (OVERLAY * colored(labels, palette) + (1 - OVERLAY) * pixels).astype(np.uint8)


def save_labels(path: Path, labels: np.ndarray, palette: np.ndarray, values: Sequence[Any]) -> None:
    """Write a label map as a PNG, as the data's masks store it.

    Args:
        labels: [H, W].
        values: what the masks store for each class: a value, of a palette if all are of 8 bits, or a color.
    """
    stored = np.array(values)
    has_palette = stored.ndim == 1 and stored.max() < 256
    image = Image.fromarray(stored.astype(np.uint8 if has_palette or stored.ndim > 1 else np.uint16)[labels])
    if has_palette:
        colors = np.zeros((256, 3), np.uint8)
        colors[stored] = palette
        image.putpalette(colors[: stored.max() + 1].tobytes())
    with replacing(path) as partial:
        image.save(partial, "PNG")
