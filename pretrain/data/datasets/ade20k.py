"""ADE20K (SceneParse150, ``ADEChallengeData2016``): 150 classes, stored as 1 .. 150. Pixels without a class
(0) do not count."""

from importlib.resources import files
from pathlib import Path

import numpy as np

from pretrain.data.datasets.label_set import LabelSet
from pretrain.data.datasets.listing import by_stem, maps_by_stem, paired
from pretrain.errors import UserError

HOME = "ADEChallengeData2016"
LAYOUT = HOME + "/{images,annotations}/{training,validation}"
PARTS = {"train": "training", "val": "validation"}


def is_named(root: Path) -> bool:
    """Whether the name of the folder or of its files says ADE20K: other sets have the same sub-folders."""
    home = _home(root)
    if not (home / "annotations" / "validation").is_dir():
        return False
    return (
        HOME in (home.name, home.resolve().name)
        or next(home.glob("images/validation/ADE_*"), None) is not None
    )


def open_part(root: Path, part: str) -> LabelSet:
    """One part of the set, in the order of the file names; errors are those of ``open_label_set``."""
    home = _home(root)
    for folder in (home / kind / PARTS[part] for kind in ("images", "annotations")):
        if not folder.is_dir():
            raise UserError(f"{root} is no ADE20K: no folder {folder} ({LAYOUT})")
    pairs = paired(by_stem(home / "images" / PARTS[part]), maps_by_stem(home / "annotations" / PARTS[part]))
    names = tuple(files(__package__).joinpath("ade20k_classes.txt").read_text(encoding="utf-8").splitlines())
    return LabelSet("ade20k", part, names, pairs, np.arange(len(names) + 1, dtype=np.int32), PARTS[part])


def _home(root: Path) -> Path:
    return root / HOME if (root / HOME).is_dir() else root
