"""The position probe: can a patch's place be read off features that were never given it (METHOD.md 8)?

The position of some patches of a whole image is replaced by the position mask token; a linear read-out of
those patches' final features gives their coordinates. This is the direct test of the paper's claim that
content and position are intertwined.

Files of other methods hold no such token: :func:`hide_with` puts the mean of all positions in its place.
Layer by layer: :mod:`pretrain.evaluation.position_layers`.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pretrain.backbones.vit import ViT
from pretrain.data.images import Images, read_images, square
from pretrain.data.sources import DataSettings
from pretrain.errors import UserError
from pretrain.evaluation.features import FORWARD_BATCH, Features
from pretrain.evaluation.linear import Moments, ReadOut, ridge
from pretrain.views.masks import MaskSettings, mask_of_shape

HIDDEN_BY = ("auto", "token", "mean", "zero")
MASKED_SHARE = 0.5  # ours: the most that training masks (Table 6), the same for every run that is compared


@dataclass(frozen=True)
class PositionProbe:
    """Error of the read-out on every second image, fitted on the others.

    * ``probe/position_error``: mean distance between the read and the true center of a patch, in image units
      (the sides are 1).
    * ``probe/position_chance``: the same for the constant guess, the mean place of the patches that the fit
      saw.
    * ``probe/position_r2``: share of the variance of the coordinates that the read-out explains; 0 is the
      constant guess.

    Attributes:
        images: uint8 [n, 3, S, S], whole images squeezed to squares.
        masks: [n, N] bool, crosses drawn once from the image's number.
    """

    images: Tensor
    masks: Tensor

    @staticmethod
    def read(data: DataSettings, patch_size: int, side_px: int, max_images: int) -> "PositionProbe":
        """The probe on at most ``max_images`` images of ``data.root``, at equal steps; broken ones are left
        out.

        Raises:
            UserError: a bad source (by its own key), or fewer than two images that can be read.
        """
        return PositionProbe.of(torch.stack(read_squares(data, side_px, max_images).pixels), patch_size)

    @staticmethod
    def of(images: Tensor, patch_size: int) -> "PositionProbe":
        """The probe on given images, uint8 [n, 3, S, S]."""
        grid = (images.shape[2] // patch_size, images.shape[3] // patch_size)
        return PositionProbe(images, draw_masks(len(images), grid))

    def __call__(self, features: Features) -> dict[str, float]:
        """The probe's numbers for a backbone, which must hold a position mask token."""
        reader = PlaceReader(features.backbone.embed_dim, features.device)
        for part, learn in ((slice(0, None, 2), reader.fit), (slice(1, None, 2), reader.judge)):
            images, masks = self.images[part], self.masks[part]
            places = centers(images.shape[-1] // features.backbone.patch_size)
            for tokens, mask in zip(features(images, masks), masks.split(FORWARD_BATCH)):
                learn(tokens.patches[mask.to(features.device)], places.expand(len(mask), -1, -1)[mask])
        return {f"probe/position_{name}": value for name, value in reader.score()._asdict().items()}


class Score(NamedTuple):
    """How well places are read; see :class:`PositionProbe`."""

    error: float
    chance: float
    r2: float


class PlaceReader:
    """A linear read-out of places, fitted on some rows, then judged on others; its memory does not grow
    with the rows."""

    def __init__(self, dim: int, device: torch.device) -> None:
        self.moments = Moments(dim, 2, device)
        self.read_out: ReadOut | None = None
        self.totals = torch.zeros(4, dtype=torch.float64, device=self.moments.home)
        self.n = 0

    def fit(self, x: Tensor, places: Tensor) -> None:
        """Rows x [n, D] to fit on, and their places [n, 2]; all of them before the first to be judged."""
        assert self.read_out is None
        self.moments.add(x, places)

    def judge(self, x: Tensor, places: Tensor) -> None:
        """Rows that were not fitted on."""
        if self.read_out is None:
            self.read_out, self.guess = ridge(self.moments), self.moments.y / self.moments.n
        places = places.to(self.moments.home)
        squares = torch.stack(
            [(self.read_out(x) - places).square().sum(1), (self.guess - places).square().sum(1)]
        )  # [2, n]
        self.totals += torch.cat(
            [squares.sqrt().sum(1), squares.sum(1)]
        )  # distances and squares, of the read-out and the guess
        self.n += len(places)

    def score(self) -> Score:
        """Over the rows judged so far."""
        error, chance, explained, total = self.totals.tolist()
        return Score(error / self.n, chance / self.n, 1 - explained / total)


def centers(rows: int, columns: int | None = None) -> Tensor:
    """Centers (x, y) in [0, 1] of the patches of a grid (square without ``columns``), [rows * columns, 2]
    float64, row-major."""
    x, y = ((torch.arange(n, dtype=torch.float64) + 0.5) / n for n in (columns or rows, rows))
    y, x = torch.meshgrid(y, x, indexing="ij")
    return torch.stack([x, y], dim=-1).flatten(0, 1)


def draw_masks(n: int, grid: tuple[int, int], shape: str = "cross", draw: int = 0) -> Tensor:
    """Position masks of ``n`` images, [n, N] bool, from the image's number and that of the draw; 0 is the
    draw of training."""
    target, rule = max(1, round(MASKED_SHARE * grid[0] * grid[1])), MaskSettings()
    seeds = ([i, draw] if draw else [i] for i in range(n))
    masks = [mask_of_shape(shape, grid, target, rule, np.random.default_rng(seed)).ravel() for seed in seeds]
    return torch.from_numpy(np.stack(masks))


def hide_with(backbone: ViT, mask: str, has_token: bool, grid: tuple[int, int]) -> str:
    """Say what stands for a position that is hidden: fills the backbone's position mask token.

    Args:
        backbone: built with ``mask_tokens=True``.
        mask: ``token``: the file's, learned in pre-training | ``mean``: the mean of the grid's positions
            (ours), so that the patch looks as usual to the blocks and its position says nothing | ``zero`` |
            ``auto``: ``token`` where there is one, else ``mean``.
        has_token: the file holds one.
        grid: (h, w) of the images.

    Returns:
        ``token``, ``mean`` or ``zero``; ``none`` for a ViT without positions to hide.

    Raises:
        UserError: ``token``, but the file holds none.
    """
    if mask == "auto":
        mask = "token" if has_token else "mean"
    if mask == "token":
        if not has_token:
            raise UserError(
                "mask 'token': the file holds no pos_mask_token; pre-training with position masks leaves one"
            )
        return mask
    with torch.no_grad():
        token = backbone.pos_mask_token
        token.copy_(backbone.positions(grid).mean(1) if mask == "mean" else torch.zeros_like(token))
    return mask if backbone.pos_encoding != "none" else "none"


def read_squares(data: DataSettings, side_px: int, max_images: int) -> Images[Tensor]:
    """Images of the training data, uint8 [3, S, S] each; the arguments and errors are those of
    :meth:`PositionProbe.read`."""
    found = read_images(data, max_images, lambda pixels: square(pixels, side_px, crop=False))
    if len(found.names) < 2:
        raise UserError(
            f"the position probe needs 2 images; of those of data.root={data.root}, 1 can be read"
        )
    return found
