"""The whole training step of ViTDet's Mask R-CNN: images/s and peak memory, with our backbone and with
Detectron2's."""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import torch
from detectron2.config import LazyCall, instantiate
from detectron2.utils.events import EventStorage
from torch import nn

from det_plugin.benchmark.backbone import GLOBAL_BLOCKS, WINDOW, their_network
from det_plugin.detectron2_engine.lazy import config
from det_plugin.detectron2_engine.loader import noise_samples
from det_plugin.protocol import DetectionProtocol, protocol, with_overrides
from pretrain.benchmark.turns import Work, in_turns
from pretrain.device import choose_device

OURS: Mapping[str, Mapping[str, Any]] = {  # arguments of RegistryBackbone
    "ours": {},
    "ours_windowed": dict(window_size=WINDOW, global_blocks=GLOBAL_BLOCKS),
    "ours_checkpointed": dict(checkpointing=True),
    "ours_compiled": dict(compile=True),
}
THEIRS: Mapping[str, Mapping[str, Any]] = {  # arguments of their_network
    "detectron2": dict(window=0),
    "detectron2_windowed": dict(window=WINDOW, relative_positions=True),  # its ViTDet reference
}
WARM_UP = 3  # steps that are not counted: kernels are chosen, blocks compiled, the loss scale found
N_OBJECTS = 8  # in an image; COCO has 7


def measure(
    backbone: str,
    batches: Sequence[int],
    rounds: int,
    device: str = "auto",
    *,
    contenders: Sequence[str] = (*OURS, *THEIRS),
    model_kwargs: Mapping[str, Any] | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Images/s and peak memory of a training step, from backbone to AdamW; AMP on CUDA.

    Args:
        backbone: registry name.
        batches: images a step. Once one does not fit into memory, larger ones are not tried.
        rounds: counted steps.
        contenders: keys of :data:`OURS` and :data:`THEIRS`, measured in turn, each batch size in a process of its own.
        model_kwargs: more arguments of ``build_backbone``, for all.
        overrides: fields of the protocol, for all.

    Returns:
        ``{"1": {"img_per_s": ..., "peak_mib": ...}, "2": "out of memory"}``, by batch size, for each
        contender.

    Raises:
        UserError: Detectron2 is absent; the protocol has no such field.
    """
    where = str(choose_device(device))
    recipe = with_overrides(protocol("coco-12ep", backbone), dict(overrides or {}))
    found: dict[str, Any] = {"backbone": backbone, "device": where, "image_px": recipe.image_size_px}
    for name in contenders:
        own = found[name] = dict[str, Any]()
        for n_images in sorted(batches):
            task = work, (name, recipe, backbone, dict(model_kwargs or {}), n_images, where)
            try:
                figures = in_turns({name: task}, where, rounds, WARM_UP)[name]
            except torch.cuda.OutOfMemoryError:
                own[str(n_images)] = "out of memory"
                break
            rate = round(n_images / median(figures.seconds), 2)
            own[str(n_images)] = {"img_per_s": rate, "peak_mib": round(figures.peak_mib, 1)}
    return found


def work(
    name: str, recipe: DetectionProtocol, backbone: str, model_kwargs: Any, n_images: int, device: str
) -> Work:
    """A training step of a contender on one batch."""
    torch.manual_seed(0)
    model = build(name, recipe, backbone, model_kwargs)
    return training_step(model, recipe, torch.device(device), noise_samples(recipe, n_images, N_OBJECTS))


def build(name: str, recipe: DetectionProtocol, backbone: str, model_kwargs: Mapping[str, Any]) -> nn.Module:
    """A contender's detector with random weights."""
    cfg = config(recipe, backbone, model_kwargs=model_kwargs).model
    if name in OURS:
        cfg.backbone.net.update(OURS[name])
    else:
        size = dict(image_px=recipe.image_size_px, drop_path=recipe.drop_path)
        theirs = dict(backbone=backbone, model_kwargs=dict(model_kwargs), **THEIRS[name], **size)
        cfg.backbone.net = LazyCall(their_network)(**theirs)
    return instantiate(cfg)  # type: ignore[no-any-return]


def training_step(
    model: nn.Module, recipe: DetectionProtocol, device: torch.device, batch: list[dict[str, Any]]
) -> Work:
    """A step with the recipe's AdamW and loss scale."""
    model.to(device).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-6, recipe.betas, weight_decay=recipe.weight_decay)
    dtype, amp = getattr(torch, recipe.amp_dtype), recipe.amp and device.type == "cuda"
    scaler = torch.amp.GradScaler(device.type, enabled=amp and dtype is torch.float16)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with EventStorage(), torch.autocast(device.type, dtype, enabled=amp):
            losses = model(batch)
        scaler.scale(torch.stack([loss.float() for loss in losses.values()]).sum()).backward()
        scaler.step(optimizer)
        scaler.update()

    return step
