"""Our loop on Detectron2's trainer and hooks: what the stock launcher does, with gradient accumulation, also on the CPU."""

import math
import time
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from det_plugin.requires import detectron2_installed
from pretrain.errors import UserError
from pretrain.metrics_log import MetricsLog

with detectron2_installed():
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.config import instantiate
    from detectron2.engine import SimpleTrainer, hooks
    from detectron2.evaluation import inference_on_dataset
    from detectron2.utils.env import seed_all_rng
    from detectron2.utils.events import CommonMetricPrinter, EventWriter, get_event_storage

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
    """A step over one batch of the loader, in ``accumulate`` equal parts one after another; the loss is the parts' mean.

    Args:
        accumulate: must divide the batch.
        amp: float16 with loss scaling, as Detectron2's AMPTrainer; CUDA only.
    """

    def __init__(
        self, model: nn.Module, data_loader: Iterable[Any], optimizer: torch.optim.Optimizer, *, accumulate: int, amp: bool
    ) -> None:
        super().__init__(model, data_loader, optimizer)
        self.accumulate, self.amp = accumulate, amp
        self.scaler = torch.amp.GradScaler("cuda", enabled=amp)

    def run_step(self) -> None:
        """One update.

        Raises:
            FloatingPointError: a loss that is not finite; it names the iteration and the losses.
        """
        start = time.perf_counter()
        batch = next(self._data_loader_iter)
        data_time = time.perf_counter() - start
        size = len(batch) // self.accumulate
        means: dict[str, Tensor] = defaultdict(lambda: torch.zeros(()))
        self.optimizer.zero_grad()
        for first in range(0, len(batch), size):
            with torch.autocast("cuda", torch.float16, enabled=self.amp):
                losses = self.model(batch[first : first + size])
            self.scaler.scale(sum(losses.values()) / self.accumulate).backward()
            for name, loss in losses.items():
                means[name] = means[name].to(loss.device) + loss.detach() / self.accumulate
        self.write_metrics(means, data_time, self.iter)
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def state_dict(self) -> dict[str, Any]:
        """As Detectron2's AMPTrainer."""
        return {**super().state_dict(), "grad_scaler": self.scaler.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Also what a run without AMP has saved."""
        super().load_state_dict(state_dict)
        if state_dict.get("grad_scaler"):
            self.scaler.load_state_dict(state_dict["grad_scaler"])


class HighestLR(hooks.LRScheduler):
    """Detectron2's schedule; the rate that it logs is that of the layers without decay."""

    @staticmethod
    def get_best_param_group_id(optimizer: torch.optim.Optimizer) -> int:
        """The group whose rate stands for all."""
        rates = [group["lr"] for group in optimizer.param_groups]
        return rates.index(max(rates))


class MetricsLines(EventWriter):
    """``metrics.jsonl``: iteration, loss, its terms, lr, and the AP where it was evaluated."""

    def __init__(self, folder: Path, start_it: int) -> None:
        self.log = MetricsLog(folder, start_it, tensorboard=True)

    def write(self) -> None:
        """The line of this iteration, where it has numbers."""
        storage = get_event_storage()
        values = {}
        for key, (value, iteration) in storage.latest().items():
            if iteration == storage.iter and (key in LOGGED or key.startswith("loss_")) and math.isfinite(value):
                values[LOGGED.get(key, key)] = float(value)
        if values:
            self.log.write("metrics", storage.iter, values)
            self.log.flush()

    def close(self) -> None:
        """Everything is on the disk."""
        self.log.close()


def evaluate(cfg: DictConfig, model: nn.Module) -> dict[str, Any]:
    """The config's evaluator on its test loader."""
    return inference_on_dataset(model, instantiate(cfg.dataloader.test), instantiate(cfg.dataloader.evaluator))


def fit(cfg: DictConfig, model: nn.Module, *, accumulate: int, resume: bool) -> None:
    """Train a detector as its config says, in one process, and evaluate it.

    Args:
        model: ``instantiate(cfg.model)`` on its device.
        accumulate: parts of a batch, one after another.
        resume: go on from the last checkpoint of ``train.output_dir``, if there is one, with other random numbers than at the
            start (Detectron2's own launcher repeats the order of the images).

    Raises:
        UserError: ``accumulate`` does not divide the batch.
    """
    batch = cfg.dataloader.train.total_batch_size
    if accumulate < 1 or batch % accumulate:
        raise UserError(f"accumulate: {accumulate} does not divide batch_size {batch}")
    folder = Path(cfg.train.output_dir)
    cfg.optimizer.params.model = model
    trainer = AccumulatingTrainer(model, (), instantiate(cfg.optimizer), accumulate=accumulate, amp=cfg.train.amp.enabled)
    checkpointer = DetectionCheckpointer(model, str(folder), trainer=trainer)
    trainer.register_hooks(
        [
            hooks.IterationTimer(),
            HighestLR(scheduler=instantiate(cfg.lr_multiplier)),
            hooks.PeriodicCheckpointer(checkpointer, **cfg.train.checkpointer),
            hooks.EvalHook(cfg.train.eval_period, lambda: evaluate(cfg, model)),
        ]
    )
    checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=resume)
    start_it = trainer.iter + 1 if resume and checkpointer.has_checkpoint() else 0
    seed_all_rng(cfg.train.seed + start_it)
    trainer.data_loader = instantiate(cfg.dataloader.train)
    writers = [CommonMetricPrinter(cfg.train.max_iter), MetricsLines(folder, start_it)]
    trainer.register_hooks([hooks.PeriodicWriter(writers, cfg.train.log_period)])
    trainer.train(start_it, cfg.train.max_iter)
