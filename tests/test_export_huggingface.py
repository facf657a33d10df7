"""Folders for Hugging Face: ``AutoModel`` reads them without a tensor missing or left over, and gives our
features."""

import json

import pytest
import torch
from backbone_fixture import sharp

from pretrain.build import build_backbone
from pretrain.errors import UserError
from pretrain.export import export
from pretrain.export.huggingface import huggingface_state

transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed (pip install 'posfield[export]')"
)

TINY = "vit_tiny_patch16"
ROTARY = dict(pos_encoding="rotary", n_registers=4, layerscale=0.3, ln_eps=1e-5, qkv_bias="no_key")
CASES = {
    "rotary": ("DINOv3ViTModel", {**ROTARY, "mask_tokens": True}, (32, 64)),
    "rotary, gated, no bias": ("DINOv3ViTModel", {**ROTARY, "swiglu": True, "qkv_bias": "none"}, (48, 32)),
    "rotary, bias of keys, no LayerScale": (
        "DINOv3ViTModel",
        {**ROTARY, "qkv_bias": "all", "layerscale": None, "gelu": "tanh"},
        (32, 48),
    ),
    "gated": ("Dinov2Model", dict(layerscale=0.3, pos_grid=2, swiglu=True, mlp_ratio=8 / 3), (32, 32)),
    "gated, registers, no bias": (
        "Dinov2WithRegistersModel",
        dict(n_registers=4, pos_grid=2, swiglu=True, mlp_ratio=8 / 3, qkv_bias="none"),
        (32, 32),
    ),
    "no bias of keys": ("ViTModel", dict(pos_grid=2, qkv_bias="no_key"), (32, 32)),
    "plain": ("ViTModel", dict(pos_grid=2), (32, 32)),
    "field, not square": ("ViTModel", dict(pos_encoding="field", pos_grid=5), (32, 64)),
    "tanh, no positions, own eps and MLP": (
        "ViTModel",
        dict(gelu="tanh", pos_encoding="none", ln_eps=1e-5, mlp_ratio=2.5),
        (32, 48),
    ),
    "patch of 14, resampled": ("ViTModel", dict(patch_size=14, pos_grid=4, mask_tokens=True), (28, 42)),
    "LayerScale": ("Dinov2Model", dict(layerscale=0.3, pos_grid=2, mask_tokens=True), (32, 32)),
    "LayerScale, field, tanh": (
        "Dinov2Model",
        dict(layerscale=0.3, pos_encoding="field", gelu="tanh", ln_eps=1e-5),
        (48, 48),
    ),
    "registers": ("Dinov2WithRegistersModel", dict(n_registers=4, pos_grid=2), (32, 32)),
    "registers, LayerScale, field": (
        "Dinov2WithRegistersModel",
        dict(n_registers=3, layerscale=0.3, pos_encoding="field"),
        (48, 48),
    ),
}


def backbone(**model_kwargs):
    return sharp(build_backbone(TINY, depth=2, **model_kwargs))


@torch.no_grad()
@pytest.mark.parametrize("name, model_kwargs, size", CASES.values(), ids=CASES)
def test_transformers_gives_our_features(tmp_path, name, model_kwargs, size):
    vit, folder = backbone(**model_kwargs), tmp_path / "exported"
    assert export(vit, "huggingface", size, folder) < 1e-5
    model, found = transformers.AutoModel.from_pretrained(folder, output_loading_info=True)
    assert type(model).__name__ == name and not any(found.values())
    image = torch.randn(2, 3, *size)
    outputs, expected = model.eval()(pixel_values=image), vit(image)
    tokens = outputs.last_hidden_state
    torch.testing.assert_close(tokens[:, 0], expected.cls, rtol=0, atol=1e-5)
    torch.testing.assert_close(tokens[:, vit.n_prefix :], expected.patches, rtol=0, atol=1e-5)
    torch.testing.assert_close(tokens[:, 1 : vit.n_prefix], expected.registers, rtol=0, atol=1e-5)
    assert torch.equal(
        outputs.pooler_output, tokens[:, 0]
    )  # no weights of chance, in ViTModel's pooler either


@torch.no_grad()
@pytest.mark.parametrize(
    "model_kwargs, asked",
    [
        (dict(pos_interpolation="bicubic"), dict(interpolate_pos_encoding=True)),
        (dict(pos_interpolation="bicubic", layerscale=0.3), {}),
        (dict(pos_interpolation="bicubic_antialias", n_registers=4), {}),
    ],
    ids=["ViT", "DINOv2", "DINOv2-reg"],
)
def test_at_another_size_transformers_resamples_as_a_vit_of_that_rule(tmp_path, model_kwargs, asked):
    vit, image = backbone(pos_grid=2, **model_kwargs), torch.randn(2, 3, 48, 64)
    export(vit, "huggingface", (32, 32), tmp_path / "a")
    model = transformers.AutoModel.from_pretrained(tmp_path / "a").eval()
    torch.testing.assert_close(
        model(pixel_values=image, **asked).pooler_output, vit(image).cls, rtol=0, atol=1e-5
    )


@pytest.mark.parametrize(
    "model_kwargs", [dict(), dict(layerscale=0.3), dict(n_registers=4)], ids=["ViT", "DINOv2", "DINOv2-reg"]
)
def test_the_names_on_disk_are_transformers_own(tmp_path, model_kwargs):
    """Whatever it calls its modules now, ``save_pretrained`` leaves the names that every version reads."""
    export(backbone(**model_kwargs), "huggingface", (32, 32), tmp_path / "a")
    transformers.AutoModel.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    from safetensors.torch import load_file

    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("a", "b"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())


def test_the_processor_normalizes_as_our_training(tmp_path):
    export(backbone(), "huggingface", (32, 48), tmp_path / "a")
    told = json.loads((tmp_path / "a" / "preprocessor_config.json").read_text())
    assert told["image_mean"] == [0.485, 0.456, 0.406] and told["image_std"] == [0.229, 0.224, 0.225]
    assert told["size"] == {"height": 32, "width": 48} and told["resample"] == 3
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "a")
    picture = torch.full((3, 50, 60), 255, dtype=torch.uint8)
    pixels = processor(picture, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 32, 48)
    white = (1 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(pixels[0, :, 0, 0], white, rtol=0, atol=1e-5)


def test_what_transformers_has_no_place_for_is_refused(tmp_path, monkeypatch):
    for model_kwargs, size, message in [
        (dict(has_cls=False), (32, 32), r"transformers has no ViT without \[CLS\]"),
        (dict(final_norm=False), (32, 32), "transformers has no ViT without a final norm"),
        (
            dict(has_cls=False, final_norm=False),
            (32, 32),
            r"without \[CLS\], nor one without a final norm; take another --format",
        ),
        (
            dict(relative_positions=True, pos_encoding="none"),
            (32, 32),
            "transformers has no ViT with relative positions",
        ),
        (
            dict(layerscale=0.3),
            (32, 48),
            "32 x 48 px: the grid of positions of transformers' Dinov2Model is square",
        ),
        (
            dict(n_registers=4, mlp_ratio=2.5),
            (32, 32),
            r"transformers \(Dinov2WithRegistersModel\) has no ViT with mlp_ratio 2.5",
        ),
        (dict(), (40, 40), "40 x 40 px are not whole patches of 16 px"),
    ]:
        with pytest.raises(UserError, match=message):
            export(backbone(**model_kwargs), "huggingface", size, tmp_path / "a")
    monkeypatch.setattr("pretrain.export.fixed_size.importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"format huggingface needs transformers: pip install 'posfield\[export\]'"
    ):
        export(backbone(), "huggingface", (32, 32), tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_a_tensor_too_few_is_found_before_the_folder_stays(tmp_path, monkeypatch):
    def without_one(vit, size):
        state = huggingface_state(vit, size)
        del state["encoder.layer.1.layernorm_before.bias"]
        return state

    monkeypatch.setattr("pretrain.export.huggingface.huggingface_state", without_one)
    with pytest.raises(
        RuntimeError, match="transformers reads it with .*missing_keys.*layers.1.layernorm_before.bias"
    ):
        export(backbone(), "huggingface", (32, 32), tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


@torch.no_grad()
@pytest.mark.parametrize(
    "model_kwargs", [dict(), dict(layerscale=0.3), dict(n_registers=4)], ids=["ViT", "DINOv2", "DINOv2-reg"]
)
def test_what_transformers_has_comes_back_exactly(tmp_path, model_kwargs):
    vit = backbone(pos_encoding="field", **model_kwargs)
    export(vit, "huggingface", (32, 32), tmp_path / "a")
    again = build_backbone(TINY, tmp_path / "a" / "model.safetensors").eval()
    image = torch.randn(2, 3, 32, 32)
    for output, expected in zip(again(image), vit(image)):
        assert torch.equal(output, expected)
