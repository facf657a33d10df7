"""Images with a label a pixel, read one by one from where they lie: Pascal VOC, ADE20K, COCO-Things and -Stuff, pairs of folders.

Labels are 1 .. C, and 0 where a pixel is not counted, whatever the files hold.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

KINDS = ("voc2012", "ade20k", "coco_things", "coco_stuff", "folder")


@dataclass(frozen=True)
class LabelSet:
    """One part of a labelled set.

    Attributes:
        name: of the set: one of :data:`KINDS`; of a folder, the folder's name.
        part: ``train`` | ``val``.
        classes: names of the labels 1 .. C.
        files: image and label map of each item.
        table: [V] int32, the label 0 .. C of each raw value of the maps.
    """

    name: str
    part: str
    classes: tuple[str, ...]
    files: Sequence[tuple[Path, Path]]
    table: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
        """An image uint8 [H, W, 3] and its labels [H, W].

        Raises:
            UserError: names the file: unreadable, of another size than its map, a raw value that the set does not know.
        """
        raise NotImplementedError

    def first(self, most: int) -> "LabelSet":
        """The same with at most ``most`` items, at equal steps from the first one."""
        raise NotImplementedError

    def squares(
        self, side_px: int, label_px: int, batch_size: int, order: Sequence[int] | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Whole images squeezed to squares: uint8 [b, 3, side, side] (bicubic, antialiased) and int32 labels [b, label, label]
        (nearest), ``batch_size`` at a time, read ahead in threads. ``order``: indices; none: all, in order."""
        raise NotImplementedError


def open_label_set(root: str | Path, part: str, kind: str = "auto", n_classes: int = 0) -> LabelSet:
    """The ``train`` or ``val`` part of a set.

    Args:
        kind: one of :data:`KINDS`; ``auto``: told from the folder's layout.
        n_classes: ``folder``: labels 1 .. n (0: not counted); 0: those that the maps of the training part hold.

    Raises:
        UserError: names what is missing.
    """
    raise NotImplementedError
