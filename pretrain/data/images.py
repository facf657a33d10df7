"""A few whole images of a set in memory, for probes and analyses: the same ones each time."""

import hashlib
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.data.decode import BrokenImage, decode
from pretrain.data.sources import DataSettings, open_source
from pretrain.data.sources.files import read_file
from pretrain.errors import UserError

MAX_PATCHES = 16_384  # of one image: an N x N matrix takes 1 GiB
READ_AHEAD = 64  # images in memory at a time, encoded or processed

Item = TypeVar("Item")
Made = TypeVar("Made")


@dataclass(frozen=True)
class Images(Generic[Made]):
    """The images that could be read.

    Attributes:
        names: of n images.
        pixels: what was made of each.
        broken: images that could not be read, with the reason.
    """

    names: list[str]
    pixels: list[Made]
    broken: list[str]


def read_images(data: DataSettings, most: int, make: Callable[[np.ndarray], Made]) -> Images[Made]:
    """At most ``most`` images of ``data.root``, at equal steps from the first.

    Args:
        make: pixels of one image, uint8 [H, W, 3] -> what to keep of it; called in threads.

    Raises:
        UserError: the source is bad (names its key); no image can be read.
    """
    source = open_source(data)

    def encoded() -> Iterator[tuple[str, bytes | BrokenImage]]:
        for index in spread(range(len(source)), most):
            try:
                yield source.name(index), source.read(index)
            except BrokenImage as error:
                yield source.name(index), error

    def made(image: tuple[str, bytes | BrokenImage]) -> tuple[str, Made | None, str]:
        name, content = image
        if isinstance(content, BrokenImage):
            return name, None, str(content)
        try:
            return name, make(decode(content, max_mpx=data.max_mpx)), ""
        except BrokenImage as error:
            return name, None, str(error)

    found: Images[Made] = Images([], [], [])
    for name, picture, reason in in_threads(made, encoded()):
        if picture is None:
            found.broken.append(f"{name}: {reason}")
        else:
            found.names.append(name)
            found.pixels.append(picture)
    if not found.names:
        raise UserError(
            f"none of the {len(found.broken)} images of {data.root} can be read; the first: {found.broken[0]}"
        )
    return found


def read_picture(file: Path) -> np.ndarray:
    """An image file as uint8 [H, W, 3], upright.

    Raises:
        UserError: it cannot be read; names the file.
    """
    try:
        return decode(read_file(os.fsencode(file)))
    except BrokenImage as error:
        raise UserError(f"{file} cannot be read ({error})") from error


def square(pixels: np.ndarray, side_px: int, crop: bool) -> Tensor:
    """An image as uint8 [3, side, side], by antialiased bicubic resizing.

    Args:
        pixels: uint8 [H, W, 3].
        crop: take the central square; else squeeze the whole image.
    """
    height, width = pixels.shape[:2]
    if crop:
        short = min(height, width)
        top, left = (height - short) // 2, (width - short) // 2
        pixels = pixels[top : top + short, left : left + short]
    return resized(pixels, (side_px, side_px))


def resized(pixels: np.ndarray, size_px: tuple[int, int]) -> Tensor:
    """An image uint8 [H, W, 3] as uint8 [3, height, width], by antialiased bicubic resizing."""
    image = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None]
    return F.interpolate(image, size=size_px, mode="bicubic", antialias=True)[0].contiguous()


def whole(pixels: np.ndarray, short_px: int, patch_size: int) -> Tensor:
    """An image as uint8 [3, H, W] in its aspect, both sides rounded to whole patches; antialiased bicubic.

    Args:
        pixels: uint8 [h, w, 3].
        short_px: the shorter side, before rounding.

    Raises:
        UserError: more than ``MAX_PATCHES`` patches.
    """
    scale = short_px / min(pixels.shape[:2])
    rows, columns = (max(1, round(side * scale / patch_size)) for side in pixels.shape[:2])
    check_grid(rows, columns, f"a picture of {pixels.shape[1]} x {pixels.shape[0]} at size {short_px}")
    return resized(pixels, (rows * patch_size, columns * patch_size))


def check_grid(rows: int, columns: int, what: str) -> tuple[int, int]:
    """(rows, columns). Raises UserError, which names ``what``, if they are more than ``MAX_PATCHES``."""
    if rows * columns > MAX_PATCHES:
        raise UserError(
            f"{what} has {rows * columns} patches, more than {MAX_PATCHES}: take a smaller --size"
        )
    return rows, columns


def content_hash(images: Tensor) -> str:
    """12 hex digits of the SHA-256 of uint8 pixels on the CPU: tells whether two analyses saw the same
    pixels."""
    return hashlib.sha256(images.contiguous().numpy().data).hexdigest()[:12]


def spread(items: Sequence[Item], most: int) -> list[Item]:
    """At most ``most`` of the items, at equal steps from the first one."""
    n = min(len(items), most)
    return [items[i * len(items) // n] for i in range(n)]


def in_threads(function: Callable[[Item], Made], items: Iterable[Item]) -> Generator[Made, None, None]:
    """``function`` of each item, in order; threads work up to ``READ_AHEAD`` items ahead of the caller."""
    items = iter(items)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        waiting = deque(pool.submit(function, item) for item in islice(items, READ_AHEAD))
        try:
            while waiting:
                made = waiting.popleft().result()
                waiting.extend(pool.submit(function, item) for item in islice(items, 1))
                yield made
        finally:
            pool.shutdown(cancel_futures=True)
