"""Every number of the ADE20K fine-tuning protocol, once, and what other data sets change.

A linear decoder on the last layer's patch tokens (Segmenter, Strudel et al., 2021). Sources: "B.3", the
paper's appendix; "Segmenter", its public code and MMSegmentation 1.2.2's configs for it; "MMSegmentation",
that library's config of the data set; "ours": none.
"""

from collections.abc import Mapping
from typing import Any

from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from pretrain.errors import UserError
from pretrain.results import renamed
from pretrain.settings import Settings, differences, replaced, setting

OWN = "own-160k"  # the protocol of your own data
MMSEG, SEGMENTER = "MMSegmentation", "Segmenter"
Rates = tuple[NonNegativeFloat, ...]


class SegmentationProtocol(Settings):
    """One segmentation fine-tuning recipe. Lengths in pixels (``_px``), durations in iterations."""

    renamed = renamed.SEGMENTATION

    name: str = setting("ade20k-160k", "the protocol that the recipe follows", source="ours", settable=False)
    version: int = setting(1, "version of that protocol", source="ours", settable=False)

    # Schedule
    max_iters: int = setting(160_000, "iterations; about 127 epochs of 20,210 images", source="B.3", ge=1)
    batch_size: int = setting(16, "images a step, over all processes", source="B.3", ge=1)
    min_lr_factor: float = setting(0.1, "share of the first lr that the last is", source="B.3", ge=0, le=1)
    poly_power: float = setting(0.9, "power of the polynomial decay", source=SEGMENTER, ge=0)
    warmup_iters: int = setting(0, "iterations of linear warm-up; 0: none", source=SEGMENTER, ge=0)
    val_every: int = setting(16_000, "iterations between validations", source=MMSEG, ge=1)
    patience: int = setting(
        0, "validations without a better mIoU that end a run; 0: none do", source="ours", ge=0
    )

    # Optimizer: AdamW. The best of the grid by mIoU, each setting averaged over the seeds (B.3).
    lr_grid: Rates = setting((8e-5, 3e-5, 1e-5, 8e-6), "lr of a sweep", source="B.3", min_length=1)
    weight_decay_grid: Rates = setting((1e-2, 1e-4), "weight decay of a sweep", source="B.3", min_length=1)
    seeds: int = setting(2, "runs of each setting of a sweep", source="B.3", ge=1)
    lr: float = setting(8e-5, "one of the grid", source="B.3", ge=0)
    weight_decay: float = setting(1e-2, "one of the grid", source="B.3", ge=0)
    betas: tuple[NonNegativeFloat, NonNegativeFloat] = setting((0.9, 0.999), "AdamW's own", source="ours")
    decay_all: bool = setting(False, "also decay norms, biases, positions, special tokens", source=SEGMENTER)
    layer_decay: float = setting(1.0, "factor on the lr a layer; B.3 names none", source="ours", ge=0, le=1)
    drop_path: float = setting(0.1, "rate of the last block, rising from 0", source=SEGMENTER, ge=0, lt=1)
    freeze_backbone: bool = setting(False, "only the decoder learns; no path is dropped", source="ours")
    clip_grad: float = setting(0.0, "largest norm of the gradients; 0: no clipping", source=SEGMENTER, ge=0)
    amp: bool = setting(False, "float16 with loss scaling; else float32", source="ours")

    # Input
    resize_px: tuple[PositiveInt, PositiveInt] = setting(
        (2048, 512), "bounds of long and short edge", source=MMSEG
    )
    ratio_range: tuple[float, float] = setting((0.5, 2.0), "scale of training images", source=MMSEG)
    crop_px: int = setting(512, "side of a training crop", source=SEGMENTER, ge=1)
    cat_max_ratio: float = setting(0.75, "largest share of one class in a crop", source=MMSEG, ge=0, le=1)
    flip: float = setting(0.5, "probability of a horizontal flip", source=MMSEG, ge=0, le=1)
    brightness: int = setting(32, "of the photometric distortion: largest shift", source=MMSEG, ge=0)
    contrast: tuple[float, float] = setting((0.5, 1.5), "of the distortion: factor", source=MMSEG)
    saturation: tuple[float, float] = setting((0.5, 1.5), "of the distortion: factor", source=MMSEG)
    hue: int = setting(18, "of the distortion: largest shift", source=MMSEG, ge=0)
    pixel_mean: tuple[float, float, float] = setting((123.675, 116.28, 103.53), "RGB", source="ImageNet")
    pixel_std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = setting(
        (58.395, 57.12, 57.375), "RGB", source="ImageNet"
    )

    # Labels and loss
    num_classes: int = setting(150, "ADE20K's; 0: the folder or the user says", source="B.3", ge=0, le=254)
    reduce_zero_label: bool = setting(
        True, "0 is 'other', which is ignored; class k is stored as k + 1", source=MMSEG
    )
    ignore_index: int = setting(255, "label that is not counted", source=MMSEG, le=255)
    avg_non_ignore: bool = setting(
        False,
        "mean loss of counted pixels; else ignored ones count with 0",
        source=MMSEG,
    )

    # Test: one scale, sliding windows
    slide_crop_px: int = setting(512, "side of a window", source=SEGMENTER, ge=1)
    slide_stride_px: int = setting(480, "from window to window", source=SEGMENTER, ge=1)

    @model_validator(mode="after")
    def _fits_together(self) -> "SegmentationProtocol":
        # Masks have 8 bits, and 255 is ignored. MMSegmentation writes 255 for the zeros that it removes.
        n, ignored, windows = self.num_classes, self.ignore_index, self.slide_crop_px
        demands = {
            "num_classes": (n >= 2 or self.name == OWN and not n, "from 2 to 254"),
            "betas": (max(self.betas) < 1, "from 0 to below 1"),
            "warmup_iters": (self.warmup_iters < self.max_iters, f"less than max_iters={self.max_iters}"),
            # else pixels between the windows would have no class
            "slide_stride_px": (self.slide_stride_px <= windows, f"at most slide_crop_px={windows}"),
            "ignore_index": (n <= ignored, f"from num_classes={n} to 255"),
        }
        if self.reduce_zero_label:
            demands["ignore_index"] = ignored == 255, "255 where reduce_zero_label=true"
        for key in ("ratio_range", "contrast", "saturation"):
            low, high = getattr(self, key)
            demands[key] = 0 < low <= high, "two rising numbers above 0"
        for key in ("lr_grid", "weight_decay_grid"):
            demands[key] = len(getattr(self, key)) == len(set(getattr(self, key))), "different numbers"
        for key, (fits, what) in demands.items():
            if not fits:
                raise ValueError(f"{key}={getattr(self, key)!r} must be {what}")
        return self


# Only ADE20K's is the paper's (B.3). The others are ours: its recipe with the lengths and sizes that are usual for
# each data set: MMSegmentation's schedule_40k, and Segmenter's length, batch, crop and windows of Cityscapes, whose
# images MMSegmentation does not resize.
_VOC = dict(max_iters=40_000, val_every=4_000, num_classes=21, reduce_zero_label=False)
PROTOCOLS: dict[str, dict[str, Any]] = {
    "ade20k-160k": {},
    "voc2012-40k": _VOC,
    "voc2012aug-40k": _VOC,
    "cityscapes-80k": dict(
        max_iters=80_000, val_every=8_000, batch_size=8, resize_px=(2048, 1024), crop_px=768, slide_crop_px=768,
        slide_stride_px=512, num_classes=19, reduce_zero_label=False,
    ),
    OWN: dict(num_classes=0, reduce_zero_label=False),  # 0: the folder or the user says how many
}  # fmt: skip
ADDED = ("patience",)  # fields that older runs do not have; configs hold what is away from the defaults
# Of your own data these describe the masks and are no deviation
OF_THE_DATA = ("num_classes", "reduce_zero_label")
SWEEP = "sweep"


def protocol(name: str = "ade20k-160k") -> SegmentationProtocol:
    """The named protocol.

    Raises:
        UserError: no such protocol.
    """
    if name not in PROTOCOLS:
        raise UserError(f"protocol: {name!r} is none of {', '.join(PROTOCOLS)}")
    return SegmentationProtocol(name=name, **PROTOCOLS[name])


def with_overrides(base: SegmentationProtocol, overrides: Mapping[str, Any]) -> SegmentationProtocol:
    """``base`` with some fields changed. Values may be text from a command line.

    Raises:
        UserError: an unknown field, or a value of the wrong type or out of range; names both.
    """
    changed = replaced(base, overrides, "protocol")
    if not changed.num_classes:
        raise UserError("protocol: num_classes=0 must be from 2 to 254")
    return changed


def deviations(run: SegmentationProtocol) -> dict[str, list[Any]]:
    """Fields in which a run differs from the protocol that it is named after: ``{field: [protocol's, run's]}``. Any
    point of the protocol's grid is within the protocol."""
    full = protocol(run.name)
    within = {"lr": run.lr in full.lr_grid, "weight_decay": run.weight_decay in full.weight_decay_grid}
    within |= dict.fromkeys(OF_THE_DATA, run.name == OWN)
    return {key: pair for key, pair in differences(full, run).items() if not within.get(key, False)}


def not_swept(run: SegmentationProtocol) -> dict[str, list[Any]]:
    """The deviation of every single run: the protocol's result is its grid's best (:mod:`seg_plugin.sweep`)."""
    full = protocol(run.name)
    n_settings = len(full.lr_grid) * len(full.weight_decay_grid)
    return {SWEEP: [f"the best of {n_settings} settings x {full.seeds} seeds", "one setting, one seed"]}
