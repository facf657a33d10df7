"""The loop of a fine-tuning and its log, for both engines, and what a step is: parts of a batch, gradients of
all ranks, losses that must be finite."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from det_plugin.best import Best
from det_plugin.protocol import DetectionProtocol
from det_plugin.run import DetectionRun
from pretrain import checkpoints, distributed
from pretrain.errors import Interrupted, UserError
from pretrain.log import ProgressLine, log, warnings_into
from pretrain.metrics_log import MetricsLog, Speed, describe, is_logged, peak_memory_gb
from pretrain.signals import StopSignals

SAVE_PERIOD_S = 900  # the most that a killed process loses
HEADLINE = ("box_ap", "mask_ap", "box_ap50", "mask_ap50")  # of an evaluation, into the log
Show = Callable[[float, float], None]  # called with the share that is done, and the seconds left


class Engine(Protocol):
    """What an engine does in the loop.

    Attributes:
        log_period: iterations between the lines of ``metrics.jsonl``.
        splits_last: the last evaluation has a line of its own, after that of the last iteration.
        model: the detector, of one process.
        n_images: of an epoch.
    """

    log_period: int
    splits_last: bool
    model: nn.Module
    n_images: int

    @property
    def iteration(self) -> int:
        """How many are done."""

    def step(self) -> tuple[dict[str, float], float]:
        """One iteration: its losses (means over micro-batches and ranks) and lr; seconds waited for data."""

    def evaluate(self, show: Show | None) -> dict[str, Any]:
        """COCO's metrics of the network as it is, at least on the main process."""

    def save(self, terms: Mapping[str, float], wall_time_s: float) -> None:
        """Write a checkpoint, with what the log needs to go on. Called on the main process alone."""


def fit(
    engine: Engine,
    run: DetectionRun,
    device: torch.device,
    terms: Mapping[str, float] | None,
    started: float,
    end_iter: int,
    best: Best | None = None,
) -> dict[str, Any]:
    """Iterate up to ``end_iter``, with the evaluations, logs and checkpoints that are due on the way, or until the best
    evaluation is ``patience`` evaluations ago. Returns the last evaluation's metrics; {} where the run is not over.

    Args:
        terms: the logs of a resumed run's last step; None at the start.
        started: ``time.monotonic()`` at the run's start, less its interruptions.
        best: keeps the best weights, of the main process.

    Raises:
        Interrupted: on SIGTERM, SIGUSR1 or Ctrl-C, once the state is saved.
        FloatingPointError: a loss is not finite; names the iteration and the losses.
    """
    first_it, metrics, is_over = engine.iteration, dict[str, Any](), False
    due = _Due(engine, run.protocol, best)
    # Interrupted before its evaluation, or at the last one, whose result is due
    lacks = due.evaluation() and (due.end() or not is_logged(run.output, first_it - 1))
    is_behind = terms is not None and distributed.gather_objects(lacks)[0]
    log = Log(engine, run, device, started, first_it - is_behind, best) if distributed.is_main() else None
    try:
        with (
            StopSignals() as signals,
            warnings_into(run.output),
        ):  # up to here a signal simply ends the process
            if is_behind and terms is not None:
                metrics = _evaluated(engine, log, first_it - 1, terms)
                is_over = distributed.gather_objects(due.end())[0]
            for it in range(first_it, first_it if is_over else end_iter):
                (terms, waited_s), metrics = engine.step(), {}
                stopping = signals.on_any_rank()
                if log:
                    log.step(terms, waited_s)
                    if it % engine.log_period == 0 and not due.evaluation():
                        log.write(it, terms, {})
                    if due.evaluation() or stopping or it + 1 == end_iter or log.is_old:
                        log.save(terms)
                if stopping:  # an evaluation that is due can wait for the resumed run
                    distributed.barrier()  # if another rank ended first, the launcher would end this, too
                    reason = signals.received or "another rank was signalled"
                    raise Interrupted(f"{reason}; saved at iteration {engine.iteration}")
                if due.evaluation():
                    metrics = _evaluated(engine, log, it, terms)
                    is_over = distributed.gather_objects(due.end())[0]
                if is_over:
                    break
    finally:
        if log:
            log.close()
    if best and is_over:
        best.tell(engine.iteration, run.protocol)
    return metrics if is_over else {}


@dataclass(frozen=True)
class _Due:
    """What is due after an iteration; the end is known to the main process alone."""

    engine: Engine
    protocol: DetectionProtocol
    best: Best | None

    def evaluation(self) -> bool:
        return self.engine.iteration % self.protocol.eval_every == 0 or self._is_full

    def end(self) -> bool:
        return self._is_full or bool(self.best and self.best.is_stale(self.engine.iteration, self.protocol))

    @property
    def _is_full(self) -> bool:
        return self.engine.iteration == self.protocol.max_iters


def _evaluated(engine: Engine, log: "Log | None", it: int, terms: Mapping[str, float]) -> dict[str, Any]:
    """An evaluation after iteration ``it``, in the log."""
    with log.speed.paused() if log else nullcontext():
        metrics = engine.evaluate(log.evaluated if log else None)
    if log:
        log.write(it, terms, metrics)
    return metrics


class Log:
    """What the main process writes, from iteration ``first_line_it`` on."""

    def __init__(
        self,
        engine: Engine,
        run: DetectionRun,
        device: torch.device,
        started: float,
        first_line_it: int,
        best: Best | None,
    ) -> None:
        self.engine, self.device, self.started, self.best = engine, device, started, best
        self.max_iters, self.saved_s = run.protocol.max_iters, time.monotonic()
        checkpoints.clean(run.output)
        self.speed = Speed(run.protocol.batch_size)
        self.metrics = MetricsLog(run.output, first_line_it, tensorboard=True)
        self.losses: dict[str, float] = {}
        self.line = ProgressLine("detection", self.max_iters, engine.iteration)

    @property
    def is_old(self) -> bool:
        """Whether the last checkpoint is older than :data:`SAVE_PERIOD_S`."""
        return time.monotonic() - self.saved_s > SAVE_PERIOD_S

    def step(self, terms: Mapping[str, float], waited_s: float) -> None:
        """After an iteration: update speed and progress."""
        self.speed.tick(waited_s)
        done, speed = self.engine.iteration, self.speed
        if estimate := speed.estimate(self.max_iters - done, " without evaluations"):
            log(estimate)
        epoch, epochs = (
            math.ceil(n * speed.batch_size / self.engine.n_images) for n in (done, self.max_iters)
        )
        self.losses = {name: value for name, value in terms.items() if "loss" in name}
        note = describe(speed, self.device, terms["lr"], f"{epoch}/{epochs}")
        self.line.update(done, note, speed.eta_s(self.max_iters - done), self.losses)

    def evaluated(self, share: float, left_s: float) -> None:
        """During an evaluation: a ``share`` of the images is done."""
        self.line.update(self.engine.iteration, f"evaluation {share:.0%}", left_s, self.losses)

    def write(self, it: int, terms: Mapping[str, float], metrics: Mapping[str, Any]) -> None:
        """Write an iteration's lines: losses, lr and an evaluation's headline, whose weights may be the best; speed and
        peak memory."""
        headline = {key: metrics[key] for key in HEADLINE if key in metrics}
        if self.best and "box_ap" in metrics:
            self.best.keep(self.engine.model, metrics["box_ap"], self.engine.iteration)
        if self.engine.splits_last and it + 1 == self.max_iters:
            self.metrics.write("metrics", it, terms)
            self.metrics.write("metrics", it + 1, headline)
        else:
            self.metrics.write("metrics", it, {**terms, **headline})
        if self.speed.done:
            speed = {"img_per_s": self.speed.img_per_s, "data_wait": self.speed.data_wait}
            self.metrics.write("speed", it, {**speed, "peak_memory_gb": peak_memory_gb(self.device)})

    def save(self, terms: Mapping[str, float]) -> None:
        """Save a checkpoint, once the lines of earlier iterations are on disk."""
        self.metrics.flush()
        with self.speed.paused():
            self.engine.save(terms, time.monotonic() - self.started)
        self.saved_s = time.monotonic()

    def close(self) -> None:
        """Close files and terminal."""
        self.metrics.close()
        self.line.close()


def micro_batch_size(batch_size: int, accumulate: int) -> int:
    """Images that one rank computes on at a time.

    Raises:
        UserError: the batch cannot be shared equally by ranks and parts.
    """
    ranks = distributed.world_size()
    if accumulate < 1 or batch_size % (ranks * accumulate):
        parts = f"{ranks} processes x accumulate={accumulate}"
        raise UserError(f"protocol: batch_size={batch_size} cannot be shared by {parts}")
    return batch_size // (ranks * accumulate)


def averaging(model: nn.Module, now: bool) -> AbstractContextManager[None]:
    """Around a forward and backward pass: whether the ranks average their gradients after it."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) and not now else nullcontext()


def mean_losses(terms: Sequence[Mapping[str, Tensor]], iteration: int) -> dict[str, float]:
    """Means of the losses over micro-batches and ranks.

    Args:
        terms: scalars by name, of each micro-batch.

    Raises:
        FloatingPointError: one is not finite; names the iteration and the losses.
    """
    means = torch.stack([torch.stack([term[name].detach() for term in terms]).mean() for name in terms[0]])
    values = dict(zip(terms[0], distributed.mean_over_ranks(means).tolist()))
    if not all(map(math.isfinite, values.values())):
        named = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        raise FloatingPointError(f"iteration {iteration}: a loss is no number ({named})")
    return values
