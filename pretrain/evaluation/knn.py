"""k-NN on frozen features: the exact search, and the classification of whole images by their [CLS] features,
the ImageNet protocol of DINO (eval_knn.py of its public code).

Images are read from disk as they are needed. Kept are features in float16, normalized: of ImageNet's 1.28
million training images 0.98 GB at D = 384, 2.6 GB at D = 1024, on the backbone's device, and about 0.2 GB of
file names. The search goes a chunk at a time: 0.5 GB at D = 384.
"""

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import PositiveInt, model_validator
from torch import Tensor

from pretrain.data.class_folders import ClassFolder
from pretrain.data.images import center_crop, in_batches
from pretrain.errors import UserError
from pretrain.evaluation import Outcome, Tick, check_signals, steps
from pretrain.evaluation.features import FORWARD_BATCH, Features, check_varied, finite
from pretrain.settings import Settings, setting
from pretrain.signals import StopSignals

MAIN_K = 20  # DINO: usually the best
QUERIES, BANK_CHUNK = 2**10, 2**16  # queries and features of the bank compared at a time: 268 MB of cosines
VOTES_CHUNK = 2**24  # votes of single neighbors for all classes counted at a time: 67 MB


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


def knn_classification(
    features: Features,
    train: ClassFolder,
    val: ClassFolder,
    settings: KnnSettings,
    n_shown: int = 0,
    signals: StopSignals | None = None,
) -> Outcome:
    """An evaluator: the share of ``val`` whose class its k nearest in ``train`` predict, in percent.

    A k of more neighbors than training images is left out, with a warning. There are no maps.

    Returns:
        ``knn_top1_k{k}`` of each k, and ``knn_top1`` for k = 20, where it is one of them; ``largest_class``, the
        share of ``val`` that is of one class: what a constant answer would have.

    Raises:
        UserError: all features are the same.
    """
    ks = _possible(features, train, settings)
    bank, queries = (_features(features, part, settings, signals) for part in (train, val))
    check_varied(bank, signals)
    labels, classes = train.labels().to(bank.device), val.labels().to(bank.device)
    predicted = knn_predict(bank, labels, queries, ks, len(train.classes), settings.temperature)
    top1 = dict(zip(ks, (100.0 * (predicted == classes).double().mean(1)).tolist()))
    main: dict[str, Any] = {"knn_top1": top1[MAIN_K]} if MAIN_K in top1 else {}
    constant = 100.0 * int(classes.bincount().max()) / len(classes)
    return Outcome(
        {**main, **{f"knn_top1_k{k}": value for k, value in top1.items()}, "largest_class": constant}
    )


def _possible(features: Features, train: ClassFolder, settings: KnnSettings) -> list[int]:
    """The k that the training part has images enough for."""
    patch_px = features.backbone.patch_size
    if settings.crop_px % patch_px:
        raise UserError(f"knn: crop_px={settings.crop_px} is no multiple of the patch size {patch_px}")
    ks = sorted({k for k in settings.k if k <= len(train)})
    has = f"{len(train)} training images"
    if not ks:
        raise UserError(f"knn: k={min(settings.k)} is more than the {has} of {train.folder}")
    if left_out := sorted(set(settings.k) - set(ks)):
        warnings.warn(f"knn: k={left_out} left out: {train.folder} has {has}", stacklevel=3)
    return ks


def _features(
    features: Features, part: ClassFolder, settings: KnnSettings, signals: StopSignals | None
) -> Tensor:
    """[CLS] after the final norm, normalized; float16 [n, D] on the backbone's device."""
    kept = torch.empty(len(part), features.backbone.embed_dim, dtype=torch.float16, device=features.device)
    label, done = f"knn, {part.folder.name}", 0
    tell = steps(label, len(part), signals)

    def crop(index: int) -> Tensor:
        return center_crop(part.read(index), settings.resize_px, settings.crop_px)

    for images in in_batches(crop, range(len(part)), FORWARD_BATCH):
        for tokens in features(torch.stack(images)):
            kept[done : done + len(tokens.cls)] = F.normalize(tokens.cls, dim=1)
            done += len(tokens.cls)
        tell(len(images))
        check_signals(signals, label)
    return finite(kept)


def nearest(
    queries: Tensor, parts: Iterable[Tensor], k: int, tick: Tick = lambda: None
) -> tuple[Tensor, Tensor]:
    """The k rows of a bank that are most similar to each query, exactly, the most similar first; all rows
    where k is more.

    Args:
        queries: normalized [Q, D].
        parts: the bank's rows in turn, normalized, [M, D] each. Only Q x M cosines are held at a time.
        tick: called after each part.

    Returns:
        cosines [Q, k], rows of the bank int64 [Q, k].
    """
    cosines, done = queries.new_zeros(len(queries), 0), 0
    rows = queries.new_zeros(len(queries), 0, dtype=torch.int64)
    for part in parts:
        near, index = (queries @ part.T).topk(min(k, len(part)), dim=1)
        cosines, rows = torch.cat([cosines, near], 1), torch.cat([rows, index + done], 1)
        if done:
            cosines, best = cosines.topk(min(k, cosines.shape[1]), dim=1)
            rows = rows.gather(1, best)
        done += len(part)
        tick()
    return cosines, rows


def class_votes(
    cosines: Tensor, labels: Tensor, ks: Sequence[int], n_classes: int, temperature: float
) -> Tensor:
    """Votes of the first k neighbors for each k of ``ks``, each weighing exp(cosine / temperature).

    Args:
        cosines, labels: [Q, K] of the neighbors, the nearest first; labels in 0 .. n_classes - 1.

    Returns:
        [len(ks), Q, n_classes].
    """
    weights = (cosines / temperature).exp()
    of_class = (labels[..., None] == torch.arange(n_classes, device=labels.device)).float()  # [Q, K, C]
    return torch.stack([torch.einsum("qk,qkc->qc", weights[:, :k], of_class[:, :k]) for k in ks])


def knn_predict(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, ks: Sequence[int], n_classes: int, temperature: float
) -> Tensor:
    """The class with the most :func:`class_votes` for each k of ``ks``, the neighbors found once: int64
    [len(ks), Q]. A ValueError for a k that is larger than the bank.

    Args:
        bank: [M, D]; bank_labels: [M] in 0 .. n_classes - 1; queries: [Q, D]; none need be normalized.
    """
    if max(ks) > len(bank):
        raise ValueError(f"k={max(ks)} is more than the {len(bank)} features to choose from")
    few, found = max(1, VOTES_CHUNK // (max(ks) * n_classes)), []
    for part in queries.split(QUERIES):
        rows_of_bank = (F.normalize(some.float(), dim=1) for some in bank.split(BANK_CHUNK))
        cosines, rows = nearest(F.normalize(part.float(), dim=1), rows_of_bank, max(ks))
        for near, labels in zip(cosines.split(few), bank_labels[rows].split(few)):
            found.append(class_votes(near, labels, ks, n_classes, temperature).argmax(2))
    return torch.cat(found, 1)
