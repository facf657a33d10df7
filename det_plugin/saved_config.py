"""The configs that a Detectron2 run leaves in its folder.

``config.yaml`` is what was asked for (stock launchers write it, and ours). ``config_resolved.yaml`` builds the same network
without the pre-training file: ``weights`` is null, every flag of the backbone is written out, and the evaluator carries what the
file said about itself and what the classes are called.
"""

import dataclasses
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from det_plugin.backbone import Origin, origin_of
from det_plugin.coco_catalog import coco_root
from det_plugin.detectron2_checkpoint import LAST
from det_plugin.features import FeatureOptions
from det_plugin.requires import detectron2_installed
from det_plugin.torchvision_engine.coco import read_classes
from pretrain.errors import UserError
from pretrain.results.schema import FILE_NAME

with detectron2_installed():
    from detectron2.config import LazyConfig
    from detectron2.utils.registry import locate

ASKED, RESOLVED = "config.yaml", "config_resolved.yaml"
# What config() writes for the backbone whatever the network; all else there is a flag of the ViT.
NET_KEYS = ("_target_", "name", "weights", "drop_path", *(f.name for f in dataclasses.fields(FeatureOptions)))
# Where a run reads, writes, logs and computes: no part of its recipe.
SURROUNDINGS = (
    "train.output_dir",
    "train.init_checkpoint",  # the evaluator judges it
    "train.checkpointer.",
    "train.log_period",
    "train.device",
    "train.ddp.",
    "dataloader.root",
    "dataloader.train.num_workers",
    "dataloader.test.num_workers",
    "dataloader.evaluator.accumulate",  # a run may go on with fewer GPUs, in more parts
    "model.backbone.net.weights",
    "model.backbone.net.checkpointing",
    "model.backbone.net.compile",
)


def load_config(folder: str | Path, name: str) -> DictConfig:
    """``config.yaml`` or ``config_resolved.yaml`` of a run's folder.

    Raises:
        UserError: no such file.
    """
    path = Path(folder) / name
    if not path.is_file():
        raise UserError(f"{folder}: no {name}; it is no folder of a Detectron2 run, or the run has not come far enough")
    return LazyConfig.load(str(path))


def backbone_flags(cfg: DictConfig) -> dict[str, Any]:
    """The flags that the user gave for the backbone (in a resolved config: had given)."""
    origin = cfg.dataloader.evaluator.get("origin")
    if origin is not None:
        return OmegaConf.to_container(origin.given_flags)  # type: ignore[return-value]
    return {key: value for key, value in cfg.model.backbone.net.items() if key not in NET_KEYS}


def origin_in(cfg: DictConfig) -> Origin | None:
    """Where the backbone of a run came from; none for random initialisation. It must have been built in this process."""
    origin = cfg.dataloader.evaluator.get("origin")
    if origin is None:
        weights = cfg.model.backbone.net.weights
        return None if weights is None else origin_of(weights)
    return Origin(**{f.name: origin[f.name] for f in dataclasses.fields(Origin)})


def classes_in(cfg: DictConfig) -> dict[int, str]:
    """Category id -> name, in the order of the detector's classes, of a resolved config; no data are needed.

    Raises:
        UserError: it does not say.
    """
    classes = cfg.dataloader.evaluator.get("classes")
    if not classes:
        raise UserError(f"{RESOLVED}: dataloader.evaluator.classes is missing; the run is of an older version of this package")
    return {int(id): str(name) for id, name in sorted(classes.items())}


def resolved(cfg: DictConfig) -> DictConfig:
    """The config of a training, in need of no pre-training file, no checkpoint of a detector, and no data to name the classes.

    Raises:
        UserError: the validation data are not there.
    """
    origin, flags = origin_in(cfg), backbone_flags(cfg)
    cfg = OmegaConf.create(cfg, flags={"allow_objects": True})  # a copy
    cfg.dataloader.evaluator.classes = read_classes(coco_root(cfg.dataloader.root), "val")
    if origin is not None:
        cfg.dataloader.evaluator.origin = {**dataclasses.asdict(origin), "given_flags": flags}
        cfg.model.backbone.net.update(weights=None, **origin.flags)
    cfg.train.init_checkpoint = ""
    return cfg


def is_over(cfg: DictConfig, folder: Path, resume: bool) -> bool:
    """Whether a folder holds the result of this very run; false for a new folder and for a run to go on with.

    Raises:
        UserError: the folder holds a run of other settings, by name, or an unfinished one and ``resume`` is not given.
    """
    if (folder / FILE_NAME).is_file() and not (folder / RESOLVED).is_file():
        raise UserError(f"output: {folder} holds the result of another kind of run; choose another folder")
    has_begun = (folder / LAST).is_file() or (folder / FILE_NAME).is_file()
    if has_begun and (folder / RESOLVED).is_file():
        before, now = leaves(load_config(folder, RESOLVED)), leaves(resolved(cfg))
        changed = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
        shown = [f"{k} {before.get(k)!r} -> {now.get(k)!r}" for k in changed if not k.startswith(SURROUNDINGS)]
        if shown:
            raise UserError(f"output: {folder} holds a run with other settings ({'; '.join(shown[:3])}); choose another folder")
        if (folder / FILE_NAME).is_file():
            return True
    if (folder / LAST).is_file() and not resume:
        raise UserError(f"output: {folder} holds an unfinished run; go on with --resume, or choose another folder")
    return False


def leaves(cfg: Any, prefix: str = "") -> dict[str, Any]:
    """``{"train.max_iter": 22128, "optimizer._target_": "det_plugin.optim.adamw", ...}``, interpolations as they are written."""
    if isinstance(cfg, DictConfig):
        cfg = OmegaConf.to_container(cfg, resolve=False)
    if isinstance(cfg, dict):
        return {k: v for key, value in cfg.items() for k, v in leaves(value, f"{prefix}{key}.").items()}
    if isinstance(cfg, list) and any(isinstance(item, dict) for item in cfg):
        return leaves({str(i): item for i, item in enumerate(cfg)}, prefix)
    if prefix.endswith("_target_."):  # the same function goes by several names
        target = locate(cfg) if isinstance(cfg, str) else cfg
        cfg = f"{target.__module__}.{target.__qualname__}"
    return {prefix.rstrip("."): cfg}
