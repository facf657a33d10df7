"""The registry's ViT in a segmentor: the features that were pre-trained, what learns and how, memory, any
size of image."""

import copy

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("mmseg")
pytest.importorskip("seg_plugin")  # before anything imports mmseg's models

from backbone_fixture import ROTARY
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmseg.registry import MODELS
from mmseg.utils import register_all_modules
from seg_fixture import FLAGS, tiny, write_weights

from pretrain.build import build_backbone
from pretrain.errors import UserError
from pretrain.weights import save_backbone
from seg_plugin.backbone import PosfieldViT
from seg_plugin.config import segmenter_config
from seg_plugin.optim import param_groups


@pytest.fixture(scope="module", autouse=True)
def mmseg_scope():
    """mmengine looks types up in the library that its current scope names; a Runner sets it by itself."""
    register_all_modules(init_default_scope=True)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return write_weights(tmp_path_factory.mktemp("weights"))


def segmentor(recipe=None, **options):
    return MODELS.build(Config(segmenter_config(recipe or tiny(), "vit_tiny_patch16", **options)).model)


@pytest.mark.parametrize("way", ["weights", "init_cfg"])
def test_backbone_equals_the_registrys_after_init_weights(way, weights):
    cfg = segmenter_config(tiny(), "vit_tiny_patch16_reg4")["model"]
    said = (
        {"weights": str(weights)}
        if way == "weights"
        else {"init_cfg": dict(type="Pretrained", checkpoint=str(weights))}
    )
    cfg["backbone"] = {**cfg["backbone"], "weights": None, **said}
    model = MODELS.build(cfg)
    model.init_weights()
    plain = build_backbone("vit_tiny_patch16_reg4", weights=weights)
    x = torch.randn(2, 3, 48, 64)
    with torch.no_grad():
        (got,) = model.eval().backbone(x)
        torch.testing.assert_close(got, plain.eval().feature_map(x), atol=1e-5, rtol=0)
    assert got.shape == (2, 192, 3, 4)
    assert model.backbone.vit.model_kwargs["n_registers"] == 4 and model.backbone.vit.pos_encoding == "field"
    assert model.backbone.vit.blocks[1].drop_path.rate == pytest.approx(
        0.1
    )  # a run's flag, beside the file's


def test_two_sources_a_foreign_init_and_a_missing_tensor_are_refused(weights, tmp_path):
    backbone = dict(type="PosfieldViT", name="vit_tiny_patch16", weights=str(weights))
    with pytest.raises(UserError, match="backbone.safetensors.*are both given"):
        MODELS.build({**backbone, "init_cfg": dict(type="Pretrained", checkpoint="other.pth")})
    with pytest.raises(UserError, match="init_cfg can only be"):
        MODELS.build({**backbone, "weights": None, "init_cfg": dict(type="Kaiming", layer="Conv2d")})
    vit = build_backbone("vit_tiny_patch16", **FLAGS)
    state = {key: value for key, value in vit.state_dict().items() if key != "blocks.1.mlp.fc2.bias"}
    path = save_backbone(
        tmp_path / "cut.safetensors", state, name="vit_tiny_patch16", model_kwargs=vit.model_kwargs
    )
    with pytest.raises(UserError, match="missing blocks.1.mlp.fc2.bias"):
        MODELS.build({**backbone, "weights": str(path)})


@pytest.mark.parametrize("size", [(40, 56), (48, 57), (17, 48)])
def test_a_window_that_is_no_multiple_of_the_patch(size):
    """Its logits are exactly those of the padded image, cropped: each at the pixel where it belongs."""
    model = segmentor(model_kwargs=FLAGS).eval()
    image = torch.randn(1, 3, *size)
    padded = F.pad(image, (0, -size[1] % 16, 0, -size[0] % 16))
    with torch.no_grad():
        whole = model.encode_decode(padded, [dict(img_shape=padded.shape[2:])])
        got = model.encode_decode(image, [dict(img_shape=image.shape[2:])])
        torch.testing.assert_close(got, whole[..., : size[0], : size[1]], atol=1e-5, rtol=0)
        model.test_cfg = Config(dict(mode="slide", crop_size=(512, 512), stride=(480, 480)))
        slid = model.inference(image, [dict(img_shape=size, ori_shape=size)])  # smaller than the window
    torch.testing.assert_close(slid, got, atol=1e-5, rtol=0)
    stretched = F.interpolate(
        model.decode_head(((model.backbone.vit.feature_map(image)),)), size=size, mode="bilinear"
    )
    assert (stretched - got).abs().max() > 1e-3  # what the head alone would make of the padded map


def test_trap_sgd_and_decay_of_norms_biases_and_positions(weights):
    model = segmentor(weights=weights)
    cfg = Config(segmenter_config(tiny(lr=3e-5, weight_decay=1e-4), "vit_tiny_patch16"))
    optimizer = build_optim_wrapper(model, cfg.optim_wrapper).optimizer
    assert type(optimizer) is torch.optim.AdamW and len(optimizer.param_groups) == 2
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert {group["lr"] for group in optimizer.param_groups} == {3e-5}
    found = {name: decay[id(parameter)] for name, parameter in model.named_parameters()}
    undecayed = {name.rpartition(".")[2] for name, value in found.items() if value == 0}
    assert undecayed == {"bias", "weight", "gamma", "cls_token", "cls_pos", "pos_field", "reg_token"}
    weights_without = {name for name, value in found.items() if value == 0 and name.endswith(".weight")}
    assert all("norm" in name for name in weights_without) and len(weights_without) == 5
    assert {
        value for name, value in found.items() if name not in weights_without and name.endswith(".weight")
    } == {1e-4}
    (group,) = param_groups(model, lr=1.0, weight_decay=0.1, decay_all=True)
    assert group["weight_decay"] == 0.1 and len(group["params"]) == len(found)


def test_layer_decay_by_depth(weights):
    model = segmentor(weights=weights)
    groups = param_groups(model, lr=1.0, weight_decay=0.0, layer_decay=0.5)
    rate = {id(p): group["lr"] for group in groups for p in group["params"]}
    found = {name: rate[id(parameter)] for name, parameter in model.named_parameters()}
    vit = "backbone.vit."
    assert {
        found[vit + name] for name in ("cls_token", "pos_field", "reg_token", "patch_embed.proj.weight")
    } == {0.125}
    assert found[vit + "blocks.0.attn.qkv.weight"] == 0.25 and found[vit + "blocks.1.ls1.gamma"] == 0.5
    assert found[vit + "norm.weight"] == found["decode_head.conv_seg.weight"] == 1.0


def test_what_gets_no_gradient_in_a_rotary_network_is_frozen_and_the_rest_has_its_rate():
    """Norms of special tokens alone; LayerScale, registers and the bias of queries and values do not decay."""
    model = segmentor(model_kwargs=ROTARY).train()
    vit = model.backbone.vit
    model.backbone(torch.randn(1, 3, 48, 48))[0].sin().sum().backward()
    frozen = {name for name, p in vit.named_parameters() if not p.requires_grad}
    assert {name.partition(".")[0] for name in frozen} == {"cls_norm", "local_cls_norm"}
    assert frozen == {name for name, p in vit.named_parameters() if p.grad is None}
    groups = param_groups(model, lr=1.0, weight_decay=0.1, layer_decay=0.5)
    placed = {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    found = {name: placed[id(p)] for name, p in vit.named_parameters() if p.requires_grad}
    expected = {"reg_token": (0.125, 0.0), "blocks.0.attn.qkv.bias": (0.25, 0.0), "blocks.1.ls2.gamma": (0.5, 0.0),
                "blocks.1.mlp.fc1.weight": (0.5, 0.1), "norm.bias": (1.0, 0.0)}  # fmt: skip
    assert {name: found[name] for name in expected} == expected


def test_trap_patch_bias_attention_and_normalization(weights):
    model = segmentor(weights=weights)
    assert model.backbone.vit.patch_embed.proj.bias is not None
    assert {block.attn.backend for block in model.backbone.vit.blocks} == {"sdpa"}
    pixels = (
        torch.tensor([103.53, 116.28, 123.675]).round().byte().view(3, 1, 1).expand(3, 8, 8)
    )  # BGR, the mean color
    normalized = model.data_preprocessor({"inputs": [pixels]})["inputs"]
    assert normalized.abs().max() < 0.01


# --- What learns, and what it costs


def gradients(backbone, x, train=True):
    torch.manual_seed(5)  # drop path draws here
    (features,) = backbone.train(train)(x)
    features.backward(torch.linspace(-1, 1, features.numel()).view_as(features))
    return features.detach(), {name: parameter.grad for name, parameter in backbone.named_parameters()}


def test_checkpointing_changes_no_number(weights):
    """Drop path included; and the blocks are in fact computed again."""
    x, seen = torch.randn(2, 3, 48, 64), []
    plain, checkpointed = (
        PosfieldViT("vit_tiny_patch16_reg4", str(weights), drop_path=0.5, checkpointing=on)
        for on in (False, True)
    )
    checkpointed.vit.blocks[0].register_forward_pre_hook(lambda *_: seen.append(1))
    (features, grads), (again, grads_again) = gradients(plain, x), gradients(checkpointed, x)
    assert len(seen) == 2 and torch.equal(features, again)
    assert grads.keys() == grads_again.keys() and all(
        torch.equal(grads[name], grads_again[name]) for name in grads
    )
    (kept,) = plain.eval()(x)
    assert not torch.equal(features, kept)  # something was dropped


def test_a_training_pass_equals_the_registrys(weights):
    """Packed rows or not: the same features and gradients, where no path is dropped."""
    x = torch.randn(2, 3, 48, 64)
    ours, plain = (
        PosfieldViT("vit_tiny_patch16_reg4", str(weights)),
        build_backbone("vit_tiny_patch16_reg4", weights),
    )
    features, grads = gradients(ours, x)
    expected = plain.feature_map(x)
    expected.backward(torch.linspace(-1, 1, expected.numel()).view_as(expected))
    torch.testing.assert_close(features, expected.detach(), atol=1e-6, rtol=1e-5)
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(grads["vit." + name], parameter.grad, atol=1e-5, rtol=1e-4)


def test_a_frozen_backbone_gives_its_features_and_learns_nothing(weights):
    model = segmentor(tiny(drop_path=0.9), weights=weights, model_kwargs=dict(freeze=True))
    x = torch.randn(2, 3, 48, 48)
    (features,) = model.train().backbone(x)
    assert not features.requires_grad and model.decode_head([features.clone()]).requires_grad
    assert torch.equal(
        features, build_backbone("vit_tiny_patch16_reg4", weights).eval().feature_map(x)
    )  # no path was dropped
    before = copy.deepcopy(model.backbone.state_dict())
    groups = param_groups(model, lr=0.1, weight_decay=0.5)
    assert sum(len(group["params"]) for group in groups) == 2  # the head's
    torch.optim.AdamW(groups).step()
    assert all(torch.equal(before[key], value) for key, value in model.backbone.state_dict().items())


def test_the_field_is_sampled_straight_at_the_crops_size(weights):
    """512 px: 32 x 32 positions, by the rule of pre-training for a whole image, not through another grid."""
    model = segmentor(weights=weights)
    vit = build_backbone("vit_tiny_patch16_reg4", weights)
    seen = []
    model.backbone.vit.blocks[0].register_forward_pre_hook(
        lambda module, arguments: seen.append(arguments[0])
    )
    image = torch.zeros(1, 3, 512, 512)
    with torch.no_grad():
        model.eval().backbone(image)
        bias = vit.patch_embed.proj.bias
        torch.testing.assert_close(seen[0][5:], vit.positions((32, 32))[0] + bias, atol=1e-6, rtol=0)
