"""Where a run's numbers and images go: three ``*.jsonl`` files, TensorBoard, Weights & Biases if asked for.

* ``metrics.jsonl``: what the run computed. Nothing in it depends on the machine's speed: a resumed run leaves
  the same bytes as an uninterrupted one.
* ``probes.jsonl``: the probes of the teacher, under the same rule.
* ``speed.jsonl``: how fast it was.
"""

import json
import os
import resource
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch

from pretrain.errors import UserError
from pretrain.files import replacing
from pretrain.settings import Settings, setting

NAMES = ("metrics", "speed", "probes")
WINDOW_ITERS = 50  # iterations that the speed is a mean over
# A process's first iterations (kernels are chosen and compiled, workers start): forgotten as soon as they are
# over
WARM_ITERS = 5


class LogSettings(Settings):
    """What a run writes down, and how often."""

    in_recipe = False
    fixed = False
    every: int = setting(10, "iterations between lines of metrics.jsonl", source="ours", ge=1)
    checkpoint_every: int = setting(
        1000, "iterations between checkpoints; the last iteration always leaves one", source="ours", ge=1
    )
    keep_checkpoints: int = setting(2, "newest checkpoints that stay", source="ours", ge=1)
    async_checkpoints: bool = setting(
        True, "checkpoints are written while the training goes on", source="ours"
    )
    tensorboard: bool = setting(True, "scalars and images in run.output/tensorboard", source="ours")
    images_every: int = setting(
        1000,
        "iterations between images in TensorBoard: views, masks, attention, PCA; 0: none",
        source="ours",
        ge=0,
    )
    wandb: str = setting(
        "", "project in Weights & Biases, where it is installed; none without", source="ours"
    )


def truncate_lines(path: Path, before_iter: int) -> None:
    """Drop a log's lines of iterations >= ``before_iter`` (they will be computed again), and a last line
    that was cut off."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["iteration"] < before_iter:
                kept.append(line)
        except (json.JSONDecodeError, KeyError, TypeError):
            continue
    with replacing(path) as partial:
        partial.write_text("".join(line + "\n" for line in kept))


def is_logged(folder: Path, iteration: int) -> bool:
    """Whether ``metrics.jsonl`` has the line of an iteration."""
    path, start = folder / "metrics.jsonl", f'{{"iteration": {iteration},'
    return path.is_file() and any(line.startswith(start) for line in path.read_text().splitlines())


class MetricsLog:
    """Writes the logs of one run from iteration ``start_iter`` on; only the main process should hold one.

    A line of iteration i must be on the disk (:meth:`flush`) before a checkpoint says that i + 1 iterations
    are done: a resumed run does not write it again.

    Args:
        folder: of the run.
        start_iter: the first iteration that will be computed; later lines of the files are dropped.
        tensorboard: also write ``folder/tensorboard``.
        wandb: project in Weights & Biases, none without; a resumed run goes on in the same W&B run.
        config: what W&B shows as the run's settings.

    Raises:
        UserError: ``log.wandb`` is set, but W&B is not installed or cannot start.
    """

    def __init__(
        self,
        folder: Path,
        start_iter: int,
        tensorboard: bool,
        wandb: str = "",
        config: Mapping[str, Any] | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.wandb = WandbRun(folder, wandb, config or {}) if wandb else None  # first: it may fail
        self.files: dict[str, TextIO] = {}
        for name in NAMES:
            path = folder / f"{name}.jsonl"
            truncate_lines(path, start_iter)
            self.files[name] = open(path, "a", buffering=1)
        self.writer: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=start_iter)

    def write(self, name: str, iteration: int, values: Mapping[str, float]) -> None:
        """One line of ``metrics``, ``speed`` or ``probes``, and the same as scalars: ``metrics/loss``,
        ``probe/knn_top1``, ..."""
        self.files[name].write(json.dumps({"iteration": iteration, **values}) + "\n")
        scalars = {key if "/" in key else f"{name}/{key}": value for key, value in values.items()}
        if self.writer is not None:
            for key, value in scalars.items():
                self.writer.add_scalar(key, value, iteration)
        if self.wandb is not None:
            self.wandb.scalars(scalars, iteration)

    @property
    def shows_images(self) -> bool:
        """Whether there is anything that images would go to."""
        return self.writer is not None or self.wandb is not None

    def images(self, iteration: int, images: Mapping[str, np.ndarray]) -> None:
        """Images by name, uint8 [H, W, 3] each, in TensorBoard and W&B."""
        if self.writer is not None:
            for name, image in images.items():
                self.writer.add_image(f"images/{name}", image, iteration, dataformats="HWC")
        if self.wandb is not None:
            self.wandb.images({f"images/{name}": image for name, image in images.items()}, iteration)

    def flush(self) -> None:
        """Everything so far reaches the disk."""
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())
        if self.writer is not None:
            self.writer.flush()

    def close(self) -> None:
        """Flush and close."""
        self.flush()
        for file in self.files.values():
            file.close()
        if self.writer is not None:
            self.writer.close()
        if self.wandb is not None:
            self.wandb.run.finish()


class WandbRun:
    """One run in Weights & Biases. Its id lies in ``folder/wandb_id``, so that a resumed training goes on in
    it.

    Values go by iteration. W&B drops iterations that it already has: a resumed training computes those again,
    to the same values. ``WANDB_MODE=offline`` keeps everything on the disk, in ``folder/wandb``.
    """

    def __init__(self, folder: Path, project: str, config: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise UserError(
                f"log.wandb={project!r}, but wandb cannot be imported ({error}): pip install wandb"
            ) from error
        known = folder / "wandb_id"
        run_id = known.read_text().strip() if known.is_file() else None
        try:
            self.run = wandb.init(
                project=project,
                id=run_id,
                resume="allow",
                name=folder.name,
                dir=str(folder),
                config=dict(config),
            )
        except wandb.Error as error:  # no account, no network
            reason = str(error).splitlines()[0]
            raise UserError(
                f"log.wandb={project!r}: {reason} (WANDB_MODE=offline needs neither account nor network)"
            ) from error
        known.write_text(f"{self.run.id}\n")
        self.to_image = wandb.Image

    def scalars(self, values: Mapping[str, float], iteration: int) -> None:
        """Numbers of an iteration."""
        self.run.log(dict(values), step=iteration)

    def images(self, images: Mapping[str, np.ndarray], iteration: int) -> None:
        """Images of an iteration, uint8 [H, W, 3] each."""
        self.run.log({name: self.to_image(image) for name, image in images.items()}, step=iteration)


class Speed:
    """Images a second, share of the time that was spent waiting for data, and time left, over a sliding
    window of iterations.

    Args:
        batch_size: images of an iteration, over all ranks.
        clock: seconds.
    """

    def __init__(self, batch_size: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self.batch_size, self.clock = batch_size, clock
        self.done, self.paused_s, self.waited_s = 0, 0.0, 0.0
        # time at work, time of it waited
        self.window: deque[tuple[float, float]] = deque([(clock(), 0.0)], WINDOW_ITERS + 1)

    def tick(self, waited_s: float) -> None:
        """An iteration is done, ``waited_s`` of it went by before its batch was there."""
        self.done += 1
        self.waited_s += waited_s
        if self.done == WARM_ITERS + 1:
            while len(self.window) > 1:
                self.window.popleft()
        self.window.append((self.clock() - self.paused_s, self.waited_s))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is done inside (probes, images, checkpoints) is not the speed of training; the time left
        knows it."""
        started = self.clock()
        try:
            yield
        finally:
            self.paused_s += self.clock() - started

    def _rates(self) -> tuple[float, float]:
        """Seconds an iteration, seconds of it waited."""
        (first, waited_before), (last, waited) = self.window[0], self.window[-1]
        n = max(len(self.window) - 1, 1)
        return (last - first) / n, (waited - waited_before) / n

    @property
    def img_per_s(self) -> float:
        """Over all ranks; 0 before there is anything to tell."""
        seconds, _ = self._rates()
        return self.batch_size / seconds if seconds > 0 else 0.0

    @property
    def data_wait(self) -> float:
        """Share of the time spent waiting for data."""
        seconds, waited = self._rates()
        return waited / seconds if seconds > 0 else 0.0

    def eta_s(self, left_iters: int) -> float:
        """Seconds that ``left_iters`` iterations will take, with pauses as they have been so far."""
        seconds, _ = self._rates()
        return left_iters * (seconds + self.paused_s / max(self.done, 1))


def peak_memory_gb(device: torch.device) -> float:
    """Most memory so far, 10^9 bytes: allocated on the GPU, or held by this process where there is no
    CUDA."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage: bytes on macOS, kilobytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def describe(losses: Mapping[str, float], names: Iterable[str], speed: Speed, device: torch.device) -> str:
    """One line: ``loss`` and its terms (``names``), img/s, share of data wait, memory."""
    terms = ", ".join(f"{name} {losses[name]:.3f}" for name in names if name in losses)
    memory = f"{'GPU' if device.type == 'cuda' else 'process'} {peak_memory_gb(device):.1f} GB"
    loss = f"loss {losses['loss']:.3f} ({terms})" if "loss" in losses else f"skipped ({terms})"
    return f"{loss}  {speed.img_per_s:.1f} img/s  data wait {speed.data_wait:.0%}  {memory}"
