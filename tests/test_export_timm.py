"""Folders for timm: its own loader reads them strictly, and its network gives our features."""

import json
import os

import pytest
import torch
from backbone_fixture import sharp
from safetensors.torch import load_file, save_file

from pretrain.build import build_backbone
from pretrain.errors import UserError
from pretrain.export import export
from pretrain.export.timm import architecture, model_arguments

timm = pytest.importorskip("timm", reason="timm is not installed (pip install 'posfield[export]')")

TINY = "vit_tiny_patch16"
ROTARY = dict(pos_encoding="rotary", n_registers=4, layerscale=0.3, ln_eps=1e-5, qkv_bias="no_key")
CASES = {
    "rotary": (ROTARY, (32, 64)),
    "rotary, no registers": ({**ROTARY, "n_registers": 0}, (32, 64)),
    "rotary, gated, no registers": ({**ROTARY, "swiglu": True, "n_registers": 0}, (48, 32)),
    "rotary, gated, no bias, no LayerScale": (
        {**ROTARY, "swiglu": True, "qkv_bias": "none", "layerscale": None},
        (48, 32),
    ),
    "gated": (dict(layerscale=0.3, pos_grid=2, swiglu=True, mlp_ratio=8 / 3), (32, 32)),
    "plain": (dict(pos_grid=2), (32, 32)),
    "standard, resampled, not square": (dict(pos_grid=3, pos_interpolation="bicubic_antialias"), (64, 32)),
    "field": (dict(pos_encoding="field", pos_grid=5), (48, 48)),
    "field, registers, LayerScale, not square": (
        dict(pos_encoding="field", pos_grid=5, n_registers=4, layerscale=0.3),
        (32, 64),
    ),
    "no [CLS]": (dict(has_cls=False, pos_grid=2), (32, 32)),
    "no [CLS], registers": (dict(has_cls=False, pos_grid=2, n_registers=2), (32, 48)),
    "no final norm": (dict(final_norm=False, pos_grid=2), (32, 32)),
    "neither, no positions, tanh": (
        dict(final_norm=False, has_cls=False, pos_encoding="none", gelu="tanh"),
        (32, 48),
    ),
    "no positions, registers": (dict(pos_encoding="none", n_registers=4), (32, 48)),
    "heads of 32 channels": (dict(num_heads=6, pos_grid=2), (32, 32)),
    "patch of 14": (dict(patch_size=14, pos_grid=2, mask_tokens=True), (42, 28)),
}


def backbone(**model_kwargs):
    return sharp(build_backbone(TINY, depth=2, **model_kwargs))


@torch.no_grad()
@pytest.mark.parametrize("model_kwargs, size", CASES.values(), ids=CASES)
def test_timm_gives_our_features(tmp_path, model_kwargs, size):
    vit, folder = backbone(**model_kwargs), tmp_path / "new" / "exported"
    assert export(vit, "timm", size, folder) < 1e-5
    assert [file.name for file in folder.parent.iterdir()] == ["exported"]
    image = torch.randn(2, 3, *size)
    expected = vit(image)
    by_hand = timm.create_model(
        architecture(vit),
        num_classes=0,
        checkpoint_path=str(folder / "model.safetensors"),
        **model_arguments(vit, size),
    )
    for model in (timm.create_model(f"local-dir:{folder}", pretrained=True), by_hand):
        assert model.state_dict().keys() == load_file(folder / "model.safetensors").keys()
        model.eval()
        torch.testing.assert_close(model(image), expected.cls, rtol=0, atol=1e-5)
        tokens = model.forward_features(image)
        torch.testing.assert_close(tokens[:, vit.n_prefix :], expected.patches, rtol=0, atol=1e-5)
        torch.testing.assert_close(
            tokens[:, vit.has_cls : vit.n_prefix], expected.registers, rtol=0, atol=1e-5
        )


@torch.no_grad()
def test_at_another_size_timm_resamples_as_the_card_says(tmp_path):
    vit, image = backbone(pos_grid=2, pos_interpolation="bicubic_antialias"), torch.randn(2, 3, 48, 64)
    export(vit, "timm", (32, 32), tmp_path / "a")
    model = timm.create_model(f"local-dir:{tmp_path / 'a'}", pretrained=True, img_size=(48, 64)).eval()
    torch.testing.assert_close(model(image), vit(image).cls, rtol=0, atol=1e-5)


def test_timm_finds_what_it_needs_beside_the_weights(tmp_path):
    export(backbone(layerscale=0.3, pos_grid=2), "timm", (32, 48), tmp_path / "a")
    model = timm.create_model(f"local-dir:{tmp_path / 'a'}", pretrained=True)
    data = timm.data.resolve_model_data_config(model)
    assert list(data["mean"]) == [0.485, 0.456, 0.406] and list(data["std"]) == [0.229, 0.224, 0.225]
    assert tuple(data["input_size"]) == (3, 32, 48) and data["interpolation"] == "bicubic"
    assert data["crop_mode"] == "squash" and data["crop_pct"] == 1  # the whole image
    assert timm.data.create_transform(**data) is not None
    classifier = timm.create_model(f"local-dir:{tmp_path / 'a'}", pretrained=True, num_classes=5)
    assert classifier(torch.zeros(1, 3, 32, 48)).shape == (1, 5)


def test_a_plain_vit_is_timms_architecture_with_no_more_said_than_its_sizes(tmp_path):
    export(sharp(build_backbone(TINY)), "timm", (224, 224), tmp_path / "a")
    model = timm.create_model(
        "vit_tiny_patch16_224", num_classes=0, checkpoint_path=str(tmp_path / "a" / "model.safetensors")
    )
    assert json.loads((tmp_path / "a" / "config.json").read_text())["architecture"] == "vit_tiny_patch16_224"
    assert torch.equal(model.pos_embed, load_file(tmp_path / "a" / "model.safetensors")["pos_embed"])


@torch.no_grad()
@pytest.mark.parametrize("model_kwargs, size", CASES.values(), ids=CASES)
def test_what_timm_has_comes_back_exactly(tmp_path, model_kwargs, size):
    """With all that no tensor shows; a grid that is not square is none of ours, and is not taken for
    another one."""
    vit, folder, patch = (
        backbone(**model_kwargs),
        tmp_path / "a",
        {"patch_size": model_kwargs.get("patch_size", 16)},
    )
    export(vit, "timm", size, folder)
    if size[0] != size[1] and vit.pos_encoding != "rotary":
        with pytest.raises(
            UserError, match=f"positions for images of {size[0]} x {size[1]} px, not of a square grid"
        ):
            build_backbone(TINY, folder, **patch)
        size = (size[0], size[0])
        export(vit, "timm", size, folder)
    image = torch.randn(2, 3, *size)
    for weights in (folder, folder / "model.safetensors"):
        for output, expected in zip(build_backbone(TINY, weights, **patch).eval()(image), vit(image)):
            assert torch.equal(output, expected)


def test_what_timm_has_no_place_for_is_refused(tmp_path, monkeypatch):
    for model_kwargs, size, message in [
        (dict(ln_eps=1e-5), (32, 32), r"timm has no ViT with ln_eps 1e-05 \(its is 1e-06\)"),
        (
            dict(relative_positions=True, pos_encoding="none"),
            (32, 32),
            "timm has no ViT with relative positions",
        ),
        (dict(), (40, 32), "size: 40 x 32 px are not whole patches of 16 px"),
    ]:
        with pytest.raises(UserError, match=message):
            export(backbone(**model_kwargs), "timm", size, tmp_path / "a")
    monkeypatch.setattr("pretrain.export.fixed_size.importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"format timm needs timm: pip install 'posfield\[export\]'"):
        export(backbone(), "timm", (32, 32), tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_replaces_an_export_and_nothing_else(tmp_path):
    folder = tmp_path / "a"
    export(backbone(), "timm", (32, 32), folder, card=lambda difference: f"card {difference < 1e-5}")
    assert (folder / "README.md").read_text() == "card True"
    export(backbone(), "timm", (64, 32), folder)
    assert json.loads((folder / "config.json").read_text())["model_args"]["img_size"] == [64, 32]
    assert sorted(file.name for file in folder.iterdir()) == ["config.json", "model.safetensors"]
    os.replace(folder, tmp_path / ".replaced-a")  # killed in the middle of a replacement
    (tmp_path / "theirs").mkdir()
    (tmp_path / "a").symlink_to(tmp_path / "theirs")
    export(backbone(), "timm", (32, 32), folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "theirs"] and not folder.is_symlink()
    assert not list((tmp_path / "theirs").iterdir())
    (folder / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="a holds thesis.tex, which no export left: it is not replaced"):
        export(backbone(), "timm", (32, 32), folder)
    with pytest.raises(UserError, match="format timm is a folder, and .*thesis.tex is a file"):
        export(backbone(), "timm", (32, 32), folder / "thesis.tex")
    (folder / "thesis.tex").rename(tmp_path / "theirs" / "thesis.tex")
    save_file(
        load_file(folder / "model.safetensors"), folder / "model.safetensors"
    )  # of the same names, but none of ours
    with pytest.raises(UserError, match="a holds config.json, which no export left"):
        export(backbone(), "timm", (32, 32), folder)
    with pytest.raises(UserError, match=r"output: \. is where you are"):
        export(backbone(), "timm", (32, 32), ".")
    assert (tmp_path / "theirs" / "thesis.tex").exists() and (folder / "config.json").exists()


def test_a_folder_that_differs_is_not_left_behind(tmp_path, monkeypatch):
    wrong = dict(model_arguments(backbone(), (32, 32)), act_layer="relu")
    monkeypatch.setattr("pretrain.export.timm.model_arguments", lambda vit, size: wrong)
    with pytest.raises(RuntimeError, match=r"a: outputs differ by .* of the backbone's"):
        export(backbone(), "timm", (32, 32), tmp_path / "a")
    assert list(tmp_path.iterdir()) == []
