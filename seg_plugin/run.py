"""One segmentation fine-tuning: its inputs, its mmengine config, and its training."""

import logging
import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dist import master_only
from mmengine.logging import MMLogger
from mmengine.runner import Runner

from pretrain import distributed
from pretrain.build import build_for_fine_tuning
from pretrain.data import digest, share
from pretrain.data.datasets import LabelSet, MaskRule
from pretrain.errors import Interrupted, UserError, explained_shortage
from pretrain.files import read_mapping, replacing
from pretrain.jobs import start
from pretrain.log import say, warnings_into
from pretrain.results.provenance import file_hash
from pretrain.results.runs import holds_result
from pretrain.results.schema import FILE_NAME
from pretrain.run_lock import check_seen, run_lock
from pretrain.settings import replaced
from pretrain.signals import StopSignals
from pretrain.weights import backbone_name
from seg_plugin import plan
from seg_plugin.backbone import OF_THE_RUN
from seg_plugin.compat import on_device
from seg_plugin.config import changed_since, identity, label_sets, processes, segmenter_config
from seg_plugin.data import DATASETS, check_parts, in_words, recipe_for
from seg_plugin.hooks import SETTINGS_FILE, StopHook
from seg_plugin.loop import end_workers
from seg_plugin.predict import newest_checkpoint
from seg_plugin.protocol import SegmentationProtocol

IMAGES = "settings.images_hash"  # of a run's identity


@dataclass(frozen=True)
class SegmentationRun:
    """Everything that the outcome of a run depends on, and where it goes.

    Attributes:
        backbone: registry name.
        weights: the backbone's checkpoint; None: random initialization.
        data: folder of the protocol's data set (:mod:`pretrain.data.datasets`), or the folder around it.
        protocol: the recipe (full or scaled down).
        device: ``auto`` | ``cpu`` | ``cuda``.
        workers: data-loading processes.
        model_kwargs: further arguments of ``build_backbone``.
        masks: how masks of your own data are read.
        is_sure: the protocol may be far too long for the data.
    """

    backbone: str
    weights: Path | None
    data: Path
    output: Path
    protocol: SegmentationProtocol
    seed: int = 0
    device: str = "auto"
    workers: int = 4
    model_kwargs: Mapping[str, Any] = field(default_factory=dict)
    masks: MaskRule = MaskRule()
    is_sure: bool = False


def prepare(
    data: str | Path,
    *,
    output: str | Path,
    weights: str | Path | None = None,
    backbone: str | None = None,
    dataset: str | None = None,
    masks: MaskRule | None = None,
    seed: int = 0,
    device: str = "auto",
    workers: int = 4,
    model_kwargs: Mapping[str, Any] | None = None,
    is_sure: bool = False,
    **fields: Any,
) -> SegmentationRun:
    """A run on a data set, with what is left out found in the files.

    Args:
        data: folder of the data set: ADE20K, Pascal VOC, Cityscapes, or your own (:mod:`pretrain.data.datasets`).
        backbone: registry name; a file of ours says it itself.
        dataset: a key of :data:`seg_plugin.data.DATASETS`; None: what the folder looks like.
        output: run folder.
        weights: the backbone's checkpoint; None: random initialization.
        masks: how masks of your own data are read.
        seed: of all that is drawn.
        device: ``auto`` | ``cpu`` | ``cuda``.
        workers: data-loading processes.
        model_kwargs: further arguments of ``build_backbone``.
        is_sure: the protocol may be far too long for the data.
        fields: of the protocol (:class:`seg_plugin.protocol.SegmentationProtocol`), as values or text.

    Raises:
        UserError: nothing says the backbone's name; as :func:`seg_plugin.data.recipe_for`.
    """
    weights, masks = None if weights is None else Path(weights), masks or MaskRule()
    name, recipe = backbone_name(backbone, weights), recipe_for(data, dataset, fields, masks)
    how = seed, device, workers, dict(model_kwargs or {}), masks, is_sure
    return SegmentationRun(name, weights, Path(data), Path(output), recipe, *how)


def go_on(output: str | Path, data_changed: bool = False, **changes: Any) -> Path:
    """:func:`finetune` of the run in a folder, from its last checkpoint, as it was started.

    Args:
        data_changed: of :func:`train`.
        changes: ``device``, ``workers``.

    Raises:
        UserError: the folder does not say how it was started; as :func:`train`.
    """
    said = {**start.started(Path(output), ("data", "backbone", "dataset", "masks")), **changes}
    said["masks"] = replaced(MaskRule(), said["masks"], "masks")
    said["dataset"] = next(name for name, of in DATASETS.items() if of.protocol == said["dataset"])
    return finetune(output=output, resume=True, data_changed=data_changed, **said)


def finetune(
    data: str | Path, *, output: str | Path, resume: bool = False, data_changed: bool = False, **options: Any
) -> Path:
    """Fine-tune a segmenter, on all processes of torchrun together.

    Args:
        data: folder of the data set: ADE20K, Pascal VOC, Cityscapes, or your own images and masks.
        output: run folder.
        resume: continue from the folder's last checkpoint, if there is one.
        data_changed: continue though the data are others than before, which is marked.
        options: those of :func:`seg_plugin.run.prepare`, and fields of the protocol.

    Returns:
        path of ``result.json``. A finished run is left as it is.

    Raises:
        UserError: bad settings or data; the folder holds another run.
        FloatingPointError: a loss is not finite.
        Interrupted: on SIGTERM, SIGUSR1 or Ctrl-C, once the state is saved.
    """
    return train(prepare(data, output=output, **options), resume, data_changed)


def config(run: SegmentationRun) -> Config:
    """The mmengine config of a run. MMSegmentation's own launchers can run it too.

    Raises:
        UserError: the processes cannot share the batch; the backbone's width is not known.
    """
    how = {name: getattr(run, name) for name in ("weights", "model_kwargs", "masks", "seed", "workers")}
    values = segmenter_config(run.protocol, run.backbone, data_root=run.data, **how)
    # "pytorch" means several processes: torchrun or posfield submit set their ranks.
    launcher = "pytorch" if "RANK" in os.environ else "none"
    values |= dict(
        work_dir=str(run.output), launcher=launcher, model_wrapper_cfg={"type": "PosfieldDataParallel"}
    )
    return Config(values, cfg_text="made by seg_plugin.run\n", filename="config.py")  # of the saved copy


def train(run: SegmentationRun, resume: bool = False, data_changed: bool = False) -> Path:
    """Train, validate, and write ``result.json`` (returned) and what else :mod:`seg_plugin.hooks` names.

    A finished run with the same settings is left as it is.

    Args:
        resume: continue from the folder's last checkpoint, if there is one.
        data_changed: continue though the data are others than before (:mod:`pretrain.data.digest`): the order
            from here on is that of the new ones, and the result is marked.

    Raises:
        UserError: bad data, weights or settings; the folder holds a run with other settings, or, without
            ``resume``, the checkpoint of an unfinished one.
        FloatingPointError: a loss is not finite.
        Interrupted: on SIGTERM, SIGUSR1 or Ctrl-C, once the state is saved.
    """
    more = "share the batch among more GPUs (torchrun), and go on with --resume; or start anew with amp=true"
    lock = run_lock(run.output, newest_checkpoint)
    with lock, explained_shortage(more, f"give --workers below {run.workers} and go on with --resume"):
        return plan.ended(_train(run, resume, data_changed))


def _train(run: SegmentationRun, resume: bool, data_changed: bool) -> Path:
    cfg, output = config(run), Path(run.output)
    if cfg.launcher == "none" and processes() > 1:
        told = f"WORLD_SIZE or SLURM_NTASKS says {processes()} processes, but this one was told no RANK"
        raise UserError(f"{told}: unset them, or use torchrun or posfield submit")
    is_over, changes = _is_over(run, cfg, data_changed)
    checkpoint, parts = None if is_over else newest_checkpoint(output), label_sets(cfg)
    now = {part: found.digest() for part, found in parts.items()}
    said_of_data = digest.check_run(output, now, data_changed, {} if is_over or checkpoint else None)
    said_of_data["changes"] += changes
    if is_over:
        say(f"{output} holds this run already, finished: nothing to do")
        return output / FILE_NAME
    if run.protocol.amp and (run.device == "cpu" or not torch.cuda.is_available()):
        raise UserError("protocol: amp=True needs a CUDA device")
    check_parts(parts["training"], parts["validation"])
    if run.masks.val_share and not parts["training"].val_share:
        say(f"{run.data} has images for validation: --val-share is not used")
    if checkpoint is not None:
        if not resume:
            told = f"holds an unfinished run ({checkpoint.name}); go on with it by --resume"
            raise UserError(f"output: {output} {told}")
        cfg.resume, cfg.load_from = True, str(checkpoint)
    try:
        with on_device(run.device) as device, StopSignals() as signals, ExitStack() as at_end:
            # Before mmengine, which knows neither gloo nor a task with one GPU
            distributed.start(device.type)
            check_seen(output)
            plan.tell(
                run, len(parts["training"]), len(parts["validation"]), device, begins=checkpoint is None
            )
            if distributed.is_main():
                say(f"data: {in_words([*parts.values()])}")
                digest.leave(output, said_of_data)
                leave_split(output, parts)
            at_end.enter_context(warnings_into(output))
            runner = _Runner.from_cfg(cfg)
            runner.register_hook(StopHook(signals))
            runner.register_hook(plan.ProgressHook(run.protocol.batch_size, len(parts["training"])))
            at_end.callback(end_workers, runner)
            runner.train()
        distributed.barrier()  # until the main process has written the result
        distributed.stop()
    except Interrupted:
        distributed.barrier()  # until the main process has saved: torchrun ends all as soon as one ends
        # All ranks end here; if only one fails, leaving the group could wait for the others
        distributed.stop()
        raise
    except UserError as error:  # a data-loading process's error has its traceback; the last line is ours
        told = str(error).strip().splitlines()[-1]
        raise UserError(told.removeprefix(f"{type(error).__module__}.{type(error).__name__}: ")) from error
    return output / FILE_NAME


def leave_split(output: Path, parts: Mapping[str, LabelSet]) -> None:
    """Write down how the images of one part were divided, if they were."""
    names = ([name.lstrip("/") for name in parts[part].named] for part in ("training", "validation"))
    if val_share := parts["training"].val_share:
        share.leave_split(output, val_share, *names)


class _Runner(Runner):
    """mmengine's, whose checkpoints get their names once they are whole, and whose log goes to its file alone, its
    warnings to :func:`pretrain.log.warnings_into`, too: on a terminal it begins with hundreds of lines."""

    @master_only
    def save_checkpoint(self, out_dir: str, filename: str, *options: Any, **more: Any) -> None:
        with replacing(Path(out_dir) / filename) as partial:
            super().save_checkpoint(out_dir, partial.name, *options, **more)

    def build_logger(self, *arguments: Any, **options: Any) -> MMLogger:
        """mmengine's logger."""
        logger = super().build_logger(*arguments, **options)
        logger.handlers = [handler for handler in logger.handlers if isinstance(handler, logging.FileHandler)]
        logger.setLevel(logging.DEBUG)  # its handlers choose; else it would have its parent's
        logger.parent = logging.getLogger()  # mmengine's loggers have none
        return logger


def _is_over(run: SegmentationRun, cfg: Config, data_changed: bool) -> tuple[bool, list[str]]:
    """Whether the folder holds this run, finished; and how a run of an earlier version, which left no ``data.json``,
    says that its data have changed, where that is wanted."""
    saved, changed, of_data = Path(run.output) / SETTINGS_FILE, None, list[str]()
    if saved.is_file():
        model_kwargs = {key: value for key, value in run.model_kwargs.items() if key not in OF_THE_RUN}
        vit = build_for_fine_tuning(run.backbone, run.weights, **model_kwargs)
        before = read_mapping(saved, "output").get("weights_hash")
        weights_hash = file_hash(run.weights, before) if run.weights else None
        changed = changed_since(saved, identity(cfg, vit.model_kwargs, weights_hash, processes()))
        has_digest = (Path(run.output) / digest.FILE_NAME).is_file()
        if IMAGES in changed and (has_digest or data_changed):
            del changed[IMAGES]
            of_data += ["other names of images"] * (not has_digest)
    return holds_result(Path(run.output), changed, has_checkpoint=False, resume=False), of_data
