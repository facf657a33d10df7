"""A tiny data set in ADE20K's layout, written in milliseconds: coloured rectangles, whose colour tells the class."""

from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = np.array([(200, 60, 60), (60, 180, 60), (60, 80, 200), (210, 200, 70), (150, 70, 180)], np.uint8)


def write_ade(root: Path, *, n_train: int = 6, n_val: int = 3, size: tuple[int, int] = (40, 56), classes: int = 4) -> Path:
    """Write ``root/{images,annotations}/{training,validation}``; class k is stored as k + 1, and some pixels as 0.

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
            pixels = np.clip(COLOURS[labels - 1] + random.normal(0, 8, (*size, 3)), 0, 255).astype(np.uint8)
            labels[:2] = 0
            if index % 2:
                labels, pixels = labels.T, pixels.transpose(1, 0, 2)
            Image.fromarray(pixels).save(root / "images" / split / f"{index:04d}.jpg", quality=95)
            Image.fromarray(labels).save(root / "annotations" / split / f"{index:04d}.png")
    return root
