"""From the protocol to an mmengine config, in MMSegmentation's words, and back: its deviations from the protocol,
and what makes two runs the same.

The files in ``configs/seg`` and :mod:`seg_plugin.run` both call :func:`segmenter_config`; nothing else writes
a section. A config can change after it was made (``--cfg-options``, ``--amp``), so all that is said of a run is read
from the config that runs.
"""

import ast
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mmengine.config import Config

from pretrain.backbones.vit import SIZES, size_name
from pretrain.build import network_kwargs
from pretrain.data.datasets import LabelSet, MaskRule
from pretrain.data.images import n_shared
from pretrain.errors import TRUST, UserError
from pretrain.files import read_plain
from pretrain.results.provenance import config_hash
from pretrain.settings import MAX_YAML_BYTES, compared, replaced, without_content
from seg_plugin import protocol as protocols
from seg_plugin.data import PARTS, dataset_of, label_set, section
from seg_plugin.protocol import ADDED, OWN, SegmentationProtocol, protocol, with_overrides


def segmenter_config(
    recipe: SegmentationProtocol | str,
    backbone: str,
    *,
    weights: str | Path | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    data_root: str | Path = "data/ade/ADEChallengeData2016",
    masks: MaskRule | None = None,
    seed: int = 0,
    workers: int = 4,
) -> dict[str, Any]:
    """A whole config: linear decoder on a registry ViT.

    Args:
        recipe: the protocol, or its name.
        backbone: registry name.
        weights: the backbone's checkpoint; or later: ``--cfg-options model.backbone.weights=FILE``.
        model_kwargs: further arguments of ``build_backbone``.
        data_root: folder of the protocol's data set.
        masks: how masks of your own data are read.
        workers: data-loading processes, for each process of the run.
    """
    recipe = protocol(recipe) if isinstance(recipe, str) else recipe
    return {
        "custom_imports": {"imports": ["seg_plugin"]},
        "default_scope": "mmseg",
        "model": _model(recipe, backbone, weights, dict(model_kwargs or {})),
        **_optimization(recipe),
        **_data(recipe, data_root, masks, workers),
        **_runtime(recipe, seed),
    }


def _model(
    p: SegmentationProtocol, backbone: str, weights: str | Path | None, model_kwargs: dict[str, Any]
) -> dict[str, Any]:
    size = SIZES.get(size_name(backbone) or "", {})
    width = {**size, **model_kwargs}.get("embed_dim")
    if width is None:
        raise UserError(f"backbone: the width of {backbone!r} is not known; give embed_dim")
    return dict(
        type="EncoderDecoder",
        data_preprocessor=dict(  # smaller training crops are padded, after normalization: with the mean color
            type="SegDataPreProcessor", mean=list(p.pixel_mean), std=list(p.pixel_std), bgr_to_rgb=True,
            size=(p.crop_px, p.crop_px), pad_val=0, seg_pad_val=p.ignore_index,
        ),
        backbone=dict(
            type="PosfieldViT", name=backbone, weights=None if weights is None else str(weights),
            drop_path=p.drop_path, freeze=p.freeze_backbone,
        ) | model_kwargs,
        decode_head=dict(  # without convolutions and concatenation it is one 1x1 convolution
            type="FCNHead", in_channels=width, channels=width, num_convs=0, concat_input=False, dropout_ratio=0.0,
            num_classes=p.num_classes, align_corners=False, ignore_index=p.ignore_index,
            loss_decode=dict(type="CrossEntropyLoss", use_sigmoid=False, avg_non_ignore=p.avg_non_ignore),
        ),
        train_cfg={},
        test_cfg=dict(mode="slide", crop_size=(p.slide_crop_px,) * 2, stride=(p.slide_stride_px,) * 2),
    )  # fmt: skip


def _optimization(p: SegmentationProtocol) -> dict[str, Any]:
    start, end = p.warmup_iters, p.max_iters
    ratios = dict(power=p.poly_power, eta_min_ratio=p.min_lr_factor)
    decay = dict(type="PosfieldPolyLR", **ratios, begin=start, end=end, by_epoch=False)
    warmup = dict(type="LinearLR", start_factor=1 / max(1, start), begin=0, end=start, by_epoch=False)
    return dict(
        optim_wrapper=dict(
            type="AmpOptimWrapper" if p.amp else "OptimWrapper",
            optimizer=dict(type="AdamW", lr=p.lr, betas=p.betas, weight_decay=p.weight_decay),
            constructor="PosfieldOptimConstructor",
            paramwise_cfg=dict(layer_decay=p.layer_decay, decay_all=p.decay_all),
            clip_grad=dict(max_norm=p.clip_grad) if p.clip_grad else None,
        ),
        param_scheduler=[warmup, decay] if start else [decay],
        train_cfg=dict(type="PosfieldTrainLoop", max_iters=end, val_interval=p.val_every),
        val_cfg=dict(type="ValLoop"),
        test_cfg=dict(type="TestLoop"),
    )


def _pipelines(p: SegmentationProtocol) -> dict[str, list[dict[str, Any]]]:
    image, labels, pack = (
        {"type": name} for name in ("PosfieldLoadImage", "PosfieldLoadLabels", "PackSegInputs")
    )
    ratios, crop = dict(cat_max_ratio=p.cat_max_ratio, ignore_index=p.ignore_index), (p.crop_px, p.crop_px)
    training: list[dict[str, Any]] = [
        dict(type="SeedFromPosition"), image, labels,
        dict(type="RandomResize", scale=p.resize_px, ratio_range=p.ratio_range, keep_ratio=True),
        dict(type="RandomCrop", crop_size=crop, **ratios),
        dict(type="RandomFlip", prob=p.flip),
        dict(type="PosfieldDistortion", brightness_delta=p.brightness, contrast_range=p.contrast,
             saturation_range=p.saturation, hue_delta=p.hue),
        pack,
    ]  # fmt: skip
    resize = dict(type="Resize", scale=p.resize_px, keep_ratio=True)
    load = {"type": "LoadImageFromFile"}  # the name that MMSegmentation's own inference looks for
    # Labels come after Resize: the metric compares at the mask's own size.
    parts: dict[str, Any] = {"training": training, "validation": [image, resize, labels, pack]}
    return {**parts, "test": [load, resize, labels, pack], "unlabeled": [load, resize, pack]}


def _data(p: SegmentationProtocol, root: str | Path, masks: MaskRule | None, workers: int) -> dict[str, Any]:
    pipelines = _pipelines(p)
    if p.batch_size % processes():
        raise UserError(f"batch_size={p.batch_size} does not divide among {processes()} processes")

    def loader(split: str, pipeline: str, batch_size: int, sampler: str) -> dict[str, Any]:
        return dict(
            batch_size=batch_size, num_workers=workers, persistent_workers=workers > 0,
            worker_init_fn=dict(type="posfield_worker"), sampler=dict(type=sampler, shuffle=split == "training"),
            dataset=section(p, root, PARTS[split], pipelines[pipeline], masks),
        )  # fmt: skip

    evaluator = dict(type="PosfieldIoU", ignore_index=p.ignore_index, iou_metrics=["mIoU"])
    return dict(
        train_dataloader=loader("training", "training", p.batch_size // processes(), "PosfieldSampler"),
        val_dataloader=loader("validation", "validation", 1, "DefaultSampler"),
        test_dataloader=loader("validation", "test", 1, "DefaultSampler"),
        test_pipeline=pipelines["unlabeled"],
        val_evaluator=evaluator,
        test_evaluator=evaluator,
    )


def processes() -> int:
    """How many processes share the batch, by torchrun or Slurm; mmengine's batch size is that of one."""
    return int(os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_NTASKS") or 1)


def _runtime(p: SegmentationProtocol, seed: int) -> dict[str, Any]:
    every, log_every = min(p.val_every, 2_000), min(50, max(1, p.max_iters // 20))
    # of your own data the best weights stay, too
    best = dict(save_best="mIoU", rule="greater") if p.name == OWN and p.val_every < p.max_iters else {}
    hooks = dict(
        timer=dict(type="IterTimerHook"),
        logger=dict(type="LoggerHook", interval=log_every, log_metric_by_epoch=False),
        param_scheduler=dict(type="ParamSchedulerHook"),
        # Two, because mmengine deletes the oldest before it has written the next.
        checkpoint=dict(type="CheckpointHook", by_epoch=False, interval=every, max_keep_ckpts=2, **best),
        sampler_seed=dict(type="DistSamplerSeedHook"),
        visualization=dict(type="SegVisualizationHook"),
    )
    mp_cfg = dict(mp_start_method="fork", opencv_num_threads=0)
    fields = {key: value for key, value in p.model_dump().items() if key not in ADDED or value}
    stop = [dict(type="PatienceHook", patience=p.patience)] if p.patience else []
    return dict(
        default_hooks=hooks,
        custom_hooks=[dict(type="PosfieldRunHook", protocol=fields, interval=log_every), *stop],
        env_cfg=dict(cudnn_benchmark=False, mp_cfg=mp_cfg, dist_cfg=dict(backend="nccl")),
        # torch has no deterministic 2-D cross-entropy on CUDA
        randomness=dict(seed=seed, deterministic=False),
        visualizer=dict(type="SegLocalVisualizer", vis_backends=[dict(type="LocalVisBackend")]),
        log_processor=dict(by_epoch=False),
        log_level="INFO",
        load_from=None,
        resume=False,
    )


# --- a saved config -----------------------------------------------------------------------------------------


def read_saved(path: Path, trust: bool = False) -> Config:
    """The config that a run left. It is read as data, without running it: names with plain values.

    What is built of it (the network, the pipelines) may hold other numbers than ours, but no other words: a
    word can name any function or file.

    Args:
        trust: run the file as mmengine does, whatever it holds.

    Raises:
        UserError: it is no data; it holds other words; names the file and the key.
    """
    if trust:
        return Config.fromfile(path)
    try:
        body = ast.parse(read_plain(path, MAX_YAML_BYTES).decode()).body
        values = {_assigned(line): _literal(line.value) for line in body if isinstance(line, ast.Assign)}
        if len(values) != len(body):
            raise ValueError("it holds more than names with values")
        _check_words(values)
        return Config({**values, "default_scope": "mmseg"})
    except UserError as error:
        raise UserError(f"run: {path}: {error}; {TRUST}") from error
    except (
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        SyntaxError,
        RecursionError,
        MemoryError,
    ) as error:
        raise UserError(f"run: {path} is no plain data ({without_content(error)}); {TRUST}") from error


def _assigned(line: ast.Assign) -> str:
    if len(line.targets) != 1 or not isinstance(line.targets[0], ast.Name):
        raise ValueError(f"line {line.lineno} is no name with a value")
    return line.targets[0].id


def _literal(node: ast.expr) -> Any:
    """A literal; ``dict(key=value)`` is one, too."""
    if isinstance(node, ast.Call):
        if not isinstance(node.func, ast.Name) or node.func.id != "dict" or node.args:
            raise ValueError(f"line {node.lineno} calls a function")
        return {str(word.arg): _literal(word.value) for word in node.keywords}
    if isinstance(node, ast.Dict):
        return {ast.literal_eval(key): _literal(v) for key, v in zip(node.keys, node.values) if key}
    if isinstance(node, ast.List | ast.Tuple):
        items = [_literal(item) for item in node.elts]
        return items if isinstance(node, ast.List) else tuple(items)
    return ast.literal_eval(node)


def _check_words(values: dict[str, Any]) -> None:
    """What :func:`seg_plugin.predict.load_segmenter` and ``dataset_of_run`` build holds our words alone."""
    recipe = protocol("ade20k-160k")
    known = {"LoadAnnotations", "CheckLabels", "reduce_zero_label"}  # of earlier versions
    for made in (_model(recipe, "vit_base_patch16", None, {}), _pipelines(recipe)):
        known |= {word for _, word in _words(made, "")}
    model = dict(values["model"])
    backbone = dict(model.pop("backbone"))
    parts = {"model": model, "test_pipeline": values["test_pipeline"]}
    for name in ("train_dataloader", "val_dataloader"):
        parts[f"{name}.dataset.pipeline"] = values[name]["dataset"]["pipeline"]
    for part, value in parts.items():
        for key, word in _words(value, part):
            if word not in known:
                raise UserError(f"{key} holds {word!r}, which no run of ours does")
    odd = [key for key in backbone if key.startswith("_") or key == "init_cfg"]
    if odd or backbone.get("type") != "PosfieldViT" or any(isinstance(v, Mapping) for v in backbone.values()):
        key = f"model.backbone.{(odd or ['type'])[0]}"
        raise UserError(f"{key} is not as a run of ours has it")


def _words(value: Any, key: str) -> Iterator[tuple[str, str]]:
    """(dotted key, word) of all keys and texts."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield f"{key}.{name}", name
            yield from _words(item, f"{key}.{name}")
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            yield from _words(item, f"{key}[{number}]")
    elif isinstance(value, str):
        yield key, value


# --- what a config says -------------------------------------------------------------------------------------

# The sections of a config that decide a run's outcome.
SECTIONS = (
    "model", "optim_wrapper", "param_scheduler", "train_cfg", "val_cfg", "train_dataloader", "val_dataloader", "val_evaluator",
    "auto_scale_lr",
)  # fmt: skip
NOT_RECIPE = ("data_root", "num_workers", "persistent_workers")
NOT_OF_THE_VIT = ("type", "name", "weights", "init_cfg", "drop_path", "freeze", "checkpointing")
# Hooks that change no number
ONLOOKERS = ("IterTimerHook", "LoggerHook", "CheckpointHook", "SegVisualizationHook", "PosfieldRunHook")


def declared_protocol(cfg: Config) -> SegmentationProtocol:
    """The protocol that a config says it follows, from the fields that its hook holds."""
    values = next(hook.protocol for hook in cfg.custom_hooks if hook.type == "PosfieldRunHook")
    fields = {key: value for key, value in values.items() if key not in ("name", "version")}
    return with_overrides(protocol(values["name"]), fields)


def given_model_kwargs(cfg: Config) -> dict[str, Any]:
    """The arguments of the ViT that a config spells out."""
    return {key: value for key, value in cfg.model.backbone.items() if key not in NOT_OF_THE_VIT}


def _recipe(cfg: Config, processes: int) -> dict[str, Any]:
    """The sections as plain values, without the ViT's arguments. The batch size is that of all processes."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(key): plain(item) for key, item in value.items() if key not in NOT_RECIPE}
        return [plain(item) for item in value] if isinstance(value, list | tuple) else value

    sections: dict[str, Any] = {name: plain(cfg.get(name)) for name in SECTIONS}
    kept = ("type", "name", "drop_path", "freeze")
    sections["model"]["backbone"] = {key: cfg.model.backbone.get(key) for key in kept}
    sections["train_dataloader"]["batch_size"] *= processes
    # Also an EMA, early stopping, ...
    hooks = [*cfg.get("default_hooks", {}).values(), *cfg.get("custom_hooks", [])]
    sections["hooks"] = [plain(hook) for hook in hooks if hook and hook["type"] not in ONLOOKERS]
    sections["load_from"] = None if cfg.get("resume") else cfg.get("load_from")
    return sections


def deviations(cfg: Config, model_kwargs: Mapping[str, Any], processes: int) -> dict[str, list[Any]]:
    """Where a config deviates from the protocol that it is named after: ``{field: [protocol's, run's]}``.

    Args:
        model_kwargs: arguments of the ViT that were given beside the checkpoint's.
        processes: how many share a batch.
    """
    cfg = with_todays_data(cfg)
    declared = declared_protocol(cfg)
    changed = protocols.deviations(declared)
    # Your own data may have any
    masks = replaced(MaskRule(), cfg.train_dataloader.dataset.get("masks", {}), "masks")
    made = segmenter_config(declared, cfg.model.backbone.name, model_kwargs=model_kwargs, masks=masks)
    made["train_dataloader"]["batch_size"] = declared.batch_size
    changed |= dict(sorted(compared(_recipe(Config(made), 1), _recipe(cfg, processes)).items()))
    sets = label_sets(cfg)
    for (split, found), count in zip(sets.items(), dataset_of(declared).counts or ()):
        if len(found) != count:
            changed[f"{split}_images"] = [count, len(found)]
    if shared := n_shared(*(found.named for found in sets.values())):
        changed["shared_images"] = [0, shared]
    if given := network_kwargs(model_kwargs):
        changed["model_kwargs"] = [{}, given]
    return {**changed, **protocols.not_swept(declared)}


def label_sets(cfg: Config) -> dict[str, LabelSet]:
    """Both parts of a config's data, by the protocol's words for them."""
    return {split: label_set(cfg[f"{key}_dataloader"].dataset) for split, key in PARTS.items()}


def with_todays_data(cfg: Config) -> Config:
    """A config of an earlier version, which names MMSegmentation's data sets, as it would be made today."""
    if cfg.train_dataloader.dataset.type == "PosfieldLabels":
        return cfg
    cfg, declared = Config(cfg.to_dict()), declared_protocol(cfg)
    for part, name in (("train", "train"), ("val", "val"), ("val", "test")):
        loader = cfg[f"{name}_dataloader"]
        loader.dataset = _as_today(loader.dataset, section(declared, loader.dataset.data_root, part, ()))
    return cfg


def _as_today(old: Mapping[str, Any], made: Mapping[str, Any]) -> dict[str, Any]:
    """A data set of an earlier version in the words of the one that is made today; its pipeline stays."""
    steps = [step for step in old["pipeline"] if step["type"] != "CheckLabels"]
    of_labels = ("PosfieldLoadLabels", "LoadAnnotations")
    return {**made, "pipeline": [{"type": of_labels[0]} if s["type"] in of_labels else s for s in steps]}


def changed_since(file: Path, ours: Mapping[str, Any]) -> dict[str, list[Any]]:
    """In which settings the run that saved its :func:`identity` in ``file`` differs from this one."""
    saved, now = json.loads(file.read_text(encoding="utf-8")), json.loads(json.dumps(ours))
    before, today = saved["settings"], now["settings"]
    if "labels" not in before:  # of an earlier version
        before["labels"] = today["labels"]
        for loader in ("train_dataloader", "val_dataloader"):
            before[loader]["dataset"] = _as_today(before[loader]["dataset"], today[loader]["dataset"])
    changed = compared(saved, now)
    changed.pop("config_hash", None)  # the settings say why
    return changed


def identity(
    cfg: Config, model_kwargs: Mapping[str, Any], weights_hash: str | None, processes: int
) -> dict[str, Any]:
    """What makes two runs the same, as plain values to compare and to save.

    Args:
        model_kwargs: all arguments of the ViT (``ViT.model_kwargs``).
    """
    cfg = with_todays_data(cfg)
    sets = label_sets(cfg)

    def images(found: LabelSet) -> list[str]:
        names = (os.path.relpath(image, found.folder) for image, _ in found.files)
        return sorted(os.path.splitext(name)[0].removesuffix("_leftImg8bit") for name in names)

    def short_hash(content: bytes) -> str:
        return hashlib.sha256(content).hexdigest()[:12]

    train = sets["training"]
    settings = {
        **_recipe(cfg, processes),
        "labels": {"classes": train.classes, "table": short_hash(train.table.tobytes())},
        "backbone_flags": dict(model_kwargs),  # the first name of the key; another changes every hash
        # Tells runs on other data from seeds of one.
        "images_hash": short_hash(json.dumps([images(found) for found in sets.values()]).encode()),
    }
    own = {"config_hash": config_hash(settings), "seed": cfg.randomness.get("seed")}
    return {**own, "weights_hash": weights_hash, "settings": settings}
