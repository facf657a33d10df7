"""The recipes of pre-training and post-training, and in what a run departs from the one that it is named after.

``default.yaml`` is the paper's recipe; each of the others is the same with the changes that stand here (METHOD.md 5, 10). There are
these and no more: a row of the paper's ablations is the method's recipe with the few departures that make the row, named by key.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from pretrain.config import as_dict, load_config
from pretrain.results.schema import Protocol

VERSION = 1
IMAGENET_1K = 1_281_167  # training images
COCO_TRAIN = 118_287  # images of train2017
# What a recipe says. Groups that are left out say where and how a run computes, not what: run, data, step, probes, log.
GROUPS = ("crops", "positions", "colour", "masks", "backbone", "heads", "losses", "dense", "optim")
NO_PART = ("backbone.name", "backbone.attention", "backbone.weights")  # compared below, or of no effect on what is learned
BASELINE = {  # DINOv2-dagger: the paper's own baseline
    "positions.encoding": "standard",
    "positions.grid": 14,
    "positions.interpolation": "dinov2",
    "positions.augment": False,
    "masks.position_share": 0.0,
    "losses.position": 0.0,
}
PAKA: dict[str, Any] = {  # what PaKA says, and NeCo's public recipe where it is silent (METHOD.md 10)
    "crops.n_local": 4,
    "crops.global_scale": [0.25, 1.0],
    "crops.local_scale": [0.05, 0.4],
    "crops.plain_globals": True,
    "crops.local_rule": "inside",
    "positions.encoding": "standard",
    "positions.augment": False,
    "colour.jitter": [0.8, 0.8, 0.8, 0.2],
    "optim.epochs": 25,
    "optim.base_lr": 1e-5,
    "optim.head_lr_factor": 10.0,
    "optim.lr_rule": "none",
    "optim.min_lr": 0.0,
    "optim.warmup_epochs": 0,
    "optim.weight_decay_end": 0.5,
    "optim.clip_grad": 0.0,
    "optim.teacher_momentum": 0.9995,
}
TIED: dict[str, Any] = {"positions.encoding": "field", "positions.augment": True}  # ours: both seeds together
# Gram anchoring on PaKA's pictures, crops and regions; and DINOv3's own form, every patch of the whole crop.
GRAM: dict[str, Any] = {"dense.loss": "gram", "dense.head": False, "optim.teacher_momentum": 1.0}
WHOLE: dict[str, Any] = {"crops.n_local": 2, "crops.local_rule": "same", "dense.region_samples": 1}
# Not read by a post-training, or said by the file that it starts from.
NO_PART_OF_DENSE = (
    *("masks", "losses", "positions.grid", "positions.interpolation", "heads.n_prototypes", "optim.freeze_last_layer_epochs"),
    *("backbone.depth", "backbone.n_registers", "backbone.layerscale"),
)
SIZES_PX = {14: (518, 98), 16: (224, 96)}  # patch size: global and local crops of a post-training
BATCH_SIZES = {"small": 64, "base": 16}  # of a post-training, as NeCo's
SMALLEST_SIDE_PX = 512  # images scaled down to this before they are cropped are the data path's affair; below, they are other data


@dataclass(frozen=True)
class Recipe:
    """A recipe: its name, its changes to ``default.yaml``, and what is no part of it."""

    name: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    no_part: tuple[str, ...] = (*NO_PART, "dense")
    n_images: int = IMAGENET_1K
    backbones: tuple[str, ...] = ("vit_small_patch16", "vit_base_patch16")  # one recipe for both (appendix B.1)
    starts: tuple[str, ...] = ("run.start_from", "backbone.weights")  # it starts from scratch


def pretraining_protocol(config: DictConfig, n_images: int) -> Protocol:
    """Name of the recipe that a run follows, and every setting that differs from it.

    The names: ``intertwined-100ep`` | ``dinov2-100ep``; of a post-training ``paka-25ep`` | ``paka-tied-25ep`` (crop-tied
    positions) | ``gram-25ep`` | ``gram-whole-25ep``. ``optim.batch_size`` is the number of images a step over all ranks and all
    parts of an accumulated step, so neither the ranks nor ``step.accumulate`` make another recipe.

    Args:
        config: of the run.
        n_images: size of its data set; ImageNet-1K's, or that of COCO's train2017, is part of the recipe.
    """
    recipe = _post_training(config) if config.run.algorithm == "dense" else _pretraining(config)
    values, deviations = as_dict(load_config()), dict[str, list[Any]]()
    for group in GROUPS:
        for option, value in as_dict(config)[group].items():
            key = f"{group}.{option}"
            wanted = recipe.changes.get(key, values[group][option])
            if key not in recipe.no_part and group not in recipe.no_part and value != wanted:
                deviations[key] = [wanted, value]
    if config.backbone.name not in recipe.backbones:
        deviations["backbone.name"] = [" or ".join(recipe.backbones[:2]), config.backbone.name]
    for key in recipe.starts:
        if start := OmegaConf.select(config, key):
            deviations[key] = ["from scratch" if "backbone.weights" in recipe.starts else "from backbone.weights", Path(start).name]
    if 0 < config.data.max_side_px < SMALLEST_SIDE_PX:
        deviations["data.max_side_px"] = [0, config.data.max_side_px]
    if n_images != recipe.n_images:
        deviations["data.n_images"] = [recipe.n_images, n_images]
    return Protocol(name=recipe.name, version=VERSION, full=not deviations, deviations=deviations)


def _pretraining(config: DictConfig) -> Recipe:
    """The method's, or the baseline's."""
    return Recipe("dinov2-100ep", BASELINE) if follows_baseline(config) else Recipe("intertwined-100ep")


def _post_training(config: DictConfig) -> Recipe:
    """PaKA's or Gram anchoring's, from any weights. Patch size (14 | 16) and width (S | B) choose crops and batch."""
    name, patch_size = config.backbone.name, config.backbone.patch_size
    global_px, local_px = SIZES_PX.get(patch_size, SIZES_PX[16])
    size = "base" if "_base_" in name else "small"
    changes = {**PAKA, "crops.global_px": global_px, "crops.local_px": local_px, "optim.batch_size": BATCH_SIZES[size]}
    changes["backbone.patch_size"] = patch_size if patch_size in SIZES_PX else 16
    is_gram, is_tied = config.dense.loss == "gram", config.positions.encoding == "field"
    if is_gram and config.crops.local_rule == "same":
        label, more = "gram-whole-25ep", GRAM | WHOLE | {"crops.local_px": global_px, "dense.region_grid": global_px // patch_size}
    elif is_gram:
        label, more = "gram-25ep", GRAM
    else:
        label, more = ("paka-tied-25ep", TIED) if is_tied else ("paka-25ep", {})
    backbones = tuple(f"vit_{width}_patch16{registers}" for registers in ("", "_reg4") for width in BATCH_SIZES)
    return Recipe(label, {**changes, **more}, (*NO_PART, *NO_PART_OF_DENSE), COCO_TRAIN, backbones, starts=("run.start_from",))


def follows_baseline(config: DictConfig) -> bool:
    """Whether a run is named after the baseline: all of :data:`BASELINE` holds, but for the grid, whose size goes with the crops.

    The method with both of its parts off (Table 3) is not the baseline: the paper reports the two apart (41.3 and 41.9 AP), and
    here the array P stays in the one and is absent in the other.
    """
    return all(OmegaConf.select(config, key) == value for key, value in BASELINE.items() if key != "positions.grid")
