"""The attention of checkpoints over the same images: what is measured of each, and what is kept of it.

One checkpoint is in memory at a time. Each has a folder with ``statistics.csv`` and ``result.json``. The
latter is written last, so that an interrupted study resumes after the last complete checkpoint.
"""

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain.analysis.attention import query_attention
from pretrain.analysis.attention_statistics import BLOCK, attention_statistics
from pretrain.analysis.attention_tables import Measured, metrics_of, read_statistics, write_statistics
from pretrain.backbones.vit import ViT
from pretrain.data.images import check_grid, content_hash
from pretrain.errors import UserError
from pretrain.eval_model import EvalModel
from pretrain.log import Progress, say
from pretrain.results.schema import FILE_NAME
from pretrain.settings import read_yaml
from pretrain.signals import StopSignals
from pretrain.views.pixels import normalize

PROTOCOL = {
    "size_px": 480,
    "patch_px": 16,
    "images": 100,
    "crop": False,
    "bf16": False,
}  # appendix A; number of images: ours
STATISTICS = "statistics.csv"


def check_size(subjects: Sequence[EvalModel], size_px: int) -> None:
    """Every checkpoint's patches fill the images.

    Raises:
        UserError: a ``size_px`` that is no multiple of a checkpoint's patches, with the nearest that are; too
            many patches.
    """
    for side, path in ((subject.patch_px, subject.path) for subject in subjects):
        if size_px % side:
            near = " or ".join(str(side * n) for n in (size_px // side, size_px // side + 1) if n)
            raise UserError(
                f"--size {size_px}: {path} has patches of {side} px; take {near} px, or --patch-size for all"
            )
        check_grid(size_px // side, size_px // side, f"--size {size_px}: an image")


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
        names: of n images; broken: those that could not be read.
        images: uint8 [n, 3, S, S].
        crop: they are central squares; else they were squeezed.
        signals: by which the process is asked to stop, looked at after every batch.
        autocast: context of the forward passes, entered again for each.
    """

    names: Sequence[str]
    images: Tensor
    broken: Sequence[str]
    crop: bool
    bf16: bool
    device: torch.device
    autocast: AbstractContextManager[Any]
    batch: int = 1
    block: int = BLOCK
    signals: StopSignals | None = None

    def measure(self, subject: EvalModel, backbone: ViT, folder: Path) -> Measured:
        """The statistics of a checkpoint, from its folder where they are there for the same file, images and
        settings.

        Raises:
            Interrupted: asked to stop; what was measured of this checkpoint is lost.
        """
        used = {
            "size_px": self.images.shape[-1],
            "patch_px": subject.patch_px,
            "images": min(len(self.names), PROTOCOL["images"]),
            "crop": self.crop,
            "bf16": self.bf16,
        }
        seen = {"names": list(self.names), "pixels": content_hash(self.images)}
        settings = {name: (PROTOCOL[name], value) for name, value in used.items()} | {
            name: (v, v) for name, v in seen.items()
        }
        if (folder / STATISTICS).is_file() and subject.found(folder, "attention", settings):
            say(f"{subject.label}: measured before")
            return read_statistics(folder / STATISTICS, subject.label)
        started = time.perf_counter()
        measured = self._measure(subject.label, backbone)
        (folder / FILE_NAME).unlink(missing_ok=True)  # it speaks for statistics that are about to be replaced
        write_statistics(folder / STATISTICS, [measured], self.names)
        metrics = metrics_of(measured) | {"images": len(self.names), "broken_images": len(self.broken)}
        subject.write(folder, "attention", settings, metrics, started)
        return measured

    def maps(self, backbone: ViT, images: Tensor, queries: Sequence[tuple[float, float]]) -> Tensor:
        """What query patches attend to, [n, Q, h, w] on the CPU, of uint8 images [n, 3, S, S], one at a
        time."""
        maps = []
        for image in images.split(1):
            with self.autocast:
                maps.append(query_attention(backbone, normalize(image.to(self.device)), queries).cpu())
        return torch.cat(maps)

    def _measure(self, label: str, backbone: ViT) -> Measured:
        parts, tell = [], Progress(label, len(self.images), self.signals)
        for images in self.images.split(self.batch):
            with self.autocast:
                parts.append(attention_statistics(backbone, normalize(images.to(self.device)), self.block))
            tell(len(images))
        return Measured(label, *(torch.cat(values).numpy() for values in zip(*parts)))
