"""One fine-tuning with Detectron2 from start to ``result.json``, and the evaluation of a finished one."""

import logging
import os
import time
from collections.abc import Mapping
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import LazyConfig, instantiate
from detectron2.engine import create_ddp_model, hooks
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage
from detectron2.utils.logger import setup_logger
from fvcore.common.checkpoint import Checkpointer, PeriodicCheckpointer
from omegaconf import DictConfig
from torch import nn

from det_plugin import loop, plan
from det_plugin.best import Best, is_kept
from det_plugin.coco.annotations import Data, read_classes, read_split
from det_plugin.coco.metrics import check_evaluation
from det_plugin.detectron2_engine import saved_config as saved
from det_plugin.detectron2_engine.evaluate import evaluate, leave_result
from det_plugin.detectron2_engine.lazy import config
from det_plugin.detectron2_engine.loader import noise_samples
from det_plugin.detectron2_engine.trainer import LAST, AccumulatingTrainer, WholeCheckpointer, last_whole
from det_plugin.loop import Show, micro_batch_size
from det_plugin.noise import most_objects
from det_plugin.protocol import DetectionProtocol, other_images, with_overrides
from det_plugin.run import DetectionRun, metrics_to_come
from pretrain import distributed
from pretrain.data import digest
from pretrain.data.broken import Skipped
from pretrain.device import choose_device, deterministic
from pretrain.errors import UserError
from pretrain.log import log
from pretrain.results.schema import FILE_NAME
from pretrain.run_lock import check_seen

newest_checkpoint = last_whole


def train(run: DetectionRun, resume: bool = False, data_changed: bool = False) -> Path:
    """Fine-tune and evaluate, with gradient accumulation. Under torchrun all processes share the work.

    The folder gets ``config.yaml``, ``config_resolved.yaml`` (:mod:`saved_config`), ``metrics.jsonl``,
    Detectron2's checkpoints and log, the detections, and ``result.json``. A finished run is left as it is.
    Arguments, result and errors are those of :func:`det_plugin.train.finetune`. On the CPU a resumed run is
    bit-exact.
    """
    device, recipe = choose_device(run.device).type, run.protocol
    distributed.start(device)
    check_seen(run.output)
    run = plan.fitted(run, torch.device(device), partial(_try, device=device))
    seed_all_rng(run.seed)
    if recipe.amp and device != "cuda":
        log("warning: amp needs CUDA; the run is in float32")
        recipe = with_overrides(recipe, {"amp": False})
    cfg = _config(run, recipe, device)
    micro_batch_size(recipe.batch_size, run.accumulate)
    model = instantiate(cfg.model).to(device)  # checks settings and weights in seconds; the data take minutes
    data = Data.read(run.data, recipe)  # finds damage before the first iteration
    check_evaluation(data.val, recipe)
    # All ranks look before a file is written; one decides
    is_done = distributed.gather_objects(saved.is_over(cfg, run.output, resume))[0]
    begun = is_done or (run.output / LAST).is_file()
    said_of_data = digest.check_run(run.output, data.digest, data_changed, {} if begun else None)
    if is_done:
        log(f"{run.output / FILE_NAME} is there already, of the same settings: nothing to do")
        return run.output / FILE_NAME
    plan.tell(run, data, torch.device(device), begins=not (run.output / LAST).is_file())
    if distributed.is_main():
        digest.leave(run.output, said_of_data)
        to_come = metrics_to_come(read_classes(run.data, "val", recipe.val_share).values())
        leave_result(cfg, to_come, (None, 0), run.output, begins=True)
        _start_logs(run.output)
        data.leave_split(run.output)
        LazyConfig.save(cfg, str(run.output / saved.ASKED))
        LazyConfig.save(saved.resolved(cfg), str(run.output / saved.RESOLVED))
    with deterministic(device == "cpu"):
        counts = len(data.train.pictures), len(data.val.pictures)
        changed = other_images(*counts, recipe.train_share)
        keeps = distributed.is_main() and is_kept(recipe, changed)
        best = Best(run.output, begins=not (run.output / LAST).is_file()) if keeps else None
        _fit(cfg, model, run, resume, best, counts)
    return run.output / FILE_NAME


def evaluate_folder(output: Path, data: Path, *, device: str = "auto", workers: int = 2) -> dict[str, Any]:
    """COCO metrics of a run folder's last checkpoint; {} on all ranks but the first. Writes ``result.json``.

    Raises:
        UserError: no run, no checkpoint, or the data do not fit.
    """
    on = choose_device(device).type
    distributed.start(on)
    cfg, last = saved.load_config(output, saved.RESOLVED), last_whole(output)
    if last is None:
        raise UserError(f"{output}: no checkpoint to evaluate")
    recipe = saved.protocol_in(cfg)
    if saved.classes_in(cfg) != read_classes(data, "val", recipe.val_share):
        raise UserError(f"data: {data} has other categories than those that {output} was trained on")
    how = dict[str, Any](num_classes=None, training=False, **recipe.reading)
    split = read_split(data, "val", **how)
    split.tell()
    check_evaluation(split, recipe)
    cfg.dataloader.root, cfg.train.output_dir, cfg.train.device = str(data), str(output), on
    cfg.dataloader.test.num_workers = workers
    cfg.train.init_checkpoint = str(last)
    started, model = time.time(), instantiate(cfg.model).to(on)
    rest = DetectionCheckpointer(model).load(cfg.train.init_checkpoint)
    if distributed.is_main():
        _start_logs(output)
        LazyConfig.save(cfg, str(output / saved.ASKED))
        # The evaluator counts from the file's time
        started -= rest.get("trainer", {}).get("wall_time_s", 0.0)
        os.utime(output / saved.ASKED, (started, started))
    return evaluate(cfg, model)


def _start_logs(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("detectron2", "fvcore"):  # into log.txt alone: on the terminal is our progress
        setup_logger(str(folder), name=name, configure_stdout=False)


def _config(run: DetectionRun, recipe: DetectionProtocol, device: str) -> DictConfig:
    keys = "data", "output", "model_kwargs", "checkpointing", "compile", "seed", "workers"
    how = {key: getattr(run, key) for key in keys}
    cfg = config(recipe, run.backbone, run.weights, device=device, **how)
    cfg.dataloader.evaluator.accumulate = run.accumulate
    return cfg


def _try(run: DetectionRun, device: str) -> None:
    """Two steps on noise."""
    cfg, n_parts = _config(run, run.protocol, device), min(run.accumulate, 2)
    model = instantiate(cfg.model).to(device).train()
    cfg.optimizer.params.model = model
    size = micro_batch_size(run.protocol.batch_size, run.accumulate)
    part = noise_samples(run.protocol, size, most_objects(run.protocol))
    how = dict[str, Any](accumulate=n_parts, amp=cfg.train.amp.enabled)
    trainer = AccumulatingTrainer(model, [part] * 2 * n_parts, instantiate(cfg.optimizer), **how)
    with EventStorage(0):
        for trainer.iter in range(2):
            trainer.run_step()


class _Engine:
    """:class:`det_plugin.loop.Engine` of Detectron2's trainer, from its ``start_iter`` on."""

    splits_last = True

    def __init__(
        self,
        cfg: DictConfig,
        model: nn.Module,
        checkpointer: Checkpointer,
        trainer: AccumulatingTrainer,
        n_images: int,
    ) -> None:
        self.n_images = n_images
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
        return evaluate(self.cfg, self.model, show)

    def save(self, terms: Mapping[str, float], wall_time_s: float) -> None:
        self.saver.step(self.trainer.iter)  # the trainer's state holds both


def _fit(
    cfg: DictConfig,
    model: nn.Module,
    run: DetectionRun,
    resume: bool,
    best: Best | None,
    images: tuple[int, int],
) -> None:
    folder, device = Path(cfg.train.output_dir), next(model.parameters()).device
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    ids = [device.index] if device.type == "cuda" else None
    ranks = create_ddp_model(model, **{**cfg.train.ddp, "device_ids": ids})
    loader = instantiate(cfg.dataloader.train)
    loader.skipped = Skipped(folder)
    parts = loader.parts(run.accumulate)
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
        began = time.time() - (time.monotonic() - trainer.started)
        os.utime(folder / saved.ASKED, (began, began))
    # Ends its workers, too; they would keep a stopped process alive
    with EventStorage(start_it) as trainer.storage, closing(parts):
        engine, terms = (
            _Engine(cfg, model, checkpointer, trainer, images[0]),
            None if last is None else trainer.terms,
        )
        metrics = loop.fit(engine, run, device, terms, trainer.started, trainer.max_iter, best)
        if metrics and engine.iteration < trainer.max_iter:  # else the evaluator has written it
            leave_result(saved.load_config(folder, saved.ASKED, trust=True), metrics, images, folder)
