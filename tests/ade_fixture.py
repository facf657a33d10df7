"""Tiny data sets in the layouts of ADE20K and others, written in milliseconds: rectangles whose color
tells the class."""

from pathlib import Path

import numpy as np
from PIL import Image

COLORS = np.array([(200, 60, 60), (60, 180, 60), (60, 80, 200), (210, 200, 70), (150, 70, 180)], np.uint8)


def write_ade(
    root: Path, *, n_train: int = 6, n_val: int = 3, size: tuple[int, int] = (40, 56), classes: int = 4
) -> Path:
    """Write ``root/{images,annotations}/{training,validation}``; class k is stored as k + 1, and some pixels
    as 0.

    Args:
        size: height, width in pixels; every second image is transposed.
        classes: at most 5.
    """
    random = np.random.default_rng(0)
    for split, count in (("training", n_train), ("validation", n_val)):
        for folder in ("images", "annotations"):
            (root / folder / split).mkdir(parents=True)
        for index in range(count):
            labels = np.full(size, 1 + index % classes, np.uint8)
            for _ in range(3):
                top, left = random.integers(0, size[0] - 8), random.integers(0, size[1] - 8)
                labels[top : top + 16, left : left + 20] = 1 + random.integers(classes)
            pixels = np.clip(COLORS[labels - 1] + random.normal(0, 8, (*size, 3)), 0, 255).astype(np.uint8)
            labels[:2] = 0
            if index % 2:
                labels, pixels = labels.T, pixels.transpose(1, 0, 2)
            Image.fromarray(pixels).save(root / "images" / split / f"{index:04d}.jpg", quality=95)
            Image.fromarray(labels).save(root / "annotations" / split / f"{index:04d}.png")
    return root


def _move(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    source.rename(target)


def _masks_from_zero(root: Path) -> list[Path]:
    """Classes stored as 0, 1, ... and the ignored pixels as 255; the masks' files."""
    paths = sorted((root / "annotations").rglob("*.png"))
    for path in paths:
        labels = np.asarray(Image.open(path))
        Image.fromarray(np.where(labels == 0, 255, labels - 1).astype(np.uint8)).save(path)
    return paths


def write_voc(root: Path, aug: bool = False, **options: int) -> Path:
    """Write ``root`` as ``VOCdevkit/VOC2012``: palette masks, and lists of names; images that no list
    names lie beside them."""
    source = write_ade(root / "source", **options)
    names: dict[str, list[str]] = {"training": [], "validation": []}
    for path in _masks_from_zero(source):
        split, name = path.parent.name, f"2007_{path.parent.name}_{path.stem}"
        names[split].append(name)
        mask = Image.fromarray(np.asarray(Image.open(path)))
        mask.putpalette([channel for k in range(256) for channel in (k, 255 - k, 128)])
        folder = root / ("SegmentationClassAug" if aug and split == "training" else "SegmentationClass")
        folder.mkdir(exist_ok=True)
        mask.save(folder / f"{name}.png")
        assert Image.open(folder / f"{name}.png").mode == "P"
        _move(source / "images" / split / f"{path.stem}.jpg", root / "JPEGImages" / f"{name}.jpg")
    (root / "JPEGImages" / "2007_detection_only.jpg").write_bytes(b"never read")
    lists = root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    for split, file in (("training", "trainaug" if aug else "train"), ("validation", "val")):
        (lists / f"{file}.txt").write_text("\n".join(names[split]) + "\n")
    return root


def write_cityscapes(root: Path, **options: int) -> Path:
    """Write ``root`` as Cityscapes: PNG images by city, beside the masks we read the files of other kinds."""
    source = write_ade(root / "source", **options)
    for path in _masks_from_zero(source):
        split = {"training": "train", "validation": "val"}[path.parent.name]
        name = f"aachen_{path.stem}_000019"
        folder = root / "leftImg8bit" / split / "aachen"
        folder.mkdir(parents=True, exist_ok=True)
        with Image.open(source / "images" / path.parent.name / f"{path.stem}.jpg") as image:
            image.save(folder / f"{name}_leftImg8bit.png")
        masks = root / "gtFine" / split / "aachen"
        _move(path, masks / f"{name}_gtFine_labelTrainIds.png")
        Image.new("RGBA", (4, 4)).save(masks / f"{name}_gtFine_color.png")
    return root


def write_own(root: Path, **options: int) -> Path:
    """Write ``root/{images,masks}/{train,val}``, classes stored as 0, 1, ..., and ``classes.txt``."""
    source = write_ade(root / "source", **options)
    _masks_from_zero(source)
    for ours, theirs in (("images", "images"), ("masks", "annotations")):
        for split, name in (("train", "training"), ("val", "validation")):
            _move(source / theirs / name, root / ours / split)
    (root / "classes.txt").write_text("red\ngreen\nblue\nyellow\n")
    return root
