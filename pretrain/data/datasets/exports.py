"""What the values of masks mean, as the tools write it that export them.

* CVAT and Datumaro: ``labelmap.txt``, lines of ``name:r,g,b:parts:actions``; of masks of one channel line k, from 0,
  names value k (https://docs.cvat.ai/docs/dataset_management/formats/format-smask).
* Roboflow: ``_classes.csv``, in the folder or in each split's, rows of ``Pixel Value, Class``.
* CamVid and others: ``class_dict.csv``, rows of ``name,r,g,b``.
* LightlyTrain: ``config.yaml`` with ``train`` and ``val``, each with ``images`` and ``masks``, and with
  ``classes``, ``{value: name}``, and ``ignore_classes``, which do not count
  (https://docs.lightly.ai/train/0.10.0/semantic_segmentation.html).
* Ultralytics: ``data.yaml`` with ``masks_dir`` and ``names``, a list or ``{value: name}``
  (https://docs.ultralytics.com/datasets/semantic).

Paths in these files are not followed.

What they do not name is an error; 255 does not count, nor does what is called ``void``. Files of these names with
anything else in them are none of ours.
"""

import csv
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import PngImagePlugin

from pretrain.data.datasets.layout import LABELMAP, is_cvat
from pretrain.data.datasets.listing import MAP_SUFFIXES, below
from pretrain.errors import UserError
from pretrain.files import read_lines
from pretrain.settings import read_yaml

CSV, COLORS, LIGHTLY, ULTRALYTICS = "_classes.csv", "class_dict.csv", "config.yaml", "data.yaml"
WAY_ON = "write labels.yaml, which goes before it"


@dataclass(frozen=True)
class Told:
    """What a tool says.

    Attributes:
        file: that says it.
        names: {value, or color ``r,g,b``: name}.
        void: values that do not count.
    """

    file: Path
    names: dict[str, str]
    void: tuple[str, ...] = ()


def told(root: Path) -> Told | None:
    """What the folder's tool says; None: there is no such file.

    Raises:
        UserError: a file that cannot be read, or does not say what it should; two that differ.
    """
    found = [each for of in (_labelmap, _of_csv, _class_dict, _lightly, _ultralytics) if (each := of(root))]
    if len(found) > 1:
        names = " and ".join(each.file.name for each in found)
        raise UserError(f"{root} has {names}, which both say what masks mean: take one away, or {WAY_ON}")
    return found[0] if found else None


def _labelmap(root: Path) -> Told | None:
    if not is_cvat(root):
        return None
    file, names = root / LABELMAP, dict[str, str]()
    is_gray = _is_gray(root / "SegmentationClass")
    for number, line in _lines(file):
        if line and not line.startswith("#"):
            name, *more = line.rsplit(":", 3)
            value = str(len(names)) if is_gray else more[0] if more else ""
            if len(more) != 3 or not value or value in names:
                what = f"gives a second class the color {value}" if value in names else "is no name:r,g,b::"
                raise UserError(f"{file}: line {number} {what}; {WAY_ON}")
            names[value] = name
    return Told(file, names)


def _is_gray(folder: Path) -> bool:
    """Whether the first mask is of one channel without a palette."""
    for _, path in below(folder, MAP_SUFFIXES):
        try:
            with open(path, "rb") as file, PngImagePlugin.PngImageFile(file) as image:
                return image.mode not in ("RGB", "RGBA", "P")
        except (OSError, SyntaxError, ValueError):
            return False  # its reader says why
    return False


def _of_csv(root: Path) -> Told | None:
    files = [root / CSV, *(root / name / CSV for name in sorted(os.listdir(root)))]
    found = [each for each in map(_classes, filter(os.path.isfile, files)) if each]
    for each in found[1:]:
        if each.names != found[0].names:
            raise UserError(f"{found[0].file} and {each.file} name other classes: change one, or {WAY_ON}")
    return found[0] if found else None


def _classes(file: Path) -> Told | None:
    head, *rows = _rows(file) or [[]]
    if [cell.lower() for cell in head] != ["pixel value", "class"]:
        return None  # of a classification
    names = dict[str, str]()
    for number, row in enumerate(rows, 2):
        if row and (len(row) != 2 or row[0] in names):
            raise UserError(f"{file}: row {number} is no value of its own, and a class; {WAY_ON}")
        names |= dict([row]) if row else {}
    return Told(file, names)


def _class_dict(root: Path) -> Told | None:
    file = root / COLORS
    head, *rows = (_rows(file) if file.is_file() else []) or [[]]
    if head != ["name", "r", "g", "b"]:
        return None
    names = {",".join(row[1:]): row[0] for row in rows if row}
    if len(names) < sum(map(bool, rows)):
        raise UserError(f"{file}: two classes have one color; {WAY_ON}")
    return Told(file, names)


def _rows(file: Path) -> list[list[str]]:
    lines = [line for _, line in _lines(file)]
    return [[cell.strip() for cell in row] for row in csv.reader(lines, skipinitialspace=True)]


def _lightly(root: Path) -> Told | None:
    said = _yaml(file := root / LIGHTLY)
    parts = [said.get(part) for part in ("train", "val")]
    if "classes" not in said or not all(
        isinstance(of, dict) and {"images", "masks"} <= {*of} for of in parts
    ):
        return None  # any other tool's
    names, void = _by_value(file, said["classes"]), said.get("ignore_classes", [])
    if not isinstance(void, list):
        raise UserError(f"{file}: ignore_classes is no list; {WAY_ON}")
    return Told(file, {v: n for v, n in names.items() if v not in void}, tuple(map(str, void)))


def _ultralytics(root: Path) -> Told | None:
    said = _yaml(file := root / ULTRALYTICS)
    return Told(file, _by_value(file, said["names"])) if {"masks_dir", "names"} <= {*said} else None


def _yaml(file: Path) -> Mapping[str, Any]:
    """What it holds; nothing, if it cannot be read: it may be anybody's."""
    try:
        return read_yaml(file).values if file.is_file() else {}
    except UserError:
        return {}


def _by_value(file: Path, names: Any) -> dict[str, str]:
    found = {str(k): name for k, name in enumerate(names)} if isinstance(names, list) else names
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found.values()):
        raise UserError(f"{file}: its classes are no list of names, and no {{value: name}}; {WAY_ON}")
    return found


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    try:
        yield from enumerate(read_lines(file), 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{file} is no readable list of classes ({reason})") from error
