"""The order of the training images, and the loading of batches, for both engines.

A batch is a pure function of (seed, position in the stream): workers, ranks and resuming cannot change it.
"""

import math
from collections.abc import Callable, Generator, Iterable
from functools import lru_cache, partial
from itertools import chain, tee
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pretrain.data.broken import Skipped, read_or_other
from pretrain.errors import UserError
from pretrain.signals import start_worker

Sample = dict[str, Any]
ORDER, AUGMENT, STEP, SUBSTITUTE = 0, 1, 2, 3  # streams of random numbers of one seed


def stream_index(position: int, length: int, seed: int) -> int:
    """The image at a position of the endless stream, which is one permutation of all images after another."""
    epoch, place = divmod(position, length)
    return int(_order(length, seed, epoch)[place])


@lru_cache(maxsize=4)
def _order(length: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, ORDER, epoch]).permutation(length)


def positions(iteration: int, batch_size: int, rank: int, world_size: int) -> range:
    """A rank's share of an iteration's batch: consecutive positions of the stream, rank 0 first."""
    share = batch_size // world_size
    start = iteration * batch_size + rank * share
    return range(start, start + share)


def with_substitute(position: int, length: int, seed: int, make: Callable[[int], Sample]) -> Sample:
    """The sample of the image at a position of the stream; of another one if it is broken, which the sample's
    ``broken`` then names. Which one depends on (seed, position) alone.

    Args:
        make: index of an image -> sample.
    """
    index = stream_index(position, length, seed)
    draws = partial(np.random.default_rng, [seed, SUBSTITUTE, position])
    sample, broken = read_or_other(index, length, make, draws)
    return {**sample, "broken": broken} if broken else sample


def to_tensor(image: np.ndarray) -> Tensor:
    """[H, W, 3] -> [3, H, W]."""
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))


def batches(
    samples: Dataset[Sample],
    indices: Iterable[list[int]],
    workers: int,
    device: torch.device,
    skipped: Skipped | None = None,
) -> Generator[list[Sample], None, None]:
    """Lists of samples in the order of ``indices``.

    Workers hand over one sample at a time and are one batch ahead. If each made whole batches, the first
    batch would wait for all its images, and with 64 images a process they would hold gigabytes of shared
    memory and a thousand open files.

    Args:
        skipped: the account of the images that the samples name under ``broken`` (:func:`with_substitute`).

    Raises:
        UserError: too many images are skipped; a sample's, also where a worker process meets it.
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
        worker_init_fn=_start_worker,
    )
    iterator: Any = iter(loader)
    try:
        for batch in due:
            made = [next(iterator) for _ in batch]
            broken = [name for sample in made for name in sample.pop("broken", ())]
            if skipped:
                skipped.record(len(made), broken)
            yield made
    except UserError as error:  # a worker's traceback precedes its message
        text = str(error).splitlines()[-1]
        raise UserError(text.removeprefix(f"{type(error).__module__}.{type(error).__name__}: ")) from error
    finally:
        # Now: an exception's traceback would keep them alive, and they ignore the signal that an ending
        # process sends
        if workers:
            iterator._shutdown_workers()


def _start_worker(worker: int) -> None:
    """One thread."""
    start_worker()
    torch.set_num_threads(1)
