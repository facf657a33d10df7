"""A disk that is full, or fails: one line, what was whole stays, and the run goes on. And what killed processes left is
removed at the next start.

RLIMIT_FSIZE stands for the full disk: a write beyond it fails as one there does.
"""

import os
import resource
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from ade_fixture import write_ade
from coco_fixture import write_coco
from photos import TINY, last, write_photos
from tool_fixture import ended

from pretrain import checkpoints
from pretrain.config import load_config
from pretrain.errors import DiskError, Unwritable
from pretrain.files import put_in_place, remove_parts, replacing, write_text, writing
from pretrain.metrics_log import MetricsLog
from pretrain.results.schema import read_result
from pretrain.run_lock import run_lock, tidy
from pretrain.train import train

DETECTION = """max_iters=4 milestones=3 warmup_iters=2 batch_size=2 eval_every=2 image_size_px=64 channels=16 box_fc=32
    box_convs=1 mask_convs=1 roi_batch_per_image=16 rpn_pre_nms=100,50 rpn_post_nms=50,20
    anchor_sizes_px=8,16,32,64,128 detections_per_image=10 backbone.depth=2""".split()
SEGMENTATION = """resize_px=96,48 crop_px=48 slide_crop_px=48 slide_stride_px=32 num_classes=4 batch_size=2 max_iters=4
    val_every=2 backbone.depth=2 backbone.pos_grid=6""".split()


@contextmanager
def files_of_at_most(n_bytes):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def dead_pid():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def leave_parts(folder):
    """What a killed process leaves, and what looks alike; returns both lists of paths."""
    dead, alive = dead_pid(), os.getppid()
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    (folder / "checkpoints").mkdir(exist_ok=True)
    (folder / f".model.{dead}.partial").mkdir()
    for name in (f".model.{dead}.partial/a", f".a b.json.{dead}.partial", f"figures/.a.png.{dead}.partial"):
        (folder / name).write_text("x")
    tmp = [folder / "checkpoints" / name for name in ("it_00000007.tmp", "it_00000005.old.gone.tmp")]
    for path in tmp:
        path.mkdir()
    gone = [folder / f".model.{dead}.partial", *folder.glob(f".*.json.{dead}.partial"), *tmp]
    gone.append(folder / "figures" / f".a.png.{dead}.partial")
    kept = [folder / f".b.{alive}.partial", folder / ".c.partial", folder / f"d.{dead}.partial"]
    kept += [folder / f".e.0{dead}.partial", folder / f".f.{dead}.partial.bak", folder / ".g.x1.partial"]
    kept += [folder / "checkpoints" / name for name in ("mine.tmp", "it_3.tmp", "it_00000001.tmp.tmp")]
    for path in kept:
        path.write_text("mine")
    return gone, kept


# --- what killed processes leave ----------------------------------------------------------------------------


def test_what_a_killed_process_left_goes_and_nothing_else(tmp_path, capsys):
    gone, kept = leave_parts(tmp_path)
    outside = tmp_path.parent / "outside"
    outside.mkdir(exist_ok=True)
    (outside / "a").write_text("x")
    gone.append(tmp_path / f".link.{dead_pid()}.partial")
    gone[-1].symlink_to(outside)
    with run_lock(tmp_path):
        assert not any(os.path.lexists(path) for path in gone)
    assert all(path.exists() for path in kept) and (outside / "a").is_file()
    assert capsys.readouterr().err.count("removed what a killed process left") == 1


def test_nothing_goes_where_the_folder_is_not_held(tmp_path, monkeypatch):
    gone, kept = leave_parts(tmp_path)

    def refuse(*_):
        raise OSError(37, "No locks available")

    with monkeypatch.context() as patch:
        patch.setattr("pretrain.run_lock.fcntl.lockf", refuse)
        with run_lock(tmp_path):
            assert all(path.exists() for path in [*gone, *kept])
    tidy(tmp_path, tmp_path / "absent")
    assert not any(path.exists() for path in gone) and not (tmp_path / "absent").exists()


def test_a_partial_file_of_this_number_is_of_a_process_before(tmp_path):
    """In containers the same numbers come again."""
    (tmp_path / f".a.{os.getpid()}.partial").write_text("x")
    assert remove_parts(tmp_path) == [f".a.{os.getpid()}.partial"] and not list(tmp_path.iterdir())


# --- one file ------------------------------------------------------------------------------------------------


def test_a_file_that_cannot_be_written_stays_as_it_was(tmp_path):
    path = write_text(tmp_path / "a.txt", "before")
    with files_of_at_most(1000), pytest.raises(Unwritable) as error:
        write_text(path, "x" * 5000)
    assert str(error.value) == f"{path} cannot be written: File too large"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"] and path.read_text() == "before"


def test_torch_and_safetensors_say_it_in_their_own_words(tmp_path):
    state = {"x": torch.zeros(100_000)}
    with files_of_at_most(1000):
        for write in (
            lambda path: torch.save(state, path),
            lambda path: torch.save(state, open(path, "wb")),
            lambda path: checkpoints.tensors.write_tensors(path, state),
        ):
            with pytest.raises(Unwritable, match="state cannot be written"):
                with replacing(tmp_path / "state") as partial:
                    write(partial)
    assert not list(tmp_path.iterdir())


def test_an_error_of_another_file_keeps_its_name(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent"), writing(tmp_path / "a"):
        open(tmp_path / "absent" / "b")
    with pytest.raises(RuntimeError, match="other"), writing(tmp_path / "a"):
        raise RuntimeError("other")


def test_a_folder_comes_back_where_the_new_one_cannot_be_named(tmp_path, monkeypatch):
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a").write_text(name)
    replace = os.replace

    def full(source, target):
        if Path(source).name == "new":
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        put_in_place(tmp_path / "new", tmp_path / "old")
    assert (tmp_path / "old" / "a").read_text() == "old"


def test_logs_on_a_full_disk(tmp_path, capfd):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    log = MetricsLog(tmp_path, 0, tensorboard=False)
    with pytest.raises(Unwritable, match="metrics.jsonl cannot be written: No space left"):
        log.write("metrics", 0, {"loss": 1.0})
        log.flush()
    with pytest.raises(Unwritable):
        log.close()
    assert all(file.closed for file in log.files.values())
    del log
    assert capfd.readouterr().err == ""


def test_tensorboard_on_a_full_disk_shows_no_traceback(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(threading, "excepthook", threading.__excepthook__)  # pytest has its own
    log = MetricsLog(tmp_path, 0, tensorboard=True)
    with (
        files_of_at_most(2000),
        pytest.raises(Unwritable, match="tensorboard cannot be written: File too large"),
    ):
        for i in range(100):
            log.images(i, {"a": torch.randint(0, 256, (32, 32, 3), dtype=torch.uint8).numpy()})
            log.flush()
    log.writer = None
    log.close()
    assert capfd.readouterr().err == ""


# --- runs ----------------------------------------------------------------------------------------------------


def full(capfd, name, *words):
    """Run ``posfield NAME`` where no file may be larger than 100 kB; its one line."""
    capfd.readouterr()
    with files_of_at_most(100_000):
        assert ended(name, *words) == 2
    said = capfd.readouterr().err
    assert "Traceback" not in said and "Exception ignored" not in said, said
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert said.endswith(f"{line}\n") and "File too large; " in line
    assert line.count("; free space, then go on with: posfield") == 1 and "--resume" in line
    return line


def test_a_pretraining(tmp_path, capfd):
    write_photos(tmp_path / "photos")
    where = [f"data.root={tmp_path / 'photos'}", f"run.output={tmp_path / 'run'}"]
    words, run = last([*TINY, *where]), tmp_path / "run"
    line = full(capfd, "pretrain", *words)
    assert f"{run} holds no whole checkpoint" in line and not checkpoints.whole_directories(run)
    train(load_config(None, words), stop_after=3)
    gone, kept = leave_parts(run)
    line = full(capfd, "pretrain", *words, "--resume")
    assert not any(path.exists() for path in gone) and all(path.exists() for path in kept)
    whole = run / "checkpoints" / "it_00000003"
    assert f"checkpoint {whole.with_name('it_00000006')} cannot be written" in line
    assert f"the newest whole checkpoint is {whole};" in line
    assert checkpoints.whole_directories(run) == [whole]
    assert ended("pretrain", *words, "--resume") == 0
    assert read_result(run).kind == "pretrain" and not (run / "checkpoints" / "it_00000006.tmp").exists()


@pytest.mark.parametrize("engine", ["torchvision", "detectron2"])
def test_a_detection(engine, tmp_path, capfd):
    if engine == "detectron2":
        pytest.importorskip("detectron2")
    data, run = write_coco(tmp_path / "coco"), tmp_path / "run"
    words = [
        "--engine",
        engine,
        "--backbone",
        "vit_tiny_patch16",
        "--data",
        data,
        "--output",
        run,
        "--device",
        "cpu",
    ]
    words += ["--workers", "0", "--resume", *DETECTION]
    gone, kept = leave_parts(run)
    line = full(capfd, "detect", *words)
    assert f"{run} holds no whole checkpoint" in line
    name = "checkpoint" if engine == "torchvision" else "model_0000001.pth"
    assert name in line.partition("cannot be written")[0]
    assert not any(path.exists() for path in gone) and all(path.exists() for path in kept)
    assert not list(run.glob("*.pth")) and not checkpoints.whole_directories(run)
    assert ended("detect", *words) == 0 and read_result(run).kind == "detection"


def test_a_segmentation(tmp_path, capfd):
    pytest.importorskip("mmseg")
    data, run = write_ade(tmp_path / "ade"), tmp_path / "run"
    words = ["--backbone", "vit_tiny_patch16", "--data", data, "--dataset", "ade20k", "--output", run]
    words += ["--device", "cpu", "--workers", "0", "--resume", *SEGMENTATION]
    gone, kept = leave_parts(run)
    line = full(capfd, "segment", *words)
    assert "iter_2.pth cannot be written" in line and f"{run} holds no whole checkpoint" in line
    assert not any(path.exists() for path in gone) and all(path.exists() for path in kept)
    assert not [path for path in run.rglob("*iter_*") if path.is_file()]
    assert ended("segment", *words) == 0 and read_result(run).kind == "segmentation"


def test_what_is_no_run_says_its_line(tmp_path, capfd):
    """A table cannot be written; a file that cannot be read for want of a right is no full disk."""
    with files_of_at_most(2000):
        assert ended("table", "--tables", "all", "--output", tmp_path / "t.md") == 2
    line = capfd.readouterr().err
    assert line.startswith(
        f"error: {tmp_path / 't.md'} cannot be written: File too large; free space, then go on with"
    )
    assert line.count("\n") == 1 and not list(tmp_path.iterdir())


def test_a_broken_disk_is_to_be_mended(tmp_path):
    with pytest.raises(
        DiskError, match=r"a\.json: Input/output error; .* holds no whole checkpoint; mend that$"
    ):
        with run_lock(tmp_path):
            raise OSError(5, "Input/output error", str(tmp_path / "a.json"))
    with pytest.raises(DiskError, match=f"a file of {tmp_path} cannot be written: No space left; "):
        with run_lock(tmp_path):
            raise OSError(28, "No space left")
    for other in (ConnectionResetError(104, "reset"), FileNotFoundError(2, "No such file", "a")):
        with pytest.raises(type(other)), run_lock(tmp_path):
            raise other
