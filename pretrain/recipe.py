"""The paper's pre-training recipes, and in what a run departs from the one that it is named after.

``default.yaml`` is the method's recipe; the DINOv2 baseline is the same with the changes below (METHOD.md 5). There are these
two and no more: a row of the paper's ablations is the method's recipe with the few departures that make the row, named by key.
"""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from pretrain.config import as_dict, load_config
from pretrain.results.schema import Protocol

VERSION = 1
IMAGENET_1K = 1_281_167  # training images
# What a recipe says. Groups that are left out say where and how a run computes, not what: run, data, step, probes, log.
GROUPS = ("crops", "positions", "colour", "masks", "backbone", "heads", "losses", "optim")
BACKBONES = ("vit_small_patch16", "vit_base_patch16")  # one recipe for both (appendix B.1)
NO_PART = ("backbone.name", "backbone.attention", "backbone.weights")  # compared below, or of no effect on what is learned
STARTS = ("run.start_from", "backbone.weights")  # the recipe starts from scratch
BASELINE = {  # DINOv2-dagger: the paper's own baseline
    "positions.encoding": "standard",
    "positions.grid": 14,
    "positions.interpolation": "dinov2",
    "positions.augment": False,
    "masks.position_share": 0.0,
    "losses.position": 0.0,
}
SMALLEST_SIDE_PX = 512  # images scaled down to this before they are cropped are the data path's affair; below, they are other data


def pretraining_protocol(config: DictConfig, n_images: int) -> Protocol:
    """Name of the recipe that a run follows (``intertwined-100ep`` | ``dinov2-100ep``), and every setting that differs from it.

    ``optim.batch_size`` is the number of images a step over all ranks and all parts of an accumulated step, so neither the ranks
    nor ``step.accumulate`` make another recipe.

    Args:
        config: of the run.
        n_images: size of its data set; ImageNet-1K's is part of the recipe.
    """
    is_baseline = follows_baseline(config)
    recipe = as_dict(load_config())
    for key, value in (BASELINE if is_baseline else {}).items():
        group, name = key.split(".")
        recipe[group][name] = value
    deviations: dict[str, list[Any]] = {}
    for group in GROUPS:
        for option, value in as_dict(config)[group].items():
            key = f"{group}.{option}"
            if key not in NO_PART and value != recipe[group][option]:
                deviations[key] = [recipe[group][option], value]
    if config.backbone.name not in BACKBONES:
        deviations["backbone.name"] = [" or ".join(BACKBONES), config.backbone.name]
    for key in STARTS:
        if start := OmegaConf.select(config, key):
            deviations[key] = ["from scratch", Path(start).name]  # its folder is nobody's business
    if 0 < config.data.max_side_px < SMALLEST_SIDE_PX:
        deviations["data.max_side_px"] = [0, config.data.max_side_px]
    if n_images != IMAGENET_1K:
        deviations["data.n_images"] = [IMAGENET_1K, n_images]
    name = "dinov2-100ep" if is_baseline else "intertwined-100ep"
    return Protocol(name=name, version=VERSION, full=not deviations, deviations=deviations)


def follows_baseline(config: DictConfig) -> bool:
    """Whether a run is named after the baseline: all of :data:`BASELINE` holds, but for the grid, whose size goes with the crops.

    The method with both of its parts off (Table 3) is not the baseline: the paper reports the two apart (41.3 and 41.9 AP), and
    here the array P stays in the one and is absent in the other.
    """
    return all(OmegaConf.select(config, key) == value for key, value in BASELINE.items() if key != "positions.grid")
