"""Patches of another size: what is exact, what is the best there is, and by how much a photograph departs."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from backbone_fixture import randomize
from photos import write_photos
from PIL import Image
from public_fixture import NAME
from timm.layers import resample_patch_embed

from pretrain.build import build_backbone
from pretrain.views.pixels import MEAN, STD
from pretrain.weights import save_backbone
from pretrain.weights.adapt import resize_kernel, resize_matrix

GRID = 5


def resized(patches, px):
    """[..., p, p] -> [..., px, px], each by itself."""
    flat = patches.reshape(-1, 1, *patches.shape[-2:])
    return F.interpolate(flat, size=(px, px), mode="bicubic", antialias=True).reshape(
        *patches.shape[:-2], px, px
    )


def blockwise(x, old, new):
    """Every patch of an image resized by itself, [B, 3, g * old, g * old] -> [B, 3, g * new, g * new]."""
    g = x.shape[-1] // old
    patches = resized(x.unfold(2, old, old).unfold(3, old, old), new)  # [B, 3, g, g, new, new]
    return patches.permute(0, 1, 2, 4, 3, 5).reshape(*x.shape[:2], g * new, g * new)


@pytest.fixture
def file(tmp_path):
    """A backbone of 14 px patches, its projection of the size that a trained one has."""
    model = randomize(build_backbone(NAME, depth=2, pos_encoding="standard", patch_size=14, pos_grid=GRID))
    with torch.no_grad():
        model.patch_embed.proj.weight.mul_(0.2)
    return save_backbone(
        tmp_path / "b.safetensors", model.state_dict(), name=NAME, model_kwargs=model.model_kwargs
    )


@pytest.mark.parametrize("old, new", [(14, 16), (16, 14), (16, 8), (8, 32)])
def test_equals_timms(old, new):
    kernel = torch.randn(7, 3, old, old)
    torch.testing.assert_close(
        resize_kernel(kernel, new), resample_patch_embed(kernel, [new, new]), atol=1e-4, rtol=1e-4
    )


def test_14_to_16_keeps_every_response():
    """<R x, v> = <x, w> for every patch x."""
    generator = torch.Generator().manual_seed(0)
    w, x = (torch.randn(*shape, 14, 14, generator=generator) for shape in ((9, 3), (50, 3)))
    v = resize_kernel(w, 16)
    before, after = (torch.einsum("ncij,dcij->nd", *pair) for pair in ((x, w), (resized(x, 16), v)))
    torch.testing.assert_close(after, before, atol=1e-5 * float(before.abs().max()), rtol=0)
    assert torch.linalg.matrix_rank(resize_matrix(14, 16)) == 14**2


def test_plain_bicubic_scales_responses():
    """By (16 / 14)^2 = 1.31 on patches without detail: as many more pixels are summed."""
    w = resized(torch.randn(9, 3, 4, 4), 14)
    x = resized(torch.randn(50, 3, 3, 3), 14)
    before, plain = (
        torch.einsum("ncij,dcij->nd", *pair) for pair in ((x, w), (resized(x, 16), resized(w, 16)))
    )
    slope = float((before * plain).sum() / (before * before).sum())
    assert slope == pytest.approx((16 / 14) ** 2, rel=0.02)


def test_16_to_14_is_least_squares():
    """Nothing of the same size comes nearer to <R x, v> = <x, w>, over white patches."""
    w, matrix = torch.randn(1, 1, 16, 16, dtype=torch.float64), resize_matrix(16, 14)
    v = resize_kernel(w, 14)

    def error(v):
        return float((matrix.T @ v.flatten() - w.flatten()).square().sum())

    least = error(v)
    best = torch.linalg.lstsq(matrix.T, w.flatten()).solution
    assert least == pytest.approx(error(best), rel=1e-9) and least > 0
    assert all(error(v + 0.01 * torch.randn_like(v)) > least for _ in range(20))


@pytest.mark.parametrize("patch", [16, 28])
@torch.no_grad()
def test_features_are_equal_where_every_patch_is_resized(file, patch):
    """The identity: the network for larger patches sees in R x what the original saw in x, at the same
    grid and positions."""
    original, converted = (
        build_backbone(NAME, file).eval(),
        build_backbone(NAME, file, patch_size=patch).eval(),
    )
    x = torch.randn(2, 3, GRID * 14, GRID * 14)
    torch.testing.assert_close(
        converted(blockwise(x, 14, patch)).patches, original(x).patches, atol=1e-4, rtol=1e-4
    )
    for name, value in original.state_dict().items():
        assert torch.equal(value, converted.state_dict()[name]) or name == "patch_embed.proj.weight", name


def photograph(tmp_path, side):
    image = Image.open(next(iter(sorted(write_photos(tmp_path / "photos", n=1).iterdir())))).convert("RGB")
    pixels = (
        torch.from_numpy(np.asarray(image.resize((side, side), Image.Resampling.LANCZOS)).copy()).permute(
            2, 0, 1
        )
        / 255
    )
    return ((pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)).unsqueeze(0)


@torch.no_grad()
def test_an_image_resized_as_a_whole(file, tmp_path):
    """Equal where resizing the image is resizing each patch, so that nothing crosses the patches' borders:
    where the image is constant within the kernel's reach of them. On a photograph something does: the
    projection's responses depart by 0.3%, with kernels enlarged plainly by 31%, which is (16 / 14)^2 - 1."""
    original, converted = build_backbone(NAME, file).eval(), build_backbone(NAME, file, patch_size=16).eval()
    x = torch.zeros(1, 3, GRID * 14, GRID * 14)
    for i in range(GRID):
        for j in range(GRID):
            x[:, :, i * 14 + 4 : i * 14 + 10, j * 14 + 4 : j * 14 + 10] = torch.randn(3, 6, 6)
    torch.testing.assert_close(
        converted(resized(x, GRID * 16)).patches, original(x).patches, atol=1e-4, rtol=1e-4
    )

    photo = photograph(tmp_path, GRID * 14)
    enlarged, kernel = resized(photo, GRID * 16), original.patch_embed.proj.weight
    responses = F.conv2d(photo, kernel, stride=14)
    departures = [
        float((F.conv2d(enlarged, k, stride=16) - responses).norm() / responses.norm())
        for k in (converted.patch_embed.proj.weight, resized(kernel, 16))
    ]
    print(f"departure {departures[0]:.4f}, of plain bicubic {departures[1]:.4f}")
    assert 0 < departures[0] < 0.02 and 0.25 < departures[1] < 0.4
    before, after = original(photo).patches, converted(enlarged).patches
    assert float((after - before).norm() / before.norm()) < 0.01


@torch.no_grad()
def test_positions_are_resampled_for_the_new_grid(file):
    """16 px patches of an image of 5 x 14 px make another grid, and the old grid of positions serves it."""
    original, converted = build_backbone(NAME, file), build_backbone(NAME, file, patch_size=16)
    assert converted.model_kwargs["pos_grid"] == GRID and torch.equal(
        converted.positions((4, 7)), original.positions((4, 7))
    )
    assert torch.equal(converted.positions((GRID, GRID)), original.pos_embed[:, 1:])
    assert converted.eval()(torch.randn(1, 3, 80, 112)).patches.shape == (1, 35, 192)
