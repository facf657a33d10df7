"""Ground-truth masks as Detectron2 keeps them: polygons, exact at any scale, or bitmaps if an image has an
RLE."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import roi_align

from det_plugin.coco.api import coco_api
from pretrain.errors import UserError

Polygon = np.ndarray  # [2K] float64: x0, y0, x1, ... in pixels, continuous (an image spans 0 to its width)


class Polygons:
    """The objects of one image, each of one or more polygons. They stay on the CPU, where they are filled.

    Args:
        objects: a list of polygons each, empty if nothing is left of the object.
    """

    def __init__(self, objects: Sequence[Sequence[Polygon]]) -> None:
        self.objects = list(objects)

    def __len__(self) -> int:
        return len(self.objects)

    def where(self, kept: np.ndarray) -> "Polygons":
        """The objects for which ``kept`` [M] holds."""
        return Polygons([own for own, is_kept in zip(self.objects, kept) if is_kept])

    def boxes(self) -> np.ndarray:
        """Tight boxes [M, 4] float32 (x0, y0, x1, y1 in pixels). An object without a polygon gives zeros."""
        boxes = np.zeros((len(self), 4), np.float32)
        for box, own in zip(boxes, self.objects):
            if own:
                points = np.concatenate(own).reshape(-1, 2)
                box[:] = *points.min(axis=0), *points.max(axis=0)
        return boxes

    def crop(self, index: Tensor, boxes: Tensor, side: int) -> Tensor:
        """Objects ``index`` [P], each under its box of ``boxes`` [P, 4] -> [P, side, side] in {0, 1}, float.

        The polygons are scaled to the box and filled there (Detectron2's ``rasterize_polygons_within_box``).
        """
        api, found = coco_api().mask, np.zeros((len(boxes), side, side), np.float32)
        for cell, i, (x0, y0, x1, y1) in zip(found, index.tolist(), boxes.cpu().numpy()):
            scale = side / np.maximum([x1 - x0, y1 - y0], np.float32(0.1))  # float32, as there
            own = [((polygon.reshape(-1, 2) - (x0, y0)) * scale).ravel() for polygon in self.objects[i]]
            cell[:] = fill(own, side, side, api)
        return torch.from_numpy(found).to(boxes.device)


def fill(polygons: Sequence[Polygon], height: int, width: int, api: Any) -> np.ndarray:
    """The pixels inside polygons, [height, width] uint8.

    Args:
        api: pycocotools' ``mask`` module.
    """
    if not polygons:
        return np.zeros((height, width), np.uint8)
    filled: np.ndarray = api.decode(
        api.merge(api.frPyObjects([polygon.tolist() for polygon in polygons], height, width))
    )
    return filled


def clip(polygon: Polygon, width: int, height: int) -> list[Polygon]:
    """Cut a polygon at 0 ... width, 0 ... height: none, one or several polygons (Detectron2's
    ``CropTransform``).

    Raises:
        UserError: shapely is not installed.
    """
    try:
        from shapely import box
        from shapely.geometry import Polygon as Shape
    except ImportError as error:
        raise UserError("shapely is not installed: pip install posfield[det]") from error
    inside = (
        Shape(polygon.reshape(-1, 2)).buffer(0.0).intersection(box(0, 0, width, height))
    )  # buffer: makes it valid
    parts = [
        part for part in getattr(inside, "geoms", [inside]) if isinstance(part, Shape) and not part.is_empty
    ]
    return [
        np.asarray(part.exterior.coords)[:-1].ravel() for part in parts
    ]  # the last point repeats the first


def crop_masks(masks: Tensor | Polygons, index: Tensor, boxes: Tensor, side: int) -> Tensor:
    """A mask head's targets: masks ``index`` [P] under boxes [P, 4] -> [P, side, side] in {0, 1}, float.

    Args:
        masks: of an image's objects. Bitmaps [M, H, W] are pooled by the aligned RoIAlign and thresholded at
            1/2.
    """
    if isinstance(masks, Polygons):
        return masks.crop(index, boxes, side)
    rois = torch.cat([index[:, None].to(boxes.dtype), boxes], dim=1)
    return (
        roi_align(masks[:, None].float(), rois, side, 1.0, sampling_ratio=0, aligned=True)[:, 0] >= 0.5
    ).float()
