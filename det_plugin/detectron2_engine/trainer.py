"""Our loop on Detectron2's trainer and hooks.

It does what the stock launcher does, with gradient accumulation, also on the CPU, and resumes as if it had
not been interrupted.
"""

import logging
import os
import time
from collections.abc import Iterable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from detectron2.config import instantiate
from detectron2.engine import SimpleTrainer, create_ddp_model, hooks
from detectron2.utils.events import EventStorage
from fvcore.common.checkpoint import Checkpointer, PeriodicCheckpointer
from omegaconf import DictConfig
from torch import nn

from det_plugin import loop
from det_plugin.detectron2_engine.checkpoint import WholeCheckpointer, last_whole
from det_plugin.detectron2_engine.evaluate import evaluate
from det_plugin.detectron2_engine.saved_config import ASKED
from det_plugin.loop import Show, averaging, mean_losses
from det_plugin.run import DetectionRun
from pretrain import distributed
from pretrain.errors import UserError


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

    def run_step(self) -> None:
        """One update.

        Raises:
            FloatingPointError: a loss is not finite; names the iteration and the losses. The weights are
                those before the step.
        """
        self.optimizer.zero_grad()
        self.waited_s, terms = 0.0, []
        for part in range(self.accumulate):
            start = time.perf_counter()
            samples = next(self._data_loader_iter)
            self.waited_s += time.perf_counter() - start
            with averaging(self.model, now=part + 1 == self.accumulate):
                with torch.autocast("cuda", torch.float16, enabled=self.amp):
                    losses = self.model(samples)
                self.scaler.scale(sum(losses.values()) / self.accumulate).backward()
            terms.append({name: loss.detach() for name, loss in losses.items()})
        values = mean_losses(terms, self.iter)
        losses = {"total_loss": sum(values.values()), **values}
        self.last = {**losses, "lr": max(group["lr"] for group in self.optimizer.param_groups)}
        self.scaler.step(self.optimizer)
        self.scaler.update()

    @property
    def terms(self) -> dict[str, float]:
        """The last losses and learning rate by the log's names; {} after another trainer's checkpoint."""
        return {"loss" if name == "total_loss" else name: value for name, value in self.last.items()}

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


class _Engine:
    """:class:`det_plugin.loop.Engine` of Detectron2's trainer, from its ``start_iter`` on."""

    splits_last = True

    def __init__(
        self, cfg: DictConfig, model: nn.Module, checkpointer: Checkpointer, trainer: AccumulatingTrainer
    ) -> None:
        self.cfg, self.model, self.trainer, self.log_period = cfg, model, trainer, cfg.train.log_period
        self.iteration, how = trainer.start_iter, (1, trainer.max_iter, cfg.train.checkpointer.max_to_keep)
        self.saver = PeriodicCheckpointer(checkpointer, *how)
        files = sorted(Path(checkpointer.save_dir).glob("model_[0-9]*.pth"))
        before = (file for file in files if file.stem < f"model_{self.iteration:07d}")
        self.saver.recent_checkpoints = list(map(str, before))
        trainer.before_train()

    def step(self) -> tuple[dict[str, float], float]:
        self.trainer.iter = self.iteration
        self.trainer.before_step()
        self.trainer.run_step()
        self.trainer.after_step()
        self.iteration += 1
        return self.trainer.terms, self.trainer.waited_s

    def evaluate(self, show: Show | None) -> dict[str, Any]:
        self.trainer.storage.iter = self.iteration
        return evaluate(self.cfg, self.model)

    def save(self, terms: Mapping[str, float], wall_time_s: float) -> None:
        self.saver.step(self.trainer.iter)  # the trainer's state holds both


def fit(cfg: DictConfig, model: nn.Module, run: DetectionRun, *, resume: bool) -> None:
    """Train a detector by its config, on all ranks, and evaluate it.

    Args:
        model: ``instantiate(cfg.model)`` on its device.
        run: what the config was made from.
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
    parts = instantiate(cfg.dataloader.train).parts(run.accumulate)
    how = dict[str, Any](accumulate=run.accumulate, amp=cfg.train.amp.enabled)
    trainer = AccumulatingTrainer(ranks, parts, optimizer, **how)
    trainer.register_hooks([hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier))])
    checkpointer = WholeCheckpointer(model, str(folder), trainer=trainer)
    # The same for all ranks
    last = distributed.gather_objects(last_whole(folder) if resume and distributed.is_main() else None)[0]
    if last is not None:
        if distributed.any_over_ranks(not last.is_file()):
            raise UserError(f"output: not every process finds {last}; all machines must see one folder")
        checkpointer.load(str(last))
    start_it = 0 if last is None else trainer.iter + 1
    trainer.iter, trainer.start_iter, trainer.max_iter = start_it, start_it, run.protocol.max_iters
    logging.getLogger("detectron2").info(f"Starting training from iteration {start_it}")
    if distributed.is_main():  # the evaluator counts the run's time from here
        os.utime(folder / ASKED, (trainer.started, trainer.started))
    # Ends its workers, too; they would keep a stopped process alive
    with EventStorage(start_it) as trainer.storage, closing(parts):
        engine, terms = _Engine(cfg, model, checkpointer, trainer), None if last is None else trainer.terms
        loop.fit(engine, run, device, terms, trainer.started, trainer.max_iter)
