"""One detection fine-tuning from start to ``result.json``, and the evaluation of one that is over."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from det_plugin.run import DetectionRun, leave_result
from det_plugin.torchvision_engine.checkpoint import load_checkpoint, save_checkpoint
from det_plugin.torchvision_engine.coco import read_split
from det_plugin.torchvision_engine.evaluate import mean_ap
from det_plugin.torchvision_engine.figures import draw_detections
from det_plugin.torchvision_engine.folder import (
    CHECKPOINT,
    ENGINE,
    RESULT,
    backbone_of,
    enter,
    protocol_of,
    read_config,
    resolved_config,
    write_config,
)
from det_plugin.torchvision_engine.loader import TrainSamples, batches, positions
from det_plugin.torchvision_engine.model import build_model
from det_plugin.torchvision_engine.trainer import Data, Trainer, evaluate
from pretrain import distributed
from pretrain.device import choose_device, deterministic
from pretrain.distributed import say
from pretrain.errors import UserError
from pretrain.metrics_log import MetricsLog, ProgressLine

LOG_LINES = 1000  # about so many lines has the metrics.jsonl of a long run
HEADLINE = ("box_ap", "mask_ap", "box_ap50", "mask_ap50")  # of an evaluation, into the log


def train(run: DetectionRun, resume: bool = False, stop_after_it: int | None = None) -> Path:
    """Fine-tune and evaluate. Leaves ``result.json``, ``config.json``, ``checkpoint.pt``, ``predictions.json``, ``metrics.jsonl``,
    ``speed.jsonl``, ``tensorboard/`` and ``figures/``; a run that is over is left as it is.

    Args:
        resume: go on from the folder's checkpoint, if there is one; on the CPU, bit for bit as without the interruption.
        stop_after_it: save and leave after so many iterations, as an interruption would.

    Returns:
        path of ``result.json``.

    Raises:
        UserError: bad settings or data; a folder that holds another run.
        FloatingPointError: a loss is no number; names the iteration and the losses.
    """
    started = time.time()
    device = choose_device(run.device)
    distributed.start(device.type)
    data = Data.read(run.data, run.protocol.num_classes)
    trainer = Trainer(run, device)
    config = resolved_config(run, trainer.vit, len(data.train.pictures), data.train.class_names)
    if enter(run.output, config, resume):
        say(f"{run.output / RESULT} is there already, of the same settings: nothing to do")
        return run.output / RESULT
    if run.protocol.amp and device.type == "cpu":
        say("warning: amp has no effect on the CPU; the run is in float32")
    if distributed.is_main():
        write_config(run.output, config)
    state = load_checkpoint(run.output) if resume else None
    if state is not None:
        trainer.restore(state)
        started -= state["wall_time_s"]
    with deterministic(device.type == "cpu"):
        metrics = _loop(trainer, data, state, started, min(run.protocol.iterations_it, stop_after_it or run.protocol.iterations_it))
    if trainer.iteration == run.protocol.iterations_it and distributed.is_main():
        images = len(data.train.pictures), len(data.val.pictures)
        leave_result(run, metrics, engine=ENGINE, images=images, started=started)
        say(f"{run.output / RESULT}: {mean_ap(metrics)}")
    return run.output / RESULT


def evaluate_folder(output: Path, data: Path, *, device: str = "auto", workers: int = 2) -> dict[str, Any]:
    """COCO metrics of the last checkpoint in a run folder, and ``predictions.json`` beside it. The network is built from
    ``config.json``; no backbone file is needed.

    Raises:
        UserError: no run, no checkpoint, or data that do not fit.
    """
    config, on = read_config(output), choose_device(device)
    distributed.start(on.type)
    protocol, state = protocol_of(config), load_checkpoint(output)
    if state is None:
        raise UserError(f"output: {output} holds no {CHECKPOINT}")
    split = read_split(data, "val", num_classes=protocol.num_classes, training=False)
    model = build_model(backbone_of(config), protocol)
    model.load_state_dict(state["model"])
    metrics, _ = evaluate(model.to(on), split, protocol, workers=workers, device=on, output=output)
    say(f"{output}, iteration {state['iteration']}: {mean_ap(metrics)}")
    return metrics


def _loop(trainer: Trainer, data: Data, state: dict[str, Any] | None, started: float, end_it: int) -> dict[str, Any]:
    """Iterations up to ``end_it`` with logs, checkpoints and evaluations. Returns what an evaluation after the last one found."""
    p, first_it, metrics = trainer.protocol, trainer.iteration, dict[str, Any]()
    log_period = max(p.iterations_it // LOG_LINES, 1)
    log = Log(trainer.run.output, trainer, started) if distributed.is_main() else None
    try:
        if state is not None and _lacks_evaluation(trainer):
            metrics = _evaluate(trainer, data)
            if log:
                log.write(first_it - 1, state["terms"], metrics)
        rank, world = distributed.rank(), distributed.world_size()
        indices = (list(positions(it, p.batch_size, rank, world)) for it in range(first_it, end_it))
        samples = TrainSamples(data.train, p, trainer.run.seed)
        for it, batch in enumerate(batches(samples, indices, trainer.run.workers, trainer.device), first_it):
            terms, metrics = trainer.step(batch), {}
            if log and (_is_due(trainer) or it + 1 == end_it):
                log.save_checkpoint(terms)
            if _is_due(trainer):
                metrics = _evaluate(trainer, data)
            if log:
                log.show(terms)
                if it % log_period == 0 or _is_due(trainer):
                    log.write(it, terms, metrics)
    finally:
        if log:
            log.close()
    return metrics


def _is_due(trainer: Trainer) -> bool:
    """Whether the iterations so far end in an evaluation."""
    return trainer.iteration % trainer.protocol.eval_period_it == 0 or trainer.iteration == trainer.protocol.iterations_it


def _evaluate(trainer: Trainer, data: Data) -> dict[str, Any]:
    run = trainer.run
    metrics, predictions = evaluate(
        trainer.model, data.val, trainer.protocol, workers=run.workers, device=trainer.device, output=run.output
    )
    if distributed.is_main():
        draw_detections(data.val, predictions, run.output / "figures")
        say(f"iteration {trainer.iteration}: {mean_ap(metrics)}")
    return metrics


def _lacks_evaluation(trainer: Trainer) -> bool:
    """Whether a checkpoint was left in the middle of its evaluation, or after the last one, which ``result.json`` needs."""
    path, start = trainer.run.output / "metrics.jsonl", f'{{"iteration": {trainer.iteration - 1},'
    is_written = path.is_file() and any(line.startswith(start) for line in path.read_text().splitlines())
    return _is_due(trainer) and (not is_written or trainer.iteration == trainer.protocol.iterations_it)


class Log:
    """What the main process writes down: metrics, speed, progress, checkpoints."""

    def __init__(self, folder: Path, trainer: Trainer, started: float) -> None:
        self.folder, self.trainer, self.started = folder, trainer, started
        self.first_it, self.since = trainer.iteration, time.time()
        self.metrics = MetricsLog(folder, trainer.iteration, tensorboard=True)
        self.line = ProgressLine("detection", trainer.protocol.iterations_it, trainer.iteration)

    @property
    def img_per_s(self) -> float:
        """Pictures a second since the start or the resumption."""
        seen = (self.trainer.iteration - self.first_it) * self.trainer.protocol.batch_size
        return seen / max(time.time() - self.since, 1e-9)

    def show(self, terms: Mapping[str, float]) -> None:
        """Progress."""
        left = self.trainer.protocol.iterations_it - self.trainer.iteration
        eta_s = left * self.trainer.protocol.batch_size / self.img_per_s
        self.line.update(self.trainer.iteration, f"loss {terms['loss']:.3f}  {self.img_per_s:.1f} img/s", eta_s)

    def write(self, it: int, terms: Mapping[str, float], metrics: Mapping[str, Any]) -> None:
        """An iteration's line; of an evaluation the headline alone."""
        self.metrics.write("metrics", it, {**terms, **{key: metrics[key] for key in HEADLINE if key in metrics}})
        self.metrics.write("speed", it, {"img_per_s": self.img_per_s})

    def save_checkpoint(self, terms: Mapping[str, float]) -> None:
        """``checkpoint.pt``, after the lines of the iterations before."""
        self.metrics.flush()
        save_checkpoint(self.folder, {**self.trainer.state(), "terms": dict(terms), "wall_time_s": time.time() - self.started})

    def close(self) -> None:
        """Close files and terminal."""
        self.metrics.close()
        self.line.close()
