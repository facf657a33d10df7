"""Weighted k-nearest-neighbour classification on frozen features (DINO's protocol: temperature 0.07)."""

import torch
import torch.nn.functional as F
from torch import Tensor


def knn_predict(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, k: int, n_classes: int, temperature: float = 0.07, chunk: int = 1024
) -> Tensor:
    """Class of each query by the votes of its k nearest features, each weighing exp(cosine / temperature).

    Args:
        bank: [M, D]; bank_labels: [M] in 0 .. n_classes - 1; queries: [Q, D].
        k: neighbours, at most M.
        chunk: queries compared at a time, which bounds the memory to chunk * M similarities.

    Returns:
        [Q] int64.

    Raises:
        ValueError: ``k`` is larger than the bank.
    """
    if k > len(bank):
        raise ValueError(f"k={k} is more than the {len(bank)} features to choose from")
    bank = F.normalize(bank.float(), dim=1)
    one_hot = F.one_hot(bank_labels, n_classes).float()  # [M, C]
    predicted = []
    for part in queries.split(chunk):
        similarity, index = (F.normalize(part.float(), dim=1) @ bank.T).topk(k, dim=1)  # [q, k]
        votes = torch.einsum("qk,qkc->qc", (similarity / temperature).exp(), one_hot[index])
        predicted.append(votes.argmax(1))
    return torch.cat(predicted)


def knn_accuracy(bank: Tensor, bank_labels: Tensor, queries: Tensor, labels: Tensor, k: int, temperature: float = 0.07) -> float:
    """Share of queries whose class is predicted right, in percent; the arguments are those of :func:`knn_predict`."""
    n_classes = int(max(bank_labels.max(), labels.max())) + 1
    right = knn_predict(bank, bank_labels, queries, k, n_classes, temperature) == labels
    return 100.0 * right.float().mean().item()
