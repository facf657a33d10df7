"""The probes of a run: built once at its start from ``probes.*``, asked again and again about the teacher."""

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from omegaconf import DictConfig

from pretrain.backbones.vit import ViT
from pretrain.errors import UserError
from pretrain.evaluation.features import Features, frozen
from pretrain.evaluation.knn import KnnProbe
from pretrain.evaluation.position_probe import PositionProbe
from pretrain.evaluation.segmentation import SegmentationProbe

Probe = Callable[[Features], dict[str, float]]


class Probes:
    """All probes that a config asks for, with their pictures in memory (3 * image_px^2 bytes each).

    Nothing is drawn from torch's or NumPy's random state, and the same backbone on the same hardware gives the same numbers: an
    exactly resumed run logs what an uninterrupted one does. One rank is enough; the others only have to wait for it.

    Args:
        config: of the run.
        reads: read the pictures; a rank that never asks only has to know when the probes are due.

    Raises:
        UserError: whatever would keep a probe from working, by key and file.
    """

    def __init__(self, config: DictConfig, reads: bool = True) -> None:
        settings = config.probes
        self.period_it: int = settings.period_it
        self.probes: list[Probe] = []
        wanted = bool(settings.knn_root or settings.seg_root or settings.position)
        self.is_wanted = wanted and bool(self.period_it)
        if reads and wanted != bool(self.period_it):
            missing = "probes.period_it is 0" if wanted else "neither probes.knn_root, probes.seg_root nor probes.position is set"
            warnings.warn(f"config: the other probes.* keys have no effect, for {missing}", stacklevel=2)
        side_px, most, patch_size = settings.image_px, settings.max_images, config.backbone.patch_size
        k, classes = settings.knn_k, settings.seg_classes
        if not self.period_it or not reads:
            return
        if side_px % patch_size:
            raise UserError(f"config: probes.image_px={side_px} is no multiple of backbone.patch_size={patch_size}")
        if settings.position:
            _check_position_masks(config)
        if settings.knn_root:
            self.probes.append(KnnProbe.read(settings.knn_root, k, side_px, most))
        if settings.seg_root:
            self.probes.append(SegmentationProbe.read(settings.seg_root, classes, k, side_px, patch_size, most))
        if settings.position:
            self.probes.append(PositionProbe.read(config.data, patch_size, side_px, most))

    def __len__(self) -> int:
        return len(self.probes)

    def is_due(self, done_it: int, total_it: int) -> bool:
        """Whether to run after ``done_it`` of ``total_it`` iterations: every ``probes.period_it``, and at the end."""
        return self.is_wanted and (done_it % self.period_it == 0 or done_it == total_it)

    def run(self, backbone: ViT, device: torch.device, autocast: AbstractContextManager[Any] | None = None) -> dict[str, float]:
        """The numbers of all probes (``probe/...``), for a backbone on ``device``, whose mode is as before afterwards.

        Raises:
            UserError: the position probe is asked for, but the backbone holds no position mask token.
        """
        if any(isinstance(probe, PositionProbe) for probe in self.probes) and not backbone.flags["mask_tokens"]:
            raise UserError("probes.position: the backbone holds no position mask token")
        features = Features(backbone, device, autocast or nullcontext())
        with frozen(backbone):
            return {name: value for probe in self.probes for name, value in probe(features).items()}


def _check_position_masks(config: DictConfig) -> None:
    """The position mask token is learned only where a loss reads it."""
    for key, value in (("masks.position_share", config.masks.position_share), ("losses.position", config.losses.position)):
        if not value:
            raise UserError(f"config: probes.position=true, but {key}={value:g}: the position mask token would never be learned")
