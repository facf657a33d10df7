"""Rotary positions and the other parts of DINOv3's network, against transformers' and timm's on the same weights, and in
every form in which a network runs: packed, checkpointed, compiled, windowed, tied to crops."""

import argparse
import math

import pytest
import timm
import torch
from backbone_fixture import randomize, sharp
from photos import TINY, last, write_photos
from safetensors.torch import load_file
from transformers import DINOv3ViTConfig, DINOv3ViTModel

from det_plugin.features import FeatureOptions, detection_features
from pretrain.analysis.attention import last_layer
from pretrain.backbones.attention import Attention, without_special
from pretrain.backbones.block import run_block
from pretrain.backbones.position import sample_field
from pretrain.backbones.rotary import Rotation, behind_special, frequencies, rotate, rotation
from pretrain.backbones.vit import SIZES, ViewGroup, ViT
from pretrain.build import build_backbone
from pretrain.cli.train_ssl import settings_of
from pretrain.config import load_config
from pretrain.data.loader import build_dataset, build_loader
from pretrain.errors import UserError
from pretrain.methods.intertwined import Intertwined
from pretrain.train import run_protocol, train
from pretrain.weights import save_backbone

DINOV3 = dict(pos_encoding="rotary", n_registers=4, layerscale=1e-2, ln_eps=1e-5, qkv_bias="no_key")
SMALL = dict(embed_dim=48, depth=3, num_heads=3, patch_size=16)
NAME = "vit_tiny_patch16"
WHOLE = torch.tensor([[0.0, 0.0, 1.0, 1.0]])


def small(seed=0, **changes):
    torch.manual_seed(seed)
    return sharp(ViT(**{**SMALL, **DINOV3, "mask_tokens": True, **changes}))


def crops(n=2, px=64, seed=1):
    generator = torch.Generator().manual_seed(seed)
    low = torch.rand(n, 2, generator=generator) * 0.5
    return (
        torch.randn(n, 3, px, px, generator=generator),
        torch.cat([low, low + 0.1 + 0.4 * torch.rand(n, 2, generator=generator)], 1),
        torch.arange(n) % 2 == 0,
    )


def as_transformers(vit):
    """The same network in transformers."""
    own = vit.model_kwargs
    config = DINOv3ViTConfig(
        hidden_size=vit.embed_dim,
        intermediate_size=round(vit.embed_dim * own["mlp_ratio"]),
        num_hidden_layers=own["depth"],
        num_attention_heads=own["num_heads"],
        num_register_tokens=vit.n_registers,
        layer_norm_eps=own["ln_eps"],
        use_gated_mlp=own.get("swiglu", False),
        hidden_act="silu" if own.get("swiglu") else "gelu",
        query_bias=own["qkv_bias"] != "none",
        value_bias=own["qkv_bias"] != "none",
        key_bias=False,
        layerscale_value=1.0,
    )
    model, state, theirs = DINOv3ViTModel(config).eval(), vit.state_dict(), {}
    outside = {
        "embeddings.cls_token": "cls_token",
        "embeddings.register_tokens": "reg_token",
        "embeddings.patch_embeddings.weight": "patch_embed.proj.weight",
        "embeddings.patch_embeddings.bias": "patch_embed.proj.bias",
        "norm.weight": "norm.weight",
        "norm.bias": "norm.bias",
    }
    theirs = {key: state[own] for key, own in outside.items()}
    theirs["embeddings.mask_token"] = state["mask_token"].unsqueeze(0)
    for i in range(own["depth"]):
        here, there = f"blocks.{i}.", f"model.layer.{i}."
        for kind in ("weight", "bias"):
            for name in ("norm1", "norm2"):
                theirs[f"{there}{name}.{kind}"] = state[f"{here}{name}.{kind}"]
            theirs[f"{there}attention.o_proj.{kind}"] = state[f"{here}attn.proj.{kind}"]
            if f"{here}attn.qkv.{kind}" in state:
                parts = state[f"{here}attn.qkv.{kind}"].chunk(3)
                for letter, part in zip("qkv", parts):
                    if kind == "weight" or letter != "k":
                        theirs[f"{there}attention.{letter}_proj.{kind}"] = part
            if own.get("swiglu"):
                gate, up = state[f"{here}mlp.fc1.{kind}"].chunk(2)
                theirs |= {f"{there}mlp.gate_proj.{kind}": gate, f"{there}mlp.up_proj.{kind}": up}
            else:
                theirs[f"{there}mlp.up_proj.{kind}"] = state[f"{here}mlp.fc1.{kind}"]
            theirs[f"{there}mlp.down_proj.{kind}"] = state[f"{here}mlp.fc2.{kind}"]
        for k in (1, 2):
            theirs[f"{there}layer_scale{k}.lambda1"] = state[f"{here}ls{k}.gamma"]
    model.load_state_dict(theirs)
    return model


@pytest.mark.parametrize("size", SIZES)
def test_every_size_equals_transformers(size):
    """At full width and one block; the 7B, whose block alone is a gigabyte, with an eighth of the hidden width."""
    changes = dict(depth=1, **({"mlp_ratio": 0.25} if size == "7b" else {}))
    bias = {"qkv_bias": "none" if size == "7b" else "no_key"}
    torch.manual_seed(0)
    vit = sharp(build_backbone(f"vit_{size}_patch16", **{**DINOV3, **bias, **changes, "mask_tokens": True}))
    x = torch.randn(1, 3, 48, 80)
    with torch.no_grad():
        theirs = as_transformers(vit)(x).last_hidden_state
        ours = vit(x)
    torch.testing.assert_close(ours.cls, theirs[:, 0], rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.registers, theirs[:, 1:5], rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.patches, theirs[:, 5:], rtol=0, atol=1e-5)


@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize("size", [(224, 224), (64, 160), (1024, 1024)])
def test_images_of_any_size_equal_transformers(size, swiglu):
    vit = small(swiglu=swiglu, depth=2)
    x = torch.randn(1, 3, *size)
    with torch.no_grad():
        theirs = as_transformers(vit)(x).last_hidden_state
        torch.testing.assert_close(vit(x).patches, theirs[:, 5:], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name, swiglu", [("small", False), ("small_plus", True)])
def test_features_equal_timm(name, swiglu):
    torch.manual_seed(0)
    made = timm.create_model(f"vit_{name}_patch16_dinov3", num_classes=0, depth=2).eval()
    vit = sharp(build_backbone(f"vit_{name}_patch16", **{**DINOV3, "depth": 2, "qkv_bias": "none"}))
    state, theirs = vit.state_dict(), {}
    for key, value in state.items():
        key = key.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2")
        if swiglu and ".fc1." in key:
            gate, up = value.chunk(2)
            theirs |= {key.replace("fc1", "fc1_g"): gate, key.replace("fc1", "fc1_x"): up}
        else:
            theirs[key] = value
    assert not made.load_state_dict(theirs, strict=False).unexpected_keys
    x = torch.randn(2, 3, 96, 64)
    with torch.no_grad():
        found, ours = made.forward_features(x), vit(x)
    torch.testing.assert_close(ours.patches, found[:, 5:], rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.cls, found[:, 0], rtol=0, atol=1e-5)


# --- places


def test_places_are_those_of_the_field():
    """A field that holds x and y themselves is read where the patches stand."""
    _, boxes, flips = crops(5)
    grid, side = (3, 4), torch.linspace(0, 1, 50)
    field = torch.stack(torch.meshgrid(side, side, indexing="ij")[::-1])[None]  # x, y
    expected = 2 * math.pi * (2 * sample_field(field, boxes, grid, flips) - 1)  # [V, N, 2]
    angles = rotation(boxes, grid, 16, flips)
    scale = frequencies(16)
    assert scale.tolist() == pytest.approx([1, 100**-0.25, 100**-0.5, 100**-0.75])
    for function, found in ((torch.cos, angles.cos), (torch.sin, angles.sin)):
        of_y, of_x = found[..., :4], found[..., 4:]
        torch.testing.assert_close(of_x, function(expected[..., :1] * scale), rtol=0, atol=1e-5)
        torch.testing.assert_close(of_y, function(expected[..., 1:] * scale), rtol=0, atol=1e-5)


def test_the_box_of_the_whole_image_is_inference():
    vit, (x, _, _) = small(), crops()
    with torch.no_grad():
        inside = vit(x, WHOLE.expand(2, -1), torch.zeros(2, dtype=torch.bool))
        assert torch.equal(inside.patches, vit(x).patches)
        mirrored = vit(x, WHOLE.expand(2, -1), torch.ones(2, dtype=torch.bool))
    assert not torch.allclose(mirrored.patches, inside.patches, atol=1e-3)


def test_special_tokens_are_not_turned():
    angles = behind_special(rotation(WHOLE, (2, 3), 8), 5)
    assert torch.equal(angles.cos[:, :5], torch.ones(1, 5, 4)) and torch.equal(
        angles.sin[:, :5], torch.zeros(1, 5, 4)
    )
    x = torch.randn(1, 11, 2, 8)
    turned = rotate(x, angles)
    assert torch.equal(turned[:, :5], x[:, :5]) and not torch.allclose(turned[:, 5:], x[:, 5:])
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))


def test_products_depend_on_distances_alone():
    q, k = torch.randn(2, 1, 1, 16, dtype=torch.float64)
    boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0], [-0.3, 0.2, 0.7, 1.2]], dtype=torch.float64)
    products = []
    for box in boxes:
        angles = rotation(box[None], (4, 4), 16)
        turned = [rotate(t.expand(1, 16, 16), angles)[0] for t in (q, k)]
        products.append(turned[0] @ turned[1].T)
    torch.testing.assert_close(*products)


def test_a_patch_without_a_position_has_no_box():
    """Its angle is 0, and its input the content and the mask token: nothing of it says where it is."""
    vit, (x, boxes, flips) = small(), crops()
    every = torch.ones(2, 16, dtype=torch.bool)
    with torch.no_grad():
        hidden = [
            vit(x, b, f, position_mask=every).patches for b, f in ((boxes, flips), (boxes * 0.7, ~flips))
        ]
        shown = vit(x, boxes, flips).patches
    assert torch.equal(*hidden) and not torch.allclose(hidden[0], shown, atol=1e-3)
    some = torch.zeros(2, 16, dtype=torch.bool)
    some[:, 3] = True
    angles = vit.geometry((4, 4), boxes, flips, some)
    assert torch.equal(angles.cos[:, 5 + 3], torch.ones(2, 8)) and torch.equal(
        angles.sin[:, 5 + 3], torch.zeros(2, 8)
    )
    whole = vit.geometry((4, 4), boxes, flips)
    assert all(torch.equal(a[:, 5 + 4 :], b[:, 5 + 4 :]) for a, b in zip(angles, whole))
    embedded, _ = vit.embed(x, boxes, flips, position_mask=some)
    plain, _ = vit.embed(x)
    torch.testing.assert_close(embedded[:, 5 + 3], plain[:, 5 + 3] + vit.pos_mask_token)
    assert torch.equal(embedded[:, 5 + 4 :], plain[:, 5 + 4 :])


def test_training_rescales_places_once_a_pass():
    vit, (x, _, _) = small(), crops()
    vit.rescale = 2.0
    assert vit.draw_rescale() == 1.0 and small().train().draw_rescale() == 1.0
    vit.train()
    drawn = torch.stack([vit.draw_rescale() for _ in range(2000)]).log() / math.log(2)
    assert drawn.min() > -1 and drawn.max() < 1 and abs(drawn.mean()) < 0.05
    assert drawn.std() == pytest.approx(3**-0.5, abs=0.03)
    torch.manual_seed(3)
    factor = vit.draw_rescale()
    larger = rotation(0.5 + (WHOLE - 0.5) * factor, (4, 4), 16)
    torch.testing.assert_close(vit.geometry((4, 4), rescale=factor).cos, behind_special(larger, 5).cos)
    groups = [ViewGroup(x), ViewGroup(x[..., :32, :32])]
    torch.manual_seed(3)
    for group, tokens in zip(groups, vit.forward_views(groups)):
        torch.manual_seed(3)
        torch.testing.assert_close(vit(group.x).patches, tokens.patches, rtol=0, atol=1e-5)


# --- forms


def test_visible_patches_keep_their_places():
    vit, (x, boxes, flips) = small(), crops()
    order = torch.stack([torch.randperm(16) for _ in range(2)])
    with torch.no_grad():
        found = vit(x, boxes, flips, visible=order).patches
        whole = vit(x, boxes, flips).patches
    torch.testing.assert_close(
        found, whole.gather(1, order.unsqueeze(-1).expand(-1, -1, 48)), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("rule", ["none", "full", "selective"])
def test_packed_views_equal_single_ones_in_value_and_gradient(rule):
    vit = small(swiglu=True).train()
    (x, boxes, flips), (y, inner, mirrored) = crops(2, 64), crops(3, 32, seed=4)
    mask = torch.arange(16).expand(2, -1) % 5 == 0
    groups = [ViewGroup(x, boxes, flips, position_mask=mask), ViewGroup(y, inner, mirrored)]

    def gradients(tokens):
        vit.zero_grad()
        sum((t.patches.square().sum() + t.cls.sum()) for t in tokens).backward()
        return {name: p.grad for name, p in vit.named_parameters() if p.grad is not None}

    single = [vit(x, boxes, flips, position_mask=mask), vit(y, inner, mirrored)]
    vit.checkpointing = rule
    packed = vit.forward_views(groups)
    for a, b in zip(single, packed):
        torch.testing.assert_close(a.patches, b.patches, rtol=0, atol=1e-5)
    expected, found = gradients(single), gradients(packed)
    assert expected.keys() == found.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-4)


def test_compiled_blocks_equal_plain_ones():
    vit, (x, boxes, flips) = small(), crops()
    tokens, grid = vit.embed(x, boxes, flips)
    block, geometry = vit.blocks[0], vit.geometry(grid, boxes, flips)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(tokens, geometry=geometry), block(tokens, geometry=geometry))
        packed = tokens.flatten(0, 1), [(2, tokens.shape[1])], None, "none", [geometry]
        torch.testing.assert_close(
            run_block(block, *packed).unflatten(0, (2, -1)), block(tokens, geometry=geometry)
        )


def test_windows_keep_the_angles_of_the_image():
    """Each window alone equals attention among its tokens, as they are turned in the image."""
    from det_plugin.windows import Windows, windowed_attention

    vit = small()
    attention, grid, size = vit.blocks[0].attn, (4, 6), 2
    angles = vit.geometry(grid)
    x = torch.randn(2, 5 + 24, 48)
    with torch.no_grad():
        found = windowed_attention(attention, x, Windows(grid, size), angles)
        q, k, v = attention.heads(x, angles)
        rows, columns = (t.flatten() for t in torch.meshgrid(torch.arange(4), torch.arange(6), indexing="ij"))
        window = (rows // size) * 3 + columns // size
        sees = torch.ones(29, 29, dtype=torch.bool)
        sees[5:, 5:] = window[:, None] == window
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=sees)
        expected = attention.proj(expected.transpose(1, 2).flatten(2))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_detection_features_are_the_feature_map():
    vit, (x, _, _) = small(), crops(1, 80)
    plain = FeatureOptions()
    with torch.no_grad():
        torch.testing.assert_close(detection_features(vit, x, plain), vit.feature_map(x))
        bare = FeatureOptions(keep_special_tokens=False)
        tokens, grid = vit.embed(x)
        tokens = tokens[:, 5:]
        for block in vit.blocks:
            tokens = block(tokens, geometry=without_special(vit.geometry(grid), 5))
        expected = vit.norm(tokens).transpose(1, 2).unflatten(2, grid)
        torch.testing.assert_close(detection_features(vit, x, bare), expected)


def test_attention_maps_are_what_attention_does():
    vit, (x, boxes, flips) = small(), crops()
    tokens, grid = vit.embed(x, boxes, flips)
    angles, attention = vit.geometry(grid, boxes, flips), vit.blocks[0].attn
    with torch.no_grad():
        maps = attention.attention_map(tokens, geometry=angles)
        values = attention.heads(tokens)[2]
        expected = attention.proj((maps @ values).transpose(1, 2).flatten(2))
        torch.testing.assert_close(attention(tokens, geometry=angles), expected, rtol=0, atol=1e-5)
        features = last_layer(vit, x, boxes, flips).features
    torch.testing.assert_close(features, vit(x, boxes, flips).patches, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_turned_in_float32(dtype):
    x, angles = torch.randn(2, 7, 3, 16), rotation(WHOLE, (1, 7), 16)
    found = rotate(x.to(dtype), angles)
    assert found.dtype == dtype
    assert torch.equal(found, rotate(x.to(dtype).float(), angles).to(dtype))


# --- other parts


@pytest.mark.parametrize("bias, n", [("all", 48), ("no_key", 32), ("none", 0)])
def test_the_keys_bias_is_not_added(bias, n):
    torch.manual_seed(0)
    attention = randomize(Attention(16, 2, qkv_bias=bias))
    x = torch.randn(1, 3, 16)
    attention(x).sum().backward()
    added = attention.qkv(torch.zeros(1, 16))[0]
    assert int((added != 0).sum()) == n
    if bias == "no_key":
        assert torch.equal(added[16:32], torch.zeros(16))
        assert torch.equal(attention.qkv.bias.grad[16:32], torch.zeros(16))
        assert "qkv.bias_mask" not in attention.state_dict()


def test_own_norms_of_special_tokens():
    vit, (x, _, _) = small(cls_norm=True, local_cls_norm=True), crops()
    with torch.no_grad():
        tokens, grid = vit.embed(x)
        for block in vit.blocks:
            tokens = block(tokens, geometry=vit.geometry(grid))
        found, local = vit(x), vit(x, is_local=True)
        torch.testing.assert_close(found.cls, vit.cls_norm(tokens[:, 0]))
        torch.testing.assert_close(found.registers, vit.cls_norm(tokens[:, 1:5]))
        torch.testing.assert_close(found.patches, vit.norm(tokens[:, 5:]))
        assert torch.equal(local.cls, found.cls)  # only in training
        vit.train()
        local = vit(x, is_local=True)
        torch.testing.assert_close(local.cls, vit.local_cls_norm(tokens[:, 0]))
        first, second = vit.forward_views([ViewGroup(x), ViewGroup(x, is_local=True)])
    torch.testing.assert_close(first.cls, found.cls, rtol=0, atol=1e-5)
    torch.testing.assert_close(second.cls, local.cls, rtol=0, atol=1e-5)
    assert vit.model_kwargs["cls_norm"] and vit.model_kwargs["local_cls_norm"]


def test_new_words_are_silent_in_networks_of_before():
    assert not {"qkv_bias", "swiglu", "cls_norm", "local_cls_norm"} & ViT(**SMALL).model_kwargs.keys()
    vit = small(swiglu=True)
    again = ViT(**vit.model_kwargs)
    assert again.state_dict().keys() == vit.state_dict().keys() and again.model_kwargs == vit.model_kwargs


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(qkv_bias="some"), "qkv_bias: 'some' is none of"),
        (dict(num_heads=8), "heads whose width is a multiple of 4"),
        (dict(relative_positions=True), "no relative positions"),
        (dict(has_cls=False, cls_norm=True), "there is no .CLS., or no final norm"),
        (dict(pos_grid=14), "pos_encoding 'rotary' has neither"),
    ],
)
def test_what_excludes_each_other_is_told(changes, message):
    with pytest.raises(ValueError, match=message):
        small(**changes)


def test_a_network_without_a_position_has_the_same_sequence():
    angles = Rotation(torch.ones(1, 4, 2), torch.zeros(1, 4, 2))
    x = torch.randn(3, 4, 2, 4)
    assert torch.equal(rotate(x, angles), x)


# --- pre-training


def config(tmp_path, *words, folder="run"):
    base = [*TRAINED, f"data.root={tmp_path / 'photos'}", f"run.output={tmp_path / folder}"]
    return load_config("rotary-100ep", last([*TINY, *base, *words]))


TRAINED = ["backbone.layer_scale_init=0", "backbone.drop_path=0"]
UNTIED = ["positions.tied=false", "positions.augment=false"]


def test_a_method_without_a_table_of_positions(tmp_path):
    method = Intertwined(config(tmp_path))
    for network in (method.student, method.teacher):
        vit = network["backbone"]
        assert vit.pos_encoding == "rotary" and vit.rescale == 1.0
        assert not any(name.startswith("pos_") and name != "pos_mask_token" for name in vit.state_dict())
    assert method.backbone.pos_mask_token.requires_grad
    untied = Intertwined(config(tmp_path, *UNTIED, "positions.rescale=3"))
    assert (untied.student["backbone"].rescale, untied.teacher["backbone"].rescale) == (3.0, 1.0)


def test_views_of_untied_crops_span_the_image(tmp_path):
    write_photos(tmp_path / "photos")
    for words, tied in (([], True), (UNTIED, False)):
        settings = config(tmp_path, *words)
        assert settings.view_settings().tied == tied and settings.positions.is_augmented == tied
        ((batch,), *_) = [[b for b, _ in build_loader(settings, build_dataset(settings), 0, 1)]]
        boxes, flips = batch.views.globals
        assert torch.equal(boxes, WHOLE.expand(len(boxes), -1)) != tied
        assert tied or not flips.any()
    with pytest.warns(
        UserWarning, match="positions.augment has no effect with positions.encoding=rotary, tied=false"
    ):
        config(tmp_path, "positions.tied=false")
    with pytest.warns(UserWarning, match="positions.tied has no effect with positions.encoding=field"):
        config(tmp_path, "positions.encoding=field", "positions.tied=false")


@pytest.mark.parametrize("words", [[], UNTIED], ids=["tied", "untied"])
def test_a_run_resumes_to_the_bit_and_its_file_has_one_meaning(tmp_path, words):
    write_photos(tmp_path / "photos")
    words = [*words, "backbone.drop_path=0.3"]
    train(config(tmp_path, *words, folder="whole"))
    train(config(tmp_path, *words, folder="parts"), stop_after=3)
    train(config(tmp_path, *words, folder="parts"), resume="auto")
    whole, parts = (load_file(tmp_path / name / "backbone.safetensors") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys() and all(torch.equal(whole[key], parts[key]) for key in whole)
    vit = build_backbone(tmp_path / "whole" / "backbone.safetensors").eval()
    assert vit.pos_encoding == "rotary"
    method = Intertwined(config(tmp_path, *words))
    teacher = method.teacher["backbone"].eval()
    teacher.load_state_dict({**teacher.state_dict(), **whole})
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        assert torch.equal(vit(x).patches, teacher(x).patches)


def test_weights_and_positions_that_do_not_fit_are_told(tmp_path):
    vit = ViT(**{**SMALL, "embed_dim": 192, "mask_tokens": True})
    grid = save_backbone(
        tmp_path / "grid.safetensors", vit.state_dict(), name=NAME, model_kwargs=vit.model_kwargs
    )
    vit = ViT(**{**SMALL, **DINOV3, "embed_dim": 192, "mask_tokens": True})
    rotary = save_backbone(
        tmp_path / "rotary.safetensors", vit.state_dict(), name=NAME, model_kwargs=vit.model_kwargs
    )
    own = ["backbone.depth=0", "backbone.layer_scale_init=1e-5"]
    with pytest.raises(UserError, match="has no rotary positions; take positions.encoding=field"):
        Intertwined(config(tmp_path, *own, f"backbone.weights={grid}"))
    with pytest.raises(UserError, match="has rotary positions; set positions.encoding=rotary"):
        Intertwined(config(tmp_path, *own, f"backbone.weights={rotary}", "positions.encoding=field"))
    started = Intertwined(config(tmp_path, *own, f"backbone.weights={rotary}"))
    assert started.backbone.model_kwargs["qkv_bias"] == "no_key" and started.backbone.n_registers == 4
    assert torch.equal(
        started.backbone.state_dict()["blocks.1.attn.qkv.weight"], vit.blocks[1].attn.qkv.weight
    )


def test_from_a_rotary_file_is_one_command(tmp_path):
    """posfield pretrain --from FILE --data photos: the recipe of own images takes its positions."""
    write_photos(tmp_path / "photos")
    vit = ViT(**{**SMALL, **DINOV3, "embed_dim": 192, "mask_tokens": True})
    file = save_backbone(
        tmp_path / "rotary.safetensors", vit.state_dict(), name=NAME, model_kwargs=vit.model_kwargs
    )
    options = argparse.Namespace(start=str(file), data=str(tmp_path / "photos"), output=str(tmp_path / "run"))
    options.config, options.resume, options.overrides = None, "", []
    settings = settings_of(options)
    assert settings.positions.encoding == "rotary" and settings.positions.tied
    assert "positions.encoding" not in run_protocol(settings, 6).deviations
