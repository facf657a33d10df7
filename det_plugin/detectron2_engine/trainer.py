"""Our loop on Detectron2's trainer and hooks.

It does what the stock launcher does, with gradient accumulation, also on the CPU, and resumes as if it had
not been interrupted.
"""

import logging
import math
import os
import time
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from detectron2.config import instantiate
from detectron2.engine import HookBase, SimpleTrainer, create_ddp_model, hooks
from detectron2.utils.events import CommonMetricPrinter, EventStorage
from omegaconf import DictConfig
from torch import nn

from det_plugin.detectron2_engine.checkpoint import Checkpoints, WholeCheckpointer, last_whole
from det_plugin.detectron2_engine.evaluate import evaluate
from det_plugin.detectron2_engine.saved_config import ASKED
from det_plugin.step import averaging, mean_losses
from pretrain import distributed
from pretrain.errors import Interrupted, UserError
from pretrain.metrics_log import MetricsLog, is_logged, peak_memory_gb
from pretrain.signals import StopSignals

# Detectron2's names of what metrics.jsonl holds besides the loss_* terms.
LOGGED = {
    "total_loss": "loss",
    "lr": "lr",
    "bbox/AP": "box_ap",
    "segm/AP": "mask_ap",
    "bbox/AP50": "box_ap50",
    "segm/AP50": "mask_ap50",
}


class AccumulatingTrainer(SimpleTrainer):
    """A step over ``accumulate`` parts of a batch, in turn. The loss is the parts' mean.

    Args:
        model: the detector, or DistributedDataParallel around it. Ranks average their gradients after the
            last part only.
        data_loader: parts, without end (:meth:`det_plugin.detectron2_engine.loader.TrainLoader.parts`).
        amp: float16 with loss scaling, as in Detectron2's AMPTrainer. CUDA only.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader: Iterable[Any],
        optimizer: torch.optim.Optimizer,
        *,
        accumulate: int,
        amp: bool,
    ) -> None:
        super().__init__(model, data_loader, optimizer)
        self.accumulate, self.amp, self.started = accumulate, amp, time.time()
        self.scaler = torch.amp.GradScaler("cuda", enabled=amp)
        self.last: dict[str, float] = {}  # losses and learning rate of the last step, by Detectron2's names

    def train(self, start_iter: int, max_iter: int, makes_up: bool = False) -> None:
        """Iterations ``start_iter`` ... ``max_iter - 1``, then the evaluation.

        Args:
            makes_up: first evaluate and log the iteration before, whose process was killed.

        Raises:
            Interrupted: on SIGTERM or SIGUSR1, once the state is saved.
        """
        logging.getLogger("detectron2").info(f"Starting training from iteration {start_iter}")
        self.iter, self.start_iter, self.max_iter = start_iter, start_iter, max_iter
        with EventStorage(start_iter) as self.storage, StopSignals() as signals:
            try:
                self.before_train()
                if makes_up:
                    self._end_of_step(start_iter - 1)
                for self.iter in range(start_iter, max_iter):
                    self.before_step()
                    self.run_step()
                    self.after_step()
                    if signals.on_any_rank() and self.iter + 1 < max_iter:
                        self._stop(signals)
                self.iter = max_iter
            except BaseException:
                # Nothing to evaluate
                self._hooks[:] = [hook for hook in self._hooks if not isinstance(hook, hooks.EvalHook)]
                raise
            finally:
                self.after_train()

    def _end_of_step(self, it: int) -> None:
        self.iter = self.storage.iter = it
        for name, value in self.last.items():
            self.storage.put_scalar(name, value, smoothing_hint=name != "lr")  # as in its own step
        for hook in self._hooks:
            if isinstance(hook, (hooks.EvalHook, MetricsLines)):
                hook.after_step()

    def _stop(self, signals: StopSignals) -> None:
        for hook in self._hooks:
            if isinstance(hook, Checkpoints):
                hook.save()
        distributed.barrier()  # if another rank ended first, the launcher would end this process, too
        reason = signals.received or "another rank was signalled"
        raise Interrupted(f"{reason}; saved at iteration {self.iter + 1}")

    def run_step(self) -> None:
        """One update.

        Raises:
            FloatingPointError: a loss is not finite; names the iteration and the losses. The weights are
                those before the step.
        """
        self.optimizer.zero_grad()
        waited_s, terms = 0.0, []
        for part in range(self.accumulate):
            start = time.perf_counter()
            samples = next(self._data_loader_iter)
            waited_s += time.perf_counter() - start
            with averaging(self.model, now=part + 1 == self.accumulate):
                with torch.autocast("cuda", torch.float16, enabled=self.amp):
                    losses = self.model(samples)
                self.scaler.scale(sum(losses.values()) / self.accumulate).backward()
            terms.append({name: loss.detach() for name, loss in losses.items()})
        values = mean_losses(terms, self.iter)
        losses = {"total_loss": sum(values.values()), **values}
        self.last = {**losses, "lr": max(group["lr"] for group in self.optimizer.param_groups)}
        self.storage.put_scalars(data_time=waited_s, **losses)
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def state_dict(self) -> dict[str, Any]:
        """The state of Detectron2's AMPTrainer, with the last losses and the time so far."""
        own = {"last": self.last, "wall_time_s": time.time() - self.started}
        return {**super().state_dict(), "grad_scaler": self.scaler.state_dict(), **own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore it. States of Detectron2's own trainers load, too."""
        super().load_state_dict(state_dict)
        self.last = state_dict.get("last", {})
        self.started -= state_dict.get("wall_time_s", 0.0)
        if state_dict.get("grad_scaler"):
            self.scaler.load_state_dict(state_dict["grad_scaler"])


class MetricsLines(HookBase):
    """Writes ``metrics.jsonl`` (iteration, losses, lr, AP where it was evaluated) and ``speed.jsonl``.

    Args:
        start_it: the first iteration of this process. Lines from it on are dropped.
        periods_it: of the lines and of the evaluations.
        batch_size: images an iteration, over all ranks.
    """

    def __init__(
        self, folder: Path, start_it: int, periods_it: tuple[int, int], batch_size: int, device: torch.device
    ) -> None:
        self.log = MetricsLog(folder, start_it, tensorboard=True)
        self.periods_it, self.batch_size, self.device = periods_it, batch_size, device

    def after_step(self) -> None:
        """Called by the trainer."""
        done = self.trainer.iter + 1
        if any(done % period == 0 for period in self.periods_it) or done == self.trainer.max_iter:
            self._write()

    def after_train(self) -> None:
        """Write the last evaluation's line, and everything to disk."""
        if self.trainer.iter == self.trainer.max_iter:
            self._write()
        self.log.close()

    def _write(self) -> None:
        storage = self.trainer.storage
        found = {key: value for key, (value, it) in storage.latest().items() if it == storage.iter}
        values = {
            LOGGED.get(key, key): float(value)
            for key, value in found.items()
            if (key in LOGGED or key.startswith("loss_")) and math.isfinite(value)
        }
        if values:
            self.log.write("metrics", storage.iter, values)
        if found.get("time"):  # seconds an iteration, by Detectron2's timer
            speed = {"img_per_s": self.batch_size / found["time"]}
            speed["peak_memory_gb"] = peak_memory_gb(self.device)
            self.log.write("speed", storage.iter, speed)
        self.log.flush()


def fit(cfg: DictConfig, model: nn.Module, *, accumulate: int, resume: bool) -> None:
    """Train a detector by its config, on all ranks, and evaluate it.

    Args:
        model: ``instantiate(cfg.model)`` on its device.
        accumulate: parts of a rank's batch.
        resume: continue from the last checkpoint of ``train.output_dir``, if there is one.

    Raises:
        UserError: ranks and parts cannot share the batch; bad data; not all machines see the folder.
        Interrupted: on SIGTERM or SIGUSR1, once the state is saved.
    """
    folder, device = Path(cfg.train.output_dir), next(model.parameters()).device
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    ids = [device.index] if device.type == "cuda" else None
    ranks = create_ddp_model(model, **{**cfg.train.ddp, "device_ids": ids})
    parts = instantiate(cfg.dataloader.train).parts(accumulate)
    trainer = AccumulatingTrainer(ranks, parts, optimizer, accumulate=accumulate, amp=cfg.train.amp.enabled)
    scheduler = hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier))
    trainer.register_hooks([hooks.IterationTimer(), scheduler])
    checkpointer = WholeCheckpointer(model, str(folder), trainer=trainer)
    # The same for all ranks
    last = distributed.gather_objects(last_whole(folder) if resume and distributed.is_main() else None)[0]
    start_it, makes_up = 0, False
    if last is not None:
        if distributed.any_over_ranks(not last.is_file()):
            raise UserError(f"output: not every process finds {last}; all machines must see one folder")
        checkpointer.load(str(last))
        start_it = trainer.iter + 1
        makes_up = distributed.any_over_ranks(distributed.is_main() and not is_logged(folder, start_it - 1))
    evaluation = hooks.EvalHook(cfg.train.eval_period, lambda: evaluate(cfg, model))
    if distributed.is_main():
        # The evaluator counts the run's time from here
        os.utime(folder / ASKED, (trainer.started, trainer.started))
        periods_it = cfg.train.log_period, cfg.train.eval_period
        lines = MetricsLines(folder, start_it, periods_it, cfg.dataloader.train.total_batch_size, device)
        printer = hooks.PeriodicWriter([CommonMetricPrinter(cfg.train.max_iter)], cfg.train.log_period)
        saver = Checkpoints(checkpointer, start_it, **cfg.train.checkpointer)
        trainer.register_hooks([saver, evaluation, lines, printer])
    else:
        trainer.register_hooks([evaluation])
    with closing(parts):  # ends its workers; they would keep a stopped process alive
        trainer.train(start_it, cfg.train.max_iter, makes_up)
