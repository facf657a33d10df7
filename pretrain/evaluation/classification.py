"""k-NN classification of whole images on frozen [CLS] features: the ImageNet protocol of DINO (eval_knn.py of
its public code).

Images are read from disk as they are needed. Kept are features in float16, normalized: of ImageNet's 1.28
million training images 0.98 GB at D = 384, 2.6 GB at D = 1024, on the backbone's device, and about 0.2 GB of
file names. The search is exact, a chunk at a time (:func:`pretrain.evaluation.knn.neighbors`: 0.5 GB at D =
384).
"""

import warnings
from collections.abc import Iterator
from contextlib import closing
from itertools import islice

import torch
import torch.nn.functional as F
from pydantic import PositiveInt, model_validator
from torch import Tensor

from pretrain.data.class_folders import ClassFolder
from pretrain.data.images import center_crop, in_threads
from pretrain.errors import UserError
from pretrain.evaluation import Outcome
from pretrain.evaluation.features import FORWARD_BATCH, Features, finite
from pretrain.evaluation.knn import knn_predict_each
from pretrain.progress import Progress
from pretrain.settings import Settings, setting
from pretrain.signals import StopSignals

MAIN_K = 20  # DINO: usually the best


class KnnSettings(Settings):
    """The protocol."""

    resize_px: int = setting(256, "shorter side, bicubic", source="DINO", ge=1)
    crop_px: int = setting(224, "the center", source="DINO", ge=1)
    k: tuple[PositiveInt, ...] = setting((10, 20, 100, 200), "neighbors", source="DINO: nb_knn", min_length=1)
    temperature: float = setting(0.07, "of the softmax over cosines", source="DINO", gt=0)

    @model_validator(mode="after")
    def _crop_fits(self) -> "KnnSettings":
        if self.crop_px > self.resize_px:
            raise ValueError(f"knn.crop_px={self.crop_px} is more than knn.resize_px={self.resize_px}")
        return self


def crops(part: ClassFolder, settings: KnnSettings) -> Iterator[Tensor]:
    """The images as uint8 [b, 3, crop, crop], a batch at a time, in order, read ahead in threads.

    Raises:
        UserError: a file that cannot be read, by name.
    """

    def crop(index: int) -> Tensor:
        return center_crop(part.read(index), settings.resize_px, settings.crop_px)

    with closing(in_threads(crop, range(len(part)))) as made:
        while batch := list(islice(made, FORWARD_BATCH)):
            yield torch.stack(batch)


def knn_classification(
    features: Features,
    train: ClassFolder,
    val: ClassFolder,
    settings: KnnSettings,
    signals: StopSignals | None = None,
) -> Outcome:
    """Share of ``val`` whose class is predicted right by its k nearest in ``train``, in percent.

    A k of more neighbors than training images is left out, with a warning.

    Args:
        train, val: of :func:`pretrain.data.class_folders.open_class_folders`.
        signals: that stop it.

    Returns:
        ``knn_top1_k{k}`` of each k, and ``knn_top1`` for k = 20, where it is one of them.

    Raises:
        UserError: a file that cannot be read, settings that make no sense, features that are not finite.
        Interrupted: there was a signal; what was computed is lost.
    """
    ks = _possible(features, train, settings)
    bank, queries = (_features(features, part, settings, signals) for part in (train, val))
    labels, classes = train.labels().to(bank.device), val.labels().to(bank.device)
    predicted = knn_predict_each(
        bank, labels, queries, ks, len(train.classes), settings.temperature
    )  # [len(ks), Q]
    top1 = dict(zip(ks, (100.0 * (predicted == classes).double().mean(1)).tolist()))
    main: dict[str, float | dict[str, float]] = {"knn_top1": top1[MAIN_K]} if MAIN_K in top1 else {}
    return Outcome(main | {f"knn_top1_k{k}": value for k, value in top1.items()})


def _possible(features: Features, train: ClassFolder, settings: KnnSettings) -> list[int]:
    """The k that the training part has images enough for."""
    patch_px = features.backbone.patch_size
    if settings.crop_px % patch_px:
        raise UserError(f"knn: crop_px={settings.crop_px} is no multiple of the patch size {patch_px}")
    ks = sorted({k for k in settings.k if k <= len(train)})
    if not ks:
        raise UserError(
            f"knn: k={min(settings.k)} is more than the {len(train)} training images of {train.folder}"
        )
    if left_out := sorted(set(settings.k) - set(ks)):
        warnings.warn(
            f"knn: k={left_out} left out: {train.folder} has {len(train)} training images", stacklevel=3
        )
    return ks


def _features(
    features: Features, part: ClassFolder, settings: KnnSettings, signals: StopSignals | None
) -> Tensor:
    """[CLS] after the final norm, normalized; float16 [n, D] on the backbone's device."""
    kept = torch.empty(len(part), features.backbone.embed_dim, dtype=torch.float16, device=features.device)
    tell, done = Progress(f"knn, {part.folder.name}", len(part), signals), 0
    for images in crops(part, settings):
        for tokens in features(images):
            kept[done : done + len(tokens.cls)] = F.normalize(tokens.cls, dim=1)
            done += len(tokens.cls)
        tell(len(images))
    return finite(kept)
