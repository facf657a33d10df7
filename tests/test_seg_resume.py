"""A run that was killed and goes on equals one that was not, to the bit on the CPU; two processes equal
one."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("mmseg")
pytest.importorskip("seg_plugin")  # before anything imports mmseg's models

from ade_fixture import write_ade
from backbone_fixture import ROTARY
from mmengine.config import Config
from mmengine.dataset import InfiniteSampler
from seg_fixture import FLAGS, TOOL, command_line, launch, stock_tool, tiny, tiny_run, write_config

from pretrain.cli import REQUEUE_CODE
from pretrain.errors import UserError
from pretrain.results import renamed
from pretrain.results.schema import read_result
from seg_plugin.config import deviations
from seg_plugin.data import PosfieldLabels, SeedFromPosition
from seg_plugin.hooks import PosfieldRunHook
from seg_plugin.loop import DrawnIndex, PosfieldSampler
from seg_plugin.predict import dataset_of_run, load_segmenter
from seg_plugin.run import train

KILLED_IN = 3  # checkpoints are at 2 and 4
NUMBERS = dict(max_iters=4, val_every=2)
# Runs a script in which iteration KILLED_IN is the last thing that happens.
KILLER = f"""
import os, runpy, signal, sys
import mmengine.config.config
mmengine.config.config.FormatCode = lambda text, **_: (text, True)  # see seg_fixture.py
from seg_plugin.hooks import PosfieldRunHook
original = PosfieldRunHook.after_train_iter
def after_train_iter(hook, runner, batch_idx, *rest, **named):
    original(hook, runner, batch_idx, *rest, **named)
    if batch_idx + 1 == {KILLED_IN}:
        os.kill(os.getpid(), signal.SIGKILL)
PosfieldRunHook.after_train_iter = after_train_iter
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
# Runs a script whose second process is asked to stop in the first iteration.
ASKED = """
import os, runpy, signal, sys
import mmengine.config.config
mmengine.config.config.FormatCode = lambda text, **_: (text, True)  # see seg_fixture.py
from seg_plugin.hooks import PosfieldRunHook
original = PosfieldRunHook.before_train_iter
def before_train_iter(hook, *rest, **named):
    original(hook, *rest, **named)
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGUSR1)
PosfieldRunHook.before_train_iter = before_train_iter
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def ade(tmp_path_factory):
    return write_ade(tmp_path_factory.mktemp("data") / "ade", n_train=5)  # an epoch ends within a batch


@pytest.fixture(scope="module")
def whole(ade, tmp_path_factory):
    """A run without a break, without data-loading processes."""
    run = tiny_run(ade, tmp_path_factory.mktemp("whole") / "run", protocol=tiny(**NUMBERS))
    train(run)
    return run.output


@pytest.fixture
def killer(tmp_path):
    (tmp_path / "killer.py").write_text(KILLER)
    return tmp_path / "killer.py"


def load(folder):
    return torch.load(folder / "iter_4.pth", weights_only=True)


def assert_equal(folder, other):
    """Weights, the optimizer's tensors, the schedule, and the metrics."""
    one, two = load(folder), load(other)
    pairs = [(one["state_dict"][key], two["state_dict"][key], key) for key in one["state_dict"]]
    states = one["optimizer"]["state"], two["optimizer"]["state"]
    pairs += [(states[0][i][key], states[1][i][key], (i, key)) for i in states[0] for key in states[0][i]]
    assert len(pairs) > 50 and one["state_dict"].keys() == two["state_dict"].keys()
    for got, expected, name in pairs:
        assert torch.equal(got, expected), name
    assert one["param_schedulers"] == two["param_schedulers"]


# --- The pieces


def test_the_sampler_keeps_mmengines_order_and_says_where_each_image_stands():
    data = list(range(5))
    ours, theirs = PosfieldSampler(data, seed=3), InfiniteSampler(data, seed=3)
    drawn = [next_ for next_, _ in zip(iter(ours), range(13))]
    assert drawn == [next_ for next_, _ in zip(iter(theirs), range(13))]
    assert [index.position for index in drawn] == list(range(13)) and {index.seed for index in drawn} == {3}
    ours.start, ours.rank, ours.world_size = 4, 1, 2  # the fifth image of the second process of two
    second = next(iter(ours))
    assert second.position == 9 and second == drawn[9]
    import pickle

    travelled = pickle.loads(pickle.dumps(second))
    assert type(travelled) is DrawnIndex and (int(travelled), travelled.seed, travelled.position) == (
        int(second),
        3,
        9,
    )


def test_random_numbers_depend_on_seed_and_position_alone():
    import random

    def draw(seed, position):
        SeedFromPosition()({"sample_idx": DrawnIndex(0, seed, position)})
        return np.random.rand(), random.random()

    first = draw(0, 7)
    np.random.seed(1)
    assert draw(0, 7) == first and len({draw(0, 7), draw(0, 8), draw(1, 7)}) == 3
    SeedFromPosition()({"sample_idx": 3})  # another sampler's: nothing is seeded


# --- Killed and gone on with


def test_interrupted_run_resumes_with_the_images_that_come_next(ade, tmp_path, monkeypatch):
    """Checkpoint at 2, killed in 3: the images of 3 and 4 are those of a run without a break; no line is
    there twice."""
    run = tiny_run(ade, tmp_path / "run", protocol=tiny(val_every=2))
    seen = []
    read = []
    original, prepare = PosfieldRunHook.after_train_iter, PosfieldLabels.prepare_data

    def spy(hook, runner, batch_idx, data_batch=None, outputs=None):
        seen.append((batch_idx, [Path(sample.img_path).name for sample in data_batch["data_samples"]]))
        original(hook, runner, batch_idx, data_batch, outputs)
        if batch_idx == stop_in:
            raise KeyboardInterrupt

    def count(dataset, index):
        read.extend([index] if dataset.labels.part == "train" else [])
        return prepare(dataset, index)

    monkeypatch.setattr(PosfieldRunHook, "after_train_iter", spy)
    monkeypatch.setattr(PosfieldLabels, "prepare_data", count)
    stop_in = None
    train(tiny_run(ade, run.output.with_name("whole"), protocol=tiny(val_every=2)))
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


def test_killed_between_checkpoints_our_tool_goes_on_to_the_same_bits(ade, whole, killer, tmp_path):
    """With data-loading processes, against the run without."""
    launch(killer, TOOL, *command_line("run", ade, workers=2, **NUMBERS), cwd=tmp_path, code=-signal.SIGKILL)
    assert not (tmp_path / "run" / "iter_4.pth").exists() and (tmp_path / "run" / "iter_2.pth").is_file()
    train(tiny_run(ade, tmp_path / "run", protocol=tiny(**NUMBERS), workers=2), resume=True)
    assert_equal(tmp_path / "run", whole)
    assert read_result(tmp_path / "run").metrics == read_result(whole).metrics
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()


def test_killed_between_checkpoints_the_stock_launcher_goes_on_to_the_same_bits(ade, whole, killer, tmp_path):
    """Also: both launchers make the same run."""
    config = write_config(tmp_path, ade, model_kwargs=FLAGS, **NUMBERS)
    words = [config, "--work-dir", "run"]
    launch(killer, stock_tool("train.py"), *words, cwd=tmp_path, code=-signal.SIGKILL)
    launch(stock_tool("train.py"), *words, "--resume", cwd=tmp_path)
    assert_equal(tmp_path / "run", whole)
    assert read_result(tmp_path / "run").metrics == read_result(whole).metrics


def test_a_rotary_run_of_the_stock_launcher_goes_on_to_the_same_bits(ade, killer, tmp_path):
    words = [write_config(tmp_path, ade, model_kwargs=ROTARY, **NUMBERS), "--work-dir", "run"]
    launch(killer, stock_tool("train.py"), *words, cwd=tmp_path, code=-signal.SIGKILL)
    launch(stock_tool("train.py"), *words, "--resume", cwd=tmp_path)
    whole = tiny_run(ade, tmp_path / "whole", protocol=tiny(**NUMBERS), model_kwargs=ROTARY)
    train(whole)
    assert_equal(tmp_path / "run", whole.output)
    vit = load_segmenter(whole.output, "cpu").model.backbone.vit
    assert (vit.pos_encoding, vit.n_registers) == ("rotary", 4)


def test_a_run_saved_under_old_names_goes_on_and_is_read(ade, whole, tmp_path):
    """As commit 2c21771 left its folders."""
    folder = Path(shutil.copytree(whole, tmp_path / "run"))
    (folder / "result.json").unlink()
    (folder / "iter_4.pth").unlink()
    old = {new: old for old, new in renamed.SEGMENTATION.items()}
    cfg = Config.fromfile(folder / "config.py")
    saved = next(hook for hook in cfg.custom_hooks if hook.type == "PosfieldRunHook")
    before = deviations(cfg, saved.origin.model_kwargs, 1)
    saved.protocol = {old.get(key, key): value for key, value in saved.protocol.items()}
    saved.origin["backbone_flags"] = saved.origin.pop("model_kwargs")
    cfg.dump(folder / "config.py")
    cfg = Config.fromfile(folder / "config.py")
    hook = PosfieldRunHook(**{key: value for key, value in cfg.custom_hooks[0].items() if key != "type"})
    assert "iterations_it" in hook.protocol and deviations(cfg, hook.origin["model_kwargs"], 1) == before
    assert len(dataset_of_run(load_segmenter(folder, "cpu").model, "validation")) == 3
    train(tiny_run(ade, folder, protocol=tiny(**NUMBERS)), resume=True)
    assert_equal(folder, whole)
    one, two = read_result(folder), read_result(whole)
    assert (one.metrics, one.protocol, one.config_hash) == (two.metrics, two.protocol, two.config_hash)


# --- Two processes


def two_ranks(command, cwd, code=0):
    """Start a command twice, as tools/submit.py's tasks do: each is told its rank, and there is no
    torchrun. What each said."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "WORLD_SIZE": "2"}
    variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [
        subprocess.Popen(
            command,
            cwd=cwd,
            env={**variables, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [rank.communicate(timeout=500)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [code, code], "\n".join(error[-3000:] for error in errors)
    return errors


def test_two_processes_on_the_cpu_equal_one(ade, tmp_path):
    """The same batch in two halves; three validation images, of which the second process's padding counts
    nothing twice.

    A signal to the second process alone, in the first iteration, stops both; the first one saves. Then they
    go on.
    """
    numbers = dict(NUMBERS, max_iters=2, drop_path=0.0, lr=1e-3)
    run = tiny_run(ade, tmp_path / "one", protocol=tiny(**numbers))
    train(run)
    words = command_line("two", ade, "--resume", **numbers)
    (tmp_path / "asked.py").write_text(ASKED)
    with_workers = command_line("two", ade, workers=1, **numbers)  # which end, too
    said = two_ranks([sys.executable, "asked.py", str(TOOL), *with_workers], tmp_path, code=REQUEUE_CODE)
    assert (
        "another rank was signalled; saved at iteration 1" in said[0]
        and "SIGUSR1; saved at iteration 1" in said[1]
    )
    assert [path.name for path in (tmp_path / "two").glob("*.pth")] == ["iter_1.pth"]
    two_ranks([sys.executable, str(TOOL), *words], tmp_path)
    lines = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    ]
    assert [line["iteration"] for line in lines[1]] == [1, 2, 2] == [line["iteration"] for line in lines[0]]
    for one, two in zip(*lines):
        assert two == pytest.approx(one, rel=2e-3)
    one, two = (torch.load(tmp_path / name / "iter_2.pth", weights_only=True) for name in ("one", "two"))
    for moments, expected in zip(
        two["optimizer"]["state"].values(), one["optimizer"]["state"].values(), strict=True
    ):
        torch.testing.assert_close(
            moments["exp_avg"], expected["exp_avg"], atol=1e-5, rtol=1e-2
        )  # of the gradients
    weights = [torch.cat([value.flatten() for value in state["state_dict"].values()]) for state in (one, two)]
    # AdamW makes steps of the lr of gradients that are zero but for rounding (the keys' biases): few of all.
    assert (weights[1] - weights[0]).abs().mean() < 0.01 * numbers["lr"]
    one, two = (read_result(tmp_path / name) for name in ("one", "two"))
    assert one.config_hash == two.config_hash and two.metrics["aacc"] == pytest.approx(
        one.metrics["aacc"], abs=0.5
    )


def test_each_image_counts_once_over_processes(monkeypatch):
    """Two processes, three images: the sampler gives the first one again to fill the second process's
    share."""
    import mmengine.dist.dist as exchange

    from seg_plugin.hooks import PosfieldIoU

    images = [[torch.tensor([float(k), 0.0])] * 4 for k in (1, 2, 3)]
    shares = [[images[0], images[2]], [images[1], images[0]]]
    metric = PosfieldIoU()
    metric.dataset_meta = {"classes": ("a", "b")}
    counted = []
    monkeypatch.setattr(exchange, "get_dist_info", lambda: (0, 2))
    monkeypatch.setattr(exchange, "all_gather_object", lambda results: shares)
    monkeypatch.setattr(metric, "compute_metrics", lambda results: counted.extend(results) or {})
    metric.evaluate(size=3)
    assert counted == images
