"""Weighted k-nearest-neighbor classification on frozen features (DINO's protocol: temperature 0.07)."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.errors import UserError
from pretrain.evaluation.features import Features
from pretrain.evaluation.labeled import Labeled, read_classes

TEMPERATURE = 0.07  # DINO
BANK_CHUNK = 2**16  # features of the bank compared at a time: with 1024 queries 268 MB of cosines
VOTES_CHUNK = 2**24  # votes of single neighbors for all classes counted at a time: 67 MB


def nearest(
    queries: Tensor, parts: Iterable[Tensor], k: int, tick: Callable[[], object] = lambda: None
) -> tuple[Tensor, Tensor]:
    """The k rows of a bank that are most similar to each query, exactly, the most similar first; all rows
    where k is more.

    Args:
        queries: normalized [Q, D].
        parts: the bank's rows in turn, normalized, [M, D] each. Only Q x M cosines of one part are held at a
            time.
        tick: called after each part.

    Returns:
        cosines [Q, k], rows of the bank int64 [Q, k].
    """
    cosines, rows, done = (
        queries.new_zeros(len(queries), 0),
        queries.new_zeros(len(queries), 0, dtype=torch.int64),
        0,
    )
    for part in parts:
        near, index = (queries @ part.T).topk(min(k, len(part)), dim=1)
        cosines, rows = torch.cat([cosines, near], 1), torch.cat([rows, index + done], 1)
        if done:
            cosines, best = cosines.topk(min(k, cosines.shape[1]), dim=1)
            rows = rows.gather(1, best)
        done += len(part)
        tick()
    return cosines, rows


def neighbors(bank: Tensor, queries: Tensor, k: int, bank_chunk: int = BANK_CHUNK) -> tuple[Tensor, Tensor]:
    """:func:`nearest` rows of ``bank`` [M, D] for ``queries`` [Q, D], neither of them normalized.

    Memory: Q * bank_chunk cosines, and as many features of the bank as float32.

    Raises:
        ValueError: ``k`` is larger than the bank.
    """
    if k > len(bank):
        raise ValueError(f"k={k} is more than the {len(bank)} features to choose from")
    return nearest(
        F.normalize(queries.float(), dim=1),
        (F.normalize(part.float(), dim=1) for part in bank.split(bank_chunk)),
        k,
    )


def class_votes(
    cosines: Tensor, labels: Tensor, ks: Sequence[int], n_classes: int, temperature: float = TEMPERATURE
) -> Tensor:
    """Votes of the first k neighbors for each k of ``ks``, each weighing exp(cosine / temperature).

    Args:
        cosines, labels: [Q, K] of :func:`neighbors`, and their classes in 0 .. n_classes - 1.
        ks: at most K.

    Returns:
        [len(ks), Q, n_classes].
    """
    weights = (cosines / temperature).exp()
    of_class = (labels[..., None] == torch.arange(n_classes, device=labels.device)).float()  # [Q, K, C]
    return torch.stack([torch.einsum("qk,qkc->qc", weights[:, :k], of_class[:, :k]) for k in ks])


def knn_votes(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    k: int,
    n_classes: int,
    temperature: float = TEMPERATURE,
    chunk: int = 1024,
) -> Tensor:
    """Votes of the k nearest features of each query, each weighing exp(cosine / temperature).

    Args:
        bank: [M, D]; bank_labels: [M] in 0 .. n_classes - 1; queries: [Q, D].
        k: neighbors, at most M.
        chunk: queries compared at a time, which bounds the memory (:func:`neighbors`).

    Returns:
        [Q, n_classes].

    Raises:
        ValueError: ``k`` is larger than the bank.
    """
    return torch.cat(
        [votes[0] for votes in _votes(bank, bank_labels, queries, (k,), n_classes, temperature, chunk)]
    )


def knn_predict_each(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    ks: Sequence[int],
    n_classes: int,
    temperature: float = TEMPERATURE,
    chunk: int = 1024,
) -> Tensor:
    """The class with the most :func:`knn_votes` for each k of ``ks``, the neighbors found once: [len(ks),
    Q] int64."""
    parts = _votes(bank, bank_labels, queries, ks, n_classes, temperature, chunk)
    return torch.cat([votes.argmax(2) for votes in parts], 1)


def _votes(
    bank: Tensor,
    labels: Tensor,
    queries: Tensor,
    ks: Sequence[int],
    n_classes: int,
    temperature: float,
    chunk: int,
) -> Iterator[Tensor]:
    """:func:`class_votes` of all queries in turn, a few at a time."""
    few = max(1, VOTES_CHUNK // (max(ks) * n_classes))
    for part in queries.split(chunk):
        cosines, rows = neighbors(bank, part, max(ks))
        for some, of_rows in zip(cosines.split(few), labels[rows].split(few)):
            yield class_votes(some, of_rows, ks, n_classes, temperature)


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
        predicted = knn_predict_each(bank, labels, queries, (self.k,), int(labels.max()) + 1)[0]
        return {"probe/knn_top1": 100.0 * (predicted == classes).float().mean().item()}
