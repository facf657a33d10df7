"""The small labeled sets of the probes, read once at a run's start. An error names the key and the file."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pretrain.data.class_folders import ClassFolder, open_class_folders
from pretrain.data.datasets.label_set import LabelSet
from pretrain.data.datasets.listing import by_stem, maps_by_stem, paired
from pretrain.data.images import in_threads, square
from pretrain.errors import UserError
from pretrain.evaluation.features import FORWARD_BATCH


@dataclass(frozen=True)
class Labeled:
    """One part of a labeled set: uint8 [n, 3, S, S], and labels [n] (classes) or [n, S, S] (pixels)."""

    images: Tensor
    labels: Tensor


@contextmanager
def errors_of(key: str) -> Iterator[None]:
    """A :class:`UserError` raised inside begins with ``key``, the setting that names the data."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{key}: {error}") from error


def read_classes(root: str, side_px: int, max_images: int, key: str) -> tuple[Labeled, Labeled]:
    """``train/CLASS/*`` and ``val/CLASS/*`` as central squares; at most ``max_images`` of each, at equal
    steps.

    Args:
        key: the setting that names ``root``, for messages.

    Raises:
        UserError: as :func:`pretrain.data.class_folders.open_class_folders`; a file that is no image.
    """
    with errors_of(key):
        train, val = (_squares(part.first(max_images), side_px) for part in open_class_folders(root))
        return train, val


def _squares(part: ClassFolder, side_px: int) -> Labeled:
    images = in_threads(lambda index: square(part.read(index), side_px, crop=True), range(len(part)))
    return Labeled(torch.stack(list(images)), part.labels())


def read_segmentation(
    root: str, n_classes: int, side_px: int, max_images: int, key: str
) -> tuple[Labeled, Labeled]:
    """A set in ADE20K's layout, images and label maps squeezed to squares; at most ``max_images`` of each
    part, at equal steps.

    Returns:
        ``training`` and ``validation``; labels 0 (not labeled) or 1 .. n_classes, uint8 (int32 beyond 255
        classes).

    Raises:
        UserError: a folder or label map that is missing, a label beyond ``n_classes``, sizes that differ, an
            unreadable file.
    """
    name, table = f"{root} with probes.seg_classes={n_classes}", np.arange(n_classes + 1, dtype=np.int32)
    parts = []
    with errors_of(key):
        for part in ("training", "validation"):
            files = by_stem(Path(root) / "images" / part)
            pairs = paired(
                files, maps_by_stem(Path(root) / "annotations" / part), sorted(files, key=files.__getitem__)
            )
            found = LabelSet(name, part, tuple(map(str, table[1:])), pairs, table).first(max_images)
            images, labels = map(torch.cat, zip(*found.squares(side_px, side_px, FORWARD_BATCH)))
            parts.append(Labeled(images, labels.to(torch.uint8 if n_classes < 256 else torch.int32)))
    return parts[0], parts[1]
