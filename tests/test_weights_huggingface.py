"""Hugging Face's models: features equal the model's own hidden states, at its own size and at others."""

import json
import os

import pytest
import torch
from backbone_fixture import randomize
from public_fixture import NAME, features, images
from safetensors.torch import load_file, save_file

from pretrain.build import build_backbone
from pretrain.errors import UserError
from pretrain.results.provenance import file_hash
from pretrain.views.pixels import MEAN, STD
from pretrain.weights import read_checkpoint

transformers = pytest.importorskip("transformers")
TINY = dict(hidden_size=192, num_hidden_layers=2, num_attention_heads=3, image_size=64)
VIT = dict(TINY, intermediate_size=768)
DINOV2 = dict(TINY, patch_size=14, image_size=70)


def tiny(name, **config):
    cls = getattr(transformers, name)
    model_kwargs = {**(DINOV2 if "Dinov2" in name else VIT), **config}
    return randomize(cls(cls.config_class(**model_kwargs)))


def saved(model, folder, **options):
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(folder, **options)
    return folder


@torch.no_grad()
def theirs(model, x):
    """After the final norm, every token; of a model with a head, its backbone's."""
    base = getattr(model, model.base_model_prefix, model)
    resampled = {} if "Dinov2" in type(model).__name__ else {"interpolate_pos_encoding": True}
    return base(x, **resampled).last_hidden_state


@pytest.mark.parametrize("grid", [None, (3, 7)])
@pytest.mark.parametrize(
    "name, method",
    [
        ("ViTModel", "ViT"),
        ("ViTForImageClassification", "ViT"),
        ("ViTForMaskedImageModeling", "ViT"),
        ("ViTMSNModel", "MSN"),
        ("Dinov2Model", "DINOv2"),
        ("Dinov2ForImageClassification", "DINOv2"),
        ("Dinov2WithRegistersModel", "DINOv2-reg"),
        ("Dinov2WithRegistersForImageClassification", "DINOv2-reg"),
    ],
)
def test_features_equal(tmp_path, name, method, grid):
    model = tiny(name)
    folder = saved(model, tmp_path / "hub")
    x = images(grid or ((5, 5) if "Dinov2" in name else (4, 4)), model.config.patch_size)
    expected = theirs(model, x)
    for path in (folder, folder / "model.safetensors"):
        torch.testing.assert_close(features(path, x), expected, atol=1e-5, rtol=1e-5)
    assert read_checkpoint(folder).provenance == {"source": "huggingface", "method": method}


@pytest.mark.parametrize("name", ["ViTMAEModel", "ViTMAEForPreTraining"])
def test_mae(tmp_path, name):
    """Its model hides patches at random and has them in another order: all are kept here, and put back."""
    model = tiny(name, mask_ratio=0.0, decoder_num_hidden_layers=1)
    x = images((4, 4), 16)
    base = getattr(model, "vit", model)
    with torch.no_grad():
        found = base(x, noise=torch.arange(16.0).expand(2, -1))
    torch.testing.assert_close(
        features(saved(model, tmp_path / "mae"), x), found.last_hidden_state, atol=1e-5, rtol=1e-5
    )
    assert read_checkpoint(tmp_path / "mae").provenance["method"] == "MAE"


def test_a_backbone_and_names_in_memory(tmp_path):
    model = tiny("Dinov2Backbone")
    x = images((5, 5), 14)
    with torch.no_grad():
        expected = model(x).feature_maps[-1].flatten(2).transpose(1, 2)
    torch.testing.assert_close(
        features(saved(model, tmp_path / "hub"), x)[:, 1:], expected, atol=1e-5, rtol=1e-5
    )
    for name in ("ViTForImageClassification", "Dinov2WithRegistersModel"):
        eps = 1e-12 if name.startswith("ViT") else 1e-6
        model = tiny(name, layer_norm_eps=eps)
        torch.save(model.state_dict(), tmp_path / f"{name}.pth")
        x = images((3, 7), model.config.patch_size)
        torch.testing.assert_close(
            features(tmp_path / f"{name}.pth", x), theirs(model, x), atol=1e-5, rtol=1e-5
        )
        assert read_checkpoint(tmp_path / f"{name}.pth").model_kwargs["ln_eps"] == eps


def test_parts_and_pickles(tmp_path):
    model = tiny("ViTModel")
    x = images((4, 4), 16)
    expected = theirs(model, x)
    parts = saved(model, tmp_path / "parts", max_shard_size="1MB")
    assert len(list(parts.glob("model-*.safetensors"))) > 1
    for path in (parts, parts / "model.safetensors.index.json"):
        torch.testing.assert_close(features(path, x), expected, atol=1e-5, rtol=1e-5)
    pickled = saved(model, tmp_path / "pickled")
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    torch.testing.assert_close(features(pickled, x), expected, atol=1e-5, rtol=1e-5)
    assert file_hash(parts) != file_hash(pickled) and file_hash(parts) == file_hash(parts)
    (parts / "README.md").write_text("about it")
    before = file_hash(parts)
    os.utime(parts / "config.json")
    assert file_hash(parts) == before
    (parts / "config.json").write_text("{}")
    assert file_hash(parts) != before


@pytest.mark.parametrize(
    "edit, named",
    [("absent", "no file .*00001"), ("mixed", "is not the part"), ("outside", "names no files")],
)
def test_damaged_parts(tmp_path, edit, named):
    folder = saved(tiny("ViTModel"), tmp_path / "parts", max_shard_size="1MB")
    first, *_, last = sorted(folder.glob("model-*.safetensors"))
    if edit == "absent":
        first.unlink()
    if edit == "mixed":
        first.write_bytes(last.read_bytes())
    if edit == "outside":
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        index["weight_map"]["layernorm.bias"] = "../model.safetensors"
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=named):
        read_checkpoint(folder)


@pytest.mark.parametrize(
    "name, config",
    [
        ("ViTModel", dict(hidden_act="gelu_new")),
        ("ViTModel", dict(hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-3)),
        ("ViTModel", dict(qkv_bias=False, num_attention_heads=6)),
        ("Dinov2Model", dict(layer_norm_eps=1e-2, mlp_ratio=2)),
    ],
)
def test_what_the_config_says(tmp_path, name, config):
    model = tiny(name, **config)
    x = images((4, 4), model.config.patch_size)
    torch.testing.assert_close(
        features(saved(model, tmp_path / "hub"), x), theirs(model, x), atol=1e-5, rtol=1e-5
    )


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize(
    "changes, named",
    [
        (dict(hidden_act="quick_gelu"), "activation 'quick_gelu'"),
        (dict(hidden_act=["gelu"]), "activation"),
        (dict(use_swiglu_ffn=True), "SwiGLU"),
        (dict(model_type="beit"), "type 'beit'"),
        (dict(layer_norm_eps="small"), "ln_eps of 'small'"),
        (dict(num_attention_heads=5), "5 heads"),
        (dict(patch_size=14), "config.json says 14"),
        (dict(hidden_size=384), r"hub has tensors of hidden_size 192, its config\.json says 384: take both"),
        (dict(hidden_size=[192]), r"hidden_size 192, its config\.json says \[192\]"),
        (dict(num_hidden_layers=3), "num_hidden_layers 2, its config.json says 3"),
        (dict(num_hidden_layers="2"), "num_hidden_layers 2, its config.json says '2'"),
        (dict(intermediate_size=10**40), "intermediate_size 768, its config.json says 1000"),
        (dict(num_channels=1), "num_channels 3, its config.json says 1"),
        (dict(image_size=224), "image_size 64, its config.json says 224"),
        (dict(num_register_tokens=4), "num_register_tokens 0, its config.json says 4"),
        (dict(hidden_act="a\nb"), r"activation 'a\\nb'"),
    ],
)
def test_other_networks_are_refused_by_name(tmp_path, changes, named):
    folder = saved(tiny("ViTModel"), tmp_path / "hub")
    edit_config(folder, **changes)
    with pytest.raises(UserError, match=named):
        build_backbone(NAME, weights=folder)


@pytest.mark.parametrize("told", [dict(image_mean=[0.5] * 3, image_std=[0.5] * 3), dict(image_mean=0.5, image_std=0.25),
                                  dict(image_mean=[9, 9, 9], image_std=[9, 9, 9], do_normalize=False)])  # fmt: skip
def test_its_pixels(tmp_path, told):
    model = tiny("ViTModel")
    folder = saved(model, tmp_path / "hub")
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"do_normalize": True, "do_rescale": True, **told})
    )
    pixels = torch.rand(2, 3, 64, 64)
    mean, std = (told["image_mean"], told["image_std"]) if told.get("do_normalize", True) else (0.0, 1.0)
    shown, given = (
        (pixels - torch.tensor(m).view(-1, 1, 1)) / torch.tensor(s).view(-1, 1, 1)
        for m, s in ((mean, std), (MEAN, STD))
    )
    torch.testing.assert_close(features(folder, given), theirs(model, shown), atol=2e-5, rtol=1e-5)
    assert len(read_checkpoint(folder).provenance["pixel_mean_before"]) == 3


@pytest.mark.parametrize(
    "told", [dict(rescale_factor=1 / 127.5), dict(rescale_factor="1/255"), dict(do_rescale=False)]
)
def test_pixels_that_are_not_scaled(tmp_path, told):
    folder = saved(tiny("ViTModel"), tmp_path / "hub")
    (folder / "preprocessor_config.json").write_text(json.dumps(dict(image_mean=0.5, image_std=0.5, **told)))
    with pytest.raises(UserError, match="does not scale pixels"):
        read_checkpoint(folder)


@pytest.mark.parametrize("name", ["Dinov2Model", "Dinov2WithRegistersModel"])
def test_gated_mlps(tmp_path, name):
    """As ViT-g's: on disk one layer with the gate first, in memory two."""
    model = tiny(name, use_swiglu_ffn=True)
    folder, x = saved(model, tmp_path / "giant"), images((3, 7), 14)
    torch.save(model.state_dict(), tmp_path / "a.pth")
    assert "encoder.layer.0.mlp.gate_proj.weight" in model.state_dict()
    for path in (folder, folder / "model.safetensors", tmp_path / "a.pth"):
        torch.testing.assert_close(features(path, x), theirs(model, x), atol=1e-5, rtol=1e-5)
    assert read_checkpoint(folder).model_kwargs["swiglu"]
    edit_config(folder, use_swiglu_ffn=False)
    with pytest.raises(UserError, match="has gated MLPs .SwiGLU., its config.json says use_swiglu_ffn False"):
        read_checkpoint(folder)


KEY = "encoder.layer.1.attention.attention.key.weight"


@pytest.mark.parametrize(
    "edit, named",
    [
        (lambda s: s.pop(KEY), r"no tensor blocks\.1\.attn\.key\.weight"),
        (lambda s: s.update({KEY: torch.zeros(5, 192)}), "of several shapes"),
        (lambda s: s.pop("layernorm.weight"), r"left over norm\.bias"),
        (lambda s: s.pop("encoder.layer.0.output.dense.bias"), r"missing blocks\.0\.mlp\.fc2\.bias"),
        (lambda s: s.update(surprise=torch.zeros(1)), "left over surprise"),
    ],
)
def test_damaged_files_are_refused_by_name(tmp_path, edit, named):
    folder = saved(tiny("ViTModel"), tmp_path / "hub")
    state = load_file(folder / "model.safetensors")
    edit(state)
    save_file(state, folder / "model.safetensors")
    with pytest.raises(UserError, match=named):
        build_backbone(NAME, weights=folder)
