"""Where a COCO-format data set keeps its annotations and images. Nothing has to be copied, renamed or
converted.

* COCO 2017: ``annotations/instances_{train,val}2017.json`` and ``{train,val}2017/``;
* an export with both in one folder (Roboflow's): ``{train,valid}/_annotations.coco.json`` beside the images;
* plain: ``annotations/{train,val}.json`` or ``annotations/instances_{train,val}.json``, and ``{train,val}/``;
* any other: a .yaml file with ``train: {annotations: FILE, images: FOLDER}`` and the same for ``val``,
  relative to that file.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pretrain.errors import UserError
from pretrain.files import read_plain
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


@dataclass(frozen=True)
class CocoFiles:
    """A split's annotation file, and the folder that its image names are relative to."""

    annotations: Path
    images: Path


def locate(data: str | Path, split: str) -> CocoFiles:
    """The files of a split. Both exist.

    Args:
        data: the root of one of the layouts above, or a .yaml file.
        split: ``train`` | ``val``, which of ``valid`` and ``test`` is ``valid``.

    Raises:
        UserError: a file or folder is missing; names it.
    """
    assert split in LAYOUTS, split
    data = Path(data)
    if data.is_file():
        found = _named(data, split)
    elif data.is_dir():
        found = _laid_out(data, split)
    else:
        raise UserError(f"data: no file {data} and no folder of that name")
    if not found.annotations.is_file():
        raise UserError(f"data: no file {found.annotations}")
    if not found.images.is_dir():
        raise UserError(f"data: no folder {found.images} for the images of {found.annotations}")
    return found


def _laid_out(root: Path, split: str) -> CocoFiles:
    for annotations, images in LAYOUTS[split]:
        if (root / annotations).is_file():
            return CocoFiles(root / annotations, root / images)
    names = ", ".join(annotations for annotations, _ in LAYOUTS[split])
    told = f"none of {names} (a .yaml file may name others)"
    raise UserError(f"data: {root} has no file for the split {split!r}: {told}")


def _named(file: Path, split: str) -> CocoFiles:
    example = f"{split}: {{annotations: FILE, images: FOLDER}}"
    if file.suffix not in (".yaml", ".yml"):
        raise UserError(f"data: {file} is neither a folder nor a .yaml file with {example}")
    try:
        content = yaml.safe_load(read_plain(file, MAX_YAML_BYTES))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"data: {file} is no YAML ({without_content(error)})") from error
    entry: Any = content.get(split) if isinstance(content, dict) else None
    kinds = {key: type(value) for key, value in entry.items()} if isinstance(entry, dict) else {}
    if kinds != {"annotations": str, "images": str}:
        raise UserError(f"data: {file} must hold {example}")
    return CocoFiles(file.parent / entry["annotations"], file.parent / entry["images"])
