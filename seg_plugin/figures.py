"""Images of segmentations: image, ground truth, prediction, and prediction over image, in the classes' colors."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from pretrain.analysis.colors import distinct_colors
from pretrain.analysis.picture_pages import Cell, Color, save_page
from pretrain.files import replacing
from pretrain.results.runs import PREDICTED
from seg_plugin.predict import Segmented

IGNORED_COLOR = (225, 225, 225)
MAX_LEGEND = 24  # classes, the largest ones; nobody would read more
OVERLAY = 0.55  # the colors' share
SIDE_PX = 360  # width of an image on a page


def draw_page(
    path: Path, rows: Sequence[Segmented], metainfo: Any, *, title: str, caption: str, overlay: bool = False
) -> None:
    """Draw one row an image, with the truth if there is any, and below a legend of the classes, the largest first; enter
    it into ``captions.json`` beside it.

    Args:
        overlay: add a column with the prediction over the image.
    """
    palette, names = palette_of(metainfo), metainfo["classes"]
    has_truth = any(row.truth is not None for row in rows)
    cells = []
    for row in rows:
        size = SIDE_PX, round(SIDE_PX * row.pixels.shape[0] / row.pixels.shape[1])
        maps = {"ground truth": row.truth} if has_truth else {}
        shown = {"image": cv2.resize(row.pixels, size, interpolation=cv2.INTER_AREA)}
        for column, labels in (maps | {PREDICTED: row.predicted}).items():
            there = np.full(row.pixels.shape[:2], len(names)) if labels is None else labels
            shown[column] = cv2.resize(colored(there, palette), size, interpolation=cv2.INTER_NEAREST)
        if overlay:
            over = blended(row.pixels, row.predicted, palette)
            shown[f"{PREDICTED} over the image"] = cv2.resize(over, size, interpolation=cv2.INTER_AREA)
        cells += [Cell(row.path.name, column, pixels) for column, pixels in shown.items()]
    counted = [labels for row in rows for labels in (row.truth, row.predicted) if labels is not None]
    # Pixels of each class; larger labels are ignored
    pixels = np.sum([np.bincount(m[m < len(names)], minlength=len(names)) for m in counted], axis=0)
    present = [k for k in np.argsort(-pixels, kind="stable").tolist() if pixels[k]]
    legend: list[tuple[str, Color]] = [(names[k], tuple(palette[k].tolist())) for k in present[:MAX_LEGEND]]
    more = f"and {len(present) - MAX_LEGEND} smaller classes" if len(present) > MAX_LEGEND else ""
    save_page(path, cells, len(cells) // len(rows), title=title, caption=caption, legend=legend, more=more)


def palette_of(metainfo: Any) -> np.ndarray:
    """Colors of the classes, [classes, 3] uint8: the data set's own if there are many, else the easiest to tell apart
    (MMSegmentation may have drawn its own at random)."""
    count = len(metainfo["classes"])
    own = metainfo["palette"] if count > 20 else 255 * np.array(distinct_colors(count))
    return np.array(own).round().astype(np.uint8)


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
