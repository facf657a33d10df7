"""The paper's pre-training recipes, and in what a run departs from the one that it is named after.

``default.yaml`` is the method's recipe; the DINOv2 baseline is the same with the changes below (METHOD.md 5).
"""

from typing import Any

from omegaconf import DictConfig

from pretrain.config import as_dict, load_config
from pretrain.results.schema import Protocol

VERSION = 1
IMAGENET_1K = 1_281_167  # training images
GROUPS = ("crops", "positions", "colour", "masks", "backbone", "heads", "losses", "optim")
NO_PART = ("backbone.name", "backbone.attention")  # the recipe is the same for ViT-S and ViT-B (appendix B.1)
BASELINE = {  # DINOv2-dagger: the paper's own baseline
    "positions.encoding": "standard",
    "positions.grid": 14,
    "positions.interpolation": "dinov2",
    "positions.augment": False,
    "masks.position_share": 0.0,
    "losses.position": 0.0,
}


def pretraining_protocol(config: DictConfig, n_images: int) -> Protocol:
    """Name of the recipe that a run follows (``intertwined-100ep`` | ``dinov2-100ep``), and every setting that differs from it.

    Args:
        config: of the run.
        n_images: size of its data set; ImageNet-1K's is part of the recipe.
    """
    is_baseline = config.positions.encoding == "standard" and config.losses.position == 0
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
    if n_images != IMAGENET_1K:
        deviations["data.n_images"] = [IMAGENET_1K, n_images]
    name = "dinov2-100ep" if is_baseline else "intertwined-100ep"
    return Protocol(name=name, version=VERSION, full=not deviations, deviations=deviations)
