"""Kill a run with SIGKILL again and again, resume it each time, and compare it with one that was left alone:
``make soak``.

Kills come while a checkpoint is being written, during steps, while the run starts, and while it leaves its backbone
and result. Every file must be the same, bit for bit, on CPU, but for times and the folder's name. So for each of
:data:`VARIANTS`.
"""

import argparse
import json
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
from photos import last
from PIL import Image

from pretrain.checkpoints import newest, whole_directories
from pretrain.cli import command, run
from pretrain.errors import UserError

PERIOD_IT = 2  # between checkpoints
START_S = 6.0  # kills "while it starts" come within, or at its first checkpoint
VARIANTS = {
    "cpu": ["data.path=cpu"],
    "device": ["data.path=device"],
    "accumulated": ["data.path=device", "optim.batch_size=4", "step.accumulate=2"],
}
TIMES = {"created", "wall_time_s", "img_per_s", "data_wait", "peak_memory_gb", "peak_memory_mib"}
SHARDS = {".distcp", ".metadata"}  # their order is DCP's; their tensors are compared
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


def is_ending(folder: Path) -> bool:
    """Whether a run has begun to leave its backbone, and has no result yet."""
    begun = any(folder.glob("*backbone.safetensors*"))
    return begun and not (folder / "result.json").exists()


def wait_for_moment(
    process: subprocess.Popen[bytes], folder: Path, kind: str, at_it: int, rng: random.Random
) -> bool:
    """Return when it is time to kill: True; False when the process ended first."""
    window_s, until = 0.02, time.monotonic() + (rng.uniform(0, START_S) if kind == "start" else float("inf"))
    is_now = {"write": lambda: bool(being_written(folder)), "finish": lambda: is_ending(folder)}.get(kind)
    while process.poll() is None:
        if is_now is None and (done_it(folder) >= at_it or time.monotonic() >= until):
            time.sleep(rng.uniform(0, 0.05))
            return process.poll() is None
        if is_now is not None and done_it(folder) >= at_it and is_now():
            time.sleep(rng.uniform(0, window_s))
            os.killpg(process.pid, signal.SIGSTOP)  # held still, it shows whether the moment was right
            time.sleep(0.005)
            if is_now():
                return True
            os.killpg(process.pid, signal.SIGCONT)
            window_s /= 2
        time.sleep(0.001)
    return False


def kill_once(
    folder: Path, overrides: list[str], kind: str, at_it: int, rng: random.Random, attempts: int = 10
) -> None:
    """Start the run and kill it at such a moment; a UserError where it ends before that."""
    for _ in range(attempts):
        with started(folder, overrides) as process:
            if wait_for_moment(process, folder, kind, at_it, rng):
                return
        if kind != "finish" or process.returncode:
            break
        for name in ("result.json", "backbone.safetensors"):  # missed: the end once more
            (folder / name).unlink()
    raise UserError(f"soak: the run ended (code {process.returncode}) before a kill: {said(folder)}")


def soak(folder: Path, overrides: list[str], total_iters: int, kills: int, rng: random.Random) -> None:
    """A run that is killed ``kills`` times and resumed, until it ends; a UserError where it ends before
    that."""
    n_last = -(-kills // 5)
    for i in range(kills):
        kind = ("write", "step", "write", "start")[i % 4] if i < kills - n_last else "finish"
        at_it = max(PERIOD_IT, int(total_iters * (i + rng.random()) / (kills - n_last + 1)))
        at_it = {"start": done_it(folder) + 1, "finish": total_iters}.get(kind, at_it)
        kill_once(folder, overrides, kind, at_it, rng)
        half = [*being_written(folder), *(path.name for path in folder.glob(".*.partial"))]
        told = f"newest whole checkpoint {done_it(folder)}, half-written: {', '.join(half) or 'none'}"
        print(f"kill {i + 1}/{kills} ({kind}): {told}", flush=True)
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


def file_differences(ours: Path, theirs: Path) -> list[str]:
    """Files that only one of two finished runs has, or that differ in more than times and the folder's name."""
    a, b = ({path.relative_to(root): path for path in files(root)} for root in (ours, theirs))
    found = [f"only one has {name}" for name in sorted(a.keys() ^ b.keys())]
    same = {name: content(a[name], ours) == content(b[name], theirs) for name in sorted(a.keys() & b.keys())}
    return found + [f"{name}: not the same file" for name, is_same in same.items() if not is_same]


def files(root: Path) -> Iterator[Path]:
    """All files of a run, but for DCP's."""
    return (path for path in root.rglob("*") if path.is_file() and not SHARDS & {path.suffix, path.name})


def content(path: Path, root: Path) -> object:
    """What a file of a run holds, but for times and the run's folder."""
    if path.suffix not in (".json", ".jsonl", ".yaml"):
        return path.read_bytes()
    text = path.read_text().replace(str(root), "RUN")
    if path.suffix == ".yaml":
        return text
    lines = text.splitlines() if path.suffix == ".jsonl" else [text]
    values = [json.loads(line, object_hook=without_times) for line in lines]
    if path.name == "manifest.json":  # of the files beside it; meta.json holds times
        values[0]["files"].pop("meta.json")
    return values


def without_times(mapping: dict[str, object]) -> dict[str, object]:
    """A mapping without :data:`TIMES`."""
    return {key: value for key, value in mapping.items() if key not in TIMES}


def bits(tensor: torch.Tensor) -> bytes:
    """All that a tensor holds; NaN and -0 too."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description="Kill a run at random moments, resume, and compare with an uninterrupted one."
    )
    parser.add_argument("--kills", type=int, help="of each variant: 20; 3 with --quick")
    parser.add_argument("--quick", action="store_true", help="fewer iterations a kill, no data worker")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="all of them")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--output", help="folder of the runs, which stays; without it, a temporary one")
    options = parser.parse_args(arguments)
    kills = options.kills if options.kills is not None else 3 if options.quick else 20
    total_iters = (6 if options.quick else 16) * (kills + 1)
    is_same = True
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(options.output or temporary)
        if any(root.glob("*/*/checkpoints")):
            raise UserError(f"--output: {root} already holds runs")
        write_photos(root / "photos")
        overrides = [*TINY, f"optim.epoch_iters={total_iters // 2}", f"log.checkpoint_every={PERIOD_IT}"]
        overrides += [f"data.workers={0 if options.quick else 1}", f"data.root={root / 'photos'}"]
        for variant in options.variants:
            alone, killed = root / variant / "alone", root / variant / "killed"
            alone.parent.mkdir()
            for folder, n in [(alone, 0), (killed, kills)]:
                words = last([*overrides, *VARIANTS[variant]])
                soak(folder, words, total_iters, n, random.Random(options.seed))
            found = differences(killed, alone) + file_differences(killed, alone)
            verdict = "DIFFERS" if found else "the same files, bit for bit"
            print(
                *found[:20], f"soak {variant}: {kills} kills, {total_iters} iterations: {verdict}", sep="\n"
            )
            is_same &= not found
    sys.exit(0 if is_same else 1)


if __name__ == "__main__":
    run(main)
