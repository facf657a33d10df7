"""What a run leaves in its folder. The config names the hook, so MMSegmentation's own launchers leave it too.

``metrics.jsonl`` (iteration, loss, lr; mIoU at each validation), ``result.json``, ``figures/``, ``settings.json`` (the
run's identity), and the saved config, with all arguments of the backbone: it tests and resumes without the pre-training
file. The metric is MMSegmentation's mIoU, but unrounded, and with each class's IoU.
"""

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.dist import get_rank, get_world_size, is_main_process
from mmengine.hooks import CheckpointHook, Hook
from mmengine.model import is_model_wrapper
from mmseg.evaluation import IoUMetric
from mmseg.registry import HOOKS
from mmseg.registry import METRICS as METRIC_KINDS
from torch import Tensor

from pretrain import distributed
from pretrain.data import digest
from pretrain.data.broken import Skipped
from pretrain.errors import Interrupted, UserError
from pretrain.files import write_json, write_text, writing
from pretrain.log import say
from pretrain.metrics_log import truncate_lines
from pretrain.results.provenance import provenance
from pretrain.results.schema import Protocol, finished, planned, write_result
from pretrain.signals import StopSignals
from pretrain.weights import check_fit, origin_of
from seg_plugin.config import deviations, given_model_kwargs, identity, label_sets, with_todays_data
from seg_plugin.predict import segment_dataset, spread

METRICS = ("mIoU", "mAcc", "aAcc")
SETTINGS_FILE = "settings.json"
N_DRAWN = 4  # validation images in the figure


@HOOKS.register_module()
class PosfieldRunHook(Hook):
    """Writes all that the module's docstring names.

    Args:
        protocol: fields of the :class:`SegmentationProtocol` that the config was made from.
        origin: only in a saved config: its backbone's method, effective_epochs, weights_hash, model_kwargs.
        interval: iterations between two lines of metrics.jsonl.
    """

    priority = "NORMAL"  # before ParamSchedulerHook, so that the lr is the iteration's

    def __init__(
        self, protocol: Mapping[str, Any], origin: Mapping[str, Any] | None = None, interval: int = 50
    ) -> None:
        self.protocol = dict(protocol)
        self.origin = dict(origin) if origin else None
        if self.origin and "backbone_flags" in self.origin:  # the key's name before
            self.origin["model_kwargs"] = self.origin.pop("backbone_flags")
        self.interval = interval
        self.earlier_s = 0.0  # wall time before the run was resumed
        self.loaded = False
        self.metrics: dict[str, Any] = {}

    def after_load_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Check that every tensor fits. mmengine only warns, and would test a partly random model."""
        self.loaded = True
        self.earlier_s = float(checkpoint.get("posfield", {}).get("wall_time_s", 0.0))
        source = checkpoint.get("state_dict", checkpoint)
        given = {key.removeprefix("module."): value for key, value in source.items()}
        check_fit("checkpoint: it does not fit the config's model", _model(runner).state_dict(), given)

    def before_train(self, runner: Any) -> None:
        """Find out what this run is, and save it."""
        self.started, self.skipped = time.monotonic(), Skipped(Path(runner.work_dir))
        backbone = _model(runner).backbone
        if self.origin and backbone.weights is None and not self.loaded:
            raise UserError(
                "backbone: this config was saved by a run, for testing and resuming it; to train anew, give "
                "model.backbone.weights (or take the config that the run was made from)"
            )
        model_kwargs = self.origin["model_kwargs"] if self.origin else given_model_kwargs(runner.cfg)
        if backbone.weights is not None or self.origin is None:  # otherwise it is what the saved config says
            self.origin = origin_of(backbone.weights, model_kwargs.get("source"))
        self.origin = {**self.origin, "model_kwargs": model_kwargs}
        cfg, size = runner.cfg, get_world_size()
        self.identity = identity(cfg, backbone.vit.model_kwargs, self.origin["weights_hash"], size)
        labels = label_sets(with_todays_data(cfg))["training"]
        self.labels = labels.description
        self.deviations = deviations(cfg, model_kwargs, size) | digest.run_deviation(Path(runner.work_dir))
        if is_main_process():
            planned(
                Path(runner.work_dir), **self._result(runner, {"iou": dict.fromkeys(labels.classes, 0.0)})
            )
            self.folder = Path(runner.work_dir)
            self.log = self.folder / "metrics.jsonl"
            write_json(self.folder / SETTINGS_FILE, self.identity)
            truncate_lines(self.log, before_iter=runner.iter + 1)  # theirs will run again
            self._save_config(runner, backbone)

    def before_train_epoch(self, runner: Any) -> None:
        """Validate first where a resumed run stopped at a validation: it may not have finished it."""
        at, ends = runner.iter, runner.iter == runner.max_iters
        if not at or runner.val_loop is None or not (ends or at % runner.train_loop.val_interval == 0):
            return
        if is_main_process() and self.log.is_file():  # without the line of this validation
            lines = [(line, json.loads(line)) for line in self.log.read_text(encoding="utf-8").splitlines()]
            kept = [line + "\n" for line, of in lines if of["iteration"] != at or "loss" in of]
            write_text(self.log, "".join(kept))
        runner.val_loop.run()

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """Seed torch: what it draws (dropped paths) only depends on (seed, iteration, process)."""
        word = np.random.SeedSequence((runner.seed, batch_idx, get_rank())).generate_state(1, np.uint64)
        torch.manual_seed(int(word[0]))

    def _save_config(self, runner: Any, backbone: Any) -> None:
        """Save the config again, with the checkpoint's arguments instead of the checkpoint."""
        old = runner.cfg.model.backbone
        names = ("type", "name", "drop_path", "freeze", "checkpointing")
        kept = {key: old[key] for key in names if key in old} | {"weights": None}
        runner.cfg.model.backbone = {**given_model_kwargs(runner.cfg), **backbone.vit.model_kwargs, **kept}
        for hook in runner.cfg.custom_hooks:
            if hook.type == type(self).__name__:
                hook.origin = self.origin
        runner.cfg.resume = False  # or tools/test.py would resume, too, and need the training data
        runner.dump_config()

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Mapping[str, Any] | None = None
    ) -> None:
        """Log every ``interval`` iterations, and count the skipped images. All processes stop at the first loss that is
        not finite."""
        iteration, samples = batch_idx + 1, (data_batch or {}).get("data_samples", [])
        self.skipped.record(len(samples), [name for of in samples for name in of.metainfo.get("broken", ())])
        terms = {key: value.detach() for key, value in (outputs or {}).items() if "loss" in key}
        losses = dict(zip(terms, distributed.mean_over_ranks(torch.stack(list(terms.values()))).tolist()))
        if not all(map(math.isfinite, losses.values())):
            told = ", ".join(f"{key} is {value}" for key, value in losses.items())
            raise FloatingPointError(f"iteration {iteration}: {told}")
        if is_main_process() and (iteration % self.interval == 0 or iteration == runner.max_iters):
            lr = max(group["lr"] for group in runner.optim_wrapper.param_groups)
            self._log({"iteration": iteration, "loss": losses["loss"], "lr": lr})

    def after_val_epoch(self, runner: Any, metrics: Mapping[str, float] | None = None) -> None:
        """Keep the metrics. The last ones are the run's."""
        found = {name: (metrics or {}).get(name, math.nan) for name in METRICS}
        self.metrics = {name.lower(): value for name, value in found.items() if not math.isnan(value)}
        if is_main_process() and hasattr(self, "log"):  # training
            self._log({"iteration": runner.iter, **self.metrics})

    def before_save_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Save the time so far: a resumed run reports all of it."""
        checkpoint["posfield"] = {"wall_time_s": self._elapsed_s()}

    def after_train(self, runner: Any) -> None:
        """Write result.json and the figure."""
        if not is_main_process() or not self.metrics:
            return
        from seg_plugin.figures import draw_page  # loads matplotlib

        dataset = runner.val_dataloader.dataset
        rows = list(segment_dataset(_model(runner), dataset, spread(N_DRAWN, len(dataset))))
        caption = (
            "Each row: image, ground truth, prediction of the linear decoder. "
            f"{len(rows)} of {len(dataset)} validation images, evenly spaced in the list; light gray: not labeled."
        )
        file, title = self.folder / "figures" / "segmentations.png", "Segmentation of validation images"
        draw_page(file, rows, dataset.metainfo, title=title, caption=caption)
        evaluators = (one for one in runner.val_loop.evaluator.metrics if isinstance(one, PosfieldIoU))
        metrics = {**self.metrics, "iou": {}}
        if (evaluator := next(evaluators, None)) is not None:
            metrics |= {"iou": evaluator.per_class, "val_classes": evaluator.n_present}
        write_result(finished(**self._result(runner, metrics)), self.folder)

    def _result(self, runner: Any, metrics: Mapping[str, Any]) -> dict[str, Any]:
        assert self.origin is not None
        name, version, changed = self.protocol["name"], self.protocol["version"], self.deviations
        whence = {key: self.origin[key] for key in ("method", "effective_epochs", "weights_hash")}
        return {
            "kind": "segmentation",
            "backbone": runner.cfg.model.backbone.name,
            "patch_px": _model(runner).backbone.vit.patch_size,
            "protocol": Protocol(name=name, version=version, full=not changed, deviations=changed),
            "metrics": dict(metrics),
            "labels": self.labels,
            "seed": runner.seed,
            "wall_time_s": self._elapsed_s(),
            **provenance(self.identity["settings"]),
            **whence,
        }

    def _elapsed_s(self) -> float:
        return self.earlier_s + time.monotonic() - self.started

    def _log(self, line: Mapping[str, Any]) -> None:
        with writing(self.log), open(self.log, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


@METRIC_KINDS.register_module()
class PosfieldIoU(IoUMetric):
    """Adds up each class's intersection and union over the whole data set, then divides. Processes take the
    images in turns; each image counts once.

    Attributes:
        per_class: {class name: IoU in percent} of the last evaluation, of classes that are present or predicted.
        n_present: how many classes occur in its labels.
    """

    per_class: dict[str, float] = {}
    n_present = 0

    def __init__(self, **options: Any) -> None:
        # The other way, "cpu", is files in the working directory, which machines may not share.
        super().__init__(collect_device="gpu", **options)

    def compute_metrics(self, results: list[tuple[Tensor, ...]]) -> dict[str, float]:
        """mIoU, mAcc, aAcc in percent, from each image's (intersect, union, prediction, label) pixel counts
        [classes]. The means leave out classes without a pixel (IoU) or without a labeled pixel (Acc)."""
        if self.format_only:
            return super().compute_metrics(results)
        intersect, union, _, label = (torch.stack(counts).double().sum(0) for counts in zip(*results))
        iou, accuracy = 100 * intersect / union, 100 * intersect / label  # nan where a class has no pixel
        names, self.n_present = self.dataset_meta["classes"], int((label > 0).sum())
        self.per_class = {name: value for name, value in zip(names, iou.tolist()) if value == value}
        means = iou.nanmean(), accuracy.nanmean(), 100 * intersect.sum() / label.sum()
        return {name: float(mean) for name, mean in zip(METRICS, means)}


@HOOKS.register_module()
class PatienceHook(Hook):
    """Ends a training once ``patience`` validations in turn had no better mIoU than one before them. A resumed run reads
    those before in ``metrics.jsonl``."""

    priority = "HIGH"  # reads the file before PosfieldRunHook cuts it

    def __init__(self, patience: int) -> None:
        self.patience, self.found = patience, dict[int, float]()  # mIoU by iteration

    def before_train(self, runner: Any) -> None:
        """Read the validations up to here."""
        log = Path(runner.work_dir) / "metrics.jsonl"
        lines = map(json.loads, log.read_text(encoding="utf-8").splitlines() if log.is_file() else ())
        self.found = {
            of["iteration"]: of["miou"] for of in lines if "miou" in of and of["iteration"] <= runner.iter
        }

    def after_val_epoch(self, runner: Any, metrics: Mapping[str, float] | None = None) -> None:
        """Judge the validation."""
        self.found[runner.iter] = (metrics or {}).get("mIoU", math.nan)
        best = max(self.found, key=lambda at: (self.found[at], -at))
        waited = sum(at > best for at in self.found)
        if waited >= self.patience and runner.iter < runner.max_iters:
            say(
                f"over after {runner.iter} iterations by patience={self.patience}; best: mIoU {self.found[best]:.2f} at {best}"
            )
            runner.train_loop.stop_training = True


class StopHook(Hook):
    """Saves and stops on a signal. Only :func:`seg_plugin.run.train` adds it, not MMSegmentation's launchers."""

    priority = "LOWEST"  # after the schedules have stepped and CheckpointHook has saved, if it does

    def __init__(self, signals: StopSignals) -> None:
        self.signals = signals

    def after_train_iter(self, runner: Any, batch_idx: int, *_: Any, **__: Any) -> None:
        """Between two iterations."""
        self._stop(runner, batch_idx + 1)

    def after_val_iter(self, runner: Any, *_: Any, **__: Any) -> None:
        """Between two images of a validation, which the resumed run begins again."""
        self._stop(runner, runner.iter)

    def _stop(self, runner: Any, iteration: int) -> None:
        if not self.signals.on_any_rank():
            return
        saver = next(hook for hook in runner.hooks if isinstance(hook, CheckpointHook))
        if saver.filename_tmpl.format(iteration) != Path(saver.last_ckpt or "").name:
            saver._save_checkpoint_with_step(
                runner, iteration, meta={"epoch": runner.epoch, "iter": iteration}
            )
        why = self.signals.received or "another rank was signalled"
        raise Interrupted(f"{why}; saved at iteration {iteration}")


def _model(runner: Any) -> Any:
    return runner.model.module if is_model_wrapper(runner.model) else runner.model
