"""Runs of the torchvision engine: what they leave, exact resume, bad input, several processes, the command
line."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path

import cv2
import pytest
import torch
from backbone_fixture import ROTARY
from coco_fixture import annotation_file, edit, write_coco
from tool_fixture import load_tool

from det_plugin.coco.annotations import read_split
from det_plugin.protocol import protocol, with_overrides
from det_plugin.run import DetectionRun, first_names, leave_result, run_deviations
from det_plugin.torchvision_engine.folder import (
    classes_of,
    load_checkpoint,
    protocol_of,
    read_config,
)
from det_plugin.torchvision_engine.loader import TrainSamples
from det_plugin.torchvision_engine.train import evaluate_folder, train
from det_plugin.torchvision_engine.trainer import Trainer
from det_plugin.train import choose_engine
from pretrain import checkpoints
from pretrain.build import build_backbone
from pretrain.device import choose_device
from pretrain.errors import Interrupted, UserError
from pretrain.results import read_result, renamed
from pretrain.results.folder import unnamed
from pretrain.results.provenance import config_hash, file_hash
from pretrain.weights import backbone_name, save_backbone

ROOT = Path(__file__).parents[1]
TINY = "vit_tiny_patch16"
FLAGS = dict(depth=2, pos_encoding="field", pos_grid=6, n_registers=1)
RECIPE = with_overrides(
    protocol("coco-12ep", TINY),
    dict(max_iters=4, milestones=(3,), warmup_iters=2, batch_size=2, eval_every=2, image_size_px=64, channels=16,
         box_fc=32, box_convs=1, mask_convs=1, num_classes=3, roi_batch_per_image=16, rpn_pre_nms=(100, 50),
         rpn_post_nms=(50, 20), anchor_sizes_px=(8, 16, 32, 64, 128), detections_per_image=10),
)  # fmt: skip


SHORT = dict(max_iters=2, milestones=(1,), eval_every=2)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_coco(tmp_path_factory.mktemp("data") / "coco")


@pytest.fixture
def make(data, tmp_path):
    """Make a run: ``make("folder", weights=..., max_iters=...)``."""

    def made(folder, **changes):
        own = {field.name: changes.pop(field.name) for field in fields(DetectionRun) if field.name in changes}
        recipe = with_overrides(RECIPE, changes)
        run = DetectionRun(
            TINY, None, data, tmp_path / folder, recipe, device="cpu", workers=0, model_kwargs=FLAGS
        )
        return replace(run, **own)

    return made


def backbone_file(path, seed):
    """A file of ours, as pre-training leaves it."""
    torch.manual_seed(seed)
    vit = build_backbone(TINY, **FLAGS)
    origin = {"method": "intertwined", "effective_epochs": 3.5}
    return save_backbone(path, vit.state_dict(), name=TINY, model_kwargs=vit.model_kwargs, provenance=origin)


def lines(folder):
    """A run's log."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def newest(folder):
    """The directory of a run's newest checkpoint."""
    return checkpoints.whole_directories(folder)[0]


def cut_off(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


# --- what a run leaves ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """A run of 20 iterations from a file of ours, and its settings."""
    folder = tmp_path_factory.mktemp("finished")
    file = backbone_file(folder / "backbone.safetensors", seed=1)
    recipe = with_overrides(RECIPE, dict(max_iters=20, milestones=(15,), eval_every=10, lr=1e-3))
    run = DetectionRun(TINY, file, data, folder / "run", recipe, seed=3, device="cpu", workers=0)
    assert train(run) == folder / "run" / "result.json"
    return run


def test_result(finished):
    result = read_result(finished.output)
    assert (result.kind, result.method, result.effective_epochs, result.seed) == (
        "detection",
        "intertwined",
        3.5,
        3,
    )
    assert result.protocol.label.startswith("coco-12ep, scaled down") and result.weights_hash
    assert result.protocol.deviations["max_iters"] == [22_128, 20]
    for kind in ("box", "mask"):
        assert 0 <= result.metrics[f"{kind}_ap"] <= result.metrics[f"{kind}_ap50"] <= 100
        assert set(result.metrics[f"{kind}_ap_classes"]) <= {"rectangle", "disc", "bar"}
    assert result.wall_time_s > 0 and not unnamed(finished.output, "detection")


def test_metrics_log(finished):
    log = lines(finished.output)
    assert [line["iteration"] for line in log] == list(range(20))
    terms = ("loss_rpn_cls", "loss_rpn_loc", "loss_cls", "loss_box_reg", "loss_mask")
    for line in log:
        assert all(math.isfinite(value) for value in line.values())
        assert line["loss"] == pytest.approx(sum(line[term] for term in terms))
    assert [line["iteration"] for line in log if "box_ap" in line] == [9, 19]
    assert log[-1]["box_ap"] == read_result(finished.output).metrics["box_ap"]
    assert [log[it]["lr"] for it in (0, 2, 15)] == pytest.approx([1e-6, 1e-3, 1e-4])


def test_config_builds_the_network_again(finished):
    config = read_config(finished.output)
    assert protocol_of(config) == finished.protocol
    vit = build_backbone(config["backbone"], None, **config["model_kwargs"])
    assert vit.model_kwargs == {**build_backbone(TINY, **FLAGS).model_kwargs, "mask_tokens": False}
    assert config["data"] == {
        "train_images": 5,
        "category_ids": [3, 7, 90],
        "class_names": ["rectangle", "disc", "bar"],
    }
    assert classes_of(finished.output, config) == {3: "rectangle", 7: "disc", 90: "bar"}
    del config["data"]["category_ids"]  # as a former version left it
    with pytest.raises(UserError, match="config.json holds no category_ids"):
        classes_of(finished.output, config)


def test_figures(finished):
    figures = finished.output / "figures"
    captions = json.loads((figures / "captions.json").read_text())
    assert set(captions) == {"detections.png"} and set(captions["detections.png"]) == {
        "title",
        "caption",
        "cells",
        "legend",
    }
    assert cv2.imread(str(figures / "detections.png")).std() > 10


def test_speed_log(finished):
    log = [json.loads(line) for line in (finished.output / "speed.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in log] == list(range(20))
    assert all(
        line["img_per_s"] > 0 and 0 <= line["data_wait"] <= 1 and line["peak_memory_gb"] > 0.05
        for line in log
    )
    assert list((finished.output / "tensorboard").iterdir())


def test_finished_run_is_left_as_it_is(finished, capsys):
    before = {p: p.stat().st_mtime_ns for p in finished.output.rglob("*") if p.is_file()}
    assert train(finished) == train(finished, resume=True) == finished.output / "result.json"
    assert capsys.readouterr().err.count("nothing to do") == 2
    with pytest.raises(UserError, match=r"holds a run with other settings \(protocol.lr 0.001 -> 0.5\)"):
        train(replace(finished, protocol=with_overrides(finished.protocol, dict(lr=0.5))))
    with pytest.raises(UserError, match="weights_hash"):
        train(replace(finished, weights=backbone_file(finished.output.parent / "other.safetensors", seed=2)))
    with pytest.raises(UserError, match=r"given_kwargs.drop_path None -> 0.3"):  # no part of the network
        train(replace(finished, model_kwargs={"drop_path": 0.3}))
    assert before == {p: p.stat().st_mtime_ns for p in finished.output.rglob("*") if p.is_file()}


def test_evaluation_needs_no_backbone_file(finished, data, monkeypatch):
    monkeypatch.setattr("pretrain.build.read_checkpoint", lambda path: pytest.fail(f"{path} is read"))
    predictions = (finished.output / "predictions.json").read_text()
    metrics = evaluate_folder(finished.output, data, device="cpu", workers=0)
    assert metrics == read_result(finished.output).metrics
    assert (finished.output / "predictions.json").read_text() == predictions
    with pytest.raises(UserError, match="holds no run of the torchvision engine"):
        evaluate_folder(data, data)


# --- resuming ---------------------------------------------------------------------------------------------


def assert_same_run(whole, parts):
    """Bit for bit: weights, optimizer state, log, predictions and result."""
    expected, found = load_checkpoint(whole.output), load_checkpoint(parts.output)
    assert expected["iteration"] == found["iteration"] and expected["terms"] == found["terms"]
    assert all(torch.equal(found["model"][name], value) for name, value in expected["model"].items())
    for index, state in expected["optimizer"]["state"].items():
        assert all(
            torch.equal(found["optimizer"]["state"][index][name], value) for name, value in state.items()
        )
    for name in ("metrics.jsonl", "predictions.json", "config.json"):
        assert (parts.output / name).read_text() == (whole.output / name).read_text(), name
    before, after = read_result(whole.output), read_result(parts.output)
    assert before.metrics == after.metrics and before.config_hash == after.config_hash


@pytest.mark.parametrize("stop, model_kwargs", [(1, FLAGS), (2, FLAGS), (1, ROTARY)])
def test_resumed_equals_uninterrupted(make, stop, model_kwargs):
    """Bit for bit: weights, optimizer state, log and predictions. Two iterations are an evaluation's, one
    is not."""
    whole, parts = make("whole", model_kwargs=model_kwargs), make("parts", model_kwargs=model_kwargs)
    train(whole)
    train(parts, stop_after_it=stop)
    assert not (parts.output / "result.json").exists() and load_checkpoint(parts.output)["iteration"] == stop
    with open(
        parts.output / "metrics.jsonl", "a"
    ) as log:  # what a killed run wrote after its last checkpoint
        log.write('{"iteration": 3, "loss": 1.0}\n{"iterat')
    with pytest.raises(UserError, match="unfinished run; go on with --resume"):
        train(parts)
    train(parts, resume=True)
    assert_same_run(whole, parts)


def test_other_data_are_told_and_gone_on_over_when_asked(make, data, tmp_path, capsys):
    own = Path(shutil.copytree(data, tmp_path / "own"))
    train(make("run", data=own), stop_after_it=1)
    run = make("run", data=own.rename(tmp_path / "moved"))
    train(run, resume=True, stop_after_it=2)
    assert "other data" not in capsys.readouterr().err
    picture, ways = str(next((run.data / "val2017").iterdir())), "set the data back.*--data-changed"
    cv2.imwrite(picture, cv2.imread(picture), [cv2.IMWRITE_PNG_COMPRESSION, 0])
    with pytest.raises(UserError, match=rf"^output: .*\(val: other sizes of files\); {ways}"):
        train(run, resume=True)
    edit(annotation_file(run.data, "train"), lambda content: content["annotations"].pop(0))
    edit(annotation_file(run.data, "train"), lambda content: content["annotations"].pop(0))
    told = "train: 5 images before, 4 now; val: other sizes of files"
    with pytest.raises(UserError, match=told):
        train(run, resume=True)
    train(run, resume=True, stop_after_it=3, data_changed=True)
    assert f"over other data ({told})" in capsys.readouterr().err
    # these are the run's now
    train(run, resume=True)
    assert "other data" not in capsys.readouterr().err
    assert read_result(run.output).protocol.deviations["data"] == ["the same to the end", told]
    shutil.copytree(data / "val2017", run.data / "val2017", dirs_exist_ok=True)
    with pytest.raises(UserError, match="val: other sizes of files"):
        train(run)
    train(run, data_changed=True)
    assert "nothing to do" in capsys.readouterr().err


def test_a_run_of_an_earlier_version_is_compared_by_the_number_of_images(make, data, tmp_path, capsys):
    own = Path(shutil.copytree(data, tmp_path / "own"))
    run = make("run", data=own)
    train(run, stop_after_it=2)
    (run.output / "data.json").unlink()
    edit(annotation_file(own, "train"), lambda content: content["annotations"].pop(5))
    train(run, resume=True, stop_after_it=3)
    assert "at most the number of images is compared" in capsys.readouterr().err
    (run.output / "data.json").unlink()
    edit(annotation_file(own, "train"), lambda content: content["annotations"].clear())
    shutil.copy(annotation_file(data, "val"), annotation_file(own, "train"))
    shutil.copytree(data / "val2017", own / "train2017", dirs_exist_ok=True)
    with pytest.raises(UserError, match="train: 5 images before, 3 now"):
        train(run, resume=True)


def test_a_run_goes_on_in_other_parts(make):
    """With fewer GPUs a batch has more of them; everything else must be as it was."""
    run = make("run", **SHORT)
    train(run, stop_after_it=1)
    with pytest.raises(UserError, match="other settings .seed 0 -> 1"):
        train(replace(run, seed=1), resume=True)
    train(replace(run, accumulate=run.protocol.batch_size), resume=True)
    assert read_result(run.output).protocol == read_result(train(make("whole", **SHORT))).protocol


def test_a_run_saved_under_old_names_goes_on_and_is_evaluated(make, data):
    """As commit 2c21771 left its folders."""
    whole, parts = make("whole"), make("parts")
    train(whole)
    train(parts, stop_after_it=2)
    config = json.loads((parts.output / "config.json").read_text())
    old = {new: old for old, new in renamed.DETECTION.items()}
    config["protocol"] = {old.get(key, key): value for key, value in config["protocol"].items()}
    config |= {"backbone_flags": config.pop("model_kwargs"), "given_flags": config.pop("given_kwargs")}
    (parts.output / "config.json").write_text(json.dumps(config))
    assert protocol_of(read_config(parts.output)) == parts.protocol and "iterations_it" in config["protocol"]
    evaluate_folder(parts.output, data, device="cpu", workers=0)
    with pytest.raises(UserError, match=r"other settings \(protocol.max_iters 4 -> 5\)"):
        train(make("parts", max_iters=5), resume=True)
    train(parts, resume=True)
    assert_same_run(whole, parts)


def test_a_rename_changes_no_config_hash():
    """So that runs of before are seeds of one configuration with those of now."""
    recipe = with_overrides(protocol("coco-12ep", "vit_small_patch16"), {"max_iters": 25_000})
    run = DetectionRun(
        "vit_small_patch16", None, Path("coco"), Path("out"), recipe, model_kwargs={"depth": 2}
    )
    assert (
        config_hash(first_names({**run.settings(), "engine": "torchvision"})) == "40e847843305"
    )  # of commit 2c21771


@pytest.mark.parametrize("moment", [1, 2])
def test_a_signal_saves_and_stops(make, monkeypatch, moment):
    """In the middle of the step; after the second one an evaluation is due, which the resumed run makes up
    for."""
    whole, parts = make("whole"), make("parts")
    train(whole)
    step = Trainer.step

    def signalled(trainer, samples):
        if trainer.iteration == moment - 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        return step(trainer, samples)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", signalled)
        with pytest.raises(Interrupted, match=f"SIGUSR1; saved at iteration {moment}"):
            train(parts)
    assert (
        load_checkpoint(parts.output)["iteration"] == moment
        and not (parts.output / "predictions.json").exists()
    )
    train(parts, resume=True)
    assert_same_run(whole, parts)


def test_killed_and_terminated_processes(make):
    """One is killed without warning (it loses what came after its last checkpoint), the next is asked to
    stop (code 85), the last ends; nothing of it is to be seen in the outcome."""
    changes = dict(max_iters=40, milestones=(30,), eval_every=20)
    whole, parts = make("whole", **changes), make("parts", **changes)
    train(whole)
    words = words_of(parts, "--backbone", TINY, "--resume")
    call = [sys.executable, str(ROOT / "tools" / "train_det.py"), *map(str, words)]
    assert (
        stopped(call, parts, 22, signal.SIGKILL)[0] == -signal.SIGKILL
        and load_checkpoint(parts.output)["iteration"] == 20
    )
    code, said = stopped(call, parts, 28, signal.SIGTERM)
    assert code == 85 and "stopped: SIGTERM; saved at iteration" in said
    assert not (parts.output / "result.json").exists()
    train(parts, resume=True)
    assert_same_run(whole, parts)


def test_a_checkpoint_that_was_cut_off_is_passed_over(make, monkeypatch, capsys):
    """The run goes on from the one before and ends as if nothing had happened; without any whole one it
    stops."""
    whole, run = make("whole"), make("run")
    train(whole)
    train(run, stop_after_it=2)
    with monkeypatch.context() as patch:  # the disk is full: the old checkpoint stays whole
        patch.setattr(
            "pretrain.checkpoints.tensors.save_file",
            lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")),
        )
        with pytest.raises(OSError, match="it_00000004 cannot be written: No space left"):
            train(run, resume=True)
    assert [path.name for path in checkpoints.whole_directories(run.output)] == ["it_00000002"]
    train(run, resume=True, stop_after_it=3)
    assert sorted(p.name for p in newest(run.output).iterdir()) == [
        "manifest.json",
        "meta.json",
        "state.safetensors",
    ]
    cut_off(newest(run.output) / "state.safetensors")
    (newest(run.output).parent / "it_00000009.tmp").mkdir()  # of a process that was killed while it wrote
    train(run, resume=True)
    assert "passed over: checkpoint: " in capsys.readouterr().err
    assert_same_run(whole, run)
    assert sorted(path.name for path in newest(run.output).parent.iterdir()) == ["it_00000003", "it_00000004"]
    (run.output / "result.json").unlink()
    for path in checkpoints.whole_directories(run.output):
        cut_off(path / "meta.json")
    with pytest.raises(
        UserError, match="run has checkpoints, but no whole one; move them away to start anew"
    ):
        train(run, resume=True)


def test_a_checkpoint_of_an_older_version_is_resumed_and_evaluated(make, data):
    """``checkpoint.pt`` as commit 2c21771 wrote it: nested state dicts by torch.save."""
    whole, old = make("whole"), make("old")
    train(whole)
    train(old, stop_after_it=2)
    before = evaluate_folder(old.output, data, device="cpu", workers=0)
    torch.save(load_checkpoint(old.output), old.output / "checkpoint.pt")
    shutil.rmtree(old.output / "checkpoints")
    assert evaluate_folder(old.output, data, device="cpu", workers=0) == before
    with pytest.raises(UserError, match="unfinished run; go on with --resume"):
        train(old)
    train(old, resume=True)
    assert_same_run(whole, old)
    shutil.rmtree(old.output / "checkpoints")
    cut_off(old.output / "checkpoint.pt")
    (old.output / "result.json").unlink()
    with pytest.raises(UserError, match=r"checkpoint.pt is no whole checkpoint"):
        train(old, resume=True)


def test_checkpoints_between_evaluations(make, monkeypatch):
    """A long way from one evaluation to the next, a killed process loses minutes, not hours."""
    saved = []
    monkeypatch.setattr(
        "det_plugin.torchvision_engine.folder.save_checkpoint",
        lambda folder, state: saved.append(state["iteration"]),
    )
    train(make("seldom", eval_every=4))
    monkeypatch.setattr("det_plugin.loop.SAVE_PERIOD_S", -1)
    train(make("often", eval_every=4))
    assert saved == [4, 1, 2, 3, 4]


def test_interrupted_evaluation_is_made_up_for(make, monkeypatch):
    """Killed after the checkpoint, before the evaluation's line; at last after the line, before the
    result."""
    whole, parts = make("whole"), make("parts")
    train(whole)
    for moment in (2, 4):
        with monkeypatch.context() as patch:
            patch.setattr("det_plugin.torchvision_engine.train.evaluate", lambda *_, **__: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                train(parts, resume=True)
        assert load_checkpoint(parts.output)["iteration"] == moment
        if moment == 2:
            train(parts, resume=True, stop_after_it=3)
    with monkeypatch.context() as patch:
        at_the_end = lambda *_, **how: how.get("begins") or 1 / 0  # noqa: E731
        patch.setattr("det_plugin.torchvision_engine.train.leave_result", at_the_end)
        with pytest.raises(ZeroDivisionError):
            train(parts, resume=True)
    train(parts, resume=True)
    assert (parts.output / "metrics.jsonl").read_text() == (whole.output / "metrics.jsonl").read_text()
    assert read_result(parts.output).metrics == read_result(whole.output).metrics


def test_processes_that_see_other_folders_do_not_go_on(make, monkeypatch):
    """Two machines without a shared folder: one would resume, the other begin again."""
    run = make("run")
    train(run, stop_after_it=2)
    monkeypatch.setattr(
        "det_plugin.torchvision_engine.train.gather_objects", lambda mine: [mine, (False, None)]
    )
    with pytest.raises(
        UserError, match="not every process finds the same run in .*; all machines must see one folder"
    ):
        train(run, resume=True)


def test_the_result_needs_no_file_at_the_end(make, tmp_path, monkeypatch):
    """The backbone's file is gone by then; and the CPU was asked for where there is a GPU, so amp was off."""
    file = backbone_file(tmp_path / "backbone.safetensors", seed=1)
    run, expected = replace(make("run"), weights=file, model_kwargs={}), file_hash(file)
    step = Trainer.step
    monkeypatch.setattr(
        Trainer, "step", lambda trainer, samples: (file.unlink(missing_ok=True), step(trainer, samples))[1]
    )

    def on_a_gpu_machine(call):
        def patched(*given, **named):
            with monkeypatch.context() as patch:
                for name, told in (("hardware", {}), ("peak_memory_mib", 1.0)):  # they would ask the GPU
                    patch.setattr(sys.modules["pretrain.results.provenance"], name, lambda told=told: told)
                patch.setattr(torch.cuda, "is_available", lambda: True)
                return call(*given, **named)

        return patched

    for call in (run_deviations, leave_result):
        monkeypatch.setattr(f"det_plugin.torchvision_engine.train.{call.__name__}", on_a_gpu_machine(call))
    result = read_result(train(run).parent)
    assert (result.method, result.effective_epochs, result.weights_hash) == ("intertwined", 3.5, expected)
    assert result.protocol.deviations["amp"] == [True, False]


def test_a_clock_that_is_set_back_takes_no_time_from_a_run(make, monkeypatch):
    clock = iter(range(10**6, 0, -1000))
    monkeypatch.setattr(time, "time", lambda: float(next(clock)))
    assert 0 < read_result(train(make("other"), stop_after_it=None).parent).wall_time_s < 1000


def test_deterministic_mode_is_given_back(make):
    assert not torch.are_deterministic_algorithms_enabled()
    train(make("run"), stop_after_it=1)
    assert not torch.are_deterministic_algorithms_enabled()


# --- one step ---------------------------------------------------------------------------------------------


def test_accumulation_is_the_mean_of_micro_batches(make, data):
    """Two equal micro-batches give the gradient of one; so does the loss."""
    samples = TrainSamples(read_split(data, "train", num_classes=3, training=True), RECIPE, seed=0)
    changes = dict(
        drop_path=0.0, rpn_batch_per_image=100_000, roi_batch_per_image=100_000
    )  # nothing is sampled at random
    one, two = (
        Trainer(make("x", accumulate=n, batch_size=n, **changes), torch.device("cpu")) for n in (1, 2)
    )
    terms = one.step([samples[0]]), two.step([samples[0], samples[0]])
    assert terms[0] == pytest.approx(terms[1], rel=1e-5)
    gradients = {name: p.grad for name, p in one.model.named_parameters()}
    for name, parameter in two.model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-6, rtol=1e-3, msg=name)


def test_scaled_losses_make_the_same_step_and_an_overflow_makes_none(make, data):
    """Loss scaling as float16 has it, with gradients in float32: nothing changes, until they overflow."""
    samples = TrainSamples(read_split(data, "train", num_classes=3, training=True), RECIPE, seed=0)
    batch = [samples[0], samples[1]]
    for changes in ({}, dict(clip_grad=0.01)):
        plain, scaled = (Trainer(make("x", warmup_iters=0, **changes), torch.device("cpu")) for _ in range(2))
        start = {name: p.clone() for name, p in plain.model.named_parameters()}
        scaled.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=2)
        assert plain.step(batch) == scaled.step(batch)
        for name, parameter in scaled.model.named_parameters():
            torch.testing.assert_close(parameter, plain.model.get_parameter(name), atol=1e-7, rtol=1e-5)
        assert any(
            not torch.equal(parameter, start[name]) for name, parameter in scaled.model.named_parameters()
        )
    scaled.scaler = torch.amp.GradScaler("cpu", init_scale=1e38)
    before = {name: p.clone() for name, p in scaled.model.named_parameters()}
    assert math.isfinite(scaled.step(batch)["loss"]) and scaled.iteration == 2
    assert all(torch.equal(p, before[name]) for name, p in scaled.model.named_parameters())
    other = Trainer(make("x"), torch.device("cpu"))
    other.scaler = torch.amp.GradScaler("cpu")
    other.restore(scaled.state())
    assert other.scaler.get_scale() == scaled.scaler.get_scale() == pytest.approx(5e37)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_in_mixed_precision(make, data, dtype):
    """As on a GPU, with the CPU's kernels: the losses are float32's to a few per mille, and float32
    themselves."""
    samples = TrainSamples(read_split(data, "train", num_classes=3, training=True), RECIPE, seed=0)
    plain, mixed = (Trainer(make("x"), torch.device("cpu")) for _ in range(2))
    mixed.amp_dtype, mixed.scaler = dtype, torch.amp.GradScaler("cpu", enabled=dtype is torch.float16)
    seen = []
    mixed.model.register_forward_hook(lambda model, given, losses: seen.extend(losses.values()))
    batch = [samples[0], samples[1]]
    assert mixed.step(batch) == pytest.approx(plain.step(batch), rel=5e-3)
    assert len(seen) == 5 and {loss.dtype for loss in seen} == {torch.float32}


def test_precision_is_the_protocols_on_a_gpu_alone(make):
    assert Trainer(make("x"), torch.device("cpu")).amp_dtype is None
    assert not Trainer(make("x", amp_dtype="bfloat16"), torch.device("cpu")).scaler.is_enabled()


def test_nan_stops_the_run(make, data):
    trainer = Trainer(make("x"), torch.device("cpu"))
    samples = TrainSamples(read_split(data, "train", num_classes=3, training=True), RECIPE, seed=0)
    trainer.step([samples[0], samples[1]])
    with torch.no_grad():
        trainer.model.roi_heads.mask_head.predictor.bias.fill_(math.nan)
    before = trainer.model.backbone.vit.norm.weight.clone()
    with pytest.raises(FloatingPointError, match=r"iteration 1: a loss is no number \(.*loss_mask nan"):
        trainer.step([samples[0], samples[1]])
    assert torch.equal(trainer.model.backbone.vit.norm.weight, before) and trainer.iteration == 1


def test_gradients_are_clipped(make, data):
    samples = TrainSamples(read_split(data, "train", num_classes=3, training=True), RECIPE, seed=0)
    trainer = Trainer(make("x", clip_grad=0.01), torch.device("cpu"))
    trainer.step([samples[0], samples[1]])
    norms = [p.grad.norm() for p in trainer.model.parameters()]
    assert torch.stack(norms).norm().item() == pytest.approx(0.01, rel=1e-3)


# --- bad input --------------------------------------------------------------------------------------------

BAD = [
    (dict(batch_size=3, accumulate=2), "batch_size=3 cannot be shared by 1 processes x accumulate=2"),
    (dict(accumulate=-1), "accumulate=-1"),
    (dict(max_iters=2), r"milestones=\(3,\) must be rising and within max_iters=2"),
    (dict(anchor_sizes_px=(8, 16)), r"anchor_sizes_px=\(8, 16\)"),
    (dict(norm="GN"), "norm='GN'"),
    (dict(num_classes=80), "instances_train2017.json has 3 categories, but num_classes=80"),
    (dict(device="tpu"), "device: 'tpu'"),
    (dict(data=Path("nowhere")), "no file nowhere"),
    (dict(weights=Path("none.safetensors")), "weights: no file none.safetensors"),
    (dict(backbone="vit_huge_patch14"), "vit_huge_patch14"),
]


@pytest.mark.parametrize("changes, message", BAD)
def test_bad_settings_are_named(make, changes, message):
    with pytest.raises(UserError, match=message):
        train(make("out", **changes))
    assert not make("out").output.exists()


def test_splits_must_agree(make, tmp_path):
    root = write_coco(tmp_path / "coco")
    file = annotation_file(root, "val")
    file.write_text(file.read_text().replace('"disc"', '"disk"'))
    with pytest.raises(UserError, match="have different categories"):
        train(make("out", data=root))


def test_cuda_must_be_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == torch.device("cpu")
    with pytest.raises(UserError, match="'cuda' is asked for"):
        choose_device("cuda")


def test_folder_of_another_engine(make):
    run = make("out")
    run.output.mkdir()
    (run.output / "result.json").write_text("{}")
    with pytest.raises(UserError, match="another kind of run"):
        train(run)


# --- the command line -------------------------------------------------------------------------------------


def command(*words, launcher=(sys.executable,), fails=False):
    """Run the tool in a process of its own; what it printed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    call = [*launcher, str(ROOT / "tools" / "train_det.py"), *map(str, words)]
    done = subprocess.run(call, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=300)
    assert (done.returncode != 0) == fails, done.stderr
    return done.stdout + done.stderr


def stopped(call, run, after, number):
    """Start a process, send it a signal once the run's log has so many lines; its exit code and what it
    said."""
    environment, log = {**os.environ, "OMP_NUM_THREADS": "1"}, run.output / "metrics.jsonl"
    process = subprocess.Popen(call, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment)
    while process.poll() is None and not (log.is_file() and len(log.read_text().splitlines()) >= after):
        time.sleep(0.02)
    process.send_signal(number)
    said = process.communicate(timeout=100)[1]
    return process.returncode, said


def words_of(run, *more):
    """A run's settings as a command line."""
    fields = {
        key: new for key, new in vars(run.protocol).items() if new != vars(protocol("coco-12ep", TINY))[key]
    }
    fields["keep_empty"] = run.protocol.keep_empty  # the command's own choice would be another one
    named = [f"{key}={','.join(map(str, v)) if isinstance(v, tuple) else v}" for key, v in fields.items()]
    model_kwargs = [f"backbone.{key}={value}" for key, value in run.model_kwargs.items()]
    base = [
        "--engine",
        "torchvision",
        "--device",
        "cpu",
        "--workers",
        0,
        "--data",
        run.data,
        "--output",
        run.output,
    ]
    return [*base, *more, *named, *model_kwargs]


def test_two_processes_train_stop_go_on_and_evaluate_together(make):
    exhaustive = dict(
        drop_path=0.0, rpn_batch_per_image=100_000, roi_batch_per_image=100_000
    )  # nothing is drawn at random
    run = make("out", max_iters=30, milestones=(), warmup_iters=0, eval_every=30, **exhaustive)
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    words = words_of(run, "--backbone", TINY, "--resume")
    assert (
        stopped([*launcher, str(ROOT / "tools" / "train_det.py"), *map(str, words)], run, 3, signal.SIGTERM)[
            0
        ]
        != 0
    )
    assert 3 <= load_checkpoint(run.output)["iteration"] < 30 and not (run.output / "result.json").exists()
    said = command(*words, launcher=launcher)
    assert said.count("result: ") == 1 and read_result(run.output).hardware["processes"] == 2
    assert [line["iteration"] for line in lines(run.output)] == list(range(30))
    one = Trainer(
        replace(run, accumulate=2), torch.device("cpu")
    )  # their gradients are the mean of two micro-batches
    samples = TrainSamples(read_split(run.data, "train", num_classes=3, training=True), run.protocol, seed=0)
    for it, line in enumerate(lines(run.output)[:3]):
        assert one.step([samples[2 * it], samples[2 * it + 1]]) == pytest.approx(
            {k: line[k] for k in line if k != "iteration"}, rel=1e-3
        )
    alone = evaluate_folder(run.output, run.data, device="cpu", workers=0)  # one process finds what two found
    assert alone == read_result(run.output).metrics


def test_tool_takes_the_name_from_our_file_and_says_the_engine(make, tmp_path, monkeypatch, capsys):
    tool = load_tool("detect")
    file = backbone_file(tmp_path / "backbone.safetensors", seed=1)
    run = replace(make("out", max_iters=1, milestones=(), warmup_iters=1), model_kwargs={})
    tool.main([*map(str, words_of(run, "--weights", file))])
    assert "engine: torchvision (as asked for)" in capsys.readouterr().out
    backbone = read_config(run.output)["backbone"]
    assert backbone == run.backbone and read_result(run.output).weights_hash == file_hash(file)
    with pytest.raises(UserError, match="protocol: seed is no field of it; give it as --seed"):
        tool.main([*map(str, words_of(run, "--weights", file)), "seed=1"])
    tool.main(
        [
            "--engine",
            "auto",
            "--eval-only",
            "--device",
            "cpu",
            "--data",
            str(run.data),
            "--output",
            str(run.output),
        ]
    )
    assert f"engine: torchvision (it trained {run.output})" in capsys.readouterr().out
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_engine("auto", tmp_path)[0] == "torchvision"
    with pytest.raises(UserError, match="backbone: a name is needed"):
        backbone_name(None, None)


def test_tool_ends_bad_input_in_one_line(make, tmp_path):
    said = command(
        "--backbone", TINY, "--data", tmp_path, "--output", tmp_path / "out", "lr=fast", fails=True
    )
    assert said.strip().splitlines()[-1].startswith("error: protocol: lr='fast'") and "Traceback" not in said
