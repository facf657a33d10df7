"""The probes of a run: the evaluators at reduced settings, built once at its start from ``probes.*``, asked
again and again about the network that the run leaves. Tables never show these numbers."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain.backbones.vit import ViT
from pretrain.data.class_folders import open_class_folders
from pretrain.data.datasets import LabelSet, mask_rule, open_label_sets
from pretrain.data.datasets.public import is_ade
from pretrain.data.images import in_threads
from pretrain.data.sources import DataSettings
from pretrain.errors import UserError
from pretrain.evaluation.dense import EVALUATORS, KNN, Part, named_tasks, settings_of
from pretrain.evaluation.features import Features, frozen
from pretrain.evaluation.knn import KnnSettings
from pretrain.evaluation.position import position_layers, read_squares
from pretrain.settings import Settings, replaced, setting

Probe = Callable[[Features], dict[str, float]]
# What makes an evaluation cheap enough for a curve, beside probes.image_px and probes.max_images (ours).
SCALED_DOWN: Mapping[str, Mapping[str, Any]] = {
    "linear": dict(augment=False, batch_size=32, epochs=5),  # each image goes through the backbone once
    "in_context": dict(augment=False, passes=1, memory_size=50_000),
    "clustering": dict(seeds=1, restarts=1, overclusters=()),
}
DENSE_METRICS = ("linear_miou", "in_context_miou", "in_context_hungarian_miou", "clustering_miou")


_ours = partial(setting, source="ours")


class ProbeSettings(Settings):
    """Probes of the exported backbone, during training and at its end."""

    in_recipe = False
    fixed = False
    every: int = _ours(0, "iterations between probes; 0: none", ge=0)
    knn_root: str = _ours("", "labeled folder: train/CLASS/*, val/CLASS/*")
    knn_k: int = setting(20, "neighbors", source="DINO", ge=1)
    seg_root: str = _ours("", "a folder of masks: images/{train,val}, masks/{train,val}; or ADE20K")
    seg_classes: int = _ours(0, "how many labels of seg_root count", ge=0, le=65535)
    dense_root: str = _ours(
        "", "a set with a label a pixel: anything that posfield evaluate dense takes as --data"
    )
    dense_set: str = _ours(
        "auto",
        "which one: auto (told from dense_root) | voc2012 | ade20k | coco_things | coco_stuff | folder",
    )
    dense_tasks: str = _ours(
        "in_context", "measured there: some of linear, in_context, clustering, a space between them"
    )
    void: str = _ours("", "values of masks that do not count, 0,255; without: 255")
    map: str = _ours("", "labels of values of masks, 255=1,7=2")
    mask_name: str = _ours("", "of an image's mask, {stem}_seg.png")
    position: bool = _ours(False, "the position probe, on the images of data.root")
    image_px: int = _ours(224, "side of an image in pixels", ge=1, le=65536)
    max_images: int = _ours(2000, "of each part of a probe's data", ge=1)


@dataclass(frozen=True)
class EvaluatorProbe:
    """Evaluators on one small set, which is read from where it lies each time."""

    train: Part
    val: Part
    settings: Mapping[str, Any]  # by task
    names: Mapping[str, str]  # {an evaluator's metric: the log's}; other metrics are left out

    def __call__(self, features: Features) -> dict[str, float]:
        found: dict[str, Any] = {}
        for task, settings in self.settings.items():
            found |= EVALUATORS[task](features, self.train, self.val, settings).metrics
        return {told: found[name] for name, told in self.names.items() if name in found}


@dataclass(frozen=True)
class PositionProbe:
    """``probe/position_error``, ``_chance`` and ``_r2``: :class:`~pretrain.evaluation.position.Score` of the
    last layer, for one draw of crosses. ``images`` are uint8 [n, 3, S, S], whole ones squeezed to squares."""

    images: Tensor

    def __call__(self, features: Features) -> dict[str, float]:
        (last,) = position_layers(features, self.images, draws=1, last_only=True)
        return {f"probe/position_{name}": value for name, value in last.scores[0]._asdict().items()}


class Probes:
    """All probes that a config asks for. The position probe holds its images (3 * image_px^2 bytes each).

    No random state of torch or NumPy changes, and the same backbone on the same hardware gives the same
    numbers. So an exactly resumed run logs what an uninterrupted one does. One rank runs the probes; the
    others wait for it.

    Args:
        settings: of the probes.
        data: of the run: the position probe looks at its images.
        patch_size: of the backbone.
        reads: read the images; a rank that never asks only has to know when the probes are due.

    Raises:
        UserError: data or settings that a probe cannot use; names the key and the file. Every image and map
            is read once now: a bad one fails at the start.
    """

    def __init__(
        self, settings: ProbeSettings, data: DataSettings, patch_size: int, reads: bool = True
    ) -> None:
        self.every, self.probes = settings.every, list[Probe]()
        wanted = bool(settings.knn_root or settings.seg_root or settings.dense_root or settings.position)
        self.is_wanted = wanted and bool(self.every)
        if reads and wanted != bool(self.every):
            nothing = "neither probes.knn_root, probes.seg_root, probes.dense_root nor probes.position is set"
            missing = "probes.every is 0" if wanted else nothing
            warnings.warn(f"config: the other probes.* keys have no effect, for {missing}", stacklevel=2)
        if not self.every or not reads:
            return
        if settings.image_px % patch_size:
            what = f"probes.image_px={settings.image_px} is no multiple of backbone.patch_size={patch_size}"
            raise UserError(f"config: {what}")
        makers = {"knn_root": _classification, "seg_root": _segmentation, "dense_root": _dense}
        self.probes += [make(settings) for root, make in makers.items() if getattr(settings, root)]
        if settings.position:
            images = read_squares(data, settings.image_px, settings.max_images).pixels
            self.probes.append(PositionProbe(torch.stack(images)))

    def __len__(self) -> int:
        return len(self.probes)

    def is_due(self, done: int, total_iters: int) -> bool:
        """Whether to run after ``done`` of ``total_iters`` iterations: every so many, and at the end."""
        return self.is_wanted and (done % self.every == 0 or done == total_iters)

    def run(
        self, backbone: ViT, device: torch.device, autocast: AbstractContextManager[Any] | None = None
    ) -> dict[str, float]:
        """The numbers of all probes (``probe/...``), for a backbone on ``device``, whose mode is as before
        afterwards.

        Raises:
            UserError: the position probe is asked for, but the backbone holds no position mask token.
        """
        of_position = any(isinstance(probe, PositionProbe) for probe in self.probes)
        if of_position and not backbone.model_kwargs["mask_tokens"]:
            raise UserError("probes.position: the backbone holds no position mask token")
        features = Features(backbone, device, autocast or nullcontext())
        with frozen(backbone):
            return {name: value for probe in self.probes for name, value in probe(features).items()}


def _classification(settings: ProbeSettings) -> EvaluatorProbe:
    """DINO's protocol, resized in proportion to its crop."""
    side_px, k = settings.image_px, settings.knn_k
    with _errors_of("probes.knn_root"):
        train, val = (part.first(settings.max_images) for part in open_class_folders(settings.knn_root))
        for part in (train, val):
            _read_all(part)
    if k > (n := len(train)):
        raise UserError(f"probes.knn_k={k} is more than the {n} training images of {settings.knn_root}")
    reduced = KnnSettings(resize_px=round(side_px * 256 / 224), crop_px=side_px, k=(k,))
    return EvaluatorProbe(train, val, {KNN: reduced}, {f"knn_top1_k{k}": "probe/knn_top1"})


def _segmentation(settings: ProbeSettings) -> EvaluatorProbe:
    """Linear segmentation, and in-context segmentation with ``knn_k`` neighbors."""
    root, n_classes = settings.seg_root, settings.seg_classes
    if n_classes < 2:
        raise UserError(f"probes.seg_classes={n_classes}: how many classes has {root}?")
    with _errors_of(f"probes.seg_root with probes.seg_classes={n_classes}"):
        kind = "ade20k" if n_classes == 150 and is_ade(Path(root)) else "folder"
        parts = _parts(root, kind, settings, n_classes)
    reduced = _reduced(("linear", "in_context"), settings.image_px)
    reduced["in_context"] = replaced(reduced["in_context"], {"k": settings.knn_k})
    names = {"linear_miou": "probe/seg_linear_miou", "in_context_miou": "probe/seg_knn_miou"}
    return EvaluatorProbe(*parts, reduced, names)


def _dense(settings: ProbeSettings) -> EvaluatorProbe:
    tasks = named_tasks(settings.dense_tasks.split(), "probes.dense_tasks")
    if not tasks:
        raise UserError("probes.dense_tasks is empty, but probes.dense_root is set")
    with _errors_of("probes.dense_root"):
        parts = _parts(settings.dense_root, settings.dense_set, settings)
    names = {name: f"probe/dense_{name}" for name in DENSE_METRICS}
    return EvaluatorProbe(*parts, _reduced(tasks, settings.image_px), names)


def _reduced(tasks: Sequence[str], side_px: int) -> dict[str, Any]:
    of_all = settings_of(tasks).items()
    return {task: replaced(used, {"image_px": side_px, **SCALED_DOWN[task]}) for task, used in of_all}


def _parts(root: str, kind: str, settings: ProbeSettings, n_classes: int = 0) -> tuple[LabelSet, LabelSet]:
    masks, most = mask_rule(settings.void, settings.map, settings.mask_name), settings.max_images
    train, val = (part.first(most) for part in open_label_sets(root, kind, n_classes, masks))
    for part in (train, val):
        if not _read_all(part):
            raise UserError(f"{root} has no labeled pixel in {part.part}")
    return train, val


def _read_all(part: Part) -> bool:
    """Read each item, so that a bad one is told now. Whether one of them has a labeled pixel."""
    items = in_threads(part.read, range(len(part)))
    return sum(isinstance(item, tuple) and bool(item[1].any()) for item in items) > 0


@contextmanager
def _errors_of(key: str) -> Iterator[None]:
    """A :class:`UserError` raised inside begins with ``key``, the setting that names the data."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{key}: {error}") from error
