"""The samples of the torchvision engine: training by position of the stream, evaluation by image."""

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from det_plugin.augment import boxes_of_objects, evaluation_geometry, jitter, objects_of
from det_plugin.coco.annotations import CocoSplit
from det_plugin.coco.masks import Polygons
from det_plugin.loader import AUGMENT, Sample, to_tensor, with_substitute
from det_plugin.noise import noise
from det_plugin.protocol import DetectionProtocol


class TrainSamples(Dataset[Sample]):
    """Position of the stream -> ``image`` [3, h, w], ``boxes`` [M, 4] pixels, ``labels`` [M] from 1, and of
    a protocol with masks ``masks``: :class:`det_plugin.coco.masks.Polygons` or [M, h, w], and where an object
    of the image has none ``has_mask`` [M]."""

    def __init__(self, split: CocoSplit, protocol: DetectionProtocol, seed: int) -> None:
        self.split, self.protocol, self.seed = split, protocol, seed

    def __getitem__(self, position: int) -> Sample:
        make = partial(self._sample, position)
        return with_substitute(position, len(self.split.pictures), self.seed, make)

    def _sample(self, position: int, index: int) -> Sample:
        picture = self.split.pictures[index]
        rng = np.random.default_rng([self.seed, AUGMENT, position])
        geometry = jitter((picture.width, picture.height), self.protocol, rng)
        own: dict[str, Any] = {}
        if self.protocol.has_masks:
            every = range(len(picture.classes))
            boxes, kept, own["masks"] = objects_of(geometry, every, picture.segmentations)
            classes = np.asarray(picture.classes, np.int64)[kept]
            if picture.masked:
                own["has_mask"] = torch.from_numpy(np.asarray(picture.masked)[kept])
        else:
            boxes, classes = boxes_of_objects(geometry, picture.classes, picture.boxes)
        return {
            "image": to_tensor(geometry.pixels(self.split.load(picture))),
            "boxes": torch.from_numpy(boxes),
            "labels": torch.from_numpy(classes + 1),  # 0 is background
            **own,
        }


def noise_samples(protocol: DetectionProtocol, n_images: int, n_objects: int) -> list[Sample]:
    """Samples of :func:`det_plugin.noise.noise`, as :class:`TrainSamples` makes them."""
    samples = []
    for own in noise(protocol, n_images, n_objects):
        masks = {"masks": Polygons(own.polygons)} if protocol.has_masks else {}
        samples.append({"image": own.image, "boxes": own.boxes, "labels": own.classes + 1, **masks})
    return samples


class EvalSamples(Dataset[Sample]):
    """Index of an image -> ``image`` [3, h, w] uint8, resized, and its ``index``."""

    def __init__(self, split: CocoSplit, image_size_px: int) -> None:
        self.split, self.image_size_px = split, image_size_px

    def __getitem__(self, index: int) -> Sample:
        picture = self.split.pictures[index]
        geometry = evaluation_geometry((picture.width, picture.height), self.image_size_px)
        return {"image": to_tensor(geometry.pixels(self.split.load(picture))), "index": index}


def to_device(samples: list[Sample], device: torch.device) -> tuple[list[Tensor], list[dict[str, Any]]]:
    """Move samples to a device: images, and targets without them. Polygons stay on the CPU."""

    def move(x: Any) -> Any:
        return x.to(device, non_blocking=True) if isinstance(x, Tensor) else x

    images = [move(sample["image"]) for sample in samples]
    keys = ("boxes", "labels", "masks", "has_mask")
    return images, [{key: move(own[key]) for key in keys if key in own} for own in samples]
