"""Any images with label maps. Values 1 .. n are classes; 0 does not count, nor does 255 if n is below 255.

The layout is ``images/{train,val}`` and ``masks/{train,val}`` (or ``training``, ``validation``;
``annotations``, ``labels``), or all images and all maps in one folder each with the lists ``train.txt`` and
``val.txt``. A map is a PNG with the name of its image. An optional ``classes.txt`` names the classes 1 .. n,
one a line. (MMSegmentation's own folders store the first class as 0, which does not count here.)
"""

from pathlib import Path

import numpy as np

from pretrain.data.datasets.label_set import LabelSet
from pretrain.data.datasets.listing import Pairs, by_stem, first_folder, listed_stems, maps_by_stem, paired
from pretrain.data.datasets.maps import UNKNOWN, read_map
from pretrain.data.images import in_threads
from pretrain.errors import UserError

LAYOUT = "images/{train,val} with {masks,annotations,labels}/{train,val}; images/, masks/ and the lists train.txt, val.txt"
MAPS = ("masks", "annotations", "labels")
PARTS = {"train": ("train", "training"), "val": ("val", "validation")}
VOID = 255


def has(root: Path) -> bool:
    """Whether the folder has a training part."""
    maps = first_folder(root, MAPS)
    if maps is None or not (root / "images").is_dir():
        return False
    return first_folder(root / "images", PARTS["train"]) is not None or (root / "train.txt").is_file()


def open_part(root: Path, part: str, n_classes: int = 0) -> LabelSet:
    """One part, sorted by name or in the order of its list; ``n_classes`` and errors as for
    ``open_label_set``."""
    names = _names(root)
    if n_classes and names and n_classes != len(names):
        raise UserError(f"n_classes={n_classes}: {root / 'classes.txt'} names {len(names)} classes")
    n_classes = n_classes or len(names) or _largest(_files(root, "train"), root)
    table = np.full(max(n_classes, VOID) + 1, UNKNOWN, np.int32)
    table[VOID] = 0
    table[: n_classes + 1] = np.arange(n_classes + 1)
    classes = names or tuple(map(str, range(1, n_classes + 1)))
    return LabelSet(root.resolve().name, part, classes, _files(root, part), table, part)


def _files(root: Path, part: str) -> Pairs:
    maps = first_folder(root, MAPS)
    if maps is None:
        raise UserError(f"{root} has no folder {', '.join(MAPS)}")
    images = root / "images"
    if (within := first_folder(images, PARTS[part])) is not None:
        maps_within = first_folder(maps, PARTS[part])
        if maps_within is None:
            raise UserError(f"{maps} has no folder {' or '.join(PARTS[part])}, which {images} has")
        return paired(by_stem(within), maps_by_stem(maps_within))
    file = root / f"{part}.txt"
    if not file.is_file():
        raise UserError(f"{root} has neither images/{' or images/'.join(PARTS[part])} nor {file.name}")
    return paired(by_stem(images), maps_by_stem(maps), listed_stems(file), file)


def _names(root: Path) -> tuple[str, ...]:
    file = root / "classes.txt"
    if not file.is_file():
        return ()
    try:
        names = tuple(line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip())
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is no readable list of classes ({error})") from error
    if len(set(names)) < len(names) or not names:
        raise UserError(f"{file} names {len(set(names))} different classes in {len(names)} lines")
    return names


def _largest(files: Pairs, root: Path) -> int:
    """The largest value in the maps other than 255."""

    def largest(pair: tuple[str, str]) -> int:
        values = read_map(Path(pair[1]))
        return int(values[values != VOID].max(initial=0))

    most = max(in_threads(largest, files))
    if most == 0:
        raise UserError(f"no pixel of the {len(files)} training maps of {root} has a class")
    return most
