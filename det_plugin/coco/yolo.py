"""YOLO: one .txt file an image, a line an object: ``class x y width height`` (the center), or a polygon, ``class x1
y1 x2 y2 ...``, in shares of the image's width and height.

Where the images are, and what the classes are called, say a ``data.yaml`` (``path``, ``train``, ``val``, ``test``:
folders, or lists of files; ``names``: a list, or a mapping of the numbers in use), darknet's ``obj.data``, or the
folders: ``images/{train,val}``, ``{train,valid}/images``, or ``images/`` alone, with ``classes.txt`` or ``obj.names``.
Paths of another machine are found by their ends. The labels of ``a/images/b.jpg`` are ``a/labels/b.txt``, or stand
beside the image. An image without a file has no objects, as everywhere with YOLO.

An image's size is its header's, as it is shown (EXIF). Category ids are the numbers of the classes. A box alone has
no segmentation; of a polygon the box is its extent. With ``kpt_shape``, or where all lines look so, lines hold a box
and key points. Key points, the numbers of tracks (CVAT's) and the angle of oriented boxes are not learned, and that
is said.
"""

import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from det_plugin.coco.content import (
    ALONE,
    DAMAGED,
    FEWEST_BOXES,
    SPLIT_NAMES,
    UNKNOWN,
    UNLABELED,
    Content,
    Stamp,
    field_shown,
    is_image,
    listed,
    read_once,
    split_folders,
    stem_of,
    sub_folder,
    upright_sizes,
)
from pretrain.errors import UserError
from pretrain.files import read_lines, read_plain
from pretrain.settings import MAX_YAML_BYTES, shown, without_content

NAME_FILES = (
    "classes.txt",
    "obj.names",
    "classes.names",
    "predefined_classes.txt",
    "labels.txt",
    "names.txt",
    "_darknet.labels",
)
SPLITS = {split: (*names, "dev") if split == "val" else names for split, names in SPLIT_NAMES.items()}
POINTS = "label lines with key points, of which the box alone is read"
TRACKS = "label lines with the number of a track at their end, which is left aside"
ORIENTED = (
    "oriented boxes: the masks are of their four corners, the boxes upright (masks=off learns these alone)"
)
LOOKED_AT = 500  # label files of a split, to see whether they hold key points
FARTHEST = 2.0  # of a coordinate from the image, in its widths: beyond are pixels, or damage


@dataclass(frozen=True)
class Part:
    """The images of a split.

    Attributes:
        file: the folder or the list that says which they are.
        images: the folder that their names are relative to.
        pictures: {name below it: (its stamp, its label file or "", the stamp of that)}.
        absent: lines of a list that name no image, and label files of two images.
        alone: label files in these folders that belong to no image.
    """

    file: Path
    images: Path
    pictures: dict[str, tuple[Stamp, str, Stamp]]
    absent: list[str] = field(default_factory=list)
    alone: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Found:
    """A set: the file that describes it or its folder, the names of its classes, and its splits by our names."""

    file: Path
    names: dict[int, str]
    parts: dict[str, Part]


class NoNames(UserError):
    """A folder with labels somewhere below, and nothing that names their classes."""


def description(root: Path) -> Path | None:
    """The .yaml or .data file in a folder that describes a YOLO set."""
    files = sorted(root.glob("*.y*ml"), key=lambda file: (file.stem != "data", file.stem != "dataset", file))
    for file in files:
        told = read_yaml(file) if file.stem in ("data", "dataset") else _or_nothing(file)
        if describes(told):
            return file
    return next((file for file in sorted(root.glob("*.data")) if "names" in _read_darknet(file)), None)


def describes(told: Mapping[str, Any]) -> bool:
    """Whether the content of a .yaml file is a YOLO set's."""
    is_coco = any(isinstance(told.get(split), dict) for split in ("train", "val"))
    return "names" in told and not is_coco and not {"train", "val", "test", "path"}.isdisjoint(told)


def read_yaml(file: Path) -> dict[str, Any]:
    """A mapping whose scalars are text, so that a class may be called ``no`` or ``2024-10-01``.

    Raises:
        UserError: it cannot be read, is too large, too deep, or no YAML; names it.
    """
    try:
        told = yaml.load(read_plain(file, MAX_YAML_BYTES), yaml.BaseLoader)
    except (OSError, yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"data: {file} is no YAML ({without_content(error)})") from error
    return told if isinstance(told, dict) else {}


def _or_nothing(file: Path) -> dict[str, Any]:
    """Any other .yaml file in the folder need not be of the set."""
    try:
        return read_yaml(file)
    except UserError:
        return {}


def _read_darknet(file: Path) -> dict[str, Any]:
    lines = (line.partition("=") for line in file.read_text(errors="replace").splitlines()[:100])
    return {key.strip(): value.strip() for key, equals, value in lines if equals}


def find(root: Path) -> Found | None:
    """The set in a folder, or that a .yaml file describes; None if there is none.

    Raises:
        UserError: what describes it is damaged, or names a folder or a list that is not there.
    """
    file = root if root.is_file() else description(root)
    if file is None:
        return _by_folders(root)
    told, folder = _read_darknet(file) if file.suffix == ".data" else read_yaml(file), file.parent
    told = {**{key.lower(): value for key, value in told.items() if isinstance(key, str)}, **told}
    names = told.get("names")
    if file.suffix == ".data":
        names = _lines(_here(str(names), [folder], f"data: {file}: names"))
    bases, path = [folder], told.get("path")
    if isinstance(path, str) and path:
        bases += [at for at in (folder / path, Path(path)) if at.is_dir() and at not in bases]
    entries = dict[str, list[Path]]()
    for split, keys in SPLITS.items():
        value: Any = next((told[key] for key in keys if told.get(key)), [])
        paths = value if isinstance(value, list) else [value]
        try:
            entries[split] = [_here(str(path), bases, f"data: {file}: {split}") for path in paths]
        except UserError:
            if split != "test":
                raise
    kept = {split: own for split, own in entries.items() if own}
    if not kept and isinstance(other := told.get("default"), str):  # CVAT's name of no split
        kept = {"all": [_here(other, bases, f"data: {file}: default")]}
    if not kept:
        raise UserError(f"data: {file} names no images; give train: FOLDER, and val: FOLDER")
    if "train" in kept and kept["train"] == kept.get(
        "val"
    ):  # as COCO128 has it: nothing is kept for validation
        kept = {"all": kept["train"]}
    labels = _Folders()
    parts = _with_images({split: _part(own, bases, labels) for split, own in kept.items()})
    _check_labels(parts, file)
    return Found(file, _names(names, file), _with_alone(parts, labels))


def _with_images(parts: dict[str, Part]) -> dict[str, Part]:
    """Without empty folders, as exports have them for splits that nobody made."""
    return {split: part for split, part in parts.items() if part.pictures or part.absent} or parts


def _check_labels(parts: Mapping[str, Part], file: Path) -> None:
    """Refuse a described set in which no image has a label file.

    Raises:
        UserError: says where the first image's is looked for.
    """
    pictures = [(part, *each) for part in parts.values() for each in part.pictures.items()]
    if pictures and not any(label for _, _, (_, label, _) in pictures):
        image = pictures[0][0].images / pictures[0][1]
        where = f"{image.with_suffix('.txt')} or with labels/ in place of images/"
        raise UserError(f"data: {file}: no image has a label file; that of the first would be {where}")


def _by_folders(root: Path) -> Found | None:
    """Without a description: folders of images with labels, and a list of names."""
    images = sub_folder(root, ("images", "obj_train_data"))
    folders = split_folders(images) if images else {}
    folders = (
        folders
        or {split: sub_folder(at, ("images",)) or at for split, at in split_folders(root).items()}
        or {"all": images or root}
    )
    labels = _Folders()
    parts = {split: _part([at], [root], labels) for split, at in folders.items()}
    if not any(label for part in parts.values() for _, label, _ in part.pictures.values()):
        return None
    places = [root, root / "labels", *folders.values(), *map(Path, labels.label_folders.values())]
    files = _name_files(places, labels.used)
    if not files:
        told = (
            f"the names of its classes: give a {NAME_FILES[0]} with a name a line, or a data.yaml with names"
        )
        raise NoNames(f"data: {root} holds labels as YOLO's, but not {told}")
    names = {file: _names(_lines(file), file) for file in files}
    file, *others = files
    for other in others:
        if names[other] != names[file]:
            raise UserError(
                f"data: {file} and {other} name other classes, so the numbers differ; give a data.yaml"
            )
    return Found(root, names[file], _with_alone(_with_images(parts), labels))


def _name_files(places: Iterable[Path], labels: set[str]) -> list[Path]:
    """The file of names in each folder that has one; those of images called so are none."""
    found = []
    for at in dict.fromkeys(places):
        named = (at / name for name in NAME_FILES)
        found += [
            file
            for file in (*named, *sorted(at.glob("*.names")))
            if file.is_file() and str(file) not in labels
        ][:1]
    return found


def stamp_of(found: Found) -> int:
    """A number that is another one when a file is."""
    every = (
        (name, part.images, *part.absent, *part.alone, *part.pictures.items())
        for name, part in found.parts.items()
    )
    return hash((found.file, *found.names.items(), *every))


def read(root: Path, split: str, stamp: int) -> Content:
    """COCO content of a split of :func:`find`, whose stamp it was."""

    def read_all() -> dict[str, Content]:
        found = find(root)
        assert found is not None, root
        with_points = _points_of(found)
        return {name: _content(part, found.names, with_points) for name, part in found.parts.items()}

    return read_once(("yolo", root, stamp), split, read_all)


def _points_of(found: Found) -> Callable[[list[str]], bool]:
    """Whether a line holds a box and key points: where it is said, or where all long lines look so."""
    if found.file.suffix in (".yaml", ".yml") and "kpt_shape" in read_yaml(found.file):
        return lambda words: len(words) > 5
    labels = [[label for _, label, _ in part.pictures.values() if label] for part in found.parts.values()]
    first = (label for own in labels for label in own[:LOOKED_AT])
    lines = (words for label in first for _, words in _numbered(label, defaultdict(list)))
    looks = [_is_with_points(words) for words in lines if len(words) > 6]
    return _is_with_points if len(looks) >= FEWEST_BOXES and all(looks) else lambda words: False


# --- where everything is ----------------------------------------------------------------------------------


def _here(told: str, bases: Sequence[Path], what: str) -> Path:
    """A path of a description: below one of the folders, as it is, or by its end; it may be of another machine.

    Raises:
        UserError: there is none.
    """
    parts = [part for part in told.replace("\\", "/").split("/") if part not in ("", ".")]
    inside = [part for part in parts if part != ".."]
    for begin in range(len(inside) + 1):
        for base in bases:
            at = base.joinpath(*inside[begin:])
            if begin < len(inside) or not inside:
                if at.exists():
                    return at
        if not begin:
            whole = [Path(told.replace("\\", "/")), *(base.joinpath(*parts) for base in bases)]
            for at in whole[0 if whole[0].is_absolute() else 1 :]:
                if at.exists():
                    return at
    raise UserError(
        f"{what}: {shown(told)} is no folder and no list of images here; mend the path, or remove "
        "it where the export has none"
    )


class _Folders:
    """Folders that are listed once, and which label files belong to images."""

    def __init__(self) -> None:
        self.listings: dict[str, dict[str, Stamp]] = {}
        self.label_folders: dict[str, str] = {}
        self.used = set[str]()

    def files(self, folder: str) -> dict[str, Stamp]:
        """Of a folder, not of those below."""
        if folder not in self.listings:
            self.listings[folder] = listed(folder, deep=False) if os.path.isdir(folder) else {}
        return self.listings[folder]

    def labels_of(self, folder: str, base: str) -> str:
        """Where the label files of a folder of images are: the last ``images`` below the base is ``labels``."""
        if folder not in self.label_folders:
            parts = os.path.relpath(folder, base).split(os.sep)
            last = max((i for i, part in enumerate(parts) if part.lower() == "images"), default=-1)
            other = os.path.join(base, *parts[:last], "labels", *parts[last + 1 :])
            self.label_folders[folder] = other if last >= 0 and os.path.isdir(other) else folder
        return self.label_folders[folder]

    def label(self, folder: str, name: str, base: str) -> tuple[str, Stamp]:
        """The label file of an image, empty if there is none."""
        at = self.labels_of(folder, base)
        path, stamp = f"{at}/{(own := stem_of(name) + '.txt')}", self.files(at).get(own)
        if stamp is None:
            return "", (0, 0)
        self.used.add(path)
        return path, stamp

    def alone(self) -> Iterator[str]:
        """Label files that no image has."""
        for folder in sorted(set(self.label_folders.values())):
            for name in sorted(self.files(folder)):
                path = f"{folder}/{name}"
                if name.endswith(".txt") and path not in self.used and name not in NAME_FILES:
                    if "readme" not in name.lower() and stem_of(name) not in (
                        "train",
                        "val",
                        "valid",
                        "test",
                    ):
                        yield path


def _part(entries: Sequence[Path], bases: Sequence[Path], labels: _Folders) -> Part:
    """The images of some folders and lists."""
    paths, absent = dict[str, None](), list[str]()
    for entry in entries:
        if entry.is_dir():
            paths |= dict.fromkeys(f"{entry}/{name}" for name in listed(entry) if is_image(name))
        else:
            resolved = dict[str, str]()
            for number, line in enumerate(entry.read_text("utf-8", "replace").splitlines(), 1):
                if line.strip():
                    at = _listed_image(line.strip(), [entry.parent, *bases], resolved)
                    if os.path.basename(at) in labels.files(os.path.dirname(at)):
                        paths[at] = None
                    else:
                        absent.append(
                            f"{entry}:{number}: no image {shown(line.strip())}; export with images, or add them"
                        )
    folders = [str(entry) for entry in entries]
    if len(folders) > 1 or not entries[0].is_dir():
        folders = [str(bases[0]), *sorted({os.path.dirname(path) for path in paths})]
    images, found = os.path.commonpath([os.path.abspath(at) for at in folders]), {}
    places = dict[str, tuple[str, str]]()  # of a folder: the base, and its path below the folder of images
    for path in paths:
        folder, name = os.path.split(path)
        if folder not in places:
            base = next((str(base) for base in bases if Path(folder).is_relative_to(base)), images)
            inside = os.path.relpath(folder, images).replace(os.sep, "/")
            places[folder] = base, "" if inside == "." else f"{inside}/"
        base, inside = places[folder]
        found[inside + name] = (labels.files(folder).get(name, (0, 0)), *labels.label(folder, name, base))
    of_label = Counter(label for _, label, _ in found.values() if label)
    shared = [
        f"{label}: {n} images of this name, but one label file; rename one"
        for label, n in of_label.items()
        if n > 1
    ]
    absent += shared
    return Part(entries[0], Path(images), dict(sorted(found.items())), absent)


def _listed_image(line: str, bases: Sequence[Path], resolved: dict[str, str]) -> str:
    """The path of an image in a list. Each folder is looked for once."""
    folder, _, name = line.replace("\\", "/").rpartition("/")
    if folder not in resolved:
        try:
            resolved[folder] = str(_here(folder, bases, ""))
        except UserError:
            resolved[folder] = folder or str(bases[0])
    return os.path.join(resolved[folder], name)


def _with_alone(parts: dict[str, Part], labels: _Folders) -> dict[str, Part]:
    """All splits, the first with the label files that have no image in any."""
    first = next(iter(parts))
    own = parts[first]
    return {**parts, first: replace(own, alone=list(labels.alone()))}


def _lines(file: Path) -> list[str]:
    """The names in a file, one a line.

    Raises:
        UserError: it cannot be read; a line between is empty, so that the numbers of the next are unclear.
    """
    try:
        lines = read_lines(file)
    except (OSError, ValueError) as error:
        raise UserError(f"data: {file}: {getattr(error, 'strerror', None) or error}") from error
    if "" in lines:
        raise UserError(
            f"data: {file}:{lines.index('') + 1}: an empty line; give a name a line, without gaps"
        )
    return lines


def _names(told: Any, file: Path) -> dict[int, str]:
    """{number of a class: its name}."""
    pairs = enumerate(told) if isinstance(told, list) else told.items() if isinstance(told, dict) else ()
    names = {str(number).strip(): name for number, name in pairs}
    if not names or not all(
        key.isascii() and key.isdigit() and isinstance(n, str) for key, n in names.items()
    ):
        raise UserError(
            f"data: {file}: names must be a list of names, or numbers and names (0: cat), not {shown(told)}"
        )
    return dict(sorted((int(number), name) for number, name in names.items()))


# --- labels -----------------------------------------------------------------------------------------------


def _content(part: Part, names: Mapping[int, str], with_points: Callable[[list[str]], bool]) -> Content:
    faults = defaultdict[str, list[str]](list, {DAMAGED: list(part.absent), ALONE: list(part.alone)})
    sizes = upright_sizes(part.images / name for name in part.pictures)
    images, annotations = list[dict[str, Any]](), list[dict[str, Any]]()
    for (image_id, (name, (_, label, _))), size in zip(enumerate(part.pictures.items(), 1), sizes):
        width, height = size or (1, 1)  # an unreadable image is named when it is opened
        images.append({"id": image_id, "file_name": name, "width": width, "height": height})
        if not label:
            faults[UNLABELED].append(name)
            continue
        for number, words in _numbered(label, faults):
            who = f"{label}:{number}"
            try:
                category, values = _numbers(words)
                values, left = _without_more(words, values, with_points(words))
                box, polygon = _shape(words, values, width, height)
            except ValueError as error:
                faults[DAMAGED].append(f"{who}: {error}")
                continue
            if category not in names:
                faults[UNKNOWN].append(f"{who}: class {category}")
                continue
            if left:
                faults[left].append(who)
            whole = {"id": len(annotations) + 1, "image_id": image_id, "category_id": category, "bbox": box}
            # a polygon's area is its mask's, which the evaluation computes
            more = (
                {"iscrowd": 0, "segmentation": [polygon]}
                if polygon
                else {"area": box[2] * box[3], "iscrowd": 0}
            )
            annotations.append({**whole, **more})
    faults[ORIENTED] = _oriented(annotations, part)
    categories = [{"id": id, "name": name} for id, name in names.items()]
    kept = {kind: own for kind, own in faults.items() if own}
    return {"images": images, "annotations": annotations, "categories": categories, "faults": kept}


def _oriented(annotations: Sequence[Mapping[str, Any]], part: Part) -> list[str]:
    """The images with polygons, where all have four corners and not all are upright: exports of oriented boxes."""
    polygons = [(each["image_id"], each["segmentation"][0]) for each in annotations if "segmentation" in each]
    if any(len(polygon) != 8 for _, polygon in polygons):
        return []
    turned = [
        id
        for id, xy in polygons
        if len({round(x) for x in xy[::2]}) > 2 or len({round(y) for y in xy[1::2]}) > 2
    ]
    names = list(part.pictures)
    return [names[id - 1] for id in turned]


def _numbered(file: str, faults: dict[str, list[str]]) -> list[tuple[int, list[str]]]:
    """The words of the lines that are not empty, with the lines' numbers."""
    try:
        text = Path(file).read_text("utf-8-sig")
    except (OSError, ValueError) as error:
        faults[DAMAGED].append(f"{file}: {getattr(error, 'strerror', None) or 'no text in UTF-8'}")
        return []
    return [(number, words) for number, line in enumerate(text.splitlines(), 1) if (words := line.split())]


def _is_with_points(words: list[str]) -> bool:
    """Whether a line is a class, a box, and points with a flag (0 hidden, 1, 2 visible)."""
    flags = [re.sub(r"\.0+$", "", word) for word in words[7::3]]
    return len(words) > 7 and len(words) % 3 == 2 and all(flag in ("0", "1", "2") for flag in flags)


def _numbers(words: list[str]) -> tuple[int, list[float]]:
    """The class and what follows it.

    Raises:
        ValueError: names the field that is no such number.
    """
    values = list[float]()
    for number, word in enumerate(words, 1):
        try:
            values.append(float(word))
        except ValueError:
            raise ValueError(f"field {number}, {field_shown(word)}, is no number") from None
    if not values[0].is_integer() or values[0] < 0:
        raise ValueError(f"{field_shown(words[0])} is no number of a class")
    return int(values[0]), values[1:]


def _without_more(words: list[str], values: list[float], has_points: bool) -> tuple[list[float], str]:
    """The numbers of the box or the polygon, and the kind of what was left aside."""
    if has_points:
        return values[:4], POINTS
    if len(values) > 4 and len(values) % 2 and words[-1].isdecimal():
        return values[:-1], TRACKS
    return values, ""


def _shape(words: list[str], values: list[float], width: int, height: int) -> tuple[list[float], list[float]]:
    """Box (x, y, width, height) and polygon in pixels, empty for a box alone.

    Raises:
        ValueError: a line that is none of these; says why.
    """
    if len(values) != 4 and (len(values) < 6 or len(values) % 2):
        what = "class, x, y, width, height, or class and three or more points x, y"
        more = "; is the last a confidence? Remove it" if len(values) == 5 or len(values) > 6 else ""
        raise ValueError(f"{len(words)} numbers, not {what}{more}")
    for word, value in zip(words[1:], values):
        if not (math.isfinite(value) and abs(value - 0.5) <= FARTHEST):
            raise ValueError(f"{field_shown(word)} is not in shares of the image, from 0 to 1")
    if len(values) == 4:
        x, y, w, h = values
        if min(w, h) < 0:
            raise ValueError(f"{field_shown(words[3 if w < 0 else 4])} is no width or height")
        return [(x - w / 2) * width, (y - h / 2) * height, w * width, h * height], []
    xs, ys = [x * width for x in values[0::2]], [y * height for y in values[1::2]]
    polygon = [value for point in zip(xs, ys) for value in point]
    return [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)], polygon
