"""Every number of the COCO protocol, written out here, against what runs: the objects after instantiation, of
both engines.

Sources: appendix B.2 of the paper for schedule, batch and learning rate, Detectron2's ViTDet for the rest.
    Nothing is read from
``det_plugin.protocol``: a changed number there fails here.
"""

import importlib.util
import math
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from coco_fixture import CATEGORIES, annotation_file, edit, write_coco
from torch import nn

from det_plugin.augment import evaluation_geometry, jitter
from det_plugin.coco.annotations import Data
from det_plugin.loader import positions
from det_plugin.protocol import protocol
from det_plugin.run import DetectionRun
from det_plugin.torchvision_engine.loader import EvalSamples, TrainSamples
from det_plugin.torchvision_engine.optim import lr_at, set_lr
from det_plugin.torchvision_engine.trainer import Trainer
from pretrain.settings import compared

ROOT = Path(__file__).parents[1]
BACKBONES = {
    "b": ("vit_base_patch16", 768, 3e-4),
    "s": ("vit_small_patch16", 384, 1e-4),
}  # name, width, lr: B.2
# ViT-B as pre-training leaves it, ViT-S as others do: one has a position field, the other a grid.
FLAGS = {"b": dict(pos_encoding="field", n_registers=4, layerscale=1e-5), "s": {}}
LENGTHS = {"12": 22_128, "50": 92_187}
# Iteration (from 0) -> factor on the learning rate; 0.5005 = 0.001 + 0.999 / 2.
FACTORS = {
    "12": {
        0: 0.001,
        125: 0.5005,
        250: 1,
        10_000: 1,
        19_666: 1,
        19_667: 0.1,
        21_305: 0.1,
        21_306: 0.01,
        22_127: 0.01,
    },
    "50": {
        0: 0.001,
        125: 0.5005,
        250: 1,
        22_128: 1,
        81_943: 1,
        81_944: 0.1,
        88_772: 0.1,
        88_773: 0.01,
        92_186: 0.01,
    },
}
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # RGB

has_detectron2 = importlib.util.find_spec("detectron2") is not None
needs_detectron2 = pytest.mark.skipif(
    not has_detectron2, reason="Detectron2 is not installed (it is optional)"
)
detectron2 = pytest.param("detectron2", marks=[needs_detectron2, pytest.mark.detectron2])
ENGINES = ["torchvision", detectron2]
both = pytest.mark.parametrize("engine", ENGINES, scope="module")
sizes = pytest.mark.parametrize("size", ["s", "b"], scope="module")
lengths = pytest.mark.parametrize("length", ["12", "50"])


@dataclass
class Objects:
    """A fine-tuning's objects under the same names, whatever the engine."""

    model: nn.Module
    vit: nn.Module
    pyramid: nn.Module
    optimizer: torch.optim.Optimizer
    prefix: str  # of the ViT's parameters
    source: Any  # the config, or the trainer


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A tiny set that has COCO's number of classes."""
    root = write_coco(tmp_path_factory.mktemp("data") / "coco")
    more = [id for id in range(1, 91) if id not in CATEGORIES][: 80 - len(CATEGORIES)]
    for split in ("train", "val"):
        edit(
            annotation_file(root, split),
            lambda c: c["categories"].extend({"id": id, "name": f"class {id}"} for id in more),
        )
    return root


@pytest.fixture(scope="module")
def built(data):
    """Make each detector once: ``built(engine, size)``, 12 epochs."""
    made: dict[tuple[str, str], Objects] = {}

    def get(engine, size):
        if (engine, size) not in made:
            made[engine, size] = BUILDERS[engine](size, data)
        return made[engine, size]

    return get


def config_of(size, length, **model_kwargs):
    """A config file as the stock launcher reads it."""
    from detectron2.config import LazyConfig

    cfg = LazyConfig.load(str(ROOT / "configs" / "det" / f"mask_rcnn_vit{size}16_coco_{length}ep.py"))
    cfg.model.backbone.net.update(model_kwargs)
    return cfg


def detectron2_objects(size, data):
    from detectron2.config import instantiate

    cfg = config_of(size, "12", **FLAGS[size])
    cfg.dataloader.root = str(data)
    model = instantiate(cfg.model)
    cfg.optimizer.params.model = model
    pyramid = nn.ModuleList(model.backbone.get_submodule(f"simfp_{level}") for level in (2, 3, 4, 5))
    return Objects(
        model, model.backbone.net.vit, pyramid, instantiate(cfg.optimizer), "backbone.net.vit.", cfg
    )


def torchvision_objects(size, data):
    name = BACKBONES[size][0]
    run = DetectionRun(
        name, None, data, data / "out", protocol("coco-12ep", name), device="cpu", model_kwargs=FLAGS[size]
    )
    trainer = Trainer(run, torch.device("cpu"))
    backbone = trainer.model.backbone
    pyramid = nn.ModuleList(backbone.pyramid.get_submodule(f"simfp_{level}") for level in (2, 3, 4, 5))
    return Objects(trainer.model, backbone.vit, pyramid, trainer.optimizer, "backbone.vit.", trainer)


BUILDERS = {"torchvision": torchvision_objects, "detectron2": detectron2_objects}


# --- schedule ---------------------------------------------------------------------------------------------


@both
@sizes
@lengths
def test_learning_rate_of_every_iteration_that_matters(engine, size, length):
    name, _, lr = BACKBONES[size]
    parameter = torch.nn.Parameter(torch.zeros(1))
    if engine == "detectron2":
        from detectron2.config import instantiate
        from detectron2.solver import LRMultiplier

        cfg = config_of(size, length)
        assert cfg.train.max_iter == LENGTHS[length] and cfg.optimizer.lr == lr
        schedule = LRMultiplier(
            torch.optim.AdamW([parameter], cfg.optimizer.lr),
            instantiate(cfg.lr_multiplier),
            cfg.train.max_iter,
        )

        def rate(it):
            schedule.last_epoch = it
            return schedule.get_lr()[0]

    else:
        recipe = protocol(f"coco-{length}ep", name)
        assert recipe.max_iters == LENGTHS[length]
        optimizer = torch.optim.AdamW([dict(params=[parameter], rate=1.0)])

        def rate(it):
            set_lr(optimizer, lr_at(it, recipe))
            return optimizer.param_groups[0]["lr"]

    assert {it: rate(it) / lr for it in FACTORS[length]} == pytest.approx(FACTORS[length], rel=1e-9)
    assert FACTORS[length].keys() >= {0, 250, LENGTHS[length] - 1}


@both
@sizes
@lengths
def test_periods_batch_and_precision(engine, size, length):
    if engine == "detectron2":
        train = config_of(size, length).train
        assert (train.eval_period, train.checkpointer.period, train.amp.enabled) == (5000, 5000, True)
        assert train.init_checkpoint == "" and config_of(size, length).dataloader.train.total_batch_size == 64
    else:
        recipe = protocol(
            f"coco-{length}ep", BACKBONES[size][0]
        )  # a checkpoint is written with each evaluation
        assert (recipe.eval_every, recipe.amp, recipe.amp_dtype, recipe.batch_size) == (
            5000,
            True,
            "float16",
            64,
        )
        assert list(positions(3, recipe.batch_size, 0, 1)) == list(range(192, 256))


@needs_detectron2
@pytest.mark.detectron2
@sizes
def test_50_epochs_differ_in_the_schedule_alone(size):
    from det_plugin.detectron2_engine.saved_config import plain

    assert set(compared(*(plain(config_of(size, length)) for length in ("12", "50")))) == {
        "train.max_iter", "lr_multiplier.scheduler.milestones", "lr_multiplier.scheduler.num_updates",
        "lr_multiplier.warmup_length", "dataloader.evaluator.protocol",
    }  # fmt: skip


@needs_detectron2
@pytest.mark.detectron2
def test_vit_l_has_numbers_of_its_own():
    """ViTDet-L's drop path and layer decay; the stock launcher's file is the protocol, not near it."""
    from det_plugin.detectron2_engine.evaluate import config_deviations

    cfg = config_of("l", "12")
    assert (cfg.model.backbone.net.drop_path, cfg.optimizer.params.layer_decay) == (0.4, 0.8)
    assert (cfg.optimizer.lr, cfg.dataloader.evaluator.version) == (3e-4, 2)
    assert config_deviations(cfg) == {}
    cfg.model.backbone.net.drop_path = 0.1
    assert config_deviations(cfg) == {"model.backbone.net.drop_path": [0.4, 0.1]}


# --- optimizer --------------------------------------------------------------------------------------------

LAYERS = {
    "cls_token": 0, "patch_embed.proj.weight": 0, "patch_embed.proj.bias": 0, "blocks.0.attn.qkv.weight": 1,
    "blocks.0.norm1.weight": 1,
    "blocks.5.mlp.fc1.bias": 6, "blocks.5.attn.proj.weight": 6, "blocks.11.mlp.fc2.weight": 12, "blocks.11.norm2.bias": 12,
    "norm.weight": 13, "norm.bias": 13,
}  # fmt: skip
FIELD = {"reg_token": 0, "pos_field": 0, "cls_pos": 0, "blocks.0.ls1.gamma": 1, "blocks.11.ls2.gamma": 12}
UNDECAYED = {"blocks.0.norm1.weight", "blocks.11.norm2.bias", "norm.weight", "norm.bias", "pos_embed", "pos_field", "cls_pos",
             "blocks.0.ls1.gamma", "blocks.11.ls2.gamma"}  # fmt: skip


@both
@sizes
def test_learning_rate_and_weight_decay_of_named_parameters(engine, size, built):
    """0.7 to the number of layers above; norms, positions and LayerScale do not decay, biases and tokens
    do."""
    objects, lr = built(engine, size), BACKBONES[size][2]
    set_lr(objects.optimizer, lr) if engine == "torchvision" else None
    groups = {id(p): group for group in objects.optimizer.param_groups for p in group["params"]}
    layers = {**LAYERS, **(FIELD if FLAGS[size] else {"pos_embed": 0})}
    for name, layer in layers.items():
        group = groups[id(objects.vit.get_parameter(name))]
        assert group["lr"] == pytest.approx(lr * 0.7 ** (13 - layer), rel=1e-9), name
        assert group["weight_decay"] == (0.0 if name in UNDECAYED else 0.1), name
    rest = [(name, p) for name, p in objects.model.named_parameters() if not name.startswith(objects.prefix)]
    assert len(rest) > 50
    for (
        name,
        parameter,
    ) in rest:  # pyramid and heads: Detectron2 does not count its channel LayerNorm among the norms
        group = groups[id(parameter)]
        assert (group["lr"], group["weight_decay"]) == (pytest.approx(lr), 0.1), name
    assert (
        len(groups)
        == sum(p.requires_grad for p in objects.model.parameters())
        == len(list(objects.model.parameters()))
    )


@both
@sizes
def test_adamw(engine, size, built):
    optimizer = built(engine, size).optimizer
    assert type(optimizer) is torch.optim.AdamW  # and not the one that clips
    for group in optimizer.param_groups:
        assert (tuple(group["betas"]), group["eps"], group["amsgrad"]) == ((0.9, 0.999), 1e-8, False)
    if engine == "torchvision":
        assert built(engine, size).source.protocol.clip_grad == 0


# --- backbone ---------------------------------------------------------------------------------------------


@both
@sizes
def test_backbone(engine, size, built):
    objects, (_, width, _) = built(engine, size), BACKBONES[size]
    vit = objects.vit
    assert (len(vit.blocks), vit.embed_dim, vit.patch_size, vit.n_registers) == (
        12,
        width,
        16,
        4 if FLAGS[size] else 0,
    )
    assert [block.drop_path.rate for block in vit.blocks] == pytest.approx([0.1 * i / 11 for i in range(12)])
    assert all(isinstance(block.ls1, nn.Identity) == (not FLAGS[size]) for block in vit.blocks)
    backbone = objects.model.backbone
    options = (backbone.net if engine == "detectron2" else backbone).options
    assert (options.final_norm, options.keep_special_tokens, options.freeze) == (True, True, False)
    assert (options.window_size, options.global_blocks) == (
        0,
        4,
    )  # 4 is for those who ask for windows (ViTDet)
    if engine == "detectron2":
        shapes = backbone.output_shape()
        assert {key: (s.stride, s.channels) for key, s in shapes.items()} == {
            f"p{i}": (2**i, 256) for i in (2, 3, 4, 5, 6)
        }


def layers_of(module):
    """What a part is made of: (kind, in, out, kernel, stride, bias, norm) of every layer with weights, in
    order."""
    found = []
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            found.append(("fc", layer.in_features, layer.out_features, layer.bias is not None))
        elif isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
            kind = "conv" if isinstance(layer, nn.Conv2d) else "deconv"
            norm = getattr(layer, "norm", None)
            has_norm = norm is not None and not isinstance(norm, nn.Identity)
            numbers = (layer.in_channels, layer.out_channels, layer.kernel_size[0], layer.stride[0])
            found.append((kind, *numbers, layer.bias is not None, has_norm))
            assert layer.padding[0] == (layer.kernel_size[0] // 2 if kind == "conv" else 0)
    return found


def norms_of(module):
    """The norms of a part: channel LayerNorms, and nothing else that could be one."""
    found = [
        m for m in module.modules() if "norm" in type(m).__name__.lower() and type(m).__name__ != "ConvNorm"
    ]
    assert {type(m).__name__ for m in found} <= {"LayerNorm", "LayerNorm2d"} and all(
        m.eps == 1e-6 for m in found
    )
    return len(found)


CONV = ("conv", 256, 256, 3, 1, False, True)


@both
@sizes
def test_pyramid(engine, size, built):
    pyramid, d = built(engine, size).pyramid, BACKBONES[size][1]
    assert layers_of(pyramid) == [
        ("deconv", d, d // 2, 2, 2, True, False), ("deconv", d // 2, d // 4, 2, 2, True, False),
        ("conv", d // 4, 256, 1, 1, False, True), CONV,
        ("deconv", d, d // 2, 2, 2, True, False), ("conv", d // 2, 256, 1, 1, False, True), CONV,
        ("conv", d, 256, 1, 1, False, True), CONV,
        ("conv", d, 256, 1, 1, False, True), CONV,
    ]  # fmt: skip
    assert norms_of(pyramid) == 9  # one between the two deconvolutions
    pools = [m for m in pyramid.modules() if isinstance(m, nn.MaxPool2d)]
    assert [(m.kernel_size, m.stride) for m in pools] == [(2, 2)] and sum(
        isinstance(m, nn.GELU) for m in pyramid.modules()
    ) == 1


# --- proposals --------------------------------------------------------------------------------------------

ANCHORS_32 = [
    (45.254834, 22.627417),
    (32.0, 32.0),
    (22.627417, 45.254834),
]  # width, height at aspect ratios 0.5, 1, 2


@both
@sizes
def test_anchors(engine, size, built):
    rpn = built(engine, size).model
    rpn = rpn.proposal_generator if engine == "detectron2" else rpn.rpn
    if engine == "detectron2":
        cells, strides = list(rpn.anchor_generator.cell_anchors), rpn.anchor_generator.strides
        assert rpn.anchor_generator.offset == 0.0
    else:
        cells, strides = (
            [rpn.anchor_generator.get_buffer(f"cell_{i}") for i in range(5)],
            rpn.anchor_generator.strides,
        )
    assert list(strides) == [4, 8, 16, 32, 64] and len(cells) == 5
    for level, cell in enumerate(cells):
        expected = torch.tensor([(-w, -h, w, h) for w, h in ANCHORS_32]) / 2 * 2**level
        torch.testing.assert_close(cell, expected, atol=1e-4, rtol=0)


@both
@sizes
def test_proposals(engine, size, built):
    model = built(engine, size).model
    if engine == "detectron2":
        rpn = model.proposal_generator
        matcher = rpn.anchor_matcher
        assert (
            matcher.thresholds[1:-1] == [0.3, 0.7]
            and matcher.labels == [0, -1, 1]
            and matcher.allow_low_quality_matches
        )
        assert (rpn.batch_size_per_image, rpn.positive_fraction, rpn.nms_thresh) == (256, 0.5, 0.7)
        assert rpn.pre_nms_topk == {True: 2000, False: 1000} and rpn.post_nms_topk == {
            True: 1000,
            False: 1000,
        }
        assert rpn.loss_weight == {"loss_rpn_cls": 1.0, "loss_rpn_loc": 1.0} and rpn.smooth_l1_beta == 0
        assert (rpn.box_reg_loss_type, rpn.min_box_size, rpn.anchor_boundary_thresh) == ("smooth_l1", 0, -1)
        assert list(rpn.box2box_transform.weights) == [1, 1, 1, 1] and rpn.in_features == [
            "p2",
            "p3",
            "p4",
            "p5",
            "p6",
        ]
        head = rpn.rpn_head
    else:
        rpn = model.rpn
        matcher, sampler = rpn.proposal_matcher, rpn.fg_bg_sampler
        assert (matcher.low_threshold, matcher.high_threshold, matcher.allow_low_quality_matches) == (
            0.3,
            0.7,
            True,
        )
        assert (sampler.batch_size_per_image, sampler.positive_fraction, rpn.nms_thresh) == (256, 0.5, 0.7)
        assert rpn._pre_nms_top_n == {"training": 2000, "testing": 1000} and rpn._post_nms_top_n == {
            "training": 1000,
            "testing": 1000,
        }
        assert rpn.batch_per_image == 256 and list(rpn.box_coder.weights) == [1, 1, 1, 1]
        head = rpn.head
    plain = ("conv", 256, 256, 3, 1, True, False)
    assert layers_of(head) == [
        plain,
        plain,
        ("conv", 256, 3, 1, 1, True, False),
        ("conv", 256, 12, 1, 1, True, False),
    ]


# --- heads ------------------------------------------------------------------------------------------------


@both
@sizes
def test_heads(engine, size, built):
    heads = built(engine, size).model.roi_heads
    if engine == "detectron2":
        box_head, predictor = nn.ModuleList([heads.box_head, heads.box_predictor]), heads.box_predictor
        assert (heads.batch_size_per_image, heads.positive_fraction, heads.num_classes) == (512, 0.25, 80)
        matcher = heads.proposal_matcher
        assert (
            matcher.thresholds[1:-1] == [0.5]
            and matcher.labels == [0, 1]
            and not matcher.allow_low_quality_matches
        )
        assert heads.proposal_append_gt and heads.train_on_pred_boxes is False
        assert list(predictor.box2box_transform.weights) == [10, 10, 5, 5] and predictor.smooth_l1_beta == 0
        assert (predictor.box_reg_loss_type, set(predictor.loss_weight.values())) == ("smooth_l1", {1.0})
        test = predictor.test_score_thresh, predictor.test_nms_thresh, predictor.test_topk_per_image
        assert heads.mask_head.loss_weight == 1.0
    else:
        box_head, sampler, matcher = heads.box_head, heads.fg_bg_sampler, heads.proposal_matcher
        assert (sampler.batch_size_per_image, sampler.positive_fraction) == (512, 0.25)
        assert (matcher.low_threshold, matcher.high_threshold, matcher.allow_low_quality_matches) == (
            0.5,
            0.5,
            False,
        )
        assert list(heads.box_coder.weights) == [10, 10, 5, 5]
        test = heads.score_thresh, heads.nms_thresh, heads.detections_per_img
    assert test == (0.05, 0.5, 100)
    assert layers_of(box_head) == [CONV] * 4 + [
        ("fc", 12_544, 1024, True),
        ("fc", 1024, 81, True),
        ("fc", 1024, 320, True),
    ]
    assert norms_of(box_head) == 4
    deconv, classes = ("deconv", 256, 256, 2, 2, True, False), ("conv", 256, 80, 1, 1, True, False)
    assert layers_of(heads.mask_head) == [CONV] * 4 + [deconv, classes] and norms_of(heads.mask_head) == 4


@both
@sizes
def test_pooling(engine, size, built):
    """7 and 14 bins from levels 4 to 32; RoIAlign is half-pixel aligned, with as many samples as there are
    pixels."""
    heads = built(engine, size).model.roi_heads
    if engine == "detectron2":
        for pooler, side in ((heads.box_pooler, 7), (heads.mask_pooler, 14)):
            assert (pooler.output_size, pooler.canonical_box_size, pooler.canonical_level) == (
                (side, side),
                224,
                4,
            )
            assert [1 / level.spatial_scale for level in pooler.level_poolers] == [4, 8, 16, 32]
            assert all(level.aligned and level.sampling_ratio == 0 for level in pooler.level_poolers)
        assert heads.box_in_features == heads.mask_in_features == ["p2", "p3", "p4", "p5"]
    else:
        for pooler, side in ((heads.box_roi_pool, 7), (heads.mask_roi_pool, 14)):
            assert (pooler.output_size, pooler.strides) == (side, [4, 8, 16, 32])
    maps = [torch.arange(100.0 * 100).view(1, 1, 100, 100).expand(1, 256, -1, -1) * (i + 1) for i in range(4)]
    box = torch.tensor([[10.3, 20.7, 131.1, 141.9]])  # 121 px: level 3, of stride 8 (FPN, equation 1)
    if engine == "detectron2":
        from detectron2.structures import Boxes

        pooled = heads.box_pooler(maps, [Boxes(box)])
    else:
        pooled = heads.box_roi_pool(maps, [box])
    center = (box[0, :2] + box[0, 2:]) / 2 / 8 - 0.5  # half-pixel: the map's pixel 0 is centered on 0.5
    assert pooled[0, 0, 3, 3].item() == pytest.approx(2 * (100 * center[1] + center[0]).item(), rel=1e-4)


# --- pixels -----------------------------------------------------------------------------------------------


@both
@sizes
def test_a_normalized_square_of_1024(engine, size, built):
    model = built(engine, size).model
    image = torch.full((3, 40, 70), 200, dtype=torch.uint8)
    if engine == "detectron2":
        assert model.input_format == "RGB"
        assert model.pixel_mean.flatten().tolist() == pytest.approx(
            MEAN
        ) and model.pixel_std.flatten().tolist() == pytest.approx(STD)
        batch = model.preprocess_image([{"image": image}])
    else:
        assert model.transform.mean.flatten().tolist() == pytest.approx(
            MEAN
        ) and model.transform.std.flatten().tolist() == pytest.approx(STD)
        batch, _ = model.transform([image])
    x = batch.tensor if engine == "detectron2" else batch.tensors
    assert x.shape == (1, 3, 1024, 1024) and list(map(tuple, batch.image_sizes)) == [(40, 70)]
    for channel, (mean, std) in enumerate(zip(MEAN, STD)):
        assert x[0, channel, 39, 69].item() == pytest.approx((200 - mean) / std, rel=1e-5)
    assert (
        x[:, :, 40:].abs().max() == x[:, :, :, 70:].abs().max() == 0
    )  # the padding lies bottom right, after normalization


@needs_detectron2
@pytest.mark.detectron2
@sizes
@lengths
def test_augmentations_of_detectron2(size, length):
    import detectron2.data.transforms as T
    from detectron2.config import instantiate

    cfg = config_of(size, length)
    mapper = instantiate(cfg.dataloader.train.mapper)
    flip, scale, crop = mapper.augmentations.augs
    assert type(flip) is T.RandomFlip and (flip.prob, flip.horizontal, flip.vertical) == (0.5, True, False)
    assert type(scale) is T.ResizeScale
    assert (scale.min_scale, scale.max_scale, scale.target_height, scale.target_width) == (
        0.1,
        2.0,
        1024,
        1024,
    )
    assert type(crop) is T.FixedSizeCrop and (tuple(crop.crop_size), crop.pad) == ((1024, 1024), False)
    assert (
        mapper.is_train
        and mapper.use_instance_mask
        and mapper.recompute_boxes
        and mapper.image_format == "RGB"
    )
    test = instantiate(cfg.dataloader.test.mapper)
    (resize,) = test.augmentations.augs
    assert (
        type(resize) is T.ResizeShortestEdge
        and resize.max_size == 1024
        and set(resize.short_edge_length) == {1024}
    )
    assert not test.is_train and test.image_format == "RGB"


@sizes
def test_augmentations_of_the_torchvision_engine(size):
    """Drawn, not read: half are flipped, the long edge spans 0.1 to 2 times 1024, crops are of 1024 and
    not padded."""
    recipe, rng = protocol("coco-12ep", BACKBONES[size][0]), np.random.default_rng(0)
    drawn = [jitter((640, 480), recipe, rng) for _ in range(4000)]
    assert np.mean([g.flip for g in drawn]) == pytest.approx(0.5, abs=0.03)
    scales = np.array([g.resized[0] for g in drawn]) / 1024
    assert np.histogram(scales, 4, (0.1, 2.0))[0] == pytest.approx(np.full(4, 1000), rel=0.12)  # uniform
    ends = [
        SimpleNamespace(random=lambda: 0.5 - 1e-9, uniform=min),
        SimpleNamespace(random=lambda: 0.5, uniform=max),
    ]
    assert [(g.flip, g.resized) for g in (jitter((640, 480), recipe, end) for end in ends)] == [
        (True, (102, 77)),
        (False, (2048, 1536)),
    ]
    for g in drawn:
        assert g.crop[2:] == (min(g.resized[0], 1024), min(g.resized[1], 1024))
        assert abs(g.resized[1] - g.resized[0] * 0.75) <= 1
    found = [
        evaluation_geometry(source, 1024).resized
        for source in ((640, 480), (480, 640), (2000, 1000), (30, 30))
    ]
    assert found == [(1024, 768), (768, 1024), (1024, 512), (1024, 1024)]


@both
def test_a_batch_is_64_images_of_at_most_1024_px(engine, data):
    name, _, _ = BACKBONES["s"]
    if engine == "detectron2":
        from detectron2.config import instantiate

        cfg = config_of("s", "12")
        cfg.dataloader.root, cfg.dataloader.train.num_workers, cfg.dataloader.test.num_workers = (
            str(data),
            0,
            0,
        )
        images = [sample["image"] for sample in next(iter(instantiate(cfg.dataloader.train)))]
        used = len(instantiate(cfg.dataloader.train.dataset))
        tests = [sample["image"] for batch in instantiate(cfg.dataloader.test) for sample in batch]
    else:
        recipe = protocol("coco-12ep", name)
        splits = Data.read(data, recipe)
        samples = TrainSamples(splits.train, recipe, seed=0)
        images = [samples[i]["image"] for i in positions(0, recipe.batch_size, 0, 1)]
        used = len(splits.train.pictures)
        tests = [EvalSamples(splits.val, recipe.image_size_px)[i]["image"] for i in range(4)]
    assert used == 5  # all that have an object
    assert len(images) == 64 and all(
        image.dtype == torch.uint8 and max(image.shape) <= 1024 for image in images
    )
    assert (
        max(max(image.shape) for image in images) == 1024 and min(max(image.shape) for image in images) < 700
    )
    assert [tuple(image.shape[1:]) for image in tests] == [
        (683, 1024),
        (1024, 683),
        (800, 1024),
        (1024, 1024),
    ]


# --- the cheap protocols ----------------------------------------------------------------------------------


def test_a_tenth_of_coco():
    """12 * ceil(11,800 / 64), the steps after the same shares; all else is that of 12 epochs."""
    for name, frozen in (("coco10pct-12ep", False), ("coco10pct-frozen-12ep", True)):
        p, full = protocol(name, "vit_base_patch16"), protocol("coco-12ep", "vit_base_patch16")
        assert (p.max_iters, p.milestones, p.train_share, p.freeze_backbone) == (
            2_220,
            (1_973, 2_138),
            0.1,
            frozen,
        )
        assert (
            12 * math.ceil(11_800 / 64) == 2_220
            and round(2_220 * 8 / 9) == 1_973
            and round(2_220 * 26 / 27) == 2_138
        )
        own = {"name", "max_iters", "milestones", "train_share"} | (
            {"freeze_backbone", "drop_path"} if frozen else set()
        )
        changed = {key for key in vars(p) if vars(p)[key] != vars(full)[key]}
        assert changed == own and p.drop_path == (0.0 if frozen else 0.1)
