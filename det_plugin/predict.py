"""A fine-tuned detector for your own images, from a run folder of either engine."""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from det_plugin.coco.masks import decode_rle
from det_plugin.coco.metrics import Prediction
from det_plugin.protocol import DetectionProtocol
from det_plugin.run import required_engine
from det_plugin.tiles import detect_in_tiles
from pretrain.data.images import AnyImage, pixels_of
from pretrain.device import choose_device
from pretrain.errors import UserError

Images = Sequence[np.ndarray]


@dataclass(frozen=True)
class Detections:
    """What a detector finds in one image, best first.

    Attributes:
        image: the pixels, [H, W, 3] uint8 RGB, upright.
        results: in COCO's format: ``category_id``, ``bbox``, ``score``, and ``segmentation`` (RLE) where the
            detector has masks.
        classes: category id -> name.
        has_masks: whether the detector finds masks.
    """

    image: np.ndarray
    results: list[Prediction]
    classes: dict[int, str]
    has_masks: bool = True

    @property
    def boxes(self) -> np.ndarray:
        """[N, 4] float: x0, y0, x1, y1 in pixels."""
        boxes = np.array([p["bbox"] for p in self.results], float).reshape(-1, 4)
        return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)

    @property
    def scores(self) -> np.ndarray:
        """[N] float, from 0 to 1."""
        return np.array([p["score"] for p in self.results], float)

    @property
    def labels(self) -> list[str]:
        """The name of each object's class."""
        return [self.classes[p["category_id"]] for p in self.results]

    @property
    def masks(self) -> np.ndarray | None:
        """[N, H, W] bool, decoded anew each time; None from a detector of boxes alone."""
        if not self.has_masks:
            return None
        masks = [decode_rle(p["segmentation"]).astype(bool) for p in self.results]
        return np.stack(masks) if masks else np.zeros((0, *self.image.shape[:2]), bool)


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

    def predict(
        self, image: AnyImage, min_score: float = 0.0, tile_px: int = 0, overlap: float = 0.2
    ) -> Detections:
        """The objects of one image.

        Args:
            image: a path; a PIL image; or uint8 RGB [H, W, 3].
            min_score: leave out less certain objects. The protocol's ``score_threshold`` applies anyway.
            tile_px: also look at tiles of this side (:mod:`det_plugin.tiles`); 0: at the whole image alone.
            overlap: share of a tile's side that its neighbor repeats, from 0 to below 1.

        Raises:
            UserError: it cannot be read, or is an array of another kind.
        """
        pixels = pixels_of(image)
        if tile_px:
            how = tile_px, overlap, self.protocol.nms, min_score
            found = detect_in_tiles(self.detect, pixels, *how)
            return Detections(pixels, found, self.classes, self.protocol.has_masks)
        found = [p for p in self.detect([pixels])[0] if p["score"] >= min_score]
        return Detections(pixels, found, self.classes, self.protocol.has_masks)

    def detect(self, images: Images) -> list[list[Prediction]]:
        """Detections of each image, best first, as COCO results without ``image_id``.

        All images go through the network together. How many is up to the caller.

        Args:
            images: uint8 RGB [H, W, 3] of any sizes.

        Returns:
            a list for each image. An entry has ``category_id``, ``bbox`` (x, y, width, height in the image's
            pixels), ``score`` (above the protocol's ``score_threshold``) and, with masks, ``segmentation`` (RLE).

        Raises:
            UserError: an image has another shape or type.
        """
        for image in images:
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
                raise UserError(f"image: {image.dtype} {list(image.shape)} is not uint8 [H, W, 3]")
        return self.batch(images) if len(images) else []


def load_detector(
    run: str | Path, device: str = "auto", trust: bool = False, checkpoint: str = "auto"
) -> Detector:
    """Load the weights of a run folder. The backbone's file is not needed.

    Args:
        run: folder of ``posfield detect``, or of Detectron2's launcher with our config.
        device: ``auto`` | ``cpu`` | ``cuda`` | ``mps``.
        trust: build whatever a Detectron2 run's config names, where that is more than our runs leave.
        checkpoint: ``last`` | ``best``, which runs on your own data keep | ``auto``: the best where there is one.

    Raises:
        UserError: the folder holds no run or no checkpoint, its config would run code, or Detectron2 is needed and not installed.
    """
    on, engine = choose_device(device), required_engine(Path(run))
    of_engine = importlib.import_module(f"det_plugin.{engine}_engine.predict")
    return Detector(*of_engine.detector(Path(run), on, trust, checkpoint))
