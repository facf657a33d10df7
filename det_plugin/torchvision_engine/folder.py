"""A run folder: ``config.json`` says what runs in it, ``checkpoints/`` how far it is, ``result.json`` that it
is over.

Checkpoints have the format of :mod:`pretrain.checkpoints`. The ``checkpoint.pt`` of older versions is still
read, as tensors and plain values, and never written.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from det_plugin.coco.annotations import CocoSplit
from det_plugin.protocol import DetectionProtocol, with_overrides
from det_plugin.run import CONFIGS, DetectionRun
from pretrain import checkpoints
from pretrain.backbones.vit import ViT
from pretrain.errors import UserError
from pretrain.files import read_mapping
from pretrain.log import log
from pretrain.results.provenance import file_hash
from pretrain.results.runs import holds_result
from pretrain.settings import compared, upgraded

ENGINE = "torchvision"
CONFIG, PREDICTIONS = CONFIGS[ENGINE], "predictions.json"
OLD_CHECKPOINT = "checkpoint.pt"
KEEP = 2  # where the newest checkpoint is damaged, the one before is used


def resolved_config(run: DetectionRun, vit: ViT, train: CocoSplit) -> dict[str, Any]:
    """Everything that the outcome depends on, as JSON values.

    ``model_kwargs`` are complete, so the network can be built again without the backbone's file.
    """
    held = Path(run.output) / CONFIG
    before = read_mapping(held, "output").get("weights_hash") if held.is_file() else None
    config = {
        "engine": ENGINE,
        **run.settings(),
        "accumulate": run.accumulate,
        "model_kwargs": vit.model_kwargs,
        "given_kwargs": dict(run.model_kwargs),  # some are no part of the network: drop_path, attention, ...
        "weights_hash": file_hash(run.weights, before) if run.weights else None,
        "data": {
            "train_images": len(train.pictures),
            "category_ids": train.category_ids,
            "class_names": train.class_names,
        },
    }
    plain: dict[str, Any] = json.loads(json.dumps(config))
    return plain


def is_over(folder: Path, config: Mapping[str, Any], resume: bool) -> bool:
    """:func:`holds_result` of a run with these settings. It may go on with fewer GPUs, in more parts; whether the
    data are the same, :func:`said_of_data` tells."""
    changed = None
    if (folder / CONFIG).is_file():
        changed = compared({**read_config(folder), "accumulate": config["accumulate"]}, config)
        changed.pop("data.train_images", None)
    has_checkpoint = bool(checkpoints.whole_directories(folder)) or (folder / OLD_CHECKPOINT).is_file()
    return holds_result(folder, changed, has_checkpoint, resume)


def said_of_data(folder: Path) -> dict[str, Any]:
    """The digest of a run's data as far as its ``config.json`` says it: of versions without a ``data.json``."""
    return {"train": {"images": read_config(folder)["data"]["train_images"]}}


def read_config(folder: Path) -> dict[str, Any]:
    """The settings of the run in a folder, with old names replaced by new ones.

    Raises:
        UserError: no run of this engine, or the file cannot be read.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise UserError(f"output: {folder} holds no run of the {ENGINE} engine (no {CONFIG})")
    config = read_mapping(path, "output")
    if config.get("engine") != ENGINE:
        raise UserError(f"output: {path} is not of the {ENGINE} engine")
    config["protocol"] = upgraded(DetectionProtocol, config["protocol"])
    if "backbone_flags" in config:
        old = config.pop("backbone_flags"), config.pop("given_flags", {})
        config["model_kwargs"], config["given_kwargs"] = old
    return config


def protocol_of(config: Mapping[str, Any]) -> DetectionProtocol:
    """The protocol in a ``config.json``."""
    fields = dict(config["protocol"])
    named = DetectionProtocol(name=fields.pop("name"), version=fields.pop("version"))
    return with_overrides(named, fields)


def classes_of(folder: Path, config: Mapping[str, Any]) -> dict[int, str]:
    """Category id -> name, in the order of the classes.

    Raises:
        UserError: the config does not hold them.
    """
    ids, names = config["data"].get("category_ids"), config["data"]["class_names"]
    if ids is None:  # 1, 2, ... would be wrong for COCO
        told = "it was written before they were kept; train again"
        raise UserError(f"{folder / CONFIG} holds no category_ids: {told}")
    return dict(zip(ids, names))


def save_checkpoint(folder: Path, state: dict[str, Any]) -> Path:
    """:func:`pretrain.checkpoints.save_state` of the state's ``iteration``."""
    return checkpoints.save_state(folder, state["iteration"], state, KEEP)


def load_checkpoint(folder: Path) -> dict[str, Any] | None:
    """The state of the run's newest whole checkpoint, or None.

    Raises:
        UserError: there are checkpoints, but none is whole; names the file.
    """
    found, messages = checkpoints.newest(folder)
    for message in messages:
        log(message)
    if found is not None:
        return checkpoints.load_state(found)
    if messages:
        raise UserError(f"resume: {folder} has checkpoints, but no whole one; move them away to start anew")
    old = folder / OLD_CHECKPOINT
    if not old.is_file():
        return None
    try:
        return torch.load(old, map_location="cpu", weights_only=True)  # type: ignore[no-any-return]
    except Exception as error:  # on damaged bytes the unpickler may raise anything
        raise UserError(f"resume: {old} is no whole checkpoint ({type(error).__name__})") from error
