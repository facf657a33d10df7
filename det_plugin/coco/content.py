"""What the readers of labels in other formats than COCO's share: folders, sizes of images, faults, and a memory.

A reader gives COCO content, with the key ``faults`` beside: what is odd in the files, ``{kind: [file:line, ...]}``;
and perhaps ``crowds``, what the format calls them.
"""

import math
import os
import pickle
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pretrain.data.sources.files import SUFFIXES
from pretrain.settings import shown

Content = dict[str, Any]  # images, annotations, categories as in COCO; faults
Stamp = tuple[int, int]  # of a file: time in ns, bytes
SPLIT_NAMES = {
    "train": ("train", "training"),
    "val": ("valid", "val", "validation"),
    "test": ("test", "testing"),
}

# Kinds of faults. With a fatal one there is no training
DAMAGED = "labels that cannot be read"
UNKNOWN = "objects of unknown class"
ALONE = "label files without an image"
UNLABELED = "images without a label file"
ROTATED_BOXES = "rotated boxes, of which the upright ones around them are learned"
FATAL = (DAMAGED, UNKNOWN)

UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # PIL's, on damaged files
ORIENTATION, ROTATED = 0x0112, (5, 6, 7, 8)  # EXIF: values that swap width and height
HEADER_READERS = 16
FEWEST_BOXES = 4  # that show a rule
LONGEST_FIELD = 40  # characters of a label that an error quotes


def swaps_sides(image: Image.Image) -> bool:
    """Whether an opened image's EXIF orientation swaps width and height."""
    return "exif" in image.info and image.getexif().get(ORIENTATION) in ROTATED


def upright_size(path: Path) -> tuple[int, int]:
    """Width and height by the header, as the image is shown.

    Raises:
        one of :data:`UNREADABLE`.
    """
    with Image.open(path) as image:
        return image.size[::-1] if swaps_sides(image) else image.size


def upright_sizes(paths: Iterable[Path]) -> list[tuple[int, int] | None]:
    """:func:`upright_size` of many, by threads; None where there is no readable header."""

    def size(path: Path) -> tuple[int, int] | None:
        try:
            return upright_size(path)
        except UNREADABLE:
            return None

    with ThreadPoolExecutor(HEADER_READERS) as pool:
        return list(pool.map(size, paths))


def is_image(name: str) -> bool:
    """By its suffix."""
    return name[name.rfind(".") :].lower() in SUFFIXES if "." in name else False


def around_rotated(box: Sequence[float], degrees: Any) -> list[float] | None:
    """The upright x, y, width, height around a box that is turned about its center; None where it is not. CVAT's
    exports hold the box before it was turned, and the angle as an attribute."""
    try:
        angle = math.radians(float(degrees))
    except (TypeError, ValueError):
        return None
    sine, cosine = abs(math.sin(angle)), abs(math.cos(angle))
    if not sine > 1e-6:  # nor a number
        return None
    x, y, width, height = box
    w, h = width * cosine + height * sine, width * sine + height * cosine
    return [x + (width - w) / 2, y + (height - h) / 2, w, h]


def field_shown(text: str) -> str:
    """A field of a label file in an error: not more of a file that may be any of this machine."""
    return shown(text if len(text) <= LONGEST_FIELD else f"{text[: LONGEST_FIELD - 3]}...")


def stem_of(name: str) -> str:
    """A path as text, without its suffix."""
    return os.path.splitext(name)[0]


def listed(folder: str | Path, deep: bool = True) -> dict[str, Stamp]:
    """The files in a folder and (``deep``) below, by their paths from there, sorted; hidden ones are left out.
    Links to folders are followed, each real folder once."""
    found, waiting, seen = dict[str, Stamp](), [("", os.path.realpath(folder))], set[str]()
    while waiting:
        inside, at = waiting.pop()
        if at in seen or not os.path.isdir(at):
            continue
        seen.add(at)
        with os.scandir(at) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    if deep:
                        waiting.append((f"{inside}{entry.name}/", os.path.realpath(entry.path)))
                elif entry.is_file():
                    status = entry.stat()
                    found[inside + entry.name] = status.st_mtime_ns, status.st_size
    return dict(sorted(found.items()))


def sub_folder(folder: Path, names: Sequence[str]) -> Path | None:
    """The first of these sub-folders, in any case of letters."""
    try:
        there = {name.lower(): name for name in sorted(os.listdir(folder), reverse=True)}
    except OSError:
        return None
    found = (folder / there[name] for name in names if name in there)
    return next((path for path in found if path.is_dir()), None)


def split_folders(folder: Path) -> dict[str, Path]:
    """Sub-folders that are named after splits, by our name of the split."""
    found = {split: sub_folder(folder, names) for split, names in SPLIT_NAMES.items()}
    return {split: path for split, path in found.items() if path is not None}


def misread(boxes: np.ndarray, sizes: np.ndarray) -> str:
    """What boxes are that are no x, y, width, height in pixels, but could be another thing; empty where they are.

    Args:
        boxes: [N, 4], of a whole split.
        sizes: [N, 2], width and height of their images.
    """
    far = boxes[:, :2] + boxes[:, 2:]  # [N, 2]
    leave = (far > sizes + 1).any(axis=1)
    as_corners = (boxes[:, 2:] > boxes[:, :2]).all(axis=1) & (boxes[:, 2:] <= sizes + 1).all(axis=1)
    if len(boxes) >= FEWEST_BOXES and leave.mean() > 0.5 and (as_corners & (boxes >= -1).all(axis=1)).all():
        told = f"{leave.sum()} of {len(boxes)} boxes leave their images as x, y, width, height, and none as corners"
        return f"{told} x0, y0, x1, y1; write x, y, x1 - x0, y1 - y0"
    if len(boxes) and 0 < boxes.max() <= 1 < sizes.min() and boxes.min() >= 0:
        return f"all {len(boxes)} boxes are within 0 and 1: shares of the image; write pixels"
    return ""


_KEPT: dict[Hashable, dict[str, bytes]] = {}


def read_once(key: Hashable, split: str, read: Callable[[], Mapping[str, Content]]) -> Content:
    """The content of a split, of what ``read`` gives for all of them; a new copy each time. A start asks for the
    labels several times, and reads them once; those of another key are forgotten."""
    if key not in _KEPT:
        _KEPT.clear()
        _KEPT[key] = {name: pickle.dumps(content, -1) for name, content in read().items()}
    content: Content = pickle.loads(_KEPT[key][split])
    return content
