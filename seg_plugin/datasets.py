"""The data sets: where each keeps its images and masks, in MMSegmentation's words, and which protocol it has.

Your own folders are ``images/{training,validation}`` and ``annotations/{training,validation}`` (or ``train``,
``val``, ``masks``). All images have one suffix, and each has a mask of its name, an 8-bit PNG.
``classes.txt`` is optional, with one class name a line.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import mmseg.datasets

from pretrain.errors import UserError
from seg_plugin.protocol import OWN, SegmentationProtocol, protocol, with_overrides

SPLITS = ("training", "validation")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
Pair = tuple[str, str]  # of training and of validation


@dataclass(frozen=True)
class Layout:
    """Folders below the root, and the suffixes of their files.

    Attributes:
        lists: files that list a split's names, one a line, without suffix; empty: all files of the folder.
    """

    images: Pair = ("images/training", "images/validation")
    masks: Pair = ("annotations/training", "annotations/validation")
    lists: Pair = ("", "")
    image_suffix: str = ".jpg"
    mask_suffix: str = ".png"


@dataclass(frozen=True)
class Dataset:
    """A data set by name.

    Attributes:
        protocol: the name of its protocol.
        kind: MMSegmentation's class, which knows the classes and their colors.
        counts: images of training and validation; None: not known.
        inside: folders that it may be in, below the given folder.
        mark: what is in its root and in no other data set's.
    """

    protocol: str
    kind: str
    layout: Layout
    counts: tuple[int, int] | None
    inside: tuple[str, ...] = ()
    mark: str = ""

    @property
    def classes(self) -> tuple[str, ...]:
        """Names, in the order of the labels; empty for your own data."""
        return tuple(getattr(mmseg.datasets, self.kind).METAINFO.get("classes", ()))


def _voc(masks: str, names: str) -> Layout:
    lists = (f"ImageSets/Segmentation/{names}.txt", "ImageSets/Segmentation/val.txt")
    return Layout(("JPEGImages", "JPEGImages"), (masks, "SegmentationClass"), lists)


_CITYSCAPES = Layout(
    ("leftImg8bit/train", "leftImg8bit/val"),
    ("gtFine/train", "gtFine/val"),
    image_suffix="_leftImg8bit.png",
    mask_suffix="_gtFine_labelTrainIds.png",  # of cityscapesScripts' createTrainIdLabelImgs
)
_IN_VOC = ("VOC2012", "VOCdevkit/VOC2012")
# Folders and counts are from MMSegmentation's configs and the data sets' own descriptions. `voc_aug` has the
# masks of SBD, as MMSegmentation's tools/dataset_converters/voc_aug.py writes them; where SBD has none, copy
# that of SegmentationClass there.
DATASETS = {
    "ade20k": Dataset(
        "ade20k-160k", "ADE20KDataset", Layout(), (20_210, 2_000), ("ADEChallengeData2016",), "images/*/ADE_*"
    ),
    "voc": Dataset(
        "voc2012-40k",
        "PascalVOCDataset",
        _voc("SegmentationClass", "train"),
        (1_464, 1_449),
        _IN_VOC,
        "JPEGImages",
    ),
    "voc_aug": Dataset(
        "voc2012aug-40k",
        "PascalVOCDataset",
        _voc("SegmentationClassAug", "trainaug"),
        (10_582, 1_449),
        _IN_VOC,
    ),
    "cityscapes": Dataset(
        "cityscapes-80k", "CityscapesDataset", _CITYSCAPES, (2_975, 500), (), "leftImg8bit"
    ),
    "own": Dataset(OWN, "BaseSegDataset", Layout(), None),
}


def dataset_of(recipe: SegmentationProtocol) -> Dataset:
    """The data set of a protocol."""
    return next(dataset for dataset in DATASETS.values() if dataset.protocol == recipe.name)


def recipe_for(folder: str | Path, name: str | None, overrides: Mapping[str, str]) -> SegmentationProtocol:
    """The protocol of a data set, with some fields changed.

    Args:
        folder: of the data set.
        name: a key of :data:`DATASETS`; None: what the folder looks like, else your own data.
        overrides: field -> text. Without ``num_classes``, the names in ``classes.txt`` of your own data are
            counted.

    Raises:
        UserError: an unknown name or field; nothing says the number of classes.
    """
    if name is None:
        if not Path(folder).is_dir():
            raise UserError(f"data: there is no folder {folder}")
        found = (
            key
            for key, dataset in DATASETS.items()
            if dataset.mark and any(find_root(folder, dataset).glob(dataset.mark))
        )
        name = next(found, "own")
    if name not in DATASETS:
        raise UserError(f"dataset: {name!r} is none of {', '.join(DATASETS)}")
    if name == "own" and "num_classes" not in overrides:
        names = _listed(Path(folder))
        if not names:
            raise UserError(
                f"data: how many classes has {folder}? Give num_classes=N, or their names in classes.txt, one a line"
            )
        overrides = {**overrides, "num_classes": str(len(names))}
    return with_overrides(protocol(DATASETS[name].protocol), overrides)


def find_root(folder: str | Path, dataset: Dataset) -> Path:
    """The data set's own folder: this one, or one inside with the name that the data set is distributed
    with."""
    inside = (Path(folder) / name for name in dataset.inside)
    return next((path for path in inside if path.is_dir()), Path(folder))


@dataclass(frozen=True)
class Located:
    """A data set on disk.

    Attributes:
        classes: names, in the order of the labels.
    """

    root: Path
    layout: Layout
    classes: tuple[str, ...]

    def pairs(self, split: str) -> list[tuple[Path, Path]]:
        """(image, mask) of a split, sorted by name.

        Raises:
            UserError: a folder or list is missing or empty, or an image or mask lacks the other; names it.
        """
        layout, index = self.layout, SPLITS.index(split)
        images, masks = self.root / layout.images[index], self.root / layout.masks[index]
        names = image_names(self.root, layout, split)
        if not names:
            raise UserError(f"data: no *{layout.image_suffix} in {images}")
        pairs = [
            (images / (name + layout.image_suffix), masks / (name + layout.mask_suffix)) for name in names
        ]
        for image, mask in pairs:
            if not image.is_file():
                raise UserError(f"data: no image {image}, which {self.root / layout.lists[index]} lists")
            if not mask.is_file():
                raise UserError(f"data: {image} has no mask {mask}")
        if not layout.lists[index] and (
            alone := set(masks.rglob(f"*{layout.mask_suffix}")) - {mask for _, mask in pairs}
        ):
            raise UserError(f"data: {min(alone)} has no image in {images}")
        return pairs


def locate(folder: str | Path, recipe: SegmentationProtocol) -> Located:
    """Find a data set and check that every image has its mask and every mask its image.

    Raises:
        UserError: as :meth:`Located.pairs`; your own images have several suffixes; class names do not fit.
    """
    dataset = dataset_of(recipe)
    root = find_root(folder, dataset)
    layout = own_layout(root) if recipe.name == OWN else dataset.layout
    located = Located(root, layout, class_names(recipe, root))
    for split in SPLITS:
        located.pairs(split)
    return located


def image_names(root: Path, layout: Layout, split: str) -> list[str]:
    """Sorted names of a split's images, without suffix: those of its list, or all in its folder and below."""
    index = SPLITS.index(split)
    folder, names = root / layout.images[index], root / layout.lists[index]  # without a list, the root
    for needed in (folder, names):
        if not needed.exists():
            raise UserError(f"data: no {needed}")
    if layout.lists[index]:
        return sorted(line.strip() for line in names.read_text(encoding="utf-8").splitlines())
    found = (path.relative_to(folder).as_posix() for path in folder.rglob(f"*{layout.image_suffix}"))
    return sorted(name.removesuffix(layout.image_suffix) for name in found)


def own_layout(root: Path) -> Layout:
    """The layout of your own folders.

    Raises:
        UserError: a folder is missing or ambiguous, or there are several suffixes; names them.
    """
    training = _only(root / "images", ("training", "train"))
    validation = _only(root / "images", ("validation", "val"))
    masks = _only(root, ("annotations", "masks"))
    found: dict[str, Path] = {}
    for split in (training, validation):
        for path in sorted((root / "images" / split).rglob("*")):
            if path.suffix.lower() in IMAGE_SUFFIXES:
                found.setdefault(path.suffix, path)
    if len(found) != 1:
        which = (
            " and ".join(map(str, found.values())) or f"no {', '.join(IMAGE_SUFFIXES)} in {root / 'images'}"
        )
        raise UserError(f"data: images must have one suffix; there {'are' if found else 'is'} {which}")
    folders = [(f"{kind}/{training}", f"{kind}/{validation}") for kind in ("images", masks)]
    return Layout(folders[0], folders[1], image_suffix=next(iter(found)))


def _only(folder: Path, names: Pair) -> str:
    there = [name for name in names if (folder / name).is_dir()]
    if len(there) != 1:
        raise UserError(
            f"data: {folder} must hold a folder {names[0]} or {names[1]}; there {'are both' if there else 'is none'}"
        )
    return there[0]


def class_names(recipe: SegmentationProtocol, root: Path | None = None) -> tuple[str, ...]:
    """Those of ``root/classes.txt``; or the data set's, if there are as many; or ``class 0``, ``class 1``,
    ..."""
    names = _listed(root) if root else ()
    if names and (len(names) != recipe.num_classes or len(set(names)) != len(names)):
        told = f"{len(set(names))} different names, but num_classes is {recipe.num_classes}"
        raise UserError(f"data: {root}/classes.txt has {told}")
    known = dataset_of(recipe).classes
    return names or (
        known if len(known) == recipe.num_classes else tuple(f"class {k}" for k in range(recipe.num_classes))
    )


def _listed(root: Path) -> tuple[str, ...]:
    file = root / "classes.txt"
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return tuple(line.strip() for line in lines if line.strip())
