"""The demo's data in the layouts of COCO, ADE20K and an image folder.

Masks are stored as polygons along the pixel borders, in whole pixels. This is the one form of COCO that is
exact everywhere: pycocotools fills precisely the mask's pixels, and loaders that accept polygons alone
(Detectron2's default) work too. ``segmentation`` is a union of polygons and cannot express a hole, so a mask
with a hole is cut through the hole into pieces without one.
"""

import importlib.metadata
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from pretrain.data.toy import CLASSES, SPLITS, Picture, compose, photographs, photographs_of
from pretrain.errors import UserError
from pretrain.files import put_in_place, remove

GENERATOR_VERSION = 1  # raise it when the same arguments give other images
# of COCO, with a gap as in the real data set; class k is category CATEGORY_IDS[k]
CATEGORY_IDS = (1, 2, 3, 5, 6)
ADE_RIM, ADE_BACKGROUND, ADE_FIRST_CLASS = 0, 1, 2  # class k is label k + 2
MIN_SIZE_PX = 64  # below it many objects would fall under toy.MIN_AREA_PX
JPEG_QUALITY = 90


def mask_to_polygons(mask: np.ndarray) -> list[list[int]]:
    """A mask [H, W] bool as COCO polygons ``[[x0, y0, x1, y1, ...], ...]`` that decode to exactly this mask.

    One polygon for each part that is 4-connected and has a 4-connected outside, which makes it free of holes
    and of points where it touches itself (Detectron2's cropping of polygons would fill the hole of a
    self-touching one).
    """
    n, parts = cv2.connectedComponents(mask.astype(np.uint8), connectivity=4)
    polygons = []
    for part in (parts == k for k in range(1, n)):
        around = np.pad(~part, 1, constant_values=True).astype(np.uint8)
        _, outside = cv2.connectedComponents(around, connectivity=4)
        holes = (outside[1:-1, 1:-1] > 1) & ~part  # outside[0, 0] is 1
        if holes.any():
            # the hole's first column
            cut = int(np.flatnonzero((outside[1:-1, 1:-1] == outside.max()).any(0))[0])
            left, right = part.copy(), part.copy()
            left[:, cut:], right[:, :cut] = False, False
            polygons += mask_to_polygons(left) + mask_to_polygons(right)
        else:
            polygons.append(_border(part))
    return polygons


def _border(part: np.ndarray) -> list[int]:
    """The border of a part without holes, corner by corner: x0, y0, x1, y1, ... in whole pixels."""
    padded = np.pad(part, 1).astype(np.int8)
    # [H + 1, W + 1] pixels at a point
    around = padded[:-1, :-1] + padded[:-1, 1:] + padded[1:, :-1] + padded[1:, 1:]
    y, x = np.nonzero(around % 2)  # the border turns where 1 or 3 of 4 pixels are inside
    # The corners of a row, from left to right, are the ends of its edges, two and two; likewise in a column.
    along_row, along_column = np.empty_like(x), np.empty_like(x)
    for partner, order in ((along_row, np.lexsort((x, y))), (along_column, np.lexsort((y, x)))):
        partner[order[0::2]], partner[order[1::2]] = order[1::2], order[0::2]
    corners, at = [], 0
    for step in range(len(x)):
        corners += [int(x[at]), int(y[at])]
        at = (along_row if step % 2 == 0 else along_column)[at]
    return corners


def ade_labels(picture: Picture) -> np.ndarray:
    """The label map [H, W] uint8 of ADE20K: 0 rim, 1 background, 2... the classes.

    The rim is the outermost pixel of an object, where it borders on the background or on an object behind it.
    """
    depth = np.zeros(picture.image.shape[:2], np.uint8)  # 0 background, 1 the hindmost object, ...
    labels = np.full_like(depth, ADE_BACKGROUND)
    for k, (mask, kind) in enumerate(zip(picture.masks, picture.classes)):
        depth[mask], labels[mask] = k + 1, ADE_FIRST_CLASS + kind
    labels[cv2.erode(depth, cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))) < depth] = ADE_RIM
    return labels


def _annotation(mask: np.ndarray, kind: int, image_id: int, annotation_id: int) -> dict[str, Any]:
    x, y = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
    box = [x[0], y[0], x[-1] - x[0] + 1, y[-1] - y[0] + 1]  # left, top, width, height
    return {
        "id": annotation_id, "image_id": image_id, "category_id": CATEGORY_IDS[kind], "iscrowd": 0,
        "bbox": [int(v) for v in box], "area": int(mask.sum()), "segmentation": mask_to_polygons(mask),
    }  # fmt: skip


def write_toy_data(folder: str | Path, *, n_images: int = 400, n_train: int = 240, n_val: int = 60,
                   size_px: int = 160, seed: int = 0, overwrite: bool = False,
                   tell: Callable[[], None] = lambda: None) -> dict[str, Any]:  # fmt: skip
    """Write ``folder/{images,coco,ade,toy.json}`` and return toy.json's content, with ``written`` added.

    ``written`` is False when the folder already held the data of these arguments and was left as it is.
    toy.json comes last: without it a folder is unfinished and is begun anew.

    ``tell`` is called once a picture is written.

    Raises :class:`UserError` for a folder with data of other arguments (unless ``overwrite``) or with folders
    of these names that are not ours (always), for a negative number, and for ``size_px`` below 64.
    """
    request = {"generator": GENERATOR_VERSION, "n_images": n_images, "n_train": n_train, "n_val": n_val,
               "size_px": size_px, "seed": seed}  # fmt: skip
    for key, value in request.items():
        if value < 0 or (key == "size_px" and value < MIN_SIZE_PX):
            raise UserError(f"{key} = {value}: must be at least {MIN_SIZE_PX if key == 'size_px' else 0}")
    folder = Path(folder)
    existing = read_record(folder)
    if existing is not None and not overwrite:
        if all(existing.get(key) == value for key, value in request.items()):
            return {**existing, "written": False}
        told = ", ".join(f"{key} {existing.get(key)}" for key in request if existing.get(key) != request[key])
        raise UserError(
            f"{folder} holds toy data of other arguments ({told}); another folder, or --overwrite"
        )
    photographs()  # a missing package is told before anything is removed or written
    packages = {name: importlib.metadata.version(name) for name in ("numpy", "scikit-image", "scikit-learn")}
    record = {
        **request,
        "classes": dict(zip(CLASSES, CATEGORY_IDS)),
        "photographs": {split: photographs_of(split) for split in SPLITS},
        "packages": packages | {"opencv": cv2.__version__},
    }
    unfinished = _begin(folder, ours=existing is not None)
    for index in range(n_images):
        _write_jpeg(folder / "images" / f"{index:08d}.jpg", compose(index, "pretrain", seed, size_px).image)
        tell()
    _write_labeled(folder, "train", n_train, seed, size_px, tell)
    _write_labeled(folder, "val", n_val, seed, size_px, tell)
    unfinished.write_text(json.dumps(record, indent=2) + "\n")
    put_in_place(unfinished, folder / "toy.json")
    return {**record, "written": True}


def read_record(folder: Path) -> dict[str, Any] | None:
    """toy.json of a finished folder; None where there is none. UserError when it is not one of ours."""
    path = Path(folder) / "toy.json"
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text())
    except ValueError:
        record = None
    if not isinstance(record, dict) or "generator" not in record:
        told = "is damaged or was not written by make_toy_data: remove it or give another folder"
        raise UserError(f"{path} {told}")
    return record


def _begin(folder: Path, ours: bool) -> Path:
    """Empty a folder of ours, mark it unfinished, make its folders; returns the mark, toy.json.unfinished."""
    unfinished, finished = folder / "toy.json.unfinished", folder / "toy.json"
    present = [folder / name for name in ("images", "coco", "ade") if (folder / name).exists()]
    if present and not ours and not unfinished.exists():
        raise UserError(f"{present[0]} exists and was not written by make_toy_data: give another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        unfinished.touch()  # before anything is removed: an interrupted run must not pass for a finished one
    except OSError as error:
        raise UserError(f"cannot write to the folder {folder}: {error.strerror}") from None
    for path in (finished, *present):
        remove(path)
    (folder / "images").mkdir()
    return unfinished


def _write_labeled(
    folder: Path, split: str, n: int, seed: int, size_px: int, tell: Callable[[], None]
) -> None:
    """The same images as COCO (``coco/``) and as ADE20K (``ade/ADEChallengeData2016/``)."""
    coco, ade = folder / "coco", folder / "ade" / "ADEChallengeData2016"
    ade_split = {"train": "training", "val": "validation"}[split]
    images_and_maps = [ade / kind / ade_split for kind in ("images", "annotations")]
    targets = [coco / f"{split}2017", *images_and_maps, coco / "annotations"]
    for target in targets:
        target.mkdir(parents=True, exist_ok=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in range(n):
        picture = compose(index, split, seed, size_px)
        # odd and even: no id is in both files, as in COCO
        image_id = 2 * index + (1 if split == "train" else 2)
        height, width = picture.image.shape[:2]
        images.append({"id": image_id, "file_name": f"{image_id:012d}.jpg", "height": height, "width": width,
                       "license": 1})  # fmt: skip
        for mask, kind in zip(picture.masks, picture.classes):
            annotations.append(_annotation(mask, kind, image_id, len(annotations) + 1))
        _write_jpeg(targets[0] / f"{image_id:012d}.jpg", picture.image)
        _write_jpeg(targets[1] / f"ADE_{split}_{index + 1:08d}.jpg", picture.image)
        _write_encoded(targets[2] / f"ADE_{split}_{index + 1:08d}.png", ade_labels(picture), [])
        tell()
    # Without these, a reader has but numbers, and the rim is a class
    (ade / "classes.txt").write_text("\n".join(("rim", "background", *CLASSES)) + "\n")
    (ade / "labels.yaml").write_text(f"void: [{ADE_RIM}, 255]\n")
    categories = [{"id": k, "name": name, "supercategory": "shape"} for name, k in zip(CLASSES, CATEGORY_IDS)]
    content = {"info": {"description": "posfield toy data", "version": str(GENERATOR_VERSION)},
               "licenses": [{"id": 1, "name": "as the photographs in scikit-image and scikit-learn", "url": ""}],
               "images": images, "annotations": annotations, "categories": categories}  # fmt: skip
    (targets[3] / f"instances_{split}2017.json").write_text(json.dumps(content, separators=(",", ":")))


def _write_jpeg(path: Path, image: np.ndarray) -> None:
    _write_encoded(path, cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])


def _write_encoded(path: Path, pixels: np.ndarray, options: list[int]) -> None:
    # cv2.imwrite would fail silently
    path.write_bytes(cv2.imencode(path.suffix, pixels, options)[1].tobytes())
