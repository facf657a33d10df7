"""The order of the images: a pure function of the seed, so that a run resumes at any iteration with any number of workers.

A *position* is the place of a sample in the whole run: iteration * batch size + index in the batch. Epochs are permutations; the
samples that do not fill a batch at an epoch's end are left for later epochs.
"""

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

ORDER, VIEWS, MASKS = 1, 2, 3  # streams of random numbers, kept apart by the second word of their seed


class Order:
    """Which image stands at a position.

    Args:
        n_images: size of the data set.
        batch_size: over all ranks.
        seed: of the run.
    """

    def __init__(self, n_images: int, batch_size: int, seed: int) -> None:
        self.n_images, self.seed = n_images, seed
        self.epoch_size = n_images - n_images % batch_size if n_images >= batch_size else n_images
        self._epoch = -1
        self._permutation = np.arange(0)

    def image(self, position: int) -> int:
        """Index of the image at a position."""
        epoch, place = divmod(position, self.epoch_size)
        if epoch != self._epoch:
            self._epoch = epoch
            self._permutation = np.random.default_rng([self.seed, ORDER, epoch]).permutation(self.n_images)
        return int(self._permutation[place])


class PositionSampler(Sampler[list[int]]):
    """Positions of one rank's share of every batch, from an iteration to the end.

    Args:
        start_it, end_it: iterations, the end excluded.
        batch_size: over all ranks.
        rank, world_size: rank r takes the r-th slice of each batch.
    """

    def __init__(self, start_it: int, end_it: int, batch_size: int, rank: int, world_size: int) -> None:
        assert batch_size % world_size == 0, (batch_size, world_size)
        self.iterations = range(start_it, end_it)
        self.batch_size, self.share, self.rank = batch_size, batch_size // world_size, rank

    def __iter__(self) -> Iterator[list[int]]:
        for it in self.iterations:
            first = it * self.batch_size + self.rank * self.share
            yield list(range(first, first + self.share))

    def __len__(self) -> int:
        return len(self.iterations)
