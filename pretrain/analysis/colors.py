"""Colors that differ as much as their number allows, also for eyes with a color vision deficiency."""

from functools import lru_cache
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

HATCHED = (0.62, 0.8)  # gray levels of pixels that are not counted
# What eyes without one kind of cones see, of linear RGB: Machado, Oliveira and Fernandes, 2009, severity 1:
# protan, deutan, tritan.
DEFICIENT = np.array(
    [
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
    ]
)


@lru_cache(maxsize=8)
def distinct_colors(count: int) -> tuple[tuple[float, float, float], ...]:
    """Colors (r, g, b) in [0, 1], each as far from those before it as can be, whatever the count.

    Far for the worst of four eyes: ordinary, and each of :data:`DEFICIENT`; in CIE Lab. None is near black,
    white or gray.
    """
    levels = np.linspace(0, 1, 15)
    candidates = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), -1).reshape(-1, 3)
    seen = _lab(candidates)  # [eyes, M, 3]
    lightness, chroma = seen[0, :, 0], np.hypot(seen[0, :, 1], seen[0, :, 2])
    keep = (lightness > 25) & (lightness < 92) & (chroma > 25)
    candidates, seen = candidates[keep], seen[:, keep]
    grays = _lab(np.repeat([[0.0], [0.45], [HATCHED[0]], [HATCHED[1]], [1.0]], 3, axis=1))
    nearest = np.min([_distance(seen, grays[:, i : i + 1]) for i in range(grays.shape[1])], axis=0)
    chosen: list[Any] = []
    for _ in range(count):
        best = int(nearest.argmax())  # with more colors than candidates they repeat
        chosen.append(tuple(candidates[best].tolist()))
        nearest = np.minimum(nearest, _distance(seen, seen[:, best : best + 1]))
    return tuple(chosen)


def _distance(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of colors [eyes, M, 3] and [eyes, 1, 3] to the worst eye, [M]."""
    return np.sqrt(np.square(a - b).sum(-1)).min(0)


def _lab(rgb: NDArray[np.float64]) -> NDArray[np.float64]:
    """sRGB [M, 3] as CIE Lab (D65) for four eyes, [4, M, 3]."""
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    eyes = np.stack([linear, *(np.clip(linear @ matrix.T, 0, 1) for matrix in DEFICIENT)])
    return cv2.cvtColor(eyes.astype(np.float32), cv2.COLOR_LRGB2Lab).astype(np.float64)
