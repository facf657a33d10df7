"""The recipes as tests read them."""

import re
from pathlib import Path

from pretrain import settings
from pretrain.config import load_config
from pretrain.schedules import effective_epochs

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs" / "pretrain"
ABLATIONS = ROOT / "pretrain" / "recipes" / "ablation"


def path_of(name):
    """The file of a config, or of ``ablation/NAME``."""
    folder, _, ablation = name.rpartition("/")
    return ABLATIONS / f"{ablation}.yaml" if folder == "ablation" else CONFIGS / f"{name}.yaml"


def flat(config):
    """{"group.key": value}."""
    return settings.flat(config)


def recipe(name, *overrides):
    return load_config(path_of(name), overrides)


def comments(name):
    """What a recipe's file says, in one line."""
    return re.sub(r"\s*\n#\s*", " ", path_of(name).read_text())


def effective(config, epochs):
    """Epochs of two crops of 224 px."""
    crops = config.crops
    return effective_epochs(epochs, crops.n_global, crops.n_local, crops.global_px, crops.local_px)
