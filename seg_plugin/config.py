"""From the protocol to an mmengine config: every section, in MMSegmentation's words.

The files in ``configs/seg`` and :mod:`seg_plugin.run` both call :func:`segmenter_config`; nothing else writes
a section.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pretrain.backbones.vit import SIZES
from pretrain.errors import UserError
from seg_plugin.datasets import SPLITS, Layout, class_names, dataset_of
from seg_plugin.protocol import SegmentationProtocol, protocol

CHECKPOINT_EVERY = 2_000
LOG_EVERY = 50


def segmenter_config(
    recipe: SegmentationProtocol | str,
    backbone: str,
    *,
    weights: str | Path | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    data_root: str | Path = "data/ade/ADEChallengeData2016",
    classes: Sequence[str] = (),
    layout: Layout | None = None,
    seed: int = 0,
    workers: int = 4,
) -> dict[str, Any]:
    """A whole config: linear decoder on a registry ViT.

    Args:
        recipe: the protocol, or its name.
        backbone: registry name.
        weights: the backbone's checkpoint. It can be set later: ``--cfg-options
            model.backbone.weights=FILE``.
        model_kwargs: further arguments of ``build_backbone``.
        data_root: folder of the protocol's data set.
        classes: their names. Empty: the data set's, or ``class 0``, ... if it has another number of them.
        layout: where its files are; None: as the data set is distributed (:mod:`seg_plugin.datasets`).
        workers: data-loading processes, for each process of the run.
    """
    recipe = protocol(recipe) if isinstance(recipe, str) else recipe
    return {
        "custom_imports": {"imports": ["seg_plugin"]},
        "default_scope": "mmseg",
        "model": _model(recipe, backbone, weights, dict(model_kwargs or {})),
        **_optimization(recipe),
        **_data(
            recipe,
            str(data_root),
            tuple(classes) or class_names(recipe),
            layout or dataset_of(recipe).layout,
            workers,
        ),
        **_runtime(recipe, seed),
    }


def _model(
    p: SegmentationProtocol, backbone: str, weights: str | Path | None, model_kwargs: dict[str, Any]
) -> dict[str, Any]:
    width = {**SIZES.get(backbone.split("_")[1] if "_" in backbone else "", {}), **model_kwargs}.get(
        "embed_dim"
    )
    if width is None:
        raise UserError(f"backbone: the width of {backbone!r} is not known; give embed_dim")
    return {
        "type": "EncoderDecoder",
        "data_preprocessor": {
            "type": "SegDataPreProcessor",
            "mean": list(p.pixel_mean),
            "std": list(p.pixel_std),
            "bgr_to_rgb": True,
            "size": (p.crop_px, p.crop_px),  # smaller training crops are padded
            "pad_val": 0,  # after normalization: the mean color
            "seg_pad_val": p.ignore_index,
        },
        "backbone": {
            "type": "PosfieldViT",
            "name": backbone,
            "weights": None if weights is None else str(weights),
            "drop_path": p.drop_path,
            "freeze": p.freeze_backbone,
            **model_kwargs,
        },
        "decode_head": {  # without convolutions and concatenation it is one 1x1 convolution
            "type": "FCNHead",
            "in_channels": width,
            "channels": width,
            "num_convs": 0,
            "concat_input": False,
            "dropout_ratio": 0.0,
            "num_classes": p.num_classes,
            "align_corners": False,
            "ignore_index": p.ignore_index,
            "loss_decode": {
                "type": "CrossEntropyLoss",
                "use_sigmoid": False,
                "avg_non_ignore": p.avg_non_ignore,
            },
        },
        "train_cfg": {},
        "test_cfg": {
            "mode": "slide",
            "crop_size": (p.slide_crop_px, p.slide_crop_px),
            "stride": (p.slide_stride_px, p.slide_stride_px),
        },
    }


def _optimization(p: SegmentationProtocol) -> dict[str, Any]:
    decay = {
        "type": "PosfieldPolyLR",
        "power": p.poly_power,
        "eta_min_ratio": p.min_lr_factor,
        "begin": p.warmup_iters,
        "end": p.max_iters,
        "by_epoch": False,
    }
    warmup = {
        "type": "LinearLR",
        "start_factor": 1 / max(1, p.warmup_iters),
        "begin": 0,
        "end": p.warmup_iters,
        "by_epoch": False,
    }
    return {
        "optim_wrapper": {
            "type": "AmpOptimWrapper" if p.amp else "OptimWrapper",
            "optimizer": {"type": "AdamW", "lr": p.lr, "betas": p.betas, "weight_decay": p.weight_decay},
            "constructor": "PosfieldOptimConstructor",
            "paramwise_cfg": {"layer_decay": p.layer_decay, "decay_all": p.decay_all},
            "clip_grad": {"max_norm": p.clip_grad} if p.clip_grad else None,
        },
        "param_scheduler": [warmup, decay] if p.warmup_iters else [decay],
        "train_cfg": {"type": "PosfieldTrainLoop", "max_iters": p.max_iters, "val_interval": p.val_every},
        "val_cfg": {"type": "ValLoop"},
        "test_cfg": {"type": "TestLoop"},
    }


def _pipelines(p: SegmentationProtocol) -> dict[str, list[dict[str, Any]]]:
    labels: list[dict[str, Any]] = [
        {"type": "PosfieldLoadLabels", "reduce_zero_label": p.reduce_zero_label},
        {"type": "CheckLabels", "num_classes": p.num_classes, "ignore_index": p.ignore_index},
    ]
    training: list[dict[str, Any]] = [
        {"type": "SeedFromPosition"},
        {"type": "PosfieldLoadImage"},
        *labels,
        {"type": "RandomResize", "scale": p.resize_px, "ratio_range": p.ratio_range, "keep_ratio": True},
        {
            "type": "RandomCrop",
            "crop_size": (p.crop_px, p.crop_px),
            "cat_max_ratio": p.cat_max_ratio,
            "ignore_index": p.ignore_index,
        },
        {"type": "RandomFlip", "prob": p.flip},
        {
            "type": "PosfieldDistortion",
            "brightness_delta": p.brightness,
            "contrast_range": p.contrast,
            "saturation_range": p.saturation,
            "hue_delta": p.hue,
        },
        {"type": "PackSegInputs"},
    ]
    resize: dict[str, Any] = {"type": "Resize", "scale": p.resize_px, "keep_ratio": True}
    pack: dict[str, Any] = {"type": "PackSegInputs"}
    # Labels come after Resize: the metric compares at the mask's own size.
    validation: list[dict[str, Any]] = [{"type": "PosfieldLoadImage"}, resize, *labels, pack]
    # The same, by the names that MMSegmentation's own inference looks for.
    load = {"type": "LoadImageFromFile"}
    load_labels = {"type": "LoadAnnotations", "reduce_zero_label": p.reduce_zero_label}
    test = [load, resize, load_labels, pack]
    return {"training": training, "validation": validation, "test": test, "unlabeled": [load, resize, pack]}


def _data(
    p: SegmentationProtocol, root: str, classes: tuple[str, ...], layout: Layout, workers: int
) -> dict[str, Any]:
    pipelines = _pipelines(p)

    def dataset(split: str, pipeline: list[dict[str, Any]]) -> dict[str, Any]:
        known, index = dataset_of(p), SPLITS.index(split)
        own_names = classes != known.classes  # otherwise the data set's, with its colors
        return {
            "type": "BaseSegDataset" if own_names else known.kind,
            "data_root": root,
            "data_prefix": {"img_path": layout.images[index], "seg_map_path": layout.masks[index]},
            "ann_file": layout.lists[index],
            "img_suffix": layout.image_suffix,
            "seg_map_suffix": layout.mask_suffix,
            "reduce_zero_label": p.reduce_zero_label,
            "ignore_index": p.ignore_index,
            "pipeline": pipeline,
            **({"metainfo": {"classes": classes}} if own_names else {}),
        }

    def loader(split: str, pipeline: list[dict[str, Any]], batch_size: int, sampler: str) -> dict[str, Any]:
        return {
            "batch_size": batch_size,
            "num_workers": workers,
            "persistent_workers": workers > 0,
            "worker_init_fn": {"type": "posfield_worker"},
            "sampler": {"type": sampler, "shuffle": split == "training"},
            "dataset": dataset(split, pipeline),
        }

    evaluator = {"type": "PosfieldIoU", "ignore_index": p.ignore_index, "iou_metrics": ["mIoU"]}
    return {
        "train_dataloader": loader(
            "training", pipelines["training"], _batch_per_process(p.batch_size), "PosfieldSampler"
        ),
        "val_dataloader": loader("validation", pipelines["validation"], 1, "DefaultSampler"),
        "test_dataloader": loader("validation", pipelines["test"], 1, "DefaultSampler"),
        "test_pipeline": pipelines["unlabeled"],  # of images without labels
        "val_evaluator": evaluator,
        "test_evaluator": dict(evaluator),
    }


def _batch_per_process(batch_size: int) -> int:
    if batch_size % processes():
        raise UserError(f"batch_size={batch_size} does not divide among {processes()} processes")
    return batch_size // processes()


def processes() -> int:
    """How many processes share the batch, by torchrun or Slurm. mmengine's batch size is that of one
    process."""
    return int(os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_NTASKS") or 1)


def _runtime(p: SegmentationProtocol, seed: int) -> dict[str, Any]:
    checkpoint_interval = min(p.val_every, CHECKPOINT_EVERY)
    log_interval = min(LOG_EVERY, max(1, p.max_iters // 20))
    return {
        "default_hooks": {
            "timer": {"type": "IterTimerHook"},
            "logger": {"type": "LoggerHook", "interval": log_interval, "log_metric_by_epoch": False},
            "param_scheduler": {"type": "ParamSchedulerHook"},
            # Two, because mmengine deletes the oldest before it has written the next.
            "checkpoint": {
                "type": "CheckpointHook",
                "by_epoch": False,
                "interval": checkpoint_interval,
                "max_keep_ckpts": 2,
            },
            "sampler_seed": {"type": "DistSamplerSeedHook"},
            "visualization": {"type": "SegVisualizationHook"},
        },
        # Writes result.json, metrics.jsonl, figures and the saved config (seg_plugin/hooks.py).
        "custom_hooks": [{"type": "PosfieldRunHook", "protocol": p.model_dump(), "interval": log_interval}],
        "env_cfg": {
            "cudnn_benchmark": False,
            "mp_cfg": {"mp_start_method": "fork", "opencv_num_threads": 0},
            "dist_cfg": {"backend": "nccl"},
        },
        "randomness": {
            "seed": seed,
            "deterministic": False,
        },  # torch has no deterministic 2-D cross-entropy on CUDA
        "visualizer": {"type": "SegLocalVisualizer", "vis_backends": [{"type": "LocalVisBackend"}]},
        "log_processor": {"by_epoch": False},
        "log_level": "INFO",
        "load_from": None,
        "resume": False,
    }
