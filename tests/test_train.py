"""The pre-training run as a user starts it: outputs, exact resume, bad input."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from photos import TINY, last, write_photos
from tool_fixture import ended

from pretrain.build import build_backbone
from pretrain.checkpoints import newest
from pretrain.cli import REQUEUE_CODE
from pretrain.config import load_config
from pretrain.errors import UserError
from pretrain.results.folder import unnamed
from pretrain.results.schema import read_result
from pretrain.train import train
from pretrain.trainer import Trainer
from pretrain.weights import read_checkpoint

ROOT = Path(__file__).resolve().parents[1]


def settings(tmp_path, output="run", *extra):
    return load_config(
        None, last([*TINY, f"data.root={tmp_path / 'photos'}", f"run.output={tmp_path / output}", *extra])
    )


def newest_of(folder):
    """The newest checkpoint of a run."""
    found, messages = newest(folder)
    assert found is not None and messages == []
    return found


def tool(*arguments, code):
    """Run tools/train_ssl.py as a user; returns its stderr."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "tools" / "train_ssl.py"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == code, done.stderr
    return done.stderr


@pytest.fixture
def photos(tmp_path):
    torch.set_num_threads(1)
    return write_photos(tmp_path / "photos")


def test_resume_is_bit_for_bit(tmp_path, photos):
    """6 iterations straight equal 3, resume, 3: weights, optimizer, centers and logs."""
    straight, parts = settings(tmp_path, "straight"), settings(tmp_path, "parts")
    train(straight)
    train(parts, stop_after=3)
    assert not (tmp_path / "parts" / "result.json").exists()
    with open(tmp_path / "parts" / "metrics.jsonl", "a") as log:
        log.write('{"iteration": 3, "loss": 1.0}\n{"iter')  # what an interruption after the checkpoint leaves
    train(parts, resume="auto")
    a, b = (newest_of(tmp_path / run) for run in ("straight", "parts"))
    assert a.iteration == b.iteration == 6
    one, two = a.tensors(), b.tensors()
    assert one.keys() == two.keys() and any("exp_avg_sq" in key for key in one)
    assert all(torch.equal(one[key], two[key]) for key in one)
    logs = [(tmp_path / run / "metrics.jsonl").read_bytes() for run in ("straight", "parts")]
    assert logs[0] == logs[1] and len(logs[0].splitlines()) == 6
    files = [(tmp_path / run / "backbone.safetensors").read_bytes() for run in ("straight", "parts")]
    assert len(files[0]) == len(files[1])
    states = [read_checkpoint(tmp_path / run / "backbone.safetensors").state for run in ("straight", "parts")]
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])


def test_a_run_leaves_its_backbone_and_result(tmp_path, photos):
    folder = train(settings(tmp_path, "run", "log.tensorboard=true", "run.name=mine"))
    result = read_result(folder)
    assert (result.kind, result.method, result.backbone) == ("pretrain", "mine", "vit_tiny_patch16")
    assert result.effective_epochs == pytest.approx(3 * (2 * (64 / 224) ** 2 + 2 * (32 / 224) ** 2), abs=0.01)
    assert set(result.metrics) == {
        *(
            "loss",
            "image",
            "content",
            "position",
            "koleo",
            "grad_norm",
            "img_per_s",
            "n_skipped",
            "broken_images",
        ),
        *("teacher_entropy", "mean_entropy", "feature_std", "effective_rank"),
        *("position_entropy", "position_explained"),
    }
    tensors = newest_of(folder).tensors()
    teacher = {
        k.removeprefix("method.teacher.backbone."): v
        for k, v in tensors.items()
        if k.startswith("method.teacher.backbone.")
    }
    student = {
        k.removeprefix("method.student.backbone."): v
        for k, v in tensors.items()
        if k.startswith("method.student.backbone.")
    }
    backbone = build_backbone("vit_tiny_patch16", weights=folder / "backbone.safetensors")
    assert all(torch.equal(value, teacher[key]) for key, value in backbone.state_dict().items())
    assert any(not torch.equal(value, student[key]) for key, value in backbone.state_dict().items())
    assert {"pos_field", "cls_pos"} <= set(backbone.state_dict()) and backbone.model_kwargs["depth"] == 2
    said = read_checkpoint(folder / "backbone.safetensors").provenance
    assert said["method"] == "mine" and said["position_masks"] is True
    assert list((folder / "tensorboard").iterdir()) and not unnamed(folder, "pretrain")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == list(range(6))
    assert lines[3]["loss"] == pytest.approx(
        sum(lines[3][k] for k in ("image", "content", "position", "koleo")), rel=1e-5
    )


def test_a_finished_run_is_left_alone_and_another_runs_folder_refused(tmp_path, photos, capsys):
    folder = train(settings(tmp_path))
    before = newest_of(folder).path.stat().st_mtime_ns
    train(settings(tmp_path), resume="auto")
    assert "finished" in capsys.readouterr().err and newest_of(folder).path.stat().st_mtime_ns == before
    with pytest.raises(UserError, match="already holds a run"):
        train(settings(tmp_path))
    with pytest.raises(UserError, match=r"optim\.base_lr"):
        train(settings(tmp_path, "run", "optim.base_lr=1.0"), resume="auto")
    (newest_of(folder).path / "meta.json").write_bytes(b"half a file")
    with pytest.raises(UserError, match=r"no whole one"):
        train(settings(tmp_path), resume="auto")


def test_resume_takes_the_newest_whole_checkpoint_and_names_the_broken_ones(tmp_path, photos, capsys):
    """The run ends as an uninterrupted one, whichever checkpoint it goes on from."""
    often = ("log.checkpoint_every=2", "log.keep_checkpoints=9")
    straight = train(settings(tmp_path, "straight", *often))
    folder = train(settings(tmp_path, "run", *often), stop_after=5)
    damaged = newest_of(folder).path / "state.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    train(settings(tmp_path, "run", *often), resume="auto")
    error = capsys.readouterr().err
    assert (
        "it_00000005" in error and "damaged" in error and "going on from" in error and "it_00000004" in error
    )
    assert (folder / "metrics.jsonl").read_bytes() == (straight / "metrics.jsonl").read_bytes()
    train(settings(tmp_path, "run", *often), resume="2")  # back to an earlier one, by its iteration
    assert (folder / "metrics.jsonl").read_bytes() == (straight / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match="it_00000003"):
        train(settings(tmp_path, "run", *often), resume="3")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=str)
def test_a_signal_saves_at_the_next_step_and_ends_with_the_requeue_code(tmp_path, photos, number):
    """As a user's process: code 85, then --resume ends as an uninterrupted run."""
    long = ("optim.epochs=40",)
    straight = train(settings(tmp_path, "straight", *long))
    overrides = last(
        [*TINY, f"data.root={photos}", f"run.output={tmp_path / 'run'}", *long, "data.workers=1"]
    )
    command = [sys.executable, str(ROOT / "tools" / "train_ssl.py"), *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    log, patience = tmp_path / "run" / "metrics.jsonl", time.time() + 100
    while not (
        log.is_file()
        and log.read_text().count("\n") >= 1
        or time.time() > patience
        or process.poll() is not None
    ):
        time.sleep(0.02)
    os.killpg(process.pid, number)  # as schedulers do: the loader's worker gets it too
    error = process.communicate(timeout=100)[1]
    assert process.returncode == REQUEUE_CODE == 85, error
    assert number.name in error and not (tmp_path / "run" / "result.json").exists()
    assert 0 < newest_of(tmp_path / "run").iteration < 80
    train(settings(tmp_path, "run", *long), resume="auto")
    assert log.read_bytes() == (straight / "metrics.jsonl").read_bytes()


def test_another_runs_networks_are_a_start(tmp_path, photos):
    """run.init_from: networks, heads and centers of the earlier run, a fresh optimizer, iteration 0;
    another crop size fits."""
    first = train(settings(tmp_path, "first"))
    config = settings(
        tmp_path,
        "second",
        f"run.init_from={first}",
        "crops.global_px=96",
        "optim.base_lr=0.0",
        "optim.min_lr=0.0",
    )
    second = train(config, stop_after=1)
    before, after = newest_of(first).tensors(), newest_of(second).tensors()
    students = [name for name in before if name.startswith("method.student.")]
    assert students and all(torch.equal(before[name], after[name]) for name in students)
    assert newest_of(second).iteration == 1 and after["optimizer.backbone.cls_token.step"] == 1
    with pytest.raises(UserError, match=r"run\.init_from: .*has networks that this run has not.*position"):
        train(
            settings(
                tmp_path, "third", f"run.init_from={first}", "masks.position_share=0.0", "losses.position=0.0"
            )
        )
    with pytest.raises(UserError, match="nowhere"):
        train(settings(tmp_path, "fourth", f"run.init_from={tmp_path / 'nowhere'}"))


def test_unreadable_images_are_skipped_counted_and_named_once(tmp_path, photos, capsys):
    (photos / "001.jpg").write_bytes((photos / "001.jpg").read_bytes()[:400])
    (photos / "zzz.png").write_text("no picture")
    folder = train(settings(tmp_path, "run", "optim.epochs=4", "optim.epoch_iters=3"))
    error = capsys.readouterr().err
    skipped = [line for line in error.splitlines() if line.startswith("skipped")]
    assert len(skipped) == 2
    assert {name for name in ("001.jpg", "zzz.png") for line in skipped if name in line} == {
        "001.jpg",
        "zzz.png",
    }
    assert json.loads((folder / "speed.jsonl").read_text().splitlines()[-1])["broken_images"] == 2


def poison(monkeypatch, iteration):
    """A loss that is not finite at one iteration."""
    step = Trainer.step

    def poisoned(self, micro_batches, examine=False):
        logs = step(self, micro_batches, examine)
        broken = {name: logs.losses[name] * torch.nan for name in ("loss", "content")}
        return replace(logs, losses=logs.losses | broken) if self.iteration == iteration + 1 else logs

    monkeypatch.setattr(Trainer, "step", poisoned)


def test_nan_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path, photos, monkeypatch):
    """The iteration is named exactly, though the losses are looked at later, and no checkpoint is made of
    what came after."""
    poison(monkeypatch, 3)
    config = settings(tmp_path, "run", "log.checkpoint_every=3", "log.every=5")
    with pytest.raises(FloatingPointError, match="iteration 3: loss, content is not finite"):
        train(config)
    for thread in threading.enumerate():  # as a process does before it ends
        if thread is not threading.main_thread() and not thread.daemon:
            thread.join(60)
    assert newest_of(tmp_path / "run").iteration == 3


def test_nan_can_be_skipped(tmp_path, photos, monkeypatch, capsys):
    poison(monkeypatch, 3)
    folder = train(settings(tmp_path, "run", "step.on_nan=skip"))
    assert "iteration 3 was skipped: loss, content" in capsys.readouterr().err
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 6 and "content" not in lines[3] and "content" in lines[4]


def test_continued_pretraining_starts_from_the_file(tmp_path, photos):
    first = train(settings(tmp_path, "first")) / "backbone.safetensors"
    config = settings(
        tmp_path, "second", f"backbone.weights={first}", "optim.base_lr=0.0", "optim.min_lr=0.0"
    )
    second = train(config, stop_after=1)
    state = newest_of(second).tensors()
    assert all(
        torch.equal(v, state[f"method.student.backbone.{k}"]) for k, v in read_checkpoint(first).state.items()
    )


def test_pretraining_goes_on_from_a_timm_file(tmp_path, photos):
    """README's command: mask tokens start fresh, all else is the file's."""
    theirs = timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=0)
    torch.save(theirs.state_dict(), tmp_path / "timm.pth")
    like_timm = ["positions.encoding=standard", "positions.grid=14", "positions.augment=false"]
    like_timm += [
        "positions.interpolation=bicubic_antialias",
        "optim.base_lr=0.0",
        "optim.min_lr=0.0",
    ]
    folder = train(
        settings(tmp_path, "run", f"backbone.weights={tmp_path / 'timm.pth'}", *like_timm), stop_after=1
    )
    state = newest_of(folder).tensors()
    assert all(
        torch.equal(value, state[f"method.student.backbone.{key}"])
        for key, value in theirs.state_dict().items()
    )
    assert state["method.student.backbone.pos_mask_token"].abs().sum() > 0


def test_resume_refuses_another_data_set(tmp_path, photos):
    train(settings(tmp_path), stop_after=3)
    write_photos(photos, n=12)
    with pytest.raises(UserError, match="6 images before, 12 now.*--data-changed"):
        train(settings(tmp_path), resume="auto")


def test_a_result_lost_at_the_very_end_is_written_by_resume(tmp_path, photos):
    folder = train(settings(tmp_path))
    first = read_result(folder)
    (folder / "result.json").unlink()
    train(settings(tmp_path), resume="auto")
    assert read_result(folder).metrics == first.metrics and "content" in first.metrics


def test_the_name_says_the_registers(tmp_path, photos):
    name = "backbone.name=vit_tiny_patch16_reg4"
    folder = train(settings(tmp_path, "run", name), stop_after=1)
    assert newest_of(folder).tensors()["method.student.backbone.reg_token"].shape == (1, 4, 192)


@pytest.mark.parametrize("extra", [["crops.n_local=0"], ["optim.batch_size=1", "masks.kinds_over=image"]])
def test_small_runs(tmp_path, photos, extra):
    folder = train(settings(tmp_path, "run", *extra), stop_after=3)
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 3


def test_the_tool_ends_bad_input_in_one_line(tmp_path, photos, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    for name in "abc":
        (tmp_path / "broken" / f"{name}.jpg").write_text("no picture")
    small = build_backbone("vit_small_patch16", depth=2)
    from pretrain.weights import save_backbone

    save_backbone(
        tmp_path / "small.safetensors",
        small.state_dict(),
        name="vit_small_patch16",
        model_kwargs=small.model_kwargs,
    )
    for arguments, named in [
        (["data.root=" + str(tmp_path / "none")], "none"),
        (["data.root=" + str(tmp_path / "empty")], "empty"),
        (["data.root=" + str(tmp_path / "broken"), "data.workers=1"], "16 images in a row cannot be read"),
        (["--config", tmp_path / "none.yaml"], "none.yaml"),
        (["optim.bach_size=4"], "optim.bach_size"),
        (["optim.batch_size=four"], "optim.batch_size"),
        ([f"data.root={photos}", f"backbone.weights={tmp_path / 'small.safetensors'}"], "small.safetensors"),
        ([f"data.root={photos}", "optim.batch_size=300"], "optim.batch_size=300"),
    ]:
        words = last([*TINY, f"run.output={tmp_path / 'out'}", *map(str, arguments)])
        assert ended("pretrain", *words) == 2
        error = capsys.readouterr().err
        lines = [line for line in error.splitlines() if not line.startswith(("plan: ", "warning: "))]
        assert len(lines) == 1 and lines[0].startswith("error: ") and named in lines[0], error
    assert tool("optim.bach_size=4", code=2).startswith("error: config: unknown key 'optim.bach_size'")
    assert "Traceback" in tool("--traceback", "optim.bach_size=4", code=1)
