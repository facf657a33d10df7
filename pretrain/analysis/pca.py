"""Principal components of patch features as colours: what belongs together gets the same colour, across pictures."""

import torch
from torch import Tensor

PERCENTILES = (0.02, 0.98)  # what lies beyond is clipped: a few outlying patches must not take all the contrast


def principal_components(features: Tensor, n: int = 3) -> Tensor:
    """Scores of all rows on the first ``n`` principal components, the largest first.

    The sign of a component is fixed: its largest loading is positive, so that colours do not flip from one picture to the next.

    Args:
        features: [M, D], D at least ``n``.

    Returns:
        [M, n] float64 on the CPU.
    """
    centred = features.detach().cpu().double()
    centred = centred - centred.mean(0)
    _, axes = torch.linalg.eigh(centred.T @ centred)  # ascending
    axes = axes[:, -n:].flip(1)  # [D, n]
    largest = axes.gather(0, axes.abs().argmax(0, keepdim=True))
    return centred @ (axes * largest.sign())


def pca_rgb(features: Tensor) -> Tensor:
    """The first three components of the patches of several pictures, found over all of them together, as red, green and blue.

    Args:
        features: [B, N, D].

    Returns:
        [B, N, 3] float32 in [0, 1] on the CPU; each channel runs from its 2nd to its 98th percentile.
    """
    scores = principal_components(features.flatten(0, 1))  # [B * N, 3]
    low, high = torch.quantile(scores, torch.tensor(PERCENTILES, dtype=scores.dtype), dim=0)
    rgb = ((scores - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    return rgb.float().unflatten(0, features.shape[:2])
