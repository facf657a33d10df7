"""Checks of masks. A label, a size or a kind of file that does not fit is an error that names the file."""

from pathlib import Path
from typing import Any

import numpy as np
from mmcv.transforms import BaseTransform
from mmseg.registry import TRANSFORMS
from PIL import Image, UnidentifiedImageError

from pretrain.errors import UserError
from seg_plugin.datasets import Located
from seg_plugin.protocol import SegmentationProtocol

MODES = ("1", "L", "P")  # Pillow's names: 1 or 8 bits a pixel; with a palette, the index is the label
EXIF_ORIENTATION, TURNED = 0x0112, (5, 6, 7, 8)  # values that swap rows and columns


def check_masks(located: Located, split: str, protocol: SegmentationProtocol) -> None:
    """Read every mask of a split (about 3 ms each). A mask may have no labeled pixel, but not all masks of a
    split.

    Raises:
        UserError: names the first file that cannot be read or is cut off, has another size than its image,
            has more than one channel of 8 bits, or holds a label out of range.
    """
    first = int(protocol.reduce_zero_label)  # how class 0 is stored
    labeled = False
    for image, path in located.pairs(split):
        try:
            with Image.open(path) as mask:
                labels, mode = np.asarray(mask), mask.mode
        except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
            raise UserError(f"data: {path} is no readable mask ({error})") from error
        _check_mode(mode, path)
        _check_labels(labels, path, protocol.num_classes, first, protocol.ignore_index)
        if labels.shape != (size := _size(image)):
            raise UserError(f"data: {path} is {labels.shape}, but its image is {size} (height, width)")
        check_whole(image)
        labeled |= bool(((labels >= first) & (labels != protocol.ignore_index)).any())
    if not labeled:
        raise UserError(f"data: no pixel of the {split} masks in {located.root} has a class")


def _size(image: Path) -> tuple[int, int]:
    """Height and width in pixels of an image as mmcv reads it, turned by its EXIF orientation. Pixels are not
    decoded."""
    try:
        with Image.open(image) as opened:
            width, height = opened.size
            turned = opened.getexif().get(EXIF_ORIENTATION) in TURNED
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise UserError(f"data: {image} is no readable image ({error})") from error
    return (width, height) if turned else (height, width)


def check_whole(image: str | Path) -> None:
    """Check that a JPEG has its end. OpenCV 4 fills what is missing with gray and only says so on stderr.

    Raises:
        UserError: it has none; names the file.
    """
    data, at = Path(image).read_bytes(), 2
    if not data.startswith(b"\xff\xd8"):
        return  # OpenCV refuses other kinds of files that are cut off
    while (
        data[at : at + 1] == b"\xff" and (marker := data[at + 1 : at + 2]) != b"\xda"
    ):  # a segment may hold a preview, with its end
        at += (
            1 if marker == b"\xff" else 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        )  # a fill byte | a segment
    if data.find(b"\xff\xd9", at) < 0:
        raise UserError(f"data: {image} is no readable image (JPEG without an end)")


def _check_mode(mode: str, path: str | Path) -> None:
    if mode not in MODES:
        raise UserError(
            f"data: {path} is of Pillow's mode {mode}; a mask has one channel of at most 8 bits, the class of each pixel"
        )


def _check_labels(
    labels: np.ndarray, path: str | Path, num_classes: int, first: int, ignore_index: int
) -> None:
    """``labels`` [H, W] are as stored: ``first`` is class 0, and anything below it is ignored."""
    out_of_range = labels[(labels.astype(np.int64) >= first + num_classes) & (labels != ignore_index)]
    if out_of_range.size:
        hint = "" if first else "; if 0 stands for no class: reduce_zero_label=true"
        raise UserError(
            f"data: {path} holds label {int(out_of_range.min())}, but {num_classes} classes are stored as {first} to "
            f"{first + num_classes - 1} (ignored: {'0 and ' * first}{ignore_index}){hint}"
        )


@TRANSFORMS.register_module()
class CheckLabels(BaseTransform):
    """Follows ``LoadAnnotations``: the mask fits its image and the classes, or an error names the file.

    Without it, a label out of range stops a GPU by a device-side assert that names nothing, the metric drops
    the label silently, and MMSegmentation keeps the lower byte of a 16-bit mask.
    """

    def __init__(self, num_classes: int, ignore_index: int = 255) -> None:
        self.num_classes = num_classes
        self.ignore_index = ignore_index

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        """Check ``gt_seg_map`` [H, W] uint8. It is reduced already if zero labels are ignored."""
        labels, path, first = (
            results["gt_seg_map"],
            results["seg_map_path"],
            int(results["reduce_zero_label"]),
        )
        with Image.open(path) as mask:  # its header alone
            _check_mode(mask.mode, path)
        if labels.shape != results["ori_shape"]:
            raise UserError(
                f"data: {path} is {labels.shape}, but its image is {results['ori_shape']} (height, width)"
            )
        stored = np.where(labels == self.ignore_index, self.ignore_index, labels.astype(np.int64) + first)
        _check_labels(stored, path, self.num_classes, first, self.ignore_index)
        return results
