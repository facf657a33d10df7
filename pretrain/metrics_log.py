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
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch

from pretrain.errors import UserError, missing_package
from pretrain.files import replacing, write_text, writing
from pretrain.log import in_words, log
from pretrain.settings import Settings, setting

NAMES = ("metrics", "speed", "probes")
TENSORBOARD = "tensorboard"
ESTIMATE_AT = 10  # iterations of a process after which the time left is told
WINDOW_ITERS = 50  # iterations that the speed is a mean over
WARM_ITERS = (
    5  # a process's first iterations (kernels are chosen, workers start): forgotten once they are over
)


class LogSettings(Settings):
    """What a run writes down, and how often."""

    in_recipe = False
    fixed = False
    every: int = setting(10, "iterations between lines of metrics.jsonl", ge=1)
    checkpoint_every: int = setting(
        1000, "iterations between checkpoints; the last iteration always leaves one", ge=1
    )
    keep_checkpoints: int = setting(2, "newest checkpoints that stay", ge=1)
    async_checkpoints: bool = setting(True, "checkpoints are written while the training goes on")
    tensorboard: bool = setting(True, "scalars and images in run.output/tensorboard")
    images_every: int = setting(
        1000, "iterations between images in TensorBoard: views, masks, attention, PCA; 0: none", ge=0
    )
    wandb: str = setting("", "project in Weights & Biases, where it is installed; none without")


def truncate_lines(path: Path, before_iter: int) -> None:
    """Drop a log's lines of iterations >= ``before_iter`` (computed again), and one that was cut off."""
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
        self.folder = folder
        self.wandb = start_wandb(folder, wandb, config or {}) if wandb else None  # first: it may fail
        self.files: dict[str, TextIO] = {}
        for name in NAMES:
            path = folder / f"{name}.jsonl"
            truncate_lines(path, start_iter)
            self.files[name] = open(path, "a", buffering=1)
        self.writer: Any = None
        if tensorboard and find_spec("tensorboard") is None:
            log(f"no TensorBoard: {missing_package('tensorboard')}")
        elif tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            if threading.excepthook is threading.__excepthook__:
                threading.excepthook = _spare_traceback
            with writing(folder / TENSORBOARD):
                self.writer = SummaryWriter(str(folder / TENSORBOARD), purge_step=start_iter)

    def write(self, name: str, iteration: int, values: Mapping[str, float]) -> None:
        """One line of ``metrics``, ``speed`` or ``probes``, also as scalars (``metrics/loss``, ...)."""
        with writing(self.folder / f"{name}.jsonl"):
            self.files[name].write(json.dumps({"iteration": iteration, **values}) + "\n")
        scalars = {key if "/" in key else f"{name}/{key}": value for key, value in values.items()}
        if self.writer is not None:
            with writing(self.folder / TENSORBOARD):
                for key, value in scalars.items():
                    self.writer.add_scalar(key, value, iteration)
        if self.wandb is not None:
            self.wandb.log(scalars, step=iteration)

    @property
    def shows_images(self) -> bool:
        """Whether there is anything that images would go to."""
        return self.writer is not None or self.wandb is not None

    def images(self, iteration: int, images: Mapping[str, np.ndarray]) -> None:
        """Images by name, uint8 [H, W, 3] each, in TensorBoard and W&B."""
        named = {f"images/{name}": image for name, image in images.items()}
        if self.writer is not None:
            with writing(self.folder / TENSORBOARD):
                for name, image in named.items():
                    self.writer.add_image(name, image, iteration, dataformats="HWC")
        if self.wandb is not None:
            from wandb import Image

            self.wandb.log({name: Image(image) for name, image in named.items()}, step=iteration)

    def flush(self) -> None:
        """Everything so far reaches the disk."""
        for name, file in self.files.items():
            with writing(self.folder / f"{name}.jsonl"):
                file.flush()
                os.fsync(file.fileno())
        if self.writer is not None:
            with writing(self.folder / TENSORBOARD):
                self.writer.flush()

    def close(self) -> None:
        """Flush and close; after an error, which is raised, all is closed, too."""
        with ExitStack() as each:
            if self.wandb is not None:
                each.callback(self.wandb.finish)
            if self.writer is not None:
                each.enter_context(writing(self.folder / TENSORBOARD))
                each.callback(self.writer.close)
            for name, file in self.files.items():
                each.enter_context(writing(self.folder / f"{name}.jsonl"))
                each.callback(file.close)
            self.flush()


def _spare_traceback(of: Any) -> None:
    """TensorBoard's thread prints what its next call raises anyhow."""
    is_told = isinstance(of.exc_value, OSError) and type(of.thread).__module__.startswith("tensorboard.")
    if not is_told:
        threading.__excepthook__(of)


def start_wandb(folder: Path, project: str, config: Mapping[str, Any]) -> Any:
    """A run of Weights & Biases. Its id lies in ``folder/wandb_id``: a resumed training goes on in it.

    Values go by iteration. W&B drops iterations that it already has: a resumed training computes those again,
    to the same values. ``WANDB_MODE=offline`` keeps everything on the disk, in ``folder/wandb``.
    """
    try:
        import wandb
    except ImportError as error:
        told = f"log.wandb={project!r}, but wandb cannot be imported ({error}): pip install wandb"
        raise UserError(told) from error
    known = folder / "wandb_id"
    run_id = known.read_text().strip() if known.is_file() else None
    names = {"project": project, "name": folder.name, "dir": str(folder)}
    try:
        run = wandb.init(**names, id=run_id, resume="allow", config=dict(config))
    except wandb.Error as error:  # no account, no network
        way = "WANDB_MODE=offline needs neither account nor network"
        raise UserError(f"log.wandb={project!r}: {str(error).splitlines()[0]} ({way})") from error
    write_text(known, f"{run.id}\n")
    return run


class Speed:
    """Images a second, share of the time spent waiting for data, and time left, over a window of iterations.

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
        """What is done inside (probes, images, checkpoints) counts in the time left alone."""
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

    def estimate(self, left_iters: int, of: str = "") -> str:
        """After the tenth iteration of a process, a line that says how long the rest takes; else nothing.

        Args:
            of: what the time is of, where it is not all.
        """
        eta_s = self.eta_s(left_iters)
        if self.done != ESTIMATE_AT or eta_s is None:
            return ""
        return f"estimate: {in_words(eta_s)} left{of}, at {self.img_per_s:.1f} img/s"

    def eta_s(self, left_iters: int) -> float | None:
        """Seconds that ``left_iters`` iterations will take, with pauses as they have been so far; None while the first
        iterations of the process would be all that it goes by."""
        if self.done <= WARM_ITERS:
            return None
        seconds, _ = self._rates()
        return left_iters * (seconds + self.paused_s / max(self.done, 1))


def peak_memory_gb(device: torch.device) -> float:
    """Most memory so far, 10^9 bytes: allocated on the GPU, or without CUDA held by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage: bytes on macOS, kilobytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def describe(speed: Speed, device: torch.device, lr: float, epoch: str = "") -> str:
    """The numbers of a training beside its losses, in one line: epoch, lr, img/s, share of data wait, peak memory."""
    memory = f"{'GPU' if device.type == 'cuda' else 'process'} {peak_memory_gb(device):.1f} GB"
    of_speed = f"{speed.img_per_s:.1f} img/s  data wait {speed.data_wait:.0%}"
    return f"{f'epoch {epoch}  ' if epoch else ''}lr {lr:.1e}  {of_speed}  {memory}"
