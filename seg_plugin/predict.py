"""A finished run as a model: label maps of a data set's images, or of any others."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mmcv
import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmseg.apis import inference_model, init_model
from mmseg.registry import DATASETS
from torch import nn

from pretrain.device import choose_device
from pretrain.errors import UserError
from pretrain.results.runs import POINTS
from seg_plugin.datasets import IMAGE_SUFFIXES, SPLITS, locate
from seg_plugin.identity import declared_protocol
from seg_plugin.run import newest_checkpoint


@dataclass(frozen=True)
class Segmented:
    """An image and its label maps, all of the image's own size."""

    path: Path
    pixels: np.ndarray  # [H, W, 3] uint8, RGB, turned as its EXIF orientation says
    predicted: np.ndarray  # [H, W]
    truth: np.ndarray | None = None  # [H, W]


def load_run(folder: Path, device: str = "auto") -> nn.Module:
    """Load a run's newest checkpoint, in evaluation mode. The model's ``cfg`` is the saved config; no other
    file is needed.

    Raises:
        UserError: the folder holds no run.
    """
    if (folder / POINTS).is_dir():
        raise UserError(
            f"run: {folder} is a sweep; give one of its runs, {folder / POINTS}/lr_LR_wd_WD/seed_N"
        )
    configs, checkpoint = sorted(folder.glob("*.py")), newest_checkpoint(folder)
    if checkpoint is None:
        raise UserError(f"run: {folder} holds no segmentation run: there is no checkpoint iter_N.pth")
    if len(configs) != 1:
        found = ", ".join(path.name for path in configs) or "none"
        raise UserError(f"run: {folder} must hold one config, *.py; found: {found}")
    cfg = Config.fromfile(configs[0])
    cfg.test_pipeline[0].type = "PosfieldLoadImage"  # its errors name the file
    model: nn.Module = init_model(cfg, str(checkpoint), device=str(choose_device(device)))
    return model


def dataset_of_run(model: Any, split: str, folder: Path | None = None) -> Any:
    """A split of a run's data, or of another folder of that kind, as MMSegmentation's data set without crops.

    Raises:
        UserError: no such split, or the folder is incomplete.
    """
    if split not in SPLITS:
        raise UserError(f"split: {split!r} is none of {', '.join(SPLITS)}")
    cfg = model.cfg
    values = dict(cfg.val_dataloader.dataset)
    recipe = declared_protocol(
        next(hook.protocol for hook in cfg.custom_hooks if hook.type == "PosfieldRunHook")
    )
    data, index = locate(folder or values["data_root"], recipe), SPLITS.index(split)
    values["data_root"] = str(data.root)
    values["data_prefix"] = {"img_path": data.layout.images[index], "seg_map_path": data.layout.masks[index]}
    values |= {"ann_file": data.layout.lists[index], "img_suffix": data.layout.image_suffix}
    return DATASETS.build(values)


def spread(count: int, size: int) -> list[int]:
    """``count`` of the numbers 0 to ``size`` - 1, evenly spaced; all of them if there are fewer."""
    return sorted({round(i) for i in np.linspace(0, size - 1, min(count, size))})


def segment_dataset(model: Any, dataset: Any, indices: list[int]) -> Iterator[Segmented]:
    """Images of a data set, with their ground truth."""
    model.eval()
    for index in indices:
        with torch.no_grad():
            sample = model.val_step(pseudo_collate([dataset[index]]))[0]
        truth, predicted = (
            field.data.squeeze(0).cpu().numpy() for field in (sample.gt_sem_seg, sample.pred_sem_seg)
        )
        yield Segmented(Path(sample.img_path), read_rgb(sample.img_path), predicted, truth)


def segment_folder(model: Any, folder: Path) -> Iterator[Segmented]:
    """All images in a folder and below.

    Raises:
        UserError: there are none, or one cannot be read.
    """
    paths = [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in IMAGE_SUFFIXES]
    if not paths:
        raise UserError(f"images: no {', '.join(IMAGE_SUFFIXES)} in {folder}")
    for path in paths:
        predicted = inference_model(model, str(path)).pred_sem_seg.data.squeeze(0).cpu().numpy()
        yield Segmented(path, read_rgb(path), predicted)


def read_rgb(path: str | Path) -> np.ndarray:
    """[H, W, 3] uint8, the pixels that the model sees."""
    pixels: np.ndarray = mmcv.imread(str(path))
    return pixels[..., ::-1]
