"""State dicts for torchvision, and plain tensors: both fixed to one grid of positions."""

import json

import pytest
import torch
from backbone_fixture import randomize
from safetensors import safe_open
from safetensors.torch import load_file
from torchvision.models import VisionTransformer

from pretrain.build import build_backbone
from pretrain.errors import UserError
from pretrain.export import export
from pretrain.weights import read_checkpoint

TINY = "vit_tiny_patch16"
OF_TORCHVISION = {
    "plain": (dict(pos_grid=2), 32),
    "field": (dict(pos_encoding="field", pos_grid=5), 48),
    "LayerScale, resampled": (dict(layerscale=0.3, pos_grid=2, pos_interpolation="bicubic"), 64),
    "no positions, patch of 14, own MLP": (
        dict(pos_encoding="none", patch_size=14, mlp_ratio=2.5, mask_tokens=True),
        28,
    ),
}
PLAIN = {
    "all": (dict(pos_encoding="field", n_registers=4, layerscale=0.3, mask_tokens=True), (32, 32)),
    "resampled": (dict(pos_grid=4, pos_interpolation="bicubic_antialias"), (48, 48)),
    "every departure": (
        dict(has_cls=False, final_norm=False, gelu="tanh", ln_eps=1e-5, pos_encoding="field"),
        (48, 48),
    ),
    "no positions": (dict(pos_encoding="none"), (48, 32)),
    "rotary": (
        dict(pos_encoding="rotary", qkv_bias="no_key", n_registers=4, cls_norm=True),
        (48, 32),
    ),
    "rotary, no bias": (dict(pos_encoding="rotary", qkv_bias="none", layerscale=0.3), (48, 32)),
    "relative positions": (dict(pos_encoding="none", relative_positions=True), (48, 32)),
}


def backbone(**model_kwargs):
    return randomize(build_backbone(TINY, depth=2, **model_kwargs))


@torch.no_grad()
@pytest.mark.parametrize("model_kwargs, side", OF_TORCHVISION.values(), ids=OF_TORCHVISION)
def test_torchvision_gives_our_features(tmp_path, model_kwargs, side):
    vit, path = backbone(**model_kwargs), tmp_path / "exported.safetensors"
    assert export(vit, "torchvision", (side, side), path) < 1e-5
    with safe_open(path, framework="pt") as file:
        model = VisionTransformer(**json.loads(file.metadata()["arguments"]))
    model.heads = torch.nn.Identity()
    found = model.load_state_dict(load_file(path))
    assert not found.missing_keys and not found.unexpected_keys
    image = torch.randn(2, 3, side, side)
    expected = vit(image)
    torch.testing.assert_close(model.eval()(image), expected.cls, rtol=0, atol=1e-5)
    tokens = torch.cat([model.class_token.expand(2, -1, -1), model._process_input(image)], dim=1)
    torch.testing.assert_close(model.encoder(tokens)[:, 1:], expected.patches, rtol=0, atol=1e-5)


def test_the_fold_of_layerscale_is_its_closed_form(tmp_path):
    vit = backbone(layerscale=0.3)
    export(vit, "torchvision", (32, 32), tmp_path / "a.safetensors")
    state, block = load_file(tmp_path / "a.safetensors"), vit.blocks[1]
    layer = "encoder.layers.encoder_layer_1"
    for name, linear, scale in (
        ("self_attention.out_proj", block.attn.proj, block.ls1),
        ("mlp.3", block.mlp.fc2, block.ls2),
    ):
        assert torch.equal(state[f"{layer}.{name}.weight"], torch.diag(scale.gamma) @ linear.weight)
        assert torch.equal(state[f"{layer}.{name}.bias"], scale.gamma * linear.bias)
    assert not any("gamma" in key for key in state)
    assert torch.equal(
        vit.blocks[1].attn.proj.weight, backbone(layerscale=0.3).blocks[1].attn.proj.weight
    )  # the network's stay


def test_what_torchvision_has_no_place_for_is_refused(tmp_path):
    for model_kwargs, size, message in [
        (dict(pos_encoding="rotary"), (32, 32), "torchvision has no ViT with rotary positions"),
        (dict(swiglu=True), (32, 32), "torchvision has no ViT with gated MLPs"),
        (dict(cls_norm=True), (32, 32), r"torchvision has no ViT with an own norm for \[CLS\]"),
        (dict(n_registers=4), (32, 32), r"torchvision has no ViT with registers \(this one has 4\)"),
        (dict(has_cls=False), (32, 32), r"torchvision has no ViT without \[CLS\]"),
        (dict(final_norm=False), (32, 32), "torchvision has no ViT without a final norm"),
        (dict(gelu="tanh"), (32, 32), "torchvision has no ViT with the tanh GELU"),
        (dict(ln_eps=1e-5), (32, 32), r"torchvision has no ViT with ln_eps 1e-05 \(its is 1e-06\)"),
        (
            dict(relative_positions=True, pos_encoding="none"),
            (32, 32),
            "torchvision has no ViT with relative positions",
        ),
        (dict(), (32, 48), "32 x 48 px: images of torchvision's VisionTransformer are square"),
        (dict(), (40, 40), "40 x 40 px are not whole patches of 16 px"),
    ]:
        with pytest.raises(UserError, match=message):
            export(backbone(**model_kwargs), "torchvision", size, tmp_path / "a.safetensors")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "b.safetensors").mkdir()
    with pytest.raises(UserError, match="format torchvision is a file, and .*b.safetensors is a folder"):
        export(backbone(), "torchvision", (32, 32), tmp_path / "b.safetensors")


@torch.no_grad()
@pytest.mark.parametrize("model_kwargs, size", PLAIN.values(), ids=PLAIN)
def test_plain_tensors_come_back_exactly(tmp_path, model_kwargs, size):
    vit, path = backbone(**model_kwargs), tmp_path / "exported.safetensors"
    export(vit, "safetensors", size, path, {"method": "ours", "effective_epochs": 12})
    keys = load_file(path).keys()
    assert not {"pos_field", "cls_pos", "mask_token", "pos_mask_token"} & keys
    assert ("pos_embed" in keys) == (vit.pos_encoding not in ("none", "rotary"))
    again, image = build_backbone(TINY, path).eval(), torch.randn(2, 3, *size)
    for output, expected in zip(again(image), vit(image)):
        assert torch.equal(output, expected)
    assert again.model_kwargs == {**vit.model_kwargs, "mask_tokens": False} | {
        key: again.model_kwargs[key] for key in ("pos_encoding", "pos_grid", "pos_interpolation")
    }
    told = read_checkpoint(path).provenance
    assert told["method"] == "ours" and told["effective_epochs"] == 12


def test_plain_tensors_are_of_a_square_grid(tmp_path):
    """As every ViT's: 1 + 2 x 4 positions would be taken for 3 x 3."""
    with pytest.raises(
        UserError, match="size: 32 x 64 px: a ViT learns a square grid; give one side, or take --format timm"
    ):
        export(backbone(pos_encoding="field"), "safetensors", (32, 64), tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="names the network by its width, and 128 is none of the registry's"):
        export(backbone(embed_dim=128, num_heads=2), "safetensors", (32, 32), tmp_path / "a.safetensors")
    assert list(tmp_path.iterdir()) == []
