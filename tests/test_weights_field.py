"""A learned grid of positions as a field: the same network at the grid's own size, and a smooth field
between its cells."""

import math

import pytest
import torch
from backbone_fixture import randomize
from public_fixture import NAME, by_scale, by_size, images, timm_vit
from reference_vit import DinoViT, filled, saved
from test_weights_dinov2 import published

from pretrain.backbones.position import axis_weights, patch_centers, resample_grid, sample_field
from pretrain.build import build_backbone
from pretrain.errors import UserError
from pretrain.weights import read_checkpoint, save_backbone
from pretrain.weights.adapt import SAMPLES_A_CELL, grid_to_field, with_position_field

INTERPOLATIONS = ("bicubic", "bilinear")


def dinov2_registers(folder):
    return saved(folder, published(registers=4)[0], "dinov2_vits14_reg4_pretrain.pth"), 7, 14


def dino(folder):
    return saved(folder, filled(DinoViT()).state_dict(), "dino_deitsmall16_pretrain.pth"), 14, 16


def timms(folder):
    return saved(folder, timm_vit(16, (5, 5), registers=2).state_dict(), "vit.pth"), 5, 16


def timms_without_cls(folder):
    return (
        saved(folder, timm_vit(16, (5, 5), class_token=False, global_pool="avg").state_dict(), "vit.pth"),
        5,
        16,
    )


def own(folder):
    vit = randomize(build_backbone(NAME, depth=2, n_registers=3, layerscale=0.5, gelu="tanh", pos_grid=6))
    return (
        save_backbone(folder / "b.safetensors", vit.state_dict(), name=NAME, model_kwargs=vit.model_kwargs),
        6,
        16,
    )


def converted(path, size, interpolation="bicubic"):
    with pytest.warns(UserWarning, match=r"positions become a field"):
        return with_position_field(read_checkpoint(path), size, interpolation)


@torch.no_grad()
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("file", [dinov2_registers, dino, timms, timms_without_cls, own])
def test_the_network_is_the_same_at_its_own_size(file, interpolation, tmp_path):
    path, side, patch = file(tmp_path)
    checkpoint = converted(path, 50, interpolation)
    before, after = (build_backbone(NAME, weights).eval() for weights in (path, checkpoint))
    assert after.model_kwargs == {
        **before.model_kwargs,
        "pos_encoding": "field",
        "pos_grid": 50,
        "pos_interpolation": interpolation,
    }
    assert checkpoint.provenance == {**read_checkpoint(path).provenance, "pos_grid_before": side}
    x = images((side, side), patch)
    for ours, theirs in zip(after(x), before(x)):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    whole = torch.tensor([[0.0, 0.0, 1.0, 1.0]]).expand(2, -1)
    torch.testing.assert_close(
        after(x, whole, torch.zeros(2, dtype=torch.bool)).patches, before(x).patches, atol=1e-5, rtol=1e-5
    )
    x, flip = images((side, side - 1), patch), torch.tensor([True, True])
    assert (
        after(x, whole / 2, flip).patches - before(x).patches
    ).abs().max() > 1e-2  # a crop is another place


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("side", [1, 2, 7, 14, 16, 32, 37, 64])
def test_reading_the_field_gives_the_grid(side, interpolation):
    zero = torch.zeros(1, dtype=torch.float64)
    size = max(50, int(side * SAMPLES_A_CELL) + 1)
    read = axis_weights(patch_centers(zero, zero + 1, side)[0], size, interpolation)
    torch.testing.assert_close(
        read @ grid_to_field(side, size, interpolation),
        torch.eye(side, dtype=torch.float64),
        atol=1e-12,
        rtol=0,
    )


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_nothing_rings(interpolation):
    """By no grid's values can a field overshoot more than twofold along an axis; with about one sample a
    cell it may by far."""

    def gain(side, size):
        return float(grid_to_field(side, size, interpolation).abs().sum(1).max())

    assert max(gain(side, math.ceil(side * SAMPLES_A_CELL)) for side in range(7, 65)) < 2
    assert max(gain(side, 50) for side in range(7, 38)) < 1.7
    assert gain(37, 38) > 20


def waves(side, *, phase=0.3):
    """[D, side, side] of a smooth function of the image's coordinates at the centers of patches, and that
    function."""

    def function(x, y):
        return torch.stack([torch.cos(3 * x + k * phase) * torch.sin(2 * y - k * phase) for k in range(8)])

    centers = (torch.arange(side, dtype=torch.float64) + 0.5) / side
    return function(centers, centers[:, None]), function


def as_field(grid, size, interpolation="bicubic"):
    along = grid_to_field(grid.shape[-1], size, interpolation)
    return (along @ grid @ along.T).unsqueeze(0)


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("side", [14, 16, 37])
def test_a_smooth_grid_is_continued_smoothly(side, interpolation):
    """At other sizes within 1.2% of bicubic resampling by size and 2.6% of DINO's by scale: these are up
    to 2.7% apart."""
    grid, _ = waves(side)
    field = as_field(grid, 50, interpolation)
    assert float(field.abs().max()) < 1.02 * float(grid.abs().max())
    for other in (side // 2, 2 * side - 3, 3 * side):
        ours = sample_field(
            field, torch.tensor([[0.0, 0, 1, 1]]), (other, other), interpolation=interpolation
        )[0].T
        for rule, tolerance in ((by_size, 0.015), (by_scale, 0.03)):
            theirs = rule(grid.unsqueeze(0), (other, other))[0].flatten(1)
            assert float((ours - theirs).norm() / theirs.norm()) < tolerance
    steps = field.diff(dim=-1).abs().max() * 49, grid.diff(dim=-1).abs().max() * side
    assert float(steps[0]) < 1.35 * float(steps[1])  # hardly steeper than the grid, and that at its border


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_a_crop_reads_the_function_where_it_is(interpolation):
    grid, function = waves(14)
    box, h, w = torch.tensor([[0.2, 0.3, 0.7, 0.9]]), 6, 5
    ours = sample_field(as_field(grid, 50, interpolation), box, (h, w), torch.tensor([True]), interpolation)[
        0
    ].T.unflatten(1, (h, w))
    x = 0.7 - 0.5 * (torch.arange(w, dtype=torch.float64) + 0.5) / w  # mirrored
    y = 0.3 + 0.6 * (torch.arange(h, dtype=torch.float64) + 0.5) / h
    torch.testing.assert_close(ours, function(x, y[:, None]), atol=3e-3, rtol=0)


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("side", [7, 14, 37])
def test_a_linear_grid_is_a_linear_field(side, interpolation):
    """Two cells from the border on; nearer, where every rule replicates the last cell, within a quarter of
    a cell."""
    field = (
        side
        * grid_to_field(side, 50, interpolation)
        @ ((torch.arange(side, dtype=torch.float64) + 0.5) / side)
    )  # in cells
    place = torch.linspace(0, side, 50, dtype=torch.float64)
    error = (field - place).abs()
    assert float(error[(place >= 2) & (place <= side - 2)].max()) < 1e-4
    assert float(error[(place >= 0.5) & (place <= side - 0.5)].max()) < 0.25


def test_what_has_a_field_stays(tmp_path):
    vit = build_backbone(NAME, depth=1, pos_encoding="field", pos_grid=10)
    path = save_backbone(
        tmp_path / "b.safetensors", vit.state_dict(), name=NAME, model_kwargs=vit.model_kwargs
    )
    checkpoint = read_checkpoint(path)
    assert with_position_field(checkpoint, 50) is checkpoint


def test_what_cannot_be(tmp_path):
    vit = build_backbone(NAME, depth=1, pos_encoding="none")
    none = save_backbone(
        tmp_path / "none.safetensors", vit.state_dict(), name=NAME, model_kwargs=vit.model_kwargs
    )
    grid = own(tmp_path)[0]
    for path, size, interpolation, named in [
        (none, 50, "bicubic", r"none\.safetensors has no absolute positions .*positions\.encoding=field"),
        (
            grid,
            7,
            "bicubic",
            r"positions\.grid=7 is too small a field for the 6 x 6 positions of .*b\.safetensors; it takes 8",
        ),
        (grid, 50, "dinov2", r"positions\.interpolation='dinov2'"),
    ]:
        with pytest.raises(UserError, match=named) as error:
            with_position_field(read_checkpoint(path), size, interpolation)
        assert "\n" not in str(error.value)
    assert converted(grid, 8).model_kwargs["pos_grid"] == 8


def test_the_grid_is_read_row_by_row(tmp_path):
    """x and y are not mistaken for one another."""
    vit = build_backbone(NAME, depth=1, pos_grid=7)
    rows = torch.arange(7.0)[:, None].expand(7, 7)
    with torch.no_grad():
        vit.pos_embed[0, 1:] = rows.flatten().unsqueeze(1)
    path = save_backbone(
        tmp_path / "b.safetensors", vit.state_dict(), name=NAME, model_kwargs=vit.model_kwargs
    )
    field = converted(path, 50).state["pos_field"][0, 0]
    assert (
        float(field.std(1).max()) < 1e-4
        and float(field.diff(dim=0).amin()) > -0.1
        and float(field[-1, 0]) > 5.5
    )
    torch.testing.assert_close(
        build_backbone(NAME, converted(path, 50)).positions((7, 7)), resample_grid(vit.pos_embed[:, 1:].view(1, 7, 7, -1), (7, 7)),
        atol=1e-5, rtol=0,
    )  # fmt: skip
