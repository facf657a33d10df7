"""One detection fine-tuning from start to ``result.json``, and the evaluation of a finished one."""

import time
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from det_plugin.coco.annotations import Data, read_split
from det_plugin.coco.metrics import in_words
from det_plugin.figures import SHOWN, draw_page, spread
from det_plugin.loader import batches, positions
from det_plugin.run import DetectionRun, leave_result, run_deviations, write_json
from det_plugin.torchvision_engine.evaluate import evaluate
from det_plugin.torchvision_engine.folder import (
    CONFIG,
    ENGINE,
    is_over,
    load_checkpoint,
    protocol_of,
    resolved_config,
    save_checkpoint,
)
from det_plugin.torchvision_engine.loader import TrainSamples
from det_plugin.torchvision_engine.predict import load_model
from det_plugin.torchvision_engine.trainer import Trainer
from pretrain import checkpoints, distributed
from pretrain.device import choose_device, deterministic
from pretrain.distributed import gather_objects
from pretrain.errors import Interrupted, UserError
from pretrain.log import ProgressLine, log
from pretrain.metrics_log import MetricsLog, Speed, is_logged, peak_memory_gb
from pretrain.results.schema import FILE_NAME
from pretrain.run_lock import check_seen
from pretrain.signals import StopSignals
from pretrain.weights import origin_of

LOG_LINES = 1000  # about as many lines as a long run's metrics.jsonl has
SAVE_PERIOD_S = 900  # the most that a killed process loses
HEADLINE = ("box_ap", "mask_ap", "box_ap50", "mask_ap50")  # of an evaluation, into the log


def train(run: DetectionRun, resume: bool = False, stop_after_it: int | None = None) -> Path:
    """Fine-tune and evaluate. Leaves ``result.json``, ``config.json``, ``checkpoints/``,
    ``predictions.json``, ``metrics.jsonl``, ``speed.jsonl``, ``tensorboard/`` and ``figures/``. A finished
    run is left as it is.

    Arguments, result and errors are those of :func:`det_plugin.train.finetune`. On the CPU a resumed run is
    bit-exact. After ``stop_after_it`` iterations it saves and returns, as if interrupted.
    """
    started = time.time()
    device = choose_device(run.device)
    distributed.start(device.type)
    check_seen(run.output)
    trainer = Trainer(run, device)  # first: it checks settings in seconds; the data take minutes
    data = Data.read(run.data, run.protocol)
    config = resolved_config(run, trainer.vit, data.train)
    origin = origin_of(run.weights, run.model_kwargs.get("source")) if distributed.is_main() else {}
    is_done = is_over(run.output, config, resume)
    state = load_checkpoint(run.output) if resume and not is_done else None
    if len(set(gather_objects((is_done, state and state["iteration"])))) > 1:
        told = f"not every process finds the same run in {run.output}"
        raise UserError(f"output: {told}; all machines must see one folder")
    if is_done:
        log(f"{run.output / FILE_NAME} is there already, of the same settings: nothing to do")
        return run.output / FILE_NAME
    if run.protocol.amp and trainer.amp_dtype is None:
        log(f"warning: amp has no effect on {device.type}; the run is in float32")
    if distributed.is_main():
        write_json(run.output / CONFIG, config, indent=2)
    terms = None
    if state is not None:
        trainer.restore(state)
        started, terms = started - state["wall_time_s"], state["terms"]
        del state  # gigabytes
    end_iter = min(run.protocol.max_iters, stop_after_it or run.protocol.max_iters)
    # Up to here a signal simply ends the process
    with deterministic(device.type == "cpu"), StopSignals() as signals:
        metrics = _loop(trainer, data, terms, started, end_iter, signals)
    if trainer.iteration == run.protocol.max_iters and distributed.is_main():
        changed = run_deviations(run, (len(data.train.pictures), len(data.val.pictures)))
        leave_result(run, metrics, changed, origin=origin, started=started, hashed={"engine": ENGINE})
    return run.output / FILE_NAME


def evaluate_folder(output: Path, data: Path, *, device: str = "auto", workers: int = 2) -> dict[str, Any]:
    """COCO metrics of a run folder's last checkpoint. Also writes ``predictions.json``.

    ``config.json`` says how to build the network; no backbone file is needed.

    Raises:
        UserError: no run, no checkpoint, or the data do not fit.
    """
    on = choose_device(device)
    distributed.start(on.type)
    model, config, iteration = load_model(output)
    protocol = protocol_of(config)
    split = read_split(data, "val", num_classes=protocol.num_classes, training=False)
    if list(split.class_names) != config["data"]["class_names"]:
        raise UserError(f"data: {split.file} has other categories than those that {output} was trained on")
    total = len(split.pictures)
    line = ProgressLine("evaluation", total, 0) if distributed.is_main() else None
    show = (lambda share, left_s: line.update(round(share * total), "", left_s)) if line else None
    try:
        where = dict[str, Any](workers=workers, device=on, output=output)
        metrics, _ = evaluate(model.to(on), split, protocol, **where, show=show)
    finally:
        if line:
            line.close()
    log(f"{output}, iteration {iteration}: {in_words(metrics)}")
    return metrics


def _loop(
    trainer: Trainer,
    data: Data,
    terms: Mapping[str, float] | None,
    started: float,
    end_iter: int,
    signals: StopSignals,
) -> dict[str, Any]:
    """Iterate up to ``end_iter``. Returns the last evaluation's metrics.

    Args:
        terms: the logs of a resumed run's last step; None at the start.
    """
    p, first_it, metrics = trainer.protocol, trainer.iteration, dict[str, Any]()
    log_period = max(p.max_iters // LOG_LINES, 1)
    is_behind = terms is not None and gather_objects(_lacks_evaluation(trainer))[0]
    log = Log(trainer, started, first_it - is_behind) if distributed.is_main() else None
    try:
        if is_behind:
            metrics = _evaluate(trainer, data, log)
            if log and terms:
                log.write(first_it - 1, terms, metrics)
        rank, world = distributed.rank(), distributed.world_size()
        indices = (list(positions(it, p.batch_size, rank, world)) for it in range(first_it, end_iter))
        samples = TrainSamples(data.train, p, trainer.run.seed)
        asked = time.perf_counter()
        for batch in batches(samples, indices, trainer.run.workers, trainer.device):
            waited_s = time.perf_counter() - asked
            it, terms, metrics = trainer.iteration, trainer.step(batch), {}
            is_due, stopping = _is_due(trainer), signals.on_any_rank()
            if log:
                log.step(terms, waited_s)
                if it % log_period == 0 and not is_due:
                    log.write(it, terms, {})
                if is_due or stopping or it + 1 == end_iter or log.is_old:
                    log.save_checkpoint(terms)
            if stopping:  # an evaluation that is due can wait for the resumed run
                distributed.barrier()
                reason = signals.received or "another rank was signalled"
                raise Interrupted(f"{reason}; saved at iteration {trainer.iteration}")
            if is_due:
                with log.speed.paused() if log else nullcontext():
                    metrics = _evaluate(trainer, data, log)
                if log:
                    log.write(it, terms, metrics)
            asked = time.perf_counter()
    finally:
        if log:
            log.close()
    return metrics


def _is_due(trainer: Trainer) -> bool:
    """Whether an evaluation follows the last iteration."""
    done, p = trainer.iteration, trainer.protocol
    return done % p.eval_every == 0 or done == p.max_iters


def _lacks_evaluation(trainer: Trainer) -> bool:
    """Whether a checkpoint was interrupted before its evaluation, or is the last, whose result is due."""
    is_written = is_logged(trainer.run.output, trainer.iteration - 1)
    return _is_due(trainer) and (not is_written or trainer.iteration == trainer.protocol.max_iters)


def _evaluate(trainer: Trainer, data: Data, own: "Log | None") -> dict[str, Any]:
    run, show = trainer.run, own.evaluated if own else None
    where = dict[str, Any](workers=run.workers, device=trainer.device, output=run.output)
    metrics, predictions = evaluate(trainer.model, data.val, trainer.protocol, **where, show=show)
    if distributed.is_main():
        draw_page(data.val, spread(data.val, SHOWN), predictions, run.output / "figures" / "detections.png")
        log(f"iteration {trainer.iteration}: {in_words(metrics)}")
    return metrics


class Log:
    """What the main process writes, from iteration ``first_line_it`` on."""

    def __init__(self, trainer: Trainer, started: float, first_line_it: int) -> None:
        self.folder, self.trainer, self.started = trainer.run.output, trainer, started
        checkpoints.clean(self.folder)
        self.speed, self.saved_s = Speed(trainer.protocol.batch_size), time.monotonic()
        self.metrics = MetricsLog(self.folder, first_line_it, tensorboard=True)
        self.line = ProgressLine("detection", trainer.protocol.max_iters, trainer.iteration)

    @property
    def is_old(self) -> bool:
        """Whether the last checkpoint is older than :data:`SAVE_PERIOD_S`."""
        return time.monotonic() - self.saved_s > SAVE_PERIOD_S

    def step(self, terms: Mapping[str, float], waited_s: float) -> None:
        """After an iteration: update speed and progress."""
        self.speed.tick(waited_s)
        done, speed = self.trainer.iteration, self.speed
        note = f"loss {terms['loss']:.3f}  {speed.img_per_s:.1f} img/s  data wait {speed.data_wait:.0%}"
        note += f"  {peak_memory_gb(self.trainer.device):.1f} GB"
        self.line.update(done, note, speed.eta_s(self.trainer.protocol.max_iters - done))

    def evaluated(self, share: float, left_s: float) -> None:
        """During an evaluation: a ``share`` of the images is done."""
        self.line.update(self.trainer.iteration - 1, f"evaluation {share:.0%}", left_s)

    def write(self, it: int, terms: Mapping[str, float], metrics: Mapping[str, Any]) -> None:
        """Write an iteration's lines: losses, lr and an evaluation's headline; speed and peak memory."""
        headline = {key: metrics[key] for key in HEADLINE if key in metrics}
        self.metrics.write("metrics", it, {**terms, **headline})
        if self.speed.done:
            speed = {"img_per_s": self.speed.img_per_s, "data_wait": self.speed.data_wait}
            self.metrics.write("speed", it, {**speed, "peak_memory_gb": peak_memory_gb(self.trainer.device)})

    def save_checkpoint(self, terms: Mapping[str, float]) -> None:
        """Write a checkpoint, once the lines of earlier iterations are on disk."""
        self.metrics.flush()
        with self.speed.paused():
            own = {"terms": dict(terms), "wall_time_s": time.time() - self.started}
            save_checkpoint(self.folder, {**self.trainer.state(), **own})
        self.saved_s = time.monotonic()

    def close(self) -> None:
        """Close files and terminal."""
        self.metrics.close()
        self.line.close()
