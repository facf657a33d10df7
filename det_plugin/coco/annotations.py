"""COCO-format annotations, for both engines. They are read once and checked before the first iteration.

What is allowed, and how it is used:

* category ids with gaps, or from 0: class k is the k-th id in order; where two ids share a name, the id is
  appended to it;
* crowds: left out of training; in evaluation they are COCO's ignored regions. An image with no other objects
  is left out of training and kept in evaluation;
* images without annotations: left out of training, or with ``keep_empty`` negatives; kept in evaluation;
* objects of zero extent: left out of training; evaluation keeps every object, as COCO's own does;
* masks as polygons, compressed or uncompressed RLEs. Polygons of fewer than three points are left out. An
  object that has no others is not learned (training) and not found as a mask (evaluation);
* boxes and polygons that leave the image: training uses the part inside, evaluation uses them as annotated;
* what :mod:`det_plugin.coco.mend` puts right, and a size that is not said: it is the header's;
* a ``file_name`` in a subfolder, an absent ``supercategory``, more keys. An absent ``area`` or ``iscrowd`` is
  filled in. An ``area`` that is no number from 0 to :data:`LARGEST_PX` is replaced by the mask's, or without
  a mask the box's, and that is said; line breaks and the like in a category's name become spaces.

Objects with a box alone: with ``masks="off"`` boxes are all that is read of any object. With ``on`` they teach
boxes and no mask; with ``auto`` they are an error in training. Evaluation counts their boxes, which are ignored
regions where it counts masks.

With ``crowds="objects"``, annotations with ``iscrowd`` 1 are objects like others: CVAT marks every mask so.

These are errors that name the entry: an id that is no integer, is too large or stands twice; an ``iscrowd``
that is neither 0 nor 1 (:func:`pretrain.data.box_sets.is_crowd`); an unknown image or category
id; no mask, where masks are learned; boxes or polygons that are no numbers; an RLE that does not cover
its image; polygons that are too far, too long or cross themselves too often to be computed with; a
``file_name`` that is missing, has a line break or leads out of the folder; an image that is missing, or of
another size than stated; an unreadable image of the validation (by its header, or a JPEG or PNG without
its end). Training takes others in place of unreadable images and names them, up to a tenth of all
(:mod:`pretrain.data.broken`).
"""

import functools
import os
import pickle
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from det_plugin.coco.content import HEADER_READERS, UNREADABLE, misread, swaps_sides
from det_plugin.coco.layout import CocoFiles, in_words, locate, read_json
from det_plugin.coco.masks import Segmentation, as_rle, coco_api, crossings
from det_plugin.protocol import DetectionProtocol, n_share
from pretrain.data.box_sets import FARTHEST_PX, breaks_line, is_crowd
from pretrain.data.broken import SHARE, UnreadableImage, check_share, may_be_cut_off
from pretrain.data.decode import BrokenImage, decode
from pretrain.data.digest import hash_of
from pretrain.data.images import n_shared
from pretrain.data.share import leave_split
from pretrain.data.sources.files import read_file
from pretrain.distributed import gather_objects, rank, world_size
from pretrain.errors import UserError
from pretrain.log import log
from pretrain.settings import shown

SHARE_SEED = 0
# What a polygon may have: pycocotools walks along every edge, and shapely computes every crossing (a second)
LONGEST_PX, MOST_CROSSINGS, FEW_POINTS = 1e7, 100_000, 500
LARGEST_ID = 2**53  # COCOeval keeps ids as floats
LARGEST_PX = 1e10  # COCOeval leaves out objects of a larger area
MOST_CROWDS = 0.1  # of a category's annotations; a larger share is told (ours: in COCO, crowds are rare)


@dataclass(frozen=True)
class Picture:
    """An image and its objects, without crowds."""

    id: int
    file_name: str  # below the split's folder
    width: int
    height: int
    classes: tuple[int, ...] = ()  # contiguous, from 0
    segmentations: tuple[Segmentation, ...] = ()  # empty ones where only boxes are read
    boxes: tuple[tuple[float, ...], ...] = ()  # x0, y0, x1, y1 in pixels, as annotated
    # Empty: all. In training an object without a mask has its box as polygon, which teaches no mask.
    masked: tuple[bool, ...] = ()


class PackedList(Sequence[Picture]):
    """Many records as two arrays, which forked workers share: counting references would copy objects."""

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
    """A split: its images in the file's order, and the names of its classes."""

    file: Path
    folder: Path
    pictures: Sequence[Picture]
    category_ids: tuple[int, ...]
    class_names: tuple[str, ...]
    source: CocoFiles
    notes: tuple[str, ...] = ()  # lines about what is left out or taken in another way

    def tell(self) -> None:
        """Log the notes."""
        for note in self.notes:
            log(f"data: {self.file}: {note}")

    def load(self, picture: Picture) -> np.ndarray:
        """The pixels, [H, W, 3] uint8 RGB, upright.

        Raises:
            UnreadableImage: the image cannot be read.
            UserError: it has another size than annotated; both name it.
        """
        path = self.folder / picture.file_name
        try:
            pixels = decode(read_file(os.fsencode(path)))
        except BrokenImage as error:
            raise UnreadableImage(f"data: {path} cannot be read as an image ({error})") from error
        if pixels.shape[:2] != (picture.height, picture.width):
            found, said = f"{pixels.shape[1]} x {pixels.shape[0]}", f"{picture.width} x {picture.height}"
            is_swapped = pixels.shape[:2] == (picture.width, picture.height)
            hint = " (its EXIF orientation may swap the sides: label it as it is shown)" if is_swapped else ""
            raise UserError(f"data: {path} is {found} pixels, but {self.file.name} says {said}{hint}")
        return pixels

    def check_headers(self, allowed: float = 0.0) -> dict[str, Any]:
        """:meth:`load`, for its errors, of this rank's share of the images; reads headers, and decodes what may
        be cut off. Unreadable images are named; up to the share ``allowed`` they are no error.

        Returns:
            the digest (:mod:`pretrain.data.digest`) of the annotations, and of all ranks' images.
        """
        pool, own = ThreadPoolExecutor(HEADER_READERS), range(rank(), len(self.pictures), world_size())
        annotations = pool.submit(self.source.hash)
        try:
            found = list(pool.map(self._check_header, own))
        finally:
            pool.shutdown(cancel_futures=True)
        check_share([told for told, _ in found if told], len(own), allowed)
        sizes = np.empty(len(self.pictures), "<i8")
        for of_rank, part in enumerate(gather_objects([n_bytes for _, n_bytes in found])):
            sizes[of_rank :: world_size()] = part
        return {
            "images": len(self.pictures),
            "annotations": annotations.result(),
            "sizes": hash_of(sizes),
        }

    def _check_header(self, index: int) -> tuple[str, int]:
        """What is wrong with the file, if a training may skip it, and its size in bytes, -1 if it is missing;
        raises UserError for what a training may not skip."""
        picture, n_bytes, is_whole = self.pictures[index], -1, False
        with suppress(*UNREADABLE), open(self.folder / picture.file_name, "rb") as file:
            n_bytes = os.fstat(file.fileno()).st_size
            with Image.open(file) as image:
                size = image.size[::-1] if swaps_sides(image) else image.size
            is_whole = size == (picture.width, picture.height) and not may_be_cut_off(file)
        try:
            if not is_whole:
                self.load(picture)
        except UnreadableImage as error:
            return str(error), n_bytes
        return "", n_bytes


@dataclass(frozen=True)
class Data:
    """Both splits, which have the same classes; and the digest of each by its name."""

    train: CocoSplit
    val: CocoSplit
    digest: Mapping[str, Any]

    @staticmethod
    def read(data: Path, protocol: DetectionProtocol) -> "Data":
        """Read and check both annotation files and, by their headers, all images.

        Raises:
            UserError: a file is damaged, or the splits have different classes; names the file.
        """
        how = dict[str, Any](num_classes=protocol.num_classes, **protocol.reading)
        train = read_split(data, "train", training=True, share=protocol.train_share, **how)
        val = read_split(data, "val", training=False, **how)
        if (train.category_ids, train.class_names) != (val.category_ids, val.class_names):
            raise UserError(f"data: {train.file} and {val.file} have different categories")
        named = (("train", train), ("val", val))
        log(f"data: {in_words((name, each.source, len(each.pictures)) for name, each in named)}")
        train.tell()
        val.tell()
        # of the validation all are needed: figures of other images could not be compared
        read = Data(train, val, {"train": train.check_headers(SHARE), "val": val.check_headers()})
        if read.n_shared:
            told = f"{read.n_shared} of the {len(val.pictures)} validation images are training images, too"
            log(f"data: {told}: the numbers say less than they seem to")
        return read

    @functools.cached_property
    def n_shared(self) -> int:
        """Validation images that are training images, too."""
        names = [
            {p.file_name: str(part.folder / p.file_name) for p in part.pictures}
            for part in (self.train, self.val)
        ]
        return n_shared(*names)

    def leave_split(self, output: Path) -> None:
        """Write down how the images were divided, if they were."""
        if self.train.source.side:
            contents = (side.source.read() for side in (self.train, self.val))
            names = ([image["file_name"] for image in content["images"]] for content in contents)
            leave_split(output, self.train.source.val_share, *names)


def read_split(
    data: str | Path,
    split: str,
    *,
    num_classes: int | None,
    training: bool,
    share: float = 1.0,
    crowds: str = "ignored",
    masks: str = "auto",
    keep_empty: bool = False,
    val_share: float = 0.0,
) -> CocoSplit:
    """Read an annotation file and check it and its folder, as the module's docstring says.

    Args:
        data: a root of any layout, or a .yaml file (:mod:`det_plugin.coco.layout`).
        split: ``train`` | ``val``.
        num_classes: of the model; None: do not compare.
        training: leave out what nothing can be learned from (Detectron2's ``filter_empty``).
        share: of these images, the same in every run, in the file's order; a larger one contains a smaller.
        crowds, masks, keep_empty, val_share: fields of the protocol.

    Raises:
        UserError: names the file, the entry and the problem.
    """
    files = locate(data, split, val_share)
    file, content = files.annotations, files.read()
    try:
        names = _categories(content)
        notes = _notes(content, names, crowds)
        class_of = {id: k for k, id in enumerate(names)}
        pictures, more = _pictures(content, class_of, training, masks, keep_empty)
        odd = content.get("faults", {}).items()
        notes += (*more, *(f"{len(of)} {what}, the first: {of[0]}" for what, of in odd))
    except (KeyError, TypeError, AttributeError) as error:
        what = f"an entry is damaged or lacks {error}"
        raise UserError(f"data: {file} is no COCO instances file: {what}") from error
    except ValueError as error:
        raise UserError(f"data: {file}: {error}") from error
    if num_classes is not None and len(names) != num_classes:
        raise UserError(f"data: {file} has {len(names)} categories, but num_classes={num_classes}")
    if not any(picture.classes or not training for picture in pictures):
        raise UserError(f"data: {file} has no images" + (" with objects" if training else ""))
    if share < 1:
        ids = sorted(picture.id for picture in pictures)
        # NumPy never changes this generator's numbers
        order = np.random.RandomState(SHARE_SEED).permutation(len(ids))
        kept = {ids[i] for i in order[: n_share(len(ids), share)]}
        pictures = [picture for picture in pictures if picture.id in kept]
    _check_names(files.images, file, pictures)
    names_of = tuple(names), tuple(names.values())
    return CocoSplit(file, files.images, PackedList(pictures), *names_of, files, notes)


def read_classes(data: str | Path, split: str, val_share: float = 0.0) -> dict[int, str]:
    """Category id -> name, in the order of the classes.

    Raises:
        UserError: as :func:`read_split`.
    """
    files = locate(data, split, val_share)
    content = files.read()
    try:
        return _categories(content)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"data: {files.annotations}: its categories are damaged: {error}") from error


def lacks_masks(data: str | Path, crowds: str = "ignored", val_share: float = 0.0) -> bool:
    """Whether there are objects, but none with a mask, in both splits. Damaged entries count as objects.

    Raises:
        UserError: as :func:`read_json`.
    """
    found = False
    for split in ("val", "train"):  # the small one first: COCO's answers in a moment
        for annotation in locate(data, split, val_share).read()["annotations"]:
            try:
                if crowds == "ignored" and is_crowd(annotation):
                    continue
                if annotation.get("segmentation"):
                    return False
            except (ValueError, AttributeError):
                pass  # read_split says it
            found = True
    return found


def read_truth(source: Path | CocoFiles, crowds: str = "ignored", masks: str = "auto") -> dict[str, Any]:
    """A split's or a COCO file's content, completed so that pycocotools can evaluate every object. COCO's own stay as they are.

    Annotation ids start at 1 if one is below (``COCOeval`` takes 0 for "no match"), ``iscrowd`` and ``area``
    are filled in or mended, names are unique, and an object without a polygon of three points has an empty
    mask. Objects that only have a box are marked by ``box_alone``. ``crowds`` and ``masks`` as in
    :func:`read_split`, whose checks the file must have passed.
    """
    content = source.read() if isinstance(source, CocoFiles) else read_json(source)
    sizes = {image["id"]: (image["height"], image["width"]) for image in content["images"]}
    first = 1 - min((annotation["id"] for annotation in content["annotations"]), default=1)
    content["categories"] = [{"id": id, "name": name} for id, name in _categories(content).items()]
    truth = []
    for annotation in content["annotations"]:
        height, width = sizes[annotation["image_id"]]
        _mend_crowd(annotation, crowds)
        found = [] if masks == "off" else _segmentation(annotation, width, height)
        shape = found or {"size": [height, width], "counts": [height * width]}
        whole = {**annotation, "id": annotation["id"] + max(first, 0), "segmentation": shape}
        if masks == "off":
            del whole["segmentation"]
        elif _has_box_alone(annotation):
            whole["box_alone"] = True
        if not _is_area(annotation.get("area")):
            own = (
                coco_api().mask.area(as_rle(shape, height, width))
                if found
                else np.prod(annotation["bbox"][2:])
            )
            whole["area"] = max(float(own), 0.0)
        truth.append(whole)
    return {**content, "annotations": truth}


def _categories(content: Mapping[str, Any]) -> dict[int, str]:
    """Id -> name, sorted by id."""
    entries = content["categories"]
    _check_ids("category", entries)
    if not entries:
        raise ValueError("it has no categories")
    for entry in entries:
        if isinstance(entry["name"], list | dict):
            raise ValueError(f"the category {entry['id']} has the name {shown(entry['name'])}: no text")
    names = {
        c["id"]: "".join(" " if breaks_line(letter) else letter for letter in str(c["name"])) for c in entries
    }
    times = Counter(names.values())
    return {id: names[id] if times[names[id]] == 1 else f"{names[id]} ({id})" for id in sorted(names)}


def _check_ids(what: str, entries: Sequence[Mapping[str, Any]]) -> None:
    seen = set[int]()
    for entry in entries:
        if type(entry["id"]) is not int:
            raise ValueError(f"the {what} id {shown(entry['id'])} is no integer")
        if abs(entry["id"]) > LARGEST_ID:
            raise ValueError(f"the {what} id {shown(entry['id'])} is larger than 2 ** 53")
        if entry["id"] in seen:
            raise ValueError(f"it has {'an' if what[0] in 'ai' else 'a'} {what} id twice: {entry['id']}")
        seen.add(entry["id"])


def _pictures(
    content: Mapping[str, Any], class_of: Mapping[int, int], training: bool, masks: str, keep_empty: bool
) -> tuple[list[Picture], tuple[str, ...]]:
    """The images with their objects, and notes of what is left out.

    Raises:
        ValueError: an entry is damaged; objects that training needs have no mask.
    """
    _check_ids("image", content["images"])
    objects: dict[int, list[tuple[int, Segmentation, tuple[float, ...], bool]]] = {}
    boxes, around = list[tuple[float, ...]](), list[tuple[int, int]]()
    sizes, annotated, n_objects, n_flat, boxes_alone = {}, set[int](), 0, 0, list[int]()
    for image in content["images"]:
        width, height = image["width"], image["height"]
        if not (
            type(width) is type(height) is int and 0 < min(width, height) <= max(width, height) <= FARTHEST_PX
        ):
            raise ValueError(f"image {image['id']} is {shown(width)} x {shown(height)} pixels")
        objects[image["id"]], sizes[image["id"]] = [], (width, height)
    for annotation in content["annotations"]:
        image_id, category = annotation["image_id"], annotation["category_id"]
        if image_id not in objects or category not in class_of:
            name = (
                f"image_id {shown(image_id)}" if image_id not in objects else f"category_id {shown(category)}"
            )
            raise ValueError(f"annotation {annotation['id']} has the unknown {name}")
        annotated.add(image_id)
        x, y, width, height = _box(annotation)
        boxes.append((x, y, width, height))
        around.append(sizes[image_id])
        segmentation = [] if masks == "off" else _segmentation(annotation, *sizes[image_id])
        if annotation["iscrowd"]:
            continue
        n_objects += min(width, height) > 0
        n_flat += min(width, height) <= 0
        box = x, y, x + width, y + height
        if is_alone := masks != "off" and _has_box_alone(annotation):
            boxes_alone.append(annotation["id"])
            segmentation = [box_polygon(box)] if training else []
        if not training or (min(width, height) > 0 and (segmentation or masks == "off")):
            objects[image_id].append((class_of[category], segmentation, box, not is_alone))
    if wrong := misread(np.array(boxes, float).reshape(-1, 4), np.array(around, float).reshape(-1, 2)):
        raise ValueError(wrong)
    notes = _of_boxes_alone(boxes_alone, n_objects, training, masks)
    notes += _of_empty(objects, annotated, training, keep_empty)
    if n_flat and training:
        notes += (f"{n_flat} objects have no extent: left out of training",)
    pictures = [
        _picture(image, sizes[id], objects[id])
        for image in content["images"]
        if objects[id := image["id"]] or not training or (keep_empty and id not in annotated)
    ]
    return pictures, notes


def _picture(image: Mapping[str, Any], size: tuple[int, int], objects: Sequence[tuple[Any, ...]]) -> Picture:
    classes, segmentations, boxes, masked = zip(*objects) if objects else ((), (), (), ())
    who = image["id"], _file_name(image)
    return Picture(*who, *size, classes, segmentations, boxes, () if all(masked) else masked)


def _of_boxes_alone(ids: Sequence[int], n_objects: int, training: bool, masks: str) -> tuple[str, ...]:
    """A line about the objects without a mask, by their ids; raises ValueError where training needs it."""
    if not ids:
        return ()
    told = f"{len(ids)} of {n_objects} objects have no mask (the first: annotation {ids[0]})"
    alone = "masks=off learns the boxes of all"
    if training and len(ids) == n_objects:
        raise ValueError(f"none of {n_objects} objects has a mask ('segmentation'); {alone}")
    if training and masks == "auto":
        raise ValueError(f"{told}; {alone} and no mask, masks=on learns the boxes of all and these masks")
    if training:
        return (f"{told}: they teach boxes alone",)
    return (f"{told}: they count as boxes, and are ignored regions where masks are counted",)


def _of_empty(
    objects: Mapping[int, Sequence[Any]], annotated: set[int], training: bool, keep_empty: bool
) -> tuple[str, ...]:
    """Lines about the images without objects."""
    n_images, n_empty = len(objects), len(objects.keys() - annotated)
    n_useless = sum(not objects[id] for id in annotated)
    if not training:
        return (f"{n_empty} of {n_images} images have no objects",) if n_empty else ()
    notes = []
    if n_empty:
        other = "negatives; keep_empty=false leaves them out"
        told = other if keep_empty else "left out of training; keep_empty=true takes them as negatives"
        notes.append(f"{n_empty} of {n_images} images have no objects: {told}")
    if n_useless:
        what = "images have only objects that cannot be learned (crowds, without extent or mask)"
        notes.append(f"{n_useless} of {n_images} {what}: left out of training")
    return tuple(notes)


def box_polygon(box: Sequence[float]) -> list[float]:
    """The corners of x0, y0, x1, y1."""
    x0, y0, x1, y1 = box
    return [x0, y0, x1, y0, x1, y1, x0, y1]


def _has_box_alone(annotation: Mapping[str, Any]) -> bool:
    """Whether an object with an extent says nothing of its mask."""
    lacks = not annotation.get("segmentation") and not annotation["iscrowd"]
    return lacks and min(annotation["bbox"][2:]) > 0


def _mend_crowd(annotation: dict[str, Any], crowds: str) -> bool:
    """Set ``iscrowd`` to 0 or 1, where crowds count as objects to 0; whether it says that this is a crowd."""
    try:
        found = is_crowd(annotation)
    except ValueError as error:
        raise ValueError(f"annotation {annotation['id']} has {error}") from None
    annotation["iscrowd"] = int(found and crowds == "ignored")
    return found


def _is_area(area: Any) -> bool:
    return type(area) in (int, float) and 0 <= area <= LARGEST_PX


def _notes(content: Mapping[str, Any], names: Mapping[int, str], crowds: str) -> tuple[str, ...]:
    """Lines about areas and crowds; :func:`_mend_crowd` of all annotations."""
    _check_ids("annotation", content["annotations"])
    all_own, found, notes, mended = Counter[Any](), Counter[Any](), [], []
    as_rle, ordinary = set[Any](), set[Any]()  # categories with an RLE that is a crowd, that is none
    for annotation in content["annotations"]:
        category = annotation["category_id"]
        all_own[category] += 1
        if is_marked := _mend_crowd(annotation, crowds):
            found[category] += 1
        if isinstance(annotation.get("segmentation"), dict):
            (as_rle if is_marked else ordinary).add(category)
        if "area" in annotation and not _is_area(annotation["area"]):
            mended.append(f"the first: {shown(annotation['area'])} of annotation {annotation['id']}")
    if mended:
        notes.append(
            f"{len(mended)} areas are no number of pixels ({mended[0]}); the mask's or box's are used"
        )
    what = content.get("crowds", "crowds (iscrowd 1)")
    n, of = found.total(), f"of {all_own.total()} annotations are {what}"
    if n and crowds == "objects":
        notes.append(f"{n} {of}, taken as objects")
    elif n:
        notes.append(f"{n} {of}: left out of training, and ignored regions in evaluation")
        many = [k for k in all_own if found[k] > MOST_CROWDS * all_own[k] and k in as_rle - ordinary]
        if many:
            told = ", ".join(f"{shown(names.get(k, k))} {found[k]} of {all_own[k]}" for k in many[:5])
            rest = f" and {len(many) - 5} more" if len(many) > 5 else ""
            hint = "if these are objects, as in CVAT's exports, give --crowds objects"
            notes.append(f"warning: all RLEs of some categories are crowds ({told}{rest}); {hint}")
    return tuple(notes)


def _file_name(image: Mapping[str, Any]) -> str:
    name = image.get("file_name")
    if not isinstance(name, str) or not name:
        raise ValueError(f"image {image['id']} has no file_name")
    if any(map(breaks_line, name)):
        raise ValueError(
            f"image {image['id']}: the file_name {shown(name)} has a line break or the like; rename"
        )
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(
            f"image {image['id']}: the file_name {shown(name)} leads out of the folder of images"
        )
    return name


def _box(annotation: Mapping[str, Any]) -> tuple[float, float, float, float]:
    """An object's x, y, width, height.

    Raises:
        ValueError: it is damaged.
    """
    box = annotation["bbox"]
    try:
        x, y, width, height = box
        far, total = max(x, y, width, height, -min(box)), x + y + width + height
        if not far <= FARTHEST_PX or total != total:
            raise ValueError
        return x, y, width, height
    except (TypeError, ValueError):
        who = f"annotation {annotation['id']}"
        raise ValueError(f"{who} has the bbox {shown(box)}: not x, y, width, height") from None


def _segmentation(annotation: Mapping[str, Any], width: int, height: int) -> Segmentation:
    """An object's polygons of three or more points, or its RLE; empty if it has neither.

    Raises:
        ValueError: the mask is damaged.
    """
    value = annotation.get("segmentation")
    if not value:
        return []
    if isinstance(value, dict):
        return _rle(value, width, height, f"annotation {annotation['id']}")
    costly = list[list[float]]()
    try:
        for polygon in value:
            # of all numbers of a file: min and max are faster than abs of each
            n, far = len(polygon), max(max(polygon), -min(polygon)) if polygon else 0
            total = sum(polygon)
            if n % 2 or far > FARTHEST_PX or total != total:
                raise ValueError
            if far * n > LONGEST_PX or n > 2 * FEW_POINTS:  # at least the length of its outline, along x or y
                costly.append(polygon)
    except (TypeError, ValueError):
        what = "a segmentation that is no polygons (x, y in turn, in pixels) and no RLE"
        raise ValueError(f"annotation {annotation['id']} has {what}") from None
    if costly:
        _check_cost(costly, f"annotation {annotation['id']}")
    return [polygon for polygon in value if len(polygon) >= 6]


def _check_cost(polygons: list[list[float]], who: str) -> None:
    """Refuse polygons that would keep pycocotools or shapely busy for minutes."""
    for polygon in polygons:
        xy = np.asarray(polygon, np.float64).reshape(-1, 2)
        length = np.abs(xy - np.roll(xy, 1, axis=0)).max(axis=1).sum()
        times = crossings(xy) if len(xy) > FEW_POINTS else 0
        if length > LONGEST_PX or times > MOST_CROSSINGS:
            told = f"{len(xy)} points, {length:.0f} pixels long, that crosses itself about {times} times"
            raise ValueError(f"{who} has a polygon of {told}, which is no outline; mend or remove it")


def _rle(rle: dict[str, Any], width: int, height: int, who: str) -> Segmentation:
    """``rle``, if it covers its image; pycocotools would fill the rest from uninitialized memory."""
    try:
        size, counts = list(rle["size"]), rle["counts"]
        runs = counts if isinstance(counts, list) else run_lengths(counts)
        if not all(type(run) is int and run >= 0 for run in runs):
            raise ValueError
    except (KeyError, TypeError, ValueError, AttributeError):
        raise ValueError(f"{who} has a segmentation that is no polygons and no RLE (size, counts)") from None
    if size != [height, width]:
        raise ValueError(
            f"{who} has an RLE of size {shown(size)}, but its image is {height} high and {width} wide"
        )
    if sum(runs) != height * width:
        raise ValueError(f"{who} has an RLE of {shown(sum(runs))} pixels, but its image has {height * width}")
    return rle


def run_lengths(counts: str) -> list[int]:
    """The runs of a compressed RLE, as in COCO's ``maskApi``.

    A character holds 5 bits, the lowest first; the sixth bit says that more follow. From the fourth run on, a
    number is the difference to the run two before.

    Raises:
        ValueError: the text ends within a number.
    """
    runs: list[int] = []
    value = shift = 0
    for character in counts.encode("ascii"):
        code = character - 48
        value |= (code & 31) << shift
        shift += 5
        if not code & 32:
            value -= (code & 16) << (shift - 4)  # the sign
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    if shift:
        raise ValueError("an RLE ends within a number")
    return runs


def _check_names(folder: Path, file: Path, pictures: list[Picture]) -> None:
    """Check that the files exist, by one listing where that will do: COCO has 118,000."""
    listed, names = set(os.listdir(folder)), [picture.file_name for picture in pictures]
    missing = [name for name in names if name not in listed and not (folder / name).is_file()]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"data: {file.name} names {missing[0]}{more}, which {folder} does not hold")
