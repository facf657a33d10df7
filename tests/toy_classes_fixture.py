"""The toy objects one by one, as a labeled folder for k-NN: ``train/CLASS/*.jpg`` and ``val/CLASS/*.jpg``.

An example is the square around one object of a composed image (:mod:`pretrain.data.toy`), with whatever else
lies in it. As there, ``val`` is made of the held-out photographs alone.
"""

from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path

import cv2
import numpy as np

from pretrain.data.toy import CLASSES, Picture, compose

MARGIN = 1.25  # side of the square, in long sides of the object's box
MIN_SIDE_PX = 24  # of the object's box: below it the shape is hardly there


def examples(picture: Picture) -> Iterator[tuple[np.ndarray, int]]:
    """The objects of an image that are large enough, each as pixels [S, S, 3] uint8 RGB, and its class."""
    height, width = picture.image.shape[:2]
    for mask, kind in zip(picture.masks, picture.classes):
        y, x = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        long_px = max(np.ptp(y), np.ptp(x)) + 1
        if long_px < MIN_SIDE_PX:
            continue
        side = min(round(MARGIN * long_px), height, width)
        top = int(np.clip((y[0] + y[-1] + 1 - side) // 2, 0, height - side))
        left = int(np.clip((x[0] + x[-1] + 1 - side) // 2, 0, width - side))
        yield picture.image[top : top + side, left : left + side], kind


def write_toy_classes(
    folder: Path, *, n_train: int = 600, n_val: int = 300, size_px: int = 128, seed: int = 0
) -> None:
    """Write ``n_train`` and ``n_val`` examples, of images whose short side is ``size_px``; the same
    arguments, the same bytes."""
    for split, n in (("train", n_train), ("val", n_val)):
        for name in CLASSES:
            (folder / split / name).mkdir(parents=True, exist_ok=True)
        found = (example for index in count() for example in examples(compose(index, split, seed, size_px)))
        for number, (pixels, kind) in enumerate(islice(found, n)):
            encoded = cv2.imencode(
                ".jpg", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 90]
            )[1]
            (folder / split / CLASSES[kind] / f"{number:06d}.jpg").write_bytes(encoded.tobytes())
