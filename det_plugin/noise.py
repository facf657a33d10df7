"""Images of noise with objects: what a step costs does not depend on what they show."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from det_plugin.protocol import DetectionProtocol


class NoiseImage(NamedTuple):
    """One image and its M objects."""

    image: Tensor  # [3, S, S] uint8
    boxes: Tensor  # [M, 4], x0 y0 x1 y1 in pixels
    classes: Tensor  # [M] from 0
    polygons: list[list[np.ndarray]]  # the whole box of each object


def noise(recipe: DetectionProtocol, n_images: int, n_objects: int) -> list[NoiseImage]:
    """Images of the recipe's size, always the same."""
    size, generator = recipe.image_size_px, torch.Generator().manual_seed(0)
    images = []
    for _ in range(n_images):
        corners = torch.rand(n_objects, 2, generator=generator) * size * 0.5
        extents = (0.05 + 0.4 * torch.rand(n_objects, 2, generator=generator)) * size
        boxes = torch.cat([corners, corners + extents], 1)
        classes = torch.randint(recipe.num_classes, (n_objects,), generator=generator)
        outlines = [[box[[0, 1, 2, 1, 2, 3, 0, 3]].double().numpy()] for box in boxes]
        image = torch.randint(0, 256, (3, size, size), dtype=torch.uint8, generator=generator)
        images.append(NoiseImage(image, boxes, classes, outlines))
    return images


def most_objects(recipe: DetectionProtocol) -> int:
    """As many as make every place for an object in the heads' samples one: more cost no more memory."""
    return max(1, round(recipe.roi_batch_per_image * recipe.roi_positive_fraction))
