"""The small labeled sets of the probes, read once at a run's start: whatever is wrong with them is told then, by key and file."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pretrain.data.decode import BrokenImage, decode
from pretrain.data.images import in_threads, spread, square
from pretrain.data.label_sets.maps import nearest, read_map
from pretrain.data.sources.files import SUFFIXES
from pretrain.errors import UserError


@dataclass(frozen=True)
class Labeled:
    """One part of a labeled set: uint8 [n, 3, S, S], and labels [n] (classes) or [n, S, S] (pixels)."""

    images: Tensor
    labels: Tensor


def read_classes(root: str, side_px: int, max_images: int, key: str) -> tuple[Labeled, Labeled]:
    """``train/CLASS/*`` and ``val/CLASS/*`` as central squares; at most ``max_images`` of each, at equal steps.

    Args:
        key: the setting that names ``root``, for messages.

    Raises:
        UserError: a folder that is missing or empty, a class of val that train has not, a file that is no image.
    """
    folders = [_folder(Path(root) / part, key) for part in ("train", "val")]
    numbers = {path.name: number for number, path in enumerate(_class_folders(folders[0]))}
    parts = []
    for folder in folders:
        found: list[tuple[Path, int]] = []
        for path in _class_folders(folder):
            if path.name not in numbers:
                raise UserError(f"{key}: class {path.name!r} of {folder} is none of {folders[0]}")
            found += [(file, numbers[path.name]) for file in _pictures(path)]
        if not found:
            raise UserError(f"{key}: no picture CLASS/*{'|'.join(SUFFIXES)} in {folder}")
        chosen = spread(found, max_images)
        images = list(in_threads(lambda pair: square(_pixels(pair[0], key), side_px, crop=True), chosen))
        parts.append(Labeled(torch.stack(images), torch.tensor([number for _, number in chosen])))
    return parts[0], parts[1]


def read_segmentation(root: str, n_classes: int, side_px: int, max_images: int, key: str) -> tuple[Labeled, Labeled]:
    """A set in ADE20K's layout, images and label maps squeezed to squares; at most ``max_images`` of each part, at equal steps.

    Returns:
        ``training`` and ``validation``; labels 0 (not labeled) or 1 .. n_classes, uint8 (int32 beyond 255 classes).

    Raises:
        UserError: a folder or label map that is missing, a label beyond ``n_classes``, sizes that differ, an unreadable file.
    """
    parts = []
    for part in ("training", "validation"):
        folder, maps = _folder(Path(root) / "images" / part, key), _folder(Path(root) / "annotations" / part, key)
        chosen = spread(_pictures(folder), max_images)
        if not chosen:
            raise UserError(f"{key}: no picture *{'|'.join(SUFFIXES)} in {folder}")

        def read(file: Path, maps: Path = maps) -> tuple[Tensor, Tensor]:
            pixels = _pixels(file, key)
            labels = read_labels(maps / f"{file.stem}.png", n_classes, key)
            if labels.shape != pixels.shape[:2]:
                raise UserError(f"{key}: {maps / file.stem}.png is {labels.shape}, but {file} is {pixels.shape[:2]} pixels")
            return square(pixels, side_px, crop=False), nearest(labels, side_px)

        images, labels = zip(*in_threads(read, chosen))
        dtype = torch.uint8 if n_classes < 256 else torch.int32
        parts.append(Labeled(torch.stack(images), torch.stack(labels).to(dtype)))
    return parts[0], parts[1]


def read_labels(file: Path, n_classes: int, key: str) -> np.ndarray:
    """A label map (PNG: gray, palette or 16 bits) as integers [H, W] in 0 .. n_classes.

    Raises:
        UserError: no such file, no label map, or a label beyond.
    """
    try:
        labels = read_map(file)
    except UserError as error:
        raise UserError(f"{key}: {error}") from error
    if labels.max() > n_classes:
        raise UserError(f"{key}: {file} has the label {labels.max()}, but probes.seg_classes={n_classes}")
    return labels.astype(np.int32)


def _folder(path: Path, key: str) -> Path:
    if not path.is_dir():
        raise UserError(f"{key}: no folder {path}")
    return path


def _class_folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _pictures(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES and not file.name.startswith("."))


def _pixels(file: Path, key: str) -> np.ndarray:
    try:
        return decode(file.read_bytes())
    except BrokenImage as error:
        raise UserError(f"{key}: {file} cannot be read ({error})") from error
