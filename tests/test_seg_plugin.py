"""The segmentation plug-in: its numbers, its backbone, MMSegmentation's traps, and whole runs under both launchers."""

import json
import os
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

pytest.importorskip("mmseg")
pytest.importorskip("seg_plugin")  # before anything imports mmseg's models

import mmseg
from ade_fixture import write_ade
from mmengine.config import Config
from mmengine.logging import HistoryBuffer
from mmengine.optim import OptimWrapper, PolyLR, build_optim_wrapper
from mmengine.runner import Runner
from mmengine.utils.dl_utils import mmcv_full_available
from mmseg.datasets import BaseSegDataset
from mmseg.evaluation import IoUMetric
from mmseg.registry import MODELS
from mmseg.utils import register_all_modules

from pretrain.build import build_backbone
from pretrain.errors import UserError
from pretrain.results.schema import read_result
from pretrain.weights import save_backbone
from seg_plugin import compat
from seg_plugin.config import segmenter_config
from seg_plugin.data import CheckLabels, check_masks, class_names, find_root, image_suffix
from seg_plugin.hooks import PosfieldRunHook
from seg_plugin.identity import deviations as config_deviations
from seg_plugin.metric import PosfieldIoU
from seg_plugin.optim import PosfieldPolyLR, param_groups
from seg_plugin.protocol import deviations, protocol, with_overrides
from seg_plugin.run import SegmentationRun, train
from seg_plugin.sweep import sweep

ROOT = Path(__file__).resolve().parents[1]
STOCK_TOOLS = Path(mmseg.__file__).parent / ".mim" / "tools"
TINY = dict(resize_px=(96, 48), crop_px=48, slide_crop_px=48, slide_stride_px=32, num_classes=4, batch_size=2)
FLAGS = dict(depth=2, pos_grid=6)


def tiny(**overrides):
    return with_overrides(protocol(), {**TINY, "iterations_it": 4, "val_interval_it": 4, **overrides})


@pytest.fixture(scope="module", autouse=True)
def mmseg_scope():
    """mmengine looks types up in the library that its current scope names; a Runner sets it by itself."""
    register_all_modules(init_default_scope=True)


@pytest.fixture(scope="module")
def ade(tmp_path_factory):
    return write_ade(tmp_path_factory.mktemp("data") / "ade")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A checkpoint with all that a plain ViT lacks: a position field, registers, LayerScale."""
    torch.manual_seed(0)
    vit = build_backbone("vit_tiny_patch16_reg4", depth=2, pos_encoding="field", pos_grid=10, layerscale=0.1)
    path = tmp_path_factory.mktemp("weights") / "backbone.safetensors"
    provenance = {"method": "posfield", "effective_epochs": 400.0}
    return save_backbone(path, vit.state_dict(), name="vit_tiny_patch16_reg4", flags=vit.flags, provenance=provenance)


@pytest.fixture
def make_run(ade, tmp_path):
    def make(**changes):
        values = dict(data=ade, output=tmp_path / "run", protocol=tiny(), workers=0, device="cpu", backbone_flags=FLAGS)
        return SegmentationRun(**{"backbone": "vit_tiny_patch16", "weights": None, **values, **changes})

    return make


def segmentor(recipe=None, **options):
    return MODELS.build(Config(segmenter_config(recipe or tiny(), "vit_tiny_patch16", **options)).model)


# --- MMSegmentation on mmcv-lite and today's torch


def test_ops_without_extension_say_what_is_missing():
    import mmcv.ops

    assert "mmcv._ext" not in sys.modules and not hasattr(mmcv, "_ext") and not mmcv_full_available()
    with pytest.raises(RuntimeError, match="sigmoid_focal_loss_forward is compiled code"):
        mmcv.ops.sigmoid_focal_loss(torch.rand(2, 3), torch.zeros(2, dtype=torch.long))
    assert mmcv.ops.point_sample(torch.ones(1, 3, 4, 4), torch.full((1, 2, 2), 0.5)).eq(1).any()  # pure Python works


def test_a_full_mmcv_is_left_alone(monkeypatch):
    monkeypatch.setattr(compat.importlib.util, "find_spec", lambda name: object())
    monkeypatch.delitem(sys.modules, "mmcv.ops")
    compat.import_ops_without_extension()
    assert "mmcv.ops" not in sys.modules


def test_mmengine_checkpoints_load_with_weights_only(tmp_path):
    history = HistoryBuffer()
    history.update(1.5)
    torch.save({"scalars": {"loss": history}, "numpy": [np.float64(2.5), np.float32(1), np.int64(3)]}, tmp_path / "ours.pth")
    loaded = torch.load(tmp_path / "ours.pth", weights_only=True)
    assert loaded["scalars"]["loss"].current() == 1.5 and loaded["numpy"] == [2.5, 1, 3]


@pytest.mark.parametrize("foreign", [HistoryBuffer.__init__, os.system, Path("x")])
def test_nothing_else_is_let_in(foreign, tmp_path):
    torch.save({"x": foreign}, tmp_path / "foreign.pth")
    with pytest.raises(Exception, match="Weights only load failed"):
        torch.load(tmp_path / "foreign.pth", weights_only=True)
    assert not any("weights_only=False" in path.read_text() for path in (ROOT / "seg_plugin").glob("*.py"))


# --- The protocol, in the shipped configs and in what they build


@pytest.mark.parametrize("name, width", [("vits16", 384), ("vitb16", 768)])
def test_shipped_configs_hold_the_protocol(name, width, monkeypatch):
    monkeypatch.setenv("ADE20K", "elsewhere/ADEChallengeData2016")
    cfg = Config.fromfile(ROOT / "configs" / "seg" / f"segmenter_linear_{name}_ade20k_160k.py")
    assert cfg.custom_imports.imports == ["seg_plugin"]
    assert (cfg.train_cfg.max_iters, cfg.train_cfg.val_interval) == (160_000, 16_000)
    assert cfg.optim_wrapper.optimizer == dict(type="AdamW", lr=8e-5, betas=(0.9, 0.999), weight_decay=1e-2)
    assert cfg.optim_wrapper.clip_grad is None and cfg.optim_wrapper.paramwise_cfg == dict(layer_decay=1.0, decay_all=False)
    (decay,) = cfg.param_scheduler
    assert (decay.power, decay.eta_min_ratio, decay.begin, decay.end, decay.by_epoch) == (0.9, 0.1, 0, 160_000, False)
    model = cfg.model
    assert model.test_cfg == dict(mode="slide", crop_size=(512, 512), stride=(480, 480))
    assert model.data_preprocessor.mean == [123.675, 116.28, 103.53] and model.data_preprocessor.std == [58.395, 57.12, 57.375]
    assert model.data_preprocessor.bgr_to_rgb and model.data_preprocessor.size == (512, 512)
    assert model.backbone.type == "PosfieldViT" and model.backbone.drop_path == 0.1
    head = model.decode_head
    assert (head.type, head.num_convs, head.concat_input, head.dropout_ratio) == ("FCNHead", 0, False, 0.0)
    assert (head.in_channels, head.channels, head.num_classes, head.ignore_index) == (width, width, 150, 255)
    assert cfg.train_dataloader.batch_size == 16 and cfg.val_dataloader.batch_size == 1
    for loader, split in ((cfg.train_dataloader, "training"), (cfg.val_dataloader, "validation")):
        data = loader.dataset
        assert data.type == "ADE20KDataset" and data.reduce_zero_label and data.data_root == "elsewhere/ADEChallengeData2016"
        assert data.data_prefix == dict(img_path=f"images/{split}", seg_map_path=f"annotations/{split}")
        steps = {step.type: {k: v for k, v in step.items() if k != "type"} for step in data.pipeline}
        assert steps["LoadAnnotations"] == dict(reduce_zero_label=True) and steps["CheckLabels"]["num_classes"] == 150
        if split == "training":
            assert steps["RandomResize"] == dict(scale=(2048, 512), ratio_range=(0.5, 2.0), keep_ratio=True)
            assert steps["RandomCrop"] == dict(crop_size=(512, 512), cat_max_ratio=0.75, ignore_index=255)
            assert steps["RandomFlip"] == dict(prob=0.5) and "PhotoMetricDistortion" in steps
        else:
            assert steps["Resize"] == dict(scale=(2048, 512), keep_ratio=True)
    assert cfg.test_dataloader == cfg.val_dataloader and cfg.model.backbone.weights is None


def test_b3_grid_and_what_departs_from_the_protocol():
    full = protocol()
    assert full.lr_grid == (8e-5, 3e-5, 1e-5, 8e-6) and full.weight_decay_grid == (1e-2, 1e-4) and full.seeds == 2
    assert deviations(with_overrides(full, {"lr": "8e-6", "weight_decay": "1e-4"})) == {}  # a point of the grid
    assert deviations(with_overrides(full, {"lr": "2e-5", "iterations_it": "20"})) == {
        "lr": [8e-5, 2e-5],
        "iterations_it": [160_000, 20],
    }
    for name, value in (("num_classes", 255), ("num_classes", 1), ("crop", 3)):
        with pytest.raises(UserError, match=name):
            with_overrides(full, {name: value})
    with pytest.raises(UserError, match="ade20k-80k"):
        protocol("ade20k-80k")


def test_a_changed_config_cannot_pass_for_the_full_protocol(ade):
    recipe = replace(protocol(), lr=3e-5)
    cfg = Config(segmenter_config(recipe, "vit_tiny_patch16", data_root=ade))
    values = cfg.custom_hooks[0].protocol
    images = {"training_images": [20_210, 6], "validation_images": [2_000, 3]}
    assert config_deviations(cfg, values, {}, processes=1) == images  # the data apart, the full protocol
    assert config_deviations(cfg, values, {}, processes=8)["train_dataloader.batch_size"] == [16, 128]
    cfg.merge_from_dict({"optim_wrapper.type": "AmpOptimWrapper", "train_cfg.max_iters": 20, "model.decode_head.num_convs": 1})
    assert config_deviations(cfg, values, {"depth": 4}, processes=1) == {
        **images,
        "model.decode_head.num_convs": [0, 1],
        "optim_wrapper.type": ["OptimWrapper", "AmpOptimWrapper"],
        "train_cfg.max_iters": [160_000, 20],
        "backbone_flags": [{}, {"depth": 4}],
    }


def test_the_batch_is_that_of_all_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert segmenter_config(protocol(), "vit_tiny_patch16")["train_dataloader"]["batch_size"] == 2
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError, match="batch_size=16 does not divide among 3 processes"):
        segmenter_config(protocol(), "vit_tiny_patch16")


# --- Traps of MMSegmentation's own Segmenter config


@pytest.mark.parametrize("lr", protocol().lr_grid)
def test_trap_absolute_eta_min(lr):
    """The lr falls to a tenth of whichever lr the run has; identical to mmengine's PolyLR with that eta_min."""
    steps = 50
    ours, theirs = (OptimWrapper(torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=lr)) for _ in range(2))
    schedules = [
        PosfieldPolyLR(ours, eta_min_ratio=0.1, power=0.9, begin=0, end=steps, by_epoch=False),
        PolyLR(theirs, eta_min=0.1 * lr, power=0.9, begin=0, end=steps, by_epoch=False),
    ]
    values = []
    for _ in range(steps):
        values.append(ours.param_groups[0]["lr"])
        assert values[-1] == pytest.approx(theirs.param_groups[0]["lr"], rel=1e-9)
        for wrapper, schedule in zip((ours, theirs), schedules):
            wrapper.step()
            schedule.step()
    assert values[0] == lr and values[-1] == pytest.approx(0.1 * lr) and values == sorted(values, reverse=True)


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
    assert {value for name, value in found.items() if name not in weights_without and name.endswith(".weight")} == {1e-4}
    (group,) = param_groups(model, lr=1.0, weight_decay=0.1, decay_all=True)
    assert group["weight_decay"] == 0.1 and len(group["params"]) == len(found)


def test_layer_decay_by_depth(weights):
    model = segmentor(weights=weights)
    groups = param_groups(model, lr=1.0, weight_decay=0.0, layer_decay=0.5)
    rate = {id(p): group["lr"] for group in groups for p in group["params"]}
    found = {name: rate[id(parameter)] for name, parameter in model.named_parameters()}
    vit = "backbone.vit."
    assert {found[vit + name] for name in ("cls_token", "pos_field", "reg_token", "patch_embed.proj.weight")} == {0.125}
    assert found[vit + "blocks.0.attn.qkv.weight"] == 0.25 and found[vit + "blocks.1.ls1.gamma"] == 0.5
    assert found[vit + "norm.weight"] == found["decode_head.conv_seg.weight"] == 1.0


def test_trap_patch_bias_attention_and_normalisation(weights):
    model = segmentor(weights=weights)
    assert model.backbone.vit.patch_embed.proj.bias is not None
    assert {block.attn.backend for block in model.backbone.vit.blocks} == {"sdpa"}
    pixels = torch.tensor([103.53, 116.28, 123.675]).round().byte().view(3, 1, 1).expand(3, 8, 8)  # BGR, the mean colour
    normalised = model.data_preprocessor({"inputs": [pixels]})["inputs"]
    assert normalised.abs().max() < 0.01


# --- The backbone


@pytest.mark.parametrize("way", ["weights", "init_cfg"])
def test_backbone_equals_the_registrys_after_init_weights(way, weights):
    cfg = segmenter_config(tiny(), "vit_tiny_patch16_reg4")["model"]
    said = {"weights": str(weights)} if way == "weights" else {"init_cfg": dict(type="Pretrained", checkpoint=str(weights))}
    cfg["backbone"] = {**cfg["backbone"], "weights": None, **said}
    model = MODELS.build(cfg)
    model.init_weights()
    plain = build_backbone("vit_tiny_patch16_reg4", weights=weights)
    x = torch.randn(2, 3, 48, 64)
    with torch.no_grad():
        (got,) = model.eval().backbone(x)
        torch.testing.assert_close(got, plain.eval().feature_map(x), atol=1e-5, rtol=0)
    assert got.shape == (2, 192, 3, 4)
    assert model.backbone.vit.flags["n_registers"] == 4 and model.backbone.vit.pos_encoding == "field"
    assert model.backbone.vit.blocks[1].drop_path.rate == pytest.approx(0.1)  # a run's flag, beside the file's


def test_two_sources_a_foreign_init_and_a_missing_tensor_are_refused(weights, tmp_path):
    backbone = dict(type="PosfieldViT", name="vit_tiny_patch16", weights=str(weights))
    with pytest.raises(UserError, match="backbone.safetensors.*are both given"):
        MODELS.build({**backbone, "init_cfg": dict(type="Pretrained", checkpoint="other.pth")})
    with pytest.raises(UserError, match="init_cfg can only be"):
        MODELS.build({**backbone, "weights": None, "init_cfg": dict(type="Kaiming", layer="Conv2d")})
    vit = build_backbone("vit_tiny_patch16", **FLAGS)
    state = {key: value for key, value in vit.state_dict().items() if key != "blocks.1.mlp.fc2.bias"}
    path = save_backbone(tmp_path / "cut.safetensors", state, name="vit_tiny_patch16", flags=vit.flags)
    with pytest.raises(UserError, match="missing blocks.1.mlp.fc2.bias"):
        MODELS.build({**backbone, "weights": str(path)})


@pytest.mark.parametrize("size", [(40, 56), (48, 57), (17, 48)])
def test_a_window_that_is_no_multiple_of_the_patch(size):
    """Its logits are exactly those of the padded picture, cropped: each at the pixel where it belongs."""
    model = segmentor(backbone_flags=FLAGS).eval()
    image = torch.randn(1, 3, *size)
    padded = F.pad(image, (0, -size[1] % 16, 0, -size[0] % 16))
    with torch.no_grad():
        whole = model.encode_decode(padded, [dict(img_shape=padded.shape[2:])])
        got = model.encode_decode(image, [dict(img_shape=image.shape[2:])])
        torch.testing.assert_close(got, whole[..., : size[0], : size[1]], atol=1e-5, rtol=0)
        model.test_cfg = Config(dict(mode="slide", crop_size=(512, 512), stride=(480, 480)))
        slid = model.inference(image, [dict(img_shape=size, ori_shape=size)])  # smaller than the window
    torch.testing.assert_close(slid, got, atol=1e-5, rtol=0)
    stretched = F.interpolate(model.decode_head(((model.backbone.vit.feature_map(image)),)), size=size, mode="bilinear")
    assert (stretched - got).abs().max() > 1e-3  # what the head alone would make of the padded map


# --- Data


def test_label_out_of_range_is_named(tmp_path):
    root = write_ade(tmp_path / "ade", n_train=2, n_val=2)
    path = root / "annotations" / "validation" / "0001.png"
    labels = np.array(Image.open(path))
    labels[5, 7], labels[5, 8] = 9, 255
    Image.fromarray(labels).save(path)
    check_masks(root, "training", tiny())
    with pytest.raises(UserError, match=r"0001.png holds label 9, but 4 classes are stored as 1 to 4 \(ignored: 0 and 255\)"):
        check_masks(root, "validation", tiny())
    check_masks(root, "validation", tiny(num_classes=9))
    check = CheckLabels(num_classes=9)
    results = dict(gt_seg_map=labels, seg_map_path="m.png", ori_shape=labels.shape, reduce_zero_label=False)
    with pytest.raises(UserError, match=r"m.png holds label 9, but 9 classes are stored as 0 to 8 \(ignored: 255\)"):
        check(results)
    with pytest.raises(UserError, match="m.png is .* but its image is"):
        check({**results, "ori_shape": (3, 3)})
    Image.fromarray(np.stack([labels] * 3, -1)).save(path)
    with pytest.raises(UserError, match="0001.png has shape .* one channel"):
        check_masks(root, "validation", tiny())


def test_own_folders(ade, tmp_path):
    (tmp_path / "around" / "ADEChallengeData2016").mkdir(parents=True)
    assert find_root(tmp_path / "around").name == "ADEChallengeData2016" and find_root(ade) == ade
    assert image_suffix(ade) == ".jpg"
    assert class_names(ade, 4) == ("class 0", "class 1", "class 2", "class 3") and class_names(ade, 150)[0] == "wall"
    root = write_ade(tmp_path / "own", n_train=2, n_val=2)
    (root / "classes.txt").write_text("sky\nsea\n")
    assert class_names(root, 2) == ("sky", "sea")
    with pytest.raises(UserError, match="classes.txt has 2 different names, but num_classes is 4"):
        class_names(root, 4)
    (root / "annotations" / "training" / "0001.png").unlink()
    with pytest.raises(UserError, match="0001.jpg has no mask .*annotations/training/0001.png"):
        image_suffix(root)
    with pytest.raises(UserError, match="no folder .*images/training"):
        image_suffix(tmp_path)


def test_metric_is_mmsegs_without_its_rounding():
    random = torch.Generator().manual_seed(0)
    pairs = [tuple(torch.randint(0, 4, (9, 11), generator=random) for _ in range(2)) for _ in range(3)]
    pairs[0][1][:2] = 255
    metrics = {}
    for kind in (IoUMetric, PosfieldIoU):
        metric = kind()
        metric.dataset_meta = {"classes": ("a", "b", "c", "d", "never")}
        counts = [IoUMetric.intersect_and_union(predicted, label, 5, 255) for predicted, label in pairs]
        metrics[kind] = metric.compute_metrics(counts)
    assert metric.per_class.keys() == {"a", "b", "c", "d"}
    assert metrics[PosfieldIoU]["mIoU"] == pytest.approx(sum(metric.per_class.values()) / 4)
    assert metrics[PosfieldIoU] == pytest.approx(metrics[IoUMetric], abs=0.006)


# --- Whole runs: our tool


def test_tool_trains_leaves_its_files_and_skips_a_finished_run(ade, weights, tmp_path, capsys):
    tool = runpy.run_path(str(ROOT / "tools" / "train_seg.py"))["main"]
    numbers = [f"{key}={value}" for key, value in {**TINY, "iterations_it": 4, "val_interval_it": 4}.items()]
    words = ["--weights", str(weights), "--data", str(ade), "--output", str(tmp_path)]
    words += ["--workers", "0", "--device", "cpu", "--seed", "3", *numbers]
    tool(words)
    result = read_result(tmp_path)
    assert result.backbone == "vit_tiny_patch16_reg4"  # the file says it
    with pytest.raises(UserError, match="backbone: a name is needed"):
        tool(["--data", str(ade), "--output", str(tmp_path)])
    assert (result.kind, result.method, result.effective_epochs, result.seed) == ("segmentation", "posfield", 400.0, 3)
    assert not result.protocol.full and result.protocol.deviations["iterations_it"] == [160_000, 4]
    assert "backbone_flags" not in result.protocol.deviations and result.weights_hash
    iou = result.metrics["iou"]
    assert 0 < result.metrics["miou"] <= 100 and result.metrics["miou"] == pytest.approx(sum(iou.values()) / len(iou))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [1, 2, 3, 4, 4] and lines[-1]["miou"] == result.metrics["miou"]
    assert lines[0]["lr"] == 8e-5 and lines[3]["lr"] == pytest.approx(8e-6) and lines[3].keys() == {"iteration", "loss", "lr"}
    assert Image.open(tmp_path / "figures" / "segmentations.png").width > 500
    assert json.loads((tmp_path / "figures" / "captions.json").read_text())["segmentations.png"].keys() == {"title", "caption"}

    (tmp_path / "result.json").unlink()  # as if killed between the last checkpoint and the end of its validation
    tool([*words, "--resume"])
    assert read_result(tmp_path).metrics == result.metrics

    before = (tmp_path / "result.json").stat().st_mtime_ns
    tool(words)
    assert "nothing to do" in capsys.readouterr().out and (tmp_path / "result.json").stat().st_mtime_ns == before
    for other, key in ((["lr=1e-5"], "lr"), (["--seed", "4"], "seed")):
        with pytest.raises(UserError, match=f"other settings .*{key}"):
            tool([*words, *other])


def test_interrupted_run_resumes_with_the_images_that_come_next(make_run, monkeypatch):
    """Checkpoint at 2, killed in 3: the images of 3 and 4 are those of a run without a break; no line is there twice."""
    run = make_run(protocol=tiny(val_interval_it=2))
    seen = []
    read = []
    original, prepare = PosfieldRunHook.after_train_iter, BaseSegDataset.prepare_data

    def spy(hook, runner, batch_idx, data_batch=None, outputs=None):
        seen.append((batch_idx, [Path(sample.img_path).name for sample in data_batch["data_samples"]]))
        original(hook, runner, batch_idx, data_batch, outputs)
        if batch_idx == stop_in:
            raise KeyboardInterrupt

    def count(dataset, index):
        read.extend([] if dataset.test_mode or "training" not in dataset.data_prefix["img_path"] else [index])
        return prepare(dataset, index)

    monkeypatch.setattr(PosfieldRunHook, "after_train_iter", spy)
    monkeypatch.setattr(BaseSegDataset, "prepare_data", count)
    stop_in = None
    train(make_run(protocol=tiny(val_interval_it=2), output=run.output.with_name("whole")))
    whole, seen = seen, []
    stop_in = 2
    with pytest.raises(KeyboardInterrupt):
        train(run)
    with pytest.raises(UserError, match=r"unfinished run \(iter_2.pth\).*--resume"):
        train(run)
    interrupted, seen, stop_in = seen, [], None
    read.clear()
    train(run, resume=True)
    assert interrupted == whole[:3] and [batch for batch, _ in seen] == [2, 3] and seen == whole[2:]
    assert len(read) == 2 * 2  # of the two batches that were left: those before were not read again
    lines = [json.loads(line) for line in (run.output / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [1, 2, 2, 3, 4, 4]
    assert read_result(run.output).config_hash == read_result(run.output.with_name("whole")).config_hash


def test_same_seed_same_numbers_and_the_loss_falls(make_run, tmp_path):
    """Also: without a weight file, own classes whose label 0 counts."""
    recipe = tiny(reduce_zero_label=False, num_classes=5, iterations_it=30, val_interval_it=30, lr="1e-3", warmup_it=2)
    logs = []
    for name in ("one", "two"):
        train(make_run(protocol=recipe, output=tmp_path / name))
        logs.append((tmp_path / name / "metrics.jsonl").read_text())
    assert logs[0] == logs[1]
    losses = [json.loads(line)["loss"] for line in logs[0].splitlines()[:-1]]
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:3])
    assert read_result(tmp_path / "one").method == "from scratch"


def test_bad_label_met_by_a_worker_is_one_line(make_run, tmp_path):
    root = write_ade(tmp_path / "ade", n_train=2, n_val=1)
    Image.fromarray(np.full((40, 56), 7, np.uint8)).save(root / "annotations" / "training" / "0000.png")
    with pytest.raises(UserError, match=r"^data: .*training/0000.png holds label 7, but 4 classes are stored as 1 to 4 .*\)$"):
        train(make_run(data=root, workers=1))


def test_nan_stops_the_run_and_says_where(make_run, tmp_path):
    vit = build_backbone("vit_tiny_patch16", **FLAGS)
    vit.norm.weight.data.fill_(torch.nan)
    path = save_backbone(tmp_path / "nan.safetensors", vit.state_dict(), name="vit_tiny_patch16", flags=vit.flags)
    with pytest.raises(FloatingPointError, match="iteration 1: loss is nan, decode.loss_ce is nan"):
        train(make_run(weights=path))


def test_sweep_takes_the_best_mean(make_run, monkeypatch):
    recipe = tiny(iterations_it=1, val_interval_it=1, lr_grid="1e-3, 8e-5", weight_decay_grid="1e-2", batch_size=1)
    run = make_run(protocol=recipe, seed=5)
    with pytest.raises(UserError, match="there is no run 4; the grid has 0 to 3"):
        sweep(run, index=4)
    one = sweep(run, index=3)
    assert one == run.output / "points" / "lr_8e-05_wd_0.01" / "seed_6" / "result.json"
    table = json.loads(sweep(run).read_text())
    assert [(row["lr"], sorted(row["miou"])) for row in table["grid"]] == [(1e-3, ["5", "6"]), (8e-5, ["5", "6"])]
    for row in table["grid"]:
        results = [read_result(run.output / folder) for folder in row["runs"].values()]
        assert row["mean_miou"] == pytest.approx(np.mean([result.metrics["miou"] for result in results]))
        assert len({result.config_hash for result in results}) == 1
    assert table["best"] == max(table["grid"], key=lambda row: row["mean_miou"])
    copied = read_result(run.output / "best" / "seed_5")
    assert copied == read_result(run.output / table["best"]["runs"]["5"])


def test_devices():
    with pytest.raises(UserError, match="device: 'tpu'"), compat.on_device("tpu"):
        pass
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="no CUDA device"), compat.on_device("cuda"):
            pass


# --- Whole runs: MMSegmentation's own launchers, unchanged


def launch(tool, *words, cwd):
    """Run a stock tool in its own process; what it printed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, str(STOCK_TOOLS / tool), *map(str, words)], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def stock(ade, weights, tmp_path_factory):
    """train.py for 20 iterations with weights given on the command line, then without their file: --resume to 25, and test.py."""
    folder = tmp_path_factory.mktemp("stock")
    numbers = {**TINY, "iterations_it": 20, "val_interval_it": 20}
    (folder / "seg.py").write_text(
        "_base_ = []\n"
        "from seg_plugin.config import segmenter_config\n"
        "from seg_plugin.protocol import protocol, with_overrides\n"
        f"globals().update(segmenter_config(with_overrides(protocol(), {numbers}), 'vit_tiny_patch16', workers=0))\n"
    )
    roots = [f"{loader}_dataloader.dataset.data_root={ade}" for loader in ("train", "val", "test")]
    copy = folder / "backbone.safetensors"
    copy.write_bytes(weights.read_bytes())
    launch("train.py", "seg.py", "--work-dir", "run", "--cfg-options", f"model.backbone.weights={copy}", *roots, cwd=folder)
    first = (folder / "run" / "result.json").read_text()
    copy.unlink()
    launch("train.py", "run/seg.py", "--work-dir", "run", "--resume", "--cfg-options", "train_cfg.max_iters=25", cwd=folder)
    tested = launch("test.py", "run/seg.py", "run/iter_25.pth", "--work-dir", "tested", "--out", "tested/masks", cwd=folder)
    return folder, first, tested


def test_stock_train_leaves_the_same_files(stock, weights, tmp_path):
    folder, first, _ = stock
    (tmp_path / "result.json").write_text(first)
    result = read_result(tmp_path)
    assert (result.method, result.effective_epochs, result.backbone) == ("posfield", 400.0, "vit_tiny_patch16")
    assert result.protocol.deviations["iterations_it"] == [160_000, 20] and "train_cfg.max_iters" not in result.protocol.deviations
    assert (folder / "run" / "figures" / "segmentations.png").is_file()
    saved = Config.fromfile(folder / "run" / "seg.py")
    backbone = saved.model.backbone
    assert backbone.weights is None and not saved.resume
    assert (backbone.n_registers, backbone.pos_encoding, backbone.layerscale, backbone.pos_grid) == (4, "field", 0.1, 10)


def test_stock_resume_continues_and_says_so(stock):
    folder, first, _ = stock
    result = read_result(folder / "run")
    assert result.method == "posfield" and result.weights_hash == json.loads(first)["weights_hash"]
    assert result.protocol.deviations["train_cfg.max_iters"] == [20, 25]  # changed on the command line
    assert result.wall_time_s > json.loads(first)["wall_time_s"]
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [*range(1, 21), 20, *range(21, 26), 25]


def test_stock_test_gives_the_runs_metrics(stock):
    folder, _, printed = stock
    (scores,) = [json.loads(path.read_text()) for path in (folder / "tested").glob("*/*.json")]
    assert scores["mIoU"] == pytest.approx(read_result(folder / "run").metrics["miou"], abs=1e-9)
    masks = [np.array(Image.open(path)) for path in sorted((folder / "tested" / "masks").glob("*.png"))]
    assert [mask.shape for mask in masks] == [(40, 56), (56, 40), (40, 56)] and all(1 <= mask.min() for mask in masks)


def test_saved_config_trains_nothing_anew_and_loads_nothing_else(stock, tmp_path):
    """Without the weights' file it would begin at random; and mmengine itself only warns of tensors that do not match."""
    folder, _, _ = stock
    cfg = Config.fromfile(folder / "run" / "seg.py")
    cfg.work_dir = str(tmp_path)
    with pytest.raises(UserError, match="give model.backbone.weights"):
        Runner.from_cfg(cfg).train()
    cfg.model.backbone.n_registers = 0
    cfg.load_from = str(folder / "run" / "iter_25.pth")
    with pytest.raises(UserError, match="left over backbone.vit.reg_token"):
        Runner.from_cfg(cfg).test()


def test_toy_config_fits_the_toy_data(tmp_path, monkeypatch):
    from pretrain.data.toy import CLASSES

    monkeypatch.setenv("TOY_ADE", str(tmp_path))
    cfg = Config.fromfile(ROOT / "configs" / "seg" / "toy.py")
    assert cfg.model.decode_head.num_classes == 1 + len(CLASSES) and cfg.train_cfg.max_iters == 20
    assert cfg.train_dataloader.dataset.metainfo.classes == ("background", *CLASSES)
    assert cfg.train_dataloader.dataset.data_root == str(tmp_path) and "CLASSES" not in cfg
    assert MODELS.build(cfg.model).backbone.vit.flags["depth"] == 4


def test_another_kind_of_runs_folder_is_refused(ade, tmp_path):
    (tmp_path / "result.json").write_text("{}")
    with pytest.raises(UserError, match="another kind of run"):
        train(SegmentationRun("vit_tiny_patch16", None, ade, tmp_path, with_overrides(protocol(), TINY), workers=0, device="cpu"))


def test_a_batch_is_not_shared_with_processes_that_are_not_there(ade, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "2")
    with pytest.raises(UserError, match="SLURM_NTASKS says 2 processes"):
        train(SegmentationRun("vit_tiny_patch16", None, ade, tmp_path, with_overrides(protocol(), TINY), workers=0, device="cpu"))


@pytest.mark.parametrize("field", ["batch_size", "iterations_it", "crop_px", "slide_stride_px"])
def test_impossible_numbers_are_named(field):
    with pytest.raises(UserError, match=f"{field}=0 must be at least 1"):
        segmenter_config(with_overrides(protocol(), {**TINY, field: 0}), "vit_tiny_patch16")
