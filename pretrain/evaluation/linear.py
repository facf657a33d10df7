"""Linear read-outs in closed form, float64: the same features give the same read-out, with nothing to tune or
to draw.

Features are standardized; D / n is added to the diagonal of their D x D correlation matrix, n being the rows
(ours): as if D rows of noise had been seen too, which matters for the few images of a small probe and
vanishes with many.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


class Moments:
    """Sums over rows of features and outputs, all that a linear fit needs: memory does not grow with the
    rows."""

    def __init__(self, dim: int, n_outputs: int, device: torch.device) -> None:
        self.home = torch.device("cpu") if device.type == "mps" else device  # MPS has no float64
        self.n = 0
        self.x, self.xx, self.y, self.xy = (
            torch.zeros(shape, dtype=torch.float64, device=self.home)
            for shape in ((dim,), (dim, dim), (n_outputs,), (dim, n_outputs))
        )

    def add(self, x: Tensor, y: Tensor) -> None:
        """Rows ``x`` [n, D] and their outputs ``y`` [n, K]."""
        x, y = x.to(self.home).double(), y.to(self.home).double()
        self.n += len(x)
        self.x += x.sum(0)
        self.y += y.sum(0)
        self.xx += x.T @ x
        self.xy += x.T @ y

    def standard(self) -> tuple[Tensor, Tensor, Tensor]:
        """Mean [D] and standard deviation [D] (1 where a feature is constant) of the features, and their
        correlation [D, D]."""
        mean = self.x / self.n
        covariance = self.xx / self.n - torch.outer(mean, mean)
        variance = covariance.diagonal().clamp(min=0)
        std = torch.where(variance > 1e-12, variance, 1.0).sqrt()
        return mean, std, covariance / torch.outer(std, std)


@dataclass(frozen=True)
class ReadOut:
    """x -> x @ weight + bias; weight [D, K], bias [K], float64."""

    weight: Tensor
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., K] float64."""
        return x.to(self.weight.device).double() @ self.weight + self.bias


def ridge(moments: Moments) -> ReadOut:
    """Ridge regression: least squares on standardized features, with D times their squared weights as a
    penalty."""
    mean, std, correlation = moments.standard()
    y_mean = moments.y / moments.n
    covariance = (moments.xy / moments.n - torch.outer(mean, y_mean)) / std[:, None]  # [D, K]
    weight = torch.linalg.solve(_ridged(correlation, moments.n), covariance) / std[:, None]
    return ReadOut(weight, y_mean - mean @ weight)


def discriminant(moments: Moments) -> ReadOut:
    """Linear discriminant analysis: log-posteriors (up to a constant) of classes with one covariance.

    The outputs of the moments are one-hot classes. Unlike least squares on one-hot classes it hides no class
    behind two others. A class without a row has the bias -inf.
    """
    mean, std, correlation = moments.standard()
    share = moments.y / moments.n  # [K]
    means = (moments.xy / moments.y.clamp(min=1) - mean[:, None]) / std[
        :, None
    ]  # [D, K], of standardized features
    means = means * (share > 0)
    within = correlation - (means * share) @ means.T
    weight = torch.linalg.solve(_ridged(within, moments.n), means)  # [D, K]
    bias = share.log() - 0.5 * (means * weight).sum(0)
    weight = weight / std[:, None]
    return ReadOut(weight, bias - mean @ weight)


def _ridged(matrix: Tensor, n: int) -> Tensor:
    """[D, D] with D / n added to the diagonal."""
    return matrix + len(matrix) / n * torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
