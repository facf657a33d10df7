"""The endless stream of training images, in which every image knows its place, and the loop that resumes
within it."""

import itertools
from collections.abc import Iterator
from typing import Any

from mmengine.dataset import InfiniteSampler
from mmengine.runner import IterBasedTrainLoop
from mmseg.registry import DATA_SAMPLERS, LOOPS


class DrawnIndex(int):
    """The index of an image in its data set, and where in the run it was drawn.

    Attributes:
        seed: the run's.
        position: iteration * (batch size of all processes) + place in the batch.
    """

    seed: int
    position: int

    def __new__(cls, index: int, seed: int, position: int) -> "DrawnIndex":
        drawn = super().__new__(cls, index)
        drawn.seed, drawn.position = seed, position
        return drawn

    def __reduce__(self) -> tuple[Any, ...]:
        """For pickle: it travels to the data-loading processes."""
        return DrawnIndex, (int(self), self.seed, self.position)


@DATA_SAMPLERS.register_module()
class PosfieldSampler(InfiniteSampler):
    """mmengine's ``InfiniteSampler``, the same images in the same order, as :class:`DrawnIndex`.

    Attributes:
        start: how many images of this process's share to skip: those that a resumed run has seen.
    """

    start: int = 0

    def __iter__(self) -> Iterator[DrawnIndex]:
        """From ``start`` on, without end. Process r of W has positions r, r + W, r + 2 W, ..."""
        stream = enumerate(self._infinite_indices())
        for position, index in itertools.islice(
            stream, self.rank + self.start * self.world_size, None, self.world_size
        ):
            yield DrawnIndex(index, self.seed, position)


@LOOPS.register_module()
class PosfieldTrainLoop(IterBasedTrainLoop):
    """mmengine's loop, but resuming is fast. At iteration k mmengine loads and drops k batches: hours at k =
    80,000.

    Here only the sampler's indices are drawn. The images that follow are those of an uninterrupted run.
    """

    def run(self) -> Any:
        """Train from the current iteration to the last. Returns the model."""
        sampler = self.dataloader.sampler
        if self._iter and isinstance(sampler, PosfieldSampler):
            sampler.start = self._iter * self.dataloader.batch_size
            # The base class advances its iterator by k before it starts.
            self.dataloader_iterator = itertools.chain(
                itertools.repeat(None, self._iter), iter(self.dataloader)
            )
        return super().run()
