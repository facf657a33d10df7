"""What a config holds: its recipe, its deviations from the protocol, and what makes two runs the same.

A config can change after it was made (``--cfg-options``, ``--amp``), so all of this is read from the config
that runs.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmengine.config import Config

from pretrain.build import network_kwargs
from pretrain.results.provenance import config_hash
from pretrain.settings import compared
from seg_plugin import protocol as protocols
from seg_plugin.config import segmenter_config
from seg_plugin.datasets import SPLITS, Layout, dataset_of, image_names
from seg_plugin.protocol import SegmentationProtocol, with_overrides

# The sections of a config that decide a run's outcome.
SECTIONS = (
    "model", "optim_wrapper", "param_scheduler", "train_cfg", "val_cfg", "train_dataloader", "val_dataloader", "val_evaluator",
    "auto_scale_lr",
)  # fmt: skip
NOT_RECIPE = ("data_root", "num_workers", "persistent_workers")
NOT_OF_THE_VIT = ("type", "name", "weights", "init_cfg", "drop_path", "freeze", "checkpointing")
ONLOOKERS = (
    "IterTimerHook",
    "LoggerHook",
    "CheckpointHook",
    "SegVisualizationHook",
    "PosfieldRunHook",
)  # change no number


def declared_protocol(values: Mapping[str, Any]) -> SegmentationProtocol:
    """The protocol that a config says it follows, from the fields that its hook holds."""
    fields = {key: value for key, value in values.items() if key not in ("name", "version")}
    return with_overrides(protocols.protocol(values["name"]), fields)


def given_model_kwargs(cfg: Config) -> dict[str, Any]:
    """The arguments of the ViT that a config spells out."""
    return {key: value for key, value in cfg.model.backbone.items() if key not in NOT_OF_THE_VIT}


def recipe(cfg: Config, processes: int) -> dict[str, Any]:
    """The sections as plain values, without the ViT's arguments. The batch size is that of all processes."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(key): plain(item) for key, item in value.items() if key not in NOT_RECIPE}
        return [plain(item) for item in value] if isinstance(value, list | tuple) else value

    sections: dict[str, Any] = {name: plain(cfg.get(name)) for name in SECTIONS}
    sections["model"]["backbone"] = {
        key: cfg.model.backbone.get(key) for key in ("type", "name", "drop_path", "freeze")
    }
    sections["train_dataloader"]["batch_size"] *= processes
    hooks = [
        *cfg.get("default_hooks", {}).values(),
        *cfg.get("custom_hooks", []),
    ]  # an EMA, early stopping, ...
    sections["hooks"] = [plain(hook) for hook in hooks if hook and hook["type"] not in ONLOOKERS]
    sections["load_from"] = None if cfg.get("resume") else cfg.get("load_from")
    return sections


def deviations(
    cfg: Config, values: Mapping[str, Any], model_kwargs: Mapping[str, Any], processes: int
) -> dict[str, list[Any]]:
    """Where a config deviates from the protocol that it is named after: ``{field: [protocol's value, run's
    value]}``.

    Args:
        values: the fields of the protocol that it says it follows.
        model_kwargs: arguments of the ViT that were given beside the checkpoint's.
        processes: how many share a batch.
    """
    declared = declared_protocol(values)
    changed = protocols.deviations(declared)
    dataset = dataset_of(declared)
    classes = cfg.train_dataloader.dataset.get("metainfo", {}).get("classes", ())
    layout = None if dataset.counts else _layout(cfg)  # your own folders may have any
    made = segmenter_config(
        declared, cfg.model.backbone.name, model_kwargs=model_kwargs, classes=classes, layout=layout
    )
    made["train_dataloader"]["batch_size"] = declared.batch_size
    different = compared(recipe(Config(made), 1), recipe(cfg, processes))
    changed |= {key: different[key] for key in sorted(different)}
    for split, count in zip(SPLITS, dataset.counts or ()):
        if (here := len(images(cfg, split))) != count:
            changed[f"{split}_images"] = [count, here]
    if given := network_kwargs(model_kwargs):
        changed["model_kwargs"] = [{}, given]
    return {**changed, **protocols.not_swept(declared)}


def images(cfg: Config, split: str) -> list[str]:
    """Sorted names of the images of ``training`` or ``validation``."""
    return image_names(Path(cfg.train_dataloader.dataset.get("data_root") or ""), _layout(cfg), split)


def _layout(cfg: Config) -> Layout:
    """The layout of the data, by the config's loaders."""
    training, validation = cfg.train_dataloader.dataset, cfg.val_dataloader.dataset
    return Layout(
        images=(training.data_prefix.img_path, validation.data_prefix.img_path),
        masks=(training.data_prefix.seg_map_path, validation.data_prefix.seg_map_path),
        lists=(training.get("ann_file", ""), validation.get("ann_file", "")),
        image_suffix=training.img_suffix,
        mask_suffix=training.seg_map_suffix,
    )


def identity(
    cfg: Config, model_kwargs: Mapping[str, Any], weights_hash: str | None, processes: int
) -> dict[str, Any]:
    """What makes two runs the same, as plain values to compare and to save.

    Args:
        model_kwargs: all arguments of the ViT (``ViT.model_kwargs``).
    """
    names = json.dumps([images(cfg, split) for split in SPLITS])
    settings = {
        **recipe(cfg, processes),
        "backbone_flags": dict(model_kwargs),  # the first name of the key; another changes every hash
        # Tells runs on other data from seeds of one.
        "images_hash": hashlib.sha256(names.encode()).hexdigest()[:12],
    }
    return {
        "config_hash": config_hash(settings),
        "seed": cfg.randomness.get("seed"),
        "weights_hash": weights_hash,
        "settings": settings,
    }
