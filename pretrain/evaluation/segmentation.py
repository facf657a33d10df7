"""The probes of a training that are evaluations of their own: k-NN, and dense probes of a small labeled set
by a linear read-out and by k-NN."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.data.class_folders import ClassFolder, open_class_folders
from pretrain.data.datasets.label_set import LabelSet
from pretrain.data.datasets.listing import by_stem, maps_by_stem, paired
from pretrain.data.images import in_threads, square
from pretrain.errors import UserError
from pretrain.evaluation.features import FORWARD_BATCH, Features, Moments, ReadOut
from pretrain.evaluation.in_context import patch_counts
from pretrain.evaluation.knn import class_votes, knn_predict, nearest
from pretrain.evaluation.miou import count_pairs, mean_iou, predict_pixels

BANK_PATCHES = 50_000  # of the training set, at equal steps, that k-NN compares with
QUERY_PATCHES = 512  # compared at a time: 100 MB of similarities


def knn_votes(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, k: int, n_classes: int, chunk: int = QUERY_PATCHES
) -> Tensor:
    """Votes of the k nearest features of each query: [Q, n_classes]."""
    bank, votes = F.normalize(bank.float(), dim=1), []
    for part in queries.split(chunk):
        cosines, rows = nearest(F.normalize(part.float(), dim=1), [bank], k)
        votes.append(class_votes(cosines, bank_labels[rows], (k,), n_classes)[0])
    return torch.cat(votes)


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


@dataclass(frozen=True)
class Labeled:
    """One part of a labeled set: uint8 [n, 3, S, S], and labels [n] (classes) or [n, S, S] (pixels)."""

    images: Tensor
    labels: Tensor


@contextmanager
def errors_of(key: str) -> Iterator[None]:
    """A :class:`UserError` raised inside begins with ``key``, the setting that names the data."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{key}: {error}") from error


def read_classes(root: str, side_px: int, max_images: int, key: str) -> tuple[Labeled, Labeled]:
    """``train/CLASS/*`` and ``val/CLASS/*`` as central squares; at most ``max_images`` of each, at equal
    steps.

    Args:
        key: the setting that names ``root``, for messages.

    Raises:
        UserError: as :func:`pretrain.data.class_folders.open_class_folders`; a file that is no image.
    """
    with errors_of(key):
        train, val = (_squares(part.first(max_images), side_px) for part in open_class_folders(root))
        return train, val


def _squares(part: ClassFolder, side_px: int) -> Labeled:
    images = in_threads(lambda index: square(part.read(index), side_px, crop=True), range(len(part)))
    return Labeled(torch.stack(list(images)), part.labels())


def read_segmentation(
    root: str, n_classes: int, side_px: int, max_images: int, key: str
) -> tuple[Labeled, Labeled]:
    """A set in ADE20K's layout, images and label maps squeezed to squares; at most ``max_images`` of each
    part, at equal steps.

    Returns:
        ``training`` and ``validation``; labels 0 (not labeled) or 1 .. n_classes, uint8 (int32 beyond 255
        classes).

    Raises:
        UserError: a folder or label map that is missing, a label beyond ``n_classes``, sizes that differ, an
            unreadable file.
    """
    name, table = f"{root} with probes.seg_classes={n_classes}", np.arange(n_classes + 1, dtype=np.int32)
    parts = []
    with errors_of(key):
        for part in ("training", "validation"):
            files = by_stem(Path(root) / "images" / part)
            pairs = paired(
                files, maps_by_stem(Path(root) / "annotations" / part), sorted(files, key=files.__getitem__)
            )
            found = LabelSet(name, part, tuple(map(str, table[1:])), pairs, table).first(max_images)
            images, labels = map(torch.cat, zip(*found.squares(side_px, side_px, FORWARD_BATCH)))
            parts.append(Labeled(images, labels.to(torch.uint8 if n_classes < 256 else torch.int32)))
    return parts[0], parts[1]


def patch_labels(labels: Tensor, patch_size: int, n_classes: int) -> Tensor:
    """Majority of the labeled pixels of each patch; the smaller class where two are even.

    Args:
        labels: [n, S, S] in 0 (not labeled) .. n_classes; S a multiple of the patch size.

    Returns:
        [n, N] int64, row-major; 0 for a patch without a labeled pixel.
    """
    counts = np.stack([patch_counts(image.numpy(), patch_size, n_classes) for image in labels])  # [n, N, C]
    return torch.from_numpy((counts.argmax(-1) + 1) * counts.any(-1))


@dataclass(frozen=True)
class SegmentationProbe:
    """``probe/seg_linear_miou`` and ``probe/seg_knn_miou``, in percent.

    Attributes:
        train_patches: [n, N], :func:`patch_labels` of the training part.
    """

    train: Labeled
    val: Labeled
    train_patches: Tensor
    n_classes: int
    k: int

    @staticmethod
    def read(
        root: str, n_classes: int, k: int, side_px: int, patch_size: int, max_images: int
    ) -> "SegmentationProbe":
        """The probe of ``probes.seg_root``.

        Raises:
            UserError: a bad folder (:func:`read_segmentation`), too few classes, a set without a label.
        """
        if n_classes < 2:
            raise UserError(f"probes.seg_classes={n_classes}: how many classes has {root}?")
        parts = read_segmentation(root, n_classes, side_px, max_images, "probes.seg_root")
        for part, name in zip(parts, ("training", "validation")):
            if not part.labels.any():
                raise UserError(f"probes.seg_root: {root} has no labeled pixel in {name}")
        patches = [
            patch_labels(labels, patch_size, n_classes) for labels in parts[0].labels.split(FORWARD_BATCH)
        ]
        return SegmentationProbe(*parts, torch.cat(patches), n_classes, k)

    def __call__(self, features: Features) -> dict[str, float]:
        """The probe's numbers for a backbone."""
        device, n_classes = features.device, self.n_classes
        linear, bank, bank_labels = self._fit(features)
        matrices = torch.zeros(2, n_classes, n_classes, dtype=torch.int64, device=device)
        k = min(self.k, len(bank))
        for tokens, pixels in zip(features(self.val.images), self.val.labels.split(FORWARD_BATCH)):
            patches = tokens.patches.flatten(0, 1)  # [b * N, D]
            votes = knn_votes(bank, bank_labels, patches, k, n_classes)
            probabilities = linear(patches).softmax(1).float().to(device), votes / votes.sum(1, keepdim=True)
            for matrix, scores in zip(matrices, probabilities):
                predicted = predict_pixels(scores.unflatten(0, (len(pixels), -1)), pixels.shape[-1])
                matrix += count_pairs(predicted, pixels, n_classes, n_classes)
        return {"probe/seg_linear_miou": mean_iou(matrices[0]), "probe/seg_knn_miou": mean_iou(matrices[1])}

    def _fit(self, features: Features) -> tuple[ReadOut, Tensor, Tensor]:
        """The linear read-out, and the bank of patches [M, D] with their classes [M] (0 .. n_classes - 1),
        in one pass."""
        labels = self.train_patches
        moments = Moments(features.backbone.embed_dim, self.n_classes, features.device)
        labeled = labels.flatten().nonzero().flatten()
        step = -(-len(labeled) // BANK_PATCHES)
        kept = (
            torch.zeros(labels.numel(), dtype=torch.bool)
            .index_fill_(0, labeled[::step], True)
            .view_as(labels)
        )
        bank = []
        for tokens, classes, in_bank in zip(
            features(self.train.images), labels.split(FORWARD_BATCH), kept.split(FORWARD_BATCH)
        ):
            use = classes > 0
            one_hot = F.one_hot(classes[use] - 1, self.n_classes)
            moments.add(tokens.patches[use.to(features.device)], one_hot)
            bank.append(tokens.patches[in_bank.to(features.device)])
        return discriminant(moments), torch.cat(bank), (labels[kept] - 1).to(features.device)


@dataclass(frozen=True)
class KnnProbe:
    """k-NN on the [CLS] features of a labeled folder: ``probe/knn_top1`` in percent."""

    train: Labeled
    val: Labeled
    k: int

    @staticmethod
    def read(root: str, k: int, side_px: int, max_images: int) -> "KnnProbe":
        """The probe of ``probes.knn_root``.

        Raises:
            UserError: a bad folder (:func:`read_classes`), or fewer training images than neighbors.
        """
        train, val = read_classes(root, side_px, max_images, "probes.knn_root")
        if k > len(train.images):
            raise UserError(
                f"probes.knn_k={k} is more than the {len(train.images)} training pictures of {root}"
            )
        return KnnProbe(train, val, k)

    def __call__(self, features: Features) -> dict[str, float]:
        """The probe's number for a backbone."""
        bank, queries = (
            torch.cat([tokens.cls for tokens in features(part.images)]) for part in (self.train, self.val)
        )
        labels, classes = (part.labels.to(features.device) for part in (self.train, self.val))
        predicted = knn_predict(bank, labels, queries, (self.k,), int(labels.max()) + 1)[0]
        return {"probe/knn_top1": 100.0 * (predicted == classes).float().mean().item()}
