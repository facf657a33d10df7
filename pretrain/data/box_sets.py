"""Images with the boxes of their objects of any class: Pascal VOC's folders and COCO's JSON.

Both are read as in public code for object discovery (LOST, TokenCut). VOC's corners count pixels from 1 and
include the last one, so 1 is subtracted from the first corner. Difficult and truncated objects count unless
``no_hard`` drops them. COCO's crowds never count, and its boxes are rounded to whole pixels.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray

from pretrain.data.datasets.listing import listed_stems
from pretrain.errors import UserError
from pretrain.files import breaks_line, read_mapping, read_regular
from pretrain.settings import shown

MAX_XML_BYTES = 2**22
FARTHEST_PX = 1e6  # of a box's corner from the image's
FLAGS = {"1": True, "1.0": True, "true": True} | dict.fromkeys(("0", "0.0", "false", "none", ""), False)
CORNERS = ("xmin", "ymin", "xmax", "ymax")


@dataclass(frozen=True)
class BoxedImage:
    """An image file and the boxes of its objects, [n, 4] (x0, y0, x1, y1) in pixels, n at least 1."""

    path: Path
    boxes: NDArray[np.float64]


def read_boxes(
    root: str | Path, split: str = "", no_hard: bool = False, names: str | Path | None = None
) -> list[BoxedImage]:
    """The images of a set that have at least one box.

    Args:
        root: a VOC folder (``Annotations/``, ``JPEGImages/``, ``ImageSets/Main/``; or one above
            ``VOCdevkit/VOC20xx``), or a COCO root (``annotations/instances_SPLIT.json``, images in ``SPLIT/``
            or ``images/SPLIT/``).
        split: default ``trainval`` for VOC, ``val2017`` for COCO.
        no_hard: VOC: drop difficult and truncated objects, and images without others.
        names: a text file of the images to use, in its order, as
            :func:`pretrain.data.datasets.listing.listed_stems` reads it (the 20,000 images of COCO's
            train2014 that discovery is measured on are such a list).

    Raises:
        UserError: the layout is neither; a file is missing or malformed; the set lacks a listed image; no
            image has a box.
    """
    root = Path(root)
    voc, wanted = _voc_root(root), None if names is None else listed_stems(Path(names))
    if voc is not None:
        images = read_voc(voc, split or "trainval", no_hard, wanted)
    elif (root / "annotations").is_dir():
        if no_hard:
            raise UserError(f"no_hard: {root} is a COCO set, which marks no object as difficult")
        images = read_coco(root, split or "val2017", wanted)
    else:
        told = "neither Annotations/ and JPEGImages/ (Pascal VOC) nor annotations/ (COCO)"
        raise UserError(f"{root} holds {told}")
    if not images:
        raise UserError(f"no image of {root} has a box")
    return images


def _voc_root(root: Path) -> Path | None:
    places = root, *sorted(root.glob("VOCdevkit/VOC2*"))
    found = [folder for folder in places if (folder / "JPEGImages").is_dir()]
    if len(found) > 1:
        raise UserError(f"{root} holds several sets: name one of {', '.join(map(str, found))}")
    return found[0] if found else None


# --- Pascal VOC -------------------------------------------------------------------------------------------


def read_voc(
    root: Path, split: str, no_hard: bool = False, names: list[str] | None = None
) -> list[BoxedImage]:
    """The images of ``ImageSets/Main/SPLIT.txt``, or of ``names``, in order; errors: :func:`read_boxes`."""
    file = root / "ImageSets" / "Main" / f"{split}.txt"
    known = listed_stems(file)
    if names is not None and (absent := set(names) - set(known)):
        told = repr(min(absent)) if len(absent) < len(names) else "any image"
        raise UserError(f"{file} does not name {told}, which the list does")
    boxes = {name: read_voc_xml(root / "Annotations" / f"{name}.xml", no_hard) for name in names or known}
    return [BoxedImage(root / "JPEGImages" / f"{name}.jpg", of) for name, of in boxes.items() if len(of)]


class _WithoutDoctype(ElementTree.TreeBuilder):
    """Entities can expand without end, and name files."""

    def doctype(self, *_: object) -> None:
        raise ValueError("it should have no document type")


def read_xml(file: Path) -> ElementTree.Element:
    """The root element of a small XML file that has no document type; names are without namespaces.

    Raises:
        ValueError: the file cannot be read, is too large, has a document type or is no XML; says which.
    """
    try:
        content = read_regular(file, MAX_XML_BYTES)
        parser = ElementTree.XMLParser(target=_WithoutDoctype())
        parser.feed(content)
        root: ElementTree.Element = parser.close()
    except OSError as error:
        raise ValueError(error.strerror) from error
    except (ElementTree.ParseError, LookupError) as error:  # LookupError: an unknown encoding
        raise ValueError(str(error)) from error
    for element in root.iter() if root.tag.startswith("{") else ():  # of a namespace
        element.tag = element.tag.rpartition("}")[2]
    return root


def read_voc_xml(file: Path, no_hard: bool = False) -> NDArray[np.float64]:
    """Boxes [n, 4] of one annotation file, without those of an object's parts (heads, hands).

    Raises:
        UserError: the file cannot be read; names an object whose box is not valid by its number.
    """
    try:
        tree = read_xml(file)
    except ValueError as error:
        raise UserError(f"{file}: no readable annotation ({error})") from error
    boxes = []
    for number, element in enumerate(tree.findall("object"), 1):
        try:
            box = [float(element.findtext(f"bndbox/{corner}", "")) for corner in CORNERS]
        except ValueError as error:
            told = f"object {number} has no bndbox of four numbers {', '.join(CORNERS)}"
            raise UserError(f"{file}: {told}") from error
        if not all(map(math.isfinite, box)) or box[2] < box[0] or box[3] < box[1]:
            raise UserError(f"{file}: object {number} has the bndbox {box}, which is no box")
        hard = any(element.findtext(mark, "0").strip() == "1" for mark in ("difficult", "truncated"))
        if not (hard and no_hard):
            boxes.append([box[0] - 1, box[1] - 1, *box[2:]])
    return np.array(boxes, np.float64).reshape(-1, 4)


# --- COCO -------------------------------------------------------------------------------------------------


def read_coco(root: Path, split: str, names: list[str] | None = None) -> list[BoxedImage]:
    """The images of ``annotations/instances_SPLIT.json`` or of ``names``; errors: :func:`read_boxes`."""
    file = root / "annotations" / f"instances_{split}.json"
    folder = next((f for f in (root / split, root / "images" / split) if f.is_dir()), None)
    if folder is None:
        raise UserError(f"{root}: no folder {split}/ or images/{split}/")
    content = read_mapping(file, "data")
    for key in ("images", "annotations"):
        entries = content.get(key)
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise UserError(f"{file}: {key!r} is no list of objects")
    files = {_whole(file, image, "images", "id"): folder / _name(file, image) for image in content["images"]}
    boxes: dict[int, list[list[float]]] = {id: [] for id in files}
    for entry in content["annotations"]:
        image = _whole(file, entry, "annotations", "image_id")
        if image not in boxes:
            raise UserError(f"{file}: an annotation is of image {shown(image)}, which is none of its images")
        box = _coco_box(file, entry)
        try:
            is_left_out = is_crowd(entry)
        except ValueError as error:
            raise UserError(f"{file}: annotation {shown(entry.get('id'))} has {error}") from error
        if not is_left_out:
            boxes[image].append(box)
    by_name = {path.stem: id for id, path in files.items()}
    if absent := set(names or ()) - set(by_name):
        told = repr(min(absent)) if len(absent) < len(names or ()) else "at all"
        raise UserError(f"{file} has no image {told}, which the list names")
    chosen = files if names is None else [by_name[name] for name in names]
    return [BoxedImage(files[id], np.array(boxes[id], np.float64)) for id in chosen if boxes[id]]


def is_crowd(entry: Mapping[str, Any]) -> bool:
    """Whether a COCO annotation is of a crowd: ``iscrowd`` is 1 or true, as a number or as text.

    Raises:
        ValueError: it is neither that, nor 0, false, null, empty or absent.
    """
    value = entry.get("iscrowd")
    if type(value) is int and 0 <= value <= 1:  # all of COCO's
        return value == 1
    flag = FLAGS.get(str(value).strip().lower()) if isinstance(value, str | int | float | None) else None
    if flag is None:
        raise ValueError(f"the iscrowd {shown(value)}: not 0 or 1")
    return flag


def _whole(file: Path, entry: Mapping[str, Any], where: str, key: str) -> int:
    value = entry.get(key)
    if not isinstance(value, int) or isinstance(value, bool):
        raise UserError(f"{file}: {where} has an entry whose {key} is {shown(value)}, no whole number")
    return value


def _name(file: Path, image: Mapping[str, Any]) -> str:
    """The name of a file inside the folder: a downloaded file must not name others of this machine."""
    name = image.get("file_name")
    if (
        not isinstance(name, str)
        or not name
        or any(map(breaks_line, name))
        or Path(name).is_absolute()
        or ".." in Path(name).parts
    ):
        told = f"image {shown(image['id'])} has the file_name {shown(name)}"
        raise UserError(f"{file}: {told}, which is no file of the set")
    return name


def _coco_box(file: Path, entry: Mapping[str, Any]) -> list[float]:
    box = entry.get("bbox")
    given = box if isinstance(box, list) else []
    numbers = [v for v in given if isinstance(v, int | float) and abs(v) <= FARTHEST_PX]
    if not len(numbers) == len(given) == 4 or min(numbers[2:]) < 0:
        told = f"annotation {entry.get('id')} has the bbox {shown(box)}"
        raise UserError(f"{file}: {told}, which is no (x, y, width, height)")
    x, y, width, height = numbers
    return [float(round(value)) for value in (x, y, x + width, y + height)]
