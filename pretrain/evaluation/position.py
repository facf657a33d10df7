"""The position probe, layer by layer: can a patch's place be read off features that were never given it
(METHOD.md 7), and where in the network does it become known, or get lost?

The position of some patches of a whole image is replaced by the position mask token; a linear read-out of
those patches' features gives their coordinates: after the embedding, after each block and after the final
norm, and, for comparison, of the other patches of the same images, whose position was given. This is the
direct test of the paper's claim that content and position are intertwined.

Files of other methods hold no such token: :func:`hide_with` puts the mean of all positions in its place. A hidden patch of
rotary positions is not turned, as [CLS] is not, and a file without the token adds nothing to it.

The read-out is ridge regression in closed form, float64: nothing to tune or to draw. Features are
standardized; D / n is added to the diagonal of their D x D correlation matrix, n being the rows (ours): as if
D rows of noise had been seen too, which matters for the few images of a small probe and vanishes with many.
"""

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pretrain.backbones.vit import ViT
from pretrain.data.images import Images, read_images, square
from pretrain.data.sources import DataSettings
from pretrain.errors import UserError
from pretrain.evaluation.features import Features, Moments, ReadOut, layer_names
from pretrain.views.masks import MaskSettings, mask_of_shape

HIDDEN_BY = ("auto", "token", "mean", "zero")
MASKED_SHARE = 0.5  # ours: the most that training masks (Table 6), the same for every run that is compared
PATCHES = ("hidden", "given")  # which patches are read: those whose position was hidden, those that had it


class Score(NamedTuple):
    """How well places are read."""

    error: float  # mean distance between read and true centers of patches, in image units (the sides are 1)
    chance: float  # the same for the constant guess, the mean place of the patches that the fit saw
    r2: float  # share of the variance of the coordinates that is explained; 0 is the constant guess


class LayerScore(NamedTuple):
    """A layer's :class:`Score` in every draw of the masks; ``patches`` is one of :data:`PATCHES`."""

    patches: str
    layer: int
    name: str
    scores: tuple[Score, ...]

    def mean(self, field: str) -> float:
        """Mean over the draws of ``error``, ``chance`` or ``r2``."""
        return statistics.fmean(getattr(score, field) for score in self.scores)

    def std(self, field: str) -> float:
        """Sample standard deviation over the draws; NaN for a single one."""
        values = [getattr(score, field) for score in self.scores]
        return statistics.stdev(values) if len(values) > 1 else math.nan


def position_layers(
    features: Features,
    images: Tensor,
    draws: int = 3,
    shape: str = "cross",
    tell: Callable[[int], None] = lambda n: None,
    last_only: bool = False,
) -> list[LayerScore]:
    """Probe every layer, fitted on every second image and judged on the others, for several draws of the
    masks.

    The images go through the backbone once a draw. Memory: two D x D float64 matrices a layer and the
    features of one layer at a time.

    Args:
        features: of a backbone that holds a position mask token (see :func:`hide_with`), frozen.
        images: uint8 [n, 3, H, W], whole images, both sides multiples of the patch size.
        shape: of the masks, ``cross`` | ``box``.
        tell: is called after each batch with its number of images.
        last_only: only the last layer, only its hidden patches: the probe of a training.

    Returns:
        all layers of the hidden patches, then all of the others.
    """
    names, patch_px = layer_names(features.backbone), features.backbone.patch_size
    layers = range(len(names))[-1 if last_only else 0 :]
    kinds = PATCHES[: 1 if last_only else 2]
    grid = (images.shape[2] // patch_px, images.shape[3] // patch_px)
    by_draw = []
    for draw in range(draws):
        by_draw.append({(kind, layer): _PlaceReader(features) for kind in kinds for layer in layers})
        masks = draw_masks(len(images), grid, shape, draw)
        _read_places(features, images, masks, centers(*grid), by_draw[-1], tell)
    scores = {key: tuple(readers[key].score() for readers in by_draw) for key in by_draw[0]}
    return [LayerScore(kind, layer, names[layer], own) for (kind, layer), own in scores.items()]


def _read_places(
    features: Features,
    images: Tensor,
    masks: Tensor,
    places: Tensor,
    readers: "dict[tuple[str, int], _PlaceReader]",
    tell: Callable[[int], None],
) -> None:
    """Fit the readers, of (kind of patches, layer), on every second image, and judge the others."""
    last = max(layer for _, layer in readers)
    for half, learn in ((slice(0, None, 2), _PlaceReader.fit), (slice(1, None, 2), _PlaceReader.judge)):
        hidden = masks[half]

        def visit(part: slice, layer: int, patches: Tensor, hidden: Tensor = hidden, learn=learn) -> None:  # type: ignore[no-untyped-def]
            for kind, chosen in zip(PATCHES, (hidden[part], ~hidden[part])):
                if (kind, layer) in readers:
                    rows = patches[chosen.to(patches.device)]
                    learn(readers[kind, layer], rows, places.expand(len(chosen), -1, -1)[chosen])
            if layer == last:
                tell(len(patches))

        features.visit(images[half], visit, hidden)


class _PlaceReader:
    """A linear read-out of places, fitted on some rows [n, D] with places [n, 2], then judged on others; its
    memory does not grow with the rows."""

    def __init__(self, features: Features) -> None:
        self.moments = Moments(features.backbone.embed_dim, 2, features.device)
        self.read_out: ReadOut | None = None
        self.totals = torch.zeros(4, dtype=torch.float64, device=self.moments.home)
        self.n = 0

    def fit(self, x: Tensor, places: Tensor) -> None:
        assert self.read_out is None
        self.moments.add(x, places)

    def judge(self, x: Tensor, places: Tensor) -> None:
        if self.read_out is None:
            self.read_out, self.guess = ridge(self.moments), self.moments.y / self.moments.n
        places = places.to(self.moments.home)
        squares = torch.stack([(guess - places).square().sum(1) for guess in (self.read_out(x), self.guess)])
        # [2, n]: distances and squares, of the read-out and the guess
        self.totals += torch.cat([squares.sqrt().sum(1), squares.sum(1)])
        self.n += len(places)

    def score(self) -> Score:
        error, chance, explained, total = self.totals.tolist()
        return Score(error / self.n, chance / self.n, 1 - explained / total)


def ridge(moments: Moments) -> ReadOut:
    """Ridge regression: least squares on standardized features, with D times their squared weights as a
    penalty."""
    mean, std, correlation = moments.standard()
    y_mean = moments.y / moments.n
    covariance = (moments.xy / moments.n - torch.outer(mean, y_mean)) / std[:, None]  # [D, K]
    penalty = len(mean) / moments.n * torch.eye(len(mean), dtype=mean.dtype, device=mean.device)
    weight = torch.linalg.solve(correlation + penalty, covariance) / std[:, None]
    return ReadOut(weight, y_mean - mean @ weight)


def centers(rows: int, columns: int | None = None) -> Tensor:
    """Centers (x, y) in [0, 1] of the patches of a grid (square without ``columns``), [rows * columns, 2]
    float64, row-major."""
    x, y = ((torch.arange(n, dtype=torch.float64) + 0.5) / n for n in (columns or rows, rows))
    y, x = torch.meshgrid(y, x, indexing="ij")
    return torch.stack([x, y], dim=-1).flatten(0, 1)


def draw_masks(n: int, grid: tuple[int, int], shape: str = "cross", draw: int = 0) -> Tensor:
    """Position masks of ``n`` images, [n, N] bool, from the number of the image and the draw (0: a probe's)."""
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
            ``auto``: ``token`` where there is one, else ``mean``. Rotary positions have no mean: ``zero``.
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
            left = "pre-training with position masks leaves one"
            raise UserError(f"mask 'token': the file holds no pos_mask_token; {left}")
        return mask
    mask = "zero" if backbone.pos_encoding == "rotary" else mask
    with torch.no_grad():
        token = backbone.pos_mask_token
        token.copy_(backbone.positions(grid).mean(1) if mask == "mean" else torch.zeros_like(token))
    return mask if backbone.pos_encoding != "none" else "none"


def read_squares(data: DataSettings, side_px: int, max_images: int) -> Images[Tensor]:
    """At most ``max_images`` images of ``data.root`` at equal steps, squeezed to squares, uint8 [3, S, S]
    each; broken ones are left out.

    Raises:
        UserError: a bad source (by its own key), or fewer than two images that can be read.
    """
    found = read_images(data, max_images, lambda pixels: square(pixels, side_px, crop=False))
    if len(found.names) < 2:
        needs = "the position probe needs 2 images"
        raise UserError(f"{needs}; of those of data.root={data.root}, 1 can be read")
    return found


def csv_rows(label: str, hidden_by: str, scores: Sequence[LayerScore]) -> Iterator[dict[str, str]]:
    """One row a layer and kind of patches: mean and standard deviation of the error (image units) and of
    R^2, and chance."""
    for score in scores:
        row = {"checkpoint": label, "layer": str(score.layer), "after": score.name, "patches": score.patches}
        row |= {"hidden_by": hidden_by, "draws": str(len(score.scores))}
        for field in Score._fields:
            row[field] = f"{score.mean(field):.6f}"
            if field != "chance":
                row[f"{field}_std"] = "" if len(score.scores) < 2 else f"{score.std(field):.6f}"
        yield row


def metrics(scores: Sequence[LayerScore]) -> dict[str, float]:
    """What ``result.json`` says: the last layer's numbers, and the best layer's."""
    hidden = [score for score in scores if score.patches == PATCHES[0]]
    last, best = hidden[-1], max(hidden, key=lambda score: score.mean("r2"))
    return {
        **{f"position_{field}": last.mean(field) for field in Score._fields},
        **{f"position_{field}_std": last.std(field) for field in ("error", "r2") if len(last.scores) > 1},
        "position_best_r2": best.mean("r2"),
        "position_best_layer": best.layer,
        "given_r2": scores[-1].mean("r2"),
    }
