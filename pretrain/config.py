"""The configuration of a pre-training run: ``default.yaml`` holds every key; children and ``key=value`` change some.

An unknown key, a value of another type and a value outside its choices are errors that name the key.
"""

import warnings
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pretrain.backbones.attention import ATTENTIONS
from pretrain.backbones.position import FIELD_INTERPOLATIONS, GRID_INTERPOLATIONS
from pretrain.backbones.vit import POS_ENCODINGS
from pretrain.device import DEVICES
from pretrain.errors import UserError
from pretrain.views.boxes import REFERENCES, SCALES, SURROUNDED
from pretrain.views.masks import KINDS_OVER, SHAPES

CHOICES: dict[str, tuple[str, ...]] = {
    "run.device": DEVICES,
    "run.precision": ("auto", "float32", "bf16", "float64"),
    "positions.encoding": POS_ENCODINGS,
    "positions.interpolation": (*FIELD_INTERPOLATIONS, *GRID_INTERPOLATIONS[:1], GRID_INTERPOLATIONS[2]),
    "positions.scale": SCALES,
    "positions.reference": REFERENCES,
    "positions.surround": SURROUNDED,
    "masks.content_shape": SHAPES,
    "masks.position_shape": SHAPES,
    "masks.kinds_over": KINDS_OVER,
    "backbone.attention": ATTENTIONS,
    "losses.koleo_scope": ("global", "local"),
    "losses.centering": ("softmax_center", "sinkhorn_knopp"),
    "optim.lr_rule": ("sqrt_1024", "none"),
}
# Smallest value of numbers that must be positive or not negative.
AT_LEAST: dict[str, float] = {
    "crops.n_global": 2,
    "crops.n_local": 0,
    "crops.global_px": 1,
    "crops.local_px": 1,
    "positions.grid": 2,
    "masks.content_share": 0,
    "masks.position_share": 0,
    "heads.n_prototypes": 1,
    "optim.epochs": 1,
    "optim.batch_size": 1,
    "data.workers": 0,
    "log.period_it": 1,
    "log.checkpoint_period_it": 1,
}


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> DictConfig:
    """The defaults, changed by a child config (and the ``base:`` that it names) and by ``key=value`` arguments.

    Raises:
        UserError: names the file and the key.
    """
    config = _defaults()
    if path is not None:
        for source, values in _chain(Path(path)):
            _merge(config, values, str(source))
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise UserError(f"config: {override!r} is not of the form key=value")
        try:
            values = OmegaConf.create({})
            OmegaConf.update(values, key, yaml.safe_load(value))
        except (yaml.YAMLError, OmegaConfBaseException) as error:
            raise UserError(f"config: {override!r} cannot be read") from error
        _merge(config, values, "command line")
    check(config)
    OmegaConf.set_readonly(config, True)
    return config


def from_dict(values: dict[str, Any]) -> DictConfig:
    """A config that an earlier run saved (every key may be there)."""
    config = _defaults()
    _merge(config, OmegaConf.create(values), "saved config")
    check(config)
    OmegaConf.set_readonly(config, True)
    return config


def as_dict(config: DictConfig) -> dict[str, Any]:
    """Plain values, for hashes and files."""
    return OmegaConf.to_container(config, resolve=True)  # type: ignore[return-value]


def _defaults() -> DictConfig:
    text = resources.files("pretrain").joinpath("default.yaml").read_text()
    config = OmegaConf.create(text)
    assert isinstance(config, DictConfig)
    return config


def _chain(path: Path) -> list[tuple[Path, DictConfig]]:
    """A child and the bases that it names, the most basic first."""
    if not path.is_file():
        raise UserError(f"config: no file {path}")
    try:
        values = OmegaConf.load(path)
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise UserError(f"config: {path} is no YAML ({str(error).splitlines()[0]})") from error
    if not isinstance(values, DictConfig):
        raise UserError(f"config: {path} is no mapping of keys")
    base = values.pop("base", None)
    before = [] if base is None else _chain(path.parent / str(base))
    return [*before, (path, values)]


def _merge(config: DictConfig, values: Any, source: str, prefix: str = "") -> None:
    """Copy ``values`` into ``config`` in place, key by key."""
    for key, value in values.items():
        name = f"{prefix}{key}"
        if key not in config:
            raise UserError(f"config: unknown key {name!r} ({source})")
        default = config[key]
        if isinstance(default, DictConfig):
            if not isinstance(value, DictConfig):
                raise UserError(f"config: {name} is a group of keys, not {value!r} ({source})")
            _merge(default, value, source, f"{name}.")
        else:
            config[key] = _typed(name, value, default, source)


def _typed(name: str, value: Any, default: Any, source: str) -> Any:
    """``value`` in the type of ``default``."""
    if isinstance(default, ListConfig):
        items = list(value) if isinstance(value, (list, ListConfig)) else None
        if items is None or len(items) != len(default):
            raise UserError(f"config: {name}={value!r} should be a list of {len(default)} values ({source})")
        return [_typed(f"{name}[{i}]", item, default[i], source) for i, item in enumerate(items)]
    if isinstance(default, float) and isinstance(value, str):
        try:
            value = float(value)  # YAML 1.1 reads 1e-3 as text
        except ValueError:
            pass
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not type(default):
        raise UserError(f"config: {name}={value!r} should be of type {type(default).__name__} ({source})")
    return value


def check(config: DictConfig) -> None:
    """Values that are of the right type and still wrong.

    Raises:
        UserError: names the key.
    """
    for name, choices in CHOICES.items():
        value = OmegaConf.select(config, name)
        if value not in choices:
            raise UserError(f"config: {name}={value!r} is none of {', '.join(choices)}")
    for name, smallest in AT_LEAST.items():
        value = OmegaConf.select(config, name)
        if value < smallest:
            raise UserError(f"config: {name}={value!r} should be at least {smallest}")
    if config.masks.content_share + config.masks.position_share > 1:
        raise UserError("config: masks.content_share + masks.position_share is more than 1")
    low, high = config.masks.ratio
    if not 0 <= low <= high < 1:
        raise UserError(f"config: masks.ratio={[low, high]} should rise inside [0, 1)")
    if config.crops.global_px % config.backbone.patch_size or config.crops.local_px % config.backbone.patch_size:
        raise UserError(
            f"config: crops.global_px={config.crops.global_px} and crops.local_px={config.crops.local_px} should be multiples "
            f"of backbone.patch_size={config.backbone.patch_size}"
        )
    s_min, s_max = config.positions.s_min, config.positions.s_max
    if not 0 < s_min <= s_max <= 1:
        raise UserError(f"config: positions.s_min={s_min} and positions.s_max={s_max} should rise inside (0, 1]")
    if config.positions.encoding == "standard" and config.positions.augment:
        warnings.warn("config: positions.augment has no effect with positions.encoding=standard", stacklevel=2)
