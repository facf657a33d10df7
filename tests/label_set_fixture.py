"""Tiny labeled sets in the real layouts of Pascal VOC 2012, ADE20K, COCO-Stuff 164k and of one's own folders,
made on the spot.

Every image is a plain ground with rectangles and a strip of void along its top; color and stripes tell the
class, so that a linear layer over patches can learn it. Each function writes ``n_train`` and ``n_val`` images
below ``root`` and returns ``root``, which ``open_label_set(root, part)`` takes (COCO: with its kind). The
classes that occur:

* ``write_voc``: background, aeroplane, bicycle, bird (of 21); trainaug unless ``augmented=False``.
* ``write_ade``: wall, building, sky, floor (of 150).
* ``write_coco``: sky, tree, grass (stuff) and person, dog, car (things), in ``stuffthingmaps``; for both
  kinds.
* ``write_folder``: four, stored as ``values``, by default 0 .. 3; flat with lists if ``flat``.
"""

import struct
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = (64, 80)  # height, width in pixels; every second image is turned
COLORS = np.array(
    [(90, 90, 90), (210, 60, 50), (60, 170, 70), (60, 80, 210), (215, 200, 70), (150, 70, 180)], np.uint8
)
COCO_VALUES = {"sky-other": 156, "tree": 168, "grass": 123, "person": 0, "dog": 17, "car": 2}  # category - 1
COCO_VOID, VOC_VOID = 255, 255
VOID_ROWS = 3


def scene(index: int, n_classes: int, size: tuple[int, int] = SIZE) -> tuple[np.ndarray, np.ndarray]:
    """Pixels uint8 [H, W, 3] and classes [H, W] in 0 .. n_classes - 1, -1 in the strip of void."""
    rng = np.random.default_rng([17, index])
    classes = np.full(size, index % n_classes)
    for _ in range(3):
        top, left = rng.integers(0, size[0] // 2), rng.integers(0, size[1] // 2)
        classes[top : top + size[0] // 2, left : left + size[1] // 2] = rng.integers(n_classes)
    stripes = 25 * ((np.arange(size[1])[None] // (1 + classes)) % 2)  # [H, W], of a width of its own a class
    pixels = COLORS[classes] + stripes[..., None] - 12 + rng.normal(0, 6, (*size, 3))
    classes[:VOID_ROWS] = -1
    pixels = np.clip(pixels, 0, 255).astype(np.uint8)
    return (pixels.transpose(1, 0, 2), classes.T) if index % 2 else (pixels, classes)


def save_scene(
    index: int, image: Path, label_map: Path, values: Sequence[int], void: int, palette: bool = False
) -> None:
    """An image and its map, in which class k is stored as ``values[k]``."""
    pixels, classes = scene(index, len(values))
    stored = np.array([*values, void])[classes]
    image.parent.mkdir(parents=True, exist_ok=True)
    label_map.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(image, quality=95)
    save_map(label_map, stored, palette)


def save_map(file: Path, values: np.ndarray, palette: bool = False) -> None:
    """Values [H, W] as a PNG of 8 bits, gray or with a palette, or of 16."""
    made = Image.fromarray(np.asarray(values).astype(np.uint8 if values.max() < 256 else np.uint16))
    if palette:
        made.putpalette([channel for k in range(256) for channel in (k, 255 - k, 128)])
    made.save(file)


def gray_png(values: np.ndarray, bits: int, size: tuple[int, int] | None = None) -> bytes:
    """A gray PNG of 1 to 8 bits a pixel, which PIL writes with 8 alone; ``size``: the height and width
    that it declares."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    planes = (values.astype(np.uint8)[..., None] >> np.arange(bits)[::-1]) & 1  # [H, W, bits]
    rows = np.packbits(planes.reshape(len(values), -1), axis=1)
    height, width = size or values.shape
    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def _parts(n_train: int, n_val: int) -> list[tuple[str, int]]:
    """Part and index of each image; no two parts share one."""
    return [("train", i) for i in range(n_train)] + [("val", 1000 + i) for i in range(n_val)]


def write_voc(root: Path, n_train: int = 6, n_val: int = 3, augmented: bool = True) -> Path:
    """``root/VOC2012`` as in VOCdevkit. With ``augmented``, VOC's own train is the first half, trainaug
    all of ``n_train``."""
    home = root / "VOC2012"
    names: dict[str, list[str]] = {"train": [], "val": []}
    for part, index in _parts(n_train, n_val):
        name = f"2007_{index:06d}"
        own = part == "val" or not augmented or index < (n_train + 1) // 2
        if part == "train" and augmented:
            aug = home / "SegmentationClassAug" / f"{name}.png"
            save_scene(index, home / "JPEGImages" / f"{name}.jpg", aug, range(4), VOC_VOID)
        if own:
            own_map = home / "SegmentationClass" / f"{name}.png"
            save_scene(index, home / "JPEGImages" / f"{name}.jpg", own_map, range(4), VOC_VOID, palette=True)
            names[part].append(name)
    lists = home / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    for part in names:
        (lists / f"{part}.txt").write_text("\n".join(names[part]) + "\n")
    if augmented:
        (lists / "trainaug.txt").write_text("".join(f"2007_{index:06d}\n" for index in range(n_train)))
    (home / "JPEGImages" / "2008_000001.jpg").write_bytes(b"of detection alone, never read")
    return root


def write_ade(root: Path, n_train: int = 6, n_val: int = 3) -> Path:
    """``root/ADEChallengeData2016/{images,annotations}/{training,validation}``."""
    for part, index in _parts(n_train, n_val):
        folder, home = {"train": "training", "val": "validation"}[part], root / "ADEChallengeData2016"
        name = f"ADE_{part}_{index:08d}"
        save_scene(
            index,
            home / f"images/{folder}/{name}.jpg",
            home / f"annotations/{folder}/{name}.png",
            (1, 2, 3, 4),
            0,
        )
    return root


def write_coco(
    root: Path, n_train: int = 6, n_val: int = 3, value: Callable[[int], int] = lambda stored: stored
) -> Path:
    """``root/images/{train,val}2017`` and ``root/stuffthingmaps/{train,val}2017``; ``value`` of what
    164k's maps hold is stored."""
    values = [value(stored) for stored in COCO_VALUES.values()]
    for part, index in _parts(n_train, n_val):
        image, label_map = (root / kind / f"{part}2017" for kind in ("images", "stuffthingmaps"))
        save_scene(
            index, image / f"{index:012d}.jpg", label_map / f"{index:012d}.png", values, value(COCO_VOID)
        )
    return root


def write_folder(
    root: Path, n_train: int = 6, n_val: int = 3, flat: bool = False, values: Sequence[int] = (0, 1, 2, 3),
    void: int = 255,
) -> Path:  # fmt: skip
    """``root/{images,masks}/{train,val}``; ``flat``: ``root/{images,masks}`` and the lists ``train.txt``
    and ``val.txt``."""
    for part, index in _parts(n_train, n_val):
        within = "" if flat else part
        save_scene(
            index,
            root / "images" / within / f"{index}.jpg",
            root / "masks" / within / f"{index}.png",
            values,
            void,
        )
        if flat:
            with (root / f"{part}.txt").open("a") as file:
                file.write(f"{index}\n")
    return root
