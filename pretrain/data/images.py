"""A few whole images of a set in memory, for probes and analyses: the same ones each time."""

import filecmp
import hashlib
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from threading import Lock
from typing import Generic, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pretrain.data.broken import may_be_cut_off
from pretrain.data.decode import BrokenImage, decode, rgb_of, upright
from pretrain.data.sources import DataSettings, open_source
from pretrain.data.sources.files import read_file
from pretrain.errors import UserError
from pretrain.views.pixels import normalize, resize

MAX_PATCHES = 16_384  # of one image: an N x N matrix takes 1 GiB
READ_AHEAD = 64  # images in memory at a time, encoded or processed

AnyImage = str | os.PathLike[str] | Image.Image | np.ndarray
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
    source, one_at_a_time = open_source(data), Lock()

    def read(index: int) -> Made | BrokenImage:
        try:
            with one_at_a_time:
                content = source.read(index)
            return make(decode(content, max_mpx=data.max_mpx))
        except BrokenImage as error:
            return error

    found: Images[Made] = Images([], [], [])
    indices = spread(range(len(source)), most)
    for name, made in zip(map(source.name, indices), in_threads(read, indices)):
        if isinstance(made, BrokenImage):
            found.broken.append(f"{name}: {made}")
        else:
            found.names.append(name)
            found.pixels.append(made)
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


def cut_off(files: Sequence[Path]) -> list[str]:
    """Those that cannot be read, with the reason, of the files that a cheap look says may be cut off."""

    def reason(file: Path) -> str:
        try:
            with suppress(OSError), open(file, "rb") as opened:
                if not may_be_cut_off(opened):
                    return ""
            decode(read_file(os.fsencode(file)))
        except BrokenImage as error:
            return f"{file} cannot be read ({error})"
        return ""

    return [told for told in in_threads(reason, files) if told]


def square(pixels: np.ndarray, side_px: int, crop: bool) -> Tensor:
    """An image as uint8 [3, side, side], by antialiased bicubic resizing.

    Args:
        pixels: uint8 [H, W, 3].
        crop: take the central square; else squeeze the whole image.
    """
    if crop:
        short = min(pixels.shape[:2])
        top, left = ((side - short) // 2 for side in pixels.shape[:2])
        pixels = pixels[top : top + short, left : left + short]
    return resized(pixels, (side_px, side_px))


def resized(pixels: np.ndarray, size_px: tuple[int, int]) -> Tensor:
    """An image uint8 [H, W, 3] as uint8 [3, height, width], by antialiased bicubic resizing."""
    return torch.from_numpy(resize(np.ascontiguousarray(pixels), size_px)).permute(2, 0, 1).contiguous()


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


def center_crop(pixels: np.ndarray, resize_px: int, crop_px: int) -> Tensor:
    """An image as DINO's evaluations see it: its shorter side resized by PIL (bicubic), then the center.

    Args:
        pixels: uint8 [H, W, 3].

    Returns:
        uint8 [3, crop, crop].
    """
    from torchvision.transforms import functional as transforms  # loads torch's compiler: two seconds

    image = transforms.resize(Image.fromarray(pixels), resize_px, transforms.InterpolationMode.BICUBIC)
    return transforms.pil_to_tensor(transforms.center_crop(image, crop_px)).contiguous()


def pixels_of(image: AnyImage) -> np.ndarray:
    """An image as uint8 RGB [H, W, 3].

    Args:
        image: a path; a PIL image; or an array, uint8 [H, W, 3] or [H, W].

    Raises:
        UserError: it cannot be read, or is an array of another kind.
    """
    if isinstance(image, str | os.PathLike):
        return read_picture(Path(image))
    if isinstance(image, Image.Image):
        try:
            pixels = rgb_of(image)  # first: PIL turns a TIFF as it loads it
            return np.ascontiguousarray(upright(pixels, image))
        except BrokenImage as error:
            raise UserError(f"the image cannot be used ({error})") from error
    is_array = isinstance(image, np.ndarray)
    if not is_array or image.dtype != np.uint8 or image.shape[2:] not in ((), (3,)) or image.ndim < 2:
        told = f"{image.dtype} {image.shape}" if is_array else type(image).__name__
        raise UserError(f"an image is a path, a PIL image or a uint8 array [H, W, 3] or [H, W], not {told}")
    return image if image.ndim == 3 else np.repeat(image[..., None], 3, axis=2)


def as_input(image: AnyImage, patch_size: int, size_px: int | None) -> Tensor:
    """An image as a backbone takes it: :meth:`pretrain.backbones.vit.ViT.preprocess`."""
    pixels = pixels_of(image)
    if size_px is None:
        return normalize(whole(pixels, min(pixels.shape[:2]), patch_size))[None]
    return normalize(center_crop(pixels, round(size_px * 256 / 224), size_px))[None]


def check_grid(rows: int, columns: int, what: str) -> tuple[int, int]:
    """(rows, columns). Raises UserError, which names ``what``, if they are more than ``MAX_PATCHES``."""
    if rows * columns > MAX_PATCHES:
        raise UserError(
            f"{what} has {rows * columns} patches, more than {MAX_PATCHES}: take a smaller --size"
        )
    return rows, columns


def content_hash(images: Tensor) -> str:
    """12 hex digits of the SHA-256 of uint8 pixels on the CPU: two analyses saw the same."""
    return hashlib.sha256(images.contiguous().numpy().data).hexdigest()[:12]


def n_shared(train: Mapping[str, str], val: Mapping[str, str]) -> int:
    """How many images of a validation part are in the training part, too: of those that have one name in both,
    the ones that are one file or have the same content. Each part is {name within it: path}."""
    pairs = [(train[name], path) for name, path in val.items() if name in train]

    def is_same(one: str, other: str) -> bool:
        with suppress(OSError):
            return os.path.samefile(one, other) or filecmp.cmp(one, other, shallow=False)
        return False

    return sum(in_threads(lambda pair: is_same(*pair), pairs))


def spread(items: Sequence[Item], most: int) -> list[Item]:
    """At most ``most`` of the items, at equal steps from the first one."""
    n = min(len(items), most)
    return [items[i * len(items) // n] for i in range(n)]


def in_batches(
    function: Callable[[Item], Made], items: Iterable[Item], size: int
) -> Generator[list[Made], None, None]:
    """:func:`in_threads`, ``size`` at a time; the last batch may be smaller."""
    with closing(in_threads(function, items)) as made:
        while batch := list(islice(made, size)):
            yield batch


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
