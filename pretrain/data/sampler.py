"""The order of the images: a pure function of the seed, so that a run resumes at any iteration with any number of workers.

A *position* is the place of a sample in the whole run: iteration * batch size + index in the batch. Epochs are permutations; the
samples that do not fill a batch at an epoch's end are left for later epochs.
"""

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

ORDER, VIEWS, MASKS, COLOURS, SUBSTITUTES = 1, 2, 3, 4, 5  # streams of random numbers, kept apart by the second word of their seed


def generator(seed: int, stream: int, position: int) -> np.random.Generator:
    """The random numbers of one stream at one position; a counter-based generator, for it costs little to make."""
    return np.random.Generator(np.random.Philox(key=[seed, stream], counter=[0, 0, position, 0]))


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
        parts: equal parts in which the share of an iteration comes, one after the other.
    """

    def __init__(self, start_it: int, end_it: int, batch_size: int, rank: int, world_size: int, parts: int = 1) -> None:
        assert batch_size % (world_size * parts) == 0, (batch_size, world_size, parts)
        self.iterations = range(start_it, end_it)
        self.batch_size, self.share, self.rank, self.parts = batch_size, batch_size // world_size, rank, parts

    def __iter__(self) -> Iterator[list[int]]:
        size = self.share // self.parts
        for it in self.iterations:
            first = it * self.batch_size + self.rank * self.share
            for part in range(self.parts):
                yield list(range(first + part * size, first + (part + 1) * size))

    def __len__(self) -> int:
        return len(self.iterations) * self.parts
