"""One process a run folder; Ctrl-C saves; workers die with the training. The three trainings share what does it."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from photos import TINY, write_photos
from torch.utils.data import DataLoader

from det_plugin.train import finetune as finetune_detection
from pretrain.errors import UserError, explained_shortage
from pretrain.run_lock import run_lock
from pretrain.signals import StopSignals
from seg_plugin.protocol import SegmentationProtocol

HOLD = """
import sys, time
from pretrain.run_lock import run_lock
with run_lock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_refused_and_a_dead_one_holds_nothing(tmp_path):
    first = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert first.stdout.readline() == "held\n"
        with pytest.raises(
            UserError, match=f"process {first.pid} on .* is working there; wait for it, or choose"
        ):
            with run_lock(tmp_path):
                pass
    finally:
        first.kill()
        first.wait()
    with run_lock(tmp_path), run_lock(tmp_path / "another"):
        assert f"process {os.getpid()} on " in (tmp_path / ".lock").read_text()
    assert not (tmp_path / ".lock").exists() and not (tmp_path / "another").exists()


def test_the_lock_of_a_killed_process_does_not_live_on_in_its_children(tmp_path):
    fork = "    import os; child = os.fork(); child or time.sleep(60); print(child, flush=True)\n    print("
    command = [sys.executable, "-c", HOLD.replace("    print(", fork), str(tmp_path)]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True, text=True)
    try:
        child = int(first.stdout.readline())
        first.kill()
        first.wait()
        with run_lock(tmp_path):
            assert f"process {os.getpid()} on " in (tmp_path / ".lock").read_text()
            os.kill(child, 0)  # it lives, and holds nothing
    finally:
        os.killpg(first.pid, signal.SIGKILL)


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr("pretrain.run_lock.fcntl.lockf", refuse)
    with run_lock(tmp_path):
        assert "has no locks; let one process at a time work there" in capsys.readouterr().err


def test_the_first_interrupt_is_remembered_and_the_second_leaves(capsys):
    with pytest.raises(KeyboardInterrupt), StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.received == "SIGINT"
        assert "Ctrl-C again: at once" in capsys.readouterr().err
        os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):  # outside as ever
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)


@pytest.fixture
def started(tmp_path):
    """A pre-training with two workers, some iterations after its start; its folder."""
    words = [word for word in TINY if not word.startswith(("data.workers", "optim.epochs"))]
    words += [f"data.root={write_photos(tmp_path / 'photos')}", "data.workers=2", "optim.epochs=2000"]
    command = [sys.executable, "-m", "posfield", "pretrain", *words, f"run.output={tmp_path / 'run'}"]
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    until = time.time() + 60
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not (metrics.is_file() and metrics.stat().st_size) and time.time() < until:
        time.sleep(0.1)
    yield process, tmp_path
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)


def test_an_interrupt_saves_and_says_how_to_go_on(started):
    process, folder = started
    os.killpg(process.pid, signal.SIGINT)  # a terminal's: to the whole group
    assert process.wait(60) == 85
    said = (folder / "log").read_text()
    assert "stopped: SIGINT; saved at iteration" in said
    assert f"go on with: posfield pretrain {'backbone.name'}" in said and said.rstrip().endswith("--resume")
    assert list((folder / "run").glob("checkpoints/*"))


@pytest.mark.skipif(sys.platform != "linux", reason="the parent-death signal is Linux's")
def test_workers_die_with_a_training_that_is_killed(started):
    process, _ = started
    children = subprocess.check_output(["ps", "-o", "pid=", "--ppid", str(process.pid)], text=True).split()
    assert len(children) >= 2
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    until = time.time() + 3
    while time.time() < until and any(os.path.exists(f"/proc/{pid}") for pid in children):
        time.sleep(0.05)
    assert not any(os.path.exists(f"/proc/{pid}") for pid in children)


@pytest.mark.skipif(sys.platform != "linux", reason="the process list, and what the system's killer does")
def test_a_worker_that_the_system_kills_is_told_in_one_line(started):
    process, folder = started
    children = subprocess.check_output(["ps", "-o", "pid=", "--ppid", str(process.pid)], text=True).split()
    os.kill(int(children[0]), signal.SIGKILL)
    assert process.wait(60) == 2
    last = (folder / "log").read_text().rstrip().splitlines()[-1]
    assert last.startswith("error: a data worker was killed, most often by the system for want of memory: ")
    assert "set data.workers below 2 and go on with --resume" in last and "Traceback" not in last


class KillsItself:
    def __len__(self):
        return 2

    def __getitem__(self, index):
        os.kill(os.getpid(), signal.SIGKILL)


class WantsTooMuch(KillsItself):
    def __getitem__(self, index):
        return np.empty(1 << 60, np.uint8)


CUDA = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79 GiB\nSee documentation"
)


def raise_cuda():
    raise torch.OutOfMemoryError(CUDA)


RAN_OUT = {
    "worker killed": (
        lambda: next(iter(DataLoader(KillsItself(), num_workers=1))),
        "worker was killed.*FEWER",
    ),
    "worker's memory": (lambda: next(iter(DataLoader(WantsTooMuch(), num_workers=1))), "memory: MORE"),
    "torch, CPU": (lambda: torch.empty(1 << 60, dtype=torch.uint8), "this machine ran out of memory: MORE"),
    "torch, CUDA": (raise_cuda, r"the device ran out of memory: MORE \(CUDA out of memory"),
    "NumPy": (lambda: np.empty(1 << 60, np.uint8), "this machine ran out of memory: MORE"),
}


@pytest.mark.parametrize("cause", RAN_OUT)
def test_what_runs_out_is_one_line_with_the_way_on(cause):
    use, told = RAN_OUT[cause]
    with pytest.raises(UserError, match=told) as found, explained_shortage("MORE", "FEWER"):
        use()
    assert "\n" not in str(found.value) and len(str(found.value)) < 400


def test_another_error_stays_what_it_is():
    with pytest.raises(RuntimeError, match="size mismatch"), explained_shortage("MORE"):
        raise RuntimeError("size mismatch for memory.weight")


def test_every_training_names_its_own_way_on(tmp_path, monkeypatch):
    class Engine:
        @staticmethod
        def train(*_, **__):
            raise_cuda()

    monkeypatch.setattr("det_plugin.train.engine_module", lambda *_: Engine)
    monkeypatch.setattr("det_plugin.train.settings_of", lambda *_, **__: None)
    with pytest.raises(UserError, match="give --accumulate 4, or --checkpointing, and go on with --resume"):
        finetune_detection("coco", tmp_path / "det", backbone="vit_tiny_patch16", accumulate=2)
    segmentation = pytest.importorskip("seg_plugin.run")
    monkeypatch.setattr(segmentation, "_train", lambda *_: raise_cuda())
    recipe = SegmentationProtocol()
    how = ("vit_tiny_patch16", None, tmp_path, tmp_path / "seg", recipe)
    with pytest.raises(UserError, match="more GPUs .* or start anew with amp=true"):
        segmentation.train(segmentation.SegmentationRun(*how))
