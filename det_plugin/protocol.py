"""The COCO fine-tuning protocol: every number of it, once. Both engines read this file and no other.

Mask R-CNN on a plain ViT: ViTDet (Li et al., 2022) without windows and relative positions. Sources: the paper's appendix B.2 for
schedule, batch and learning rate; Detectron2's ViTDet configs for all the rest; "ours" where neither says.
"""

from dataclasses import dataclass, replace
from typing import Any

from pretrain import overrides as settings
from pretrain.errors import UserError


@dataclass(frozen=True)
class DetectionProtocol:
    """One detection fine-tuning recipe. Lengths in pixels (``_px``), durations in iterations (``_it``)."""

    name: str = "coco-12ep"
    version: int = 1

    # Schedule: B.2. 22,128 = 12 * ceil(118,000 / 64).
    iterations_it: int = 22_128
    milestones_it: tuple[int, ...] = (19_667, 21_306)
    lr_gamma: float = 0.1
    warmup_it: int = 250  # Detectron2
    warmup_factor: float = 0.001  # Detectron2
    batch_size: int = 64  # B.2
    eval_period_it: int = 5_000  # Detectron2

    # Optimiser: lr from B.2 (3e-4 ViT-B, 1e-4 ViT-S); the rest is ViTDet's AdamW.
    lr: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.1  # 0 for norms and positions
    layer_decay: float = 0.7  # ours: B.2 does not say whether its lr goes with ViTDet's 0.7
    drop_path: float = 0.1
    clip_grad: float = 0.0  # 0: no clipping
    amp: bool = True
    amp_dtype: str = "float16"  # Detectron2's AMPTrainer, with loss scaling; or "bfloat16", without

    # Input: large-scale jitter in training; test with the long edge at the same size; pad to a square, bottom right.
    image_size_px: int = 1024
    jitter_scale: tuple[float, float] = (0.1, 2.0)
    flip: float = 0.5
    train_share: float = 1.0  # of the training images; the same ones in every run
    pixel_mean: tuple[float, float, float] = (123.675, 116.28, 103.53)  # RGB
    pixel_std: tuple[float, float, float] = (58.395, 57.12, 57.375)

    # Backbone: [CLS] and registers stay in the sequence, as pre-trained (ours; Detectron2's ViT has none).
    keep_special_tokens: bool = True
    final_norm: bool = True  # ours: as pre-trained (Detectron2's ViT has none)
    window_size: int = 0  # patches a side; 0: every block sees the whole image (B.2). ViTDet: 14
    global_blocks: int = 4  # where there are windows: blocks without, the last of equal groups (ViTDet)
    freeze_backbone: bool = False  # only pyramid and heads learn

    # Simple feature pyramid
    pyramid_scales: tuple[float, ...] = (4.0, 2.0, 1.0, 0.5)  # plus one max-pooled level
    channels: int = 256
    norm: str = "LN"

    # Region proposals
    anchor_sizes_px: tuple[int, ...] = (32, 64, 128, 256, 512)
    anchor_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    rpn_convs: int = 2
    rpn_thresholds: tuple[float, float] = (0.3, 0.7)
    rpn_batch_per_image: int = 256
    rpn_positive_fraction: float = 0.5
    rpn_pre_nms: tuple[int, int] = (2000, 1000)  # training, test
    rpn_post_nms: tuple[int, int] = (1000, 1000)
    rpn_nms: float = 0.7

    # Heads
    num_classes: int = 80
    roi_threshold: float = 0.5
    roi_batch_per_image: int = 512
    roi_positive_fraction: float = 0.25
    box_pool: int = 7
    box_convs: int = 4
    box_fc: int = 1024
    mask_pool: int = 14
    mask_convs: int = 4
    box_weights: tuple[float, float, float, float] = (10.0, 10.0, 5.0, 5.0)
    score_threshold: float = 0.05
    nms: float = 0.5
    detections_per_image: int = 100


# Images of COCO train2017 with an object that is no crowd, and of val2017: a run on others does not follow the protocol.
TRAIN_IMAGES, VAL_IMAGES = 117_266, 5_000

# lr of B.2 by width of the backbone; other sizes are ours (linear in width between the two).
LR = {"tiny": 1e-4, "small": 1e-4, "base": 3e-4, "large": 3e-4}

# 12 epochs of a tenth of the images: 2,220 = 12 * ceil(11,800 / 64), steps at the same shares of it (8/9, 26/27) as in 12 epochs
# of all.
_TENTH: dict[str, Any] = dict(iterations_it=2_220, milestones_it=(1_973, 2_138), train_share=0.1)
PROTOCOLS: dict[str, dict[str, Any]] = {
    "coco-12ep": dict(iterations_it=22_128, milestones_it=(19_667, 21_306)),  # B.2
    "coco-50ep": dict(iterations_it=92_187, milestones_it=(81_944, 88_773)),  # ours: half of 100 epochs; Table 2 gives none
    "coco-100ep": dict(iterations_it=184_375, milestones_it=(163_889, 177_546)),  # Detectron2
    # Cheap ones, to compare backbones with each other and with nothing published (ours). Warm-up, evaluation and learning rate are
    # those of the full protocol; the only evaluation is that at the end. "frozen" asks what the features hold as they are: pyramid
    # and heads learn, the ViT runs as in evaluation.
    "coco10pct-12ep": _TENTH,
    "coco10pct-frozen-12ep": dict(**_TENTH, freeze_backbone=True, drop_path=0.0),
}


def protocol(name: str, backbone: str) -> DetectionProtocol:
    """The named protocol with the learning rate of the backbone's size.

    Args:
        name: a key of :data:`PROTOCOLS`.
        backbone: a registry name, ``vit_{tiny,small,base,large}_...``.
    """
    if name not in PROTOCOLS:
        raise UserError(f"protocol: {name!r} is none of {', '.join(PROTOCOLS)}")
    size = backbone.split("_")[1] if "_" in backbone else backbone
    if size not in LR:
        raise UserError(f"protocol: no learning rate is known for the backbone {backbone!r}")
    return replace(DetectionProtocol(name=name, lr=LR[size]), **PROTOCOLS[name])  # type: ignore[arg-type]


def with_overrides(base: DetectionProtocol, overrides: dict[str, Any]) -> DetectionProtocol:
    """``base`` with some fields changed; values may be strings from a command line.

    Raises:
        UserError: an unknown field, or a value of the wrong type, by name.
    """
    return settings.with_overrides(base, overrides)


def deviations(run: DetectionProtocol, backbone: str) -> dict[str, list[Any]]:
    """Fields in which a run differs from the protocol that it is named after: ``{field: [protocol's, run's]}``."""
    return settings.differences(protocol(run.name, backbone), run)


def n_share(images: int, share: float) -> int:
    """How many of so many images a ``train_share`` is, at least one; ``coco.read_split`` says which."""
    return max(1, round(share * images))


def other_images(train_images: int | None, val_images: int, train_share: float = 1.0) -> dict[str, list[Any]]:
    """The deviations of a run on other data than COCO's: ``{"train_images": [117266, run's], ...}``.

    Args:
        train_images: number that the run used, of its share; none: not known.
        train_share: the run's own. One that is not its protocol's is a deviation of that name already, so it is not counted twice.
    """
    expected = n_share(TRAIN_IMAGES, train_share)
    found: dict[str, list[Any]] = {"train_images": [expected, train_images], "val_images": [VAL_IMAGES, val_images]}
    return {key: pair for key, pair in found.items() if pair[0] != pair[1]}


SCALES = (4.0, 2.0, 1.0, 0.5)  # that a pyramid can be made of
COARSEST_PX = 32  # stride of its last map before the max-pooled one

# Fields that must be at least 1, not negative, numbers above 0; shares that lie in 0 ... 1.
POSITIVE = (
    *("iterations_it", "batch_size", "eval_period_it", "channels", "rpn_convs", "rpn_batch_per_image"),
    *("num_classes", "roi_batch_per_image", "box_pool", "box_fc", "mask_pool", "detections_per_image", "global_blocks"),
)
NOT_NEGATIVE = ("lr", "lr_gamma", "weight_decay", "clip_grad", "box_convs", "mask_convs", "window_size")
ABOVE_ZERO = ("anchor_ratios", "rpn_pre_nms", "rpn_post_nms", "box_weights", "pixel_std")
AMP_DTYPES = ("float16", "bfloat16")
SHARES = (
    *("flip", "drop_path", "layer_decay", "rpn_positive_fraction", "roi_positive_fraction"),
    *("rpn_nms", "nms", "score_threshold", "warmup_factor"),
)


def check(run: DetectionProtocol) -> None:
    """Refuse numbers that no run can follow.

    Raises:
        UserError: names the field, its value and what it should be.
    """
    demands = {key: (getattr(run, key) >= 1, "at least 1") for key in POSITIVE}
    demands |= {key: (0 <= getattr(run, key) <= 1, "within 0 and 1") for key in SHARES}
    demands |= {key: (getattr(run, key) >= 0, "at least 0") for key in NOT_NEGATIVE}
    demands |= {key: (min(getattr(run, key), default=0) > 0, "numbers above 0") for key in ABOVE_ZERO}
    demands |= {key: (0 < getattr(run, key) <= 1, "above 0 and at most 1") for key in ("train_share", "roi_threshold")}
    steps, (low, high) = run.milestones_it, run.jitter_scale
    rising = list(steps) == sorted(set(steps)) and all(0 < step <= run.iterations_it for step in steps)
    demands["milestones_it"] = rising, f"rising and within iterations_it={run.iterations_it}"
    demands["warmup_it"] = 0 <= run.warmup_it <= run.iterations_it, f"within iterations_it={run.iterations_it}"
    demands["jitter_scale"] = 0 < low <= high, "two rising numbers above 0"
    demands["image_size_px"] = run.image_size_px >= COARSEST_PX, f"at least {COARSEST_PX}"
    demands["pyramid_scales"] = run.pyramid_scales in [SCALES[k:] for k in range(len(SCALES))], f"{SCALES} or the end of it"
    demands["anchor_sizes_px"] = (
        len(run.anchor_sizes_px) == len(run.pyramid_scales) + 1 and min(run.anchor_sizes_px) > 0,
        f"numbers above 0, one more than pyramid_scales={run.pyramid_scales}",
    )
    demands["betas"] = all(0 <= beta < 1 for beta in run.betas), "from 0 to below 1"
    demands["amp_dtype"] = run.amp_dtype in AMP_DTYPES, f"one of {', '.join(AMP_DTYPES)}"
    low, high = run.rpn_thresholds
    demands["rpn_thresholds"] = 0 < low <= high <= 1, "two rising numbers within 0 and 1"
    for key, (fits, what) in demands.items():
        if not fits:
            raise UserError(f"protocol: {key}={getattr(run, key)!r} must be {what}")
