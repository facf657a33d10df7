"""mmengine's iteration-based training loop, with a resumption that does not read the past again."""

import itertools
from typing import Any

from mmengine.runner import IterBasedTrainLoop
from mmseg.registry import LOOPS

from seg_plugin.sampler import PosfieldSampler


@LOOPS.register_module()
class PosfieldTrainLoop(IterBasedTrainLoop):
    """On resuming at iteration k, mmengine loads and augments k batches only to drop them: hours at k = 80,000.

    Here only the sampler's indices are drawn; the images that follow are those of an uninterrupted run.
    """

    def run(self) -> Any:
        """Train from the current iteration to the last; the model."""
        sampler = self.dataloader.sampler
        if self._iter and isinstance(sampler, PosfieldSampler):
            sampler.start = self._iter * self.dataloader.batch_size
            # The loop above us advances its iterator by k before it starts.
            self.dataloader_iterator = itertools.chain(itertools.repeat(None, self._iter), iter(self.dataloader))
        return super().run()
