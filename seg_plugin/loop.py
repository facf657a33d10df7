"""The endless stream of training images, each of which knows its place; who shares it; the loop that resumes in it."""

import itertools
import signal
from collections.abc import Iterator
from typing import Any

from mmengine.dataset import InfiniteSampler
from mmengine.model import MMDistributedDataParallel
from mmengine.registry import FUNCTIONS, MODEL_WRAPPERS
from mmengine.runner import IterBasedTrainLoop
from mmseg.registry import DATA_SAMPLERS, LOOPS
from torch import nn

from pretrain.signals import start_worker


class DrawnIndex(int):
    """The index of an image in its data set, and where in the run it was drawn. It travels by pickle to the
    data-loading processes.

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

    def __getnewargs__(self) -> tuple[Any, ...]:  # type: ignore[override]
        return int(self), self.seed, self.position


@DATA_SAMPLERS.register_module()
class PosfieldSampler(InfiniteSampler):
    """mmengine's ``InfiniteSampler``, the same images in the same order, as :class:`DrawnIndex`.

    ``start`` images of this process's share are skipped: those that a resumed run has seen.
    """

    start = 0

    def __iter__(self) -> Iterator[DrawnIndex]:
        """From ``start`` on, without end. Process r of W has positions r, r + W, r + 2 W, ..."""
        stream, first = enumerate(self._infinite_indices()), self.rank + self.start * self.world_size
        for position, index in itertools.islice(stream, first, None, self.world_size):
            yield DrawnIndex(index, self.seed, position)


@LOOPS.register_module()
class PosfieldTrainLoop(IterBasedTrainLoop):
    """mmengine's loop, which at iteration k loads and drops k batches, hours at k = 80,000. Here only the sampler's
    indices are drawn. The images that follow are those of an uninterrupted run."""

    def run(self) -> Any:
        """Train from the current iteration to the last. Returns the model."""
        sampler = self.dataloader.sampler
        if self._iter and isinstance(sampler, PosfieldSampler):
            sampler.start = self._iter * self.dataloader.batch_size
            # The base class advances its iterator by k before it starts.
            passed = itertools.repeat(None, self._iter)
            self.dataloader_iterator = itertools.chain(passed, iter(self.dataloader))
        return super().run()


@MODEL_WRAPPERS.register_module()
class PosfieldDataParallel(MMDistributedDataParallel):
    """mmengine's, on the model's own device, not on CUDA device LOCAL_RANK: the process may run on the CPU or see
    only one device."""

    def __init__(self, module: nn.Module, device_ids: Any = None, **options: Any) -> None:
        super().__init__(module, broadcast_buffers=False, **options)


@FUNCTIONS.register_module()
def posfield_worker(number: int) -> None:
    """Start of a data-loading process, which leaves signals to a training that listens to them
    (:class:`pretrain.signals.StopSignals`).

    They often go to all processes of a job, and a worker that dies would end the training before it has saved.
    """
    # the parent's handler; torch's are not Python's
    start_worker(ignored=callable(signal.getsignal(signal.SIGTERM)))


def end_workers(runner: Any) -> None:
    """End the data-loading processes. At exit Python would send them a signal that they ignore."""
    for loop in (runner._train_loop, runner._val_loop):
        if iterator := getattr(getattr(loop, "dataloader", None), "_iterator", None):
            iterator._shutdown_workers()
