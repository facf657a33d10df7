"""What runs leave, to compare them; and runs of several ranks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from pretrain.checkpoints import newest

ROOT = Path(__file__).resolve().parents[1]
# Of a rank's own images, for people: other ranks would log other numbers.
OF_A_RANK = {"feature_std", "effective_rank", "teacher_entropy", "mean_entropy", "grad_norm", "overlaps"}


def torchrun(n_ranks, script, *words, options=(), code=0):
    """A script on some gloo ranks of this machine; returns stderr."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={n_ranks}",
        *options,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(script), *words],
        capture_output=True,
        text=True,
        env=environment,
        cwd=ROOT,
        timeout=300,
    )
    assert done.returncode == code, done.stderr[-3000:]
    return done.stderr


def train_on_ranks(n_ranks, folder, runs):
    """Runs, a config's file (or none) and words each, one after the other in the same processes."""
    script = folder / "runs.py"
    script.write_text(TRAIN.format(root=str(ROOT), runs=runs))
    torchrun(n_ranks, script)


TRAIN = """
import sys
sys.path.insert(0, {root!r})
from pretrain import distributed
from pretrain.config import load_config
from pretrain.train import train
for config, words in {runs!r}:
    train(load_config(config, words))
distributed.stop()
"""


def tensors_of(folder):
    """The last checkpoint's."""
    found, _ = newest(folder)
    return found.tensors()


def lines_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def differences(one, two, n_steps, tolerance=1e-9):
    """Where two runs of some steps are not the same: tensors of their last checkpoints, numbers of their
    logs."""
    a, b = tensors_of(one), tensors_of(two)
    found = sorted(a.keys() ^ b.keys())
    found += [
        key
        for key in a.keys() & b.keys()
        if not torch.allclose(a[key], b[key], rtol=tolerance, atol=tolerance)
    ]
    logs = lines_of(one), lines_of(two)
    if [len(log) for log in logs] != [n_steps, n_steps]:
        return [*found, f"{[len(log) for log in logs]} steps"]
    for step, (x, y) in enumerate(zip(*logs)):
        names = (x.keys() | y.keys()) - OF_A_RANK
        close = {k for k in x.keys() & y.keys() if abs(x[k] - y[k]) <= max(tolerance * abs(y[k]), 1e-12)}
        found += [f"step {step}: {name}" for name in sorted(names - close)]
    return found
