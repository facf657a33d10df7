"""One fine-tuning with Detectron2 from start to ``result.json``, and the evaluation of a finished one."""

import os
import time
from pathlib import Path
from typing import Any

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import LazyConfig, instantiate
from detectron2.utils.env import seed_all_rng
from detectron2.utils.logger import setup_logger

from det_plugin.coco.annotations import Data, read_classes
from det_plugin.detectron2_engine.checkpoint import last_whole
from det_plugin.detectron2_engine.evaluate import evaluate
from det_plugin.detectron2_engine.lazy import config
from det_plugin.detectron2_engine.saved_config import (
    ASKED,
    RESOLVED,
    classes_in,
    is_over,
    load_config,
    resolved,
)
from det_plugin.detectron2_engine.trainer import fit
from det_plugin.loop import micro_batch_size
from det_plugin.protocol import with_overrides
from det_plugin.run import DetectionRun
from pretrain import distributed
from pretrain.device import choose_device, deterministic
from pretrain.errors import UserError
from pretrain.log import log
from pretrain.results.schema import FILE_NAME


def train(run: DetectionRun, resume: bool = False) -> Path:
    """Fine-tune and evaluate, with gradient accumulation. Under torchrun all processes share the work.

    The folder gets ``config.yaml``, ``config_resolved.yaml`` (:mod:`saved_config`), ``metrics.jsonl``,
    Detectron2's checkpoints and log, the detections, and ``result.json``. A finished run is left as it is.
    Arguments, result and errors are those of :func:`det_plugin.train.finetune`. On the CPU a resumed run is
    bit-exact.
    """
    device, recipe = choose_device(run.device).type, run.protocol
    distributed.start(device)
    seed_all_rng(run.seed)
    if recipe.amp and device != "cuda":
        log("warning: amp needs CUDA; the run is in float32")
        recipe = with_overrides(recipe, {"amp": False})
    cfg = config(
        recipe,
        run.backbone,
        run.weights,
        data=run.data,
        output=run.output,
        model_kwargs=run.model_kwargs,
        checkpointing=run.checkpointing,
        compile=run.compile,
        seed=run.seed,
        device=device,
        workers=run.workers,
    )
    cfg.dataloader.evaluator.accumulate = run.accumulate
    micro_batch_size(recipe.batch_size, run.accumulate)
    model = instantiate(cfg.model).to(device)  # checks settings and weights in seconds; the data take minutes
    Data.read(run.data, recipe)  # finds damage before the first iteration
    # All ranks look before a file is written; one decides
    if distributed.gather_objects(is_over(cfg, run.output, resume))[0]:
        log(f"{run.output / FILE_NAME} is there already, of the same settings: nothing to do")
        return run.output / FILE_NAME
    if distributed.is_main():
        _start_logs(run.output)
        LazyConfig.save(cfg, str(run.output / ASKED))
        LazyConfig.save(resolved(cfg), str(run.output / RESOLVED))
    with deterministic(device == "cpu"):
        fit(cfg, model, run, resume=resume)
    return run.output / FILE_NAME


def evaluate_folder(output: Path, data: Path, *, device: str = "auto", workers: int = 2) -> dict[str, Any]:
    """COCO metrics of a run folder's last checkpoint; {} on all ranks but the first. Writes ``result.json``.

    Raises:
        UserError: no run, no checkpoint, or the data do not fit.
    """
    on = choose_device(device).type
    distributed.start(on)
    cfg, last = load_config(output, RESOLVED), last_whole(output)
    if last is None:
        raise UserError(f"{output}: no checkpoint to evaluate")
    if classes_in(cfg) != read_classes(data, "val"):
        raise UserError(f"data: {data} has other categories than those that {output} was trained on")
    cfg.dataloader.root, cfg.train.output_dir, cfg.train.device = str(data), str(output), on
    cfg.dataloader.test.num_workers = workers
    cfg.train.init_checkpoint = str(last)
    started, model = time.time(), instantiate(cfg.model).to(on)
    rest = DetectionCheckpointer(model).load(cfg.train.init_checkpoint)
    if distributed.is_main():
        _start_logs(output)
        LazyConfig.save(cfg, str(output / ASKED))
        # The evaluator counts from the file's time
        started -= rest.get("trainer", {}).get("wall_time_s", 0.0)
        os.utime(output / ASKED, (started, started))
    return evaluate(cfg, model)


def _start_logs(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("detectron2", "fvcore"):
        setup_logger(str(folder), name=name)
