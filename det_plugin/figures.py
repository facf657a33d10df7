"""Drawn detections: boxes, masks where there are any, names and scores on an image, and pages of them beside the ground truth."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image, ImageDraw

from det_plugin.augment import Geometry, evaluation_geometry
from det_plugin.coco.annotations import CocoSplit, Picture
from det_plugin.coco.masks import boxes_of
from det_plugin.coco.metrics import Prediction
from pretrain.analysis.colors import distinct_colors
from pretrain.analysis.picture_pages import Cell, Color, font, save_page
from pretrain.errors import UserError
from pretrain.results.runs import PREDICTED

SHOWN, MIN_SCORE, SIDE_PX = 6, 0.5, 480
COLUMNS = 2  # of a page: pairs in a row
N_COLORS = 80  # COCO's classes; with more of them colors repeat
Corners = tuple[float, float, float, float]  # x0, y0, x1, y1 in pixels


@dataclass(frozen=True)
class Shown:
    """One object to draw: class from 0, mask [H, W] bool or None, box in pixels, and its label."""

    kind: int
    mask: np.ndarray | None
    box: Corners
    text: str


def spread(split: CocoSplit, count: int) -> list[Picture]:
    """``count`` images, evenly over the split."""
    chosen = np.unique(np.linspace(0, len(split.pictures) - 1, count).round().astype(int))
    return [split.pictures[index] for index in chosen.tolist()]


def draw_page(
    split: CocoSplit,
    pictures: Sequence[Picture],
    predictions: Sequence[Prediction],
    path: Path,
    min_score: float = MIN_SCORE,
) -> Path:
    """Write a PNG with ground truth and predictions of some images, side by side, and its caption.

    Raises:
        UserError: none of the images can be read. A few that cannot are left out, and the caption names them.
    """
    cells, names, kinds = list[Cell](), dict(zip(split.category_ids, split.class_names)), set[int]()
    broken: list[str] = []
    for picture in pictures:
        mine = [p for p in predictions if p["image_id"] == picture.id and p["score"] >= min_score]
        try:
            image, geometry = _resized(split.load(picture), SIDE_PX)
        except UserError:
            if len(broken) + 1 == len(pictures):
                raise
            broken.append(picture.file_name)
            continue
        found = shown(mine, geometry, names)
        truth = draw_objects(image, _annotated(split, picture, geometry))
        cells.append(Cell(picture.file_name, "ground truth", truth))
        cells.append(Cell(picture.file_name, PREDICTED, draw_objects(image, found)))
        kinds |= {*picture.classes, *(thing.kind for thing in found)}
    caption = f"Detections of score {min_score:g} and more, beside the pictures with their annotations."
    caption += f" Not readable: {', '.join(broken)}." if broken else ""
    legend = [(split.class_names[kind], color_of(kind)) for kind in sorted(kinds)]
    title = "Detections beside ground truth"
    return save_page(path, cells, 2 * COLUMNS, title=title, caption=caption, legend=legend)


def draw_prediction(
    image: np.ndarray, predictions: Sequence[Prediction], classes: dict[int, str]
) -> np.ndarray:
    """An image [H, W, 3] uint8 with its detections. Very small ones are enlarged, very large ones reduced.

    Args:
        predictions: COCO results of this image.
        classes: category id -> name, in the order of the classes.
    """
    small, geometry = _resized(image, min(max(*image.shape[:2], 640), 1600))
    return draw_objects(small, shown(predictions, geometry, classes))


def shown(predictions: Sequence[Prediction], geometry: Geometry, classes: dict[int, str]) -> list[Shown]:
    """Predictions of one image, mapped for drawing. The highest scores come last, on top."""
    kinds, found = {id: k for k, id in enumerate(classes)}, []
    for p in sorted(predictions, key=lambda prediction: prediction["score"]):
        x, y, w, h = p["bbox"]
        x0, y0, x1, y1 = geometry.boxes([(x, y, x + w, y + h)])[0].tolist()
        text, mask = f"{classes[p['category_id']]} {p['score']:.2f}", None
        if "segmentation" in p:
            mask = geometry.mask(p["segmentation"]).astype(bool)
        found.append(Shown(kinds[p["category_id"]], mask, (x0, y0, x1, y1), text))
    return found


def draw_objects(image: np.ndarray, objects: Sequence[Shown]) -> np.ndarray:
    """A copy of the image [H, W, 3] uint8 with masks, their outlines, boxes, and labels. Lines have an edge
    of black or white, so that they are seen on any picture."""
    canvas, line = image.copy(), max(round(min(image.shape[:2]) / 200), 2)
    masks = [(thing.mask, color_of(thing.kind)) for thing in objects if thing.mask is not None]
    for mask, color in sorted(masks, key=lambda pair: -int(pair[0].sum())):  # small ones on top
        canvas[mask] = (0.6 * canvas[mask] + 0.4 * np.array(color)).astype(np.uint8)
        outlines, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(canvas, outlines, -1, ink_on(color), line + 1, cv2.LINE_AA)
        cv2.drawContours(canvas, outlines, -1, color, line, cv2.LINE_AA)
    picture = Image.fromarray(canvas)
    pen, letters = ImageDraw.Draw(picture), font(min(max(round(min(image.shape[:2]) / 34), 11), 22))
    for thing in objects:
        (x0, y0, x1, y1), color = thing.box, color_of(thing.kind)
        pen.rectangle((x0 - 1, y0 - 1, x1 + 1, y1 + 1), outline=ink_on(color))
        pen.rectangle(thing.box, outline=color, width=line)
    taken: list[Corners] = []
    for thing in reversed(objects):  # the last one lies on top and chooses first
        size = letters.getlength(thing.text) + 6, sum(letters.getmetrics())
        place = _place(size, thing.box, taken, picture.size)
        color = color_of(thing.kind)
        pen.rectangle(place, fill=color)
        pen.text((place[0] + 3, place[1]), thing.text, fill=ink_on(color), font=letters)
        taken.append(place)
    return np.asarray(picture)


def color_of(kind: int) -> Color:
    """A class's color: as far from those before it as can be, also for eyes with a color vision deficiency."""
    red, green, blue = distinct_colors(N_COLORS)[kind % N_COLORS]
    return round(255 * red), round(255 * green), round(255 * blue)


def ink_on(color: Color) -> Color:
    """Black or white, whichever is seen on a color, and beside it."""
    return (0, 0, 0) if np.dot(color, (0.299, 0.587, 0.114)) > 140 else (255, 255, 255)


def _place(
    size: tuple[float, float], box: Corners, taken: Sequence[Corners], within: tuple[int, int]
) -> Corners:
    """Where a label covers the least of others: above the box, below it, or inside at a corner."""
    (w, h), (x0, y0, x1, y1) = size, box
    corners = [(x, y) for y in (y0 - h, y1, y0, y1 - h) for x in (x0, x1 - w)]
    corners += [(x0, y0 + k * h) for k in range(1, max(int((y1 - y0) // h), 1))]
    places = []
    for x, y in corners:
        x, y = min(max(x, 0), max(within[0] - w - 1, 0)), min(max(y, 0), max(within[1] - h - 1, 0))
        places.append((x, y, x + w, y + h))
    return min(places, key=lambda place: sum(_shared(place, other) for other in taken))


def _shared(a: Corners, b: Corners) -> float:
    return max(min(a[2], b[2]) - max(a[0], b[0]), 0) * max(min(a[3], b[3]) - max(a[1], b[1]), 0)


def _annotated(split: CocoSplit, picture: Picture, geometry: Geometry) -> list[Shown]:
    objects = []
    for kind, segmentation, box in zip(picture.classes, picture.segmentations, picture.boxes):
        mask = geometry.mask(segmentation).astype(bool) if segmentation else None
        corners = geometry.boxes([box]) if mask is None else boxes_of(mask[None])
        x0, y0, x1, y1 = corners[0].tolist()
        objects.append(Shown(kind, mask, (x0, y0, x1, y1), split.class_names[kind]))
    return objects


def draw_entries(
    image: np.ndarray, objects: Sequence[tuple[dict[str, Any], int, list[float]]], classes: dict[int, str]
) -> np.ndarray:
    """An image [H, W, 3] uint8 with COCO annotations as they are written, be they right or wrong.

    Args:
        objects: (annotation, category id, box x, y, width, height).
        classes: category id -> name.
    """
    small, geometry = _resized(image, min(max(*image.shape[:2], 640), 1200))
    kinds, drawn = {id: k for k, id in enumerate(sorted(classes))}, []
    for annotation, category, (x, y, w, h) in objects:
        try:
            mask = geometry.mask(annotation["segmentation"]).astype(bool)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError):  # none, or damaged
            mask = None
        (x0, x1), (y0, y1) = sorted((x, x + w)), sorted((y, y + h))
        (x0, y0), (x1, y1) = geometry.points(np.array([(x0, y0), (x1, y1)], float)).tolist()
        is_crowd = " (crowd)" if annotation.get("iscrowd") == 1 else ""
        text = f"{classes.get(category, f'unknown {category}')}{is_crowd}"
        drawn.append(Shown(kinds.get(category, len(kinds)), mask, (x0, y0, x1, y1), text))
    return draw_objects(small, drawn)


def _resized(image: np.ndarray, side_px: int) -> tuple[np.ndarray, Geometry]:
    """The image with its long edge at ``side_px``, and the map that led there."""
    geometry = evaluation_geometry((image.shape[1], image.shape[0]), side_px)
    return geometry.pixels(image), geometry
