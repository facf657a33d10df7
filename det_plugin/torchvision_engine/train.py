"""One detection fine-tuning from start to ``result.json``, and the evaluation of a finished one."""

import time
from collections.abc import Mapping
from contextlib import closing, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch

from det_plugin import plan
from det_plugin.best import Best, is_kept
from det_plugin.coco.annotations import Data, read_split
from det_plugin.coco.metrics import check_evaluation, in_words
from det_plugin.loader import batches, positions
from det_plugin.loop import Show, fit
from det_plugin.noise import most_objects
from det_plugin.run import DetectionRun, leave_result, metrics_to_come, run_deviations
from det_plugin.torchvision_engine import folder
from det_plugin.torchvision_engine.loader import TrainSamples, noise_samples
from det_plugin.torchvision_engine.predict import evaluate, load_model
from det_plugin.torchvision_engine.trainer import Trainer
from pretrain import distributed
from pretrain.data import digest
from pretrain.data.broken import Skipped
from pretrain.device import choose_device, deterministic
from pretrain.distributed import gather_objects
from pretrain.errors import UserError
from pretrain.files import write_json
from pretrain.log import ProgressLine, log
from pretrain.results.schema import FILE_NAME
from pretrain.run_lock import check_seen
from pretrain.weights import origin_of

LOG_LINES = 1000  # about as many lines as a long run's metrics.jsonl has


def train(
    run: DetectionRun, resume: bool = False, stop_after_it: int | None = None, data_changed: bool = False
) -> Path:
    """Fine-tune and evaluate. Leaves ``result.json``, ``config.json``, ``checkpoints/``,
    ``predictions.json``, ``metrics.jsonl``, ``speed.jsonl``, ``tensorboard/`` and ``figures/``. A finished
    run is left as it is.

    Arguments, result and errors are those of :func:`det_plugin.train.finetune`. On the CPU a resumed run is
    bit-exact. After ``stop_after_it`` iterations it saves and returns, as if interrupted.
    """
    started = time.monotonic()
    device = choose_device(run.device)
    distributed.start(device.type)
    check_seen(run.output)
    run = plan.fitted(run, device, partial(_try, device=device))
    trainer = Trainer(run, device)  # first: it checks settings in seconds; the data take minutes
    data = Data.read(run.data, run.protocol)
    check_evaluation(data.val, run.protocol)
    config = folder.resolved_config(run, trainer.vit, data.train)
    origin = origin_of(run.weights, run.model_kwargs.get("source")) if distributed.is_main() else {}
    is_done = folder.is_over(run.output, config, resume)
    state = folder.load_checkpoint(run.output) if resume and not is_done else None
    if len(set(gather_objects((is_done, state and state["iteration"])))) > 1:
        told = f"not every process finds the same run in {run.output}"
        raise UserError(f"output: {told}; all machines must see one folder")
    before = folder.said_of_data(run.output) if is_done or state else None
    said_of_data = digest.check_run(run.output, data.digest, data_changed, before)
    if is_done:
        log(f"{run.output / FILE_NAME} is there already, of the same settings: nothing to do")
        return run.output / FILE_NAME
    if run.protocol.amp and trainer.amp_dtype is None:
        log(f"warning: amp has no effect on {device.type}; the run is in float32")
    plan.tell(run, data, device, begins=state is None)
    changed = run_deviations(run, (len(data.train.pictures), len(data.val.pictures)), data.n_shared)
    changed |= digest.deviation(said_of_data["changes"])
    said = dict[str, Any](origin=origin, hashed={"engine": folder.ENGINE})
    if distributed.is_main():
        to_come = metrics_to_come(data.train.class_names)
        leave_result(run, to_come, changed, wall_time_s=0.0, begins=True, **said)
        write_json(run.output / folder.CONFIG, config)
        digest.leave(run.output, said_of_data)
        data.leave_split(run.output)
    terms = None
    if state is not None:
        trainer.restore(state)
        started, terms = started - state["wall_time_s"], state["terms"]
        del state  # gigabytes
    end_iter = min(run.protocol.max_iters, stop_after_it or run.protocol.max_iters)
    engine = _Engine(trainer, data, end_iter)
    keeps = distributed.is_main() and is_kept(run.protocol, changed)
    best = Best(run.output, begins=terms is None) if keeps else None
    # Ends its workers, too; they would keep a stopped process alive
    with deterministic(device.type == "cpu"), closing(engine.batches):
        metrics = fit(engine, run, device, terms, started, end_iter, best)
    if metrics and distributed.is_main():
        leave_result(run, metrics, changed, wall_time_s=time.monotonic() - started, **said)
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
    protocol = folder.protocol_of(config)
    how = dict[str, Any](num_classes=protocol.num_classes, training=False, **protocol.reading)
    split = read_split(data, "val", **how)
    split.tell()
    check_evaluation(split, protocol)
    if list(split.class_names) != config["data"]["class_names"]:
        raise UserError(f"data: {split.file} has other categories than those that {output} was trained on")
    total = len(split.pictures)
    line = ProgressLine("evaluation", total) if distributed.is_main() else None
    show = (lambda share, left_s: line.update(round(share * total), "", left_s)) if line else None
    where = dict[str, Any](workers=workers, device=on, output=output)
    with closing(line) if line else nullcontext():
        metrics, _ = evaluate(model.to(on), split, protocol, **where, show=show)
    log(f"{output}, iteration {iteration}: {in_words(metrics)}")
    return metrics


def _try(run: DetectionRun, device: torch.device) -> None:
    """Two steps on noise."""
    trainer, n = Trainer(run, device), run.protocol.batch_size // run.accumulate * min(run.accumulate, 2)
    for _ in range(2):
        trainer.step(noise_samples(run.protocol, n, most_objects(run.protocol)))


class _Engine:
    """:class:`det_plugin.loop.Engine` of a trainer and its data."""

    splits_last = False

    def __init__(self, trainer: Trainer, data: Data, end_iter: int) -> None:
        p, run, spots = trainer.protocol, trainer.run, (distributed.rank(), distributed.world_size())
        indices = (list(positions(it, p.batch_size, *spots)) for it in range(trainer.iteration, end_iter))
        samples = TrainSamples(data.train, p, run.seed)
        self.batches = batches(samples, indices, run.workers, trainer.device, Skipped(run.output))
        self.model, self.n_images = trainer.model, len(data.train.pictures)
        self.trainer, self.data, self.log_period = trainer, data, max(p.max_iters // LOG_LINES, 1)

    @property
    def iteration(self) -> int:
        return self.trainer.iteration

    def step(self) -> tuple[dict[str, float], float]:
        asked = time.perf_counter()
        batch = next(self.batches)
        waited_s = time.perf_counter() - asked
        return self.trainer.step(batch), waited_s

    def evaluate(self, show: Show | None) -> dict[str, Any]:
        run, val = self.trainer.run, self.data.val
        where = dict[str, Any](workers=run.workers, device=self.trainer.device, output=run.output)
        metrics, predictions = evaluate(self.trainer.model, val, self.trainer.protocol, **where, show=show)
        if distributed.is_main():
            from det_plugin.figures import SHOWN, draw_page, spread  # loads matplotlib

            draw_page(val, spread(val, SHOWN), predictions, run.output / "figures" / "detections.png")
            log(f"iteration {self.iteration}: {in_words(metrics)}")
        return metrics

    def save(self, terms: Mapping[str, float], wall_time_s: float) -> None:
        own = {"terms": dict(terms), "wall_time_s": wall_time_s}
        folder.save_checkpoint(self.trainer.run.output, {**self.trainer.state(), **own})
