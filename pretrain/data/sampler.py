"""The order of the images, a pure function of the seed: a run resumes anywhere, with any number of workers.

A *sample index* is the position of a sample in the whole run: iteration * batch size + position in the batch.
Each epoch is a permutation; samples that do not fill a batch at its end are left for later epochs.
"""

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

# streams of random numbers, separated by the second word of their seed
ORDER, VIEWS, MASKS, COLORS, SUBSTITUTES = (1, 2, 3, 4, 5)


def generator(seed: int, stream: int, sample_index: int) -> np.random.Generator:
    """The random numbers of one stream for one sample; a counter-based generator is cheap to create."""
    return np.random.Generator(np.random.Philox(key=[seed, stream], counter=[0, 0, sample_index, 0]))


class Order:
    """Maps a sample to its image.

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

    def image(self, sample_index: int) -> int:
        """Index of a sample's image."""
        epoch, place = divmod(sample_index, self.epoch_size)
        if epoch != self._epoch:
            self._epoch = epoch
            self._permutation = np.random.default_rng([self.seed, ORDER, epoch]).permutation(self.n_images)
        return int(self._permutation[place])


class SampleIndices(Sampler[list[int]]):
    """Sample indices of one rank's share of every batch, from an iteration to the last one.

    Args:
        start_iter, end_iter: iterations; the end is excluded.
        batch_size: over all ranks.
        rank, world_size: rank r takes the r-th slice of each batch.
        n_micro_batches: equal consecutive parts of the share of an iteration.
    """

    def __init__(
        self,
        start_iter: int,
        end_iter: int,
        batch_size: int,
        rank: int,
        world_size: int,
        n_micro_batches: int = 1,
    ) -> None:
        assert batch_size % (world_size * n_micro_batches) == 0, (batch_size, world_size, n_micro_batches)
        self.iterations = range(start_iter, end_iter)
        self.batch_size, self.share, self.rank = batch_size, batch_size // world_size, rank
        self.n_micro_batches = n_micro_batches

    def __iter__(self) -> Iterator[list[int]]:
        size = self.share // self.n_micro_batches
        for iteration in self.iterations:
            first = iteration * self.batch_size + self.rank * self.share
            yield from (list(range(at, at + size)) for at in range(first, first + self.share, size))

    def __len__(self) -> int:
        return len(self.iterations) * self.n_micro_batches
