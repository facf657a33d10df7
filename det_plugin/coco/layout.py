"""Where a data set keeps its labels and images, and in which format. Nothing has to be copied, renamed or converted.

COCO's json:

* COCO 2017: ``annotations/instances_{train,val}2017.json`` and ``{train,val}2017/``, or ``images/`` between;
* an export with both in one folder (Roboflow's): ``{train,valid}/_annotations.coco.json`` beside the images;
* plain: ``annotations/{train,val}.json`` or ``annotations/instances_{train,val}.json``, and ``{train,val}/``;
* any other .json files of that content in the folder or in ``annotations/`` whose names say ``train`` and ``val``, or
  a single one (CVAT's ``instances_default.json``, Label Studio's ``result.json``); the images are where the names
  lead, or in ``images/``.

Pascal VOC: :mod:`det_plugin.coco.voc`. YOLO: :mod:`det_plugin.coco.yolo`. Where a folder is no set and one in it is,
that one is taken. Other formats are told by name (:mod:`det_plugin.coco.others`).

Any other layout of COCO's: a .yaml file with ``train: {annotations: FILE, images: FOLDER}`` and the same for ``val``,
relative to that file. A set of one split is divided by ``--val-share`` (:mod:`pretrain.data.share`).
"""

import json
import os
import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any
from unicodedata import normalize
from urllib.parse import unquote

import yaml

from det_plugin.coco import voc, yolo
from det_plugin.coco.content import FATAL, SPLIT_NAMES, Content, Stamp, split_folders, upright_sizes
from det_plugin.coco.mend import mend
from det_plugin.coco.others import others_told
from det_plugin.coco.share import divided
from pretrain.data.digest import hash_of, hash_of_file
from pretrain.errors import UserError
from pretrain.files import read_mapping, read_plain
from pretrain.settings import MAX_YAML_BYTES, without_content

# (annotations, images) below the root. The first whose annotations exist is taken.
LAYOUTS = {
    split: (
        (f"annotations/instances_{split}2017.json", f"{split}2017"),
        *((f"{folder}/_annotations.coco.json", folder) for folder in folders),
        (f"annotations/{split}.json", split),
        (f"annotations/instances_{split}.json", split),
    )
    for split, folders in {"train": ("train",), "val": ("valid", "val", "test")}.items()
}
# COCO's own other files; and how many names are tried to find the images
NO_INSTANCES = ("captions", "person_keypoints", "stuff", "panoptic", "image_info")
TRIED_NAMES, READ_AT_START, DEEPEST = 20, 2**16, 3
LABEL_FOLDERS = ("annotations", "annotation", "labels")
ONE_SPLIT = "give --val-share 0.2 to keep a fifth of its images for validation"


class NoLabels(UserError):
    """Nothing in a folder has one of the formats."""


@dataclass(frozen=True)
class CocoFiles:
    """A split's labels, and the folder that its image names are relative to.

    Attributes:
        annotations: the file; of other formats than COCO's the list, the description or the folder of labels.
        reader: gives the content; None: ``annotations`` is a COCO file.
        side, val_share: ``train`` | ``val`` of a set that has one split alone, and how it is divided.
    """

    annotations: Path
    images: Path
    format: str = "COCO"
    reader: Callable[[], Content] | None = None
    side: str = ""
    val_share: float = 0.0

    def content(self) -> Content:
        """COCO's content, as it is in the files, with ``faults`` of other formats beside; a new copy each time.

        Raises:
            UserError: the file cannot be read.
        """
        return self._divided(self._whole())

    def _whole(self) -> Content:
        content = read_json(self.annotations) if self.reader is None else self.reader()
        if self.format == "COCO":
            _add_sizes(content["images"], self.images)
        return content

    def _divided(self, content: Content) -> Content:
        return divided(content, self.side, self.val_share) if self.side else content

    def hash(self) -> str:
        """12 hex digits that tell the labels from others: of the file's bytes, or of what other formats give."""
        if self.reader is None:
            return hash_of_file(self.annotations)
        return hash_of(json.dumps(self.content(), sort_keys=True, default=str).encode())

    def read(self) -> Content:
        """:meth:`content` without faults that a training does not overlook.

        Raises:
            UserError: names the first, with file and line.
        """
        content = self._whole()
        bad = [f"{text} ({kind})" for kind in FATAL for text in content.get("faults", {}).get(kind, ())]
        if bad:
            more = f", and {len(bad) - 1} more: posfield data check lists them" if len(bad) > 1 else ""
            raise UserError(f"data: {bad[0]}; mend or remove it{more}")
        odd = [f"{names[0]} ({kind})" for kind, names in content.get("faults", {}).items()]
        if odd and not content["images"]:
            raise UserError(f"data: {self.annotations} has no images: {odd[0]}")
        return self._divided(content)


def locate(data: str | Path, split: str, val_share: float = 0.0) -> CocoFiles:
    """The files of a split. Both exist.

    Args:
        data: the root of one of the layouts above, or a .yaml or .json file.
        split: ``train`` | ``val``, which of ``valid`` and ``test`` is ``valid``.
        val_share: of a set with one split, for validation.

    Raises:
        UserError: a file or folder is missing; names it.
    """
    assert split in LAYOUTS, split
    data = Path(data)
    if data.is_file() and _is_named(data):
        found = _named(data, split)
    else:
        found = _of(data, split, val_share)
    if not found.annotations.exists():
        raise UserError(f"data: no file {found.annotations}")
    if not found.images.is_dir():
        raise UserError(f"data: no folder {found.images} for the images of {found.annotations}")
    return found


def _of(data: Path, split: str, val_share: float) -> CocoFiles:
    found = splits(data)
    if "val" not in found and "train" in found and "test" in found:
        found["val"] = found["test"]
    only = next((found[name] for name in ("all", "train") if name in found), None)
    if "val" in found or only is None:
        if split not in found:
            told = f"none of {_tried(split)} (a .yaml file may name others), nor of another format's"
            raise UserError(f"data: {data} has no file for the split {split!r}: {told}")
        return found[split]
    if val_share:
        return replace(only, side=split, val_share=val_share)
    if split in found:
        return found[split]
    other = f"one of {_tried(split)}" if only.format == "COCO" else f"a split {split!r}"
    raise UserError(f"data: {data} has one split alone, {only.annotations}: {ONE_SPLIT}, or add {other}")


def _tried(split: str) -> str:
    return ", ".join(annotations for annotations, _ in LAYOUTS[split])


def has_one_split(data: str | Path) -> bool:
    """Whether there is no split for validation.

    Raises:
        UserError: as :func:`locate`.
    """
    data = Path(data)
    return not (data.is_file() and _is_named(data)) and {"val", "test"}.isdisjoint(splits(data))


def splits(data: Path, deep: int = 0) -> dict[str, CocoFiles]:
    """All splits of a set: ``train``, ``val``, ``test``, or ``all`` where nothing says which.

    Raises:
        UserError: no such folder; nothing in it has one of the formats; a file that describes it is damaged.
    """
    if data.is_file():
        if _is_named(data):
            return {split: _named(data, split) for split in ("train", "val") if split in _yaml(data)}
        found = _of_json([data]) if data.suffix == ".json" else _of_yolo(data) if _is_yaml(data) else {}
        if not found:
            told = "is neither a folder nor a .yaml file with train: {annotations: FILE, images: FOLDER}"
            raise UserError(f"data: {data} {told}, or with YOLO's names, nor a COCO file")
        return found
    if not data.is_dir():
        raise UserError(f"data: no file {data} and no folder of that name")
    error: UserError | None = None
    try:
        found = _found(data)
    except yolo.NoNames as unnamed:
        found, error = {}, unnamed
    if not found and deep < DEEPEST:  # VOCdevkit/VOC2012
        found = _below(data, deep + 1)
    if not found and error is None and (told := others_told(data)):
        error = NoLabels(f"data: {told}")
    if not found:
        what = "COCO's .json, Pascal VOC's .xml or YOLO's .txt files (det_plugin/coco/layout.py lists the layouts)"
        told = f"tried {', '.join(_tried(split) for split in LAYOUTS)} (a .yaml file may name others)"
        told += "; posfield segment learns from masks that are images"
        raise error or NoLabels(f"data: {data} holds no labels that are known, {what}; {told}")
    return found


def _found(data: Path) -> dict[str, CocoFiles]:
    """The splits in a folder itself, of the first format that it has."""
    found = _laid_out(data)
    if found and "train" not in found:  # train_1.json beside val.json
        others = set(_json_files(data)) - {files.annotations for files in found.values()}
        named = _of_json(sorted(others), data).items() if others else ()
        found = {split: files for split, files in named if split != "all"} | found
    found = found or _described(data) or _of_voc(data) or _of_yolo(data)
    return found or _of_json(_json_files(data), data)


def _below(data: Path, deep: int) -> dict[str, CocoFiles]:
    """The splits of the one folder in another that is a set.

    Raises:
        UserError: several are; names them.
    """
    found = dict[Path, dict[str, CocoFiles]]()
    for at in sorted(data.iterdir()):
        if at.is_dir() and not at.name.startswith((".", "__")):
            with suppress(NoLabels, yolo.NoNames):
                found[at] = splits(at, deep)
    if len(found) > 1:
        raise UserError(f"data: {data} holds several sets; name one: {', '.join(map(str, found))}")
    return next(iter(found.values()), {})


# --- COCO -------------------------------------------------------------------------------------------------


def read_json(file: Path) -> dict[str, Any]:
    """Read a COCO file: images, annotations, categories.

    Raises:
        UserError: no such file, no JSON, or a list is missing.
    """
    content = read_mapping(file, "data")
    for key in ("images", "annotations", "categories"):
        if not isinstance(content.get(key), list):
            raise UserError(f"data: {file} is no COCO instances file: it has no list {key!r}")
    mend(content)
    return content


def _add_sizes(images: list[Any], folder: Path) -> None:
    """Width and height that are not said, by the headers; where there is none they stay unsaid."""
    unsaid = [
        each
        for each in images
        if isinstance(each, dict)
        and not (each.get("width") and each.get("height"))
        and isinstance(name := each.get("file_name"), str)
        and _is_inside(folder, name)
    ]
    for each, size in zip(unsaid, upright_sizes(folder / each["file_name"] for each in unsaid)):
        if size is not None:
            each["width"], each["height"] = size


def _laid_out(root: Path) -> dict[str, CocoFiles]:
    found = {}
    for split, layouts in LAYOUTS.items():
        for annotations, images in layouts:
            if (file := root / annotations).is_file():
                folders = root / images, root / "images" / images
                at = next((folder for folder in folders if folder.is_dir()), None)
                if at and any(_is_inside(at, name) for name in _names_at_start(file)):
                    found[split] = CocoFiles(file, at)
                elif at:  # train/a.jpg, or a path of another machine
                    found[split] = _with_images(file, [at, root / "images", root], at)
                else:
                    found[split] = _with_images(file, _image_folders(file, root, split), root / images)
                break
    test = CocoFiles(root / "test/_annotations.coco.json", root / "test")
    if test.annotations.is_file() and found.get("val") != test:
        found["test"] = test
    return found


def _json_files(root: Path) -> list[Path]:
    """In the folder, in one of annotations, and in folders of splits."""
    places = [root, *(at for name in LABEL_FOLDERS if (at := root / name).is_dir())]
    files = [file for at in [*places, *split_folders(root).values()] for file in sorted(at.glob("*.json"))]
    own = [file for file in files if not file.name.startswith(NO_INSTANCES)]
    return own or [file for file in files if file.name.startswith("person_keypoints")]  # CVAT's, with boxes


def _of_json(files: list[Path], root: Path | None = None) -> dict[str, CocoFiles]:
    """The splits of any COCO files, by their names. Other .json files are left aside.

    Raises:
        UserError: two files say the same split; names them.
    """
    found = dict[str, CocoFiles]()
    for file in files:
        if root is None and _first_names(file) is None:
            read_json(file)  # says what it is not
        if _first_names(file) is not None:
            split = _split_of(file, root) if len(files) > 1 else "all"
            if split in found:
                told = f"both are {'of no' if split == 'all' else f'the {split}'} split"
                raise UserError(
                    f"data: {found[split].annotations} and {file}: {told}; name one, or a .yaml file with both"
                )
            at = root or _root_of(file)
            found[split] = _with_images(
                file, _image_folders(file, at, split), at / "images" if (at / "images").is_dir() else at
            )
    if len(found) > 1:
        found.pop("all", None)
    if len(found) == 1 and root is not None:
        return {"all": next(iter(found.values()))} if "test" in found or "val" in found else found
    return found


def _root_of(file: Path) -> Path:
    """The set's folder, of a file that is given alone."""
    return file.parent.parent if file.parent.name in LABEL_FOLDERS else file.parent


def _split_of(file: Path, root: Path | None) -> str:
    """By the words of its name, or else of its folder's below the root."""
    for name in (file.stem, "" if file.parent == root else file.parent.name):
        words = {*re.split(r"[^a-z]+", name.lower())}
        if found := [split for split, names in SPLIT_NAMES.items() if words & {*names}]:
            return found[0]
    return "all"


def _first_names(file: Path) -> list[str] | None:
    """Some names of images in a COCO file; None of any other file."""
    status = file.stat()
    return _first_names_of(file, (status.st_mtime_ns, status.st_size))


@lru_cache(maxsize=64)
def _first_names_of(file: Path, stamp: Stamp) -> list[str] | None:
    try:
        entries = read_json(file)["images"]
    except UserError:
        return None
    names = [each.get("file_name") for each in entries[:TRIED_NAMES] if isinstance(each, dict)]
    return [name for name in names if isinstance(name, str) and name]


def _names_at_start(file: Path) -> list[str]:
    """Some names of images, without reading all of a large file."""
    with open(file, "rb") as opened:
        start = opened.read(READ_AT_START).decode("utf-8", "ignore")
    names = list[str]()
    for quoted in re.findall(r'"file_name"\s*:\s*("(?:[^"\\]|\\.)*")', start)[:TRIED_NAMES]:
        with suppress(ValueError):
            names.append(json.loads(quoted))
    return names or _first_names(file) or []


def _with_images(file: Path, folders: list[Path], otherwise: Path) -> CocoFiles:
    """A COCO file with the folder that holds most of its first images: by their names, or by what is left of these
    where they are another machine's."""
    names, best, found = _first_names(file) or [], 0, CocoFiles(file, otherwise)
    there = dict.fromkeys(at for at in folders if at.is_dir())
    for named in (None, *BASES):
        for at in there:
            n = sum(_is_inside(at, named(name) if named else name) for name in names)
            if n > best:
                reader = partial(_read_by_base, file, named) if named else None
                best, found = n, CocoFiles(file, at, reader=reader)
        if best == len(names):
            break
    return found


def _image_folders(file: Path, root: Path, split: str) -> list[Path]:
    """Where the images of a COCO file may be, the likeliest first."""
    names = *SPLIT_NAMES.get(split, ()), f"{split}2017", "default"
    places = [
        at
        for at in (file.parent / "images", file.parent / "data", root / "images", root / "data")
        if at.is_dir()
    ]
    inner = [at for place in (*places, root) for at in sorted(place.iterdir()) if at.is_dir()]
    own = [at for at in inner if at.name.lower() in names]
    return [file.parent, *own, *places, root, file.parent.parent, *inner]


def _is_inside(folder: Path, name: str) -> bool:
    is_below = not os.path.isabs(name) and ".." not in name.split("/")
    return is_below and "\0" not in name and os.path.isfile(folder / name)


def _base(name: str) -> str:
    return name.replace("\\", "/").rpartition("/")[2]


def _base_of_url(name: str) -> str:
    return _base(unquote(name.rpartition("?d=")[2].partition("?")[0]))


def _base_before_upload(name: str) -> str:
    """Without Label Studio's eight digits."""
    return re.sub(r"^[0-9a-f]{8}-", "", _base_of_url(name))


# macOS takes the accents of names apart
BASES: tuple[Callable[[str], str], ...] = (
    partial(normalize, "NFC"),
    partial(normalize, "NFD"),
    _base,
    _base_of_url,
    _base_before_upload,
)


def _read_by_base(file: Path, base: Callable[[str], str]) -> Content:
    """A COCO file whose names lead elsewhere (``..\\upload\\1\\a.jpg``, a URL), by their last parts.

    Raises:
        UserError: two images have the same; names it.
    """
    content, seen = read_json(file), set[str]()
    for image in content["images"]:
        if isinstance(image, dict) and isinstance(image.get("file_name"), str):
            image["file_name"] = name = base(image["file_name"])
            if name in seen:
                raise UserError(
                    f"data: {file} names two images {name} in folders that are not here; rename one"
                )
            seen.add(name)
    return content


# --- other formats ----------------------------------------------------------------------------------------


def _described(root: Path) -> dict[str, CocoFiles]:
    return _of_yolo(root) if yolo.description(root) else {}


def _of_voc(root: Path) -> dict[str, CocoFiles]:
    parts = voc.find(root)
    stamp = voc.stamp_of(parts)
    return {
        split: CocoFiles(part.file, part.images, "Pascal VOC", partial(voc.read, root, split, stamp))
        for split, part in parts.items()
    }


def _of_yolo(root: Path) -> dict[str, CocoFiles]:
    found = yolo.find(root)
    stamp = yolo.stamp_of(found) if found else 0
    return {
        split: CocoFiles(part.file, part.images, "YOLO", partial(yolo.read, root, split, stamp))
        for split, part in (found.parts if found else {}).items()
    }


# --- a .yaml file -----------------------------------------------------------------------------------------


def _is_yaml(file: Path) -> bool:
    return file.suffix in (".yaml", ".yml")


def _is_named(file: Path) -> bool:
    """Whether a .yaml file is none of YOLO's."""
    return _is_yaml(file) and not yolo.describes(yolo.read_yaml(file))


def _yaml(file: Path) -> Any:
    try:
        return yaml.safe_load(read_plain(file, MAX_YAML_BYTES))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"data: {file} is no YAML ({without_content(error)})") from error


def _named(file: Path, split: str) -> CocoFiles:
    example = f"{split}: {{annotations: FILE, images: FOLDER}}"
    content = _yaml(file)
    entry: Any = content.get(split) if isinstance(content, dict) else None
    kinds = {key: type(value) for key, value in entry.items()} if isinstance(entry, dict) else {}
    if kinds != {"annotations": str, "images": str}:
        raise UserError(f"data: {file} must hold {example}")
    return CocoFiles(file.parent / entry["annotations"], file.parent / entry["images"])


def in_words(named: Iterable[tuple[str, CocoFiles, int]]) -> str:
    """One line: the format, and each split with its file and number of images."""
    parts, formats = [], dict[str, None]()
    for name, files, n in named:
        formats[files.format] = None
        parts.append(f"{name} {files.annotations} ({n} images)")
        if files.side == "val":
            parts.append(f"divided by --val-share {files.val_share:g}")
    return f"{', '.join(formats)}: {', '.join(parts)}"
