"""A COCO data set on disk: ``{train,val}2017/`` and ``annotations/instances_{train,val}2017.json``."""

import json
import os
import pickle
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from pretrain.errors import UserError

SPLITS = ("train", "val")
Segmentation = list[list[float]] | dict[str, Any]  # polygons x0, y0, x1, ... in pixels, or an RLE


@dataclass(frozen=True)
class Picture:
    """One image and its objects without crowds.

    Attributes:
        id: COCO's.
        file_name: below the split's folder.
        width, height: pixels.
        classes: contiguous, from 0.
        segmentations: polygons or RLE, an object each.
    """

    id: int
    file_name: str
    width: int
    height: int
    classes: tuple[int, ...] = ()
    segmentations: tuple[Segmentation, ...] = ()


class PackedList(Sequence[Picture]):
    """Many records as two arrays, so that forked workers share them (Python objects are copied by reference counting)."""

    def __init__(self, records: Iterable[Picture]) -> None:
        blobs = [np.frombuffer(pickle.dumps(record, protocol=-1), np.uint8) for record in records]
        self.ends = np.cumsum([0, *map(len, blobs)])
        self.bytes = np.concatenate(blobs) if blobs else np.empty(0, np.uint8)

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        record: Picture = pickle.loads(self.bytes[self.ends[index] : self.ends[index + 1]].tobytes())
        return record


@dataclass(frozen=True)
class CocoSplit:
    """A split: its pictures in the file's order, and what class k is called there."""

    file: Path
    folder: Path
    pictures: Sequence[Picture]
    category_ids: tuple[int, ...]
    class_names: tuple[str, ...]

    def load(self, picture: Picture) -> np.ndarray:
        """The pixels, [H, W, 3] uint8 RGB, upright.

        Raises:
            UserError: no readable image, or one of another size than the annotation file says, by path.
        """
        path = self.folder / picture.file_name
        try:
            with Image.open(path) as image:
                pixels = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
        except OSError as error:
            raise UserError(f"data: {path} cannot be read as an image ({error})") from error
        if pixels.shape[:2] != (picture.height, picture.width):
            size = f"{pixels.shape[1]} x {pixels.shape[0]}"
            raise UserError(f"data: {path} is {size} pixels, but {self.file.name} says {picture.width} x {picture.height}")
        return pixels


def read_split(root: Path, split: str, *, num_classes: int, training: bool) -> CocoSplit:
    """Read an annotation file and check it against the folder.

    Category ids may have gaps; class k is the k-th id in order. Crowds are left out. In training, so are objects of zero
    extent and then images without an object (Detectron2's ``filter_empty``).

    Args:
        root: holds ``train2017/``, ``val2017/`` and ``annotations/``.
        num_classes: of the model.

    Raises:
        UserError: names the file and what is wrong with it.
    """
    file, folder = Path(root) / "annotations" / f"instances_{split}2017.json", Path(root) / f"{split}2017"
    content = read_json(file)
    if not folder.is_dir():
        raise UserError(f"data: no folder {folder}")
    try:
        categories = sorted((int(c["id"]), str(c["name"])) for c in content["categories"])
        class_of = {id: k for k, (id, _) in enumerate(categories)}
        if len(class_of) != len(categories):
            raise UserError(f"data: {file} has a category id twice")
        if len(class_of) != num_classes:
            raise UserError(f"data: {file} has {len(class_of)} categories, but num_classes={num_classes}")
        pictures = _pictures(file, content, class_of, training)
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"data: {file} is no COCO instances file: an entry is damaged or lacks {error}") from error
    if not pictures:
        raise UserError(f"data: {file} has no images" + (" with objects" if training else ""))
    _check_files(folder, file, pictures)
    ids, names = zip(*categories)
    return CocoSplit(file, folder, PackedList(pictures), ids, names)


def read_json(file: Path) -> dict[str, Any]:
    """A COCO file's content: images, annotations, categories.

    Raises:
        UserError: no such file, no JSON, or a list that is missing.
    """
    if not file.is_file():
        raise UserError(f"data: no file {file}")
    try:
        content = json.loads(file.read_bytes())
    except ValueError as error:
        raise UserError(f"data: {file} is no JSON ({error})") from error
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise UserError(f"data: {file} is no COCO instances file: it has no list {key!r}")
    return content


def _pictures(file: Path, content: dict[str, Any], class_of: dict[int, int], training: bool) -> list[Picture]:
    objects: dict[int, list[tuple[int, Segmentation]]] = {int(image["id"]): [] for image in content["images"]}
    for annotation in content["annotations"]:
        image_id, category = annotation["image_id"], annotation["category_id"]
        if image_id not in objects or category not in class_of:
            name = f"image_id {image_id}" if image_id not in objects else f"category_id {category}"
            raise UserError(f"data: {file}: annotation {annotation.get('id')} has the unknown {name}")
        width, height = annotation["bbox"][2:]
        if annotation.get("iscrowd", 0) or (training and min(width, height) <= 0):
            continue
        segmentation = annotation["segmentation"]
        if not _is_segmentation(segmentation):
            raise UserError(f"data: {file}: annotation {annotation.get('id')} has a segmentation that is no polygons and no RLE")
        objects[image_id].append((class_of[category], segmentation))
    pictures = []
    for image in content["images"]:
        own = objects[int(image["id"])]
        if own or not training:
            classes, segmentations = tuple(k for k, _ in own), tuple(s for _, s in own)
            size = int(image["width"]), int(image["height"])
            pictures.append(Picture(int(image["id"]), str(image["file_name"]), *size, classes, segmentations))
    return pictures


def _is_segmentation(value: Any) -> bool:
    """Polygons, lists of x and y in turn, or an RLE."""
    if isinstance(value, dict):
        return {"counts", "size"} <= set(value)
    return isinstance(value, list) and all(isinstance(polygon, list) and len(polygon) % 2 == 0 for polygon in value)


def _check_files(folder: Path, file: Path, pictures: list[Picture]) -> None:
    """One listing instead of 118,000 questions; names below subfolders are asked for one by one."""
    listed = {entry.name for entry in os.scandir(folder)}
    missing = [p.file_name for p in pictures if p.file_name not in listed and not (folder / p.file_name).is_file()]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"data: {file.name} names {missing[0]}{more}, which {folder} does not hold")
