"""Statistics of attention as numbers on disk: csv of every head and image, a summary by layer, and what
``result.json`` holds."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.errors import UserError
from pretrain.results.csv_file import read_csv, write_csv

METRICS = {"nmi": "NMI", "mad_px": "MAD (px)"}
COLUMNS = ("weights", "image", "layer", "head", *METRICS)


@dataclass(frozen=True)
class Measured:
    """A checkpoint's statistics over n images.

    Attributes:
        nmi, mad_px: [n, L, heads] float64.
    """

    name: str
    nmi: np.ndarray
    mad_px: np.ndarray

    def by_layer(self, metric: str) -> tuple[np.ndarray, np.ndarray]:
        """Mean of the heads (as the paper plots it) by layer: its mean and standard deviation over the
        images, [L] each; of one image the deviation is 0."""
        values = getattr(self, metric).mean(2)  # [n, L]
        return values.mean(0), values.std(0, ddof=1) if len(values) > 1 else np.zeros(values.shape[1])


def metrics_of(measured: Measured) -> dict[str, Any]:
    """For ``result.json``: both metrics by layer (mean of heads and images), and their means over the
    layers."""
    metrics: dict[str, Any] = {}
    for metric in METRICS:
        mean, _ = measured.by_layer(metric)
        metrics[metric] = float(mean.mean())
        metrics[f"{metric}_by_layer"] = {f"layer_{i:02}": float(value) for i, value in enumerate(mean, 1)}
    return metrics


def write_statistics(path: Path, measured: Iterable[Measured], images: Sequence[str]) -> None:
    """One row for each checkpoint, image, layer and head; layers and heads count from 1, numbers are
    exact."""
    rows = (
        (m.name, images[i], layer + 1, head + 1, float(nmi), float(m.mad_px[i, layer, head]))
        for m in measured
        for (i, layer, head), nmi in np.ndenumerate(m.nmi)
    )
    write_csv(path, COLUMNS, rows)


def read_statistics(path: Path, name: str) -> Measured:
    """The statistics of the one checkpoint in a file of :func:`write_statistics`, under a name.

    Raises:
        UserError: the file is of another kind, or incomplete.
    """
    try:
        rows = read_csv(path)
        n_layers, n_heads = (max(int(row[column]) for row in rows) for column in ("layer", "head"))
        nmi, mad_px = (
            np.array([float(row[c]) for row in rows]).reshape(-1, n_layers, n_heads) for c in METRICS
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path}: no statistics of this tool, or not whole; delete it and they are made again"
        ) from error
    return Measured(name, nmi, mad_px)


def write_summary(path: Path, measured: Iterable[Measured]) -> None:
    """One row for each checkpoint and layer: mean of the heads, its mean and standard deviation over the
    images."""
    rows = (
        (m.name, layer, len(m.nmi), *map(float, values))
        for m in measured
        for layer, values in enumerate(zip(*m.by_layer("nmi"), *m.by_layer("mad_px")), 1)
    )
    write_csv(path, ("weights", "layer", "images", "nmi_mean", "nmi_std", "mad_px_mean", "mad_px_std"), rows)
