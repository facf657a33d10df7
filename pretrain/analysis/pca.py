"""What patch features look like: principal components as colors, the same for what belongs together in all images;
and the cosine similarity of one patch to all patches of its image."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.errors import UserError

# What lies beyond is clipped: a few outlying patches must not take all the contrast
PERCENTILES = (0.02, 0.98)
Place = tuple[float, float]


def principal_components(features: Tensor, n: int = 3) -> Tensor:
    """Scores of all rows on the first ``n`` principal components, the largest first.

    The sign of a component is fixed: its largest loading is positive, so that colors do not flip from one
    image to the next.

    Args:
        features: [M, D], D at least ``n``.

    Returns:
        [M, n] float64 on the CPU.
    """
    centered = features.detach().cpu().double()
    centered = centered - centered.mean(0)
    _, axes = torch.linalg.eigh(centered.T @ centered)  # ascending
    axes = axes[:, -n:].flip(1)  # [D, n]
    largest = axes.gather(0, axes.abs().argmax(0, keepdim=True))
    return centered @ (axes * largest.sign())


def pca_colors(
    features: Sequence[Tensor],
    background: Sequence[Tensor] | None = None,
    like: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """The first three components of the patches of several images, found over all of them together, as red,
    green and blue.

    Args:
        features: [N, D] an image; N may differ.
        background: [N] bool an image, patches that are left out and become black; at least three patches
            remain.
        like: [N, D'] an image, features of another network for the same patches: the components are turned as a
            whole so that the colors come nearest to its own. Where it has other patches, nothing is turned.

    Returns:
        [N, 3] float32 in [0, 1] on the CPU an image; each channel runs from its 2nd to its 98th percentile.
    """
    rows = torch.cat([part.detach().cpu() for part in features])  # [sum of N, D]
    kept = ~torch.cat(list(background)).cpu() if background else torch.ones(len(rows), dtype=torch.bool)
    rgb = torch.zeros(len(rows), 3)
    scores = principal_components(rows[kept])
    other = rows if like is None else torch.cat([part.detach().cpu() for part in like])
    if like is not None and len(other) == len(rows):
        scores = turned_like(scores, principal_components(other[kept]))
    rgb[kept] = as_colors(scores)
    return list(rgb.split([len(part) for part in features]))


def as_colors(scores: Tensor) -> Tensor:
    """Components [M, 3] as red, green, blue in [0, 1], float32: each from its 2nd to its 98th percentile."""
    low, high = torch.quantile(scores, torch.tensor(PERCENTILES, dtype=scores.dtype), dim=0)
    return ((scores - low) / (high - low).clamp(min=1e-12)).clamp(0, 1).float()


def turned_like(scores: Tensor, like: Tensor) -> Tensor:
    """Scores turned or mirrored as a whole so that they come nearest to others of the same patches: the
    colors of one place in two images can be compared, which the order and signs of components otherwise
    forbid (orthogonal Procrustes problem).

    Args:
        scores, like: [M, 3], of mean 0.
    """
    u, _, v = torch.linalg.svd(scores.T @ like)
    return scores @ (u @ v)


def background_by_pca(features: Sequence[Tensor], grids: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Patches on the background's side of the first component, as DINOv2's authors show their features.

    The threshold is 0, the mean of all patches. Which side is the background is not theirs to say, for the
    sign of a component means nothing; ours: the side that has more of the images' border patches.

    Args:
        features: [N, D] an image; grids: its (h, w), N = h * w.

    Returns:
        [N] bool an image, on the CPU.
    """
    scores = principal_components(torch.cat([part.detach().cpu() for part in features]), 1)[:, 0]
    above = scores > 0
    border = torch.ones(len(above), dtype=torch.bool)
    for own, grid in zip(border.split([len(part) for part in features]), grids):
        own.view(grid)[1:-1, 1:-1] = False
    is_background = above if above[border].double().mean() > 0.5 else ~above
    return list(is_background.split([len(part) for part in features]))


def similarity_to(features: Tensor, query: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Cosine of the patch at ``query`` (row, column) with every patch: [N, D] -> [h, w] float32, CPU."""
    x = F.normalize(features.detach().float(), dim=1)
    return (x @ x[query[0] * grid[1] + query[1]]).unflatten(0, grid).cpu()


def read_place(text: str) -> Place:
    """``0.25,0.5``: x and y in image units.

    Raises:
        UserError: not two numbers in [0, 1].
    """
    try:
        x, y = map(float, text.split(","))
    except ValueError:
        raise UserError(f"query {text!r} is not x,y in image units, such as 0.25,0.5") from None
    if not (0 <= x <= 1 and 0 <= y <= 1):  # nan is refused, too
        raise UserError(f"query {text!r} lies outside the image: x and y are from 0 to 1")
    return x, y
