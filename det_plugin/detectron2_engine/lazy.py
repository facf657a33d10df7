"""The detection protocol as a Detectron2 LazyConfig, for the stock launchers and for ours.

Every number comes from :class:`det_plugin.protocol.DetectionProtocol`. ``tests/test_detectron2.py`` compares
the result with Detectron2's own ViTDet configuration, key by key.
"""

from collections.abc import Mapping
from dataclasses import asdict
from math import log2
from pathlib import Path
from typing import Any

import detectron2.data.transforms as T
from detectron2.config import LazyCall as L
from detectron2.data import build_detection_test_loader
from detectron2.layers import ShapeSpec
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.proposal_generator import RPN, StandardRPNHead
from detectron2.modeling.roi_heads import (
    FastRCNNConvFCHead,
    FastRCNNOutputLayers,
    MaskRCNNConvUpsampleHead,
    StandardROIHeads,
)
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import MultiStepParamScheduler
from omegaconf import DictConfig

from det_plugin.detectron2_engine.catalog import CocoMapper, coco_dicts
from det_plugin.detectron2_engine.loader import TrainLoader
from det_plugin.detectron2_engine.model import (
    FEATURE,
    BFloat16RCNN,
    MixedROIHeads,
    PaddedPyramid,
    RegistryBackbone,
)
from det_plugin.detectron2_engine.optim import NO_DECAY, adamw, parameter_groups
from det_plugin.features import FeatureOptions
from det_plugin.protocol import DetectionProtocol, deviations, protocol
from pretrain.build import PROTOCOL_PATCH_PX
from pretrain.errors import UserError

EVALUATOR = "det_plugin.detectron2_engine.evaluate.ResultEvaluator"  # by name: it imports this file
LOG_EVERY = 20  # Detectron2
NORMS = ("LN", "GN")  # of pyramid and heads: these do not depend on the other images of a micro-batch


def config(
    protocol: DetectionProtocol,
    backbone: str,
    weights: str | Path | None = None,
    *,
    data: str | Path | None = None,
    output: str | Path = "output",
    model_kwargs: Mapping[str, Any] | None = None,
    checkpointing: bool = False,
    compile: bool = False,
    seed: int = 0,
    device: str = "cuda",
    workers: int = 4,
) -> DictConfig:
    """``model``, ``train``, ``dataloader``, ``optimizer`` and ``lr_multiplier`` of one fine-tuning.

    Args:
        backbone: registry name.
        weights: checkpoint of the backbone (``model.backbone.net.weights``).
        data: ``dataloader.root``, of any layout; None: ``$DETECTRON2_DATASETS/coco``.
        output: run folder (``train.output_dir``).
        model_kwargs: further arguments of ``build_backbone``.
        checkpointing, compile: as in :class:`det_plugin.features.FeatureOptions`.
        device: ``cuda``; ``cpu`` needs a protocol with ``amp=false``.

    Raises:
        UserError: the ViT has no such argument, or Detectron2's heads have no such norm.
    """
    options = FeatureOptions.of(protocol, checkpointing, compile)
    model_kwargs = {"drop_path": protocol.drop_path, **(model_kwargs or {})}
    if clash := sorted(model_kwargs.keys() & asdict(options).keys()):
        told = "it is a field of the protocol, or an option of the run"
        raise UserError(f"backbone: {clash[0]} is no argument of the ViT; {told}")
    file = None if weights is None else str(weights)
    net = L(RegistryBackbone)(name=backbone, weights=file, **asdict(options), **model_kwargs)
    return DictConfig(
        {
            "model": _model(protocol, net),
            "train": _train(protocol, str(output), seed, device),
            "dataloader": _dataloader(protocol, backbone, data, workers),
            "optimizer": _optimizer(protocol),
            "lr_multiplier": _lr_multiplier(protocol),
        },
        flags={"allow_objects": True},
    )


def parts(name: str, backbone: str) -> tuple[DictConfig, ...]:
    """``model``, ``train``, ``dataloader``, ``optimizer``, ``lr_multiplier`` for the stock launcher.

    Args:
        name, backbone: as in :func:`det_plugin.protocol.protocol`.
    """
    return tuple(config(protocol(name, backbone), backbone).values())


def _model(p: DetectionProtocol, net: DictConfig) -> DictConfig:
    if p.norm not in NORMS or (p.norm == "GN" and p.channels % 32):  # Detectron2's has 32 groups
        told = f"GN needs channels={p.channels} to be a multiple of 32"
        raise UserError(f"protocol: norm={p.norm!r} must be one of {', '.join(NORMS)}; {told}")
    strides = [int(PROTOCOL_PATCH_PX / scale) for scale in p.pyramid_scales]
    levels = [f"p{int(log2(stride))}" for stride in strides]
    top = int(log2(strides[-1])) + 1  # the max-pooled level
    detector = BFloat16RCNN if p.amp and p.amp_dtype == "bfloat16" else GeneralizedRCNN
    return L(detector)(
        backbone=L(PaddedPyramid)(
            net=net,
            in_feature=FEATURE,
            out_channels=p.channels,
            scale_factors=p.pyramid_scales,
            top_block=L(LastLevelMaxPool)(),
            norm=p.norm,
            square_pad=p.image_size_px,
        ),
        proposal_generator=_proposals(p, [*levels, f"p{top}"], [*strides, 2**top]),
        roi_heads=_heads(p, levels, strides),
        pixel_mean=p.pixel_mean,
        pixel_std=p.pixel_std,
        input_format="RGB",
    )


def _proposals(p: DetectionProtocol, levels: list[str], strides: list[int]) -> DictConfig:
    return L(RPN)(
        in_features=levels,
        head=L(StandardRPNHead)(
            in_channels=p.channels, num_anchors=len(p.anchor_ratios), conv_dims=[-1] * p.rpn_convs
        ),
        anchor_generator=L(DefaultAnchorGenerator)(
            sizes=[[size] for size in p.anchor_sizes_px],
            aspect_ratios=p.anchor_ratios,
            strides=strides,
            offset=0.0,
        ),
        anchor_matcher=L(Matcher)(
            thresholds=p.rpn_thresholds, labels=[0, -1, 1], allow_low_quality_matches=True
        ),
        box2box_transform=L(Box2BoxTransform)(weights=[1.0, 1.0, 1.0, 1.0]),
        batch_size_per_image=p.rpn_batch_per_image,
        positive_fraction=p.rpn_positive_fraction,
        pre_nms_topk=p.rpn_pre_nms,
        post_nms_topk=p.rpn_post_nms,
        nms_thresh=p.rpn_nms,
    )


def _heads(p: DetectionProtocol, levels: list[str], strides: list[int]) -> DictConfig:
    pooler = dict(scales=[1 / stride for stride in strides], sampling_ratio=0, pooler_type="ROIAlignV2")
    heads = L(MixedROIHeads if p.masks == "on" else StandardROIHeads)(
        num_classes=p.num_classes,
        batch_size_per_image=p.roi_batch_per_image,
        positive_fraction=p.roi_positive_fraction,
        proposal_matcher=L(Matcher)(
            thresholds=[p.roi_threshold], labels=[0, 1], allow_low_quality_matches=False
        ),
        box_in_features=levels,
        box_pooler=L(ROIPooler)(output_size=p.box_pool, **pooler),
        box_head=L(FastRCNNConvFCHead)(
            input_shape=L(ShapeSpec)(channels=p.channels, height=p.box_pool, width=p.box_pool),
            conv_dims=[p.channels] * p.box_convs,
            fc_dims=[p.box_fc],
            conv_norm=p.norm,
        ),
        box_predictor=L(FastRCNNOutputLayers)(
            input_shape=L(ShapeSpec)(channels=p.box_fc),
            box2box_transform=L(Box2BoxTransform)(weights=p.box_weights),
            num_classes="${..num_classes}",
            test_score_thresh=p.score_threshold,
            test_nms_thresh=p.nms,
            test_topk_per_image=p.detections_per_image,
        ),
    )
    if p.has_masks:
        heads.mask_in_features = levels
        heads.mask_pooler = L(ROIPooler)(output_size=p.mask_pool, **pooler)
        heads.mask_head = L(MaskRCNNConvUpsampleHead)(
            input_shape=L(ShapeSpec)(channels=p.channels, height=p.mask_pool, width=p.mask_pool),
            num_classes="${..num_classes}",
            conv_dims=[p.channels] * (p.mask_convs + 1),  # the last is the deconvolution's
            conv_norm=p.norm,
        )
    return heads


def _train(p: DetectionProtocol, output: str, seed: int, device: str) -> DictConfig:
    """The section that Detectron2's ``tools/lazyconfig_train_net.py`` reads."""
    # Its AMPTrainer knows no other type; for bfloat16 the model sets autocast
    float16 = p.amp and p.amp_dtype == "float16"
    ddp = dict(broadcast_buffers=False, find_unused_parameters=False, fp16_compression=float16)
    return DictConfig(
        dict(
            output_dir=output,
            init_checkpoint="",  # the backbone has read its weights already
            max_iter=p.max_iters,
            amp=dict(enabled=float16),
            ddp={**ddp, "device_ids": None} if device == "cpu" else ddp,
            checkpointer=dict(period=p.eval_every, max_to_keep=3),
            eval_period=p.eval_every,
            log_period=min(LOG_EVERY, max(1, p.max_iters // 10)),
            device=device,
            seed=seed,
        )
    )


def _dataloader(p: DetectionProtocol, backbone: str, root: str | Path | None, workers: int) -> DictConfig:
    """Large-scale jitter in training, one size in testing. Data are read when the loaders are built."""
    size = p.image_size_px

    def dataset(split: str, **how: Any) -> DictConfig:
        return L(coco_dicts)(
            root="${...root}", split=split, num_classes="${model.roi_heads.num_classes}", **how, **p.reading
        )

    jitter = [
        L(T.RandomFlip)(prob=p.flip, horizontal=True),
        L(T.ResizeScale)(
            min_scale=p.jitter_scale[0], max_scale=p.jitter_scale[1], target_height=size, target_width=size
        ),
        L(T.FixedSizeCrop)(crop_size=[size, size], pad=False),
    ]
    mapper = L(CocoMapper)(
        is_train=True,
        augmentations=jitter,
        image_format="RGB",
        use_instance_mask=p.has_masks,
        recompute_boxes=p.has_masks,
    )
    resize = [L(T.ResizeShortestEdge)(short_edge_length=size, max_size=size)]
    return DictConfig(
        dict(
            root=None if root is None else str(root),
            train=L(TrainLoader)(
                dataset=dataset("train", filter_empty=True, share=p.train_share),
                mapper=mapper,
                total_batch_size=p.batch_size,
                num_workers=workers,
                seed="${train.seed}",
            ),
            test=L(build_detection_test_loader)(
                dataset=dataset("val", filter_empty=False),
                mapper=L(CocoMapper)(is_train=False, augmentations=resize, image_format="RGB"),
                num_workers=workers,
            ),
            evaluator=L(EVALUATOR)(
                root="${..root}",
                output_dir="${train.output_dir}",
                protocol=p.name,
                overrides={key: run for key, (_, run) in deviations(p, backbone).items()},
                accumulate=1,
                # What older configs do not say is 1
                **({} if p.version == 1 else {"version": p.version}),
            ),
        ),
        flags={"allow_objects": True},
    )


def _optimizer(p: DetectionProtocol) -> DictConfig:
    return L(adamw)(
        params=L(parameter_groups)(
            base_lr="${..lr}",
            layer_decay=p.layer_decay,
            weight_decay_norm=0.0,
            overrides={name: {"weight_decay": 0.0} for name in NO_DECAY},
        ),
        lr=p.lr,
        betas=p.betas,
        weight_decay=p.weight_decay,
        clip_grad=p.clip_grad,
    )


def _lr_multiplier(p: DetectionProtocol) -> DictConfig:
    # A drop at the end changes no step, and fvcore refuses it.
    milestones = tuple(step for step in p.milestones if step < p.max_iters)
    return L(WarmupParamScheduler)(
        scheduler=L(MultiStepParamScheduler)(
            values=[p.lr_gamma**k for k in range(len(milestones) + 1)],
            milestones=milestones,
            num_updates=p.max_iters,
        ),
        warmup_length=p.warmup_iters / p.max_iters,
        warmup_factor=p.warmup_factor,
    )
