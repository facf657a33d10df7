"""A fine-tuned detector for one's own images, from a run folder of either engine."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from det_plugin.protocol import DetectionProtocol
from det_plugin.torchvision_engine.augment import evaluation_geometry
from det_plugin.torchvision_engine.evaluate import Prediction, detect
from det_plugin.torchvision_engine.folder import CONFIG, classes_of, protocol_of
from det_plugin.torchvision_engine.loader import to_tensor
from det_plugin.torchvision_engine.train import load_model
from pretrain.device import choose_device
from pretrain.errors import UserError

Images = Sequence[np.ndarray]
RESOLVED = "config_resolved.yaml"  # of a Detectron2 run


@dataclass(frozen=True)
class Detector:
    """What was trained, ready to look at images.

    Attributes:
        classes: category id -> name, in the order of the classes.
        protocol: the recipe of the run.
        batch: the engine's part: uint8 RGB images -> results of each.
    """

    classes: dict[int, str]
    protocol: DetectionProtocol
    batch: Callable[[Images], list[list[Prediction]]]

    def detect(self, images: Images) -> list[list[Prediction]]:
        """What is found in each image, best first: COCO results without ``image_id``.

        All images go through the network together; their number is the caller's choice.

        Args:
            images: uint8 RGB [H, W, 3] of any sizes.

        Returns:
            for each image a list of ``category_id``, ``bbox`` (x, y, width, height in its pixels), ``score`` and
            ``segmentation`` (RLE), above the protocol's ``score_threshold``.

        Raises:
            UserError: an image of another shape or type.
        """
        for image in images:
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
                raise UserError(f"image: {image.dtype} {list(image.shape)} is not uint8 [H, W, 3]")
        return self.batch(images) if len(images) else []


def load_detector(run: Path, device: str = "auto") -> Detector:
    """The last checkpoint of a run folder; the network is built from the config there, the backbone's own file is not needed.

    Args:
        run: folder that ``tools/train_det.py``, or Detectron2's launcher with our config, has left.
        device: ``auto`` | ``cpu`` | ``cuda`` | ``mps``.

    Raises:
        UserError: no such run, no checkpoint in it, or Detectron2 is needed and not installed.
    """
    on = choose_device(device)
    if (run / CONFIG).is_file():
        return _torchvision(run, on)
    if (run / RESOLVED).is_file():
        return _detectron2(run, on)
    raise UserError(f"{run} is no folder of a detection run: it holds neither {CONFIG} nor {RESOLVED}")


def _torchvision(run: Path, device: torch.device) -> Detector:
    model, config, _ = load_model(run)
    model.to(device).eval()
    protocol, classes = protocol_of(config), classes_of(run, config)

    def batch(images: Images) -> list[list[Prediction]]:
        maps = [evaluation_geometry((image.shape[1], image.shape[0]), protocol.image_size_px) for image in images]
        resized = [to_tensor(geometry.pixels(image)) for geometry, image in zip(maps, images)]
        return detect(model, resized, [(image.shape[0], image.shape[1]) for image in images], list(classes), device)

    return Detector(classes, protocol, batch)


def load_detectron2(run: Path) -> tuple[Any, Any]:
    """The model of a Detectron2 run's last checkpoint, and the run's config.

    Raises:
        UserError: no run, no checkpoint in it, or Detectron2 is not installed.
    """
    from det_plugin.requires import detectron2_installed

    with detectron2_installed():
        from detectron2.checkpoint import DetectionCheckpointer
        from detectron2.config import instantiate

    from det_plugin.saved_config import load_config

    cfg = load_config(run, RESOLVED)
    model = instantiate(cfg.model)
    checkpointer = DetectionCheckpointer(model, str(run))
    if not checkpointer.has_checkpoint():
        raise UserError(f"{run} holds no checkpoint (last_checkpoint and the file that it names)")
    checkpointer.load(checkpointer.get_checkpoint_file())
    return model, cfg


def _detectron2(run: Path, device: torch.device) -> Detector:
    model, cfg = load_detectron2(run)
    model.to(device).eval()

    from detectron2.config import instantiate
    from detectron2.data.transforms import AugInput, AugmentationList
    from detectron2.evaluation.coco_evaluation import instances_to_coco_json

    from det_plugin.deviations import protocol_in
    from det_plugin.saved_config import classes_in

    resize = AugmentationList(list(instantiate(cfg.dataloader.test.mapper.augmentations)))
    classes = classes_in(cfg)
    ids = list(classes)

    @torch.no_grad()
    def batch(images: Images) -> list[list[Prediction]]:
        inputs = []
        for image in images:
            seen = AugInput(image)
            resize(seen)
            pixels = torch.from_numpy(np.ascontiguousarray(seen.image.transpose(2, 0, 1)))
            inputs.append({"image": pixels, "height": image.shape[0], "width": image.shape[1]})
        results = [instances_to_coco_json(output["instances"].to("cpu"), 0) for output in model(inputs)]
        kept = "bbox", "score", "segmentation"
        return [[{"category_id": ids[r["category_id"]], **{key: r[key] for key in kept}} for r in own] for own in results]

    return Detector(classes, protocol_in(cfg), batch)
