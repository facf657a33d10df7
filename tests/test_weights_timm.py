"""timm's state dicts: features equal those of timm's model, at its own size and at others."""

import json

import pytest
import timm
import torch
from backbone_fixture import randomize
from public_fixture import NAME, TINY, features, images, theirs, timm_vit
from safetensors.torch import save_file

from pretrain.build import build_backbone
from pretrain.errors import UserError
from pretrain.views.pixels import MEAN, STD
from pretrain.weights import read_checkpoint

ARCHITECTURES = {
    "vit_tiny_patch16_224": {},
    "vit_base_patch16_224.dino": {},
    "vit_base_patch16_224.mae": {},
    "vit_small_patch14_dinov2.lvd142m": {},
    "vit_small_patch14_reg4_dinov2.lvd142m": {},
    "vit_base_patch16_gap_224": {},
    "deit3_small_patch16_224": {},
    "vit_base_patch16_224": dict(global_pool="avg"),
    "vit_small_patch16_224": dict(reg_tokens=2),
    "vit_giant_patch14_dinov2.lvd142m": {},  # gated
    "vit_giant_patch14_reg4_dinov2.lvd142m": {},
}


def small(architecture, size=None, **model_kwargs):
    """timm's architecture, narrow and shallow; of a lvd142m model at a small native size."""
    native = 70 if "patch14" in architecture else 64
    model_kwargs = {**TINY, "img_size": size or native, "dynamic_img_size": True, **model_kwargs}
    return randomize(timm.create_model(architecture, pretrained=False, **model_kwargs))


@pytest.mark.parametrize("grid", [None, (3, 6)])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_features_equal(tmp_path, architecture, grid):
    model = small(architecture, **ARCHITECTURES[architecture])
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    patch = model.patch_embed.patch_size[0]
    x = images(grid or model.patch_embed.grid_size, patch)
    expected = theirs(model, x)
    given = features(tmp_path / "weights.pth", x)
    patches = slice(-(x.shape[2] // patch) * (x.shape[3] // patch), None)
    torch.testing.assert_close(given[:, patches], expected[:, patches], atol=1e-5, rtol=1e-5)
    if model.has_class_token:
        torch.testing.assert_close(given, expected, atol=1e-5, rtol=1e-5)


def test_flags_of_what_lacks_tokens_and_norms(tmp_path):
    pooled = small("vit_base_patch16_224", global_pool="avg").state_dict()
    assert "fc_norm.weight" in pooled and "norm.weight" not in pooled
    torch.save({"state_dict": pooled}, tmp_path / "a.pth")
    model_kwargs = read_checkpoint(tmp_path / "a.pth").model_kwargs
    assert model_kwargs["has_cls"] and not model_kwargs["final_norm"]
    torch.save({"model": small("vit_base_patch16_gap_224").state_dict()}, tmp_path / "b.pth")
    model_kwargs = read_checkpoint(tmp_path / "b.pth").model_kwargs
    assert not model_kwargs["has_cls"] and model_kwargs["final_norm"]


def hub_folder(folder, model, architecture="vit_tiny_patch16_224", mean=MEAN, std=STD, tag="augreg_in21k"):
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors")
    described = {
        "architecture": architecture,
        "num_features": 192,
        "pretrained_cfg": {"tag": tag, "mean": mean, "std": std},
    }
    (folder / "config.json").write_text(json.dumps(described))
    return folder


def test_a_folder_of_the_hub_and_its_pixels(tmp_path):
    model = timm_vit(16, (4, 4))
    mean, std = [0.5, 0.4, 0.6], [0.5, 0.25, 0.3]
    folder = hub_folder(tmp_path / "augreg", model, mean=mean, std=std)
    pixels = torch.rand(2, 3, 64, 64)
    theirs_x, ours_x = (
        (pixels - torch.tensor(m).view(3, 1, 1)) / torch.tensor(s).view(3, 1, 1)
        for m, s in ((mean, std), (MEAN, STD))
    )
    for path in (folder, folder / "model.safetensors"):
        torch.testing.assert_close(features(path, ours_x), theirs(model, theirs_x), atol=2e-5, rtol=1e-5)
    provenance = read_checkpoint(folder).provenance
    assert provenance["method"] == "vit_tiny_patch16_224.augreg_in21k"
    assert provenance["pixel_mean_before"] == mean and provenance["pixel_std_before"] == std
    assert (features(folder, theirs_x) - theirs(model, theirs_x)).abs().max() > 1e-2


def test_imagenets_pixels_change_nothing(tmp_path):
    model = timm_vit(16, (4, 4))
    checkpoint = read_checkpoint(hub_folder(tmp_path / "dino", model, tag="dino"))
    assert torch.equal(checkpoint.state["patch_embed.proj.weight"], model.patch_embed.proj.weight)
    assert "pixel_mean_before" not in checkpoint.provenance


@pytest.mark.parametrize(
    "mean, std", [([0.5], 0.5), ("imagenet", 0.5), (0.5, [0.5, 0.5, 0.0]), ([0.1, 0.2, None], 1), (0.5, -1)]
)
def test_pixels_of_no_normalization(tmp_path, mean, std):
    folder = hub_folder(tmp_path / "odd", timm_vit(16, (4, 4)), mean=mean, std=std)
    with pytest.raises(UserError, match="pixels with a (mean|standard deviation)"):
        read_checkpoint(folder)


@pytest.mark.parametrize(
    "model_kwargs, named",
    [
        (dict(pre_norm=True), "norm before the first block"),
        (dict(qk_norm=True), "normalized queries and keys"),
        (dict(global_pool="map"), "attention pooling"),
        (dict(scale_attn_norm=True), "norms inside"),
    ],
)
def test_departures_are_refused_by_name(tmp_path, model_kwargs, named):
    model = small("vit_tiny_patch16_224", **model_kwargs)
    torch.save(model.state_dict(), tmp_path / "a.pth")
    with pytest.raises(UserError, match=named):
        build_backbone(NAME, weights=tmp_path / "a.pth", source="timm")


@pytest.mark.parametrize(
    "architecture", ["vit_base_patch16_clip_quickgelu_224", "vit_base_patch16_siglip_gap_224"]
)
def test_architectures_whose_departure_no_tensor_shows(tmp_path, architecture):
    with pytest.raises(UserError, match=architecture):
        read_checkpoint(hub_folder(tmp_path / "hub", timm_vit(16, (4, 4)), architecture))


@pytest.mark.parametrize(
    "edit, named",
    [
        (lambda s: s.pop("blocks.1.attn.qkv.bias"), r"missing blocks\.1\.attn\.qkv\.bias"),
        (lambda s: s.update({"blocks.1.attn.q_norm": torch.zeros(1)}), r"left over blocks\.1\.attn\.q_norm"),
        (lambda s: s.update(pos_embed=torch.zeros(1, 23, 192)), "23 positions"),
        (lambda s: s.update(pos_embed=torch.zeros(4, 4, 192)[None]), r"pos_embed is \(1, 4, 4, 192\)"),
        (
            lambda s: s.update({"patch_embed.proj.weight": torch.zeros(192, 768)}),
            r"patch_embed.proj.weight is \(192, 768\)",
        ),
        (
            lambda s: s.update({"patch_embed.proj.weight": torch.zeros(192, 1, 16, 16)}),
            r"\(192, 1, 16, 16\) in the file",
        ),
    ],
)
def test_damaged_files_are_refused_by_name(tmp_path, edit, named):
    state = timm_vit(16, (4, 4)).state_dict()
    edit(state)
    torch.save(state, tmp_path / "vit.pth")
    with pytest.raises(UserError, match=named):
        build_backbone(NAME, weights=tmp_path / "vit.pth")


def test_one_of_several_networks_is_not_there(tmp_path):
    torch.save(timm_vit(16, (4, 4)).state_dict(), tmp_path / "vit.pth")
    with pytest.raises(UserError, match="subnet student is not there"):
        read_checkpoint(tmp_path / "vit.pth", subnet="student")
