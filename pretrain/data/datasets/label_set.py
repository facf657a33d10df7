"""One part of a labeled set: a list of files and a table from what their maps hold to labels."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pretrain.data.datasets.listing import Pairs
from pretrain.data.datasets.maps import UNKNOWN, nearest, read_map
from pretrain.data.digest import digest_of
from pretrain.data.images import in_batches, in_threads, read_picture, spread, square
from pretrain.errors import UserError


@dataclass(frozen=True, eq=False)
class LabelSet:
    """One part of a labeled set.

    Attributes:
        name: of the set: one of ``kinds()``; of a folder, the folder's name (``folder-voc2012``, ... of one
            that is named so).
        part: ``train`` | ``val``.
        classes: names of the labels 1 .. C.
        files: paths of image and label map of each item.
        table: [V] int32, the label 0 .. C of each raw value of the maps; -1: the set knows no such value.
        source: what of the set was taken: its list of images (``trainaug``), its kind of maps
            (``stuffthingmaps``).
        departure: in what it is not the set of the published figures; empty: in nothing.
        folder: of the images; all lie in it or below.
        named_by: who names the classes: ``classes.txt``, ``labels.yaml``, their numbers, or the set itself.
        void: the raw values that one's own masks do not count, as text.
        colors: of maps whose colors are labels, :func:`~pretrain.data.datasets.maps.read_map`.
        hint: what to do about an unknown value.
        val_share: by which a set of one part was divided; 0: it was not.
        on_read: is called after each item that was read, in its thread, with the number of all items.
    """

    name: str
    part: str
    classes: tuple[str, ...]
    files: Pairs
    table: NDArray[np.int32]
    source: str = ""
    departure: str = ""
    folder: str = ""
    named_by: str = "the set"
    void: str = ""
    colors: tuple[int, ...] = ()
    hint: str = ""
    val_share: float = 0.0
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
        pixels, labels = read_picture(image), self.read_labels(label_map)
        if labels.shape != pixels.shape[:2]:
            sizes = [f"{shape[1]} x {shape[0]}" for shape in (labels.shape, pixels.shape)]
            turned = " (as EXIF turns it)" if labels.T.shape == pixels.shape[:2] else ""
            raise UserError(f"{label_map} has {sizes[0]} pixels, its image {image} {sizes[1]}{turned}")
        self.on_read(len(self))
        return pixels, labels

    def read_labels(self, file: Path) -> NDArray[np.int32]:
        """The labels [H, W] of a map.

        Raises:
            UserError: the file cannot be read, or holds a value that the set does not know; names both.
        """
        values = read_map(file, self.colors)
        if values.max() < len(self.table) and (labels := np.take(self.table, values)).min() != UNKNOWN:
            return labels
        unknown = np.setdiff1d(values, np.flatnonzero(self.table != UNKNOWN))[0]
        told = f"{file} holds the value {unknown}, which is none of {self.name} ({len(self.classes)} classes)"
        raise UserError(told + self.hint)

    def check(self) -> None:
        """Read all images and maps.

        Raises:
            UserError: names the first that is bad, as :meth:`read`; no pixel has a class.
        """
        if not any(list(in_threads(lambda index: bool(self.read(index)[1].any()), range(len(self))))):
            where = Path(self.files[0][1]).parent
            raise UserError(f"no pixel of the {len(self)} {self.part} masks in {where} has a class")

    def digest(self) -> dict[str, Any]:
        """What tells it from others (:mod:`pretrain.data.digest`): number, names and sizes of images and maps."""
        images, maps = zip(*self.files)
        return digest_of(images, maps).values()

    @property
    def description(self) -> str:
        """What ``result.json`` says of the labels: how many classes, who names them, what does not count."""
        void = f", not counted: {self.void}" if self.void else ""
        return f"{len(self.classes)} classes, named by {self.named_by}{void}"

    @property
    def named(self) -> dict[str, str]:
        """{name in the set's folder: path} of the images."""
        return {image.removeprefix(self.folder): image for image, _ in self.files}

    @property
    def values(self) -> tuple[Any, ...]:
        """What maps store for each class, the last of several: a value, or RGB (``colors``); -1: nothing."""
        stored = [np.flatnonzero(self.table == label) for label in range(1, len(self.classes) + 1)]
        values = [int(of[-1]) if len(of) else -1 for of in stored]
        return tuple(tuple(self.colors[v].to_bytes(3, "big")) if self.colors else v for v in values)

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

        for batch in in_batches(item, range(len(self)) if order is None else order, batch_size):
            images, labels = zip(*batch)
            yield torch.stack(images), torch.stack(labels)
