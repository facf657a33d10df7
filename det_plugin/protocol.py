"""Every number of the COCO fine-tuning protocol, once. Both engines read this file and no other.

Mask R-CNN on a plain ViT: ViTDet (Li et al., 2022) without windows and relative positions; with ``masks=off``
Faster R-CNN, the same without the mask head. Sources: "B.2", the paper's appendix; "Detectron2", its ViTDet
configs; "ours" where neither says.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from pretrain.errors import UserError
from pretrain.results import renamed
from pretrain.settings import Settings, differences, replaced, setting

SCALES = (4.0, 2.0, 1.0, 0.5)  # that a pyramid can be made of
COARSEST_PX = 32  # stride of its last map before the max-pooled one
paper, theirs, ours = (partial(setting, source=name) for name in ("B.2", "Detectron2", "ours"))
# Fields that older runs do not have: of how annotations are read, arguments of ``coco.read_split``; and all
READING = ("crowds", "masks", "keep_empty", "val_share")
ADDED = (*READING, "patience")  # of these fields, configs and hashes hold what is away from the defaults


class DetectionProtocol(Settings):
    """One detection fine-tuning recipe. Lengths in pixels (``_px``), durations in iterations."""

    renamed = renamed.DETECTION

    name: str = ours("coco-12ep", "the protocol that the recipe follows", settable=False)
    version: int = ours(1, "version of that protocol", settable=False)

    # Schedule
    max_iters: int = paper(22_128, "iterations: 12 * ceil(118,000 / 64)", ge=1)
    milestones: tuple[int, ...] = paper((19_667, 21_306), "the lr drops here, in iterations")
    lr_gamma: float = paper(0.1, "factor on the lr at each milestone", ge=0)
    warmup_iters: int = theirs(250, "iterations of linear warm-up", ge=0)
    warmup_factor: float = theirs(0.001, "share of the lr at the start of the warm-up", ge=0, le=1)
    batch_size: int = paper(64, "images a step, over all processes and micro-batches", ge=1)
    eval_every: int = theirs(5_000, "iterations between evaluations", ge=1)
    patience: int = ours(0, "evaluations without a better box AP that end a run; 0: none do", ge=0)

    # Optimizer: AdamW
    lr: float = paper(3e-4, "3e-4 for ViT-B, 1e-4 for ViT-S; others by size, ours", ge=0)
    betas: tuple[NonNegativeFloat, NonNegativeFloat] = theirs((0.9, 0.999), "of AdamW")
    weight_decay: float = theirs(0.1, "0 for norms and positions", ge=0)
    layer_decay: float = ours(0.7, "factor on the lr a layer: ViTDet's, by size; B.2 gives none", ge=0, le=1)
    drop_path: float = theirs(0.1, "rate of the last block, rising from 0; by size", ge=0, le=1)
    clip_grad: float = theirs(0.0, "largest norm of the gradients; 0: no clipping", ge=0)
    amp: bool = theirs(True, "mixed precision, on CUDA")
    amp_dtype: Literal["float16", "bfloat16"] = theirs("float16", "with loss scaling, or bfloat16 without")

    # Input
    image_size_px: int = theirs(1024, "side of the padded square; the long edge in tests", ge=COARSEST_PX)
    jitter_scale: tuple[float, float] = theirs((0.1, 2.0), "large-scale jitter of training images")
    flip: float = theirs(0.5, "probability of a horizontal flip", ge=0, le=1)
    train_share: float = ours(1.0, "share of the training images, the same ones in every run", gt=0, le=1)
    crowds: Literal["ignored", "objects"] = ours(
        "ignored", "COCO's rule; or annotations with iscrowd 1 count"
    )
    masks: Literal["auto", "on", "off"] = ours(
        "auto", "off: boxes alone; on: objects without a mask teach boxes alone; auto: these are an error"
    )
    keep_empty: bool = theirs(False, "training images without annotations are negatives, else left out")
    val_share: float = ours(0.0, "of the images, for validation, where the data have one split", ge=0, lt=1)
    pixel_mean: tuple[float, float, float] = theirs((123.675, 116.28, 103.53), "RGB")
    pixel_std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = theirs((58.395, 57.12, 57.375), "RGB")

    # Backbone
    keep_special_tokens: bool = ours(True, "[CLS] and registers stay, as pre-trained; Detectron2 has none")
    final_norm: bool = ours(True, "as pre-trained; Detectron2's ViT has none")
    window_size: int = paper(0, "patches a side; 0: every block sees the whole image; ViTDet: 14", ge=0)
    global_blocks: int = theirs(4, "where there are windows: blocks without, the last of equal groups", ge=1)
    freeze_backbone: bool = ours(False, "only pyramid and heads learn")

    # Simple feature pyramid
    pyramid_scales: tuple[float, ...] = theirs(SCALES, "of its maps; plus one max-pooled level")
    channels: int = theirs(256, "of the pyramid and the heads", ge=1)
    norm: Literal["LN", "GN", ""] = theirs("LN", "as channels; GN: Detectron2 alone, none (''): torchvision")

    # Region proposals
    anchor_sizes_px: tuple[PositiveInt, ...] = theirs((32, 64, 128, 256, 512), "one a level")
    anchor_ratios: tuple[PositiveFloat, ...] = theirs((0.5, 1.0, 2.0), "height / width", min_length=1)
    rpn_convs: int = theirs(2, "convolutions", ge=1)
    rpn_thresholds: tuple[float, float] = theirs((0.3, 0.7), "IoU: background below, an object from it on")
    rpn_batch_per_image: int = theirs(256, "anchors that the loss samples", ge=1)
    rpn_positive_fraction: float = theirs(0.5, "of these, at most", ge=0, le=1)
    rpn_pre_nms: tuple[PositiveInt, PositiveInt] = theirs((2000, 1000), "a level before NMS: training, test")
    rpn_post_nms: tuple[PositiveInt, PositiveInt] = theirs((1000, 1000), "an image after it: training, test")
    rpn_nms: float = theirs(0.7, "IoU of NMS", ge=0, le=1)

    # Heads
    num_classes: int = theirs(80, "COCO's; else as many as the data have", ge=1)
    roi_threshold: float = theirs(0.5, "IoU from which a proposal is an object", gt=0, le=1)
    roi_batch_per_image: int = theirs(512, "proposals that the loss samples", ge=1)
    roi_positive_fraction: float = theirs(0.25, "of these, at most", ge=0, le=1)
    box_pool: int = theirs(7, "side of the pooled features of a box", ge=1)
    box_convs: int = theirs(4, "convolutions of the box head", ge=0)
    box_fc: int = theirs(1024, "width of its linear layer", ge=1)
    mask_pool: int = theirs(14, "side of the pooled features of a mask", ge=1)
    mask_convs: int = theirs(4, "convolutions of the mask head", ge=0)
    box_weights: tuple[PositiveFloat, PositiveFloat, PositiveFloat, PositiveFloat] = theirs(
        (10.0, 10.0, 5.0, 5.0), "of a box's x, y, width, height in its regression"
    )
    score_threshold: float = theirs(0.05, "least score of a detection", ge=0, le=1)
    nms: float = theirs(0.5, "IoU of NMS", ge=0, le=1)
    detections_per_image: int = theirs(100, "at most", ge=1)

    @model_validator(mode="after")
    def _fits_together(self) -> "DetectionProtocol":
        steps, (low, high), (background, thing) = self.milestones, self.jitter_scale, self.rpn_thresholds
        rising = list(steps) == sorted(set(steps)) and all(0 < step <= self.max_iters for step in steps)
        ends = [SCALES[k:] for k in range(len(SCALES))]
        n_levels = len(self.pyramid_scales) + 1
        levels = f"{n_levels} numbers, one more than pyramid_scales={self.pyramid_scales}"
        demands = {
            "milestones": (rising, f"rising and within max_iters={self.max_iters}"),
            "warmup_iters": (self.warmup_iters <= self.max_iters, f"within max_iters={self.max_iters}"),
            "betas": (max(self.betas) < 1, "from 0 to below 1"),
            "jitter_scale": (0 < low <= high, "two rising numbers above 0"),
            "pyramid_scales": (self.pyramid_scales in ends, f"{SCALES} or the end of it"),
            "anchor_sizes_px": (len(self.anchor_sizes_px) == n_levels, levels),
            "rpn_thresholds": (0 < background <= thing <= 1, "two rising numbers within 0 and 1"),
        }
        for key, (fits, what) in demands.items():
            if not fits:
                raise ValueError(f"{key}={getattr(self, key)!r} must be {what}")
        return self

    @property
    def has_masks(self) -> bool:
        """Whether the detector has a mask head."""
        return self.masks != "off"

    @property
    def reading(self) -> dict[str, Any]:
        """The fields of :data:`READING` away from their defaults."""
        return {key: value for key, value in self.added.items() if key in READING}

    @property
    def added(self) -> dict[str, Any]:
        """The fields of :data:`ADDED` away from their defaults: configs and hashes of older runs stay."""
        fields = type(self).model_fields
        return {key: value for key in ADDED if (value := getattr(self, key)) != fields[key].default}


# Images of COCO train2017 with at least one object that is no crowd, and of val2017. A run on others
# deviates.
TRAIN_IMAGES, VAL_IMAGES = 117_266, 5_000

# Fields by size of the backbone. lr: B.2 names ViT-S and ViT-B; above, ViT-B's (ours: ViTDet has one for B, L and H).
# Layer decay and drop path: ViTDet's of B, L and H, in Detectron2's configs; below B as B, above H as H (ours).
_SMALL = dict(lr=1e-4, layer_decay=0.7, drop_path=0.1)
_BASE = dict(lr=3e-4, layer_decay=0.7, drop_path=0.1)
_LARGE = dict(lr=3e-4, layer_decay=0.8, drop_path=0.4)
_HUGE = dict(lr=3e-4, layer_decay=0.9, drop_path=0.5)
BY_SIZE: dict[str, dict[str, Any]] = {
    "tiny": _SMALL,
    "small": _SMALL,
    "small_plus": _SMALL,
    "base": _BASE,
    "large": dict(**_LARGE, version=2),
    "large_plus": _LARGE,
    "huge_plus": _HUGE,
    "giant": _HUGE,
    "7b": _HUGE,
}
# Rows of earlier versions: runs that began with them go on with them, and keep their protocol's label.
EARLIER: dict[tuple[str, int], dict[str, Any]] = {("large", 1): dict(**_BASE, version=1)}

# 12 epochs of a tenth of the images: 2,220 = 12 * ceil(11,800 / 64), steps at the same shares of it (8/9,
# 26/27) as in 12 epochs of all.
_TENTH: dict[str, Any] = dict(max_iters=2_220, milestones=(1_973, 2_138), train_share=0.1)
PROTOCOLS: dict[str, dict[str, Any]] = {
    "coco-12ep": dict(max_iters=22_128, milestones=(19_667, 21_306)),  # B.2
    # ours: half of 100 epochs; Table 2 gives none
    "coco-50ep": dict(max_iters=92_187, milestones=(81_944, 88_773)),
    "coco-100ep": dict(max_iters=184_375, milestones=(163_889, 177_546)),  # Detectron2
    # Cheap ones (ours), to compare backbones with each other; nothing published has them. Warm-up and
    # learning rate are those of the full protocol, and the only evaluation is the last one. "frozen" tests
    # the features as they are: only pyramid and heads learn, and the ViT runs as in evaluation.
    "coco10pct-12ep": _TENTH,
    "coco10pct-frozen-12ep": dict(**_TENTH, freeze_backbone=True, drop_path=0.0),
}


def protocol(name: str, backbone: str, version: int | None = None) -> DetectionProtocol:
    """The named protocol with the numbers of the backbone's size.

    Args:
        name: a key of :data:`PROTOCOLS`.
        backbone: a registry name, ``vit_SIZE_patch...`` with a size of :data:`BY_SIZE`.
        version: of a run of before; None: today's.

    Raises:
        UserError: no such protocol, size or version.
    """
    from pretrain.backbones.vit import size_name  # loads torch

    if name not in PROTOCOLS:
        raise UserError(f"protocol: {name!r} is none of {', '.join(PROTOCOLS)}")
    size = size_name(backbone)
    if size not in BY_SIZE:
        known = ", ".join(BY_SIZE)
        raise UserError(
            f"protocol: no learning rate is known for the backbone {backbone!r}; sizes are {known}"
        )
    row = {"version": 1, **BY_SIZE[size]}
    if version not in (None, row["version"]):
        if (size, version) not in EARLIER:
            raise UserError(f"protocol: {name!r} of {backbone} has no version {version}")
        row = EARLIER[size, version]
    return DetectionProtocol(**{"name": name, **row, **PROTOCOLS[name]})


def with_overrides(base: DetectionProtocol, overrides: Mapping[str, Any]) -> DetectionProtocol:
    """``base`` with some fields changed. Values may be text from a command line.

    Raises:
        UserError: an unknown field, or a value of the wrong type or out of range; names both.
    """
    return replaced(base, overrides, "protocol")


def deviations(run: DetectionProtocol, backbone: str) -> dict[str, list[Any]]:
    """Where a run differs from the protocol that it is named after, in its version: ``{field: [protocol's, run's]}``."""
    return differences(protocol(run.name, backbone, run.version), run)


def n_share(images: int, share: float) -> int:
    """How many images a ``train_share`` of them is, at least one. ``coco.read_split`` chooses which."""
    return max(1, round(share * images))


def other_images(train_images: int | None, val_images: int, train_share: float = 1.0) -> dict[str, list[Any]]:
    """The deviations of a run on other data than COCO's: ``{"train_images": [117266, run's], ...}``.

    Args:
        train_images: how many the run used, of its share; None: not known.
        train_share: the run's own. If it is not the protocol's, it is a deviation already, so it is not
            counted twice.
    """
    expected = n_share(TRAIN_IMAGES, train_share)
    found: dict[str, list[Any]] = {"train_images": [expected, train_images]}
    found["val_images"] = [VAL_IMAGES, val_images]
    return {key: pair for key, pair in found.items() if pair[0] != pair[1]}
