"""Large images in overlapping tiles, after SAHI (Akyon et al., 2022): objects that the detector's own size makes too
small are found in a tile, those that no tile holds in the whole image."""

from collections.abc import Callable, Sequence

import numpy as np

from det_plugin.coco.masks import decode_rle, encode_mask
from det_plugin.coco.metrics import Prediction

EDGE_PX = 2.0  # a box so near an inner edge of its tile may be cut off there
COVERED = 0.5  # share of a cut box inside a kept one of its class, from which on it is a part of that (SAHI)
Tile = tuple[int, int, int, int]  # x0, y0, x1, y1 in pixels


def tiles(width: int, height: int, side_px: int, overlap: float) -> list[Tile]:
    """Tiles that cover an image, row by row; the last of a row or column ends at the image's edge.

    Args:
        side_px: of a tile; a shorter side of the image is one tile.
        overlap: least share of a tile's side that its neighbor repeats, from 0 to below 1.
    """
    columns, rows = (_starts(length, side_px, overlap) for length in (width, height))
    return [(x, y, min(x + side_px, width), min(y + side_px, height)) for y in rows for x in columns]


def _starts(length: int, side: int, overlap: float) -> list[int]:
    if length <= side:
        return [0]
    step = max(int(side * (1 - overlap)), 1)
    return [*range(0, length - side, step), length - side]


def detect_in_tiles(
    detect: Callable[[Sequence[np.ndarray]], list[list[Prediction]]],
    image: np.ndarray,
    side_px: int,
    overlap: float,
    nms: float,
    min_score: float = 0.0,
) -> list[Prediction]:
    """Objects of an image, best first, found in its tiles and in the whole, one pass each.

    Args:
        detect: of :class:`det_plugin.predict.Detector`.
        image: uint8 RGB [H, W, 3].
        side_px, overlap: as :func:`tiles`.
        nms: IoU from which two boxes of a class are one object.
        min_score: leave out less certain objects.
    """
    height, width = image.shape[:2]
    areas = tiles(width, height, side_px, overlap)
    whole = (0, 0, width, height)
    found = list[tuple[Prediction, Tile]]()
    for x0, y0, x1, y1 in dict.fromkeys([whole, *areas]):
        (results,) = detect([np.ascontiguousarray(image[y0:y1, x0:x1])])
        found += [(p, (x0, y0, x1, y1)) for p in results if p["score"] >= min_score]
    boxes = np.array([_shifted(p["bbox"], tile) for p, tile in found]).reshape(-1, 4)
    cut = np.array([_is_cut(box, tile, width, height) for box, (_, tile) in zip(boxes, found)], bool)
    kinds, scores = (np.array([p[key] for p, _ in found]) for key in ("category_id", "score"))
    kept = merged(boxes, scores, kinds, cut, nms)
    return [_in_whole(*found[i], width, height) for i in sorted(kept, key=lambda i: -scores[i])]


def merged(
    boxes: np.ndarray, scores: np.ndarray, kinds: np.ndarray, cut: np.ndarray, nms: float
) -> list[int]:
    """The boxes that stay: NMS within each class, whole boxes before cut ones. A cut one also goes where half of it lies
    in one that stays.

    Args:
        boxes: [N, 4] x0, y0, x1, y1.
        scores, kinds, cut: [N].
        nms: IoU.
    """
    kept = list[int]()
    for i in sorted(range(len(boxes)), key=lambda i: (cut[i], -scores[i])):
        rivals = [j for j in kept if kinds[j] == kinds[i]]
        corner, end = np.maximum(boxes[rivals, :2], boxes[i, :2]), np.minimum(boxes[rivals, 2:], boxes[i, 2:])
        both = np.prod(np.maximum(end - corner, 0), axis=1)
        own = np.prod(boxes[i, 2:] - boxes[i, :2])
        union = own + np.prod(boxes[rivals, 2:] - boxes[rivals, :2], axis=1) - both
        is_same = both > nms * union
        if cut[i]:
            is_same |= both > COVERED * own
        if not is_same.any():
            kept.append(i)
    return kept


def _shifted(bbox: Sequence[float], tile: Tile) -> list[float]:
    """x, y, width, height in a tile -> x0, y0, x1, y1 in the image."""
    x, y, width, height = bbox
    return [x + tile[0], y + tile[1], x + width + tile[0], y + height + tile[1]]


def _is_cut(box: np.ndarray, tile: Tile, width: int, height: int) -> bool:
    """Whether a box touches an edge of its tile that is none of the image's."""
    x0, y0, x1, y1 = tile
    starts = (x0 > 0 and box[0] < x0 + EDGE_PX) or (y0 > 0 and box[1] < y0 + EDGE_PX)
    return starts or (x1 < width and box[2] > x1 - EDGE_PX) or (y1 < height and box[3] > y1 - EDGE_PX)


def _in_whole(prediction: Prediction, tile: Tile, width: int, height: int) -> Prediction:
    """A tile's result in the image's pixels."""
    x0, y0, x1, y1 = tile
    if (x1 - x0, y1 - y0) == (width, height):
        return prediction
    x, y, *size = prediction["bbox"]
    moved = {**prediction, "bbox": [x + x0, y + y0, *size]}
    if "segmentation" in prediction:
        mask = np.zeros((height, width), np.uint8)
        mask[y0:y1, x0:x1] = decode_rle(prediction["segmentation"])
        moved["segmentation"] = encode_mask(mask)
    return moved
