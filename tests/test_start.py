"""The backbone that a post-training starts from: its file decides the network, the config only what it
may."""

import pytest
import torch
from backbone_fixture import randomize
from photos import last
from public_fixture import NAME, images
from reference_vit import saved
from test_weights_dinov2 import published

from pretrain.build import build_backbone
from pretrain.config import load_config
from pretrain.errors import UserError
from pretrain.methods.backbones import started_backbone
from pretrain.weights import save_backbone

UNUSUAL = dict(
    n_registers=3,
    layerscale=0.5,
    gelu="tanh",
    ln_eps=1e-5,
    has_cls=False,
    pos_grid=6,
    pos_interpolation="bicubic",
)


def file(folder, name=NAME, **model_kwargs):
    vit = randomize(build_backbone(name, **{"depth": 2, **model_kwargs}))
    return save_backbone(
        folder / "start.safetensors", vit.state_dict(), name=name, model_kwargs=vit.model_kwargs
    )


def started(weights, *overrides, encoding="standard", drop_path=0.0):
    words = [
        "method=paka",
        f"backbone.weights={weights}",
        f"backbone.name={NAME}",
        f"positions.encoding={encoding}",
    ]
    settings = load_config(None, last([*words, *overrides]))
    return started_backbone(settings, drop_path, settings.positions)


def refusal(weights, *overrides, **options):
    with pytest.raises(UserError) as error:
        started(weights, *overrides, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


@torch.no_grad()
def equal(ours, theirs, x):
    return all(torch.equal(a, b) for a, b in zip(ours.eval()(x), theirs.eval()(x)))


@pytest.mark.parametrize(
    "model_kwargs", [UNUSUAL, dict(pos_encoding="field", pos_grid=10), dict(pos_encoding="none")]
)
def test_the_file_decides_the_network(tmp_path, model_kwargs):
    path = file(tmp_path, **model_kwargs)
    vit = started(path, drop_path=0.2)
    plain = build_backbone(NAME, path)
    assert (
        vit.model_kwargs == plain.model_kwargs
        and {k: vit.model_kwargs[k] for k in model_kwargs} == model_kwargs
        and vit.drop_path == 0.2
    )
    assert equal(vit, plain, images((4, 5), 16))


def test_registers_and_scales_of_dinov2_stay_and_patches_are_resampled(tmp_path):
    path = saved(tmp_path, published(registers=4)[0], "dinov2_vits14_reg4_pretrain.pth")
    whole = started(path, "backbone.patch_size=14", "crops.global_px=224", "crops.local_px=98")
    assert (whole.patch_size, whole.n_registers, whole.model_kwargs["pos_grid"]) == (14, 4, 7) and hasattr(
        whole.blocks[0], "ls1"
    )
    assert equal(whole, build_backbone(NAME, path), images((7, 7), 14))
    assert equal(
        started(path), build_backbone(NAME, path, patch_size=16), images((7, 7), 16)
    )  # backbone.patch_size=16 is the default


def test_mask_tokens_are_left_behind(tmp_path):
    path = file(tmp_path, mask_tokens=True)
    assert not any("mask" in key for key in started(path).state_dict())


def test_positions_become_crop_tied(tmp_path):
    path = file(tmp_path, pos_grid=7, n_registers=4)
    with pytest.warns(
        UserWarning, match=r"start\.safetensors: its 7 x 7 positions become a field of 20 x 20 samples"
    ):
        vit = started(path, "positions.grid=20", "positions.interpolation=bilinear", encoding="field")
    assert (vit.pos_encoding, vit.pos_grid, vit.pos_interpolation) == (
        "field",
        20,
        "bilinear",
    ) and vit.pos_field.requires_grad
    x = images((7, 7), 16)
    with torch.no_grad():
        for ours, theirs in zip(vit.eval()(x), build_backbone(NAME, path).eval()(x)):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_a_field_stays_the_files_own(tmp_path):
    path = file(tmp_path, pos_encoding="field", pos_grid=10, pos_interpolation="bilinear")
    assert started(path, encoding="field").model_kwargs == build_backbone(NAME, path).model_kwargs


def test_what_a_file_does_not_have(tmp_path):
    path = file(tmp_path)
    assert refusal("", encoding="field").startswith("config: backbone.weights is empty")
    assert (
        refusal(path, "backbone.n_registers=4")
        == f"weights: {path} was made with n_registers=0, but n_registers=4 is asked for"
    )
    assert (
        refusal(path, "backbone.depth=3")
        == f"weights: {path} was made with depth=2, but depth=3 is asked for"
    )
    assert (
        refusal(path, f"backbone.name={NAME}_reg4")
        == f"weights: {path} has 0 registers, but {NAME}_reg4 has 4"
    )
    assert "192 wide, but vit_small_patch16 is 384 wide" in refusal(path, "backbone.name=vit_small_patch16")
    assert "positions.grid=12 is too small a field for the 14 x 14" in refusal(
        path, "positions.grid=12", encoding="field"
    )
    none = file(tmp_path, pos_encoding="none")
    assert f"{none} has no absolute positions" in refusal(none, encoding="field")


def test_a_name_with_registers_takes_files_that_have_them(tmp_path):
    path = file(tmp_path, f"{NAME}_reg4")
    assert started(path, f"backbone.name={NAME}_reg4").n_registers == started(path).n_registers == 4
