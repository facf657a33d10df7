"""From image files to batches. Random numbers depend on seed, stream and sample index alone.

``data.path`` chooses one of two data paths. ``cpu`` makes the crops in the workers. With ``device`` the
workers only decode and draw; the crops are made when the batch moves to the device
(:mod:`pretrain.views.device_pixels`). Both use the same draws.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from pretrain import distributed
from pretrain.data.broken import UnreadableImage, read_or_other
from pretrain.data.decode import BrokenImage, decode
from pretrain.data.sampler import COLORS, MASKS, SUBSTITUTES, VIEWS, Order, SampleIndices, generator
from pretrain.data.sources import Source, open_source
from pretrain.device import choose_device
from pretrain.errors import UserError
from pretrain.signals import start_worker
from pretrain.views import (
    Colors,
    Masks,
    PositionSettings,
    Views,
    ViewSettings,
    draw_colors,
    draw_masks,
    draw_views,
)
from pretrain.views.batch import Batch
from pretrain.views.device_pixels import CanvasBatch
from pretrain.views.pixels import Pixels, render

DEVICE_SIDE_PX = 512  # longest side on the device path without `data.max_side_px`: it sets the canvas
CANVAS_STEP_PX = 32  # few sizes of canvases, so that the device's memory is reused

PLAIN = PositionSettings(encoding="standard", augment=False)  # for a method that reads no positions

AnyBatch = Batch | CanvasBatch  # `to(device, dtype)` of either gives the Batch of a step


@dataclass(frozen=True)
class Decoded:
    """One decoded image, for the device path."""

    sample_index: int
    image: Pixels  # [H, W, 3] uint8
    broken: tuple[str, ...]  # images that could not be read before this one, with the reason


@dataclass(frozen=True)
class Sample:
    """One image's views, made by a worker."""

    sample_index: int
    global_crops: Tensor  # uint8 [G, 3, S, S]
    local_crops: Tensor  # uint8 [L, 3, s, s]
    views: Views  # B = 1
    broken: tuple[str, ...]


def draw(
    rules: ViewSettings, seed: int, sample_indices: Sequence[int], sizes_px: NDArray[np.float64]
) -> tuple[Views, Colors]:
    """Views and colors of some samples of the run, [B, V]. ``sizes_px`` is [B, 2], height and width."""
    rngs = [generator(seed, VIEWS, i) for i in sample_indices]
    views = draw_views(sizes_px, rules.crops, rules.positions or PLAIN, rngs, rules.tied)
    rngs = [generator(seed, COLORS, i) for i in sample_indices]
    n_views, n_global = views.flips.shape[1], views.n_global
    return views, draw_colors(n_views, n_global, rules.color, rngs, rules.crops.plain_globals)


class ViewsDataset(Dataset[Sample | Decoded]):
    """What a worker makes of a sample. A random image replaces one that cannot be read.

    Args:
        source: encoded images by index.
        batch_size: over all ranks; with the seed it determines the order.
        max_side_px, max_mpx: those of :func:`pretrain.data.decode.decode`.
        on_device: leave the crops to the training device: items are :class:`Decoded`, else :class:`Sample`.
    """

    def __init__(
        self,
        source: Source,
        rules: ViewSettings,
        batch_size: int,
        seed: int,
        *,
        max_side_px: int,
        max_mpx: float,
        on_device: bool,
    ) -> None:
        self.source, self.rules, self.seed, self.on_device = source, rules, seed, on_device
        self.max_side_px, self.max_mpx = max_side_px, max_mpx
        self.order = Order(len(source), batch_size, seed)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, sample_index: int) -> Sample | Decoded:
        image, broken = self.read(sample_index)
        made = Decoded if self.on_device else self.sample
        return made(sample_index, image, broken)

    def sample(self, sample_index: int, image: Pixels, broken: tuple[str, ...] = ()) -> Sample:
        """The views of a sample, made in this process."""
        rules, sides = self.rules, self.rules.crops
        views, colors = draw(rules, self.seed, [sample_index], np.array([image.shape[:2]], np.float64))
        crops = render(image, views, colors, rules.color, global_px=sides.global_px, local_px=sides.local_px)
        return Sample(sample_index, *crops, views, broken)

    def read(self, sample_index: int) -> tuple[Pixels, tuple[str, ...]]:
        """The image of a sample, uint8 [H, W, 3], and the images that could not be read before it.

        Raises:
            UserError: too many unreadable images in a row.
        """

        def decoded(index: int) -> Pixels:
            try:
                return decode(self.source.read(index), self.max_side_px, self.max_mpx)
            except BrokenImage as error:
                raise UnreadableImage(f"{self.source.name(index)} ({error})") from error

        def draws() -> np.random.Generator:
            return generator(self.seed, SUBSTITUTES, sample_index)

        index, n = self.order.image(sample_index), len(self.source)
        image, broken = read_or_other(index, n, decoded, draws, "data.root")
        return image, tuple(broken)


@dataclass(frozen=True)
class Collate:
    """Make a batch of samples, and draw the masks of its iteration."""

    rules: ViewSettings
    batch_size: int  # over all ranks
    seed: int

    def __call__(self, items: Sequence[Sample | Decoded]) -> tuple[AnyBatch, tuple[str, ...]]:
        """The batch, and the images that could not be read."""
        broken = tuple(name for item in items for name in item.broken)
        samples = [item for item in items if isinstance(item, Sample)]
        if samples:
            return self.crops(samples), broken
        return self.canvas([item for item in items if isinstance(item, Decoded)]), broken

    def crops(self, samples: Sequence[Sample]) -> Batch:
        """A batch of crops that the worker made."""
        tensors = ("boxes", "flips", "position_boxes")
        boxes, flips, positions = (torch.cat([getattr(s.views, name) for s in samples]) for name in tensors)
        views = replace(samples[0].views, boxes=boxes, flips=flips, position_boxes=positions)
        global_crops, local_crops = ([s.global_crops for s in samples], [s.local_crops for s in samples])
        return Batch(view_major(global_crops), view_major(local_crops), views, self.masks(samples))

    def canvas(self, images: Sequence[Decoded]) -> CanvasBatch:
        """A batch of images whose crops the training device will make."""
        rules = self.rules
        canvas, sizes_px = lay_out([item.image for item in images])
        views, colors = draw(rules, self.seed, [item.sample_index for item in images], sizes_px)
        sizes = torch.from_numpy(sizes_px.astype(np.float32))
        sides_px = rules.crops.global_px, rules.crops.local_px
        return CanvasBatch(canvas, sizes, views, colors, self.masks(images), rules.color, *sides_px)

    def masks(self, items: Sequence[Sample | Decoded]) -> Masks | None:
        """The rows of these items in the masks of their iteration; ``None`` for a method without masks."""
        rules = self.rules
        if rules.masks is None:
            return None
        iteration, first = divmod(items[0].sample_index, self.batch_size)
        rows, key = slice(first, first + len(items)), (self.seed, MASKS, iteration)
        return draw_masks(self.batch_size, rules.crops.n_global, rules.grid, rules.masks, key, rows)


def view_major(crops: Sequence[Tensor]) -> Tensor:
    """The crops [V, 3, S, S] of each image as [V * B, 3, S, S], view by view; channels last in memory."""
    (n_views, _, size, _), n_images = crops[0].shape, len(crops)
    pixels = batch_memory(n_views, n_images, size, size, 3)
    for image, views in enumerate(crops):
        pixels[:, image] = views.permute(0, 2, 3, 1)
    return pixels.flatten(0, 1).permute(0, 3, 1, 2)


def lay_out(images: Sequence[Pixels]) -> tuple[Tensor, NDArray[np.float64]]:
    """Images [h, w, 3] on one canvas, uint8 [B, H, W, 3], undefined beside them; and their sizes [B, 2]."""
    sizes_px = np.array([image.shape[:2] for image in images], np.float64)
    height, width = (int(-(-side // CANVAS_STEP_PX) * CANVAS_STEP_PX) for side in sizes_px.max(0))
    canvas = batch_memory(len(images), height, width, 3)
    for place, image in zip(canvas.numpy(), images):
        place[: image.shape[0], : image.shape[1]] = image
    return canvas, sizes_px


def batch_memory(*shape: int) -> Tensor:
    """Undefined uint8 [shape] for a batch; in a worker it is shared with the trainer, which saves a copy.

    It is never NumPy's, which requests large pages for large arrays: finding them took longer than decoding.
    """
    if get_worker_info() is None:
        return torch.empty(shape, dtype=torch.uint8)
    storage = torch.UntypedStorage._new_shared(math.prod(shape))  # as torch's own collation
    return torch.empty(0, dtype=torch.uint8).set_(storage).view(shape)


def build_dataset(config: Any) -> ViewsDataset:
    """The images and views of a run, from a method's ``Settings``; ``data.path=auto``: device on CUDA."""
    data, path = config.data, config.data.path
    on_device = path == "device" or path == "auto" and choose_device(config.run.device).type == "cuda"
    return ViewsDataset(
        open_source(data),
        config.view_settings(),
        config.optim.batch_size,
        config.run.seed,
        max_side_px=data.max_side_px or (DEVICE_SIDE_PX if on_device else 0),
        max_mpx=data.max_mpx,
        on_device=on_device,
    )


def build_loader(
    config: Any, dataset: ViewsDataset, start_iter: int, end_iter: int, pin_memory: bool = False
) -> DataLoader:
    """This rank's batches from an iteration to another, each with the images that could not be read.

    With ``step.accumulate`` = A, an iteration is A consecutive batches: equal parts of the rank's share, with
    their rows of the iteration's masks.
    """
    batch_size, n_micro_batches = config.optim.batch_size, config.step.accumulate
    n_ranks = distributed.world_size()
    if batch_size % n_ranks:
        raise UserError(f"config: optim.batch_size={batch_size} is no multiple of the {n_ranks} ranks")
    if batch_size // n_ranks % n_micro_batches:
        share = f"a rank's {batch_size // n_ranks} images (optim.batch_size={batch_size})"
        raise UserError(f"config: step.accumulate={n_micro_batches} does not divide {share}")
    sampler = SampleIndices(start_iter, end_iter, batch_size, distributed.rank(), n_ranks, n_micro_batches)
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=Collate(dataset.rules, batch_size, config.run.seed),
        num_workers=config.data.workers,
        pin_memory=pin_memory,
        worker_init_fn=_worker,
    )


def _worker(number: int) -> None:
    start_worker()
    torch.set_num_threads(1)  # there are many workers
    cv2.setNumThreads(0)
    keep_memory()


def keep_memory() -> None:
    """Let the C library keep freed memory of up to 64 MB for the next images.

    glibc returns it to the system after each image; faulting it in again costs a fifth of decoding. Its limit
    becomes twice the largest block ever freed, up to blocks of 32 MB. Other C libraries ignore this.
    """
    np.empty(31 << 20, np.uint8)  # freed at once
