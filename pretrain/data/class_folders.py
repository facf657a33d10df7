"""Folders of classes, ``train/CLASS/*`` and ``val/CLASS/*``: ImageNet's layout."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pretrain.data.digest import digest_of
from pretrain.data.images import read_picture, spread
from pretrain.data.sources.files import SUFFIXES, is_image, left_out
from pretrain.errors import UserError
from pretrain.log import log


@dataclass(frozen=True)
class ClassFolder:
    """One part of a folder of classes.

    Attributes:
        folder: of the part.
        classes: of the training part, which both parts number alike.
        files: (number of the class, file's name) of each image, by class and name.
    """

    folder: Path
    classes: tuple[str, ...]
    files: Sequence[tuple[int, str]]

    def __len__(self) -> int:
        return len(self.files)

    def first(self, most: int) -> "ClassFolder":
        """The same with at most ``most`` images, at equal steps from the first one."""
        return replace(self, files=spread(self.files, most))

    @property
    def named(self) -> dict[str, str]:
        """{CLASS/FILE: path} of the images."""
        names = (os.path.join(self.classes[number], name) for number, name in self.files)
        return {name: os.path.join(self.folder, name) for name in names}

    def digest(self) -> dict[str, Any]:
        """What tells it from others (:mod:`pretrain.data.digest`): number, names and sizes of the images."""
        return digest_of([str(self.folder / self.classes[k] / name) for k, name in self.files]).values()

    def labels(self) -> Tensor:
        """Number of the class of each image; [n] int64."""
        return torch.tensor([number for number, _ in self.files])

    def read(self, index: int) -> np.ndarray:
        """An image uint8 [H, W, 3], upright; a UserError names a file that cannot be read."""
        number, name = self.files[index]
        return read_picture(self.folder / self.classes[number] / name)


def open_class_folders(root: str | Path) -> tuple[ClassFolder, ClassFolder]:
    """``train/CLASS/*`` and ``val/CLASS/*`` of a folder.

    Raises:
        UserError: a folder that is missing or holds no image, a class of val without an image in train.
    """
    folders = Path(root) / "train", Path(root) / "val"
    train, val = map(_list, folders)
    if len(train) < 2:
        raise UserError(f"{folders[0]}: its images are all of one class; a classifier needs two")
    if missing := [name for name in val if name not in train]:
        raise UserError(f"{root}: class {missing[0]!r} of val has no image in train")

    def part(folder: Path, found: dict[str, list[str]]) -> ClassFolder:
        files = [(number, file) for number, name in enumerate(train) for file in found.get(name, ())]
        return ClassFolder(folder, tuple(train), files)

    return part(folders[0], train), part(folders[1], val)


def _list(folder: Path) -> dict[str, list[str]]:
    """Names of the images by class, both sorted; classes without one are left out, other files named."""
    if not folder.is_dir():
        raise UserError(f"no folder {folder}")
    classes = sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    found, rest = dict[str, list[str]](), list[bytes]()
    for at in classes:
        for name in sorted(os.listdir(at)):
            if is_image(os.fsencode(name)):
                found.setdefault(at.name, []).append(name)
            elif not name.startswith("."):
                rest.append(os.fsencode(os.path.join(at.name, name)))
    if not found:
        kinds = "|".join(SUFFIXES)
        raise UserError(f"no image CLASS/*{kinds} in {folder}: a folder for each class is needed")
    if rest:
        log(left_out(rest, folder))
    return found
