"""One segmentation fine-tuning: its inputs, its mmengine config, and its training."""

import json
import os
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.runner import Runner

from pretrain import distributed
from pretrain.build import build_for_fine_tuning
from pretrain.errors import Interrupted, UserError
from pretrain.log import log, say
from pretrain.results.provenance import file_hash
from pretrain.results.runs import holds_result
from pretrain.results.schema import FILE_NAME
from pretrain.settings import compared
from pretrain.signals import StopSignals
from seg_plugin.backbone import OF_THE_RUN
from seg_plugin.compat import on_device
from seg_plugin.config import processes, segmenter_config
from seg_plugin.data import check_masks
from seg_plugin.datasets import Located, locate
from seg_plugin.hooks import SETTINGS_FILE, StopHook
from seg_plugin.identity import identity
from seg_plugin.processes import end_workers
from seg_plugin.protocol import SegmentationProtocol

CONFIG_FILE = "config.py"


@dataclass(frozen=True)
class SegmentationRun:
    """Everything that the outcome of a run depends on, and where it goes.

    Attributes:
        backbone: registry name.
        weights: the backbone's checkpoint; None: random initialization.
        data: folder of the protocol's data set (:mod:`seg_plugin.datasets`), or the folder around it.
        output: run folder.
        protocol: the recipe (full or scaled down).
        device: ``auto`` | ``cpu`` | ``cuda``.
        workers: data-loading processes.
        model_kwargs: further arguments of ``build_backbone``.
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


def config(run: SegmentationRun, data: Located) -> Config:
    """The mmengine config of a run on located data. MMSegmentation's own launchers can run it too.

    Raises:
        UserError: the processes cannot share the batch; the backbone's width is not known.
    """
    values = segmenter_config(
        run.protocol,
        run.backbone,
        weights=run.weights,
        model_kwargs=run.model_kwargs,
        data_root=data.root,
        classes=data.classes,
        layout=data.layout,
        seed=run.seed,
        workers=run.workers,
    )
    values["work_dir"] = str(run.output)
    # "pytorch" means several processes: torchrun or posfield submit set their ranks.
    values["launcher"] = "pytorch" if "RANK" in os.environ else "none"
    values["model_wrapper_cfg"] = {"type": "PosfieldDataParallel"}
    # The file name of the saved copy.
    return Config(values, cfg_text="made by seg_plugin.run\n", filename=CONFIG_FILE)


def train(run: SegmentationRun, resume: bool = False) -> Path:
    """Train, validate, and write ``result.json`` (returned) and what else :mod:`seg_plugin.hooks` names.

    A finished run with the same settings is left as it is.

    Args:
        resume: continue from the folder's last checkpoint, if there is one.

    Raises:
        UserError: bad data, weights or settings; the folder holds a run with other settings, or, without
            ``resume``, the checkpoint of an unfinished one.
        FloatingPointError: a loss is not finite.
        Interrupted: on SIGTERM or SIGUSR1, once the state is saved.
    """
    data, output = locate(run.data, run.protocol), Path(run.output)
    cfg = config(run, data)
    if cfg.launcher == "none" and processes() > 1:
        told = f"WORLD_SIZE or SLURM_NTASKS says {processes()} processes"
        raise UserError(
            f"{told}, but this one was told no RANK: unset them, or use torchrun or posfield submit"
        )
    if _is_over(run, cfg):
        say(f"{output} holds this run already, finished: nothing to do")
        return output / FILE_NAME
    if run.protocol.amp and (run.device == "cpu" or not torch.cuda.is_available()):
        raise UserError("protocol: amp=True needs a CUDA device")
    # The run would meet a bad validation mask only after hours. CheckLabels meets a bad training mask in the
    # first epoch.
    check_masks(data, "validation", run.protocol)
    checkpoint = newest_checkpoint(output)
    if checkpoint is not None:
        if not resume:
            raise UserError(
                f"output: {output} holds an unfinished run ({checkpoint.name}); go on with it by --resume"
            )
        cfg.resume, cfg.load_from = True, str(checkpoint)
    try:
        with on_device(run.device) as device, StopSignals() as signals:
            distributed.start(
                device.type
            )  # before mmengine, which knows neither gloo nor a task with one GPU
            runner = Runner.from_cfg(cfg)
            runner.register_hook(StopHook(signals))
            try:
                runner.train()
            finally:
                end_workers(runner)
        distributed.barrier()  # until the main process has written the result
        distributed.stop()
    except Interrupted:
        distributed.barrier()  # until the main process has saved: torchrun ends all as soon as one ends
        # All ranks end here; if only one fails, leaving the group could wait for the others
        distributed.stop()
        raise
    except UserError as error:  # a data-loading process's error has its traceback; the last line is ours
        raise UserError(
            str(error).strip().splitlines()[-1].removeprefix(f"{UserError.__module__}.UserError: ")
        ) from error
    return output / FILE_NAME


def newest_checkpoint(folder: Path) -> Path | None:
    """A run's newest whole checkpoint. mmengine writes in place, so a killed run can leave a part of a file.

    Raises:
        UserError: none is whole; names the newest.
    """
    found = {
        int(name[1]): path
        for path in folder.glob("iter_*.pth")
        if (name := re.fullmatch(r"iter_(\d+)\.pth", path.name))
    }
    paths = [found[iteration] for iteration in sorted(found, reverse=True)]
    for path in paths:
        if zipfile.is_zipfile(path):  # torch's format ends with its table of contents
            return path
        log(f"passed over: {path} was not written to its end")
    if paths:
        raise UserError(
            f"checkpoint: {paths[0]} was not written to its end, and there is no other; remove it to begin anew"
        )
    return None


def _is_over(run: SegmentationRun, cfg: Config) -> bool:
    """:func:`pretrain.results.runs.holds_result` of the run's folder, whatever checkpoints it has."""
    saved, changed = Path(run.output) / SETTINGS_FILE, None
    if saved.is_file():
        model_kwargs = {key: value for key, value in run.model_kwargs.items() if key not in OF_THE_RUN}
        vit = build_for_fine_tuning(run.backbone, run.weights, **model_kwargs)
        weights_hash = file_hash(run.weights) if run.weights else None
        ours = identity(cfg, vit.model_kwargs, weights_hash, processes())
        changed = compared(json.loads(saved.read_text(encoding="utf-8")), json.loads(json.dumps(ours)))
        changed.pop("config_hash", None)  # the settings say why
    return holds_result(Path(run.output), changed, has_checkpoint=False, resume=False)
