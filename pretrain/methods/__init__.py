"""One file a method: teacher and student to losses."""

from omegaconf import DictConfig

from pretrain.methods.dense import Dense
from pretrain.methods.intertwined import Intertwined
from pretrain.methods.method import Method

METHODS: dict[str, type[Intertwined] | type[Dense]] = {"intertwined": Intertwined, "dense": Dense}


def build_method(config: DictConfig) -> Method:
    """The method that ``run.algorithm`` names."""
    return METHODS[config.run.algorithm](config)
