"""COCO-format data for Detectron2: the same images and objects, in the same order, as the torchvision engine
reads."""

import copy
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.data import DatasetMapper, MetadataCatalog
from detectron2.data.detection_utils import annotations_to_instances, check_image_size
from detectron2.data.transforms import AugInput
from detectron2.structures import BoxMode, PolygonMasks

from det_plugin.coco.annotations import UNREADABLE, CocoSplit, Picture, read_split
from det_plugin.coco.masks import Segmentation, as_rle, clip, coco_api
from pretrain.data.broken import UnreadableImage
from pretrain.data.decode import BrokenImage, decode
from pretrain.data.sources.files import read_file
from pretrain.errors import UserError


def coco_root(root: str | Path | None) -> Path:
    """``root``; without one, Detectron2's own place, ``$DETECTRON2_DATASETS/coco``.

    Raises:
        UserError: that place does not exist.
    """
    if root is not None:
        return Path(root)
    folder = Path(MetadataCatalog.get("coco_2017_val").json_file).parents[1]
    if not folder.is_dir():
        told = "give dataloader.root, or $DETECTRON2_DATASETS before Detectron2 is imported"
        raise UserError(f"data: no folder {folder}; {told}")
    return folder


def coco_dicts(
    root: str | Path | None,
    split: str,
    num_classes: int,
    filter_empty: bool,
    share: float = 1.0,
    **reading: Any,
) -> list[dict[str, Any]]:
    """Detectron2's standard dicts of a split.

    Args:
        num_classes: of the model; the data must have as many categories.
        filter_empty: leave out images and objects that nothing can be learned from.
        share: of the images to use; every run uses the same ones.
        reading: fields of :data:`det_plugin.protocol.READING`.

    Raises:
        UserError: as :func:`det_plugin.coco.annotations.read_split`.
    """
    how = dict[str, Any](num_classes=num_classes, training=filter_empty, share=share, **reading)
    found = read_split(coco_root(root), split, **how)
    make = _boxes_dict if reading.get("masks") == "off" else _standard_dict
    return [make(found, picture) for picture in found.pictures]


def train_images(root: str | Path | None, num_classes: int, share: float, **reading: Any) -> int | None:
    """How many images training uses; None on a machine that only has the data for evaluation."""
    how = dict[str, Any](num_classes=num_classes, training=True, share=share, **reading)
    try:
        return len(read_split(coco_root(root), "train", **how).pictures)
    except UserError:
        return None


def _standard_dict(split: CocoSplit, picture: Picture) -> dict[str, Any]:
    objects = []
    masked = picture.masked or [True] * len(picture.classes)
    for k, segmentation, has_mask in zip(picture.classes, picture.segmentations, masked):
        if isinstance(segmentation, dict):
            segmentation = as_rle(segmentation, picture.height, picture.width)
        else:
            segmentation = _inside(segmentation, picture.width, picture.height)
        if segmentation:
            shape = {"segmentation": segmentation, "bbox": _box(segmentation), "bbox_mode": BoxMode.XYXY_ABS}
            objects.append({"category_id": k, "iscrowd": 0, **shape})
            if picture.masked:
                objects[-1]["has_mask"] = has_mask
    return _picture_dict(split, picture, objects)


def _boxes_dict(split: CocoSplit, picture: Picture) -> dict[str, Any]:
    """Boxes without masks. The mapper cuts them at the image's edges."""
    same = {"iscrowd": 0, "bbox_mode": BoxMode.XYXY_ABS}
    pairs = zip(picture.classes, picture.boxes)
    return _picture_dict(split, picture, [{"category_id": k, "bbox": list(box), **same} for k, box in pairs])


def _picture_dict(split: CocoSplit, picture: Picture, objects: list[dict[str, Any]]) -> dict[str, Any]:
    file = {"file_name": str(split.folder / picture.file_name), "image_id": picture.id}
    return {**file, "height": picture.height, "width": picture.width, "annotations": objects}


def _inside(polygons: list[list[float]], width: int, height: int) -> list[list[float]]:
    """An object's polygons, cut at the image's edges.

    Detectron2 only cuts at the training square. In an image smaller than the square, it would learn objects
    of the padding.
    """
    if all(min(p) >= 0 and max(p[0::2]) <= width and max(p[1::2]) <= height for p in polygons):
        return polygons
    return [part.tolist() for p in polygons for part in clip(np.asarray(p, float), width, height)]


def _box(segmentation: Segmentation) -> list[float]:
    """A mask's x0, y0, x1, y1. The mapper computes it again after the augmentations."""
    if isinstance(segmentation, dict):
        x, y, width, height = coco_api().mask.toBbox(segmentation).tolist()
        return [x, y, x + width, y + height]
    xs, ys = ([value for polygon in segmentation for value in polygon[axis::2]] for axis in (0, 1))
    return [min(xs), min(ys), max(xs), max(ys)]


class CocoMapper(DatasetMapper):
    """Detectron2's mapper with our decoder of images. Masks are polygons (its default), or bitmaps in an image that has an RLE.

    Polygons are exact at any scale, but an RLE cannot become one.
    """

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        """A dict of :func:`coco_dicts` -> ``image`` uint8 [3, h, w], ``instances`` (training), ...

        Raises:
            UserError: an image cannot be read, or its size is not that of the annotations; names the file.
        """
        made = copy.deepcopy(dataset_dict)
        try:
            image = decode(read_file(os.fsencode(made["file_name"])))
            # Detectron2's steps from here on
            check_image_size(made, image)
            seen = AugInput(image if self.image_format == "RGB" else image[..., ::-1])
            transforms = self.augmentations(seen)
            made["image"] = torch.from_numpy(np.ascontiguousarray(seen.image.transpose(2, 0, 1)))
            if not self.is_train:
                made.pop("annotations", None)
            elif "annotations" in made:
                self._transform_annotations(made, transforms, seen.image.shape[:2])
        except BrokenImage as error:
            raise UnreadableImage(f"data: {made['file_name']} cannot be used: {error}") from error
        except (*UNREADABLE, AssertionError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"data: {made['file_name']} cannot be used: {reason}") from error
        return made

    def _transform_annotations(
        self, dataset_dict: dict[str, Any], transforms: Any, image_shape: tuple[int, int]
    ) -> None:
        annotations = dataset_dict["annotations"]
        if not annotations:  # Detectron2 would look for the masks of nothing
            del dataset_dict["annotations"]
            instances = dataset_dict["instances"] = annotations_to_instances([], image_shape)
            if self.use_instance_mask:
                instances.gt_masks = PolygonMasks([])
            return
        has_rle = any(isinstance(a.get("segmentation"), dict) for a in annotations)
        self.instance_mask_format = "bitmask" if has_rle else "polygon"
        has_mask = [a.pop("has_mask", True) for a in annotations]
        if all(has_mask):
            super()._transform_annotations(dataset_dict, transforms, image_shape)
            return
        kinds = [a["category_id"] for a in annotations]
        for number, own in enumerate(annotations):  # says which of them stay
            own["category_id"] = number
        super()._transform_annotations(dataset_dict, transforms, image_shape)
        instances = dataset_dict["instances"]
        stayed = instances.gt_classes
        instances.gt_classes = torch.tensor(kinds)[stayed]
        instances.gt_has_mask = torch.tensor(has_mask)[stayed]
