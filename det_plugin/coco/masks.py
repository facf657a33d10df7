"""Masks: COCO's polygons and RLEs, and the ground truth of training as Detectron2 keeps it: polygons, exact at
any scale, or bitmaps if an image has an RLE."""

from collections.abc import Sequence
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pretrain.errors import UserError

Segmentation = list[list[float]] | dict[str, Any]  # polygons x0, y0, x1, ... in pixels, or an RLE
Polygon = np.ndarray  # [2K] float64: x0, y0, x1, ... in pixels, continuous (an image spans 0 to its width)


def coco_api() -> Any:
    """``COCO``, ``COCOeval`` and ``mask`` of pycocotools, or of faster-coco-eval where only that is installed.

    Raises:
        UserError: neither is installed.
    """
    with suppress(ImportError):
        from pycocotools import mask
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval

        return SimpleNamespace(COCO=COCO, COCOeval=COCOeval, mask=mask)
    try:
        from faster_coco_eval import COCO, COCOeval_faster, mask
    except ImportError as error:
        what = "neither pycocotools nor faster-coco-eval is installed"
        raise UserError(f"{what}: pip install posfield[det]") from error
    return SimpleNamespace(COCO=COCO, COCOeval=COCOeval_faster, mask=mask)


def as_rle(segmentation: Segmentation, height: int, width: int) -> dict[str, Any]:
    """Polygons (together) or a list of counts -> a compressed RLE; one that is compressed stays as it is."""
    api = coco_api().mask
    if isinstance(segmentation, list):
        return api.merge(api.frPyObjects(segmentation, height, width))  # type: ignore[no-any-return]
    if isinstance(segmentation["counts"], list):
        return api.frPyObjects(segmentation, height, width)  # type: ignore[no-any-return]
    return segmentation


def decode_rle(rle: dict[str, Any]) -> np.ndarray:
    """A COCO RLE, compressed or a list of counts -> [H, W] uint8."""
    return coco_api().mask.decode(as_rle(rle, *rle["size"]))  # type: ignore[no-any-return]


def encode_mask(mask: np.ndarray) -> dict[str, Any]:
    """[H, W] of 0 and 1 -> an RLE that JSON can hold."""
    rle = coco_api().mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    counts = rle["counts"].decode("ascii") if isinstance(rle["counts"], bytes) else rle["counts"]
    return {"size": [int(side) for side in rle["size"]], "counts": counts}


def fill(polygons: Sequence[Polygon], height: int, width: int) -> np.ndarray:
    """The pixels inside polygons, [height, width] uint8."""
    if not polygons:
        return np.zeros((height, width), np.uint8)
    rle = as_rle([polygon.tolist() for polygon in polygons], height, width)
    return coco_api().mask.decode(rle)  # type: ignore[no-any-return]


def clip(polygon: Polygon, width: int, height: int) -> list[Polygon]:
    """Cut a polygon at 0 ... width, 0 ... height: none, one or several (Detectron2's ``CropTransform``).

    Raises:
        UserError: shapely is not installed.
    """
    try:
        from shapely import box
        from shapely.geometry import Polygon as Shape
    except ImportError as error:
        raise UserError("shapely is not installed: pip install posfield[det]") from error
    valid = Shape(polygon.reshape(-1, 2)).buffer(0.0)
    inside = valid.intersection(box(0, 0, width, height))
    parts = [p for p in getattr(inside, "geoms", [inside]) if isinstance(p, Shape) and not p.is_empty]
    return [np.asarray(p.exterior.coords)[:-1].ravel() for p in parts]  # the last point repeats the first


def crossings(xy: np.ndarray) -> int:
    """About how often a closed outline [N, 2] crosses itself, from a hundred of its edges.

    Raises:
        UserError: shapely is not installed.
    """
    try:
        from shapely import STRtree, linestrings
    except ImportError as error:
        raise UserError("shapely is not installed: pip install posfield[det]") from error
    edges = linestrings(np.stack([xy, np.roll(xy, -1, axis=0)], axis=1))
    some = edges[:: max(1, len(edges) // 100)]
    met = STRtree(edges).query(some, predicate="intersects").shape[1] - 3 * len(some)  # itself, neighbors
    return max(met, 0) * len(edges) // (2 * len(some))


def boxes_of(masks: np.ndarray) -> np.ndarray:
    """Tight boxes of masks: [M, H, W] -> [M, 4] float32 (x0, y0, x1, y1 in pixels); zeros if empty."""
    api = coco_api().mask
    boxes = api.toBbox(api.encode(np.asfortranarray(masks.transpose(1, 2, 0), dtype=np.uint8)))
    boxes[:, 2:] += boxes[:, :2]  # width, height -> x1, y1
    return boxes.astype(np.float32)  # type: ignore[no-any-return]


class Polygons:
    """The objects of one image, each a list of polygons, empty if nothing is left of it.

    They stay on the CPU, where they are filled.
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
        found = np.zeros((len(boxes), side, side), np.float32)
        for cell, i, (x0, y0, x1, y1) in zip(found, index.tolist(), boxes.cpu().numpy()):
            scale = side / np.maximum([x1 - x0, y1 - y0], np.float32(0.1))  # float32, as there
            own = [((polygon.reshape(-1, 2) - (x0, y0)) * scale).ravel() for polygon in self.objects[i]]
            cell[:] = fill(own, side, side)
        return torch.from_numpy(found).to(boxes.device)


def crop_masks(masks: Tensor | Polygons, index: Tensor, boxes: Tensor, side: int) -> Tensor:
    """A mask head's targets: masks ``index`` [P] under boxes [P, 4] -> [P, side, side] in {0, 1}, float.

    Bitmaps [M, H, W] are pooled by the aligned RoIAlign and thresholded at 1/2.
    """
    if isinstance(masks, Polygons):
        return masks.crop(index, boxes, side)
    from torchvision.ops import roi_align  # loads torch's compiler: two seconds

    rois = torch.cat([index[:, None].to(boxes.dtype), boxes], dim=1)
    pooled = roi_align(masks[:, None].float(), rois, side, 1.0, sampling_ratio=0, aligned=True)[:, 0]
    return (pooled >= 0.5).float()
