"""A fine-tuned detector for your own images, from a run folder of either engine."""

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
    """A trained detector, ready to look at images.

    Attributes:
        classes: category id -> name, in the order of the classes.
        protocol: the run's recipe.
        batch: the engine's part: uint8 RGB images -> each image's results.
    """

    classes: dict[int, str]
    protocol: DetectionProtocol
    batch: Callable[[Images], list[list[Prediction]]]

    def detect(self, images: Images) -> list[list[Prediction]]:
        """Detections of each image, best first, as COCO results without ``image_id``.

        All images go through the network together. How many is up to the caller.

        Args:
            images: uint8 RGB [H, W, 3] of any sizes.

        Returns:
            a list for each image. An entry has ``category_id``, ``bbox`` (x, y, width, height in the image's
            pixels), ``score`` (above the protocol's ``score_threshold``) and ``segmentation`` (RLE).

        Raises:
            UserError: an image has another shape or type.
        """
        for image in images:
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
                raise UserError(f"image: {image.dtype} {list(image.shape)} is not uint8 [H, W, 3]")
        return self.batch(images) if len(images) else []


def load_detector(run: Path, device: str = "auto") -> Detector:
    """Load the last checkpoint of a run folder. Its config says how to build the network; the backbone's file
    is not needed.

    Args:
        run: folder of ``posfield detect``, or of Detectron2's launcher with our config.
        device: ``auto`` | ``cpu`` | ``cuda`` | ``mps``.

    Raises:
        UserError: the folder holds no run or no checkpoint, or Detectron2 is needed and not installed.
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
        maps = [
            evaluation_geometry((image.shape[1], image.shape[0]), protocol.image_size_px) for image in images
        ]
        resized = [to_tensor(geometry.pixels(image)) for geometry, image in zip(maps, images)]
        return detect(
            model, resized, [(image.shape[0], image.shape[1]) for image in images], list(classes), device
        )

    return Detector(classes, protocol, batch)


def load_detectron2(run: Path) -> tuple[Any, Any]:
    """Load the last checkpoint of a Detectron2 run. Returns the model and the run's config.

    Raises:
        UserError: the folder holds no run or no checkpoint, or Detectron2 is not installed.
    """
    from det_plugin.detectron2_engine.requires import detectron2_installed

    with detectron2_installed():
        from detectron2.checkpoint import DetectionCheckpointer
        from detectron2.config import instantiate

    from det_plugin.detectron2_engine.saved_config import load_config

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

    from det_plugin.detectron2_engine.saved_config import classes_in, protocol_in

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
        return [
            [{"category_id": ids[r["category_id"]], **{key: r[key] for key in kept}} for r in own]
            for own in results
        ]

    return Detector(classes, protocol_in(cfg), batch)
