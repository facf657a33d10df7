"""Weighted k-nearest-neighbour classification on frozen features (DINO's protocol: temperature 0.07)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.errors import UserError
from pretrain.evaluation.features import Features
from pretrain.evaluation.labelled import Labelled, read_classes


def knn_votes(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, k: int, n_classes: int, temperature: float = 0.07, chunk: int = 1024
) -> Tensor:
    """Votes of the k nearest features of each query, each weighing exp(cosine / temperature).

    Args:
        bank: [M, D]; bank_labels: [M] in 0 .. n_classes - 1; queries: [Q, D].
        k: neighbours, at most M.
        chunk: queries compared at a time, which bounds the memory to chunk * M similarities.

    Returns:
        [Q, n_classes].

    Raises:
        ValueError: ``k`` is larger than the bank.
    """
    if k > len(bank):
        raise ValueError(f"k={k} is more than the {len(bank)} features to choose from")
    bank = F.normalize(bank.float(), dim=1)
    one_hot = F.one_hot(bank_labels, n_classes).float()  # [M, C]
    votes = []
    for part in queries.split(chunk):
        similarity, index = (F.normalize(part.float(), dim=1) @ bank.T).topk(k, dim=1)  # [q, k]
        votes.append(torch.einsum("qk,qkc->qc", (similarity / temperature).exp(), one_hot[index]))
    return torch.cat(votes)


def knn_predict(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, k: int, n_classes: int, temperature: float = 0.07, chunk: int = 1024
) -> Tensor:
    """Class with the most :func:`knn_votes`, [Q] int64; the arguments are the same."""
    return knn_votes(bank, bank_labels, queries, k, n_classes, temperature, chunk).argmax(1)


def knn_accuracy(bank: Tensor, bank_labels: Tensor, queries: Tensor, labels: Tensor, k: int, temperature: float = 0.07) -> float:
    """Share of queries whose class is predicted right, in percent; the arguments are those of :func:`knn_predict`."""
    n_classes = int(max(bank_labels.max(), labels.max())) + 1
    right = knn_predict(bank, bank_labels, queries, k, n_classes, temperature) == labels
    return 100.0 * right.float().mean().item()


@dataclass(frozen=True)
class KnnProbe:
    """k-NN on the [CLS] features of a labelled folder: ``probe/knn_top1`` in percent."""

    train: Labelled
    val: Labelled
    k: int

    @staticmethod
    def read(root: str, k: int, side_px: int, max_images: int) -> "KnnProbe":
        """The probe of ``probes.knn_root``.

        Raises:
            UserError: a bad folder (:func:`read_classes`), or fewer training pictures than neighbours.
        """
        train, val = read_classes(root, side_px, max_images, "probes.knn_root")
        if k > len(train.images):
            raise UserError(f"probes.knn_k={k} is more than the {len(train.images)} training pictures of {root}")
        return KnnProbe(train, val, k)

    def __call__(self, features: Features) -> dict[str, float]:
        """The probe's number for a backbone."""
        bank, queries = (torch.cat([tokens.cls for tokens in features(part.images)]) for part in (self.train, self.val))
        labels = [part.labels.to(features.device) for part in (self.train, self.val)]
        return {"probe/knn_top1": knn_accuracy(bank, labels[0], queries, labels[1], self.k)}
