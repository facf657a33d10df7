"""The probes of a run: built once at its start from ``probes.*``, asked again and again about the teacher."""

import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from pretrain.backbones.vit import ViT
from pretrain.data.datasets import LabelSet, open_label_set
from pretrain.data.images import in_threads
from pretrain.data.sources import DataSettings
from pretrain.errors import UserError
from pretrain.evaluation.features import Features, frozen
from pretrain.evaluation.knn import KnnProbe
from pretrain.evaluation.labeled import errors_of
from pretrain.evaluation.position_probe import PositionProbe
from pretrain.evaluation.protocol import named_tasks, settings_of
from pretrain.evaluation.run import EVALUATORS
from pretrain.evaluation.segmentation import SegmentationProbe
from pretrain.settings import Settings, replaced, setting

Probe = Callable[[Features], dict[str, float]]


# What makes a dense evaluation cheap enough for a curve, beside probes.image_px and probes.max_images (ours).
SCALED_DOWN: Mapping[str, Mapping[str, Any]] = {
    "linear": dict(augment=False, batch_size=32),  # each image goes through the backbone once
    "in_context": dict(augment=False, passes=1, memory_size=50_000),
    "clustering": dict(seeds=1, restarts=1, overclusters=()),
}


class ProbeSettings(Settings):
    """Probes of the exported backbone, during training and at its end."""

    in_recipe = False
    fixed = False
    every: int = setting(0, "iterations between probes; 0: none", source="ours", ge=0)
    knn_root: str = setting("", "labeled folder: train/CLASS/*, val/CLASS/*", source="ours")
    knn_k: int = setting(20, "neighbors", source="DINO", ge=1)
    seg_root: str = setting(
        "", "ADE20K's layout: images/{training,validation}, annotations/{training,validation}", source="ours"
    )
    seg_classes: int = setting(0, "labels 1 .. n; 0 is not labeled", source="ours", ge=0, le=65535)
    dense_root: str = setting(
        "", "a set with a label a pixel: anything that posfield evaluate dense takes as --data", source="ours"
    )
    dense_set: str = setting(
        "auto",
        "which one: auto (told from dense_root) | voc2012 | ade20k | coco_things | coco_stuff | folder",
        source="ours",
    )
    dense_tasks: str = setting(
        "in_context",
        "measured there: some of linear, in_context, clustering, a space between them",
        source="ours",
    )
    position: bool = setting(False, "the position probe, on the images of data.root", source="ours")
    image_px: int = setting(224, "side of an image in pixels", source="ours", ge=1, le=65536)
    max_images: int = setting(2000, "of each part of a probe's data", source="ours", ge=1)


@dataclass(frozen=True)
class DenseProbe:
    """Dense evaluation of a small set: ``probe/dense_linear_miou``, ...

    The settings are reduced, so tables never show these numbers.

    Attributes:
        train, val: parts of the set, which is read from where it lies each time.
        settings: by task.
    """

    train: LabelSet
    val: LabelSet
    settings: Mapping[str, Any]

    @staticmethod
    def read(root: str, kind: str, tasks: str, side_px: int, max_images: int) -> "DenseProbe":
        """The probe of ``probes.dense_root``. It reads every image and map once now: a bad one fails at the
        start.

        Raises:
            UserError: an unknown task, a bad set (:func:`~pretrain.data.datasets.open_label_set`), an
                unreadable file.
        """
        named = named_tasks(tasks.split(), "probes.dense_tasks")
        if not named:
            raise UserError("probes.dense_tasks is empty, but probes.dense_root is set")
        with errors_of("probes.dense_root"):
            train, val = (open_label_set(root, part, kind).first(max_images) for part in ("train", "val"))
            for part in (train, val):
                for _ in in_threads(part.read, range(len(part))):
                    pass
        changes = {task: dict(image_px=side_px, **SCALED_DOWN[task]) for task in named}
        return DenseProbe(
            train, val, {task: replaced(used, changes[task]) for task, used in settings_of(named).items()}
        )

    def __call__(self, features: Features) -> dict[str, float]:
        """The probe's numbers for a backbone."""
        found: dict[str, float] = {}
        for task, settings in self.settings.items():
            metrics = EVALUATORS[task](features, self.train, self.val, settings, 0).metrics
            found |= {
                f"probe/dense_{name}": value for name, value in metrics.items() if not isinstance(value, dict)
            }
        return found


class Probes:
    """All probes that a config asks for, with their images in memory (3 * image_px^2 bytes each), but for the
    dense one's.

    No random state of torch or NumPy changes, and the same backbone on the same hardware gives the same
    numbers. So an exactly resumed run logs what an uninterrupted one does. One rank runs the probes; the
    others wait for it.

    Args:
        settings: of the probes.
        data: of the run: the position probe looks at its images.
        patch_size: of the backbone.
        reads: read the images; a rank that never asks only has to know when the probes are due.

    Raises:
        UserError: data or settings that a probe cannot use; names the key and the file.
    """

    def __init__(
        self, settings: ProbeSettings, data: DataSettings, patch_size: int, reads: bool = True
    ) -> None:
        self.every = settings.every
        self.probes: list[Probe] = []
        wanted = bool(settings.knn_root or settings.seg_root or settings.dense_root or settings.position)
        self.is_wanted = wanted and bool(self.every)
        if reads and wanted != bool(self.every):
            nothing = "neither probes.knn_root, probes.seg_root, probes.dense_root nor probes.position is set"
            missing = "probes.every is 0" if wanted else nothing
            warnings.warn(f"config: the other probes.* keys have no effect, for {missing}", stacklevel=2)
        k, side_px, most = settings.knn_k, settings.image_px, settings.max_images
        if not self.every or not reads:
            return
        if side_px % patch_size:
            raise UserError(
                f"config: probes.image_px={side_px} is no multiple of backbone.patch_size={patch_size}"
            )
        if settings.knn_root:
            self.probes.append(KnnProbe.read(settings.knn_root, k, side_px, most))
        if settings.seg_root:
            self.probes.append(
                SegmentationProbe.read(settings.seg_root, settings.seg_classes, k, side_px, patch_size, most)
            )
        if settings.dense_root:
            self.probes.append(
                DenseProbe.read(settings.dense_root, settings.dense_set, settings.dense_tasks, side_px, most)
            )
        if settings.position:
            self.probes.append(PositionProbe.read(data, patch_size, side_px, most))

    def __len__(self) -> int:
        return len(self.probes)

    def is_due(self, done: int, total_iters: int) -> bool:
        """Whether to run after ``done`` of ``total_iters`` iterations: every ``probes.every``, and at the
        end."""
        return self.is_wanted and (done % self.every == 0 or done == total_iters)

    def run(
        self, backbone: ViT, device: torch.device, autocast: AbstractContextManager[Any] | None = None
    ) -> dict[str, float]:
        """The numbers of all probes (``probe/...``), for a backbone on ``device``, whose mode is as before
        afterwards.

        Raises:
            UserError: the position probe is asked for, but the backbone holds no position mask token.
        """
        if (
            any(isinstance(probe, PositionProbe) for probe in self.probes)
            and not backbone.model_kwargs["mask_tokens"]
        ):
            raise UserError("probes.position: the backbone holds no position mask token")
        features = Features(backbone, device, autocast or nullcontext())
        with frozen(backbone):
            return {name: value for probe in self.probes for name, value in probe(features).items()}
