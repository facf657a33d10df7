"""Training batches for Detectron2: a pure function of (seed, position in the stream), whoever drives the
loop.

Detectron2's own loader restarts its shuffled stream when a run is resumed, and each worker draws
augmentations from a state of its own. Here the image, its augmentations and the step's random numbers depend
only on (seed, position). Workers, ranks, accumulation and resuming cannot change them. Images are not grouped
by aspect ratio. Detectron2 does that to save padding, but here every batch is padded to the same square.
"""

from collections.abc import Callable, Generator, Iterator
from itertools import count
from typing import Any

import numpy as np
import torch
from detectron2.data import DatasetFromList
from detectron2.structures import Boxes, Instances, PolygonMasks
from detectron2.utils.events import get_event_storage, has_event_storage
from torch.utils.data import Dataset

from det_plugin.loader import AUGMENT, STEP, Sample, batches, positions, with_substitute
from det_plugin.loop import micro_batch_size
from det_plugin.noise import noise
from det_plugin.protocol import DetectionProtocol
from pretrain import distributed
from pretrain.data.broken import Skipped
from pretrain.errors import UserError


class TrainSamples(Dataset[Sample]):
    """Position in the stream -> what the mapper makes of the image there.

    Args:
        dicts: Detectron2's dataset dicts.
        mapper: dict -> sample. It may draw from NumPy's global generator, as Detectron2's augmentations do.
    """

    def __init__(
        self, dicts: list[dict[str, Any]], mapper: Callable[[dict[str, Any]], Sample], seed: int
    ) -> None:
        self.dicts, self.mapper, self.seed = DatasetFromList(dicts, copy=False), mapper, seed

    def __getitem__(self, position: int) -> Sample:
        def make(index: int) -> Sample:
            np.random.seed(_draws(self.seed, AUGMENT, position).generate_state(4))
            return self.mapper(self.dicts[index])

        return with_substitute(position, len(self.dicts), self.seed, make)


def noise_samples(protocol: DetectionProtocol, n_images: int, n_objects: int) -> list[Sample]:
    """Samples of :func:`det_plugin.noise.noise`, as Detectron2's mapper makes them."""
    samples = []
    for own in noise(protocol, n_images, n_objects):
        height, width = own.image.shape[1:]
        instances = Instances((height, width))
        instances.gt_boxes, instances.gt_classes = Boxes(own.boxes), own.classes
        if protocol.has_masks:
            instances.gt_masks = PolygonMasks(own.polygons)
        samples.append({"image": own.image, "instances": instances, "height": height, "width": width})
    return samples


class TrainLoader:
    """This rank's batches (lists of samples), without end, from a Detectron2 trainer's iteration on.

    Args:
        dataset, mapper: of :class:`TrainSamples`.
        total_batch_size: images an iteration, over all ranks.
        num_workers: data-loading processes of this rank.
        seed: of the order, the augmentations and the steps.

    Raises:
        UserError: the ranks cannot share a batch equally, or the seed is negative.
    """

    def __init__(
        self,
        dataset: list[dict[str, Any]],
        *,
        mapper: Callable[[dict[str, Any]], Sample],
        total_batch_size: int,
        num_workers: int,
        seed: int,
    ) -> None:
        if seed < 0:
            raise UserError(f"train.seed: {seed} must be at least 0; the order of the images depends on it")
        self.samples = TrainSamples(dataset, mapper, seed)
        self.batch_size, self.workers, self.seed = total_batch_size, num_workers, seed
        self.skipped = Skipped(None)  # broken images; whoever knows the run's folder may put another here
        micro_batch_size(total_batch_size, 1)

    def __iter__(self) -> Iterator[list[Sample]]:
        return self.parts(1)

    def parts(self, accumulate: int) -> Generator[list[Sample], None, None]:
        """Each batch in ``accumulate`` equal parts, in turn.

        torch's generators are seeded before each part: drop path and the sampling of boxes draw from them in
        the step.
        """
        start_iter = get_event_storage().iter if has_event_storage() else 0  # the trainer's, resumed or not
        due, ahead = (self._positions(start_iter, accumulate) for _ in range(2))
        made = batches(self.samples, ahead, self.workers, torch.device("cpu"), self.skipped)
        for part, samples in zip(due, made):
            torch.manual_seed(int(_draws(self.seed, STEP, part[0]).generate_state(1, np.uint64)[0]))
            yield samples

    def _positions(self, start_iter: int, accumulate: int) -> Iterator[list[int]]:
        micro = micro_batch_size(self.batch_size, accumulate)
        for it in count(start_iter):
            own = positions(it, self.batch_size, distributed.rank(), distributed.world_size())
            yield from (list(own[i : i + micro]) for i in range(0, len(own), micro))


def _draws(seed: int, stream: int, position: int) -> np.random.SeedSequence:
    return np.random.SeedSequence([seed, stream, position])
