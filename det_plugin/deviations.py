"""Where a config deviates from the protocol that it is named after.

It does not matter what changed it: a protocol's override, a config file, or a ``key=value`` on a stock launcher's command line.
"""

from typing import Any

from omegaconf import DictConfig, OmegaConf

from det_plugin.lazy import config
from det_plugin.protocol import DetectionProtocol, deviations, protocol, with_overrides
from det_plugin.saved_config import NET_KEYS, SURROUNDINGS, model_kwargs_in, plain
from pretrain.build import network_kwargs
from pretrain.settings import compared

NO_RECIPE = (*SURROUNDINGS, "train.seed", "dataloader.evaluator.")


def protocol_in(cfg: DictConfig) -> DetectionProtocol:
    """The protocol, full or scaled down, that a config was made from."""
    evaluator = cfg.dataloader.evaluator
    base = protocol(evaluator.protocol, cfg.model.backbone.net.name)
    return with_overrides(base, OmegaConf.to_container(evaluator.overrides))  # type: ignore[arg-type]


def config_deviations(cfg: DictConfig) -> dict[str, list[Any]]:
    """``{key: [the protocol's value, the run's]}``. A key is a protocol's field, "model_kwargs" or a config's key; absent: None.

    Args:
        cfg: a whole config as :func:`det_plugin.lazy.config` makes it, perhaps edited.
    """
    made_from, net = protocol_in(cfg), cfg.model.backbone.net
    model_kwargs = {key: value for key, value in net.items() if key not in NET_KEYS}
    changed = deviations(made_from, net.name)
    if given := network_kwargs(model_kwargs_in(cfg)):
        changed["model_kwargs"] = [{}, given]
    expected = config(made_from, net.name, model_kwargs=model_kwargs)
    different = compared(plain(expected), plain(cfg))
    return changed | {key: different[key] for key in sorted(different) if not key.startswith(NO_RECIPE)}
