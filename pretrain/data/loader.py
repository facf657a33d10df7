"""From image files to batches. All randomness is drawn from (seed, stream, position): no worker, rank or resume can change it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, ListConfig
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pretrain import distributed
from pretrain.data.decode import BrokenImage, decode
from pretrain.data.folder import list_images
from pretrain.data.sampler import MASKS, VIEWS, Order, PositionSampler
from pretrain.errors import UserError
from pretrain.views.batch import Batch
from pretrain.views.boxes import CropRule, PositionRule, Views, draw_views
from pretrain.views.colour import ColourRule, draw_colour
from pretrain.views.masks import MaskRule, draw_masks
from pretrain.views.pixels import render

MAX_TRIES = 16  # unreadable images in a row before a run gives up


@dataclass(frozen=True)
class Rules:
    """How views are made, read off a config."""

    crops: CropRule
    positions: PositionRule
    colour: ColourRule
    masks: MaskRule
    global_px: int
    local_px: int
    grid: tuple[int, int]  # patches of a global crop

    @staticmethod
    def of(config: DictConfig) -> "Rules":
        """The rules of a config."""
        crops, positions, colour, masks = (_plain(config[group]) for group in ("crops", "positions", "colour", "masks"))
        global_px, local_px = crops.pop("global_px"), crops.pop("local_px")
        encoding = positions.pop("encoding")
        positions["enabled"] = positions.pop("augment") and encoding == "field"
        del positions["grid"], positions["interpolation"]
        side = global_px // config.backbone.patch_size
        return Rules(
            CropRule(**crops),
            PositionRule(**positions),
            ColourRule(**colour),
            MaskRule(**masks),
            global_px,
            local_px,
            (side, side),
        )


def _plain(group: DictConfig) -> dict[str, Any]:
    """A group of keys as plain values, lists as tuples."""
    return {str(key): tuple(value) if isinstance(value, ListConfig) else value for key, value in group.items()}


@dataclass(frozen=True)
class Sample:
    """One image's views."""

    position: int
    global_crops: Tensor  # [G, 3, S, S]
    local_crops: Tensor  # [L, 3, s, s]
    views: Views
    broken: tuple[str, ...]  # files that could not be read on the way to this image, with the reason


class ViewsDataset(Dataset[Sample]):
    """Samples by position; an unreadable image is replaced by the next one in the list."""

    def __init__(self, root: str, rules: Rules, batch_size: int, seed: int) -> None:
        self.root, self.rules, self.seed = Path(root), rules, seed
        self.names = list_images(root)
        self.order = Order(len(self.names), batch_size, seed)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, position: int) -> Sample:
        image, broken = self.read(position)
        rules, rng = self.rules, np.random.default_rng([self.seed, VIEWS, position])
        views = draw_views(image.shape[1], image.shape[2], rules.crops, rules.positions, rng)
        n_views, n_global = views.boxes.shape[1], views.n_global
        colours = [draw_colour(view, n_global, rules.colour, rng) for view in range(n_views)]
        crops = render(
            image,
            views,
            colours,
            global_px=rules.global_px,
            local_px=rules.local_px,
            blur_kernel_px=rules.colour.blur_kernel_px,
            solarize_threshold=rules.colour.solarize_threshold,
        )
        return Sample(position, *crops, views, broken)

    def read(self, position: int) -> tuple[Tensor, tuple[str, ...]]:
        """The image at a position, uint8 [3, H, W], and the files that could not be read on the way to it.

        Raises:
            UserError: too many unreadable files in a row.
        """
        index, broken = self.order.image(position), list[str]()
        for step in range(min(MAX_TRIES, len(self.names))):
            name = self.names[(index + step) % len(self.names)]
            try:
                return decode(self.root / name), tuple(broken)
            except BrokenImage as error:
                broken.append(f"{name} ({error})")
        raise UserError(f"data.root: {len(broken)} images in a row in {self.root} cannot be read, the first {broken[0]}")


@dataclass(frozen=True)
class Collate:
    """Samples to a batch; draws the masks of the batch's iteration."""

    rules: Rules
    batch_size: int  # over all ranks
    seed: int

    def __call__(self, samples: Sequence[Sample]) -> tuple[Batch, tuple[str, ...]]:
        """The batch, and the files that could not be read."""
        iteration, first = divmod(samples[0].position, self.batch_size)
        views = Views.stack([s.views for s in samples])
        masks = draw_masks(
            self.batch_size,
            views.n_global,
            self.rules.grid,
            self.rules.masks,
            (self.seed, MASKS, iteration),
            slice(first, first + len(samples)),
        )
        global_crops = torch.stack([s.global_crops for s in samples], dim=1).flatten(0, 1)  # view-major
        local_crops = torch.stack([s.local_crops for s in samples], dim=1).flatten(0, 1)
        return Batch(global_crops, local_crops, views, masks), tuple(b for s in samples for b in s.broken)


def build_dataset(config: DictConfig) -> ViewsDataset:
    """The images and views of a config."""
    return ViewsDataset(config.data.root, Rules.of(config), config.optim.batch_size, config.run.seed)


def build_loader(config: DictConfig, dataset: ViewsDataset, start_it: int, end_it: int, pin_memory: bool = False) -> DataLoader:
    """Batches (with the files that could not be read) of this rank, from an iteration to the end of the run."""
    batch_size = config.optim.batch_size
    if batch_size % distributed.world_size():
        raise UserError(f"config: optim.batch_size={batch_size} is no multiple of the {distributed.world_size()} ranks")
    sampler = PositionSampler(start_it, end_it, batch_size, distributed.rank(), distributed.world_size())
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=Collate(dataset.rules, batch_size, config.run.seed),
        num_workers=config.data.workers,
        pin_memory=pin_memory,
        worker_init_fn=_one_thread,
    )


def _one_thread(worker: int) -> None:
    """Workers share the cores by being many, not by having threads each."""
    torch.set_num_threads(1)
