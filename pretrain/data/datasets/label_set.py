"""One part of a labeled set: a list of files and a table from what their maps hold to labels."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pretrain.data.datasets.listing import Pairs
from pretrain.data.datasets.maps import UNKNOWN, nearest, read_map
from pretrain.data.images import in_threads, read_picture, spread, square
from pretrain.errors import UserError


@dataclass(frozen=True, eq=False)
class LabelSet:
    """One part of a labeled set.

    Attributes:
        name: of the set: one of ``KINDS``; of a folder, the folder's name (``folder-voc2012``, ... of one
            that is named so).
        part: ``train`` | ``val``.
        classes: names of the labels 1 .. C.
        files: paths of image and label map of each item.
        table: [V] int32, the label 0 .. C of each raw value of the maps; -1: the set knows no such value.
        source: what of the set was taken: its list of images (``trainaug``), its kind of maps
            (``stuffthingmaps``).
        departure: in what it is not the set of the published figures; empty: in nothing.
        on_read: is called after each item that was read, in its thread, with the number of all items.
    """

    name: str
    part: str
    classes: tuple[str, ...]
    files: Pairs
    table: NDArray[np.int32]
    source: str = ""
    departure: str = ""
    on_read: Callable[[int], object] = lambda n_items: None

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
        """An image uint8 [H, W, 3], upright, and its labels [H, W].

        Raises:
            UserError: names the file: unreadable, of another size than its map, a raw value that the set does
                not know.
        """
        image, label_map = map(Path, self.files[index])
        pixels = read_picture(image)
        labels = self.labels_of(read_map(label_map), label_map)
        if labels.shape != pixels.shape[:2]:
            sizes = f"{labels.shape[1]} x {labels.shape[0]} pixels, its image {image} {pixels.shape[1]} x {pixels.shape[0]}"
            raise UserError(
                f"{label_map} has {sizes}"
                + (" (as EXIF turns it)" if labels.T.shape == pixels.shape[:2] else "")
            )
        self.on_read(len(self))
        return pixels, labels

    def labels_of(self, values: NDArray[np.integer], file: Path) -> NDArray[np.int32]:
        """The labels of raw values [H, W].

        Raises:
            UserError: names ``file`` and the value that the table does not hold.
        """
        if values.max() < len(self.table):
            labels = np.take(self.table, values)
            if labels.min() != UNKNOWN:
                return labels
        known = np.flatnonzero(self.table != UNKNOWN)
        unknown = np.setdiff1d(values, known)[0]
        raise UserError(
            f"{file} holds the value {unknown}, which is none of {self.name} ({len(self.classes)} classes)"
        )

    def first(self, most: int) -> "LabelSet":
        """The same with at most ``most`` items, at equal steps from the first one."""
        return replace(self, files=spread(self.files, most))

    def squares(
        self, side_px: int, label_px: int, batch_size: int, order: Sequence[int] | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Whole images squeezed to squares: uint8 [b, 3, side, side] (bicubic, antialiased) and int32 labels
        [b, label, label] (nearest), ``batch_size`` at a time, read ahead in threads. ``order``: indices;
        none: all, in order."""

        def item(index: int) -> tuple[Tensor, Tensor]:
            pixels, labels = self.read(index)
            return square(pixels, side_px, crop=False), nearest(labels, label_px)

        with closing(in_threads(item, range(len(self)) if order is None else order)) as items:
            while batch := list(islice(items, batch_size)):
                images, labels = zip(*batch)
                yield torch.stack(images), torch.stack(labels)  # [b, 3, side, side], [b, label, label]
