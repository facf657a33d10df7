"""Dense probes: segmentation of a small labeled set from frozen patch features, by a linear read-out and by
k-NN.

Both are fitted on whole patches, labeled by the majority of their labeled pixels. Both give class
probabilities on the patch grid, which are upsampled bilinearly; mIoU is over the labeled pixels of the
squeezed images. All of this is ours: it costs two forward passes and has nothing to tune, for curves during a
training. The benchmark is ``posfield segment``.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.errors import UserError
from pretrain.evaluation.features import FORWARD_BATCH, Features
from pretrain.evaluation.knn import knn_votes
from pretrain.evaluation.labeled import Labeled, read_segmentation
from pretrain.evaluation.linear import Moments, ReadOut, discriminant
from pretrain.evaluation.matching import count_pairs
from pretrain.evaluation.patches import patch_counts, predict_pixels

BANK_PATCHES = 50_000  # of the training set, at equal steps, that k-NN compares with
QUERY_PATCHES = 512  # compared at a time: 100 MB of similarities


def patch_labels(labels: Tensor, patch_size: int, n_classes: int) -> Tensor:
    """Majority of the labeled pixels of each patch; the smaller class where two are even.

    Args:
        labels: [n, S, S] in 0 (not labeled) .. n_classes; S a multiple of the patch size.

    Returns:
        [n, N] int64, row-major; 0 for a patch without a labeled pixel.
    """
    counts = np.stack([patch_counts(image.numpy(), patch_size, n_classes) for image in labels])  # [n, N, C]
    return torch.from_numpy((counts.argmax(-1) + 1) * counts.any(-1))


def mean_iou(matrix: Tensor) -> float:
    """mIoU in percent over the classes that occur in labels or predictions, from pixels counted by
    :func:`count_pairs`."""
    both = matrix.diagonal().double()
    union = matrix.sum(0) + matrix.sum(1) - both
    occurs = union > 0
    return 100.0 * (both[occurs] / union[occurs]).mean().item()


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
            votes = knn_votes(bank, bank_labels, patches, k, n_classes, chunk=QUERY_PATCHES)
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
