"""Every number of the ADE20K protocol, as a literal, in the objects that mmengine makes of the shipped
configs; and each trap."""

import inspect
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("mmseg")
pytest.importorskip("seg_plugin")  # before anything imports mmseg's models

import mmseg
from ade_fixture import write_ade
from label_set_fixture import write_folder
from mmengine.config import Config
from mmengine.optim import AmpOptimWrapper, OptimWrapper, PolyLR
from mmengine.runner import Runner
from mmseg.datasets.transforms import PhotoMetricDistortion
from mmseg.models.backbones import VisionTransformer
from mmseg.registry import MODELS, TRANSFORMS

from pretrain.errors import UserError
from seg_plugin.config import deviations as config_deviations
from seg_plugin.config import segmenter_config
from seg_plugin.data import PosfieldLabels
from seg_plugin.optim import PosfieldPolyLR
from seg_plugin.protocol import PROTOCOLS, SegmentationProtocol, deviations, protocol, with_overrides

ROOT = Path(__file__).resolve().parents[1]
MIM = Path(mmseg.__file__).parent / ".mim" / "configs"
GRID = [
    (8e-5, 1e-2),
    (8e-5, 1e-4),
    (3e-5, 1e-2),
    (3e-5, 1e-4),
    (1e-5, 1e-2),
    (1e-5, 1e-4),
    (8e-6, 1e-2),
    (8e-6, 1e-4),
]


def instantiate(config, folder):
    """A runner as it is at the first iteration of its training, on six images: what `Runner.train` builds,
    built."""
    data = write_ade(folder / "ADEChallengeData2016")
    before, os.environ["ADE20K"] = os.environ.get("ADE20K"), str(data)
    try:
        cfg = Config.fromfile(ROOT / "configs" / "seg" / f"{config}.py")
    finally:
        os.environ.pop("ADE20K") if before is None else os.environ.update(ADE20K=before)
    cfg.work_dir = str(folder / "run")
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        loader.num_workers, loader.persistent_workers = 0, False  # a training loop starts its own at once
    with (
        pytest.MonkeyPatch.context() as patch
    ):  # no number below depends on the weights, which take most of the time
        patch.setattr(torch.nn.init, "trunc_normal_", lambda tensor, **_: tensor)
        patch.setattr(torch.nn.init, "kaiming_uniform_", lambda tensor, **_: tensor)
        runner = Runner.from_cfg(cfg)
    runner._train_loop = runner.build_train_loop(runner._train_loop)
    runner.optim_wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
    runner.param_schedulers = runner.build_param_scheduler(runner.param_schedulers)
    runner._val_loop = runner.build_val_loop(runner._val_loop)
    runner._test_loop = runner.build_test_loop(runner._test_loop)
    return runner


@pytest.fixture(scope="module", params=[("vits16", 384, 6), ("vitb16", 768, 12)], ids=["ViT-S", "ViT-B"])
def built(request, tmp_path_factory):
    """The runner, the width of its ViT, and its heads."""
    name, width, heads = request.param
    runner = instantiate(f"segmenter_linear_{name}_ade20k_160k", tmp_path_factory.mktemp(name))
    return runner, width, heads


@pytest.fixture(scope="module")
def runner(built):
    return built[0]


def steps(loader):
    """{name: transform} of a loader's pipeline, in its order."""
    return {type(step).__name__: step for step in loader.dataset.pipeline.transforms}


# --- the model


def test_backbone(built):
    runner, width, heads = built
    vit = runner.model.backbone.vit
    assert (len(vit.blocks), vit.embed_dim, vit.patch_size) == (12, width, 16)
    assert {block.attn.num_heads for block in vit.blocks} == {heads}
    assert all(
        p.requires_grad for p in vit.parameters() if p.ndim > 0 and p is not getattr(vit, "pos_field", None)
    )
    rates = [getattr(block.drop_path, "rate", 0.0) for block in vit.blocks]
    assert rates == pytest.approx([0.1 * i / 11 for i in range(12)])  # 0.1 at the last block
    with torch.no_grad():
        (features,) = runner.model.eval().backbone(torch.zeros(1, 3, 64, 48))
    assert features.shape == (1, width, 4, 3)
    assert len(list(vit.norm.parameters())) == 2  # the patch tokens are normed


def test_head_and_loss(built):
    runner, width, _ = built
    head = runner.model.decode_head
    assert (
        type(head).__name__ == "FCNHead"
        and isinstance(head.convs, torch.nn.Identity)
        and head.dropout is None
    )
    assert (
        head.concat_input is False and not hasattr(head, "conv_cat") and not runner.model.with_auxiliary_head
    )
    conv = head.conv_seg
    assert (conv.in_channels, conv.out_channels, conv.kernel_size, conv.bias is not None) == (
        width,
        150,
        (1, 1),
        True,
    )
    assert sum(p.numel() for p in head.parameters()) == 150 * (width + 1)
    assert (head.num_classes, head.ignore_index, head.align_corners) == (150, 255, False)
    loss = head.loss_decode
    assert type(loss).__name__ == "CrossEntropyLoss" and not loss.use_sigmoid and not loss.use_mask
    assert (loss.loss_weight, loss.class_weight, loss.avg_non_ignore, head.sampler) == (
        1.0,
        None,
        False,
        None,
    )
    logits, labels = torch.randn(1, 150, 4, 4), torch.randint(0, 150, (1, 4, 4))
    labels[0, 0] = 255
    plain = torch.nn.functional.cross_entropy(logits, labels, ignore_index=255, reduction="sum") / 16
    torch.testing.assert_close(loss(logits, labels, ignore_index=255), plain)


def test_normalization(runner):
    processor = runner.model.data_preprocessor
    assert processor.mean.flatten().tolist() == pytest.approx([123.675, 116.28, 103.53])
    assert processor.std.flatten().tolist() == pytest.approx([58.395, 57.12, 57.375])
    assert processor.channel_conversion  # BGR, as mmcv reads, to RGB
    assert (processor.size, processor.pad_val, processor.seg_pad_val) == ((512, 512), 0, 255)


def test_sliding_windows(runner):
    test = runner.model.test_cfg
    assert (test.mode, tuple(test.crop_size), tuple(test.stride)) == ("slide", (512, 512), (480, 480))
    seen = []
    model = runner.model
    original, model.encode_decode = (
        model.encode_decode,
        lambda x, metas: seen.append(x.shape[2:]) or x.new_zeros(1, 150, *x.shape[2:]),
    )
    try:
        model.slide_inference(
            torch.zeros(1, 3, 512, 1000),
            [dict(img_shape=(512, 1000), ori_shape=(512, 1000), pad_shape=(512, 1000))],
        )
    finally:
        model.encode_decode = original
    assert [tuple(shape) for shape in seen] == [(512, 512)] * 3  # at 0, 480 and 488: one scale, no flips


# --- the optimizer and its schedule


def test_optimizer(runner):
    wrapper = runner.optim_wrapper
    assert (
        type(wrapper) is OptimWrapper
        and wrapper.clip_grad_kwargs is None
        and wrapper._accumulative_counts == 1
    )
    optimizer = wrapper.optimizer
    assert type(optimizer) is torch.optim.AdamW
    assert all(group["betas"] == (0.9, 0.999) and group["eps"] == 1e-8 for group in optimizer.param_groups)
    assert all(group["lr"] == 8e-5 and not group["amsgrad"] for group in optimizer.param_groups)
    assert runner.auto_scale_lr is None


def test_lr_and_weight_decay_of_named_parameters(runner):
    settings = {
        id(p): (g["lr"], g["weight_decay"])
        for g in runner.optim_wrapper.optimizer.param_groups
        for p in g["params"]
    }
    found = {name: settings[id(p)] for name, p in runner.model.named_parameters() if p.requires_grad}
    assert len(found) == len(settings)
    block = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    decayed = {f"backbone.vit.blocks.{i}.{name}.weight" for i in range(12) for name in block}
    decayed |= {"backbone.vit.patch_embed.proj.weight", "decode_head.conv_seg.weight"}
    assert {name for name, setting in found.items() if setting == (8e-5, 1e-2)} == decayed
    rest = {name for name, setting in found.items() if setting == (8e-5, 0.0)}
    assert rest == set(found) - decayed
    norms = {
        f"backbone.vit.blocks.{i}.norm{k}.{part}"
        for i in range(12)
        for k in (1, 2)
        for part in ("weight", "bias")
    }
    biases = {name.replace(".weight", ".bias") for name in decayed}
    assert rest == norms | biases | {"backbone.vit.norm.weight", "backbone.vit.norm.bias", "backbone.vit.cls_token",
                                     "backbone.vit.pos_embed"}  # fmt: skip


def test_schedule(runner):
    (schedule,) = runner.param_schedulers  # no warm-up, no milestones
    assert (schedule.begin, schedule.end, schedule.by_epoch, schedule.power, schedule.eta_min_ratio) == (
        0,
        160_000,
        False,
        0.9,
        0.1,
    )
    optimizer = runner.optim_wrapper.optimizer
    left = {0: 1.0, 1: 159_998 / 159_999, 80_000: 79_999 / 159_999, 159_999: 0.0}
    for iteration, share in left.items():
        if iteration:
            schedule.last_step = iteration - 1
            schedule.step()
        for group in optimizer.param_groups:
            assert group["lr"] == pytest.approx(8e-6 + (8e-5 - 8e-6) * share**0.9, rel=1e-9)
    assert group["lr"] == pytest.approx(8e-6)
    schedule.last_step = -1
    schedule.step()


def test_loops_and_hooks(runner):
    assert runner.train_loop.max_iters == 160_000 and runner.train_loop.val_interval == 16_000
    hooks = {type(hook).__name__: hook for hook in runner.hooks}
    assert hooks["CheckpointHook"].interval == 2_000 and hooks["CheckpointHook"].by_epoch is False
    assert hooks["ParamSchedulerHook"] and hooks["PosfieldRunHook"] and "EMAHook" not in hooks
    # Read by result.json: one run of the grid, on six images, and no other deviation.
    changed = config_deviations(runner.cfg, {}, processes=1)
    assert changed == {
        "training_images": [20_210, 6],
        "validation_images": [2_000, 3],
        "sweep": ["the best of 8 settings x 2 seeds", "one setting, one seed"],
    }


def test_validation_images_that_are_training_images_are_a_deviation(tmp_path):
    root = write_folder(tmp_path / "flat", 4, 2, flat=True)
    (root / "val.txt").write_text("1000\n2\n")
    recipe = with_overrides(protocol("own-160k"), {"num_classes": 4})
    cfg = Config(segmenter_config(recipe, "vit_tiny_patch16", data_root=root))
    assert config_deviations(cfg, {}, processes=1)["shared_images"] == [0, 1]


# --- the data


def test_training_data(runner):
    loader = runner.train_loop.dataloader
    assert (
        loader.batch_size == 16
        and loader.sampler.shuffle
        and "InfiniteSampler" in {c.__name__ for c in type(loader.sampler).__mro__}
    )
    dataset = loader.dataset
    assert (
        type(dataset) is PosfieldLabels
        and dataset.reduce_zero_label
        and dataset.ignore_index == 255
        and not dataset.test_mode
    )
    assert (dataset.labels.name, len(dataset.metainfo["classes"])) == ("ade20k", 150)
    root = Path(dataset.data_root)
    assert root.name == "ADEChallengeData2016"
    first = dataset[0]["data_samples"]
    assert Path(first.img_path) == root / "images" / "training" / "0000.jpg"
    assert Path(first.seg_map_path) == root / "annotations" / "training" / "0000.png"
    found = steps(loader)
    drawn = ["RandomResize", "RandomCrop", "RandomFlip", "PosfieldDistortion", "PackSegInputs"]
    assert (
        list(found)[-5:] == drawn
        and list(found)[-6] == "PosfieldLoadLabels"
        and not set(drawn) & set(list(found)[:-5])
    )
    resize, crop, flip, distort = (found[name] for name in drawn[:4])
    assert (resize.scale, resize.ratio_range, resize.resize.keep_ratio) == ((2048, 512), (0.5, 2.0), True)
    assert (crop.crop_size, crop.cat_max_ratio, crop.ignore_index) == ((512, 512), 0.75, 255)
    assert (flip.prob, flip.direction) == (0.5, "horizontal")
    assert isinstance(distort, PhotoMetricDistortion)
    assert (distort.brightness_delta, distort.contrast_lower, distort.contrast_upper) == (32, 0.5, 1.5)
    assert (distort.saturation_lower, distort.saturation_upper, distort.hue_delta) == (0.5, 1.5, 18)


@pytest.mark.parametrize("loop", ["val_loop", "test_loop"])
def test_validation_data_and_metric(runner, loop):
    loop = getattr(runner, loop)
    dataset = loop.dataloader.dataset
    assert loop.dataloader.batch_size == 1 and not loop.dataloader.sampler.shuffle
    assert type(dataset) is PosfieldLabels and dataset.reduce_zero_label
    first, root = dataset[0]["data_samples"], Path(dataset.data_root)
    assert Path(first.img_path) == root / "images" / "validation" / "0000.jpg"
    assert Path(first.seg_map_path) == root / "annotations" / "validation" / "0000.png"
    found = steps(loop.dataloader)
    assert (found["Resize"].scale, found["Resize"].keep_ratio) == ((2048, 512), True)
    assert not any(name.startswith("Random") or "Distortion" in name for name in found)
    names = list(found)
    assert names.index("Resize") < names.index("PosfieldLoadLabels")  # masks keep their own size
    (metric,) = loop.evaluator.metrics
    assert (metric.metrics, metric.ignore_index) == (["mIoU"], 255)


def test_what_a_sample_holds(runner):
    """Class k is stored as k + 1; 0 and 255 are ignored; a small image is padded to the crop with ignored
    pixels."""
    sample = runner.train_loop.dataloader.dataset[0]
    batch = runner.model.data_preprocessor(
        {"inputs": [sample["inputs"]], "data_samples": [sample["data_samples"]]}, True
    )
    labels = batch["data_samples"][0].gt_sem_seg.data
    assert tuple(batch["inputs"].shape) == (1, 3, 512, 512) and tuple(labels.shape[-2:]) == (512, 512)
    assert set(labels.unique().tolist()) <= {0, 1, 2, 3, 255}


# --- the sweep, and deviations


def test_the_grid_and_the_numbers_in_one_place():
    full = protocol()
    assert [(lr, wd) for lr in full.lr_grid for wd in full.weight_decay_grid] == GRID and full.seeds == 2
    assert (
        full == SegmentationProtocol() and full.name == "ade20k-160k" and (full.lr, full.weight_decay) in GRID
    )
    assert (full.warmup_iters, full.layer_decay, full.amp, full.decay_all) == (0, 1.0, False, False)


@pytest.mark.parametrize("lr, weight_decay", GRID)
def test_a_point_of_the_grid_is_within_the_protocol(lr, weight_decay):
    run = with_overrides(protocol(), {"lr": str(lr), "weight_decay": str(weight_decay)})
    assert deviations(run) == {}
    cfg = segmenter_config(run, "vit_small_patch16")
    assert cfg["optim_wrapper"]["optimizer"] == dict(
        type="AdamW", lr=lr, betas=(0.9, 0.999), weight_decay=weight_decay
    )


@pytest.mark.parametrize("field", sorted(set(SegmentationProtocol.model_fields) - {"name", "version"}))
def test_every_field_that_differs_is_a_deviation(field):
    value = getattr(protocol(), field)
    if isinstance(value, bool):
        other = not value
    else:
        other = tuple(2 * v for v in value) if isinstance(value, tuple) else 1 + 2 * value
    changed = protocol().model_copy(update={field: other})  # whether or not a run could follow it
    assert deviations(changed) == {field: json.loads(json.dumps([value, other]))}


def test_a_changed_config_cannot_pass_for_the_full_protocol(tmp_path):
    cfg = Config(
        segmenter_config(
            with_overrides(protocol(), dict(lr=3e-5)),
            "vit_tiny_patch16",
            data_root=write_ade(tmp_path / "ade"),
        )
    )
    known = set(config_deviations(cfg, {}, processes=1))
    assert known == {"training_images", "validation_images", "sweep"}
    assert config_deviations(cfg, {}, processes=8)["train_dataloader.batch_size"] == [16, 128]
    cfg.merge_from_dict(
        {"optim_wrapper.type": "AmpOptimWrapper", "train_cfg.max_iters": 20, "model.decode_head.num_convs": 1}
    )
    cfg.val_cfg.fp16 = True
    cfg.custom_hooks.append({"type": "EMAHook"})
    found = config_deviations(cfg, {"depth": 4}, processes=1)
    assert {key: pair for key, pair in found.items() if key not in known} == {
        "hooks.2.type": [None, "EMAHook"],
        "model.decode_head.num_convs": [0, 1],
        "optim_wrapper.type": ["OptimWrapper", "AmpOptimWrapper"],
        "train_cfg.max_iters": [160_000, 20],
        "val_cfg.fp16": [None, True],
        "model_kwargs": [{}, {"depth": 4}],
    }


def test_ones_own_data_are_no_deviation():
    own = with_overrides(protocol("own-160k"), {"num_classes": "7", "reduce_zero_label": "true"})
    assert deviations(own) == {} and deviations(with_overrides(own, dict(lr=1.0))) == {"lr": [8e-5, 1.0]}
    assert set(deviations(with_overrides(protocol(), {"num_classes": "7"}))) == {"num_classes"}


def test_other_data_sets_change_these_numbers_and_no_others():
    changed = {
        name: {k for k, v in vars(protocol(name)).items() if v != vars(protocol())[k]} - {"name"}
        for name in PROTOCOLS
    }
    lengths = {"max_iters", "val_every", "num_classes", "reduce_zero_label"}
    sizes = {"batch_size", "resize_px", "crop_px", "slide_crop_px", "slide_stride_px"}
    assert changed == {"ade20k-160k": set(), "voc2012-40k": lengths, "voc2012aug-40k": lengths, "cityscapes-80k": lengths | sizes,
                       "own-160k": {"num_classes", "reduce_zero_label"}}  # fmt: skip
    city = protocol("cityscapes-80k")
    assert (city.max_iters, city.batch_size, city.resize_px, city.crop_px, city.slide_stride_px, city.num_classes) == (
        80_000, 8, (2048, 1024), 768, 512, 19)  # fmt: skip
    assert (protocol("voc2012-40k").max_iters, protocol("voc2012-40k").num_classes) == (40_000, 21)


def test_the_batch_is_that_of_all_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert segmenter_config(protocol(), "vit_tiny_patch16")["train_dataloader"]["batch_size"] == 2
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError, match="batch_size=16 does not divide among 3 processes"):
        segmenter_config(protocol(), "vit_tiny_patch16")


def test_options_reach_their_objects():
    recipe = with_overrides(
        protocol(), dict(amp=True, clip_grad=3.0, warmup_iters=10, layer_decay=0.7, decay_all=True)
    )
    cfg = segmenter_config(recipe, "vit_small_patch16")
    assert cfg["optim_wrapper"]["type"] == AmpOptimWrapper.__name__ and cfg["optim_wrapper"]["clip_grad"] == {
        "max_norm": 3.0
    }
    assert cfg["optim_wrapper"]["paramwise_cfg"] == {"layer_decay": 0.7, "decay_all": True}
    warmup, decay = cfg["param_scheduler"]
    assert (warmup["type"], warmup["end"], decay["begin"], decay["end"]) == ("LinearLR", 10, 10, 160_000)


@pytest.mark.parametrize(
    "field, value, demand",
    [
        *(
            (field, "0", "should be greater than or equal to 1")
            for field in ("batch_size", "max_iters", "crop_px", "seeds")
        ),
        *(
            (field, "-1", "should be greater than or equal to 0")
            for field in ("hue", "brightness", "warmup_iters")
        ),
        ("contrast", "1.5,0.5", "must be two rising numbers above 0"),
        ("lr_grid", "", "should have at least 1 item"),
        ("weight_decay_grid", "1e-2,0.01", "must be different numbers"),
        ("betas", "0.9,1", "must be from 0 to below 1"),
        ("drop_path", "1", "should be less than 1"),
        ("pixel_std", "0,1,1", "should be greater than 0"),
        ("warmup_iters", "160000", "must be less than max_iters=160000"),
        ("slide_stride_px", "0", "should be greater than or equal to 1"),
        ("slide_stride_px", "513", "must be at most slide_crop_px=512"),
        ("ignore_index", "200", "must be 255 where reduce_zero_label=true"),
    ],
)
def test_impossible_numbers_are_named(field, value, demand):
    with pytest.raises(UserError, match=rf"^protocol: {field}(\[0\])?=.* {demand}"):
        with_overrides(protocol(), {field: value})


def test_a_class_is_not_ignored():
    own = with_overrides(protocol("own-160k"), {"num_classes": "7", "ignore_index": "7"})
    assert segmenter_config(own, "vit_tiny_patch16")["val_evaluator"]["ignore_index"] == 7
    with pytest.raises(UserError, match="ignore_index=6 must be from num_classes=7 to 255"):
        with_overrides(own, dict(ignore_index=6))


def test_the_distortion_is_mmsegs_and_can_be_nothing():
    image = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    none = with_overrides(protocol(), {"hue": "0", "brightness": "0", "contrast": "1,1", "saturation": "1,1"})
    found = []
    for recipe in (protocol(), with_overrides(protocol(), dict(hue=0)), none):
        steps = segmenter_config(recipe, "vit_tiny_patch16")["train_dataloader"]["dataset"]["pipeline"]
        ours = TRANSFORMS.build(next(step for step in steps if "Distortion" in step["type"]))
        np.random.seed(0)
        found.append([ours({"img": image})["img"] for _ in range(16)])
    theirs = PhotoMetricDistortion()
    np.random.seed(0)
    assert all(np.array_equal(theirs({"img": image})["img"], one) for one in found[0])
    assert not all(np.array_equal(image, one) for one in found[1])
    assert all(np.abs(image.astype(int) - one).max() <= 8 for one in found[2])  # to HSV and back, in 8 bits


def test_a_frozen_backbone_is_one_deviation(tmp_path):
    recipe = with_overrides(protocol(), {"freeze_backbone": "true"})
    cfg = Config(segmenter_config(recipe, "vit_tiny_patch16", data_root=write_ade(tmp_path / "ade")))
    model = MODELS.build(cfg.model)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        "decode_head.conv_seg.weight",
        "decode_head.conv_seg.bias",
    }
    found = config_deviations(cfg, {}, processes=1)
    assert {key: pair for key, pair in found.items() if "images" not in key and key != "sweep"} == {
        "freeze_backbone": [False, True]
    }
    cfg.merge_from_dict({"model.backbone.freeze": False})  # as --cfg-options of a launcher
    assert config_deviations(cfg, {}, 1)["model.backbone.freeze"] == [
        True,
        False,
    ]


@pytest.mark.parametrize("name, value", [("num_classes", 255), ("num_classes", 1), ("crop", 3)])
def test_unknown_fields_and_impossible_class_counts_are_named(name, value):
    with pytest.raises(UserError, match=name):
        with_overrides(protocol(), {name: value})


def test_an_unknown_protocol_is_named():
    with pytest.raises(UserError, match="'ade20k-80k' is none of ade20k-160k"):
        protocol("ade20k-80k")


# --- the traps: what MMSegmentation's shipped Segmenter config holds, and ours does not


@pytest.fixture(scope="module")
def shipped():
    return Config.fromfile(MIM / "segmenter" / "segmenter_vit-s_fcn_8xb1-160k_ade20k-512x512.py")


def test_trap_mean_and_std(shipped, runner):
    assert shipped.model.data_preprocessor.mean == shipped.model.data_preprocessor.std == [127.5] * 3
    assert 127.5 not in [
        *runner.model.data_preprocessor.mean.flatten().tolist(),
        *runner.model.data_preprocessor.std.flatten().tolist(),
    ]


def test_trap_sgd(shipped, runner):
    assert shipped.optim_wrapper.optimizer.type == "SGD"
    assert not isinstance(runner.optim_wrapper.optimizer, torch.optim.SGD)


@pytest.mark.parametrize("lr", protocol().lr_grid)
def test_trap_absolute_eta_min(shipped, lr):
    """The lr falls to a tenth of whichever the run has: mmengine's PolyLR with that eta_min. The shipped
    one is above the grid."""
    assert shipped.param_scheduler[0].eta_min > max(protocol().lr_grid)
    n_steps = 50
    ours, theirs = (
        OptimWrapper(torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=lr)) for _ in range(2)
    )
    schedules = [
        PosfieldPolyLR(ours, eta_min_ratio=0.1, power=0.9, begin=0, end=n_steps, by_epoch=False),
        PolyLR(theirs, eta_min=0.1 * lr, power=0.9, begin=0, end=n_steps, by_epoch=False),
    ]
    values = []
    for _ in range(n_steps):
        values.append(ours.param_groups[0]["lr"])
        assert values[-1] == pytest.approx(theirs.param_groups[0]["lr"], rel=1e-9)
        for wrapper, schedule in zip((ours, theirs), schedules):
            wrapper.step()
            schedule.step()
    assert (
        values[0] == lr and values[-1] == pytest.approx(0.1 * lr) and values == sorted(values, reverse=True)
    )


def test_trap_patch_bias(shipped, runner):
    default = inspect.signature(VisionTransformer.__init__).parameters["patch_bias"].default
    assert shipped.model.backbone.get("patch_bias", default) is False
    assert runner.model.backbone.vit.patch_embed.proj.bias is not None


def test_trap_attention_without_sdpa(shipped, runner, monkeypatch):
    """torch's own attention, called once a block; the shipped backbone's goes through
    nn.MultiheadAttention."""
    from mmcv.cnn.bricks.transformer import MultiheadAttention

    config = {**shipped.model.backbone, "num_layers": 1, "init_cfg": None}
    assert any(isinstance(module, MultiheadAttention) for module in MODELS.build(config).modules())
    calls = []
    original = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda *a, **k: calls.append(1) or original(*a, **k),
    )
    with torch.no_grad():
        runner.model.eval().backbone(torch.zeros(1, 3, 32, 32))
    assert len(calls) == 12 and not any(
        isinstance(m, torch.nn.MultiheadAttention) for m in runner.model.modules()
    )


def test_trap_weight_decay_on_norms_biases_and_positions(shipped, runner):
    assert shipped.optim_wrapper.get("paramwise_cfg") is None  # all alike
    decay = {
        id(p): group["weight_decay"]
        for group in runner.optim_wrapper.optimizer.param_groups
        for p in group["params"]
    }
    for name, parameter in runner.model.named_parameters():
        if parameter.requires_grad and (
            "norm" in name or name.endswith("bias") or name.rpartition(".")[2].startswith("pos")
        ):
            assert decay[id(parameter)] == 0, name


def test_trap_a_clash_of_names(runner):
    """mmseg's own VisionTransformer stays what it is."""
    assert MODELS.get("VisionTransformer").__module__.startswith("mmseg.")
    assert MODELS.get("PosfieldViT") is type(runner.model.backbone)


def test_trap_two_ways_to_say_weights(tmp_path):
    with pytest.raises(UserError, match="both given"):
        MODELS.build(dict(type="PosfieldViT", name="vit_tiny_patch16", weights="a.safetensors",
                          init_cfg=dict(type="Pretrained", checkpoint="b.pth")))  # fmt: skip
