"""Large-scale jitter, and the resizing of tests: one affine map for pixels, polygons and bitmaps.

The numbers are those of Detectron2's ``RandomFlip``, ``ResizeScale``, ``FixedSizeCrop(pad=False)`` and
``ResizeShortestEdge``.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from det_plugin.coco.masks import Polygon, Polygons, Segmentation, boxes_of, clip, decode_rle, fill
from det_plugin.protocol import DetectionProtocol

MIN_SIDE_PX = 1e-5  # of an object's box in training (Detectron2's ``filter_empty_instances``)


@dataclass(frozen=True)
class Geometry:
    """Flip left-right, resize, then crop.

    Attributes:
        source: width, height of the image in pixels.
        flip: whether to mirror left and right.
        resized: width, height after resizing.
        crop: x, y, width, height in the resized image.
    """

    source: tuple[int, int]
    flip: bool
    resized: tuple[int, int]
    crop: tuple[int, int, int, int]

    @property
    def scale(self) -> tuple[float, float]:
        """Factors of x and y. They differ because sizes are rounded."""
        return self.resized[0] / self.source[0], self.resized[1] / self.source[1]

    def points(self, xy: np.ndarray) -> np.ndarray:
        """Map continuous coordinates [N, 2] in pixels (an image spans 0 to its width)."""
        if self.flip:
            xy = np.stack([self.source[0] - xy[:, 0], xy[:, 1]], axis=1)
        return xy * self.scale - np.array(self.crop[:2], dtype=np.float64)

    def pixels(self, image: np.ndarray, resample: Image.Resampling = Image.Resampling.BILINEAR) -> np.ndarray:
        """[H, W, 3] or [H, W] uint8 -> the crop. Bilinear resizing is antialiased, as in Detectron2."""
        if self.flip:
            image = image[:, ::-1]
        (x, y, width, height), (scale_x, scale_y) = self.crop, self.scale
        right = min((x + width) / scale_x, self.source[0])  # rounding could exceed it
        below = min((y + height) / scale_y, self.source[1])
        window = x / scale_x, y / scale_y, right, below
        picture = Image.fromarray(np.ascontiguousarray(image))
        return np.asarray(picture.resize((width, height), resample, box=window))

    def polygons(self, polygons: list[list[float]]) -> list[Polygon]:
        """Map an object's polygons (x0, y0, x1, ...). Those of fewer than three points are dropped."""
        points = (np.asarray(p, np.float64).reshape(-1, 2) for p in polygons if len(p) >= 6)
        return [self.points(xy).ravel() for xy in points]

    def boxes(self, boxes: Sequence[Sequence[float]]) -> np.ndarray:
        """Map boxes [M, 4] (x0, y0, x1, y1 in pixels); float64, cut at nothing."""
        corners = self.points(np.asarray(boxes, np.float64).reshape(-1, 2)).reshape(-1, 2, 2)
        return np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1)

    def mask(self, segmentation: Segmentation) -> np.ndarray:
        """The object's pixels in the crop, [h, w] uint8. Polygons are mapped before they are filled."""
        if isinstance(segmentation, dict):
            return self.pixels(decode_rle(segmentation), Image.Resampling.NEAREST)
        width, height = self.crop[2:]
        return fill(self.polygons(segmentation), height, width)


def jitter(source: tuple[int, int], protocol: DetectionProtocol, rng: np.random.Generator) -> Geometry:
    """Draw a flip, a uniform scale of the square that the image is fitted into, and a crop."""
    flip = bool(rng.random() < protocol.flip)
    target = protocol.image_size_px * rng.uniform(*protocol.jitter_scale)
    scale = min(target / source[0], target / source[1])
    width, height = (max(round(side * scale), 1) for side in source)
    size, offset = protocol.image_size_px, rng.random()  # Detectron2 draws one number for both directions
    x, y = (round(max(side - size, 0) * offset) for side in (width, height))
    return Geometry(source, flip, (width, height), (x, y, min(width, size), min(height, size)))


def evaluation_geometry(source: tuple[int, int], image_size_px: int) -> Geometry:
    """Resize so that the long edge has ``image_size_px``; nothing is random.

    It takes Detectron2's steps (first by the short edge, then back), so that half pixels are rounded in the
    same way.
    """
    scale = image_size_px / min(source)
    sides = [float(image_size_px) if side == min(source) else side * scale for side in source]
    back = min(image_size_px / max(sides), 1.0)
    width, height = (max(int(side * back + 0.5), 1) for side in sides)
    return Geometry(source, False, (width, height), (0, 0, width, height))


def objects_of(
    geometry: Geometry, classes: Sequence[int], segmentations: Sequence[Segmentation]
) -> tuple[np.ndarray, np.ndarray, Polygons | Tensor]:
    """The objects in the crop: boxes [M, 4], classes [M] from 0, masks. Objects outside are dropped.

    The masks are polygons cut at the crop's edges, or bitmaps [M, h, w] uint8 if an object is an RLE. The
    boxes fit the masks.
    """
    masks: Polygons | np.ndarray
    if any(isinstance(s, dict) for s in segmentations):
        masks = np.stack([geometry.mask(s) for s in segmentations])
        boxes = boxes_of(masks)
    else:
        size, drawn = geometry.crop[2:], [geometry.polygons(s) for s in segmentations]  # type: ignore[arg-type]
        masks = Polygons([[part for polygon in own for part in clip(polygon, *size)] for own in drawn])
        boxes = masks.boxes()
    kept = _have_extent(boxes)
    left = masks.where(kept) if isinstance(masks, Polygons) else torch.from_numpy(masks[kept])
    return boxes[kept], np.asarray(classes, np.int64)[kept], left


def boxes_of_objects(
    geometry: Geometry, classes: Sequence[int], boxes: Sequence[Sequence[float]]
) -> tuple[np.ndarray, np.ndarray]:
    """Of objects without masks: boxes [M, 4] cut at the crop's edges, classes [M] from 0; none outside."""
    inside = geometry.boxes(boxes).clip(0, 2 * geometry.crop[2:]).astype(np.float32)
    kept = _have_extent(inside)
    return inside[kept], np.asarray(classes, np.int64)[kept]


def _have_extent(boxes: np.ndarray) -> np.ndarray:
    return (boxes[:, 2:] - boxes[:, :2] > MIN_SIDE_PX).all(axis=1)  # type: ignore[no-any-return]
