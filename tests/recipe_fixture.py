"""The recipes as tests read them."""

import re
from pathlib import Path

from pretrain.config import as_dict, load_config
from pretrain.schedules import effective_epochs

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "pretrain"


def flat(config):
    """{"group.key": value}."""
    return {f"{group}.{key}": value for group, keys in as_dict(config).items() for key, value in keys.items()}


def recipe(name, *overrides):
    return load_config(CONFIGS / f"{name}.yaml", overrides)


def comments(name):
    """What a recipe's file says, in one line."""
    return re.sub(r"\s*\n#\s*", " ", (CONFIGS / f"{name}.yaml").read_text())


def effective(config, epochs):
    """Epochs of two crops of 224 px."""
    crops = config.crops
    return effective_epochs(epochs, crops.n_global, crops.n_local, crops.global_px, crops.local_px)
