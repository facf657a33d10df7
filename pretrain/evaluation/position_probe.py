"""The position probe: can a patch's place be read off features that were never given it (METHOD.md 8)?

The position of some patches of a whole image is replaced by the position mask token; a linear read-out of those patches' final
features gives their coordinates. This is the direct test of the paper's claim that content and position are intertwined.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor

from pretrain.data.decode import BrokenImage, decode
from pretrain.data.sources import open_source
from pretrain.errors import UserError
from pretrain.evaluation.features import FORWARD_BATCH, Features, square
from pretrain.evaluation.labelled import in_threads, spread
from pretrain.evaluation.linear import Moments, ridge
from pretrain.views.masks import cross_mask

MASKED_SHARE = 0.5  # ours: the most that training masks (Table 6), the same for every run that is compared


@dataclass(frozen=True)
class PositionProbe:
    """Error of the read-out on every second image, fitted on the others.

    * ``probe/position_error``: mean distance between the read and the true centre of a patch, in image units (the sides are 1).
    * ``probe/position_chance``: the same for the constant guess, the mean place of the patches that the fit saw.
    * ``probe/position_r2``: share of the variance of the coordinates that the read-out explains; 0 is the constant guess.

    Attributes:
        images: uint8 [n, 3, S, S], whole images squeezed to squares.
        masks: [n, N] bool, crosses drawn once from the image's number.
    """

    images: Tensor
    masks: Tensor

    @staticmethod
    def read(data: DictConfig, patch_size: int, side_px: int, max_images: int) -> "PositionProbe":
        """The probe on at most ``max_images`` images of ``data.root``, at equal steps; broken ones are left out.

        Raises:
            UserError: a bad source (by its own key), or fewer than two images that can be read.
        """
        images = list(_squares(data, side_px, max_images))
        if len(images) < 2:
            raise UserError(f"probes.position: of the images of data.root={data.root}, {len(images)} can be read; it needs 2")
        return PositionProbe.of(torch.stack(images), patch_size)

    @staticmethod
    def of(images: Tensor, patch_size: int) -> "PositionProbe":
        """The probe on given images, uint8 [n, 3, S, S]."""
        grid = (images.shape[2] // patch_size, images.shape[3] // patch_size)
        target = max(1, round(MASKED_SHARE * grid[0] * grid[1]))
        masks = np.stack([cross_mask(grid, target, np.random.default_rng([i])).ravel() for i in range(len(images))])
        return PositionProbe(images, torch.from_numpy(masks))

    def __call__(self, features: Features) -> dict[str, float]:
        """The probe's numbers for a backbone, which must hold a position mask token."""
        fit, test = slice(0, None, 2), slice(1, None, 2)
        moments = Moments(features.backbone.embed_dim, 2, features.device)
        for x, place in self._masked_patches(features, fit):
            moments.add(x, place)
        read_out, guess = ridge(moments), moments.y / moments.n
        totals = torch.zeros(4, dtype=torch.float64, device=moments.home)  # distances and squares, of the read-out and the guess
        n = 0
        for x, place in self._masked_patches(features, test):
            place = place.to(moments.home)
            squares = torch.stack([(read_out(x) - place).square().sum(1), (guess - place).square().sum(1)])  # [2, n]
            totals += torch.cat([squares.sqrt().sum(1), squares.sum(1)])
            n += len(place)
        error, chance, explained, total = totals.tolist()
        return {
            "probe/position_error": error / n,
            "probe/position_chance": chance / n,
            "probe/position_r2": 1 - explained / total,
        }

    def _masked_patches(self, features: Features, part: slice) -> Iterator[tuple[Tensor, Tensor]]:
        """Features [n, D] of the masked patches and the centres [n, 2] (x, y) of these, a batch at a time."""
        images, masks = self.images[part], self.masks[part]
        places = centres(images.shape[-1] // features.backbone.patch_size)
        for tokens, mask in zip(features(images, masks), masks.split(FORWARD_BATCH)):
            yield tokens.patches[mask.to(features.device)], places.expand(len(mask), -1, -1)[mask]


def centres(side: int) -> Tensor:
    """Centres (x, y) in [0, 1] of the patches of a square grid, [side * side, 2] float64, row-major."""
    ticks = (torch.arange(side, dtype=torch.float64) + 0.5) / side
    y, x = torch.meshgrid(ticks, ticks, indexing="ij")
    return torch.stack([x, y], dim=-1).flatten(0, 1)


def _squares(data: DictConfig, side_px: int, max_images: int) -> Iterator[Tensor]:
    """Images of the training data, uint8 [3, S, S] each."""
    source = open_source(data)

    def encoded() -> Iterator[bytes]:
        for index in spread(range(len(source)), max_images):
            try:
                yield source.read(index)
            except BrokenImage:
                continue

    def made(content: bytes) -> Tensor | None:
        try:
            return square(decode(content, max_mpx=data.max_mpx), side_px, crop=False)
        except BrokenImage:
            return None

    return (image for image in in_threads(made, encoded()) if image is not None)
