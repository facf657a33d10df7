"""Clusters and classes: against plain restatements over pixels and all permutations."""

from itertools import permutations

import numpy as np
import pytest
import torch

from pretrain.evaluation.miou import (
    UNMATCHED,
    class_ious,
    count_pairs,
    greedy,
    hungarian,
    mean_iou,
    named_ious,
)


def pixels(n_clusters, n_classes, n=500, seed=0):
    """Clusters that follow the classes roughly, and labels 0 .. n_classes."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, n_classes + 1, n)
    table = rng.permutation(n_clusters)
    clusters = np.where(rng.random(n) < 0.5, table[labels % n_clusters], rng.integers(0, n_clusters, n))
    return clusters, labels


def iou(predicted, labels, c):
    """Of class c (1 ..) over the labeled pixels."""
    a, b = (predicted == c) & (labels > 0), labels == c
    return (a & b).sum() / (a | b).sum() if (a | b).any() else np.nan


def ious_by_pixels(clusters, labels, assignment, n_classes):
    predicted = np.asarray(assignment)[clusters] + 1
    return [100 * iou(predicted, labels, c) for c in range(1, n_classes + 1)]


def counted(clusters, labels, n_clusters, n_classes):
    return count_pairs(torch.from_numpy(clusters), torch.from_numpy(labels), n_clusters, n_classes)


def test_counts_are_those_of_pixels():
    clusters, labels = pixels(5, 3)
    matrix = counted(clusters.reshape(20, 25), labels.reshape(20, 25), 5, 3)
    expected = [[((clusters == k) & (labels == c)).sum() for c in (1, 2, 3)] for k in range(5)]
    assert matrix.dtype == torch.int64 and matrix.tolist() == expected
    assert counted(clusters, 0 * labels, 5, 3).sum() == 0


@pytest.mark.parametrize("seed", range(6))
def test_hungarian_is_the_best_of_all_permutations(seed):
    clusters, labels = pixels(4, 4, seed=seed)
    matrix = counted(clusters, labels, 4, 4)
    assignment = hungarian(matrix)
    best = max(sum(ious_by_pixels(clusters, labels, order, 4)) for order in permutations(range(4)))
    assert sorted(assignment.tolist()) == [0, 1, 2, 3]
    assert class_ious(matrix, assignment).sum().item() == pytest.approx(best)
    assert class_ious(matrix, assignment).tolist() == pytest.approx(
        ious_by_pixels(clusters, labels, assignment, 4)
    )


def test_what_is_largest_is_the_iou_not_the_pixels():
    matrix = torch.tensor([[50, 45], [6, 0]])
    ious = {order: mean_iou(matrix, torch.tensor(order)) for order in ((0, 1), (1, 0))}
    assert ious[0, 1] == pytest.approx(100 * 50 / 101 / 2) and ious[1, 0] == pytest.approx(
        100 * (45 / 95 + 6 / 56) / 2
    )
    assert ious[1, 0] > ious[0, 1] and hungarian(matrix).tolist() == [1, 0]
    matrix = torch.tensor([[52, 45], [6, 0]])
    assert hungarian(matrix).tolist() == [1, 0]  # 52 pixels against 51


@pytest.mark.parametrize("n_clusters, n_classes", [(6, 4), (3, 5)])
def test_of_unequal_numbers_the_rest_is_unmatched(n_clusters, n_classes):
    clusters, labels = pixels(n_clusters, n_classes)
    matrix = counted(clusters, labels, n_clusters, n_classes)
    assignment = hungarian(matrix)
    matched = assignment[assignment != UNMATCHED]
    assert len(matched) == len(matched.unique()) == min(n_clusters, n_classes)
    found = class_ious(matrix, assignment)
    assert found.tolist() == pytest.approx(
        ious_by_pixels(clusters, labels, assignment, n_classes)
    )  # the unmatched predict nothing
    unserved = [c for c in range(n_classes) if c not in matched.tolist()]
    assert found[unserved].tolist() == [0.0] * len(unserved)


def test_greedy_is_the_largest_precision():
    clusters, labels = pixels(20, 4)
    matrix = counted(clusters, labels, 20, 4)
    assignment = greedy(matrix)
    for k in range(20):
        own = labels[(clusters == k) & (labels > 0)]
        assert (own == assignment[k].item() + 1).sum() == max((own == c).sum() for c in (1, 2, 3, 4))
    expected = ious_by_pixels(clusters, labels, assignment, 4)
    assert class_ious(matrix, assignment).tolist() == pytest.approx(expected)
    assert mean_iou(matrix, assignment) == pytest.approx(np.mean(expected))
    assert greedy(torch.tensor([[3, 3], [0, 0], [0, 1]])).tolist() == [0, 0, 1]  # the first of equals


def test_classes_that_do_not_occur():
    matrix = torch.tensor([[3, 0, 0], [1, 4, 0], [0, 0, 0]])
    ious = class_ious(matrix)
    assert ious[:2].tolist() == pytest.approx([75, 80]) and ious[2].isnan()
    assert mean_iou(matrix) == pytest.approx(77.5)
    assert named_ious(ious, ("cat", "dog", "cow")) == pytest.approx({"cat": 75, "dog": 80})
    assert class_ious(torch.tensor([[3, 0], [1, 0]])).tolist() == [75, 0]  # predicted, though no pixel has it


def test_mean_iou_equals_a_plain_restatement():
    rng = np.random.default_rng(0)
    labels, predicted = rng.integers(0, 5, (4, 9, 9)), rng.integers(0, 3, (4, 9, 9))
    labels[labels == 4] = 1  # class 4 is neither labeled nor predicted; class 3 (2 from 0) is both
    matrix = count_pairs(torch.from_numpy(predicted), torch.from_numpy(labels), 5, 5)
    assert matrix.sum() == (labels > 0).sum()
    ious = [iou(predicted + 1, labels, c) for c in range(1, 6)]
    assert np.isfinite(ious).sum() == 3 and mean_iou(matrix) == pytest.approx(100 * np.nanmean(ious))
