"""The recipes as tests read them."""

import re
from pathlib import Path

from pretrain.config import RECIPES, load_config
from pretrain.schedules import effective_epochs

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "pretrain"
ABLATIONS = RECIPES / "ablation"


def path_of(name):
    """The file of a config, of ``ablation/NAME``, or of a recipe."""
    path = CONFIGS / f"{name}.yaml"
    return path if path.is_file() else RECIPES / f"{name}.yaml"


def recipe(name, *words):
    return load_config(path_of(name), words)


def comments(name):
    """What a recipe's file says, in one line."""
    return re.sub(r"\s*\n#\s*", " ", path_of(name).read_text())


def effective(config, epochs):
    """Epochs of two crops of 224 px."""
    crops = config.crops
    return effective_epochs(epochs, crops.n_global, crops.n_local, crops.global_px, crops.local_px)
