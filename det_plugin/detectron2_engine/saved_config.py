"""The configs that a Detectron2 run leaves in its folder.

``config.yaml`` holds what was asked for; stock launchers write it, and so does ours. ``config_resolved.yaml``
builds the same network without the pre-training file. There ``weights`` is null, every argument of the
backbone is written out, and the evaluator carries the names of the classes and what the file said about
itself.
"""

import dataclasses
import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from detectron2.config import LazyConfig
from detectron2.modeling import GeneralizedRCNN
from detectron2.utils.registry import _convert_target_to_string, locate
from omegaconf import DictConfig, OmegaConf

from det_plugin.coco.annotations import read_classes
from det_plugin.detectron2_engine.catalog import coco_root
from det_plugin.detectron2_engine.lazy import config
from det_plugin.detectron2_engine.model import ORIGINS, BFloat16RCNN, MixedROIHeads
from det_plugin.detectron2_engine.trainer import LAST
from det_plugin.features import FeatureOptions
from det_plugin.protocol import DetectionProtocol, protocol, with_overrides
from det_plugin.run import CONFIGS
from pretrain.errors import TRUST, UserError
from pretrain.files import read_plain
from pretrain.results.provenance import file_hash
from pretrain.results.runs import holds_result
from pretrain.results.schema import FILE_NAME
from pretrain.settings import MAX_YAML_BYTES, compared, upgraded, without_content

ASKED, RESOLVED = "config.yaml", CONFIGS["detectron2"]
# What config() writes for any backbone. All other keys are arguments of the ViT.
NET_KEYS = ("_target_", "name", "weights", "drop_path", *(f.name for f in dataclasses.fields(FeatureOptions)))
# Where a run reads, writes, logs and computes: no part of its recipe.
SURROUNDINGS = (
    "train.output_dir",
    "train.init_checkpoint",  # the evaluator checks it
    "train.checkpointer.",
    "train.log_period",
    "train.device",
    "train.ddp.",
    "dataloader.root",
    "dataloader.train.num_workers",
    "dataloader.test.num_workers",
    "dataloader.evaluator.accumulate",  # a run may continue with fewer GPUs, in more parts
    "model.backbone.net.weights",
    "model.backbone.net.checkpointing",
    "model.backbone.net.compile",
)

# Where the targets of older configs are now, which stood in other modules of det_plugin
MOVED = {
    **dict.fromkeys(("RegistryBackbone", "PaddedPyramid", "BFloat16RCNN"), "model"),
    **dict.fromkeys(("coco_dicts", "CocoMapper"), "catalog"),
    **dict.fromkeys(("adamw", "parameter_groups"), "optim"),
    "ResultEvaluator": "evaluate",
    "TrainLoader": "loader",
}


def load_config(folder: str | Path, name: str, trust: bool = False) -> DictConfig:
    """``config.yaml`` or ``config_resolved.yaml`` of a run's folder, with old names replaced by new ones.

    It is read as data, and every ``_target_`` must be one of those that :func:`lazy.config` writes.

    Args:
        trust: read it as Detectron2 does, whatever it constructs, names or calls.

    Raises:
        UserError: no such file; it is more than data of ours; names the file and the key.
    """
    path = Path(folder) / name
    if not path.is_file():
        told = "it is no folder of a Detectron2 run, or the run has not come far enough"
        raise UserError(f"{folder}: no {name}; {told}")
    cfg = LazyConfig.load(str(path)) if trust else _as_data(path)
    _rename_targets(cfg)
    evaluator = cfg.dataloader.evaluator
    evaluator.overrides = upgraded(DetectionProtocol, OmegaConf.to_container(evaluator.overrides))  # type: ignore[arg-type]
    if (origin := evaluator.get("origin")) is not None and "flags" in origin:
        origin.update(model_kwargs=origin.pop("flags"), given_kwargs=origin.pop("given_flags"))
    return cfg


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """YAML of plain values, and of tuples, which Detectron2 writes."""


_Loader.add_constructor("tag:yaml.org,2002:python/tuple", _Loader.construct_yaml_seq)  # type: ignore[type-var]


def _as_data(path: Path) -> DictConfig:
    try:
        values = yaml.load(read_plain(path, MAX_YAML_BYTES).decode(), _Loader)
        if not isinstance(values, dict):
            raise ValueError("no mapping of keys")
        for key, name, value in _texts(values, ""):
            if name == "_target_" and (not isinstance(value, str) or _today(value) not in _targets()):
                raise UserError(f"{path}: {key}={value!r} is no target of a run of ours; {TRUST}")
            if isinstance(value, str) and "${" in value and not re.fullmatch(r"\$\{[.\w]+\}", value):
                raise UserError(f"{path}: {key}={value!r} is more than the name of another key; {TRUST}")
        return OmegaConf.create(values, flags={"allow_objects": True})
    except UserError:
        raise
    except (ValueError, RecursionError, yaml.YAMLError) as error:  # UnicodeDecodeError is a ValueError
        raise UserError(f"{path} is no plain data ({without_content(error)}); {TRUST}") from error


def _texts(value: Any, key: str, name: Any = None) -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, its last part, value) of all targets, whatever they are, and of all texts."""
    if name == "_target_" or isinstance(value, str):
        yield key, name, value
    elif isinstance(value, dict):
        for inner, item in value.items():
            yield from _texts(item, f"{key}.{inner}".lstrip("."), inner)
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            yield from _texts(item, f"{key}[{number}]")


@functools.cache
def _targets() -> list[str]:
    """The targets that :func:`lazy.config` writes, short and in full."""
    found, name = [BFloat16RCNN, GeneralizedRCNN, MixedROIHeads], "vit_tiny_patch16"

    def collect(value: Any) -> None:
        if isinstance(value, dict):
            found.extend(item for key, item in value.items() if key == "_target_")
        for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            collect(item)

    collect(OmegaConf.to_container(config(protocol("coco-12ep", name), name), resolve=False))
    short = {item if isinstance(item, str) else _convert_target_to_string(item) for item in found}
    return sorted({*short, *map(_full_name, found)})


def _rename_targets(cfg: DictConfig) -> None:
    for key, value in cfg.items_ex(resolve=False):
        if isinstance(value, DictConfig):
            _rename_targets(value)
        elif key == "_target_" and isinstance(value, str):
            cfg[key] = _today(value)


def _today(target: str) -> str:
    module, _, name = target.rpartition(".")
    is_moved = module.startswith("det_plugin.") and name in MOVED
    return f"{__package__}.{MOVED[name]}.{name}" if is_moved else target


def protocol_in(cfg: DictConfig) -> DetectionProtocol:
    """The protocol, full or scaled down, that a config was made from."""
    evaluator = cfg.dataloader.evaluator
    base = protocol(evaluator.protocol, cfg.model.backbone.net.name, evaluator.get("version", 1))
    return with_overrides(base, OmegaConf.to_container(evaluator.overrides))  # type: ignore[arg-type]


def model_kwargs_in(cfg: DictConfig) -> dict[str, Any]:
    """The arguments of the ViT that the user gave."""
    origin = cfg.dataloader.evaluator.get("origin")
    if origin is not None:
        return OmegaConf.to_container(origin.given_kwargs)  # type: ignore[return-value]
    return {key: value for key, value in cfg.model.backbone.net.items() if key not in NET_KEYS}


def origin_in(cfg: DictConfig) -> dict[str, Any] | None:
    """What :data:`model.ORIGINS` says of a run's weights; none for random initialization.

    Of a config that is not resolved, the backbone must have been built in this process.
    """
    origin = cfg.dataloader.evaluator.get("origin")
    if origin is not None:
        return {key: value for key, value in OmegaConf.to_container(origin).items() if key != "given_kwargs"}  # type: ignore
    weights = cfg.model.backbone.net.weights
    return None if weights is None else ORIGINS[str(weights)]


def classes_in(cfg: DictConfig) -> dict[int, str]:
    """Category id -> name of a resolved config, in the order of the detector's classes. No data are needed.

    Raises:
        UserError: the config does not name them.
    """
    classes = cfg.dataloader.evaluator.get("classes")
    if not classes:
        told = "the run is of an older version of this package"
        raise UserError(f"{RESOLVED}: dataloader.evaluator.classes is missing; {told}")
    return {int(id): str(name) for id, name in sorted(classes.items())}


def resolved(cfg: DictConfig) -> DictConfig:
    """The config of a training that needs neither the pre-training file nor a checkpoint nor the data.

    Raises:
        UserError: the validation data are not there.
    """
    origin, given = origin_in(cfg), model_kwargs_in(cfg)
    cfg = OmegaConf.create(cfg, flags={"allow_objects": True})  # a copy
    val_share = cfg.dataloader.evaluator.overrides.get("val_share", 0.0)
    cfg.dataloader.evaluator.classes = read_classes(coco_root(cfg.dataloader.root), "val", val_share)
    if origin is not None:
        cfg.dataloader.evaluator.origin = {**origin, "given_kwargs": given}
        cfg.model.backbone.net.update(weights=None, **origin["model_kwargs"])
    cfg.train.init_checkpoint = ""
    return cfg


HASH = "dataloader.evaluator.origin.weights_hash"


def is_over(cfg: DictConfig, folder: Path, resume: bool) -> bool:
    """:func:`pretrain.results.runs.holds_result` of a run with this config."""
    changed, has_checkpoint = None, (folder / LAST).is_file()
    if (folder / RESOLVED).is_file():
        changed = {}
        if has_checkpoint or (folder / FILE_NAME).is_file():
            different = compared(plain(load_config(folder, RESOLVED)), plain(resolved(cfg)))
            changed = {key: pair for key, pair in different.items() if not key.startswith(SURROUNDINGS)}
            weights = cfg.model.backbone.net.weights
            if weights and (pair := changed.get(HASH)) and file_hash(str(weights), pair[0]) == pair[0]:
                del changed[HASH]  # the same file, by its hash of before
    return holds_result(folder, changed, has_checkpoint, resume)


def plain(cfg: Any) -> Any:
    """A config as nested plain values. Interpolations stay as they are written. ``_target_`` gets its full
    name, because the same function has several."""
    if isinstance(cfg, DictConfig):
        cfg = OmegaConf.to_container(cfg, resolve=False)
    if isinstance(cfg, dict):
        return {key: _full_name(value) if key == "_target_" else plain(value) for key, value in cfg.items()}
    return [plain(item) for item in cfg] if isinstance(cfg, list) else cfg


def _full_name(target: Any) -> str:
    target = locate(target) if isinstance(target, str) else target
    return f"{target.__module__}.{target.__qualname__}"
