"""The attention of checkpoints over the same images: what is measured of each, and what is kept of it.

One checkpoint is in memory at a time. Each has a folder with ``statistics.csv`` and ``result.json``. The
latter is written last, so that an interrupted study resumes after the last complete checkpoint.
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pretrain.analysis.attention import attention_statistics, query_attention
from pretrain.backbones.vit import ViT
from pretrain.data.images import Images, check_grid, content_hash
from pretrain.errors import UserError
from pretrain.eval_model import EvalModel
from pretrain.files import csv_text, read_csv, write_text
from pretrain.log import Progress, say
from pretrain.results.schema import FILE_NAME
from pretrain.settings import read_yaml
from pretrain.signals import StopSignals
from pretrain.views.pixels import normalize

# Appendix A; the number of images is ours.
PROTOCOL = {"size_px": 480, "patch_px": 16, "images": 100, "crop": False, "bf16": False}
STATISTICS = "statistics.csv"
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
        images, [L] each; of one image there is no deviation, NaN."""
        values = getattr(self, metric).mean(2)  # [n, L]
        return values.mean(0), values.std(0, ddof=1) if len(values) > 1 else np.full(values.shape[1], np.nan)


def metrics_of(measured: Measured) -> dict[str, Any]:
    """For ``result.json``: both metrics by layer (mean of heads and images), and their means over layers."""
    metrics: dict[str, Any] = {}
    for metric in METRICS:
        mean, _ = measured.by_layer(metric)
        metrics[metric] = float(mean.mean())
        metrics[f"{metric}_by_layer"] = {f"layer_{i:02}": float(value) for i, value in enumerate(mean, 1)}
    return metrics


def write_statistics(path: Path, measured: Iterable[Measured], images: Sequence[str]) -> None:
    """One row for each checkpoint, image, layer and head (these two from 1); numbers are exact."""
    rows = (
        (m.name, images[i], layer + 1, head + 1, float(nmi), float(m.mad_px[i, layer, head]))
        for m in measured
        for (i, layer, head), nmi in np.ndenumerate(m.nmi)
    )
    write_text(path, csv_text(dict(zip(COLUMNS, row)) for row in rows))


def read_statistics(path: Path, name: str) -> Measured:
    """The statistics of the one checkpoint in a file of :func:`write_statistics`, under a name.

    Raises:
        UserError: the file is of another kind, or incomplete.
    """
    try:
        rows = read_csv(path)
        n_layers, n_heads = (max(int(row[column]) for row in rows) for column in ("layer", "head"))
        columns = ([float(row[metric]) for row in rows] for metric in METRICS)
        nmi, mad_px = (np.array(column).reshape(-1, n_layers, n_heads) for column in columns)
    except (KeyError, TypeError, ValueError) as error:
        told = f"{path}: no statistics of this tool, or not whole; delete it and they are made again"
        raise UserError(told) from error
    return Measured(name, nmi, mad_px)


def write_summary(path: Path, measured: Iterable[Measured]) -> None:
    """One row for each checkpoint and layer: mean and standard deviation over the images of the heads' mean."""
    rows = (
        (m.name, layer, len(m.nmi), *("" if np.isnan(v) else float(v) for v in values))
        for m in measured
        for layer, values in enumerate(zip(*m.by_layer("nmi"), *m.by_layer("mad_px")), 1)
    )
    columns = ("weights", "layer", "images", "nmi_mean", "nmi_std", "mad_px_mean", "mad_px_std")
    write_text(path, csv_text(dict(zip(columns, row)) for row in rows))


def check_size(subjects: Sequence[EvalModel], size_px: int) -> None:
    """Every checkpoint's patches fill the images.

    Raises:
        UserError: a ``size_px`` that is no multiple of a checkpoint's patches, with the nearest that are; too
            many patches.
    """
    for subject in subjects:
        n, side = size_px // subject.patch_px, subject.patch_px
        if size_px % side:
            near = " or ".join(str(side * whole) for whole in (n, n + 1) if whole)
            told = f"{subject.path} has patches of {side} px; take {near} px, or --patch-size for all"
            raise UserError(f"--size {size_px}: {told}")
        check_grid(n, n, f"--size {size_px}: an image")


def check_masks(box: Path, cross: Path) -> None:
    """The two runs of Fig. 7, files or folders of weights; where a folder says how it was trained, it must be
    so.

    Raises:
        UserError: a run with the other masks.
    """
    for path, wanted in ((box, "box"), (cross, "cross")):
        if (path / "config.yaml").is_file():
            masks = read_yaml(path / "config.yaml").values.get("masks")
            shape = masks.get("position_shape") if isinstance(masks, dict) else None
            if shape != wanted:
                raise UserError(f"--compare-masks: {path} has masks.position_shape={shape}, not {wanted}")


@dataclass(frozen=True)
class Study:
    """What all checkpoints of a study share.

    Attributes:
        pictures: n images, uint8 [3, S, S] each; with ``crop`` central squares, else squeezed.
        bf16: forward passes in bfloat16.
        batch, block: images, and queries, at a time.
        signals: by which the process is asked to stop, looked at after every batch.
    """

    pictures: Images[Tensor]
    crop: bool
    bf16: bool
    device: torch.device
    batch: int
    block: int
    signals: StopSignals

    def measure(self, subject: EvalModel, backbone: ViT, folder: Path) -> Measured:
        """The statistics of a checkpoint, from its folder where they are there for the same file, images and
        settings.

        Raises:
            Interrupted: asked to stop; what was measured of this checkpoint is lost.
        """
        names, images = self.pictures.names, torch.stack(self.pictures.pixels)
        n_used = min(len(names), PROTOCOL["images"])
        used = (images.shape[-1], subject.patch_px, n_used, self.crop, self.bf16)
        seen = {"names": names, "pixels": content_hash(images)}
        settings: dict[str, Any] = {name: pair for name, *pair in zip(PROTOCOL, PROTOCOL.values(), used)}
        settings |= {name: (value, value) for name, value in seen.items()}
        if (folder / STATISTICS).is_file() and subject.found(folder, "attention", settings):
            say(f"{subject.label}: measured before")
            return read_statistics(folder / STATISTICS, subject.label)
        started = time.perf_counter()
        parts, tell = [], Progress(subject.label, len(images), self.signals)
        for batch in images.split(self.batch):
            with self._autocast():
                pixels = normalize(batch.to(self.device))
                parts.append(attention_statistics(backbone, pixels, self.block))
            tell(len(batch))
        measured = Measured(subject.label, *(torch.cat(values).numpy() for values in zip(*parts)))
        (folder / FILE_NAME).unlink(missing_ok=True)  # it speaks for statistics that are about to be replaced
        write_statistics(folder / STATISTICS, [measured], names)
        counts = {"images": len(names), "broken_images": len(self.pictures.broken)}
        subject.write(folder, "attention", settings, metrics_of(measured) | counts, started)
        return measured

    def maps(self, backbone: ViT, images: Tensor, queries: Sequence[tuple[float, float]]) -> Tensor:
        """What query patches attend to, [n, Q, h, w] on the CPU, of uint8 images [n, 3, S, S], one by one."""
        with self._autocast():
            parts = (normalize(image.to(self.device)) for image in images.split(1))
            return torch.cat([query_attention(backbone, pixels, queries).cpu() for pixels in parts])

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)
