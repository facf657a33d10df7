"""Where images and masks of one's own lie, found out from the names of the folders.

First of all, folders called exactly as :data:`IMAGES`, :data:`MASKS` and :data:`PARTS`; then the lists ``train.txt``
and ``val.txt``; then the first or last word of other names, whatever their case and with digits behind:
``train2017``, ``images_prepped_train``, ``train_masks`` or ``trainannot``, at most one folder deep. ``train/`` alone
holds the images of ``train_masks/``, or both, with masks called ``NAME_mask.png`` (Roboflow). CVAT and Datumaro put
lists of ``JPEGImages`` and ``SegmentationClass`` into ``ImageSets/Segmentation``, and a ``labelmap.txt`` beside, which
VOC has not.
"""

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pretrain.data.datasets.listing import IMAGE_SUFFIXES, MAP_SUFFIXES, listed_stems, named
from pretrain.errors import UserError

IMAGES = ("images", "img", "JPEGImages")
MASKS = ("masks", "annotations", "labels", "SegmentationClass")
PARTS = {"train": ("train", "training"), "val": ("val", "validation", "valid", "test")}
LAYOUT = (
    "images/{train,val} with {masks,annotations,labels,SegmentationClass}/{train,val}, or train/ and val/ around; "
    "images_train and masks_train; train/NAME.jpg with train/NAME_mask.png; images/, masks/ and the lists train.txt, "
    "val.txt; CVAT's JPEGImages/, SegmentationClass/ and labelmap.txt"
)
LABELMAP = "labelmap.txt"
ONE_SPLIT = "give --val-share 0.2 to keep a fifth of its images for validation"
_LISTS = "ImageSets/Segmentation"  # of CVAT
_WORDS = {
    IMAGES: {*map(str.lower, IMAGES), "image", "imgs"},
    MASKS: {*map(str.lower, MASKS), "mask", "annotation", "annot", "label"},
}
_JOINED = re.compile("(train|val|test)(images?|masks?|annot|labels?)")


@dataclass(frozen=True)
class Place:
    """Where the images and masks of a part lie.

    Attributes:
        images, masks: folders, which may be the same.
        listed: the list that names them, if there is one.
        is_whole: the images of both parts lie here, to be divided.
    """

    images: Path
    masks: Path
    listed: Path | None = None
    is_whole: bool = False

    def stems(self, root: Path) -> list[str] | None:
        """That the list names, in its order; None: there is no list. Errors: ``listed_stems``."""
        return None if self.listed is None else listed_stems(self.listed, whole=self.listed.parent != root)


def has(root: Path) -> bool:
    """Whether the folder has a training part, or one part to be divided."""
    return any(_training(root))


def mask_folders(root: Path) -> list[Path]:
    """That may hold masks of the training part."""
    return [masks for _, masks in _training(root)]


def is_cvat(root: Path) -> bool:
    """Whether CVAT or Datumaro has written it, in VOC's folders with labels of its own."""
    return (root / LABELMAP).is_file() and (root / "SegmentationClass").is_dir()


def find(root: Path, part: str, names: Sequence[str], is_divided: bool = False) -> Place:
    """The place of a part.

    Args:
        names: of masks, ``{stem}_mask``; the first that fits.
        is_divided: where one part alone is there, its images are of both.

    Raises:
        UserError: there is no such part, or it may be in several places; names them.
    """
    if is_divided and (whole := _whole(root, names)):
        return whole
    if place := _there(root, part, names):
        return place
    for kinds in (MASKS, IMAGES) * (not any(_there(root, other, names) for other in PARTS)):
        _one(root, kinds, _flat(root, kinds))
    told = f"{root} has neither images/{' or images/'.join(PARTS[part])} nor {part}.txt, nor another name of theirs"
    raise UserError(f"{told}: {LAYOUT}; of a set that has one part, {ONE_SPLIT}")


def _training(root: Path) -> Iterator[tuple[Path, Path]]:
    images, masks = (_of_part(root, kinds, "train") for kinds in (IMAGES, MASKS))
    images = images or (_alone(root, "train") if masks else [])
    if _list(root, "train") or not (images or masks):
        images, masks = (_flat(root, kinds) for kinds in (IMAGES, MASKS))
    yield from ((at, of) for at in images for of in masks)
    yield from ((at, at) for at in _beside(root, "train", ("{stem}_mask",)))


def _whole(root: Path, names: Sequence[str]) -> Place | None:
    """The images of a set that has one part; None: it has both."""
    there = [place for part in PARTS if (place := _there(root, part, names))]
    if len(there) > 1:
        return None
    images, masks = _flat(root, IMAGES), _flat(root, MASKS)
    if not there and images and masks:
        lists = sorted((root / _LISTS).glob("*.txt")) if is_cvat(root) else []
        if len(lists) > 1:
            told = " and ".join(file.name for file in lists)
            raise UserError(f"{root / _LISTS} has {told}: call them train.txt and val.txt, or keep one")
        there = [Place(_one(root, IMAGES, images), _one(root, MASKS, masks), next(iter(lists), None))]
    return replace(there[0], is_whole=True) if there else None


def _there(root: Path, part: str, names: Sequence[str]) -> Place | None:
    """The place of a part; None: it has no folder and no list."""
    images, masks = (_of_part(root, kinds, part) for kinds in (IMAGES, MASKS))
    if not images and (listed := _list(root, part)):
        flat, masks = _flat(root, IMAGES), masks or _flat(root, MASKS)
        return Place(_one(root, IMAGES, flat), _one(root, MASKS, masks), listed)
    is_exact = any(_exact(root, kinds, part) for kinds in (IMAGES, MASKS))
    beside = [] if is_exact else _beside(root, part, names)
    if beside and (images or masks):
        other = " and ".join(str(at.relative_to(root)) for at in [*masks, *images])
        told = f"{root} has masks beside images in {beside[0].name}, and {other}"
        raise UserError(f"{told}: take one away, so that it is clear which is meant")
    if beside:
        at = _one(root, IMAGES, beside)
        return Place(at, at)
    if not images and not (masks and (images := _alone(root, part))):
        return None
    image, mask = _one(root, IMAGES, images), _one(root, MASKS, masks or _flat(root, MASKS))
    if not masks:
        raise UserError(f"{mask} has no folder {' or '.join(PARTS[part])}, which {image.parent} has")
    return Place(image, mask)


def _one(root: Path, kinds: tuple[str, ...], found: Sequence[Path]) -> Path:
    if len(found) > 1:
        told = " and ".join(str(place.relative_to(root)) for place in found)
        raise UserError(f"{root} has {told}: take one away, so that it is clear which is meant")
    if not found:
        raise UserError(f"{root} has no folder {', '.join(kinds)}; looked for {LAYOUT}")
    return found[0]


def _list(root: Path, part: str) -> Path | None:
    """``train.txt``; of CVAT, ``Train.txt`` or ``training.txt``, too, and ``Test.txt`` where no other is."""
    if (file := root / f"{part}.txt").is_file() and _flat(root, IMAGES):
        return file
    lists = sorted((root / _LISTS).glob("*.txt")) if is_cvat(root) else []
    found = {name: at for at in lists for name in PARTS[part] if at.stem.lower() == name}
    return next((found[name] for name in PARTS[part] if name in found), None)


# --- folders ----------------------------------------------------------------------------------------------


def _flat(root: Path, kinds: tuple[str, ...]) -> list[Path]:
    return [root / kind for kind in kinds if (root / kind).is_dir()]


def _of_part(root: Path, kinds: tuple[str, ...], part: str) -> list[Path]:
    """Folders of images or masks of a part."""
    exact = _exact(root, kinds, part)
    return exact or ([] if _list(root, part) else _by_words(root, kinds, part))


def _exact(root: Path, kinds: tuple[str, ...], part: str) -> list[Path]:
    inside = [place for k in kinds for name in PARTS[part] for place in (f"{k}/{name}", f"{name}/{k}")]
    return _no_test(root, [root / place for place in inside if (root / place).is_dir()])


def _by_words(root: Path, kinds: tuple[str, ...] | None, part: str) -> list[Path]:
    """Those whose words are of the kind (None: of no kind) and the part; nothing inside of another."""
    found = list[Path]()
    for folder in _folders(root):
        if _said(folder.relative_to(root)) == (kinds, part) and folder.parent not in found:
            found.append(folder)
    return _no_test(root, found)


def _alone(root: Path, part: str) -> list[Path]:
    """``train/``, if it holds images itself."""
    return [at for at in _by_words(root, None, part) if any(_files(at, IMAGE_SUFFIXES))]


def _beside(root: Path, part: str, names: Sequence[str]) -> list[Path]:
    """``train/``, if it holds both an image and its mask."""
    return [at for at in _by_words(root, None, part) if any(_has_pair(at, name) for name in names)]


def _has_pair(folder: Path, name: str) -> bool:
    masks = named({os.path.splitext(file)[0]: file for file in _files(folder, MAP_SUFFIXES)}, name)
    has_masks = name != "{stem}" and bool(masks)
    return has_masks and any(os.path.splitext(file)[0] in masks for file in _files(folder, IMAGE_SUFFIXES))


def _no_test(root: Path, found: list[Path]) -> list[Path]:
    """``test`` is the validation only where no other is."""
    return [at for at in found if "test" not in _split(at.relative_to(root))] or found


def _folders(root: Path) -> Iterator[Path]:
    """Those below, and below those that say something; sorted, without hidden ones."""
    for folder in _inside(root):
        yield folder
        if _said(folder.relative_to(root)) != (None, None):
            yield from _inside(folder)


def _inside(folder: Path) -> list[Path]:
    return sorted(Path(entry.path) for entry in _entries(folder) if entry.is_dir())


def _files(folder: Path, suffixes: Iterable[str]) -> Iterator[str]:
    return (e.name for e in _entries(folder) if os.path.splitext(e.name)[1].lower() in suffixes)


def _entries(folder: Path) -> list["os.DirEntry[str]"]:
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise UserError(f"{folder} cannot be listed ({error.strerror})") from error


def _split(path: Path) -> list[str]:
    """Words of the names of folders, without digits behind: ``images/val2017`` is images, val."""
    words = [word for name in path.parts for word in re.split(r"[\W_]+", name.lower())]
    joined = ((_JOINED.fullmatch(word), word.rstrip("0123456789")) for word in words)
    return [part for match, word in joined for part in (match.groups() if match else [word])]


def _said(path: Path) -> tuple[tuple[str, ...] | None, str | None]:
    """Kind and part that the first and last words of each folder's name say; None: nothing, or two things."""
    ends = {word for name in path.parts for word in (_split(Path(name))[0], _split(Path(name))[-1])}
    kinds = [kinds for kinds, words in _WORDS.items() if words & ends]
    parts = [part for part, words in PARTS.items() if ends.intersection(words)]
    return kinds[0] if len(kinds) == 1 else None, parts[0] if len(parts) == 1 else None
