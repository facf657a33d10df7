"""COCO-format data for Detectron2: found when a loader is built, from any root folder or from Detectron2's own catalogue."""

from functools import cache
from pathlib import Path
from typing import Any

from det_plugin.requires import detectron2_installed
from det_plugin.torchvision_engine.coco import read_split
from pretrain.errors import UserError

with detectron2_installed():
    from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog, get_detection_dataset_dicts
    from detectron2.data.datasets import register_coco_instances


def dataset_name(root: str | Path | None, split: str) -> str:
    """The catalogue's name of a split, registered if need be.

    Args:
        root: a folder with ``train2017/``, ``val2017/`` and ``annotations/instances_{train,val}2017.json``; none for
            Detectron2's own ``coco_2017_*``, which lie in ``$DETECTRON2_DATASETS/coco``.
        split: ``train`` | ``val``.

    Raises:
        UserError: no annotation file, by path.
    """
    if root is None:
        name = f"coco_2017_{split}"
        annotations = Path(MetadataCatalog.get(name).json_file)
    else:
        folder = Path(root).resolve()
        name, annotations = f"coco_2017_{split}:{folder}", folder / "annotations" / f"instances_{split}2017.json"
    if not annotations.is_file():
        where = "dataloader.root or $DETECTRON2_DATASETS (read when Detectron2 is imported)" if root is None else f"the root {root}"
        raise UserError(f"data: no file {annotations}; see {where}")
    if name not in DatasetCatalog:
        register_coco_instances(name, {}, str(annotations), str(annotations.parents[1] / f"{split}2017"))
    return name


def coco_dicts(root: str | Path | None, split: str, num_classes: int, filter_empty: bool) -> list[dict[str, Any]]:
    """Detectron2's standard dicts of a split.

    Args:
        num_classes: of the model; the data must have as many categories.
        filter_empty: leave out images without an object that is no crowd.

    Raises:
        UserError: as :func:`det_plugin.torchvision_engine.coco.read_split`.
    """
    name = dataset_name(root, split)
    folder = Path(MetadataCatalog.get(name).json_file).parents[1]
    read_split(folder, split, num_classes=num_classes, training=filter_empty)  # Detectron2 would end in an assertion
    dicts: list[dict[str, Any]] = get_detection_dataset_dicts(name, filter_empty=filter_empty)
    return dicts


@cache
def train_images(root: str | Path | None, num_classes: int) -> int | None:
    """Number of images that training uses; none where there is no training split (on a machine that only evaluates)."""
    try:
        folder = Path(MetadataCatalog.get(dataset_name(root, "train")).json_file).parents[1]
        return len(read_split(folder, "train", num_classes=num_classes, training=True).pictures)
    except UserError:
        return None


class CocoMapper(DatasetMapper):
    """Detectron2's mapper, with masks as polygons (its default) or, for images that hold an RLE, as bitmaps.

    Polygons are exact at any scale but cannot be made of an RLE; COCO has RLEs for crowds alone, which training leaves out.
    """

    def _transform_annotations(self, dataset_dict: dict[str, Any], transforms: Any, image_shape: tuple[int, int]) -> None:
        objects = [a for a in dataset_dict["annotations"] if not a.get("iscrowd", 0)]
        has_rle = any(isinstance(a.get("segmentation"), dict) for a in objects)
        self.instance_mask_format = "bitmask" if has_rle else "polygon"
        super()._transform_annotations(dataset_dict, transforms, image_shape)
