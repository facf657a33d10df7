"""Prediction with a Detectron2 run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import instantiate
from detectron2.data.transforms import AugInput, AugmentationList
from detectron2.evaluation.coco_evaluation import instances_to_coco_json

from det_plugin import best
from det_plugin.coco.metrics import Prediction
from det_plugin.detectron2_engine.saved_config import RESOLVED, classes_in, load_config, protocol_in
from det_plugin.detectron2_engine.trainer import last_whole
from det_plugin.loader import to_tensor
from pretrain.errors import UserError


def load_model(run: Path, trust: bool = False) -> tuple[Any, Any]:
    """Load the last checkpoint of a Detectron2 run. Returns the model and the run's config.

    Args:
        trust: build whatever the config names (:func:`saved_config.load_config`). Checkpoints are tensors
            and plain values in any case.

    Raises:
        UserError: the folder holds no run or no checkpoint; its config is more than data of ours.
    """
    cfg = load_config(run, RESOLVED, trust)
    model, last = instantiate(cfg.model), last_whole(run)
    if last is None:
        raise UserError(f"{run} holds no checkpoint (last_checkpoint and the file that it names)")
    DetectionCheckpointer(model).load(str(last))
    return model, cfg


def detector(
    run: Path, device: torch.device, trust: bool = False, checkpoint: str = "auto"
) -> tuple[Any, ...]:
    """The parts of a :class:`det_plugin.predict.Detector`."""
    model, cfg = load_model(run, trust)
    best.load(run, model, checkpoint)
    model.to(device).eval()
    resize = AugmentationList(list(instantiate(cfg.dataloader.test.mapper.augmentations)))
    classes = classes_in(cfg)
    ids, kept = list(classes), ("bbox", "score", "segmentation")

    @torch.no_grad()
    def batch(images: Sequence[np.ndarray]) -> list[list[Prediction]]:
        inputs = []
        for image in images:
            seen = AugInput(image)
            resize(seen)
            inputs.append({"image": to_tensor(seen.image), "height": image.shape[0], "width": image.shape[1]})
        results = [instances_to_coco_json(output["instances"].to("cpu"), 0) for output in model(inputs)]
        return [
            [{"category_id": ids[r["category_id"]], **{key: r[key] for key in kept if key in r}} for r in own]
            for own in results
        ]

    return classes, protocol_in(cfg), batch
