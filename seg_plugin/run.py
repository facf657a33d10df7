"""One segmentation fine-tuning: its inputs, its mmengine config, and its training."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.runner import Runner, find_latest_checkpoint

from pretrain.build import build_backbone
from pretrain.errors import UserError
from pretrain.results.provenance import file_hash
from pretrain.results.schema import FILE_NAME
from seg_plugin.compat import on_device
from seg_plugin.config import processes, segmenter_config
from seg_plugin.data import check_masks, class_names, find_root, image_suffix
from seg_plugin.hooks import SETTINGS_FILE
from seg_plugin.identity import first_difference, identity
from seg_plugin.protocol import SegmentationProtocol

CONFIG_FILE = "config.py"


@dataclass(frozen=True)
class SegmentationRun:
    """Everything that the outcome of a run depends on, and where it goes.

    Attributes:
        backbone: registry name.
        weights: checkpoint of the backbone, none for random initialisation.
        data: folder in ADE20K's layout (:mod:`seg_plugin.data`), or the one around its ``ADEChallengeData2016``.
        output: run folder.
        protocol: the recipe (full or scaled down).
        device: ``auto`` | ``cpu`` | ``cuda``.
        workers: data-loading processes.
        backbone_flags: further arguments of ``build_backbone``.
    """

    backbone: str
    weights: Path | None
    data: Path
    output: Path
    protocol: SegmentationProtocol
    seed: int = 0
    device: str = "auto"
    workers: int = 4
    backbone_flags: Mapping[str, Any] = field(default_factory=dict)


def config(run: SegmentationRun) -> Config:
    """The mmengine config of a run; MMSegmentation's own launchers can run it too.

    Raises:
        UserError: what is wrong with the data folder or the numbers, by name.
    """
    root = find_root(run.data)
    values = segmenter_config(
        run.protocol,
        run.backbone,
        weights=run.weights,
        backbone_flags=run.backbone_flags,
        data_root=root,
        classes=class_names(root, run.protocol.num_classes),
        img_suffix=image_suffix(root),
        seed=run.seed,
        workers=run.workers,
    )
    values["work_dir"] = str(run.output)
    # The file name is that of the saved copy; torchrun sets the variable.
    values["launcher"] = "pytorch" if "TORCHELASTIC_RUN_ID" in os.environ else "none"
    return Config(values, cfg_text="made by seg_plugin.run\n", filename=CONFIG_FILE)


def train(run: SegmentationRun, resume: bool = False) -> Path:
    """Train, validate and leave ``result.json`` (returned) beside the rest that :mod:`seg_plugin.hooks` names.

    A finished run with the same settings is left as it is.

    Args:
        resume: go on from the last checkpoint in the folder, if there is one.

    Raises:
        UserError: bad data, weights or settings; a folder that holds a run with other settings, or, without ``resume``, the
            checkpoint of an unfinished one.
    """
    cfg, output = config(run), Path(run.output)
    if cfg.launcher == "none" and processes() > 1:
        told = f"WORLD_SIZE or SLURM_NTASKS says {processes()} processes"
        raise UserError(f"{told}, but torchrun did not start this one: unset them, or use torchrun")
    if _is_finished(run, cfg):
        print(f"{output} holds this run already, finished: nothing to do")
        return output / FILE_NAME
    if run.protocol.amp and (run.device == "cpu" or not torch.cuda.is_available()):
        raise UserError("protocol: amp=True needs a CUDA device")
    if cfg.launcher != "none" and not torch.cuda.is_available():
        raise UserError("device: mmengine runs several processes on CUDA devices only, and torch sees none")
    # A bad validation mask would otherwise be met only after hours; a training mask is met, by CheckLabels, in the first epoch.
    check_masks(find_root(run.data), "validation", run.protocol)
    checkpoint = find_latest_checkpoint(str(output)) if output.is_dir() else None
    if checkpoint is not None:
        checkpoint = str(output / Path(checkpoint).name)  # the folder may have been moved since
        if not resume:
            raise UserError(f"output: {output} holds an unfinished run ({Path(checkpoint).name}); go on with it by --resume")
        cfg.resume, cfg.load_from = True, checkpoint
    try:
        with on_device(run.device):
            Runner.from_cfg(cfg).train()
    except UserError as error:  # from a data-loading process it comes with that process's traceback: its last line is ours
        raise UserError(str(error).strip().splitlines()[-1].removeprefix(f"{UserError.__module__}.UserError: ")) from error
    return output / FILE_NAME


def _is_finished(run: SegmentationRun, cfg: Config) -> bool:
    """Whether the folder holds this very run, with its result; UserError where it holds another."""
    saved = Path(run.output) / SETTINGS_FILE
    if not saved.is_file():
        if (Path(run.output) / FILE_NAME).is_file():
            raise UserError(f"output: {run.output} holds the result of another kind of run; choose another folder")
        return False
    vit = build_backbone(run.backbone, run.weights, **run.backbone_flags)
    weights_hash = file_hash(run.weights) if run.weights else None
    ours = identity(cfg, vit.flags, weights_hash, processes())
    difference = first_difference(json.loads(saved.read_text(encoding="utf-8")), json.loads(json.dumps(ours)))
    if difference:
        raise UserError(f"output: {run.output} holds a run with other settings ({difference}); take another folder")
    return (Path(run.output) / FILE_NAME).is_file()
