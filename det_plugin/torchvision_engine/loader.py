"""Batches are a pure function of (seed, position in the stream). Workers, ranks and resuming cannot change
them."""

import math
import signal
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import chain, tee
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from det_plugin.coco.annotations import CocoSplit
from det_plugin.coco.api import coco_api
from det_plugin.protocol import DetectionProtocol
from det_plugin.torchvision_engine.augment import evaluation_geometry, jitter, objects_of
from pretrain.errors import UserError
from pretrain.signals import SIGNALS

Sample = dict[str, Any]
ORDER, AUGMENT = 0, 1  # streams of random numbers of one seed


def stream_index(position: int, length: int, seed: int) -> int:
    """The image at a position of the endless stream, which is one permutation of all images after another."""
    epoch, place = divmod(position, length)
    return int(_order(length, seed, epoch)[place])


@lru_cache(maxsize=4)
def _order(length: int, seed: int, epoch: int) -> np.ndarray:
    """The permutation of an epoch."""
    return np.random.default_rng([seed, ORDER, epoch]).permutation(length)


def positions(iteration: int, batch_size: int, rank: int, world_size: int) -> range:
    """A rank's share of an iteration's batch: consecutive positions of the stream, rank 0 first."""
    share = batch_size // world_size
    start = iteration * batch_size + rank * share
    return range(start, start + share)


class TrainSamples(Dataset[Sample]):
    """Position of the stream -> ``image`` [3, h, w], ``boxes`` [M, 4] pixels, ``labels`` [M] from 1, and
    ``masks``: :class:`masks.Polygons` or [M, h, w]."""

    def __init__(self, split: CocoSplit, protocol: DetectionProtocol, seed: int) -> None:
        self.split, self.protocol, self.seed = split, protocol, seed

    def __getitem__(self, position: int) -> Sample:
        picture = self.split.pictures[stream_index(position, len(self.split.pictures), self.seed)]
        rng = np.random.default_rng([self.seed, AUGMENT, position])
        geometry = jitter((picture.width, picture.height), self.protocol, rng)
        boxes, classes, masks = objects_of(geometry, picture.classes, picture.segmentations, coco_api().mask)
        return {
            "image": to_tensor(geometry.pixels(self.split.load(picture))),
            "boxes": torch.from_numpy(boxes),
            "labels": torch.from_numpy(classes + 1),  # 0 is background
            "masks": masks,
        }


class EvalSamples(Dataset[Sample]):
    """Index of an image -> ``image`` [3, h, w] uint8, resized, and its ``index``."""

    def __init__(self, split: CocoSplit, image_size_px: int) -> None:
        self.split, self.image_size_px = split, image_size_px

    def __getitem__(self, index: int) -> Sample:
        picture = self.split.pictures[index]
        geometry = evaluation_geometry((picture.width, picture.height), self.image_size_px)
        return {"image": to_tensor(geometry.pixels(self.split.load(picture))), "index": index}


def to_tensor(image: np.ndarray) -> Tensor:
    """[H, W, 3] -> [3, H, W]."""
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))


def batches(
    samples: Dataset[Sample], indices: Iterable[list[int]], workers: int, device: torch.device
) -> Iterator[list[Sample]]:
    """Lists of samples in the order of ``indices``.

    Workers hand over one sample at a time and are one batch ahead. If each made whole batches, the first
    batch would wait for all its images, and with 64 images a process they would hold gigabytes of shared
    memory and a thousand open files.

    Raises:
        UserError: a sample's, also where a worker process meets it.
    """
    ahead, due = tee(indices)
    first = next(ahead, [])
    loader = DataLoader(
        samples,
        batch_size=None,
        sampler=chain(first, chain.from_iterable(ahead)),  # type: ignore[arg-type]
        num_workers=workers,
        prefetch_factor=max(2, math.ceil(len(first) / workers)) if workers else None,
        pin_memory=device.type == "cuda",
        worker_init_fn=start_worker,
    )
    iterator: Any = iter(loader)
    try:
        for batch in due:
            yield [next(iterator) for _ in batch]
    except UserError as error:  # a worker's traceback precedes its message
        raise UserError(
            str(error).splitlines()[-1].removeprefix(f"{UserError.__module__}.{UserError.__name__}: ")
        ) from error
    finally:
        # Now: an exception's traceback would keep them alive, and they ignore the signal that an ending
        # process sends
        if workers:
            iterator._shutdown_workers()


def start_worker(worker: int) -> None:
    """Start of a data-loading process: one thread, and signals that a whole group of processes gets are
    ignored.

    The training decides when to stop, and a worker that dies would end it.
    """
    for number in (*SIGNALS, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)


def to_device(samples: list[Sample], device: torch.device) -> tuple[list[Tensor], list[dict[str, Any]]]:
    """Move samples to a device: images, and targets without them. Polygons stay on the CPU."""

    def move(x: Any) -> Any:
        return x.to(device, non_blocking=True) if isinstance(x, Tensor) else x

    images = [move(sample["image"]) for sample in samples]
    return images, [{key: move(sample[key]) for key in ("boxes", "labels", "masks")} for sample in samples]
