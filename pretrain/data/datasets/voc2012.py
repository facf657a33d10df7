"""Pascal VOC 2012: 21 classes, including the background (stored as 0). The void border (255) does not count.

Training uses ``trainaug``, 10,582 images, as do all published figures of linear and in-context segmentation
(Leopart, NeCo, Hummingbird): VOC's own 1,464 and the annotations of SBD (Hariharan et al. 2011).
"""

from pathlib import Path

import numpy as np

from pretrain.data.datasets.label_set import LabelSet
from pretrain.data.datasets.listing import by_stem, first_folder, listed_stems, maps_by_stem, paired
from pretrain.data.datasets.maps import UNKNOWN
from pretrain.errors import UserError

LAYOUT = "VOC2012/{JPEGImages,SegmentationClass,ImageSets/Segmentation}"
CLASSES = tuple(
    "background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person pottedplant sheep "
    "sofa train tvmonitor".split()
)
VOID = 255
AUGMENTED = "SegmentationClassAug"
IMAGES = (".jpg",)
OWN_TRAIN = "VOC's own train in place of trainaug"
PLACES = (
    ".",
    "VOC2012",
    "VOCdevkit/VOC2012",
    "VOCSegmentation",
)  # the last one, with images/ and sets/: NeCo's
LISTS = ("ImageSets/Segmentation", "ImageSets/SegmentationAug", "sets")


def find(root: Path) -> Path | None:
    """The folder with ``SegmentationClass``, if it exists."""
    return next((root / place for place in PLACES if (root / place / "SegmentationClass").is_dir()), None)


def open_part(root: Path, part: str) -> LabelSet:
    """``train`` (trainaug, or else VOC's own, which is a departure) or ``val``; errors are those of
    ``open_label_set``."""
    home = find(root)
    if home is None:
        raise UserError(f"{root} is no Pascal VOC 2012: it has no {LAYOUT}")
    images = first_folder(home, ("JPEGImages", "images"))
    if images is None:
        raise UserError(f"no folder {home}/JPEGImages")
    maps = maps_by_stem(home / "SegmentationClass")
    stems, source = _list(home, "val"), "val"
    if part == "train":
        unseen, (stems, source) = set(stems), _training(home)
        if leaked := sorted(unseen.intersection(stems)):
            raise UserError(
                f"{home}: {len(leaked)} images of {source} are of val, too; the first: {leaked[0]}"
            )
        if source != "train":
            maps |= maps_by_stem(home / AUGMENTED)
    table = np.full(256, UNKNOWN, np.int32)
    table[: len(CLASSES)] = np.arange(1, len(CLASSES) + 1)
    table[VOID] = 0
    files = paired(by_stem(images, IMAGES), maps, stems, listed=f"the list {source}")
    return LabelSet("voc2012", part, CLASSES, files, table, source, OWN_TRAIN if source == "train" else "")


def _training(home: Path) -> tuple[list[str], str]:
    """Names of the training images, and the name of their list."""
    if (home / AUGMENTED).is_dir():
        for name in ("trainaug", "train_aug"):
            if (file := _find_list(home, name)) is not None:
                return listed_stems(file), "trainaug"
        if (file := _find_list(home, "aug")) is not None:  # MMSegmentation's name for what SBD adds
            return list(dict.fromkeys(_list(home, "train") + listed_stems(file))), "trainaug"
    return _list(home, "train"), "train"


def _list(home: Path, name: str) -> list[str]:
    file = _find_list(home, name)
    if file is None:
        raise UserError(f"no list {home / LISTS[0] / name}.txt")
    return listed_stems(file)


def _find_list(home: Path, name: str) -> Path | None:
    return next((file for place in LISTS if (file := home / place / f"{name}.txt").is_file()), None)
