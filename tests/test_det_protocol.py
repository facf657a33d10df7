"""The numbers of the detection protocol against their sources, and what a run may change of them."""

import importlib.util
import json
import math
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest

from det_plugin.protocol import (
    BY_SIZE,
    PROTOCOLS,
    DetectionProtocol,
    deviations,
    n_share,
    other_images,
    protocol,
    with_overrides,
)
from det_plugin.run import DetectionRun
from pretrain.backbones import vit
from pretrain.errors import UserError
from pretrain.layer_decay import lr_rate, no_decay


def test_schedules_are_the_papers():
    """Appendix B.2 counts 118,000 images; 12 epochs at batch 64."""
    full = protocol("coco-12ep", "vit_base_patch16")
    assert full.max_iters == 12 * math.ceil(118_000 / 64) == 22_128
    assert full.milestones == (19_667, 21_306)
    assert [m / full.max_iters for m in full.milestones] == pytest.approx([8 / 9, 26 / 27], abs=1e-3)
    assert protocol("coco-50ep", "vit_base_patch16").max_iters == 184_375 // 2
    assert protocol("coco-100ep", "vit_base_patch16").milestones == (163_889, 177_546)


def test_learning_rate_follows_the_backbone():
    assert protocol("coco-12ep", "vit_base_patch16").lr == 3e-4
    assert protocol("coco-12ep", "vit_small_patch16_reg4").lr == 1e-4


@pytest.mark.parametrize(
    "size, lr, layer_decay, drop_path, version",
    [
        ("tiny", 1e-4, 0.7, 0.1, 1),
        ("small", 1e-4, 0.7, 0.1, 1),
        ("small_plus", 1e-4, 0.7, 0.1, 1),
        ("base", 3e-4, 0.7, 0.1, 1),
        ("large", 3e-4, 0.8, 0.4, 2),
        ("large_plus", 3e-4, 0.8, 0.4, 1),
        ("huge_plus", 3e-4, 0.9, 0.5, 1),
        ("giant", 3e-4, 0.9, 0.5, 1),
        ("7b", 3e-4, 0.9, 0.5, 1),
    ],
)
def test_numbers_of_each_size(size, lr, layer_decay, drop_path, version):
    """ViTDet's drop path and layer decay: B .1 and .7, L .4 and .8, H .5 and .9."""
    backbone = f"vit_{size}_patch16_reg4"
    full = protocol("coco-12ep", backbone)
    assert (full.lr, full.layer_decay, full.drop_path, full.version) == (lr, layer_decay, drop_path, version)
    assert set(BY_SIZE) == set(vit.SIZES)
    assert deviations(full.model_copy(update={"drop_path": 0.2}), backbone) == {"drop_path": [drop_path, 0.2]}
    assert protocol("coco10pct-frozen-12ep", backbone).drop_path == 0


@pytest.mark.parametrize("size", ["base", "large", "huge"])
def test_layer_decay_and_drop_path_are_vitdets(size):
    """By its configs, beside Detectron2's sources ($DETECTRON2_SRC)."""
    length, ours = (75, "huge_plus") if size == "huge" else (100, size)
    source = Path(os.environ.get("DETECTRON2_SRC", "")) / "projects" / "ViTDet" / "configs" / "COCO"
    file = source / f"mask_rcnn_vitdet_{size[0]}_{length}ep.py"
    if not file.is_file():
        pytest.skip("Detectron2's sources are not there")
    text, full = file.read_text(), protocol("coco-100ep", f"vit_{ours}_patch16")
    assert float(re.search(r"lr_decay_rate=([\d.]+)", text)[1]) == full.layer_decay
    drop_path = re.search(r"drop_path_rate = ([\d.]+)", text)
    assert (float(drop_path[1]) if drop_path else 0.1) == full.drop_path  # B's stands in its model


def test_a_version_of_before_keeps_its_numbers():
    backbone = "vit_large_patch16"
    before = protocol("coco-12ep", backbone, 1)
    assert (before.lr, before.layer_decay, before.drop_path, before.version) == (3e-4, 0.7, 0.1, 1)
    assert deviations(before, backbone) == {} == deviations(protocol("coco-12ep", backbone, 2), backbone)
    with pytest.raises(UserError, match="of vit_base_patch16 has no version 2"):
        protocol("coco-12ep", "vit_base_patch16", 2)


def test_numbers_of_vitdet():
    p = DetectionProtocol()
    assert (p.batch_size, p.betas, p.weight_decay, p.layer_decay, p.drop_path) == (
        64,
        (0.9, 0.999),
        0.1,
        0.7,
        0.1,
    )
    assert (p.warmup_iters, p.warmup_factor, p.eval_every, p.clip_grad, p.amp) == (
        250,
        0.001,
        5000,
        0.0,
        True,
    )
    assert (p.image_size_px, p.jitter_scale, p.flip) == (1024, (0.1, 2.0), 0.5)
    assert (p.channels, p.norm, p.rpn_convs, p.box_convs, p.box_fc, p.mask_convs) == (
        256,
        "LN",
        2,
        4,
        1024,
        4,
    )
    assert p.keep_special_tokens and p.final_norm


@pytest.mark.skipif(
    importlib.util.find_spec("detectron2") is None, reason="Detectron2, the source, is not installed"
)
def test_numbers_equal_detectron2s_own_configuration():
    from detectron2 import model_zoo

    try:
        theirs = model_zoo.get_config("common/models/mask_rcnn_vitdet.py").model
    except ImportError as error:  # model_zoo needs pkg_resources
        pytest.skip(f"Detectron2's model_zoo cannot be imported ({error})")
    p, rpn, roi = DetectionProtocol(), theirs.proposal_generator, theirs.roi_heads
    assert list(p.pyramid_scales) == list(theirs.backbone.scale_factors) and p.norm == theirs.backbone.norm
    assert (p.channels, p.image_size_px) == (theirs.backbone.out_channels, theirs.backbone.square_pad)
    assert list(p.pixel_mean) == list(theirs.pixel_mean) and list(p.pixel_std) == list(theirs.pixel_std)
    assert theirs.input_format == "RGB" and p.drop_path == theirs.backbone.net.drop_path_rate
    assert [[size] for size in p.anchor_sizes_px] == list(rpn.anchor_generator.sizes)
    assert (
        list(p.anchor_ratios) == list(rpn.anchor_generator.aspect_ratios) and rpn.anchor_generator.offset == 0
    )
    assert list(p.rpn_thresholds) == list(rpn.anchor_matcher.thresholds) and p.rpn_convs == len(
        rpn.head.conv_dims
    )
    assert (p.rpn_batch_per_image, p.rpn_positive_fraction) == (
        rpn.batch_size_per_image,
        rpn.positive_fraction,
    )
    assert (p.rpn_pre_nms, p.rpn_post_nms) == (
        tuple(rpn.pre_nms_topk),
        tuple(rpn.post_nms_topk),
    ) and p.rpn_nms == rpn.nms_thresh
    assert (p.num_classes, [p.roi_threshold]) == (roi.num_classes, list(roi.proposal_matcher.thresholds))
    assert (p.roi_batch_per_image, p.roi_positive_fraction) == (
        roi.batch_size_per_image,
        roi.positive_fraction,
    )
    assert (p.box_pool, p.mask_pool) == (roi.box_pooler.output_size, roi.mask_pooler.output_size)
    assert [p.channels] * p.box_convs == list(roi.box_head.conv_dims) and [p.box_fc] == list(
        roi.box_head.fc_dims
    )
    assert [p.channels] * (p.mask_convs + 1) == list(roi.mask_head.conv_dims)
    assert list(p.box_weights) == list(roi.box_predictor.box2box_transform.weights)
    assert p.score_threshold == roi.box_predictor.test_score_thresh


@pytest.mark.parametrize("name, backbone, message", [
    ("coco-3ep", "vit_base_patch16", "'coco-3ep' is none of coco-12ep, coco-50ep, coco-100ep, coco10pct"),
    ("coco-12ep", "vit_vast_patch16", "'vit_vast_patch16'; sizes are tiny, small, small_plus, base"),
    ("coco-12ep", "resnet", "resnet"),
])  # fmt: skip
def test_unknown_names(name, backbone, message):
    with pytest.raises(UserError, match=message):
        protocol(name, backbone)


def test_overrides_from_a_command_line():
    changed = with_overrides(
        DetectionProtocol(), {"lr": "1e-4", "milestones": "3, 5", "amp": "false", "batch_size": "8"}
    )
    assert (changed.lr, changed.milestones, changed.amp, changed.batch_size) == (1e-4, (3, 5), False, 8)
    assert with_overrides(DetectionProtocol(), {"milestones": ""}).milestones == ()
    assert with_overrides(DetectionProtocol(), {}) == DetectionProtocol()


@pytest.mark.parametrize("key, value", [
    ("learning_rate", "1"), ("name", "mine"), ("version", "2"), ("lr", "fast"), ("batch_size", "1.5"), ("amp", "1"),
    ("jitter_scale", "0.5"), ("betas", "0.9,0.95,0.99"), ("lr", "nan"),
])  # fmt: skip
def test_bad_overrides_name_the_key(key, value):
    with pytest.raises(UserError, match=key):
        with_overrides(DetectionProtocol(), {key: value})


@pytest.mark.parametrize("name", PROTOCOLS)
def test_the_protocol_itself_does_not_deviate(name):
    for backbone in ("vit_tiny_patch16", "vit_base_patch16_reg4"):
        run = protocol(name, backbone)
        assert deviations(run, backbone) == {}


def test_every_field_is_a_deviation_when_changed():
    full = protocol("coco-12ep", "vit_base_patch16")
    for name, value in vars(full).items():
        if name in ("name", "version"):
            continue
        other = (
            not value
            if isinstance(value, bool)
            else tuple(v + 1 for v in value)
            if isinstance(value, tuple)
            else f"{value}x"
        )
        other = value + 1 if isinstance(value, (int, float)) and not isinstance(value, bool) else other
        changed = full.model_copy(update={name: other})  # whether or not a run could follow it
        assert deviations(changed, "vit_base_patch16") == {name: json.loads(json.dumps([value, other]))}
    assert list(deviations(full, "vit_small_patch16")) == ["lr"]  # another backbone's learning rate


@pytest.mark.parametrize("key, value", [
    ("max_iters", 0), ("batch_size", 0), ("eval_every", 0), ("image_size_px", 0), ("num_classes", 0), ("channels", 0),
    ("detections_per_image", 0), ("flip", 1.5), ("drop_path", -0.1), ("layer_decay", 2.0), ("nms", 1.1), ("lr", -1.0),
    ("weight_decay", -0.1), ("milestones", (5, 3)), ("milestones", (22_129,)), ("milestones", (0,)),
    ("warmup_iters", 22_129), ("warmup_iters", -1), ("jitter_scale", (2.0, 0.1)), ("jitter_scale", (0.0, 1.0)),
    ("rpn_thresholds", (0.7, 0.3)), ("train_share", 0.0), ("train_share", 1.1), ("amp_dtype", "float8"), ("window_size", -1),
    ("global_blocks", 0), ("score_threshold", 2.0), ("pixel_std", (1.0, 0.0, 1.0)), ("betas", (0.9, 1.0)),
    ("image_size_px", 31), ("lr_gamma", -0.1), ("warmup_factor", 1.1), ("roi_threshold", 0.0),
    ("box_weights", (0.0, 1.0, 1.0, 1.0)),
    ("anchor_ratios", ()), ("anchor_ratios", (0.0, 1.0)), ("anchor_sizes_px", (0, 8, 16, 32, 64)), ("anchor_sizes_px", (8, 16)),
    ("rpn_pre_nms", (0, 1)), ("rpn_post_nms", (1, 0)), ("pyramid_scales", ()), ("pyramid_scales", (4.0, 1.0, 0.5)),
    ("pyramid_scales", (2.0, 1.0)),
])  # fmt: skip
def test_impossible_numbers_are_named(key, value):
    with pytest.raises(UserError, match=rf"^protocol: {key}(\[\d\])?=.* (must be|should) "):
        with_overrides(DetectionProtocol(), {key: value})


def test_a_share_of_coco_is_full_with_its_own_number_of_images():
    """117,266 images of train2017 have an object that is no crowd."""
    assert (n_share(117_266, 1.0), n_share(117_266, 0.1), n_share(3, 0.1)) == (117_266, 11_727, 1)
    assert other_images(117_266, 5_000) == other_images(11_727, 5_000, 0.1) == {}
    assert other_images(117_266, 5_000, 0.1) == {"train_images": [11_727, 117_266]}
    assert other_images(None, 40) == {"train_images": [117_266, None], "val_images": [5_000, 40]}


def test_layer_decay_table():
    rates = {
        name: lr_rate(name, 12, 0.7)
        for name in ("cls_token", "reg_token", "pos_embed", "pos_field", "cls_pos")
    }
    assert set(rates.values()) == {0.7**13}
    assert lr_rate("patch_embed.proj.weight", 12, 0.7) == 0.7**13
    assert lr_rate("blocks.0.attn.qkv.weight", 12, 0.7) == 0.7**12
    assert lr_rate("blocks.11.mlp.fc2.bias", 12, 0.7) == pytest.approx(0.7)
    assert lr_rate("norm.weight", 12, 0.7) == 1
    with pytest.raises(ValueError, match="head.weight"):
        lr_rate("head.weight", 12, 0.7)
    free = (
        "norm.bias",
        "blocks.3.norm1.weight",
        "blocks.3.norm2.bias",
        "blocks.3.ls1.gamma",
        "pos_embed",
        "pos_field",
        "cls_pos",
    )
    assert all(no_decay(name) for name in free)
    assert not any(
        no_decay(name)
        for name in ("cls_token", "reg_token", "blocks.3.attn.qkv.bias", "patch_embed.proj.bias")
    )


def test_whose_file_it_is_read_as_is_no_setting():
    """So that runs with and without ``backbone.source`` are seeds of one configuration."""
    run = DetectionRun("vit_tiny_patch16", None, Path("coco"), Path("out"), DetectionProtocol())
    assert replace(run, model_kwargs={"source": "dino"}).settings() == run.settings()
    assert replace(run, model_kwargs={"depth": 2}).settings() != run.settings()
