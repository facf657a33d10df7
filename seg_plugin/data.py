"""Folders of images and masks in ADE20K's layout, and the check of what the masks hold.

``root/images/{training,validation}/NAME.jpg`` and ``root/annotations/{training,validation}/NAME.png``; optionally
``root/classes.txt``, one class name a line. A mask is an 8-bit PNG with one channel.
"""

from pathlib import Path
from typing import Any

import numpy as np
from mmcv.transforms import BaseTransform
from mmseg.datasets import ADE20KDataset
from mmseg.registry import TRANSFORMS
from PIL import Image, UnidentifiedImageError

from pretrain.errors import UserError
from seg_plugin.protocol import SegmentationProtocol

SPLITS = ("training", "validation")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
ADE20K_CLASSES: tuple[str, ...] = tuple(ADE20KDataset.METAINFO["classes"])


def find_root(folder: str | Path) -> Path:
    """The folder that holds ``images`` and ``annotations``: this one, or ``ADEChallengeData2016`` in it."""
    inner = Path(folder) / "ADEChallengeData2016"
    return inner if inner.is_dir() and not (Path(folder) / "images").is_dir() else Path(folder)


def image_suffix(root: Path) -> str:
    """The one suffix of the images of both splits.

    Raises:
        UserError: names a folder that is missing or empty, a second suffix, or the mask that an image lacks.
    """
    found: dict[str, Path] = {}
    for split in SPLITS:
        folder = root / "images" / split
        if not folder.is_dir():
            raise UserError(f"data: no folder {folder}")
        images = [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in IMAGE_SUFFIXES]
        if not images:
            raise UserError(f"data: no {', '.join(IMAGE_SUFFIXES)} in {folder}")
        for path in images:
            found.setdefault(path.suffix, path)
            if not mask_of(path, root).is_file():
                raise UserError(f"data: {path} has no mask {mask_of(path, root)}")
    if len(found) > 1:
        raise UserError(f"data: images must have one suffix; there are {' and '.join(str(p) for p in found.values())}")
    return next(iter(found))


def mask_of(image: Path, root: Path) -> Path:
    """``annotations/.../NAME.png`` for ``images/.../NAME.jpg``."""
    return (root / "annotations" / image.relative_to(root / "images")).with_suffix(".png")


def class_names(root: Path | None, num_classes: int) -> tuple[str, ...]:
    """Those of ``root/classes.txt``; else ADE20K's where there are as many; else ``class 0``, ``class 1``, ..."""
    listed = root / "classes.txt" if root else None
    if listed and listed.is_file():
        names = tuple(line.strip() for line in listed.read_text(encoding="utf-8").splitlines() if line.strip())
        if len(names) != num_classes or len(set(names)) != len(names):
            raise UserError(f"data: {listed} has {len(set(names))} different names, but num_classes is {num_classes}")
        return names
    return ADE20K_CLASSES if num_classes == len(ADE20K_CLASSES) else tuple(f"class {k}" for k in range(num_classes))


def check_masks(root: Path, split: str, protocol: SegmentationProtocol) -> None:
    """Read every mask of a split (about 3 ms each).

    Raises:
        UserError: names the first file that is unreadable, has more than one channel, or holds a label out of range.
    """
    first = int(protocol.reduce_zero_label)  # how class 0 is stored
    for path in sorted((root / "annotations" / split).rglob("*.png")):
        try:
            with Image.open(path) as image:
                labels = np.asarray(image)
        except (UnidentifiedImageError, OSError) as error:
            raise UserError(f"data: {path} is no readable mask ({error})") from error
        _check(labels, str(path), protocol.num_classes, first, protocol.ignore_index)


def _check(labels: np.ndarray, path: str, num_classes: int, first: int, ignore_index: int) -> None:
    """``labels`` [H, W] as stored: ``first`` is class 0, and anything below it is ignored."""
    if labels.ndim != 2:
        raise UserError(f"data: {path} has shape {labels.shape}; a mask has one channel, the class of each pixel")
    out_of_range = labels[(labels.astype(np.int64) >= first + num_classes) & (labels != ignore_index)]
    if out_of_range.size:
        raise UserError(
            f"data: {path} holds label {int(out_of_range.min())}, but {num_classes} classes are stored as {first} to "
            f"{first + num_classes - 1} (ignored: {'0 and ' * first}{ignore_index})"
        )


@TRANSFORMS.register_module()
class CheckLabels(BaseTransform):
    """After ``LoadAnnotations``: the mask fits its image and the classes, or an error names the file.

    Without it, a label out of range stops a GPU with a device-side assert that names nothing, and the metric drops it silently.
    """

    def __init__(self, num_classes: int, ignore_index: int = 255) -> None:
        self.num_classes = num_classes
        self.ignore_index = ignore_index

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        """``gt_seg_map`` [H, W] uint8, already reduced where zero labels are ignored."""
        labels, path, first = results["gt_seg_map"], results["seg_map_path"], int(results["reduce_zero_label"])
        if labels.ndim == 2 and labels.shape != results["ori_shape"]:
            raise UserError(f"data: {path} is {labels.shape}, but its image is {results['ori_shape']} (height, width)")
        stored = np.where(labels == self.ignore_index, self.ignore_index, labels.astype(np.int64) + first)
        _check(stored, path, self.num_classes, first, self.ignore_index)
        return results
