"""Fine-tune a detector, or evaluate one, with either engine."""

import importlib
import re
from collections.abc import Mapping
from contextlib import AbstractContextManager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from det_plugin import plan
from det_plugin.coco.annotations import lacks_masks, read_classes, read_split
from det_plugin.coco.layout import has_one_split
from det_plugin.protocol import EARLIER, DetectionProtocol, protocol, with_overrides
from det_plugin.run import CONFIGS, DetectionRun, engine_of
from pretrain import distributed
from pretrain.backbones.vit import size_name
from pretrain.errors import UserError, explained_shortage
from pretrain.jobs import start
from pretrain.log import say
from pretrain.run_lock import run_lock
from pretrain.schedules import iterations
from pretrain.settings import above_zero
from pretrain.weights import backbone_name


def go_on(output: str | Path, **changes: Any) -> Path:
    """:func:`finetune` of the run in a folder, from its last checkpoint, as it was started.

    Args:
        output: run folder.
        changes: ``device``, ``workers``, ``accumulate``, ``checkpointing``, ``compile``, ``engine``.

    Raises:
        UserError: the folder does not say how it was started; as :func:`finetune`.
    """
    return finetune(
        output=output, resume=True, **{**start.started(Path(output), ("data", "protocol")), **changes}
    )


def finetune(
    data: str | Path,
    output: str | Path,
    *,
    weights: str | Path | None = None,
    backbone: str | None = None,
    protocol: str = "coco-12ep",
    engine: str = "auto",
    resume: bool = False,
    model_kwargs: Mapping[str, Any] | None = None,
    seed: int = 0,
    device: str = "auto",
    workers: int = 2,
    accumulate: int = 1,
    checkpointing: bool = False,
    compile: bool = False,
    data_changed: bool = False,
    is_sure: bool = False,
    **fields: Any,
) -> Path:
    """Fine-tune a backbone for detection and evaluate it, on all processes of torchrun together.

    Args:
        data: root of a set in COCO's, Pascal VOC's or YOLO's format (:mod:`det_plugin.coco.layout`), or a .yaml file.
        output: run folder.
        weights: the backbone's checkpoint; None: random initialization.
        backbone: registry name; a file of ours says it itself.
        protocol: a key of :data:`det_plugin.protocol.PROTOCOLS`.
        engine: ``auto`` | ``detectron2`` | ``torchvision``.
        resume: continue from the folder's last checkpoint, if there is one.
        model_kwargs: further arguments of ``build_backbone``.
        seed: of all that is drawn.
        device: ``auto`` | ``cpu`` | ``cuda``.
        workers: data-loading processes of a rank.
        accumulate: micro-batches a step; 0: as few as fit into the GPU's memory. The schedule does not change.
        checkpointing: blocks are computed again in the backward pass, for memory.
        compile: ``torch.compile`` of the blocks, for speed.
        data_changed: go on though the data are others than before (:mod:`pretrain.data.digest`), which is marked.
        is_sure: a protocol made for COCO may run in full on few images.
        fields: of the protocol, changed, as values or text. ``epochs``, or ``max_iters`` alone, sets the whole schedule in
            proportion. The data say what is not given: ``num_classes``, ``masks``, on other classes ``keep_empty``.

    Returns:
        path of ``result.json``. A finished run is left as it is.

    Raises:
        UserError: bad settings or data; the folder holds another run.
        Interrupted: on SIGTERM, SIGUSR1 or Ctrl-C, once the state is saved.
        FloatingPointError: a loss is not finite; names the iteration and the losses.
    """
    try:
        module = engine_module(engine, Path(output))
        how = dict[str, Any](seed=seed, device=device, workers=workers, accumulate=accumulate)
        how |= dict(checkpointing=checkpointing, compile=compile, is_sure=is_sure)
        how["model_kwargs"], name = model_kwargs or {}, backbone_name(backbone, weights)
        run = settings_of(name, weights, Path(data), Path(output), protocol, fields, **how)
        with run_lock(output, getattr(module, "newest_checkpoint", None)), _shortage(accumulate, workers):
            return plan.ended(module.train(run, resume, data_changed=data_changed))
    finally:
        distributed.stop()


def _shortage(accumulate: int, workers: int) -> AbstractContextManager[None]:
    """Around what may run out of memory: the error says the way on."""
    more = f"give --accumulate {2 * accumulate}, or --checkpointing, and go on with --resume"
    return explained_shortage(more, f"give --workers below {workers} and go on with --resume")


def settings_of(
    backbone: str,
    weights: str | Path | None,
    data: Path,
    output: Path,
    name: str,
    fields: Mapping[str, Any],
    **how: Any,
) -> DetectionRun:
    """The run that :func:`finetune` is asked for.

    Raises:
        UserError: no such protocol, or a field's value is bad; the data's categories are damaged.
    """
    base, epochs = protocol(name, backbone, earlier_version(backbone, output)), fields.get("epochs")
    fields = {key: value for key, value in fields.items() if key != "epochs"}
    if epochs is not None and "max_iters" in fields:
        told = f"epochs={epochs} and max_iters={fields['max_iters']}"
        raise UserError(f"protocol: {told} say it twice; give one of them")
    recipe = with_overrides(base, plan.whole_schedule(base, fields))
    if recipe.val_share and not has_one_split(data):
        say(f"{data} has images for validation: --val-share is not used")
        recipe = with_overrides(recipe, {"val_share": 0.0})
    if "num_classes" not in fields:
        n_classes = len(read_classes(data, "val", recipe.val_share))
        if n_classes != recipe.num_classes:
            told = f"the protocol's is {recipe.num_classes}, so the result is marked"
            say(f"num_classes={n_classes}, as in {data}; {told}")
        recipe = with_overrides(recipe, {"num_classes": n_classes})
    if "keep_empty" not in fields and is_own_data(recipe, backbone) and not is_older(output):
        recipe = with_overrides(recipe, {"keep_empty": True})
    if recipe.masks == "auto" and lacks_masks(data, recipe.crowds, recipe.val_share):
        say(f"masks=off: no object of {data} has a mask, so boxes alone are learned; the result is marked")
        recipe = with_overrides(recipe, {"masks": "off"})
    if epochs is not None:
        how_read = dict[str, Any](num_classes=None, training=True, share=recipe.train_share, **recipe.reading)
        n_images = len(read_split(data, "train", **how_read).pictures)
        max_iters = iterations(above_zero("epochs", epochs), n_images, recipe.batch_size)
        recipe = with_overrides(recipe, plan.schedule(base, max_iters, fields))
    return DetectionRun(backbone, None if weights is None else Path(weights), data, output, recipe, **how)


def is_own_data(recipe: DetectionProtocol, backbone: str) -> bool:
    """Whether the classes are not as many as the protocol's, which are COCO's."""
    return recipe.num_classes != protocol(recipe.name, backbone).num_classes


def is_older(output: Path) -> bool:
    """Whether the folder's run left images without objects out, as all did at first. It goes on like that."""
    text = _config_text(output)
    return bool(text) and "keep_empty" not in text


def earlier_version(backbone: str, output: Path) -> int | None:
    """The version of the protocol with which the folder's run began and goes on, if it is none of today's."""
    text = _config_text(output)
    found = text and re.search(r'^ *"?version"?: (\d+)', text, re.MULTILINE)
    version = int(found[1]) if found else 1  # of Detectron2's configs, which do not say 1
    return version if text and (size_name(backbone), version) in EARLIER else None


def _config_text(output: Path) -> str:
    """The config of the folder's run, as it stands there; empty where there is none."""
    engine = engine_of(output)
    return "" if engine is None else (output / CONFIGS[engine]).read_text(errors="replace")


def evaluate(
    data: str | Path, output: str | Path, *, engine: str = "auto", device: str = "auto", workers: int = 2
) -> dict[str, Any]:
    """COCO metrics of a run folder's last checkpoint, in percent; {} on all ranks but the first.

    Raises:
        UserError: no run, no checkpoint, or the data do not fit.
    """
    try:
        module = engine_module(engine, Path(output))
        return module.evaluate_folder(Path(output), Path(data), device=device, workers=workers)  # type: ignore
    finally:
        distributed.stop()


def engine_module(name: str, output: Path) -> Any:
    """``train.py`` of the engine that :func:`choose_engine` chooses, which is said."""
    engine, reason = choose_engine(name, output)
    say(f"engine: {engine} ({reason})")
    return importlib.import_module(f"det_plugin.{engine}_engine.train")


def choose_engine(name: str, output: Path) -> tuple[str, str]:
    """The engine and the reason. ``auto``: that of the run in ``output``, else Detectron2 if it has a GPU."""
    if name != "auto":
        return name, "as asked for"
    if engine := engine_of(output):
        return engine, f"it trained {output}"
    if find_spec("detectron2") is None:
        return "torchvision", "Detectron2 is not installed"
    if not torch.cuda.is_available():
        return "torchvision", "Detectron2 is installed, but there is no CUDA device"
    return "detectron2", "it is installed, and there is a CUDA device"
