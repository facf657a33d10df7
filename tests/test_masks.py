"""Masks: exact counts, shapes, and never two kinds in one crop."""

import numpy as np
import pytest
import torch

from pretrain.views.masks import (
    MaskSettings,
    box_mask,
    cross_mask,
    draw_kinds,
    draw_masks,
    draw_targets,
    mask_of_shape,
    random_mask,
)

GRID = (14, 14)


@pytest.mark.parametrize("grid", [(14, 14), (7, 7), (4, 9)])
def test_every_mask_hits_its_target_exactly(grid):
    n = grid[0] * grid[1]
    for target in [0, 1, 3, 4, n // 10, n // 3, n // 2, n - 1]:
        for seed in range(5):
            rng = np.random.default_rng([seed, target])
            assert box_mask(grid, target, MaskSettings(), rng).sum() == target
            assert cross_mask(grid, target, rng).sum() == target
            assert random_mask(grid, target, rng).sum() == target


def test_one_cross_is_a_full_row_and_a_full_column():
    mask = cross_mask(GRID, 27, np.random.default_rng(0))
    row, column = int(mask.all(1).argmax()), int(mask.all(0).argmax())
    expected = np.zeros(GRID, dtype=bool)
    expected[row], expected[:, column] = True, True
    assert (mask == expected).all()


def test_a_thick_cross_from_twice_a_thin_ones_cells():
    for target, thickness in ((54, 2), (53, 1)):
        starts = {"rows": set(), "columns": set()}
        for seed in range(30):
            mask = cross_mask(GRID, target, np.random.default_rng(seed))
            assert mask.sum() == target
            for name, full in (("rows", mask.all(1)), ("columns", mask.all(0))):
                starts[name].add(bool((full[:-1] & full[1:]).any()))  # two full bands side by side
        if thickness == 2:
            assert starts == {"rows": {True}, "columns": {True}}
        else:
            assert all(False in seen for seen in starts.values())


class Scripted:
    """Numbers that a test chooses."""

    def __init__(self, *numbers):
        self.numbers = list(numbers)

    def random(self):
        return self.numbers.pop(0)


@pytest.mark.parametrize("keep_first", [True, False])
@pytest.mark.parametrize("row, column", [(0, 0), (7, 7), (14, 3), (2, 14)])
def test_a_short_cross_keeps_the_cells_near_its_center(row, column, keep_first):
    rows, columns = np.indices((15, 15))
    on_cross, distance = (
        (rows == row) | (columns == column),
        np.maximum(abs(rows - row), abs(columns - column)),
    )
    for target in range(1, 29):
        mask = cross_mask(
            (15, 15), target, Scripted((row + 0.5) / 15, (column + 0.5) / 15, 0.49 if keep_first else 0.5)
        )
        assert mask.sum() == target and not (mask & ~on_cross).any()
        if target < 29:
            last = distance[mask].max()
            assert last <= distance[on_cross & ~mask].min()
            tied = np.flatnonzero(
                on_cross & (distance == last)
            )  # of equally far cells, the first or the last in reading order
            kept = int(mask.flat[tied].sum())
            assert mask.flat[tied[:kept] if keep_first else tied[len(tied) - kept :]].all()


@pytest.mark.parametrize("grid", [(14, 14), (7, 7), (4, 9)])
def test_no_side_is_preferred(grid):
    """Every number u against 1 - u: places and the choice between ties are mirrored, and the mask is
    turned by 180 degrees."""
    cut = 0
    for target in range(1, grid[0] * grid[1], 3):
        drawn = [
            (target * k * k + k) % 101 or 50 for k in range(1, 100)
        ]  # of 101, a prime: u times a side is never whole
        one, other = Scripted(*(n / 101 for n in drawn)), Scripted(*((101 - n) / 101 for n in drawn))
        assert (cross_mask(grid, target, one) == cross_mask(grid, target, other)[::-1, ::-1]).all()
        assert len(one.numbers) == len(other.numbers)
        cut += len(one.numbers) % 2 == 0  # 99 less two a cross, less the one that chooses between ties
    assert cut >= 10


def test_only_a_mask_that_is_cut_draws_between_ties():
    whole, short = (Scripted(0.3, 0.6, 0.5, 0.5) for _ in range(2))
    assert cross_mask((15, 15), 29, whole).sum() == 29 and len(whole.numbers) == 2
    assert cross_mask((15, 15), 28, short).sum() == 28 and len(short.numbers) == 1


@pytest.mark.parametrize(
    "number, ring",
    [(0.0, ((8, 10), (8, 11), (9, 9), (9, 12))), (0.9, ((10, 9), (10, 12), (11, 10), (11, 11)))],
)
def test_the_last_of_two_thick_crosses_is_cut_at_its_own_far_cells(number, ring):
    """By hand: the first cross at rows 2-3 and columns 4-5 stands whole (52 cells); of the second, those
    nearest to (9.5, 10.5)."""
    mask = cross_mask((14, 14), 60, Scripted(2.5 / 13, 4.5 / 13, 9.5 / 13, 10.5 / 13, number))
    rows, columns = np.indices((14, 14))
    first = np.isin(rows, (2, 3)) | np.isin(columns, (4, 5))
    assert (mask & first).sum() == first.sum() == 52 and mask.sum() == 60
    second = mask & ~first
    expected = np.zeros((14, 14), dtype=bool)
    expected[9:11, 10:12] = (
        True  # at distance 1/2; then half the ring at 3/2, in reading order from its start or its end
    )
    for row, column in ring:
        expected[row, column] = True
    assert (second == expected).all()


def test_boxes_by_hand():
    """Of 25 patches: 4 + 21 * 13/21 = 17 at aspect 1 is a box of 4 x 4; then 4 + 5 = 9 of the 9 left over,
    3 x 3."""
    size, square = 13 / 21, 0.5
    first = [
        size,
        square,
        3.5 / 11,
        6.5 / 11,
    ]  # at row 3 and column 6, of the 11 places each that a side of 4 has in 14
    second = [1.0, square, 10.5 / 12, 0.5 / 12]
    mask = box_mask(GRID, 25, MaskSettings(), Scripted(*first, *second))
    expected = np.zeros(GRID, dtype=bool)
    expected[3:7, 6:10] = expected[10:13, 0:3] = True
    assert (mask == expected).all()
    nothing_new = [1.0, square, 3.5 / 12, 6.5 / 12]  # inside the first box: tried again
    assert (box_mask(GRID, 25, MaskSettings(), Scripted(*first, *nothing_new, *second)) == expected).all()


def test_the_rest_beyond_the_boxes_is_single_free_patches():
    """No box fits a grid of one row: all patches come from the top-up, each as likely as any other."""
    seen = np.stack(
        [box_mask((1, 12), 5, MaskSettings(), np.random.default_rng(seed))[0] for seed in range(2000)]
    )
    assert (seen.sum(1) == 5).all() and abs(seen.mean(0) - 5 / 12).max() < 0.05


def test_lists_of_masked_patches():
    masks = draw_masks(4, 2, GRID, MaskSettings(content_share=0.5, position_share=0.25), (3, 1))
    for kind in ("content", "position"):
        mask = getattr(masks, kind)
        index, weight = getattr(masks, f"{kind}_index"), getattr(masks, f"{kind}_weight")
        assert index.dtype == torch.int64 and torch.equal(index, mask.flatten().nonzero()[:, 0])
        counts = mask.sum(1, keepdim=True).expand_as(mask)[mask]
        assert weight.dtype == torch.float32 and torch.equal(weight, 1 / counts.float())
    none = draw_masks(2, 2, GRID, MaskSettings(position_share=0.0), (3, 1))
    assert none.position_index.shape == none.position_weight.shape == (0,)


def test_box_masks_are_boxy():
    """A quarter of the crop by boxes of at least 4 patches: most masked patches have a masked neighbor."""
    lonely = []
    for seed in range(50):
        mask = np.pad(box_mask(GRID, 49, MaskSettings(), np.random.default_rng(seed)), 1)
        near = mask[:-2, 1:-1] | mask[2:, 1:-1] | mask[1:-1, :-2] | mask[1:-1, 2:]
        lonely.append((mask[1:-1, 1:-1] & ~near).sum())
    assert np.mean(lonely) < 2


@pytest.mark.parametrize("content, position", [(0.5, 0.5), (0.5, 0.0), (1.0, 0.0), (0.0, 1.0), (0.25, 0.5)])
@pytest.mark.parametrize("kinds_over", ["batch", "image"])
def test_shares_and_exclusion(content, position, kinds_over):
    rule = MaskSettings(content_share=content, position_share=position, kinds_over=kinds_over)
    masks = draw_masks(16, 2, GRID, rule, (0, 1))
    has = {"content": masks.content.any(1), "position": masks.position.any(1)}
    assert masks.content.shape == masks.position.shape == (32, 196)
    assert has["content"].sum() == 32 * content and has["position"].sum() == 32 * position
    assert not (has["content"] & has["position"]).any()
    if kinds_over == "image":
        assert torch.equal(has["content"][:16], has["content"][16:])


def test_ratios_are_stratified_over_each_kinds_crops():
    masks = draw_masks(64, 2, GRID, MaskSettings(), (5, 0))
    edges = np.linspace(0.1, 0.5, 65)
    for mask in (masks.content, masks.position):
        counts = np.sort(mask.sum(1)[mask.any(1)].numpy())
        assert len(counts) == 64
        for count, low, high in zip(counts, edges[:-1], edges[1:]):
            assert int(196 * low) <= count <= int(196 * high)
    first_view = masks.content[:64].sum(1)[masks.content[:64].any(1)].float()
    assert abs(first_view.mean() - 196 * 0.3) < 15  # strata do not follow the order of the views


def test_targets_and_kinds_by_hand():
    rng = np.random.default_rng(0)
    assert draw_targets(0, 196, (0.1, 0.5), rng) == []
    assert draw_targets(2, 10, (0.2, 0.2), rng) == [2, 2]
    assert sorted(draw_kinds(3, 2, MaskSettings(content_share=0.5, position_share=0.25), rng)) == [
        "content"
    ] * 3 + ["none"] * 2 + ["position"]


def test_a_rank_draws_its_rows_of_the_global_batch():
    whole = draw_masks(8, 2, GRID, MaskSettings(), (1, 2))
    for images in (slice(0, 4), slice(4, 8)):
        part = draw_masks(8, 2, GRID, MaskSettings(), (1, 2), images)
        for name in ("content", "position"):
            rows = getattr(whole, name).unflatten(0, (2, 8))[:, images].flatten(0, 1)
            assert torch.equal(getattr(part, name), rows)
    assert not torch.equal(draw_masks(8, 2, GRID, MaskSettings(), (1, 3)).content, whole.content)


MAE = MaskSettings(content_share=1.0, position_share=0.0, ratio=(0.75, 0.75), content_shape="random")


@pytest.mark.parametrize("ratio", [0.75, 0.6, 0.9, 0.1, 1 / 3])
def test_a_ratio_without_a_range_masks_as_many_patches_of_every_crop(ratio):
    for n_patches in range(1, 400):
        targets = draw_targets(37, n_patches, (ratio, ratio), np.random.default_rng(n_patches))
        assert targets == [int(n_patches * ratio)] * 37
    assert draw_targets(4096, 196, (0.75, 0.75), np.random.default_rng(0)) == [147] * 4096


@pytest.mark.parametrize("n_images", [1, 3, 64])
def test_maes_masks_hide_147_of_196_patches_of_every_crop(n_images):
    for seed in range(20):
        masks = draw_masks(n_images, 1, GRID, MAE, (seed, 3, 0))
        assert masks.content.shape == (n_images, 196) and (masks.content.sum(1) == 147).all()
        assert not masks.position.any() and len(masks.content_index) == 147 * n_images


def test_random_masks_are_patches_of_the_smallest_numbers():
    numbers = [0.9, 0.2, 0.8, 0.1, 0.7, 0.3]
    assert random_mask((2, 3), 3, Scripted(*numbers)).tolist() == [[False, True, False], [True, False, True]]
    assert mask_of_shape("random", (2, 3), 2, MAE, Scripted(*numbers)).ravel().tolist() == [
        False,
        True,
        False,
        True,
        False,
        False,
    ]


def test_every_patch_and_every_pair_of_patches_is_masked_as_often_as_any_other():
    """3,000 masks of 9 of 12 patches: shares 3/4 and 9 * 8 / (12 * 11), each within five standard
    deviations."""
    masks = draw_masks(3000, 1, (3, 4), MAE, (11, 3, 0)).content.double()
    pairs = masks.T @ masks / len(masks)  # [N, N], the shares of single patches on the diagonal
    expected = torch.full((12, 12), 72 / 132, dtype=torch.float64).fill_diagonal_(0.75)
    assert ((pairs - expected).abs() < 5 * (expected * (1 - expected) / len(masks)).sqrt()).all()


@pytest.mark.parametrize("n_ranks", [1, 2, 4])
def test_every_rank_draws_its_rows_of_random_masks(n_ranks):
    whole, size = draw_masks(8, 1, GRID, MAE, (1, 3, 2)), 8 // n_ranks
    parts = [
        draw_masks(8, 1, GRID, MAE, (1, 3, 2), slice(rank * size, rank * size + size))
        for rank in range(n_ranks)
    ]
    assert torch.equal(torch.cat([part.content for part in parts]), whole.content)
    assert not torch.equal(draw_masks(8, 1, GRID, MAE, (1, 3, 3)).content, whole.content)
