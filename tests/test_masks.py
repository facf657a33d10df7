"""Masks: exact counts, shapes, and never two kinds in one crop."""

import numpy as np
import pytest
import torch

from pretrain.views.masks import MaskRule, box_mask, cross_mask, draw_kinds, draw_masks, draw_targets

GRID = (14, 14)


@pytest.mark.parametrize("grid", [(14, 14), (7, 7), (4, 9)])
def test_every_mask_hits_its_target_exactly(grid):
    n = grid[0] * grid[1]
    for target in [0, 1, 3, 4, n // 10, n // 3, n // 2, n - 1]:
        for seed in range(5):
            rng = np.random.default_rng([seed, target])
            assert box_mask(grid, target, MaskRule(), rng).sum() == target
            assert cross_mask(grid, target, rng).sum() == target


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


def test_a_short_cross_keeps_the_cells_near_its_centre():
    for seed in range(20):
        mask = cross_mask((15, 15), 9, np.random.default_rng(seed))
        rng = np.random.default_rng(seed)  # the centre, as cross_mask draws it
        row, column = int(rng.integers(0, 15)), int(rng.integers(0, 15))
        rows, columns = np.indices(mask.shape)
        on_cross, distance = (rows == row) | (columns == column), np.maximum(abs(rows - row), abs(columns - column))
        assert mask.sum() == 9 and not (mask & ~on_cross).any()
        assert distance[mask].max() <= distance[on_cross & ~mask].min()


def test_box_masks_are_boxy():
    """A quarter of the crop by boxes of at least 4 patches: most masked patches have a masked neighbour."""
    lonely = []
    for seed in range(50):
        mask = np.pad(box_mask(GRID, 49, MaskRule(), np.random.default_rng(seed)), 1)
        near = mask[:-2, 1:-1] | mask[2:, 1:-1] | mask[1:-1, :-2] | mask[1:-1, 2:]
        lonely.append((mask[1:-1, 1:-1] & ~near).sum())
    assert np.mean(lonely) < 2


@pytest.mark.parametrize("content, position", [(0.5, 0.5), (0.5, 0.0), (1.0, 0.0), (0.0, 1.0), (0.25, 0.5)])
@pytest.mark.parametrize("kinds_over", ["batch", "image"])
def test_shares_and_exclusion(content, position, kinds_over):
    rule = MaskRule(content_share=content, position_share=position, kinds_over=kinds_over)
    masks = draw_masks(16, 2, GRID, rule, (0, 1))
    has = {"content": masks.content.any(1), "position": masks.position.any(1)}
    assert masks.content.shape == masks.position.shape == (32, 196)
    assert has["content"].sum() == 32 * content and has["position"].sum() == 32 * position
    assert not (has["content"] & has["position"]).any()
    if kinds_over == "image":
        assert torch.equal(has["content"][:16], has["content"][16:])


def test_ratios_are_stratified_over_each_kinds_crops():
    masks = draw_masks(64, 2, GRID, MaskRule(), (5, 0))
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
    assert sorted(draw_kinds(3, 2, MaskRule(content_share=0.5, position_share=0.25), rng)) == ["content"] * 3 + ["none"] * 2 + [
        "position"
    ]


def test_a_rank_draws_its_rows_of_the_global_batch():
    whole = draw_masks(8, 2, GRID, MaskRule(), (1, 2))
    for images in (slice(0, 4), slice(4, 8)):
        part = draw_masks(8, 2, GRID, MaskRule(), (1, 2), images)
        for name in ("content", "position"):
            rows = getattr(whole, name).unflatten(0, (2, 8))[:, images].flatten(0, 1)
            assert torch.equal(getattr(part, name), rows)
    assert not torch.equal(draw_masks(8, 2, GRID, MaskRule(), (1, 3)).content, whole.content)
