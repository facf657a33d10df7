"""What is in a detection set, and everything odd in it, of any format; nothing is changed.

It reads what a training reads (:mod:`det_plugin.coco.layout`), but goes on where a training ends, and looks at all
files: their headers, their names in all splits, and the content of those of equal size.
"""

import io
import logging
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from det_plugin.coco.annotations import MOST_CROWDS, Data
from det_plugin.coco.content import (
    ALONE,
    HEADER_READERS,
    UNKNOWN,
    UNLABELED,
    UNREADABLE,
    Content,
    is_image,
    listed,
    misread,
    swaps_sides,
)
from det_plugin.coco.layout import ONE_SPLIT, CocoFiles, has_one_split, in_words, splits
from det_plugin.coco.masks import as_rle, coco_api
from det_plugin.coco.metrics import check_evaluation
from det_plugin.figures import draw_entries
from det_plugin.train import settings_of
from pretrain.data.broken import may_be_cut_off
from pretrain.data.check import Odd, Report, common, in_two_splits
from pretrain.data.decode import BrokenImage, decode
from pretrain.errors import UserError
from pretrain.settings import shown

EDGE_PX = 1.0  # by which a box may leave its image: rounding, and pixels counted from 1
# By how much a box may differ from its mask's: pixels, and of its longer side
DIFFERS_PX, DIFFERS_SHARE = 2.0, 0.05
TRIED_SHARE = 0.2  # of a set of one split
ALL_CROWDS = "categories all of whose RLEs are crowds (as CVAT has objects: --crowds objects)"
DISAGREE = "boxes that disagree with their masks (learned are the masks' boxes, evaluated these)"


@dataclass
class Split:
    """One split, as far as its entries can be used: images by id, and their objects.

    Attributes:
        sizes: {image id: stated width, height}; (0, 0) where none is stated.
        objects: (annotation, image id, category id, box x, y, width, height) with known image and four numbers.
    """

    name: str
    files: CocoFiles
    content: Content
    names: dict[int, str] = field(default_factory=dict)
    sizes: dict[int, tuple[int, int]] = field(default_factory=dict)
    classes: dict[int, str] = field(default_factory=dict)
    objects: list[tuple[dict[str, Any], int, int, list[float]]] = field(default_factory=list)

    @property
    def images(self) -> dict[str, Path]:
        """{name: file}."""
        return {name: self.files.images / name for name in self.names.values()}


def check(data: Path, crowds: str = "ignored", val_share: float = 0.0) -> Report:
    """Look at a set.

    Raises:
        UserError: there is none, or a file that describes it cannot be read.
    """
    found = [_usable(name, files, files.content()) for name, files in splits(data).items()]
    odd = [each for split in found for each in [*_of_entries(split), *_of_boxes(split), *_of_files(split)]]
    odd += [*_unnamed(found), *in_two_splits({split.name: split.images for split in found})]
    notes = []
    if has_one_split(data) and not val_share:
        notes.append(f"there is one split alone: {ONE_SPLIT} (done so below)")
        val_share = TRIED_SHARE
    notes += _of_wrong_boxes(found, odd)
    refused, said = _tried(data, crowds, val_share)
    first = in_words((split.name, split.files, len(split.names)) for split in found)
    odd, sizes = [each for each in odd if each.names], _sizes_in_words(found)
    return Report(data, "posfield detect", found, first, *_counts(found), sizes, odd, refused, notes + said)


def _of_wrong_boxes(found: Sequence[Split], odd: Sequence[Odd]) -> list[str]:
    """A warning where most boxes are not their masks'."""
    wrong = sum(len(each.names) for each in odd if each.what == DISAGREE)
    total = sum(bool(each.get("segmentation")) for split in found for each, *_ in split.objects)
    if wrong <= total / 2:
        return []
    told = f"{wrong} of {total} boxes are not their masks'"
    return [f"warning: {told}, so box AP will mean little; write each bbox anew from its segmentation"]


def _tried(data: Path, crowds: str, val_share: float) -> tuple[str, list[str]]:
    """What a training's own checks say: why not, or its notes."""
    logging.disable(logging.INFO)  # of which this report is the longer form
    try:
        fields = {"crowds": crowds, "val_share": val_share}
        run = settings_of("vit_tiny_patch16", None, data, Path(), "coco-12ep", fields)
        read = Data.read(data, run.protocol)
        check_evaluation(read.val, run.protocol)
    except UserError as error:
        return str(error), []
    finally:
        logging.disable(logging.NOTSET)
    told = [f"{name}: {note}" for name in ("train", "val") for note in getattr(read, name).notes]
    told = [note for note in told if ALONE not in note and UNLABELED not in note]  # each is odd above
    said = "boxes are learned alone, since no object has a mask" if run.protocol.masks == "off" else ""
    sizes = f"a training takes {len(read.train.pictures)} images, its evaluation {len(read.val.pictures)}"
    return "", [*told, *([said] if said else []), sizes]


def _usable(name: str, files: CocoFiles, content: Content) -> Split:
    split = Split(name, files, content)
    for image in content["images"]:
        if (
            isinstance(image, dict)
            and type(image.get("id")) is int
            and isinstance(image.get("file_name"), str)
        ):
            split.names[image["id"]] = image["file_name"]
            size = image.get("width"), image.get("height")
            split.sizes[image["id"]] = size if all(type(n) is int and n > 0 for n in size) else (0, 0)  # type: ignore
    for category in content["categories"]:
        if isinstance(category, dict) and type(category.get("id")) is int:
            split.classes[category["id"]] = str(category.get("name"))
    for each in content["annotations"]:
        if isinstance(each, dict) and type(each.get("image_id")) is int and each["image_id"] in split.names:
            box, category = each.get("bbox"), each.get("category_id")
            if isinstance(box, list) and len(box) == 4 and all(type(v) in (int, float) for v in box):
                split.objects.append((each, each["image_id"], category if type(category) is int else -1, box))
    return split


# --- entries ----------------------------------------------------------------------------------------------


def _of_entries(split: Split) -> Iterable[Odd]:
    content, named = split.content, split.names
    for kind, names in content.get("faults", {}).items():
        yield Odd(kind, split.name, names)
    for key, what in (("images", "image"), ("annotations", "annotation"), ("categories", "category")):
        ids = Counter(str(each.get("id")) for each in content[key] if isinstance(each, dict))
        yield Odd(f"{what} ids that stand twice", split.name, [id for id, n in ids.items() if n > 1])
    classes = [str(each.get("name")) for each in content["categories"] if isinstance(each, dict)]
    twice = [name for name, n in Counter(classes).items() if n > 1]
    yield Odd("category names that stand twice", split.name, twice)
    twice = [name for name, n in Counter(named.values()).items() if n > 1]
    yield Odd("file names that stand twice", split.name, twice)
    annotations = [each for each in content["annotations"] if isinstance(each, dict)]
    unknown = [each for each in annotations if not _is_known(each.get("category_id"), split.classes)]
    whose = [f"annotation {each.get('id')}: category {shown(each.get('category_id'))}" for each in unknown]
    yield Odd(UNKNOWN, split.name, whose)
    unknown = [each for each in annotations if not _is_known(each.get("image_id"), named)]
    whose = [f"annotation {each.get('id')}: image {shown(each.get('image_id'))}" for each in unknown]
    yield Odd("objects of an unknown image", split.name, whose)
    used = {category for _, _, category, _ in split.objects}
    groups = {str(each.get("supercategory")) for each in content["categories"] if isinstance(each, dict)}
    unused = [name for id, name in split.classes.items() if id not in used]
    unused = [
        f"{name} (the name of a group, as Roboflow adds it)" if name in groups else name for name in unused
    ]
    yield Odd("categories without objects", split.name, unused)
    with_objects = {image for _, image, _, _ in split.objects}
    yield Odd("images without objects", split.name, [n for id, n in named.items() if id not in with_objects])
    yield Odd(ALL_CROWDS, split.name, _all_crowds(split))


def _all_crowds(split: Split) -> list[str]:
    """Categories whose RLEs are all crowds, and more than a few of their objects: an export's way."""
    total, rles, crowds = (
        Counter(category for _, _, category, _ in split.objects),
        *(Counter[int]() for _ in "12"),
    )
    for each, _, category, _ in split.objects:
        if isinstance(each.get("segmentation"), dict):
            rles[category] += 1
            crowds[category] += each.get("iscrowd") == 1
    return [
        split.classes.get(c, str(c)) for c, n in rles.items() if n == crowds[c] and n > MOST_CROWDS * total[c]
    ]


def _is_known(id: Any, named: Mapping[int, str]) -> bool:
    return type(id) is int and id in named


# --- boxes and masks --------------------------------------------------------------------------------------


def _of_boxes(split: Split) -> Iterable[Odd]:
    if not split.objects:
        return
    boxes = np.array([box for *_, box in split.objects], float)  # [N, 4]
    sizes = np.array([split.sizes[image] for _, image, _, _ in split.objects], float)  # [N, 2]
    whose = [f"{split.names[image]} (annotation {each.get('id')})" for each, image, _, _ in split.objects]

    def of(chosen: Any) -> list[str]:
        return [whose[i] for i in np.flatnonzero(chosen)]

    far, said = boxes[:, :2] + boxes[:, 2:], sizes.min(axis=1) > 0
    finite = np.isfinite(boxes).all(axis=1)
    yield Odd("boxes with numbers that are none", split.name, of(~finite))
    wrong = misread(boxes[said & finite], sizes[said & finite])
    if wrong:
        yield Odd(f"boxes that are no x, y, width, height in pixels ({wrong})", split.name, of(said & finite))
    flat = (boxes[:, 2:] <= 0).any(axis=1)
    outside = said & ~flat & ((boxes[:, :2] >= sizes) | (far <= 0)).any(axis=1)
    leave = said & ~flat & ~outside & ((boxes[:, :2] < -EDGE_PX) | (far > sizes + EDGE_PX)).any(axis=1)
    yield Odd("boxes without area", split.name, of(flat))
    yield Odd("boxes outside their image", split.name, of(outside))
    yield Odd("boxes that leave their image", split.name, of(leave))
    masks = np.array([_extent(each, *split.sizes[image]) for each, image, _, _ in split.objects])  # [N, 4]
    corners = np.concatenate([boxes[:, :2], far], axis=1)
    may = DIFFERS_PX + DIFFERS_SHARE * boxes[:, 2:].max(axis=1)
    yield Odd(DISAGREE, split.name, of(np.abs(corners - masks).max(axis=1) > may))
    same = Counter((image, category, tuple(box)) for _, image, category, box in split.objects)
    twice = [split.names[image] for (image, *_), n in same.items() if n > 1]
    yield Odd("objects that stand twice, with the same box", split.name, twice)


def _extent(annotation: Mapping[str, Any], width: int, height: int) -> list[float]:
    """A mask's x0, y0, x1, y1; not numbers without a mask that can be read."""
    shape = annotation.get("segmentation")
    try:
        if isinstance(shape, dict) and list(shape["size"]) == [height, width]:
            x, y, w, h = coco_api().mask.toBbox(as_rle(shape, height, width)).tolist()
            return [x, y, x + w, y + h]
        if isinstance(shape, list) and shape and all(len(polygon) >= 6 for polygon in shape):
            xs, ys = (np.concatenate([polygon[axis::2] for polygon in shape]) for axis in (0, 1))
            return [float(xs.min()), float(ys.min()), float(xs.max()), float(ys.max())]
    except (KeyError, TypeError, ValueError, IndexError):
        pass  # the training's own reading names it
    return [np.nan] * 4


# --- files ------------------------------------------------------------------------------------------------


def _of_files(split: Split) -> Iterable[Odd]:
    ids = list(split.names)
    with ThreadPoolExecutor(HEADER_READERS) as pool:
        states = list(pool.map(lambda id: _state(split.files.images / split.names[id], split.sizes[id]), ids))
    found = defaultdict[str, list[str]](list)
    for id, state in zip(ids, states):
        for kind, text in state.items():
            found[kind].append(f"{split.names[id]}{text}")
    for kind in sorted(found):
        yield Odd(kind, split.name, found[kind])


def _state(path: Path, said: tuple[int, int]) -> dict[str, str]:
    """What is odd about a file: {kind: more on it}."""
    if not path.is_file():
        return {"images missing": ""}
    try:
        with open(path, "rb") as file:
            with Image.open(file) as image:
                size, is_swapped = image.size, swaps_sides(image)
            is_cut_off = may_be_cut_off(file)
        if is_cut_off:
            decode(path.read_bytes())
    except (*UNREADABLE, BrokenImage):
        return {"unreadable images": ""}
    size, odd = size[::-1] if is_swapped else size, dict[str, str]()
    if is_swapped:
        odd["images whose EXIF orientation swaps width and height"] = ""
    if min(said) > 0 and size != said:
        odd["images of another size than stated"] = f" ({size[0]} x {size[1]}, not {said[0]} x {said[1]})"
    return odd


def _unnamed(found: Sequence[Split]) -> Iterable[Odd]:
    """Images in COCO's folders that no file names; the other formats' readers tell theirs."""
    folders = defaultdict[Path, list[Split]](list)
    for split in found:
        if split.files.format == "COCO":
            folders[split.files.images].append(split)
    for folder, own in folders.items():
        if folder.is_dir():
            known = {os.path.normpath(name) for split in own for name in split.names.values()}
            others = [at for at in folders if at != folder and folder in at.parents]
            below = {str(at.relative_to(folder)) for at in others}
            free = (name for name in listed(folder) if is_image(name) and name not in known)
            left = [name for name in free if not any(name.startswith(f"{at}/") for at in below)]
            yield Odd("images that no label names", "+".join(split.name for split in own), left)


# --- what there is ----------------------------------------------------------------------------------------


def _counts(own: Sequence[Split]) -> tuple[list[str], list[list[Any]]]:
    """Heads and rows of a table: images, objects, crowds, and objects of each class, by split."""
    heads = ["", *(split.name for split in own)]
    crowds = [sum(each.get("iscrowd") == 1 for each, *_ in split.objects) for split in own]
    masks = [sum(bool(each.get("segmentation")) for each, *_ in split.objects) for split in own]
    rows = [
        ["images", *(len(split.names) for split in own)],
        ["objects", *(len(split.objects) for split in own)],
        ["of these with a mask", *masks],
        ["of these crowds (difficult)", *crowds],
    ]
    of_class = [Counter(category for _, _, category, _ in split.objects) for split in own]
    ids = {id: name for split in own for id, name in split.classes.items()}
    rows += [[f"class {name}", *(numbers[id] for numbers in of_class)] for id, name in sorted(ids.items())]
    return heads, rows


def _sizes_in_words(own: Sequence[Split]) -> str:
    """The sizes of all images, and of their objects."""
    images = common(size for split in own for size in split.sizes.values())
    sides = [box[2] * box[3] for split in own for *_, box in split.objects if min(box[2:]) > 0]
    if not sides:
        return f"images {images}"
    low, middle, high = np.sqrt(np.quantile(sides, (0.05, 0.5, 0.95))).round().astype(int)
    return f"images {images} pixels; objects {low}, {middle} (median) to {high} pixels wide (5 to 95 %)"


# --- samples ----------------------------------------------------------------------------------------------


def pictures(report: Report, count: int) -> list[dict[str, Any]]:
    """``count`` images of all splits, evenly, and the first with an odd box of each kind; drawn."""
    having = [
        (split, id)
        for split in report.splits
        for id in dict.fromkeys(image for _, image, _, _ in split.objects)
    ]
    if not having or not count:
        return []
    chosen = [
        having[i] for i in np.unique(np.linspace(0, len(having) - 1, count).round().astype(int)).tolist()
    ]
    odd = {
        (each.split, each.names[0].partition(" (annotation")[0])
        for each in report.odd
        if "boxes" in each.what
    }
    first = [(split, id) for split, id in having if (split.name, split.names[id]) in odd]
    drawn = list[dict[str, Any]]()
    for split, id in dict.fromkeys((s.name, i) for s, i in [*first[:count], *chosen]):
        own = next(each for each in report.splits if each.name == split)
        png = picture(own, id)
        if png is not None:
            n = sum(image == id for _, image, _, _ in own.objects)
            drawn.append({"title": own.names[id], "caption": f"{split}, {n} objects", "png": png})
    return drawn


def picture(split: Split, id: int) -> bytes | None:
    """A PNG of an image with its objects; None where it cannot be read."""
    try:
        pixels = decode((split.files.images / split.names[id]).read_bytes())
    except (*UNREADABLE, BrokenImage):
        return None
    own = [(each, category, box) for each, image, category, box in split.objects if image == id]
    file = io.BytesIO()
    Image.fromarray(draw_entries(pixels, own, split.classes)).save(file, "PNG")
    return file.getvalue()
