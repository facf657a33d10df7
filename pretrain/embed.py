"""One vector an image: the public :func:`embed`."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pretrain.backbones.vit import ViT
from pretrain.build import build_backbone
from pretrain.data.decode import BrokenImage, decode
from pretrain.data.images import AnyImage, center_crop, in_threads, pixels_of
from pretrain.data.sources import DataSettings, Source, open_source
from pretrain.device import choose_device
from pretrain.errors import UserError
from pretrain.evaluation.features import frozen
from pretrain.views.pixels import normalize


def embed(
    images: str | Path | Sequence[AnyImage],
    weights: str | Path | ViT,
    *,
    size_px: int = 224,
    batch_size: int = 32,
    device: str = "auto",
) -> Tensor:
    """One vector an image: the [CLS] token after the final norm.

    Args:
        images: a list of paths, PIL images or uint8 arrays; or what ``data.root`` takes (a folder, a list
            file, tar shards, ...), in its order.
        weights: any file of weights that says its backbone, or a backbone.
        size_px: side of the central square that is seen, as DINO's evaluations cut it.

    Returns:
        float32 [n, D], on the CPU.

    Raises:
        UserError: an image or the weights cannot be read; names the file.
    """
    where = choose_device(device)
    backbone = (weights if isinstance(weights, ViT) else build_backbone(weights)).to(where)
    read: Callable[[Any], np.ndarray] = pixels_of
    items: Iterable[Any] = [] if isinstance(images, str | Path) else images
    if isinstance(images, str | Path):
        source = open_source(DataSettings(root=str(images)))
        items, read = range(len(source)), partial(_read, source)

    def cropped(item: Any) -> Tensor:
        return center_crop(read(item), round(size_px * 256 / 224), size_px)

    vectors = []
    with frozen(backbone), closing(in_threads(cropped, items)) as crops:
        while batch := list(islice(crops, batch_size)):
            vectors.append(backbone(normalize(torch.stack(batch).to(where))).cls.float().cpu())
    if not vectors:
        raise UserError("embed: no images are given")
    return torch.cat(vectors)


def _read(source: Source, index: int) -> np.ndarray:
    try:
        return decode(source.read(index))
    except BrokenImage as error:
        raise UserError(f"{source.name(index)} cannot be read ({error}); leave it out") from error
