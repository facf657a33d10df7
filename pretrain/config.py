"""The configuration of a pre-training run: ``default.yaml`` holds every key; children and ``key=value`` change some.

An unknown key, a value of another type and a value outside its choices are errors that name the key.
"""

import math
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
from pretrain.device import DEVICES
from pretrain.errors import UserError
from pretrain.losses.alignment import KERNELS, LOSSES
from pretrain.views.boxes import LOCAL_RULES, REFERENCES, SCALES, SURROUNDED
from pretrain.views.masks import KINDS_OVER, SHAPES

SOURCES = ("folder", "list", "coco", "tar", "parquet", "huggingface")
CHOICES: dict[str, tuple[str, ...]] = {
    "run.device": DEVICES,
    "run.precision": ("auto", "float32", "bf16", "float64"),
    "run.deterministic": ("cpu", "always", "never"),
    "run.algorithm": ("intertwined", "dense"),
    "run.leaves": ("teacher", "student"),
    "data.source": ("auto", *SOURCES),
    "data.path": ("auto", "cpu", "device"),
    "crops.local_rule": LOCAL_RULES,
    "positions.encoding": ("field", "standard"),
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
    "dense.loss": LOSSES,
    "dense.kernel": KERNELS,
    "dense.pairs": ("all", "parent"),
    "optim.lr_rule": ("sqrt_1024", "none"),
    "step.checkpointing": ("none", "full", "selective"),
    "step.parallel": ("ddp", "fsdp2"),
    "step.on_nan": ("stop", "skip"),
}
# Ranges of numbers, both ends allowed; each item of a list must lie within.
RANGES: dict[str, tuple[float, float]] = {
    "run.seed": (0, 2**31),
    "data.workers": (0, 1024),
    "data.max_side_px": (0, 65536),
    "data.max_mpx": (1e-6, math.inf),
    "data.broken_share": (0, 1),
    "crops.n_global": (2, 64),
    "crops.n_local": (0, 1024),
    "crops.global_px": (1, 65536),
    "crops.local_px": (1, 65536),
    "crops.global_scale": (1e-6, 1),
    "crops.local_scale": (1e-6, 1),
    "crops.ratio": (1e-3, 1e3),
    "crops.flip_p": (0, 1),
    "crops.local_inside": (0, 1),
    "positions.grid": (2, 4096),
    "positions.beta": (1e-6, math.inf),
    "positions.s_min": (1e-6, 1),
    "positions.s_max": (1e-6, 1),
    "colour.jitter": (0, math.inf),
    "colour.jitter_p": (0, 1),
    "colour.grey_p": (0, 1),
    "colour.blur_p": (0, 1),
    "colour.blur_kernel_px": (1, 1023),
    "colour.blur_sigma": (1e-6, math.inf),
    "colour.solarize_p": (0, 1),
    "colour.solarize_threshold": (0, 256),
    "masks.content_share": (0, 1),
    "masks.position_share": (0, 1),
    "masks.ratio": (0, 1 - 1e-9),
    "masks.min_box_patches": (1, 65536),
    "masks.min_aspect": (1e-6, 1),
    "backbone.patch_size": (1, 1024),
    "backbone.depth": (0, 1024),
    "backbone.n_registers": (0, 1024),
    "backbone.layerscale": (0, math.inf),
    "backbone.drop_path": (0, 1 - 1e-9),
    "heads.n_prototypes": (1, math.inf),
    "heads.hidden_dim": (1, math.inf),
    "heads.bottleneck_dim": (1, math.inf),
    "heads.n_layers": (1, 64),
    "losses.image": (0, math.inf),
    "losses.content": (0, math.inf),
    "losses.position": (0, math.inf),
    "losses.koleo": (0, math.inf),
    "losses.center_momentum": (0, 1),
    "losses.sinkhorn_iterations": (1, 1000),
    "losses.teacher_temperature": (1e-6, math.inf),
    "losses.student_temperature": (1e-6, math.inf),
    "dense.bandwidth": (1e-6, math.inf),
    "dense.region_grid": (2, 64),
    "dense.region_samples": (1, 16),
    "dense.min_overlap_patches": (1e-6, math.inf),
    "optim.epochs": (1, math.inf),
    "optim.batch_size": (1, math.inf),
    "optim.epoch_length_it": (0, math.inf),
    "optim.base_lr": (0, math.inf),
    "optim.head_lr_factor": (0, math.inf),
    "optim.min_lr": (0, math.inf),
    "optim.warmup_epochs": (0, math.inf),
    "optim.weight_decay": (0, math.inf),
    "optim.weight_decay_end": (0, math.inf),
    "optim.betas": (0, 1 - 1e-9),
    "optim.clip_grad": (0, math.inf),
    "optim.freeze_last_layer_epochs": (0, math.inf),
    "optim.teacher_momentum": (0, 1),
    "optim.teacher_momentum_end": (0, 1),
    "step.accumulate": (1, math.inf),
    "step.loss_rows": (0, math.inf),
    "probes.period_it": (0, math.inf),
    "probes.knn_k": (1, math.inf),
    "probes.seg_classes": (0, 65535),
    "probes.image_px": (1, 65536),
    "probes.max_images": (1, math.inf),
    "log.period_it": (1, math.inf),
    "log.checkpoint_period_it": (1, math.inf),
    "log.keep_checkpoints": (1, math.inf),
    "log.pictures_period_it": (0, math.inf),
}
RISING = ("crops.global_scale", "crops.local_scale", "crops.ratio", "colour.blur_sigma", "masks.ratio")


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
    """A config that an earlier run saved; keys that its code did not know yet have their defaults."""
    config = _defaults()
    _merge(config, OmegaConf.create(values), "saved config")
    check(config)
    OmegaConf.set_readonly(config, True)
    return config


def completed(values: Any) -> Any:
    """The plain values of a config that an earlier run saved, with the defaults of the keys that its code did not know yet. Nothing
    is checked: what is damaged stays so."""
    if not isinstance(values, dict):
        return values
    defaults = as_dict(_defaults())
    groups = {name: {**defaults[name], **keys} for name, keys in values.items() if name in defaults and isinstance(keys, dict)}
    return {**defaults, **values, **groups}


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
    if isinstance(default, str) and value is None:
        value = ""  # `key=` on a command line
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
    """Values that are of the right type and still wrong; a warning for those that have no effect.

    Raises:
        UserError: names the key.
    """
    for name, choices in CHOICES.items():
        value = OmegaConf.select(config, name)
        if value not in choices:
            raise UserError(f"config: {name}={value!r} is none of {', '.join(choices)}")
    for name, (low, high) in RANGES.items():
        value = OmegaConf.select(config, name)
        items = list(value) if isinstance(value, ListConfig) else [value]
        if not all(low <= item <= high for item in items):  # NaN is in no range
            raise UserError(f"config: {name}={items if len(items) > 1 else value!r} should lie in [{low:g}, {high:g}]")
    for name in RISING:
        low, high = OmegaConf.select(config, name)
        if low > high:
            raise UserError(f"config: {name}={[low, high]} should rise")
    _check_together(config)


def _check_together(config: DictConfig) -> None:
    """What two keys say of one another."""
    masks, crops, positions, patch_size = config.masks, config.crops, config.positions, config.backbone.patch_size
    if masks.content_share + masks.position_share > 1:
        raise UserError("config: masks.content_share + masks.position_share is more than 1")
    for name in ("global_px", "local_px"):
        if crops[name] % patch_size:
            raise UserError(f"config: crops.{name}={crops[name]} is no multiple of backbone.patch_size={patch_size}")
    if positions.s_min > positions.s_max:
        raise UserError(f"config: positions.s_min={positions.s_min} is more than positions.s_max={positions.s_max}")
    if config.colour.jitter[3] > 0.5:
        raise UserError(f"config: colour.jitter={list(config.colour.jitter)}: hue, the last one, is at most 0.5")
    if config.colour.blur_kernel_px % 2 == 0:
        raise UserError(f"config: colour.blur_kernel_px={config.colour.blur_kernel_px} should be odd")
    if positions.encoding == "standard" and positions.augment:
        warnings.warn("config: positions.augment has no effect with positions.encoding=standard", stacklevel=2)
    if config.step.compile and config.step.checkpointing == "selective":
        warnings.warn("config: step.checkpointing=selective may act as full with step.compile=true", stacklevel=2)
    (_check_dense if config.run.algorithm == "dense" else _check_intertwined)(config)


def _check_intertwined(config: DictConfig) -> None:
    """A pre-training: positions and masks that fit, and nothing of a post-training."""
    masks, positions, side = config.masks, config.positions, config.crops.global_px // config.backbone.patch_size
    if positions.encoding == "standard" and positions.grid != side:
        warnings.warn(f"config: positions.grid={positions.grid}, but a global crop has {side} x {side} patches", stacklevel=2)
    for key, default in _defaults().dense.items():
        if config.dense[key] != default:
            warnings.warn(f"config: dense.{key} has no effect with run.algorithm=intertwined", stacklevel=2)
    for kind in ("content", "position"):
        if (masks[f"{kind}_share"] > 0) != (config.losses[kind] > 0):
            warnings.warn(f"config: masks.{kind}_share and losses.{kind} act only together, and one is 0", stacklevel=2)


def _check_dense(config: DictConfig) -> None:
    """A post-training: a start, crops that can overlap, a network that moves; it masks nothing."""
    crops, dense, optim, patch_size = config.crops, config.dense, config.optim, config.backbone.patch_size
    if not config.backbone.weights:
        raise UserError("config: backbone.weights is empty, but a post-training (run.algorithm=dense) starts from a backbone")
    if not crops.n_local:
        raise UserError("config: crops.n_local=0, but the student of run.algorithm=dense sees local crops")
    for name in ("global_px", "local_px"):
        n = crops[name] // patch_size
        if crops.local_rule != "same" and dense.min_overlap_patches >= n - 1:
            least = f"dense.min_overlap_patches={dense.min_overlap_patches:g}"
            raise UserError(f"config: {least} leaves no overlap: the centres of crops.{name}={crops[name]} span {n - 1} patches")
    if config.run.leaves == "teacher" and optim.teacher_momentum == optim.teacher_momentum_end == 1:
        raise UserError("config: run.leaves=teacher, but with optim.teacher_momentum=1 it stays what backbone.weights is")
    n, n_points = min(crops.global_px, crops.local_px) // patch_size, dense.region_grid * dense.region_samples
    if crops.local_rule == "same" and crops.local_px != crops.global_px and n_points > n:
        points = f"dense.region_grid * dense.region_samples={n_points} points"
        warnings.warn(f"config: {points} of a whole crop (crops.local_rule=same) repeat the border of {n} patches", stacklevel=2)
    for kind in ("content", "position"):
        if config.masks[f"{kind}_share"]:
            warnings.warn(f"config: masks.{kind}_share has no effect with run.algorithm=dense", stacklevel=2)
