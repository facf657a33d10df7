"""Whole runs on Detectron2: the stock launcher, our loop, and the result.json that both leave. Skipped where
it is not installed.

``$DETECTRON2_SRC``: Detectron2's source tree, whose stock launcher is run.
"""

import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip(
    "detectron2", reason="Detectron2 is not installed (it is optional: see its INSTALL guide)"
)

from coco_fixture import annotation_file, edit, write_coco
from detectron2.config import LazyConfig, instantiate
from detectron2_fixture import FIELD, ROOT, TINY, TOY, assert_equal, metrics_lines, save_pretrained, toy_run

from det_plugin.detectron2_engine.evaluate import config_deviations
from det_plugin.detectron2_engine.train import evaluate_folder, train
from det_plugin.detectron2_engine.trainer import AccumulatingTrainer
from det_plugin.predict import load_detector
from det_plugin.torchvision_engine.optim import lr_at
from pretrain.build import build_backbone
from pretrain.errors import UserError
from pretrain.results import read_result
from pretrain.results.folder import unnamed

pytestmark = pytest.mark.detectron2


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return save_pretrained(tmp_path_factory.mktemp("weights") / "backbone.safetensors")


def config_file(name):
    return LazyConfig.load(str(ROOT / "configs" / "det" / f"mask_rcnn_{name}.py"))


SCHEDULES = ("coco_12ep", "coco_50ep", "coco10pct_12ep", "coco10pct_frozen_12ep")


@pytest.mark.parametrize("name", [f"vit{size}16_{schedule}" for size in "sb" for schedule in SCHEDULES])
def test_a_full_config_departs_in_nothing_and_an_edited_one_says_so(name):
    cfg = config_file(name)
    its = {"coco-12ep": 22_128, "coco-50ep": 92_187, "coco10pct-12ep": 2_220, "coco10pct-frozen-12ep": 2_220}
    full_it = its[cfg.dataloader.evaluator.protocol]
    assert (
        cfg.dataloader.evaluator.protocol == name.split("16_")[1].replace("_", "-")
        and cfg.train.init_checkpoint == ""
    )
    asked = [
        "dataloader.root=/data",
        "train.output_dir=/out",
        "model.backbone.net.weights=/b.pth",
        "train.seed=4",
    ]
    cfg = LazyConfig.apply_overrides(cfg, [*asked, "train.device=cpu", "dataloader.train.num_workers=0"])
    assert config_deviations(cfg) == {}
    edits = [
        "optimizer.lr=0.5",
        "train.max_iter=100",
        "dataloader.train.mapper.augmentations.0.prob=0",
        "train.more=1",
    ]
    lr = cfg.optimizer.lr
    cfg = LazyConfig.apply_overrides(cfg, [*edits, "model.backbone.net.depth=2"])
    assert config_deviations(cfg) == {
        "optimizer.lr": [lr, 0.5],
        "train.max_iter": [full_it, 100],
        "dataloader.train.mapper.augmentations.0.prob": [0.5, 0],
        "train.more": [None, 1],
        "model_kwargs": [{}, {"depth": 2}],
    }


def test_another_backbone_or_windows_take_one_override_each():
    cfg = LazyConfig.apply_overrides(
        config_file("vits16_coco_12ep"), ["model.backbone.net.name=vit_large_patch16_reg4"]
    )
    assert config_deviations(cfg) == {
        "optimizer.lr": [3e-4, 1e-4]
    }  # the file's rate stays, and the protocol has another for ViT-L
    cfg = LazyConfig.apply_overrides(
        config_file("vitb16_coco_12ep"), ["model.backbone.net.name=vit_large_patch16_reg4"]
    )
    assert config_deviations(cfg) == {}
    cfg = LazyConfig.apply_overrides(cfg, ["model.backbone.net.depth=3"])  # only to build it fast
    model = instantiate(cfg.model)
    assert model.backbone.stages[-1][-2].in_channels == 1024 and model.backbone.net.vit.n_registers == 4
    cfg.optimizer.params.model = model
    rates = sorted({group["lr"] for group in instantiate(cfg.optimizer).param_groups})
    assert rates == pytest.approx([3e-4 * 0.7**k for k in range(4, -1, -1)])
    asked = ["model.backbone.net.window_size=14", "model.backbone.net.global_blocks=2"]
    cfg = LazyConfig.apply_overrides(config_file("vits16_coco_12ep"), asked)
    assert config_deviations(cfg) == {
        "model.backbone.net.window_size": [0, 14],
        "model.backbone.net.global_blocks": [4, 2],
    }
    assert instantiate(cfg.model.backbone.net).options.window_size == 14


def launch(folder, *arguments, until=None):
    """Detectron2's stock launcher, from the repository's root; killed as soon as the file ``until`` is
    there."""
    script = Path(os.environ["DETECTRON2_SRC"]) / "tools" / "lazyconfig_train_net.py"
    command = [
        sys.executable,
        "-W",
        "ignore",
        str(script),
        *map(str, arguments),
        f"train.output_dir={folder}",
    ]
    with open(folder.with_suffix(".said"), "w+") as said:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=said,
            stderr=said,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        try:
            while process.poll() is None and not (until and until.is_file()):
                time.sleep(0.05)
        finally:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        said.seek(0)
        assert process.returncode == (-signal.SIGKILL if until else 0), said.read()[-3000:]


@pytest.mark.skipif(
    "DETECTRON2_SRC" not in os.environ, reason="$DETECTRON2_SRC does not name Detectron2's source tree"
)
def test_the_stock_launcher_trains_resumes_and_evaluates(tmp_path, coco, weights):
    run, file = tmp_path / "run", tmp_path / "backbone.safetensors"
    file.write_bytes(weights.read_bytes())
    asked = [f"dataloader.root={coco}", f"model.backbone.net.weights={file}", "model.roi_heads.num_classes=3"]
    two = ["--num-gpus", "2"]  # processes, on the CPU
    launch(run, "--config-file", TOY, *two, *asked)
    first = read_result(run)
    assert (first.method, first.effective_epochs, first.seed, first.backbone) == ("ours", 3, 0, TINY)
    assert first.metrics.keys() >= {"box_ap", "mask_ap", "box_ap50", "mask_ap75"} and not first.protocol.full
    changed = first.protocol.deviations
    assert changed["max_iters"] == [22_128, 20] and changed["model_kwargs"] == [{}, {"depth": 2}]
    assert {key: pair for key, pair in changed.items() if "." in key} == {
        "model.roi_heads.num_classes": [5, 3]
    }
    whole = torch.load(run / "model_final.pth", weights_only=True)
    state, optimizer = whole["model"], whole["trainer"]["optimizer"]["state"]
    trained = {k.removeprefix("backbone.net.vit."): v for k, v in state.items() if ".net.vit." in k}
    start = build_backbone(TINY, weights=weights).state_dict()
    assert trained.keys() == start.keys() and not torch.equal(
        trained["blocks.1.mlp.fc1.weight"], start["blocks.1.mlp.fc1.weight"]
    )

    killed, resolved = tmp_path / "killed", run / "config_resolved.yaml"
    launch(killed, "--config-file", TOY, *two, *asked, until=killed / "last_checkpoint")
    assert (killed / "last_checkpoint").read_text() == "model_0000009.pth" and not (
        killed / "model_final.pth"
    ).exists()
    file.unlink()  # a run's folder is enough from here on
    launch(killed, "--resume", "--config-file", resolved, *two)
    assert "Starting training from iteration 10" in (killed / "log.txt").read_text()
    again = torch.load(killed / "model_final.pth", weights_only=True)
    assert_equal(again["model"], state), assert_equal(again["trainer"]["optimizer"]["state"], optimizer)
    assert (again["iteration"], read_result(killed).metrics) == (19, first.metrics)
    assert read_result(killed).protocol == first.protocol

    launch(
        tmp_path / "half",
        "--eval-only",
        "--config-file",
        resolved,
        f"train.init_checkpoint={run / 'model_0000009.pth'}",
    )
    half = read_result(tmp_path / "half")
    assert (half.method, half.weights_hash) == (first.method, first.weights_hash)
    assert half.protocol.deviations == {**first.protocol.deviations, "max_iters": [22_128, 10]}


BOXES_ALONE = """from det_plugin.detectron2_engine.lazy import config
from det_plugin.detectron2_engine.saved_config import protocol_in
from det_plugin.protocol import with_overrides
from detectron2.config import LazyConfig

_toy = protocol_in(LazyConfig.load({toy!r}))
_small = dict(max_iters=4, milestones=(3,), eval_every=2, num_classes=3, masks="off", keep_empty=True)
model, train, dataloader, optimizer, lr_multiplier = config(
    with_overrides(_toy, _small), "vit_tiny_patch16", model_kwargs=dict(depth=1), device="cpu", workers=0
).values()
"""


@pytest.mark.skipif(
    "DETECTRON2_SRC" not in os.environ, reason="$DETECTRON2_SRC does not name Detectron2's source tree"
)
def test_the_stock_launcher_learns_boxes_alone(tmp_path):
    """From data without a mask, with an image that has no objects; evaluated, and found by our detector."""
    data, run, file = write_coco(tmp_path / "coco"), tmp_path / "run", tmp_path / "boxes.py"
    for split in ("train", "val"):
        edit(annotation_file(data, split), lambda c: [a.pop("segmentation") for a in c["annotations"]])
    file.write_text(BOXES_ALONE.format(toy=str(TOY)))
    launch(run, "--config-file", file, f"dataloader.root={data}")
    result = read_result(run)
    changed = result.protocol.deviations
    assert (changed["masks"], changed["keep_empty"]) == (["auto", "off"], [False, True])
    assert changed["train_images"] == [117_266, 6] and not any("." in key for key in changed)
    assert "box_ap" in result.metrics and not any("mask" in key for key in result.metrics)
    said = run.with_suffix(".said").read_text()
    assert "loss_box_reg" in said and "loss_mask" not in said
    state = torch.load(run / "model_final.pth", weights_only=True)["model"]
    assert not any("mask_head" in key for key in state)
    found = load_detector(run, "cpu").predict(data / "val2017" / "000000001001.png")
    assert found.masks is None and len(found.boxes) == len(found.scores)
    launch(
        tmp_path / "again",
        "--eval-only",
        "--config-file",
        run / "config_resolved.yaml",
        f"train.init_checkpoint={run / 'model_final.pth'}",
    )
    assert read_result(tmp_path / "again").metrics == result.metrics


def test_our_loop_trains_and_evaluates(tmp_path, coco, weights, capsys):
    folder = tmp_path / "run"
    run = toy_run(folder, coco, weights, amp=True)
    with pytest.raises(UserError, match="3 categories, but num_classes=4"):
        train(toy_run(folder, coco, weights, num_classes=4))  # and leaves the folder free
    path = train(run)
    assert "amp needs CUDA" in capsys.readouterr().err
    result = read_result(path)
    assert (result.method, result.effective_epochs, result.seed) == ("ours", 3, 5)
    assert result.protocol.deviations["amp"] == [True, False] and not any(
        "." in key for key in result.protocol.deviations
    )
    lines = metrics_lines(folder)
    terms, ap = (
        {"loss_cls", "loss_box_reg", "loss_mask", "loss_rpn_cls", "loss_rpn_loc"},
        {"box_ap", "mask_ap", "box_ap50", "mask_ap50"},
    )
    assert [line["iteration"] for line in lines] == [0, 1, 2, 3, 4]
    assert lines[0].keys() == {"iteration", "loss", "lr", *terms} and lines[1].keys() == lines[0].keys() | ap
    assert lines[4].keys() == {"iteration", *ap} and lines[4]["box_ap"] == result.metrics["box_ap"]
    assert lines[0]["loss"] == pytest.approx(sum(lines[0][term] for term in terms))
    assert [line["lr"] for line in lines[:4]] == pytest.approx([lr_at(it, run.protocol) for it in range(4)])
    assert (
        "LRScheduler" in torch.load(folder / "model_final.pth", weights_only=True)["trainer"]["hooks"]
    )  # by its launcher's name
    net = LazyConfig.load(str(folder / "config_resolved.yaml")).model.backbone.net
    assert net.weights is None and {key: net[key] for key in FIELD} == FIELD
    before = path.read_bytes()
    assert not unnamed(folder, "detection")
    assert train(run) == path and path.read_bytes() == before  # it is over: nothing to do
    with pytest.raises(UserError, match=r"other settings \(.*optimizer.lr"):
        train(toy_run(folder, coco, weights, lr=0.5))
    with pytest.raises(UserError, match=r"other settings \(.*train.seed 5 -> 6"):
        train(replace(run, seed=6))


def test_our_loop_resumes_and_evaluates_without_the_file(tmp_path, coco, weights):
    folder, file = tmp_path / "run", tmp_path / "backbone.safetensors"
    file.write_bytes(weights.read_bytes())
    run = toy_run(folder, coco, file)
    result = read_result(train(run))
    whole = torch.load(folder / "model_final.pth", weights_only=True)
    (folder / "result.json").unlink()
    (folder / "last_checkpoint").write_text("model_0000001.pth")  # as if it had been interrupted there
    with pytest.raises(UserError, match="unfinished run; go on with --resume"):
        train(run)
    train(replace(run, accumulate=1), resume=True)  # on more GPUs, a batch has fewer parts
    again = torch.load(folder / "model_final.pth", weights_only=True)
    assert "Starting training from iteration 2" in (folder / "log.txt").read_text()
    assert [line["iteration"] for line in metrics_lines(folder)] == [0, 1, 2, 3, 4]
    assert again["iteration"] == whole["iteration"] == 3
    assert [g["lr"] for g in again["trainer"]["optimizer"]["param_groups"]] == [
        g["lr"] for g in whole["trainer"]["optimizer"]["param_groups"]
    ]
    resumed = read_result(folder)
    assert (resumed.protocol, resumed.config_hash) == (result.protocol, result.config_hash)

    file.unlink()
    (folder / "result.json").unlink()
    again["trainer"]["wall_time_s"] = 1000.0
    torch.save(again, folder / "model_final.pth")
    evaluate_folder(run.output, run.data, device="cpu", workers=0)
    evaluated = read_result(folder)
    assert 1000 < evaluated.wall_time_s < 1100
    assert (evaluated.metrics, evaluated.protocol) == (resumed.metrics, resumed.protocol)
    assert (evaluated.method, evaluated.weights_hash) == (result.method, result.weights_hash)
    with pytest.raises(UserError, match="no config_resolved.yaml"):
        evaluate_folder(tmp_path / "empty", coco)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("amp_dtype", ["float16", "bfloat16"])
def test_our_loop_in_mixed_precision(tmp_path, coco, weights, amp_dtype):
    run = toy_run(tmp_path / "run", coco, weights, amp=True, amp_dtype=amp_dtype)
    result = read_result(train(replace(run, device="cuda")))
    assert "amp" not in result.protocol.deviations and ("amp_dtype" in result.protocol.deviations) == (
        amp_dtype == "bfloat16"
    )
    scaler = torch.load(run.output / "model_final.pth", weights_only=True)["trainer"]["grad_scaler"]
    assert bool(scaler) == (amp_dtype == "float16")


class Line(torch.nn.Module):
    """The mean square of w . x: a loss that is a mean over the batch."""

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))

    def forward(self, batch):
        return {"loss_a": (torch.stack(batch) @ self.w).square().mean(), "loss_b": self.w.square().sum()}


def test_accumulated_parts_equal_one_batch_and_nan_stops_the_run():
    generator = torch.Generator().manual_seed(0)
    batches = [list(torch.randn(4, 3, dtype=torch.float64, generator=generator)) for _ in range(3)]
    ends = []
    for accumulate in (1, 2, 4):
        model = Line()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        parts = [batch[i : i + 4 // accumulate] for batch in batches for i in range(0, 4, 4 // accumulate)]
        AccumulatingTrainer(model, parts, optimizer, accumulate=accumulate, amp=False).train(0, 3)
        ends.append(model.w.detach())
    assert not torch.equal(ends[0], Line().w)
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(ends[2], ends[0], rtol=1e-12, atol=0)
    model = Line()
    broken = [batches[0], batches[0], batches[1], [x * math.nan for x in batches[1]]]
    with pytest.raises(FloatingPointError, match=r"iteration 1: a loss is no number \(loss_a nan, loss_b"):
        AccumulatingTrainer(
            model, broken, torch.optim.SGD(model.parameters(), lr=0.1), accumulate=2, amp=False
        ).train(0, 2)
    assert torch.isfinite(model.w).all()


def test_another_kind_of_runs_folder_is_refused_and_a_bad_val_split_at_once(tmp_path, coco, weights):
    run = toy_run(tmp_path, coco, weights)
    run.output.mkdir(parents=True, exist_ok=True)
    (run.output / "result.json").write_text("{}")
    with pytest.raises(UserError, match="another kind of run"):
        train(run)
    shutil.copytree(coco, tmp_path / "half")
    (tmp_path / "half" / "annotations" / "instances_val2017.json").unlink()
    with pytest.raises(UserError, match=r"instances_val2017\.json"):
        train(replace(run, data=tmp_path / "half", output=tmp_path / "other"))
    assert not (tmp_path / "other").exists()


def test_bad_settings_are_named(tmp_path, coco, weights):
    run = toy_run(tmp_path, coco, weights)
    bad = dict(accumulate=3, device="cuda:9", seed=-1, workers=-1)
    for (key, value), named in zip(
        bad.items(), ("1 processes x accumulate=3", "cuda:9", "seed: -1", "workers: -1")
    ):
        with pytest.raises(UserError, match=named):
            train(replace(run, **{key: value}))
