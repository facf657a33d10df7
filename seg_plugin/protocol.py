"""The ADE20K fine-tuning protocol: every number of it, once; and what other data sets change in it.

A linear decoder on the last layer's patch tokens (Segmenter, Strudel et al., 2021). Sources: the paper's appendix B.3; "Segmenter":
its public code and MMSegmentation 1.2.2's configs for it; "MMSegmentation": that library's config of the data set; "ours": none.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from pretrain import overrides as settings
from pretrain.errors import UserError


@dataclass(frozen=True)
class SegmentationProtocol:
    """One segmentation fine-tuning recipe. Lengths in pixels (``_px``), durations in iterations (``_it``)."""

    name: str = "ade20k-160k"
    version: int = 1

    # Schedule: B.3, about 127 epochs of 20,210 images.
    iterations_it: int = 160_000
    batch_size: int = 16  # over all processes
    min_lr_factor: float = 0.1  # B.3: the last lr is this factor of the first, whichever that is
    poly_power: float = 0.9  # Segmenter
    warmup_it: int = 0  # Segmenter: none
    val_interval_it: int = 16_000  # MMSegmentation

    # Optimiser: AdamW. The best of the grid by mIoU, each setting averaged over the seeds (B.3).
    lr_grid: tuple[float, ...] = (8e-5, 3e-5, 1e-5, 8e-6)
    weight_decay_grid: tuple[float, ...] = (1e-2, 1e-4)
    seeds: int = 2
    lr: float = 8e-5  # one of the grid
    weight_decay: float = 1e-2  # one of the grid
    betas: tuple[float, float] = (0.9, 0.999)  # ours: AdamW's own
    decay_all: bool = False  # Segmenter: 0 for norms, biases, positions and special tokens
    layer_decay: float = 1.0  # B.3 names none
    drop_path: float = 0.1  # Segmenter
    freeze_backbone: bool = False  # only the decoder learns, on features of which no path is dropped
    clip_grad: float = 0.0  # 0: no clipping
    amp: bool = False  # ours: float32; else float16 with loss scaling

    # Input
    resize_px: tuple[int, int] = (2048, 512)  # MMSegmentation: bounds of the long and of the short edge
    ratio_range: tuple[float, float] = (0.5, 2.0)  # MMSegmentation
    crop_px: int = 512  # Segmenter
    cat_max_ratio: float = 0.75  # MMSegmentation: a crop holds at most this share of one class
    flip: float = 0.5
    brightness: int = 32  # MMSegmentation's photometric distortion, this line to `hue`
    contrast: tuple[float, float] = (0.5, 1.5)
    saturation: tuple[float, float] = (0.5, 1.5)
    hue: int = 18
    pixel_mean: tuple[float, float, float] = (123.675, 116.28, 103.53)  # RGB, ImageNet's
    pixel_std: tuple[float, float, float] = (58.395, 57.12, 57.375)

    # Labels and loss
    num_classes: int = 150
    reduce_zero_label: bool = True  # 0 in a mask is "other", which is ignored; class k is stored as k + 1
    ignore_index: int = 255
    avg_non_ignore: bool = False  # MMSegmentation: ignored pixels count in the mean, with loss 0

    # Test: one scale, sliding windows
    slide_crop_px: int = 512
    slide_stride_px: int = 480


# ADE20K's alone is the paper's (B.3). The others are ours: its recipe, with the lengths and sizes that the data set's users know.
_VOC = dict(iterations_it=40_000, val_interval_it=4_000, num_classes=21, reduce_zero_label=False)  # MMSegmentation: schedule_40k
PROTOCOLS: dict[str, dict[str, Any]] = {
    "ade20k-160k": {},
    "voc2012-40k": _VOC,
    "voc2012aug-40k": _VOC,
    "cityscapes-80k": dict(
        iterations_it=80_000,  # Segmenter, as batch, crop and windows
        val_interval_it=8_000,
        batch_size=8,
        resize_px=(2048, 1024),  # MMSegmentation: the images' own size
        crop_px=768,
        slide_crop_px=768,
        slide_stride_px=512,
        num_classes=19,
        reduce_zero_label=False,
    ),
    "own-160k": dict(num_classes=0, reduce_zero_label=False),  # 0: the folder or the user says how many
}
OWN = "own-160k"
NAMES = tuple(PROTOCOLS)
OF_THE_DATA = ("num_classes", "reduce_zero_label")  # on one's own data these describe the masks, and are no departure
SWEEP = "sweep"


def protocol(name: str = "ade20k-160k") -> SegmentationProtocol:
    """The named protocol."""
    if name not in PROTOCOLS:
        raise UserError(f"protocol: {name!r} is none of {', '.join(NAMES)}")
    return replace(SegmentationProtocol(name=name), **PROTOCOLS[name])


def with_overrides(base: SegmentationProtocol, overrides: Mapping[str, Any]) -> SegmentationProtocol:
    """``base`` with some fields changed; values may be strings from a command line.

    Raises:
        UserError: an unknown field, or a value of the wrong type, by name; no such number of classes.
    """
    changed = settings.with_overrides(base, overrides)
    if not 2 <= changed.num_classes <= 254:  # masks are 8 bit, and 255 is ignored
        raise UserError(f"protocol: num_classes={changed.num_classes} is not from 2 to 254")
    return changed


def check(run: SegmentationProtocol) -> None:
    """Refuse numbers that no run can follow.

    Raises:
        UserError: names the field, its value and what it should be.
    """
    positive = ("iterations_it", "batch_size", "val_interval_it", "crop_px", "slide_crop_px", "slide_stride_px", "seeds")
    demands = {key: (getattr(run, key) >= 1, "at least 1") for key in positive}
    floored = ("lr", "weight_decay", "clip_grad", "warmup_it", "poly_power", "brightness", "hue")
    demands |= {key: (getattr(run, key) >= 0, "at least 0") for key in floored}
    shares = ("flip", "layer_decay", "min_lr_factor", "cat_max_ratio")
    demands |= {key: (0 <= getattr(run, key) <= 1, "within 0 and 1") for key in shares}
    for key in ("ratio_range", "contrast", "saturation"):
        low, high = getattr(run, key)
        demands[key] = 0 < low <= high, "two rising numbers above 0"
    for key in ("lr_grid", "weight_decay_grid"):
        grid = getattr(run, key)
        demands[key] = len(grid) == len(set(grid)) > 0 and min(grid) >= 0, "one or more different numbers, at least 0"
    demands["betas"] = all(0 <= beta < 1 for beta in run.betas), "from 0 to below 1"
    demands["drop_path"] = 0 <= run.drop_path < 1, "from 0 to below 1"
    demands["pixel_std"] = min(run.pixel_std) > 0, "above 0"
    demands["resize_px"] = min(run.resize_px) >= 1, "at least 1"
    if run.warmup_it >= run.iterations_it >= 1:
        demands["warmup_it"] = False, f"less than iterations_it={run.iterations_it}"
    if run.slide_stride_px > run.slide_crop_px:  # pixels between the windows would have no class
        demands["slide_stride_px"] = False, f"at most slide_crop_px={run.slide_crop_px}"
    if run.reduce_zero_label:  # MMSegmentation writes 255 for the zeros
        demands["ignore_index"] = run.ignore_index == 255, "255 where reduce_zero_label=true"
    else:
        demands["ignore_index"] = run.num_classes <= run.ignore_index <= 255, f"from num_classes={run.num_classes} to 255"
    for key, (fits, what) in demands.items():
        if not fits:
            raise UserError(f"protocol: {key}={getattr(run, key)!r} must be {what}")


def deviations(run: SegmentationProtocol) -> dict[str, list[Any]]:
    """Fields in which a run differs from the protocol that it is named after: ``{field: [protocol's, run's]}``.

    Any point of the protocol's grid is within the protocol.
    """
    full = protocol(run.name)
    within = {"lr": run.lr in full.lr_grid, "weight_decay": run.weight_decay in full.weight_decay_grid}
    within |= dict.fromkeys(OF_THE_DATA, run.name == OWN)
    return {key: pair for key, pair in settings.differences(full, run).items() if not within.get(key, False)}


def not_swept(run: SegmentationProtocol) -> dict[str, list[Any]]:
    """What every single run departs in: the protocol's result is the best of its grid (:mod:`seg_plugin.sweep`)."""
    full = protocol(run.name)
    n_settings = len(full.lr_grid) * len(full.weight_decay_grid)
    return {SWEEP: [f"the best of {n_settings} settings x {full.seeds} seeds", "one setting, one seed"]}
