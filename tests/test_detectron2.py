"""The protocol on Detectron2: our backbone and our numbers inside its own classes. Skipped where it is not
installed."""

import copy
import itertools
import json
import math
import os
import warnings

import numpy as np
import pytest
import torch

pytest.importorskip(
    "detectron2", reason="Detectron2 is not installed (it is optional: see its INSTALL guide)"
)

from backbone_fixture import randomize
from coco_fixture import annotation_file, rle_of_box, write_coco
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import LazyConfig, instantiate
from detectron2.data import transforms as T
from detectron2.data.build import filter_images_with_only_crowd_annotations
from detectron2.data.datasets import load_coco_json
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.backbone.vit import get_vit_lr_decay_rate
from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks
from detectron2.utils.events import EventStorage
from detectron2_fixture import FIELD, TINY, TOY, save_pretrained

from det_plugin.coco.annotations import read_split
from det_plugin.coco.masks import coco_api
from det_plugin.detectron2_engine.catalog import CocoMapper, coco_dicts, coco_root
from det_plugin.detectron2_engine.evaluate import config_deviations
from det_plugin.detectron2_engine.lazy import config
from det_plugin.detectron2_engine.loader import TrainLoader
from det_plugin.detectron2_engine.model import BFloat16RCNN, RegistryBackbone
from det_plugin.detectron2_engine.optim import adamw
from det_plugin.detectron2_engine.saved_config import plain, protocol_in
from det_plugin.protocol import DetectionProtocol, protocol, with_overrides
from det_plugin.torchvision_engine.optim import lr_at
from pretrain.build import build_backbone
from pretrain.errors import UserError
from pretrain.layer_decay import lr_rate, no_decay
from pretrain.settings import compared
from pretrain.weights import save_backbone

pytestmark = pytest.mark.detectron2

ON = dict(final_norm=True, keep_special_tokens=True)

# Every field of the protocol away from its default, so that nothing that is written twice can pass.
ODD = with_overrides(
    protocol("coco-12ep", TINY),
    dict(
        max_iters=40, patience=2, milestones=(10, 20, 30), lr_gamma=0.5, warmup_iters=5, warmup_factor=0.1, batch_size=3,
        eval_every=7, lr=2e-3, betas=(0.8, 0.95), weight_decay=0.2, layer_decay=0.6, drop_path=0.3, clip_grad=0.7,
        amp=False, image_size_px=100, jitter_scale=(0.3, 1.7), flip=0.25, pixel_mean=(1.0, 2.0, 3.0),
        pixel_std=(4.0, 5.0, 6.0), keep_special_tokens=False, final_norm=False, pyramid_scales=(2.0, 1.0, 0.5), channels=32,
        norm="GN", anchor_sizes_px=(10, 20, 40, 80), anchor_ratios=(0.4, 1.0, 2.2, 3.0), rpn_convs=1,
        rpn_thresholds=(0.2, 0.6), rpn_batch_per_image=11, rpn_positive_fraction=0.3, rpn_pre_nms=(50, 40),
        rpn_post_nms=(30, 20), rpn_nms=0.65, num_classes=3, roi_threshold=0.45, roi_batch_per_image=13,
        roi_positive_fraction=0.35, box_pool=5, box_convs=2, box_fc=48, mask_pool=6, mask_convs=2,
        box_weights=(9.0, 8.0, 7.0, 6.0), score_threshold=0.15, nms=0.4, detections_per_image=9,
        amp_dtype="bfloat16", window_size=3, global_blocks=2, freeze_backbone=True, train_share=0.4, crowds="objects",
        masks="on", keep_empty=True, val_share=0.25,
    ),
)  # fmt: skip


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return save_pretrained(tmp_path_factory.mktemp("weights") / "backbone.safetensors")


@pytest.fixture
def toy():
    return LazyConfig.load(str(TOY))


# --- backbone


@pytest.mark.parametrize("model_kwargs", [FIELD, dict(depth=2)], ids=["field", "standard"])
def test_feature_map_is_the_backbones(tmp_path, model_kwargs):
    path = tmp_path / "b.safetensors"
    model = randomize(build_backbone(TINY, **model_kwargs))
    save_backbone(path, model.state_dict(), name=TINY, model_kwargs=model.model_kwargs)
    net = RegistryBackbone(TINY, path, drop_path=0.5, **ON).eval()
    x = torch.randn(2, 3, 96, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        got, expected = net(x), build_backbone(TINY, weights=path).eval().feature_map(x)
    assert expected.abs().max() > 0.1 and list(got) == ["last_feat"]
    torch.testing.assert_close(got["last_feat"], expected, atol=1e-5, rtol=1e-5)
    shape = net.output_shape()["last_feat"]
    assert (shape.channels, shape.stride) == (192, 16) and got["last_feat"].shape == (2, 192, 6, 4)


def test_unused_parameters_are_frozen_and_only_these(weights):
    net = RegistryBackbone(TINY, weights, final_norm=False, keep_special_tokens=False)
    net(torch.randn(1, 3, 32, 32))["last_feat"].square().sum().backward()
    frozen = {name for name, p in net.vit.named_parameters() if not p.requires_grad}
    assert frozen == {"cls_token", "reg_token", "cls_pos", "norm.weight", "norm.bias"}
    assert {name for name, p in net.vit.named_parameters() if p.grad is None} == frozen
    net = RegistryBackbone(TINY, weights, **ON)
    net(torch.randn(1, 3, 32, 32))["last_feat"].square().sum().backward()
    assert all(p.grad is not None for p in net.parameters())


def test_checkpointing_changes_no_gradient(weights):
    gradients = []
    for checkpointing in (False, True):
        net = copy.deepcopy(RegistryBackbone(TINY, weights, checkpointing=checkpointing, drop_path=0.5, **ON))
        torch.manual_seed(0)
        net(torch.ones(2, 3, 32, 32))["last_feat"].square().sum().backward()
        gradients.append([p.grad for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


@pytest.mark.parametrize(
    "edit, named",
    [
        (lambda state: state.pop("blocks.1.attn.qkv.bias"), "missing blocks.1.attn.qkv.bias"),
        (lambda state: state.update(extra=torch.zeros(1)), "left over extra"),
        (lambda state: state.update(pos_field=torch.zeros(1, 192, 3, 3)), "pos_field is"),
    ],
)
def test_a_file_must_fit_in_every_tensor(tmp_path, edit, named):
    model = build_backbone(TINY, **FIELD)
    state = dict(model.state_dict())
    edit(state)
    path = save_backbone(tmp_path / "b.safetensors", state, name=TINY, model_kwargs=model.model_kwargs)
    with pytest.raises(UserError, match=named):
        instantiate(config(ODD, TINY, path).model.backbone.net)
    with pytest.raises(UserError, match=r"b\.safetensors.*vit_tiny|192"):
        RegistryBackbone("vit_small_patch16", path, **ON)  # of another width
    with pytest.raises(UserError, match="patch_size=8"):
        RegistryBackbone(TINY, patch_size=8, depth=1, **ON)


def test_detectron2s_checkpointer_leaves_the_weights_and_may_not_half_load_them(tmp_path, toy, weights):
    toy.model.backbone.net.weights = str(weights)
    model, expected = instantiate(toy.model), build_backbone(TINY, weights=weights).state_dict()
    DetectionCheckpointer(model, str(tmp_path)).resume_or_load(toy.train.init_checkpoint, resume=False)
    inside = {
        k.removeprefix("backbone.net.vit."): v for k, v in model.state_dict().items() if ".net.vit." in k
    }
    assert inside.keys() == expected.keys() and all(torch.equal(inside[k], expected[k]) for k in expected)

    state = model.state_dict()
    for name, value in (("pos_field", torch.zeros(1, 192, 3, 3)), ("norm.weight", None)):
        broken = {k: v for k, v in state.items() if k != f"backbone.net.vit.{name}"}
        broken |= {} if value is None else {f"backbone.net.vit.{name}": value}
        torch.save({"model": broken}, tmp_path / "broken.pth")
        with pytest.raises(UserError, match=f"missing backbone.net.vit.{name}"):
            DetectionCheckpointer(model).load(str(tmp_path / "broken.pth"))


# --- the protocol's numbers


def numbers_of(cfg):
    """Every field of the protocol, read back from what Detectron2 made of the config."""
    model = instantiate(cfg.model)
    rpn, heads, pyramid = model.proposal_generator, model.roi_heads, model.backbone
    is_frozen = not any(p.requires_grad for p in pyramid.net.vit.parameters())
    cfg.optimizer.params.model = (
        model.requires_grad_()
    )  # else a frozen backbone has no learning rates to look at
    optimizer, dataset = instantiate(cfg.optimizer), cfg.dataloader.train.dataset
    train_share, crowds = dataset.share, dataset.get("crowds", "ignored")
    masks, keep_empty = dataset.get("masks", "auto"), dataset.get("keep_empty", False)
    val_share = dataset.get("val_share", 0.0)
    patience = protocol_in(cfg).patience  # of our loop, not of Detectron2's
    cfg.dataloader.train.dataset = [{}] * 8
    flip, scale, crop = instantiate(cfg.dataloader.train.mapper).augmentations.augs
    resize = instantiate(cfg.dataloader.test.mapper).augmentations.augs[0]
    schedule, last_it = instantiate(cfg.lr_multiplier), cfg.train.max_iter
    factors = [schedule(it / last_it) for it in range(last_it)]
    warmup_iters = factors.index(1.0)
    steps = [it for it in range(warmup_iters + 1, last_it) if factors[it] != factors[it - 1]]
    sizes = {crop.crop_size[0], crop.crop_size[1], scale.target_height, scale.target_width, resize.max_size,
             *resize.short_edge_length, cfg.model.backbone.square_pad}  # fmt: skip
    assert len(sizes) == 1 and not crop.pad and resize.is_range
    groups = optimizer.param_groups
    return dict(
        max_iters=cfg.train.max_iter,
        milestones=steps,
        lr_gamma=factors[steps[0]],
        warmup_iters=warmup_iters,
        warmup_factor=factors[0],
        batch_size=instantiate(cfg.dataloader.train).batch_size,
        eval_every=cfg.train.eval_period,
        lr=max(g["lr"] for g in groups),
        betas=groups[0]["betas"],
        weight_decay=max(g["weight_decay"] for g in groups),
        layer_decay=max(r for g in groups if (r := g["lr"] / max(h["lr"] for h in groups)) < 0.999),
        drop_path=pyramid.net.vit.blocks[-1].drop_path.rate,
        clip_grad=next((h.keywords["max_norm"] for h in optimizer._optimizer_step_pre_hooks.values()), 0.0),
        amp=cfg.train.amp.enabled or isinstance(model, BFloat16RCNN),
        amp_dtype="float16"
        if cfg.train.amp.enabled
        else "bfloat16"
        if isinstance(model, BFloat16RCNN)
        else None,
        image_size_px=sizes.pop(),
        jitter_scale=(scale.min_scale, scale.max_scale),
        flip=flip.prob,
        train_share=train_share,
        crowds=crowds,
        masks=masks,
        keep_empty=keep_empty,
        val_share=val_share,
        patience=patience,
        pixel_mean=model.pixel_mean.flatten().tolist(),
        pixel_std=model.pixel_std.flatten().tolist(),
        keep_special_tokens=pyramid.net.options.keep_special_tokens,
        final_norm=pyramid.net.options.final_norm,
        window_size=pyramid.net.options.window_size,
        global_blocks=pyramid.net.options.global_blocks,
        freeze_backbone=is_frozen and pyramid.net.options.freeze,
        pyramid_scales=pyramid.scale_factors,
        channels=pyramid.output_shape()["p4"].channels,
        norm={"LayerNorm": "LN", "GroupNorm": "GN"}[type(pyramid.stages[-1][-1].norm).__name__],
        anchor_sizes_px=[math.sqrt((a[0, 2:] - a[0, :2]).prod()) for a in rpn.anchor_generator.cell_anchors],
        anchor_ratios=[
            float(corner[1] / corner[0]) for corner in next(iter(rpn.anchor_generator.cell_anchors))[:, 2:]
        ],
        rpn_convs=1 if isinstance(rpn.rpn_head.conv, torch.nn.Conv2d) else len(rpn.rpn_head.conv),
        rpn_thresholds=rpn.anchor_matcher.thresholds[1:-1],
        rpn_batch_per_image=rpn.batch_size_per_image,
        rpn_positive_fraction=rpn.positive_fraction,
        rpn_pre_nms=(rpn.pre_nms_topk[True], rpn.pre_nms_topk[False]),
        rpn_post_nms=(rpn.post_nms_topk[True], rpn.post_nms_topk[False]),
        rpn_nms=rpn.nms_thresh,
        num_classes=heads.mask_head.predictor.out_channels,
        roi_threshold=heads.proposal_matcher.thresholds[1],
        roi_batch_per_image=heads.batch_size_per_image,
        roi_positive_fraction=heads.positive_fraction,
        box_pool=heads.box_pooler.output_size[0],
        box_convs=len(heads.box_head.conv_norm_relus),
        box_fc=heads.box_head.fcs[0].out_features,
        mask_pool=heads.mask_pooler.output_size[0],
        mask_convs=len(heads.mask_head.conv_norm_relus),
        box_weights=heads.box_predictor.box2box_transform.weights,
        score_threshold=heads.box_predictor.test_score_thresh,
        nms=heads.box_predictor.test_nms_thresh,
        detections_per_image=heads.box_predictor.test_topk_per_image,
    )


def built(cfg):
    model = instantiate(cfg.model)
    cfg.optimizer.params.model = model
    return model, instantiate(cfg.optimizer)


@pytest.mark.parametrize(
    "name, changes", [("coco-50ep", {}), ("coco10pct-frozen-12ep", {}), ("odd", {}), ("odd", {"amp": True})]
)
def test_every_number_is_the_protocols(name, changes):
    recipe = with_overrides(ODD if name == "odd" else protocol(name, TINY), changes)
    cfg = config(recipe, TINY, model_kwargs=dict(depth=4 if recipe.window_size == 0 else 2), workers=0)
    got = numbers_of(cfg)
    assert got.keys() == set(DetectionProtocol.model_fields) - {"name", "version"}
    if not recipe.amp:
        assert got.pop("amp_dtype") is None  # without mixed precision there is no other type
    assert cfg.train.ddp.fp16_compression == (recipe.amp and recipe.amp_dtype == "float16")
    for name, value in got.items():
        expected = getattr(recipe, name)
        expected = list(expected) if isinstance(expected, tuple) else expected
        assert (list(value) if isinstance(expected, list) else value) == pytest.approx(expected), name
    assert instantiate(cfg.dataloader.train.mapper).image_format == cfg.model.input_format == "RGB"


def test_the_odd_protocol_is_odd_everywhere():
    full = protocol("coco-12ep", TINY)
    assert {key for key, value in vars(ODD).items() if value == getattr(full, key)} == {"name", "version"}


def test_the_full_model_is_detectron2s_vitdet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pkg_resources
        from detectron2 import model_zoo

        theirs = model_zoo.get_config("common/models/mask_rcnn_vitdet.py")
    ours, theirs = plain(config(protocol("coco-12ep", TINY), TINY)["model"]), plain(theirs["model"])
    heads, sides = ("box_head", "box_predictor", "mask_head"), ("_target_", "height", "width", "stride")
    shapes = {f"roi_heads.{head}.input_shape.{side}" for head in heads for side in sides}
    own = {"backbone._target_", "backbone.in_feature"}
    # Written out here, Detectron2's defaults there:
    own |= {f"roi_heads.box_predictor.{key}" for key in ("test_nms_thresh", "test_topk_per_image")}
    assert {key for key in compared(ours, theirs) if not key.startswith("backbone.net.")} - shapes == own
    assert len(compared(ours, {})) > 60


def test_without_masks_it_is_detectron2s_faster_rcnn():
    """The same config without what Detectron2 calls mask: nothing else is missing or another."""
    recipe = protocol("coco-12ep", TINY)
    whole, alone = (plain(config(with_overrides(recipe, {"masks": m}), TINY)) for m in ("auto", "off"))
    gone = {key for key, (_, now) in compared(whole["model"], alone["model"]).items() if now is None}
    assert all(key.startswith("roi_heads.mask_") for key in gone)
    assert gone == compared(whole["model"], alone["model"]).keys() and len(gone) > 10
    changed = {
        key: pair for key, pair in compared(whole, alone).items() if not key.startswith("model.roi_heads")
    }
    data, mapper = "dataloader.{}.dataset.masks", "dataloader.train.mapper."
    assert changed == {
        **{data.format(split): [None, "off"] for split in ("train", "test")},
        **{mapper + key: [True, False] for key in ("use_instance_mask", "recompute_boxes")},
        "dataloader.evaluator.overrides.masks": [None, "off"],
    }
    cfg = config(with_overrides(recipe, {"masks": "off"}), TINY, model_kwargs=dict(depth=1))
    assert config_deviations(cfg) == {"masks": ["auto", "off"], "model_kwargs": [{}, {"depth": 1}]}
    heads = instantiate(cfg.model).roi_heads
    assert not heads.mask_on and not any("mask" in name for name, _ in heads.named_parameters())


def test_learning_rates_and_weight_decay_of_named_parameters(weights):
    recipe = protocol("coco-12ep", "vit_base_patch16")
    cfg = config(recipe, TINY, weights)
    model, optimizer = built(cfg)
    group_of = {p: g for g in optimizer.param_groups for p in g["params"]}
    undecayed = set()
    for name, parameter in model.named_parameters():
        group, in_vit = group_of[parameter], name.startswith("backbone.net.vit.")
        own = name.removeprefix("backbone.net.vit.")
        assert group["lr"] == pytest.approx(3e-4 * (lr_rate(own, 2, 0.7) if in_vit else 1)), name
        assert group["weight_decay"] == (0.0 if in_vit and no_decay(own) else 0.1), name
        if in_vit and own.startswith(("blocks.", "patch_embed.", "pos_embed")):  # what Detectron2 knows
            assert group["lr"] == pytest.approx(
                3e-4 * get_vit_lr_decay_rate(name, lr_decay_rate=0.7, num_layers=2)
            )
        if group["weight_decay"] == 0:
            undecayed.add(own.split(".")[-1] if own.startswith("blocks") else own)
    assert undecayed == {"pos_field", "cls_pos", "gamma", "weight", "bias", "norm.weight", "norm.bias"}
    for name in ("cls_token", "reg_token", "pos_field", "cls_pos", "patch_embed.proj.weight"):
        assert group_of[model.backbone.net.vit.get_parameter(name)]["lr"] == pytest.approx(3e-4 * 0.7**3), (
            name
        )
    assert group_of[model.backbone.net.vit.norm.weight]["lr"] == pytest.approx(3e-4)


# as plan.schedule makes it of max_iters=4 alone
SHORT = with_overrides(ODD, dict(max_iters=4, milestones=(3, 4), warmup_iters=0))


@pytest.mark.parametrize("recipe", [ODD, protocol("coco-12ep", TINY), SHORT], ids=["odd", "full", "short"])
def test_the_schedule_is_the_torchvision_engines(recipe):
    schedule = instantiate(config(recipe, TINY).lr_multiplier)
    for it in {*range(12), *range(0, recipe.max_iters, 1 + recipe.max_iters // 50), *recipe.milestones}:
        at = min(it, recipe.max_iters - 1)
        assert recipe.lr * schedule(at / recipe.max_iters) == pytest.approx(lr_at(at, recipe)), it
    with pytest.raises(UserError, match="milestones"):
        config(with_overrides(recipe, dict(max_iters=2)), TINY)
    for field, value in (
        ("pyramid_scales", (8.0, 4.0)),
        ("anchor_sizes_px", (32,)),
        ("norm", "XX"),
        ("norm", ""),
    ):
        with pytest.raises(UserError, match=f"{field}="):
            config(with_overrides(recipe, {field: value}), TINY)
    with pytest.raises(UserError, match="norm='GN' .* channels=48"):
        config(with_overrides(recipe, dict(norm="GN", channels=48)), TINY)
    for flag in ("window_size", "freeze", "checkpointing"):
        with pytest.raises(UserError, match=f"backbone: {flag} is no argument of the ViT"):
            config(recipe, TINY, model_kwargs={flag: 1})


@pytest.mark.parametrize(
    "changes, unused",
    [
        ({}, set()),
        (dict(window_size=3, global_blocks=2), set()),
        (dict(keep_special_tokens=False), {"cls_token", "reg_token", "cls_pos"}),
        (dict(freeze_backbone=True), None),
    ],
)
def test_the_optimizer_holds_what_learns_and_nothing_else(changes, unused):
    cfg = config(with_overrides(protocol("coco-12ep", TINY), changes), TINY, model_kwargs=FIELD)
    model, optimizer = built(cfg)
    held = {p for group in optimizer.param_groups for p in group["params"]}
    assert held == {p for p in model.parameters() if p.requires_grad}
    frozen = {name.removeprefix("backbone.net.vit.") for name, p in model.named_parameters() if p not in held}
    assert frozen == (
        {name for name, _ in model.backbone.net.vit.named_parameters()} if unused is None else unused
    )
    rates = {group["lr"] for group in optimizer.param_groups}
    expected = {cfg.optimizer.lr} if unused is None else {cfg.optimizer.lr * 0.7**k for k in range(4)}
    assert sorted(rates) == pytest.approx(sorted(expected))


def test_bfloat16_is_the_models_own_affair(toy):
    """Under any launcher; on the CPU, and in evaluation, it is Detectron2's detector."""
    recipe = with_overrides(protocol("coco-12ep", TINY), {"amp_dtype": "bfloat16"})
    cfg = config(recipe, TINY, model_kwargs=dict(depth=1))
    assert not cfg.train.amp.enabled and isinstance(instantiate(cfg.model), BFloat16RCNN)
    assert config_deviations(cfg) == {
        "amp_dtype": ["float16", "bfloat16"],
        "model_kwargs": [{}, {"depth": 1}],
    }
    losses = []
    for target in (GeneralizedRCNN, BFloat16RCNN):
        torch.manual_seed(0)
        toy.model._target_ = target
        model, boxes = instantiate(toy.model), Boxes(torch.tensor([[10.0, 10, 60, 60]]))
        masks = PolygonMasks([[np.array([10.0, 10, 60, 10, 60, 60, 10, 60])]])
        instances = Instances((128, 128), gt_boxes=boxes, gt_classes=torch.tensor([1]), gt_masks=masks)
        with EventStorage():
            losses.append(model([{"image": torch.ones(3, 128, 128), "instances": instances}]))
    assert losses[0] == losses[1] and len(losses[0]) == 5
    with torch.autocast(
        "cpu", torch.bfloat16
    ):  # RoIAlign casts boxes to the maps' type: bfloat16 would round 1000 px by 2
        assert {level.dtype for level in model.backbone(torch.ones(1, 3, 128, 128)).values()} == {
            torch.float32
        }


def test_clipping_bounds_the_norm_of_all_gradients():
    parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]
    for p in parameters:
        p.grad = torch.full((2,), 3.0)  # norm 6 together
    how = dict(lr=0.1, betas=(0.9, 0.999), weight_decay=0.01, clip_grad=1.5)
    adamw([{"params": [p]} for p in parameters], **how).step()
    assert torch.stack([p.grad for p in parameters]).norm() == pytest.approx(1.5)


# --- input


@pytest.mark.parametrize("size, square", [(128, 128), (100, 128)])
def test_a_smaller_image_is_padded_to_the_square(toy, size, square):
    toy.model.backbone.square_pad = size
    model = instantiate(toy.model).eval()
    image = torch.full((3, 60, 90), 200, dtype=torch.uint8)
    for batch in ([image], [image, image[:, :50]]):
        images = model.preprocess_image([{"image": i} for i in batch])
        assert images.tensor.shape == (
            len(batch),
            3,
            square,
            square,
        )  # also divisible by 32, the coarsest stride
        assert images.image_sizes == [tuple(i.shape[1:]) for i in batch]
        assert images.tensor[0, :, 60:].abs().max() == 0 and images.tensor[0, :, :, 90:].abs().max() == 0
        assert images.tensor[0, :, :60, :90].abs().min() > 0
    with torch.no_grad():
        maps = model.backbone(images.tensor)
    assert [maps[f"p{k}"].shape[-1] for k in range(2, 7)] == [square // 2**k for k in range(2, 7)]


def test_polygons_and_rles_are_read_and_cropped(toy, coco):
    dicts = coco_dicts(coco, "train", 3, filter_empty=True)
    assert len(dicts) == 5 and len(coco_dicts(coco, "val", 3, filter_empty=False)) == 4
    assert {a["category_id"] for d in dicts for a in d["annotations"]} == {0, 1, 2}
    mapper, kinds = instantiate(toy.dataloader.train.mapper), set()
    np.random.seed(0)
    for d in dicts * 4:
        sample = mapper(d)
        instances, (height, width) = sample["instances"], sample["image"].shape[1:]
        has_rle = any(isinstance(a["segmentation"], dict) for a in d["annotations"])
        kinds.add(type(instances.gt_masks))
        assert type(instances.gt_masks) is (BitMasks if has_rle else PolygonMasks)
        assert max(height, width) <= 128 and len(instances) <= 2  # the crowd is left out
        boxes = instances.gt_boxes.tensor
        assert torch.equal(boxes, instances.gt_masks.get_bounding_boxes().tensor)
        assert (boxes >= 0).all() and (boxes[:, 2] <= width).all() and (boxes[:, 3] <= height).all()
    assert kinds == {BitMasks, PolygonMasks}
    with EventStorage():
        losses = instantiate(toy.model)([mapper(d) for d in dicts])  # both kinds in one batch
    assert set(losses) == {"loss_cls", "loss_box_reg", "loss_mask", "loss_rpn_cls", "loss_rpn_loc"}
    assert all(torch.isfinite(loss) for loss in losses.values())


def test_data_that_is_not_there_or_does_not_fit_is_named(tmp_path, coco, monkeypatch):
    with pytest.raises(UserError, match="instances_train2017.json"):
        coco_dicts(tmp_path, "train", 3, filter_empty=True)
    with pytest.raises(UserError, match="3 categories, but num_classes=80"):
        coco_dicts(coco, "val", 80, filter_empty=False)
    if "DETECTRON2_DATASETS" not in os.environ:  # else it was read when Detectron2 was imported
        monkeypatch.chdir(tmp_path)
        with pytest.raises(UserError, match=r"DETECTRON2_DATASETS"):
            coco_root(None)
        data = write_coco(tmp_path / "datasets" / "coco")
        assert coco_root(None).resolve() == data.resolve()


def test_the_samples_are_those_of_detectron2s_own_reader(toy, coco):
    theirs = filter_images_with_only_crowd_annotations(
        load_coco_json(annotation_file(coco, "train"), coco / "train2017", "fixture")
    )
    ours, mapper = coco_dicts(coco, "train", 3, filter_empty=True), instantiate(toy.dataloader.train.mapper)
    for d in theirs:
        d["annotations"] = [a for a in d["annotations"] if not a["iscrowd"]]
    assert len(ours) == len(theirs) == 5
    for pair in zip(ours, theirs):
        samples = []
        for d in pair:
            np.random.seed(3)
            samples.append(mapper(d))
        mine, other = samples
        assert mine.keys() == other.keys() and torch.equal(mine["image"], other["image"])
        assert torch.equal(mine["instances"].gt_boxes.tensor, other["instances"].gt_boxes.tensor)
        assert torch.equal(mine["instances"].gt_classes, other["instances"].gt_classes)
        area = [x["instances"].gt_masks.area() if hasattr(x["instances"].gt_masks, "area") else x["instances"].gt_masks.tensor.sum()
                for x in samples]  # fmt: skip
        assert area[0].tolist() == area[1].tolist()


def test_a_share_is_the_torchvision_engines(coco):
    for share in (0.2, 0.6, 1.0):
        pictures = read_split(coco, "train", num_classes=3, training=True, share=share).pictures
        assert [d["image_id"] for d in coco_dicts(coco, "train", 3, True, share)] == [p.id for p in pictures]
    assert len(coco_dicts(coco, "train", 3, True, 0.6)) == 3


@pytest.mark.parametrize("workers", [0, 2])
def test_the_mapper_names_an_image_that_cannot_be_used(tmp_path, toy, workers):
    root = write_coco(tmp_path / "coco")
    path = root / "train2017" / "000000000001.png"
    path.write_bytes(path.read_bytes()[:80])
    dicts = coco_dicts(root, "train", 3, filter_empty=True)
    loader = TrainLoader(
        dicts,
        mapper=instantiate(toy.dataloader.train.mapper),
        total_batch_size=1,
        num_workers=workers,
        seed=0,
    )
    epochs = [[batch[0]["image"] for batch in itertools.islice(iter(loader), 5)] for _ in range(2)]
    assert all(map(torch.equal, *epochs))  # another image takes its place, drawn by (seed, position)
    (told,) = loader.skipped.account.files
    assert told.startswith(f"data: {path} cannot be used: ") and "\n" not in told
    for other in path.parent.iterdir():
        other.write_bytes(b"")
    with pytest.raises(UserError, match=r"^data: 16 images in a row cannot be read, the first: [^\n]*$"):
        next(iter(loader))
    dicts = coco_dicts(write_coco(tmp_path / "whole"), "train", 3, filter_empty=True)
    mapper = instantiate(toy.dataloader.test.mapper)
    with pytest.raises(UserError, match="Mismatched image shape .*expect"):
        mapper({**dicts[1], "width": 7})
    with pytest.raises(UserError, match="No such file"):
        mapper({**dicts[1], "file_name": str(tmp_path / "gone.png")})


def test_strange_objects_are_read_as_the_torchvision_engine_reads_them(tmp_path, toy):
    """RLEs of both kinds, a crowd alone, nothing at all, no extent, polygons that leave the image."""
    root = write_coco(tmp_path / "coco", n_train=7)
    content = json.loads(annotation_file(root, "train").read_text())
    by_image = {
        image["id"]: [a for a in content["annotations"] if a["image_id"] == image["id"]]
        for image in content["images"]
    }
    sizes = {image["id"]: (image["width"], image["height"]) for image in content["images"]}
    compressed = coco_api().mask.frPyObjects(rle_of_box(*sizes[2], 3, 4, 20, 10), sizes[2][1], sizes[2][0])
    by_image[2][0].update(
        segmentation={**compressed, "counts": compressed["counts"].decode()}, bbox=[3, 4, 20, 10]
    )
    by_image[3][0].update(segmentation=[[-30, -30, 40, -30, 40, 40, -30, 40]], bbox=[-30, -30, 70, 70])
    by_image[4][0].update(bbox=[5, 5, 0, 9])
    (width, height), outside = sizes[6], [[300, 300, 320, 300, 320, 320]]
    below = [
        [width - 20, height - 10, width + 50, height - 10, width + 50, height + 50, width - 20, height + 50]
    ]
    by_image[6][0].update(segmentation=below, bbox=[width - 20, height - 10, 70, 60])
    by_image[6][1].update(segmentation=outside, bbox=[300, 300, 20, 20])
    for a in by_image[5]:
        a.update(iscrowd=1, segmentation=rle_of_box(*sizes[5], 0, 0, 9, 9))
    annotation_file(root, "train").write_text(json.dumps(content))
    dicts = {d["image_id"]: d for d in coco_dicts(root, "train", 3, filter_empty=True)}
    assert list(dicts) == [1, 2, 3, 4, 6] and len(dicts[4]["annotations"]) == 1
    assert len(coco_dicts(root, "train", 3, filter_empty=False)) == 7
    crop = [T.FixedSizeCrop([200, 200], pad=False)]  # of the whole image
    mapper = CocoMapper(
        is_train=True, augmentations=crop, image_format="RGB", use_instance_mask=True, recompute_boxes=True
    )
    found = {id: mapper(d)["instances"] for id, d in dicts.items()}
    assert (
        found[2].gt_boxes.tensor[0].tolist() == [3, 4, 23, 14]
        and int(found[2].gt_masks.tensor[0].sum()) == 200
    )
    assert found[3].gt_boxes.tensor[0].tolist() == [0, 0, 40, 40]  # clipped, as the torchvision engine does
    assert found[6].gt_boxes.tensor.tolist() == [
        [width - 20, height - 10, width, height]
    ]  # and not at the square of 200
    assert len(dicts[6]["annotations"]) == 1
    jittered = instantiate(toy.dataloader.train.mapper)
    with EventStorage():
        losses = instantiate(toy.model)([jittered(d) for d in dicts.values()])
    assert all(torch.isfinite(loss) for loss in losses.values())


@pytest.mark.parametrize(
    "text, named",
    [("junk", "cannot be read as JSON"), ("[1, 2]", "holds no mapping"), ('{"images": []}', "annotations")],
)
def test_a_file_that_is_no_coco_json_is_named(tmp_path, text, named):
    (tmp_path / "annotations").mkdir()
    (tmp_path / "train2017").mkdir()
    (tmp_path / "annotations" / "instances_train2017.json").write_text(text)
    with pytest.raises(UserError, match=rf"instances_train2017\.json .*{named}"):
        coco_dicts(tmp_path, "train", 5, True)
