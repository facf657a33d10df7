"""ADE20K, Pascal VOC 2012 and Cityscapes, as their owners distribute them.

* ADE20K (SceneParse150, ``ADEChallengeData2016``): 150 classes, stored as 1 .. 150; 0 ("other") does not count.
* Pascal VOC 2012: 21 classes, the background (0) among them; the border (255) does not count. Training uses
  ``trainaug``, 10,582 images, as do all published figures of linear and in-context segmentation (Leopart, NeCo,
  Hummingbird): VOC's own 1,464 and the annotations of SBD (Hariharan et al. 2011).
* Cityscapes: 19 classes, in the maps that cityscapesScripts' createTrainIdLabelImgs writes; 255 does not count.
"""

from importlib.resources import files
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pretrain.data.datasets.label_set import LabelSet
from pretrain.data.datasets.listing import MAP_SUFFIXES, by_stem, first_folder, listed_stems, named, paired
from pretrain.data.datasets.maps import UNKNOWN
from pretrain.errors import UserError

VOID = 255


def _from_zero(n_classes: int) -> NDArray[np.int32]:
    """The table of maps that hold 0 .. n - 1, and 255 for what does not count."""
    table = np.full(256, UNKNOWN, np.int32)
    table[:n_classes] = np.arange(1, n_classes + 1)
    table[VOID] = 0
    return table


# --- ADE20K -----------------------------------------------------------------------------------------------

ADE_HOME = "ADEChallengeData2016"
ADE_LAYOUT = ADE_HOME + "/{images,annotations}/{training,validation}"
ADE_PARTS = {"train": "training", "val": "validation"}


def ade_home(root: Path) -> Path:
    """The folder of ADE20K: ``root``, or the one inside."""
    return root / ADE_HOME if (root / ADE_HOME).is_dir() else root


def is_ade(root: Path) -> bool:
    """Whether the name of the folder or of its files says ADE20K: other sets have the same sub-folders."""
    home = ade_home(root)
    is_named = ADE_HOME in (home.name, home.resolve().name) or any(home.glob("images/validation/ADE_*"))
    return is_named and (home / "annotations" / "validation").is_dir()


def open_ade(root: Path, part: str) -> LabelSet:
    """One part of ADE20K, in the order of the file names; errors are those of ``open_label_set``."""
    images, maps = (ade_home(root) / kind / ADE_PARTS[part] for kind in ("images", "annotations"))
    if missing := [folder for folder in (images, maps) if not folder.is_dir()]:
        raise UserError(f"{root} is no ADE20K: no folder {missing[0]} ({ADE_LAYOUT})")
    names = tuple(files(__package__).joinpath("ade20k_classes.txt").read_text(encoding="utf-8").splitlines())
    table = np.arange(len(names) + 1, dtype=np.int32)
    pairs = paired(by_stem(images), by_stem(maps, MAP_SUFFIXES))
    return LabelSet("ade20k", part, names, pairs, table, ADE_PARTS[part], folder=str(images))


# --- Cityscapes -------------------------------------------------------------------------------------------

CITYSCAPES_LAYOUT = "{leftImg8bit,gtFine}/{train,val}/CITY"
CITYSCAPES = (
    "road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation", "terrain",
    "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle",
)  # fmt: skip


def open_cityscapes(root: Path, part: str) -> LabelSet:
    """One part of Cityscapes, sorted by city; errors are those of ``open_label_set``."""
    folder, train_ids = root / "leftImg8bit" / part, "{stem}_gtFine_labelTrainIds"
    maps = named(by_stem(root / "gtFine" / part, MAP_SUFFIXES), train_ids)
    if not maps:
        made_by = "cityscapesScripts' createTrainIdLabelImgs makes them"
        raise UserError(f"no {train_ids.format(stem='*')}.png in {root / 'gtFine' / part}: {made_by}")
    pairs = paired(named(by_stem(folder, (".png",)), "{stem}_leftImg8bit"), maps)
    table = _from_zero(len(CITYSCAPES))
    return LabelSet("cityscapes", part, CITYSCAPES, pairs, table, part, folder=str(folder))


# --- Pascal VOC 2012 --------------------------------------------------------------------------------------

VOC_LAYOUT = "VOC2012/{JPEGImages,SegmentationClass,ImageSets/Segmentation}"
VOC = tuple(
    "background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person "
    "pottedplant sheep sofa train tvmonitor".split()
)
AUGMENTED = "SegmentationClassAug"
OWN_TRAIN = "VOC's own train in place of trainaug"
# The last one, with images/ and sets/: NeCo's
PLACES = (".", "VOC2012", "VOCdevkit/VOC2012", "VOCSegmentation")
LISTS = ("ImageSets/Segmentation", "ImageSets/SegmentationAug", "sets")


def voc_home(root: Path) -> Path | None:
    """The folder with ``SegmentationClass`` and its lists, if it exists."""
    homes = (root / place for place in PLACES if (root / place / "SegmentationClass").is_dir())
    return next((home for home in homes if first_folder(home, LISTS)), None)


def open_voc(root: Path, part: str, own_train: bool = False) -> LabelSet:
    """``train`` (trainaug, or else VOC's own, a departure; with ``own_train`` always) or ``val``; errors:
    ``open_label_set``."""
    home = voc_home(root)
    if home is None:
        raise UserError(f"{root} is no Pascal VOC 2012: it has no {VOC_LAYOUT}")
    images = first_folder(home, ("JPEGImages", "images"))
    if images is None:
        raise UserError(f"no folder {home}/JPEGImages")
    maps = by_stem(home / "SegmentationClass", MAP_SUFFIXES)
    stems, source = _list(home, "val"), "val"
    if part == "train":
        unseen = set(stems)
        stems, source = (_list(home, "train"), "train") if own_train else _training(home)
        if leaked := sorted(unseen.intersection(stems)):
            told = f"{len(leaked)} images of {source} are of val, too; the first: {leaked[0]}"
            raise UserError(f"{home}: {told}")
        if source != "train":
            maps |= by_stem(home / AUGMENTED, MAP_SUFFIXES)
    pairs = paired(by_stem(images, (".jpg",)), maps, stems, listed=f"the list {source}")
    departure = OWN_TRAIN if source == "train" else ""
    return LabelSet("voc2012", part, VOC, pairs, _from_zero(len(VOC)), source, departure, str(images))


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
