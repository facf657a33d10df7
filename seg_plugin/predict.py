"""A finished run as a model: label maps of images, and of a data set's beside the truth."""

import os
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.dataset import pseudo_collate
from mmengine.runner.checkpoint import _load_checkpoint_to_model as load_checkpoint_to_model
from mmseg.apis import inference_model, init_model
from mmseg.registry import DATASETS
from PIL import Image

from pretrain.data.datasets import MaskRule
from pretrain.data.datasets.listing import IMAGE_SUFFIXES
from pretrain.data.images import AnyImage, pixels_of
from pretrain.data.sources.files import left_out
from pretrain.device import choose_device
from pretrain.errors import UserError
from pretrain.log import log
from pretrain.results.runs import POINTS
from pretrain.settings import replaced
from seg_plugin.config import declared_protocol, read_saved, with_todays_data
from seg_plugin.data import PARTS, section

BEST = "best_mIoU_iter_*.pth"  # mmengine's name


@dataclass(frozen=True)
class Segmented:
    """An image and its label maps, all of the image's own size.

    Attributes:
        pixels: [H, W, 3] uint8, RGB, turned as its EXIF orientation says.
        predicted, truth: [H, W] int64, the number of the class; the protocol's ``ignore_index``: not counted.
    """

    path: Path
    pixels: np.ndarray
    predicted: np.ndarray
    truth: np.ndarray | None = None


@dataclass(frozen=True)
class Segmentation:
    """What a segmenter sees in an image: ``labels`` [H, W] int64, of which label k is ``classes[k]``."""

    labels: np.ndarray
    classes: tuple[str, ...]


@dataclass(frozen=True)
class Segmenter:
    """A trained segmenter.

    Attributes:
        model: MMSegmentation's, in evaluation mode; its ``cfg`` is the saved config.
        classes: their names.
        metainfo: MMSegmentation's words for them, with ``palette`` and ``values``: what the data's masks store.
    """

    model: Any
    classes: tuple[str, ...]
    metainfo: dict[str, Any]

    def predict(self, image: AnyImage) -> Segmentation:
        """Segment an image.

        Args:
            image: a file, or an image of PIL; either is turned as its EXIF orientation says. Or uint8 RGB [H, W, 3].

        Raises:
            UserError: the file cannot be read; an array of another shape or type.
        """
        bgr = np.ascontiguousarray(read_rgb(image)[..., ::-1])
        labels = inference_model(self.model, bgr).pred_sem_seg.data.squeeze(0).cpu().numpy()
        return Segmentation(labels, self.classes)


def load_segmenter(
    run: str | Path, device: str = "auto", trust: bool = False, checkpoint: str = "auto"
) -> Segmenter:
    """Load a run's weights; beside its config no other file is needed.

    Args:
        device: ``auto`` | ``cpu`` | ``cuda``.
        trust: run the folder's config as Python, where it is more than the data that our runs leave.
        checkpoint: ``last`` | ``best``, which runs on your own data keep | ``auto``: the best where there is one.

    Raises:
        UserError: the folder holds no run; its config is more than data (:func:`seg_plugin.config.read_saved`);
            its checkpoint holds more than tensors and plain values.
    """
    folder = Path(run)
    if (folder / POINTS).is_dir():
        one = folder / POINTS / "lr_LR_wd_WD" / "seed_N"
        raise UserError(f"run: {folder} is a sweep; give one of its runs, {one}")
    configs, file = sorted(folder.glob("*.py")), newest_checkpoint(folder)
    best = sorted(path for path in folder.glob(BEST) if zipfile.is_zipfile(path))
    if checkpoint == "best" and not best:
        raise UserError(f"run: {folder} kept its last weights alone; take checkpoint=last")
    if best and checkpoint != "last":
        file = best[-1]
        log(f"{file}: the best of the validations")
    if file is None:
        raise UserError(f"run: {folder} holds no segmentation run: there is no checkpoint iter_N.pth")
    if len(configs) != 1:
        found = ", ".join(path.name for path in configs) or "none"
        raise UserError(f"run: {folder} must hold one config, *.py; found: {found}")
    model, on = init_model(read_saved(configs[0], trust), device="cpu"), choose_device(device)
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        metainfo = dict(state["meta"]["dataset_meta"])
    except Exception as error:  # on damaged bytes the unpickler may raise anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"checkpoint: {file} is none of a segmentation run ({reason})") from error
    load_checkpoint_to_model(model, state)
    model.dataset_meta = state["meta"]["dataset_meta"]
    model.to(on)
    first = int(metainfo.get("reduce_zero_label", False))  # of runs before version 0.2, which say no values
    metainfo.setdefault("values", range(first, first + len(metainfo["classes"])))
    return Segmenter(model, tuple(metainfo["classes"]), metainfo)


def newest_checkpoint(folder: Path) -> Path | None:
    """A run's newest whole checkpoint. mmengine writes in place, so a killed run can leave a part of a file.

    Raises:
        UserError: none is whole; names the newest.
    """
    numbered = [path for path in folder.glob("iter_*.pth") if path.stem[5:].isdecimal()]
    paths = sorted(numbered, key=lambda path: int(path.stem[5:]), reverse=True)
    for path in paths:
        if zipfile.is_zipfile(path):  # torch's format ends with its table of contents
            return path
        log(f"passed over: {path} was not written to its end")
    if paths:
        told = "was not written to its end, and there is no other; remove it to begin anew"
        raise UserError(f"checkpoint: {paths[0]} {told}")
    return None


def dataset_of_run(model: Any, split: str, folder: Path | None = None) -> Any:
    """A split of a run's data, or of another folder of that kind, as MMSegmentation's data set without crops.

    Raises:
        UserError: no such split, or the folder is incomplete.
    """
    if split not in PARTS:
        raise UserError(f"split: {split!r} is none of {', '.join(PARTS)}")
    values = with_todays_data(model.cfg).val_dataloader.dataset
    recipe, masks = declared_protocol(model.cfg), replaced(MaskRule(), values["masks"], "masks")
    root, pipeline = folder or values["data_root"], values["pipeline"]
    return DATASETS.build(section(recipe, root, PARTS[split], pipeline, masks))


def spread(count: int, size: int) -> list[int]:
    """``count`` of the numbers 0 to ``size`` - 1, evenly spaced; all of them if there are fewer."""
    return sorted({round(i) for i in np.linspace(0, size - 1, min(count, size))})


def segment_dataset(model: Any, dataset: Any, indices: list[int]) -> Iterator[Segmented]:
    """Images of a data set, with their ground truth."""
    model.eval()
    for index in indices:
        with torch.no_grad():
            sample = model.val_step(pseudo_collate([dataset[index]]))[0]
        maps = (sample.pred_sem_seg, sample.gt_sem_seg)
        predicted, truth = (field.data.squeeze(0).cpu().numpy() for field in maps)
        yield Segmented(Path(sample.img_path), read_rgb(sample.img_path), predicted, truth)


def segment_folder(segmenter: Segmenter, folder: Path) -> Iterator[Segmented]:
    """All images in a folder and below.

    Raises:
        UserError: there are none, or one cannot be read.
    """
    files = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    paths = [folder / path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]
    if not paths:
        raise UserError(f"images: no {', '.join(IMAGE_SUFFIXES)} in {folder}")
    if others := [os.fsencode(path) for path in files if path.suffix.lower() not in IMAGE_SUFFIXES]:
        log(left_out(others, folder))
    for path in paths:
        pixels = read_rgb(path)
        yield Segmented(path, pixels, segmenter.predict(pixels).labels)


def read_rgb(image: AnyImage) -> np.ndarray:
    """[H, W, 3] uint8, the pixels that the model sees; errors are :meth:`Segmenter.predict`'s."""
    is_known = isinstance(image, str | os.PathLike | Image.Image)
    pixels = pixels_of(image) if is_known else np.asarray(image)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.size:
        raise UserError(f"image: {pixels.dtype} {list(pixels.shape)} is not uint8 [H, W, 3]")
    return pixels
