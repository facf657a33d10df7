"""Several processes: they equal one, however the work is shared out, and come back when one dies."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from photos import TINY, write_photos

from pretrain.checkpoints import newest
from pretrain.config import load_config
from pretrain.train import train
from pretrain.weights import read_checkpoint

ROOT = Path(__file__).resolve().parents[1]
EXACT = ["run.precision=float64", "backbone.drop_path=0.0", "optim.batch_size=4", "optim.epoch_length_it=1", "optim.epochs=5"]


def torchrun(n_ranks, output, *extra, options=(), code=0):
    """tools/pretrain.py on some gloo ranks; returns stderr."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n_ranks}", *options]
    command += [str(ROOT / "tools" / "pretrain.py"), *TINY, f"run.output={output}", *extra]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=300)
    assert done.returncode == code, done.stderr[-3000:]
    return done.stderr


def tensors_of(folder):
    found, _ = newest(folder)
    return found.tensors()


def lines_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same(one, two, tolerance=1e-9):
    """Every tensor of the last checkpoints, and every number of the logs."""
    a, b = tensors_of(one), tensors_of(two)
    assert a.keys() == b.keys()
    for key, value in a.items():
        torch.testing.assert_close(b[key], value, rtol=tolerance, atol=tolerance, msg=lambda m, key=key: f"{key}: {m}")
    assert len(lines_of(one)) == len(lines_of(two)) == 5
    for x, y in zip(lines_of(one), lines_of(two)):
        skip = {"feature_std", "teacher_entropy", "mean_entropy", "grad_norm"}  # over a rank's own images: for people
        assert {k: v for k, v in x.items() if k not in skip} == pytest.approx({k: y[k] for k in x if k not in skip}, rel=tolerance)


@pytest.fixture
def photos(tmp_path):
    torch.set_num_threads(1)
    return f"data.root={write_photos(tmp_path / 'photos', n=8)}"


@pytest.mark.parametrize(
    "extra", [[], ["losses.centering=sinkhorn_knopp", "step.accumulate=2"]], ids=["centering", "sinkhorn in parts"]
)
def test_two_gloo_ranks_equal_one_at_double_batch(tmp_path, photos, extra):
    """float64, drop path 0, exact mode: losses, parameters, moments and centres after 5 steps."""
    train(load_config(None, [*TINY, photos, f"run.output={tmp_path / 'one'}", *EXACT, *extra[:1]]))
    torchrun(2, tmp_path / "two", photos, *EXACT, *extra)
    assert_same(tmp_path / "one", tmp_path / "two")


def test_fsdp2_equals_ddp_and_its_checkpoint_goes_on_anywhere(tmp_path, photos):
    """Sharded parameters and optimiser: the same numbers; resumed on one process; the last checkpoint is one file."""
    torchrun(2, tmp_path / "ddp", photos, *EXACT, "step.accumulate=2")
    sharded = [photos, *EXACT, "step.parallel=fsdp2", "step.accumulate=2", "log.checkpoint_period_it=2", "log.keep_checkpoints=9"]
    torchrun(2, tmp_path / "fsdp", *sharded)
    assert_same(tmp_path / "ddp", tmp_path / "fsdp")
    folders = {path.name: {file.name for file in path.iterdir()} for path in (tmp_path / "fsdp" / "checkpoints").iterdir()}
    assert "state.safetensors" in folders["it_00000005"] and "index.json" in folders["it_00000004"]
    a, b = (read_checkpoint(tmp_path / run / "backbone.safetensors").state for run in ("ddp", "fsdp"))
    for key, value in a.items():  # float64 to 1e-9, rounded to float32
        torch.testing.assert_close(b[key], value, rtol=1e-6, atol=1e-8)
    # from the shards of iteration 2, on one process without shards
    train(load_config(None, [*TINY, *sharded, f"run.output={tmp_path / 'fsdp'}"]), resume="2")
    assert_same(tmp_path / "ddp", tmp_path / "fsdp")


def test_another_number_of_ranks_goes_on_without_repeats(tmp_path, photos):
    """Two ranks for 2 steps, then one to the end: as one from the start, so no image was repeated or left out."""
    train(load_config(None, [*TINY, photos, f"run.output={tmp_path / 'one'}", *EXACT]))
    often = ["log.checkpoint_period_it=2", "log.keep_checkpoints=9"]
    torchrun(2, tmp_path / "both", photos, *EXACT, *often)
    train(load_config(None, [*TINY, photos, f"run.output={tmp_path / 'both'}", *EXACT, *often]), resume="2")
    assert_same(tmp_path / "one", tmp_path / "both")


def test_a_killed_rank_comes_back_under_torchrun(tmp_path, photos):
    """kill -9 of one rank at iteration 3: torchrun starts both again, they go on from a checkpoint and end as if nothing was."""
    torchrun(2, tmp_path / "straight", photos, *EXACT)
    (tmp_path / "sitecustomize.py").write_text(KILLER.format(marker=str(tmp_path / "killed")))
    environment = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = f"{tmp_path}{os.pathsep}{environment}"
    try:
        often = ["log.checkpoint_period_it=1", "--resume"]
        error = torchrun(2, tmp_path / "killed_run", photos, *EXACT, *often, options=["--max-restarts=2"])
    finally:
        os.environ["PYTHONPATH"] = environment
    assert (tmp_path / "killed").read_text() == "rank 1 at iteration 3" and "going on from" in error
    assert_same(tmp_path / "straight", tmp_path / "killed_run")


KILLER = """
import os, signal, sys
if os.environ.get("RANK") == "1" and not os.path.exists({marker!r}):
    import importlib.abc, importlib.util

    class Finder(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path, target=None):
            if name != "pretrain.trainer":
                return None
            sys.meta_path.remove(self)
            spec = importlib.util.find_spec(name)
            load = spec.loader.exec_module

            def exec_module(module):
                load(module)
                step = module.Trainer.step

                def killed(self, *arguments, **named):
                    if self.iteration == 3:
                        open({marker!r}, "w").write("rank 1 at iteration 3")
                        os.kill(os.getpid(), signal.SIGKILL)
                    return step(self, *arguments, **named)

                module.Trainer.step = killed

            spec.loader.exec_module = exec_module
            return spec

    sys.meta_path.insert(0, Finder())
"""
