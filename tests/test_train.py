"""The pre-training run as a user starts it: outputs, exact resume, bad input."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from photos import TINY, write_photos

from pretrain.build import build_backbone
from pretrain.config import load_config
from pretrain.errors import UserError
from pretrain.results.schema import read_result
from pretrain.train import train
from pretrain.weights import read_checkpoint

ROOT = Path(__file__).resolve().parents[1]


def settings(tmp_path, output="run", *extra):
    return load_config(None, [*TINY, f"data.root={tmp_path / 'photos'}", f"run.output={tmp_path / output}", *extra])


def tool(*arguments, code):
    """Run tools/pretrain.py as a user; returns its stderr."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "tools" / "pretrain.py"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == code, done.stderr
    return done.stderr


def in_process(capsys, *arguments):
    """The same without a new process: the stderr of a call that must end with code 2."""
    with pytest.raises(SystemExit) as ended, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", list(sys.path))
        patch.setattr(sys, "argv", ["pretrain.py", *map(str, arguments)])
        runpy.run_path(str(ROOT / "tools" / "pretrain.py"), run_name="__main__")
    assert ended.value.code == 2
    return capsys.readouterr().err


@pytest.fixture
def photos(tmp_path):
    torch.set_num_threads(1)
    return write_photos(tmp_path / "photos")


def test_resume_is_bit_for_bit(tmp_path, photos):
    """6 iterations straight equal 3, resume, 3: weights, optimiser, centres and logs."""
    straight, parts = settings(tmp_path, "straight"), settings(tmp_path, "parts")
    train(straight)
    train(parts, stop_after_it=3)
    assert not (tmp_path / "parts" / "result.json").exists()
    with open(tmp_path / "parts" / "metrics.jsonl", "a") as log:
        log.write('{"iteration": 3, "loss": 1.0}\n{"iter')  # what an interruption after the checkpoint leaves
    train(parts, resume=True)
    a, b = (torch.load(tmp_path / run / "checkpoint.pt", weights_only=True) for run in ("straight", "parts"))
    assert a["iteration"] == b["iteration"] == 6
    assert a["method"].keys() == b["method"].keys()
    assert all(torch.equal(a["method"][key], b["method"][key]) for key in a["method"])
    for one, two in zip(a["optimizer"]["state"].values(), b["optimizer"]["state"].values()):
        assert all(torch.equal(one[key], two[key]) for key in one)
    logs = [(tmp_path / run / "metrics.jsonl").read_bytes() for run in ("straight", "parts")]
    assert logs[0] == logs[1] and len(logs[0].splitlines()) == 6
    files = [(tmp_path / run / "backbone.safetensors").read_bytes() for run in ("straight", "parts")]
    assert len(files[0]) == len(files[1])
    states = [read_checkpoint(tmp_path / run / "backbone.safetensors").state for run in ("straight", "parts")]
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])


def test_a_run_leaves_its_backbone_and_result(tmp_path, photos):
    folder = train(settings(tmp_path, "run", "log.tensorboard=true", "run.method=mine"))
    result = read_result(folder)
    assert (result.kind, result.method, result.backbone) == ("pretrain", "mine", "vit_tiny_patch16")
    assert result.effective_epochs == pytest.approx(3 * (2 * (64 / 224) ** 2 + 2 * (32 / 224) ** 2), abs=0.01)
    assert set(result.metrics) == {"loss", "image", "content", "position", "koleo", "img_per_s"}
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    teacher = {k.removeprefix("teacher.backbone."): v for k, v in checkpoint["method"].items() if k.startswith("teacher.backbone.")}
    student = {k.removeprefix("student.backbone."): v for k, v in checkpoint["method"].items() if k.startswith("student.backbone.")}
    backbone = build_backbone("vit_tiny_patch16", weights=folder / "backbone.safetensors")
    assert all(torch.equal(value, teacher[key]) for key, value in backbone.state_dict().items())
    assert any(not torch.equal(value, student[key]) for key, value in backbone.state_dict().items())
    assert {"pos_field", "cls_pos"} <= set(backbone.state_dict()) and backbone.flags["depth"] == 2
    assert read_checkpoint(folder / "backbone.safetensors").provenance["method"] == "mine"
    assert list((folder / "tensorboard").iterdir())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == list(range(6))
    assert lines[3]["loss"] == pytest.approx(sum(lines[3][k] for k in ("image", "content", "position", "koleo")), rel=1e-5)


def test_a_finished_run_is_left_alone_and_another_runs_folder_refused(tmp_path, photos, capsys):
    folder = train(settings(tmp_path))
    before = (folder / "checkpoint.pt").stat().st_mtime_ns
    train(settings(tmp_path), resume=True)
    assert "finished" in capsys.readouterr().err and (folder / "checkpoint.pt").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="already holds a run"):
        train(settings(tmp_path))
    with pytest.raises(UserError, match=r"optim\.base_lr"):
        train(settings(tmp_path, "run", "optim.base_lr=1.0"), resume=True)
    (folder / "checkpoint.pt").write_bytes(b"half a file")
    with pytest.raises(UserError, match=r"checkpoint\.pt"):
        train(settings(tmp_path), resume=True)


def test_unreadable_images_are_skipped_counted_and_named_once(tmp_path, photos, capsys):
    (photos / "001.jpg").write_bytes((photos / "001.jpg").read_bytes()[:400])
    (photos / "zzz.png").write_text("no picture")
    folder = train(settings(tmp_path, "run", "optim.epochs=4", "optim.epoch_length_it=3"))
    error = capsys.readouterr().err
    skipped = [line for line in error.splitlines() if line.startswith("skipped")]
    assert len(skipped) == 2
    assert {name for name in ("001.jpg", "zzz.png") for line in skipped if name in line} == {"001.jpg", "zzz.png"}
    assert json.loads((folder / "speed.jsonl").read_text().splitlines()[-1])["broken_images"] == 2


def test_nan_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path, photos):
    config = settings(tmp_path, "run", "log.checkpoint_period_it=2")
    train(config, stop_after_it=2)
    good = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    state["method"]["student.image.mlp.0.bias"][0] = float("nan")
    torch.save(state, tmp_path / "run" / "checkpoint.pt")
    poisoned = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    with pytest.raises(FloatingPointError, match="noticed at iteration 2.*image"):
        train(config, resume=True)
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == poisoned != good


def test_continued_pretraining_starts_from_the_file(tmp_path, photos):
    first = train(settings(tmp_path, "first")) / "backbone.safetensors"
    config = settings(tmp_path, "second", f"backbone.weights={first}", "optim.base_lr=0.0", "optim.min_lr=0.0")
    second = train(config, stop_after_it=1)
    state = torch.load(second / "checkpoint.pt", weights_only=True)["method"]
    assert all(torch.equal(v, state[f"student.backbone.{k}"]) for k, v in read_checkpoint(first).state.items())


def test_pretraining_goes_on_from_a_timm_file(tmp_path, photos):
    """README's command: mask tokens start fresh, all else is the file's."""
    theirs = timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=0)
    torch.save(theirs.state_dict(), tmp_path / "timm.pth")
    like_timm = ["positions.encoding=standard", "positions.grid=14", "positions.augment=false"]
    like_timm += ["positions.interpolation=bicubic_antialias", "backbone.layerscale=0.0", "optim.base_lr=0.0", "optim.min_lr=0.0"]
    folder = train(settings(tmp_path, "run", f"backbone.weights={tmp_path / 'timm.pth'}", *like_timm), stop_after_it=1)
    state = torch.load(folder / "checkpoint.pt", weights_only=True)["method"]
    assert all(torch.equal(value, state[f"student.backbone.{key}"]) for key, value in theirs.state_dict().items())
    assert state["student.backbone.pos_mask_token"].abs().sum() > 0


def test_resume_refuses_another_data_set(tmp_path, photos):
    train(settings(tmp_path), stop_after_it=3)
    write_photos(photos, n=12)
    with pytest.raises(UserError, match="6 images, but .* has 12"):
        train(settings(tmp_path), resume=True)


def test_a_result_lost_at_the_very_end_is_written_by_resume(tmp_path, photos):
    folder = train(settings(tmp_path))
    first = read_result(folder)
    (folder / "result.json").unlink()
    train(settings(tmp_path), resume=True)
    assert read_result(folder).metrics == first.metrics and "content" in first.metrics


def test_the_name_says_the_registers(tmp_path, photos):
    name = "backbone.name=vit_tiny_patch16_reg4"
    folder = train(settings(tmp_path, "run", name), stop_after_it=1)
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["method"]["student.backbone.reg_token"].shape == (1, 4, 192)


@pytest.mark.parametrize("extra", [["crops.n_local=0"], ["optim.batch_size=1", "masks.kinds_over=image"]])
def test_small_runs(tmp_path, photos, extra):
    folder = train(settings(tmp_path, "run", *extra), stop_after_it=3)
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 3


def test_the_tool_ends_bad_input_in_one_line(tmp_path, photos, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    for name in "abc":
        (tmp_path / "broken" / f"{name}.jpg").write_text("no picture")
    small = build_backbone("vit_small_patch16", depth=2)
    from pretrain.weights import save_backbone

    save_backbone(tmp_path / "small.safetensors", small.state_dict(), name="vit_small_patch16", flags=small.flags)
    for arguments, named in [
        (["data.root=" + str(tmp_path / "none")], "none"),
        (["data.root=" + str(tmp_path / "empty")], "empty"),
        (["data.root=" + str(tmp_path / "broken"), "data.workers=1"], "broken"),
        (["--config", tmp_path / "none.yaml"], "none.yaml"),
        (["optim.bach_size=4"], "optim.bach_size"),
        (["optim.batch_size=four"], "optim.batch_size"),
        ([f"data.root={photos}", f"backbone.weights={tmp_path / 'small.safetensors'}"], "small.safetensors"),
        ([f"data.root={photos}", "optim.batch_size=300"], "optim.batch_size=300"),
    ]:
        overrides = [a for a in arguments if "=" in str(a)]
        rest = [a for a in arguments if "=" not in str(a)]
        error = in_process(capsys, *rest, *TINY, f"run.output={tmp_path / 'out'}", *overrides)
        lines = [line for line in error.splitlines() if line.strip()]
        assert len(lines) == 1 and lines[0].startswith("error: ") and named in lines[0], error
    assert tool("optim.bach_size=4", code=2).startswith("error: config: unknown key 'optim.bach_size'")
    assert "Traceback" in tool("--traceback", "optim.bach_size=4", code=1)


def test_two_gloo_ranks_equal_one_at_double_batch(tmp_path):
    """float64, drop path 0, exact mode: losses and parameters after 3 steps."""
    write_photos(tmp_path / "photos", n=8)
    common = ["run.precision=float64", "backbone.drop_path=0.0", "optim.batch_size=4", "optim.epoch_length_it=1", "optim.epochs=3"]
    train(settings(tmp_path, "one", *common))
    overrides = [*TINY, f"data.root={tmp_path / 'photos'}", f"run.output={tmp_path / 'two'}", *common]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(ROOT / "tools" / "pretrain.py"), *overrides]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = (torch.load(tmp_path / run / "checkpoint.pt", weights_only=True) for run in ("one", "two"))
    for key, value in one["method"].items():
        torch.testing.assert_close(two["method"][key], value, rtol=1e-9, atol=1e-9, msg=lambda m, key=key: f"{key}: {m}")
    logs = [[json.loads(x) for x in (tmp_path / r / "metrics.jsonl").read_text().splitlines()] for r in ("one", "two")]
    for a, b in zip(*logs):
        assert a == pytest.approx(b, rel=1e-9)
