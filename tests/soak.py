"""Kill a run with SIGKILL again and again, resume it each time, and compare it with one that was left alone:
``make soak``.

Kills come while a checkpoint is being written, during steps, and while the run starts. Every line of
``metrics.jsonl`` and every tensor of the last checkpoint must be the same, bit for bit, on CPU.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path

import torch
from PIL import Image

from pretrain.checkpoints import newest, whole_directories
from pretrain.cli import command, run
from pretrain.errors import UserError

PERIOD_IT, START_S = (
    2,
    6.0,
)  # between checkpoints; kills "while it starts" come within, or at its first checkpoint
TINY = """backbone.name=vit_tiny_patch16 backbone.depth=2 crops.global_px=64 crops.local_px=32 crops.n_local=2 positions.grid=7
heads.n_prototypes=24 heads.hidden_dim=16 heads.bottleneck_dim=8 optim.batch_size=3 optim.epochs=2 optim.warmup_epochs=1
run.device=cpu log.every=1 log.tensorboard=false log.images_every=0""".split()


def write_photos(folder: Path) -> None:
    """Six small colored gradients."""
    folder.mkdir(parents=True, exist_ok=True)
    ramp = Image.linear_gradient("L").resize((90, 90))
    for i in range(6):
        Image.merge("RGB", [ramp.rotate(50 * i + 90 * k) for k in range(3)]).save(folder / f"{i}.jpg")


@contextmanager
def started(folder: Path, overrides: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    """``posfield pretrain --resume auto``, killed at the end of the block with its workers. Its output
    goes beside ``folder``."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    line = command("pretrain", "--resume", "auto", *overrides, f"run.output={folder}")
    with open(folder.with_suffix(".log"), "ab") as log:
        process = subprocess.Popen(line, stdout=log, stderr=log, start_new_session=True, env=environment)
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def said(folder: Path) -> str:
    """The last line of a run's output."""
    return folder.with_suffix(".log").read_text(errors="replace").strip().rpartition("\n")[2]


def done_it(folder: Path) -> int:
    """Steps of the newest whole checkpoint."""
    return max((int(path.name[3:11]) for path in whole_directories(folder)), default=0)


def being_written(folder: Path) -> list[str]:
    """Names of checkpoints that are not finished."""
    return [path.name for path in (folder / "checkpoints").glob("it_*[0-9].tmp")]


def wait_for_moment(
    process: subprocess.Popen[bytes], folder: Path, kind: str, at_it: int, rng: random.Random
) -> bool:
    """Return when it is time to kill: True; False when the process ended first."""
    window_s, until = 0.02, time.monotonic() + (rng.uniform(0, START_S) if kind == "start" else float("inf"))
    while process.poll() is None:
        if kind != "write" and (done_it(folder) >= at_it or time.monotonic() >= until):
            time.sleep(rng.uniform(0, 0.05))
            return process.poll() is None
        if kind == "write" and done_it(folder) >= at_it and being_written(folder):
            time.sleep(rng.uniform(0, window_s))
            os.killpg(process.pid, signal.SIGSTOP)  # held still, it shows whether the moment was right
            time.sleep(0.005)
            if being_written(folder):
                return True
            os.killpg(process.pid, signal.SIGCONT)
            window_s /= 2
        time.sleep(0.001)
    return False


def soak(folder: Path, overrides: list[str], total_iters: int, kills: int, rng: random.Random) -> None:
    """A run that is killed ``kills`` times and resumed, until it ends; a UserError where it ends before
    that."""
    for i in range(kills):
        kind = ("write", "step", "write", "start")[i % 4]
        at_it = (
            done_it(folder) + 1
            if kind == "start"
            else max(PERIOD_IT, int(total_iters * (i + rng.random()) / (kills + 1)))
        )
        with started(folder, overrides) as process:
            if not wait_for_moment(process, folder, kind, at_it, rng):
                raise UserError(
                    f"soak: the run ended (code {process.poll()}) before kill {i + 1}: {said(folder)}"
                )
        half = ", ".join(being_written(folder)) or "none"
        print(
            f"kill {i + 1}/{kills} ({kind}): newest whole checkpoint {done_it(folder)}, half-written: {half}",
            flush=True,
        )
    with started(folder, overrides) as process:
        if process.wait():
            raise UserError(f"soak: {folder.name} ended with code {process.returncode}: {said(folder)}")


def differences(ours: Path, theirs: Path) -> list[str]:
    """What differs between two finished runs: lines of their logs, tensors of their last checkpoints."""
    logs = [(folder / "metrics.jsonl").read_bytes().splitlines() for folder in (ours, theirs)]
    found = [
        f"metrics.jsonl, line {i}: {a!r} != {b!r}" for i, (a, b) in enumerate(zip_longest(*logs), 1) if a != b
    ]
    last = [newest(folder) for folder in (ours, theirs)]
    a, b = ({} if x is None else {"iteration": torch.tensor(x.iteration), **x.tensors()} for x, _ in last)
    found += [message for _, messages in last for message in messages] + [
        f"only one has {name}" for name in a.keys() ^ b.keys()
    ]
    found += [f"{name}: not the same bits" for name in a.keys() & b.keys() if bits(a[name]) != bits(b[name])]
    return found if a else [*found, "no checkpoint at the end"]


def bits(tensor: torch.Tensor) -> bytes:
    """All that a tensor holds; NaN and -0 too."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description="Kill a run at random moments, resume, and compare with an uninterrupted one."
    )
    parser.add_argument("--kills", type=int, help="default 20; 3 with --quick")
    parser.add_argument("--quick", action="store_true", help="fewer iterations a kill, no data worker")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--output", help="folder of the runs, which stays; without it, a temporary one")
    options = parser.parse_args(arguments)
    kills = options.kills if options.kills is not None else 3 if options.quick else 20
    total_iters = (6 if options.quick else 16) * (kills + 1)
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(options.output or temporary)
        alone, killed = root / "alone", root / "killed"
        if any(root.glob("*/checkpoints")):
            raise UserError(f"--output: {root} already holds runs")
        write_photos(root / "photos")
        overrides = [*TINY, f"optim.epoch_iters={total_iters // 2}", f"log.checkpoint_every={PERIOD_IT}"]
        overrides += [f"data.workers={0 if options.quick else 1}", f"data.root={root / 'photos'}"]
        for folder, n in [(alone, 0), (killed, kills)]:
            soak(folder, overrides, total_iters, n, random.Random(options.seed))
        found = differences(killed, alone)
    verdict = "DIFFERS" if found else "the same, bit for bit"
    print(*found[:20], f"soak: {kills} kills, {total_iters} iterations: {verdict}", sep="\n")
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    run(main)
