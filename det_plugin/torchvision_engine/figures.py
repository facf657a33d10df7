"""``figures/detections.png``: ground truth and predictions of a few validation pictures, side by side."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from det_plugin.torchvision_engine.augment import boxes_of, evaluation_geometry
from det_plugin.torchvision_engine.coco import CocoSplit, Picture
from det_plugin.torchvision_engine.coco_api import coco_api
from det_plugin.torchvision_engine.evaluate import Prediction

SHOWN, MIN_SCORE, SIDE_PX = 6, 0.5, 480
COLOURS = np.array(
    [(230, 97, 1), (94, 60, 153), (0, 136, 100), (215, 48, 120), (33, 113, 181), (166, 118, 29), (180, 30, 30), (80, 140, 20)]
)


def draw_detections(split: CocoSplit, predictions: Sequence[Prediction], folder: Path) -> Path:
    """Write the figure and its caption (``captions.json``); the pictures are spread evenly over the split.

    Args:
        predictions: of :func:`evaluate.predict`; those of at least :data:`MIN_SCORE` are shown.
        folder: the run's ``figures/``.
    """
    chosen = np.unique(np.linspace(0, len(split.pictures) - 1, SHOWN).round().astype(int)).tolist()
    rows = (len(chosen) + 1) // 2
    figure = Figure(figsize=(12, 3 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, 4, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    classes = {id: k for k, id in enumerate(split.category_ids)}
    for number, index in enumerate(chosen):
        picture = split.pictures[index]
        mine = [p for p in predictions if p["image_id"] == picture.id and p["score"] >= MIN_SCORE]
        found = [(classes[p["category_id"]], p["segmentation"], f" {p['score']:.2f}") for p in mine]
        truth = [(k, segmentation, "") for k, segmentation in zip(picture.classes, picture.segmentations)]
        row, column = divmod(number, 2)
        for axis, objects, title in zip(axes[row, 2 * column :], (truth, found), ("ground truth", "prediction")):
            _draw(axis, split, picture, objects)
            axis.set_title(title, fontsize=9)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "detections.png"
    figure.savefig(path, dpi=100)
    caption = f"Validation pictures with their annotations and, on the right, the detections of score {MIN_SCORE} and more."
    words = {path.name: {"title": "Detections beside ground truth", "caption": caption}}
    (folder / "captions.json").write_text(json.dumps(words, indent=2) + "\n")
    return path


def _draw(axis: Any, split: CocoSplit, picture: Picture, objects: Sequence[tuple[int, Any, str]]) -> None:
    """One picture with masks, boxes and names of objects (class, segmentation, what follows the name)."""
    geometry = evaluation_geometry((picture.width, picture.height), SIDE_PX)
    image = geometry.pixels(split.load(picture)).astype(np.float32)
    boxes = []
    for kind, segmentation, note in objects:
        mask = geometry.mask(segmentation, coco_api().mask).astype(bool)
        colour = COLOURS[kind % len(COLOURS)]
        image[mask] = 0.5 * image[mask] + 0.5 * colour
        boxes.append((boxes_of(mask[None])[0], colour / 255, split.class_names[kind] + note))
    axis.imshow(image.astype(np.uint8))
    for (x0, y0, x1, y1), colour, text in boxes:
        axis.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=colour, linewidth=1.2))
        label = dict(boxstyle="square,pad=0.15", facecolor=colour, edgecolor="none")
        axis.text(x0, y0, text, fontsize=6, color="white", verticalalignment="top", bbox=label)
