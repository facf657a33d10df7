"""The probes of a run: built once at its start from ``probes.*``, asked again and again about the teacher."""

import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig

from pretrain.backbones.vit import ViT
from pretrain.data.label_sets import LabelSet, open_label_set
from pretrain.data.pictures import in_threads
from pretrain.errors import UserError
from pretrain.evaluation.dense.protocol import named_tasks, settings_of
from pretrain.evaluation.dense.run import EVALUATORS
from pretrain.evaluation.features import Features, frozen
from pretrain.evaluation.knn import KnnProbe
from pretrain.evaluation.position_probe import PositionProbe
from pretrain.evaluation.segmentation import SegmentationProbe
from pretrain.settings import replaced

Probe = Callable[[Features], dict[str, float]]


# What makes a dense evaluation cheap enough for a curve, beside probes.image_px and probes.max_images (ours).
SCALED_DOWN: Mapping[str, Mapping[str, Any]] = {
    "linear": dict(augment=False, batch_size=32),  # each image goes through the backbone once
    "in_context": dict(augment=False, passes=1, memory_size=50_000),
    "clustering": dict(seeds=1, restarts=1, overclusters=()),
}


@dataclass(frozen=True)
class DenseProbe:
    """Dense evaluation of a small set: ``probe/dense_linear_miou``, ..., by less than the protocol, so never shown as its numbers.

    Attributes:
        train, val: parts of the set, which is read from where it lies each time.
        settings: by task.
    """

    train: LabelSet
    val: LabelSet
    settings: Mapping[str, Any]

    @staticmethod
    def read(root: str, kind: str, tasks: str, side_px: int, max_images: int) -> "DenseProbe":
        """The probe of ``probes.dense_root``. Every image and map is looked at once now, that a bad one is told at the start.

        Raises:
            UserError: an unknown task, a bad set (:func:`~pretrain.data.label_sets.open_label_set`), an unreadable file.
        """
        named = named_tasks(tasks.split(), "probes.dense_tasks")
        if not named:
            raise UserError("probes.dense_tasks is empty, but probes.dense_root is set")
        try:
            train, val = (open_label_set(root, part, kind).first(max_images) for part in ("train", "val"))
            for part in (train, val):
                for _ in in_threads(part.read, range(len(part))):
                    pass
        except UserError as error:
            raise UserError(f"probes.dense_root: {error}") from error
        changes = {task: dict(image_px=side_px, **SCALED_DOWN[task]) for task in named}
        return DenseProbe(train, val, {task: replaced(used, changes[task]) for task, used in settings_of(named).items()})

    def __call__(self, features: Features) -> dict[str, float]:
        """The probe's numbers for a backbone."""
        found: dict[str, float] = {}
        for task, settings in self.settings.items():
            metrics = EVALUATORS[task](features, self.train, self.val, settings, 0).metrics
            found |= {f"probe/dense_{name}": value for name, value in metrics.items() if not isinstance(value, dict)}
        return found


class Probes:
    """All probes that a config asks for, with their pictures in memory (3 * image_px^2 bytes each), but for the dense one's.

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
        wanted = bool(settings.knn_root or settings.seg_root or settings.dense_root or settings.position)
        self.is_wanted = wanted and bool(self.period_it)
        if reads and wanted != bool(self.period_it):
            nothing = "neither probes.knn_root, probes.seg_root, probes.dense_root nor probes.position is set"
            missing = "probes.period_it is 0" if wanted else nothing
            warnings.warn(f"config: the other probes.* keys have no effect, for {missing}", stacklevel=2)
        side_px, most, patch_size = settings.image_px, settings.max_images, config.backbone.patch_size
        k, classes, dense = settings.knn_k, settings.seg_classes, (settings.dense_set, settings.dense_tasks)
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
        if settings.dense_root:
            self.probes.append(DenseProbe.read(settings.dense_root, *dense, side_px, most))
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
