"""The demo's data: textured shapes on photographs, written in the layouts of COCO, ADE20K and an image folder.

The photographs lie inside the installed packages scikit-image and scikit-learn and are read by path (nothing is
imported from them or downloaded). ``chelsea``, ``flower``, ``camera`` and ``brick`` are held out: validation pictures
are made of these alone, background and surfaces of objects alike; the training and pre-training pictures never use them.

Masks are stored as polygons along the pixel borders, in whole pixels. This is the one form of COCO that is exact
everywhere: pycocotools fills precisely the mask's pixels, and loaders that accept polygons alone (Detectron2's
default) work too. ``segmentation`` is a union of polygons and cannot express a hole, so a mask with a hole is cut
through the hole into pieces without one.
"""

import importlib.metadata
import importlib.util
import json
import os
import shutil
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from pretrain.errors import UserError

GENERATOR_VERSION = 1  # raise it when the same arguments give other pictures
SPLITS = ("pretrain", "train", "val")

# A shape is one or two outlines: the distances of its corners from the centre, at equal angles. Two outlines: a hole.
SHAPES = {
    "disc": [[1.0] * 64],
    "square": [[1.0] * 4],
    "triangle": [[1.0] * 3],
    "star": [[1.0, 0.45] * 5],
    "ring": [[1.0] * 64, [0.55] * 64],
}
CLASSES = tuple(SHAPES)
CATEGORY_IDS = (1, 2, 3, 5, 6)  # of COCO, with a gap as in the real data set; class k is category CATEGORY_IDS[k]
ADE_RIM, ADE_BACKGROUND, ADE_FIRST_CLASS = 0, 1, 2  # class k is label k + 2

# scikit-learn's photographs lie in another package; the motorcycles are one scene, so both stay in one set.
TRAIN_PHOTOGRAPHS = ("astronaut.png", "china.jpg", "coffee.png", "grass.png", "gravel.png", "hubble_deep_field.jpg",
                     "motorcycle_left.png", "motorcycle_right.png", "rocket.jpg")  # fmt: skip
VAL_PHOTOGRAPHS = ("brick.png", "camera.png", "chelsea.png", "flower.jpg")
SKLEARN_PHOTOGRAPHS = ("china.jpg", "flower.jpg")

SIZE_RANGE = (0.12, 0.55)  # of an object, in short sides of the picture
MAX_OBJECTS = 6
MIN_VISIBLE = 0.3  # of the part of an object that lies inside the picture
MIN_AREA_PX = 40
MIN_SIZE_PX = 64  # below it many objects would fall under MIN_AREA_PX
TEXTURES = ("stripes", "checks", "noise", "gradient", "photograph")
FAVOURITE_TEXTURE = 0.2  # chance of the class's own texture (the k-th of class k); otherwise any, so a weak hint only
JPEG_QUALITY = 90


@dataclass(frozen=True)
class Picture:
    """A composed picture and what is visible in it; objects from back to front."""

    image: np.ndarray  # [H, W, 3] uint8 RGB
    masks: list[np.ndarray]  # each [H, W] bool: the visible part; disjoint
    classes: list[int]  # index into CLASSES
    photographs: frozenset[str]  # the names (keys of `photographs`) whose pixels it holds


@dataclass(frozen=True)
class _Object:
    kind: int
    center: np.ndarray  # [2] x, y in pixels
    radius: float  # pixels
    alpha: np.ndarray  # [H, W] float32: coverage in 0..1, soft at the edge


def photographs() -> dict[str, Path]:
    """The photographs by name, for example ``{"astronaut": Path(".../skimage/data/astronaut.png")}``.

    Raises :class:`UserError` that names the package or the file when one is missing.
    """
    return {Path(file).stem: _locate(file) for file in TRAIN_PHOTOGRAPHS + VAL_PHOTOGRAPHS}


def photographs_of(split: str) -> list[str]:
    """The names that the pictures of a split ("pretrain", "train" or "val") are made of."""
    return [Path(file).stem for file in (VAL_PHOTOGRAPHS if split == "val" else TRAIN_PHOTOGRAPHS)]


def _locate(file: str) -> Path:
    package, name, inside = ("skimage", "scikit-image", "data")
    if file in SKLEARN_PHOTOGRAPHS:
        package, name, inside = ("sklearn", "scikit-learn", "datasets/images")
    spec = importlib.util.find_spec(package)  # finds the folder without the cost of the import
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"the toy data is made of photographs in {name}, not installed: pip install scikit-image scikit-learn")
    path = Path(spec.submodule_search_locations[0]) / inside / file
    if not path.is_file():
        raise UserError(f"{path} is missing in the installed {name}: pip install --force-reinstall {name}")
    return path


@cache
def _photograph(name: str) -> np.ndarray:
    """[H, W, 3] uint8 RGB; grey photographs with three equal channels."""
    path = photographs()[name]
    bgr = cv2.imread(str(path), cv2.IMREAD_COLOR)
    if bgr is None:
        raise UserError(f"{path} is not a readable picture")
    return cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB)


def _crop(random: np.random.Generator, name: str, height: int, width: int) -> np.ndarray:
    """[height, width, 3] float32 in 0..255: a random part of a photograph, perhaps mirrored, mildly recoloured."""
    photograph = _photograph(name)
    scale = min(photograph.shape[0] / height, photograph.shape[1] / width) * random.uniform(0.4, 1.0)
    h, w = max(1, round(height * scale)), max(1, round(width * scale))
    top, left = random.integers(photograph.shape[0] - h + 1), random.integers(photograph.shape[1] - w + 1)
    part = photograph[top : top + h, left : left + w]
    part = cv2.resize(part, (width, height), interpolation=cv2.INTER_AREA if scale > 1 else cv2.INTER_LINEAR)
    if random.random() < 0.5:
        part = part[:, ::-1]
    gain = random.uniform(0.75, 1.25) * random.uniform(0.92, 1.08, size=3)
    return np.clip(part * gain + random.uniform(-15, 15), 0, 255).astype(np.float32)


def _place(random: np.random.Generator, height: int, width: int) -> _Object:
    """An object of random class, place, size, aspect, rotation and mild deformation."""
    short = min(height, width)
    kind = int(random.integers(len(CLASSES)))
    center = np.array([width, height]) * random.uniform(0.08, 0.92, size=2)
    radius = 0.5 * short * float(np.exp(random.uniform(*np.log(SIZE_RANGE))))
    stretch = np.exp(random.uniform(-0.15, 0.15))
    angle, axis = random.uniform(0, 2 * np.pi, size=2)
    to_picture = _rotation(axis) @ np.diag([stretch, 1 / stretch]) @ _rotation(angle) * radius
    waves, depth, phase = random.integers(2, 5), random.uniform(0, 0.06), random.uniform(0, 2 * np.pi)

    outlines = []
    for distances in SHAPES[CLASSES[kind]]:
        points = _outline(distances)
        theta = np.arctan2(points[:, 1], points[:, 0])
        points = points * (1 + depth * np.sin(waves * theta + phase))[:, None]
        outlines.append(np.round((points @ to_picture.T + center) * 16).astype(np.int32))  # OpenCV: 1/16 pixel

    canvas = np.zeros((height, width), np.uint8)
    cv2.fillPoly(canvas, outlines, 255, lineType=cv2.LINE_AA, shift=4)  # even-odd: the second outline is a hole
    alpha = cv2.GaussianBlur(canvas.astype(np.float32) / 255, (0, 0), random.uniform(0.4, 0.8))
    return _Object(kind, center, radius, alpha)


def _outline(distances: list[float]) -> np.ndarray:
    """[N, 2] points along the closed polygon whose corners lie at these distances, at equal angles."""
    angles = np.linspace(0, 2 * np.pi, len(distances), endpoint=False)
    corners = np.stack([np.cos(angles), np.sin(angles)], 1) * np.array(distances)[:, None]
    steps = np.linspace(0, 1, 16, endpoint=False)[None, :, None]  # fine enough to bend the edges
    return (corners[:, None] * (1 - steps) + np.roll(corners, -1, 0)[:, None] * steps).reshape(-1, 2)


def _rotation(angle: float) -> np.ndarray:
    return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])


def _visible(objects: list[_Object]) -> list[tuple[_Object, np.ndarray]]:
    """The objects worth drawing, back to front, each with its visible part [H, W] bool.

    From front to back, so that an object which is left out covers none of those behind it.
    """
    covered = np.zeros(objects[0].alpha.shape, bool)
    kept = []
    for item in reversed(objects):
        mask = item.alpha >= 0.5
        seen = mask & ~covered
        if seen.sum() >= max(MIN_AREA_PX, MIN_VISIBLE * mask.sum()):
            kept.append((item, seen))
            covered |= mask
    return kept[::-1]


def _surface(random: np.random.Generator, item: _Object, names: list[str], light: float) -> tuple[np.ndarray, str]:
    """The texture of an object over the whole picture, [H, W, 3] float32 in 0..255, and the photograph behind it."""
    texture = TEXTURES[item.kind if random.random() < FAVOURITE_TEXTURE else random.integers(len(TEXTURES))]
    name = str(random.choice(names))
    height, width = item.alpha.shape
    x = (np.arange(width, dtype=np.float32)[None] - item.center[0]) / item.radius  # [1, W] in radii
    y = (np.arange(height, dtype=np.float32)[:, None] - item.center[1]) / item.radius  # [H, 1]
    angle, period = random.uniform(0, 2 * np.pi), random.uniform(0.3, 0.9)
    u, v = np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x  # [H, W]
    if texture == "photograph":
        surface = _crop(random, name, height, width)
    else:
        if texture == "stripes":
            blend = np.sin(2 * np.pi * u / period)
        elif texture == "checks":
            blend = np.sin(np.pi * u / period) * np.sin(np.pi * v / period)
        elif texture == "noise":
            cells = 1 + np.ceil(np.array([height, width]) / (item.radius * period)).astype(int)
            blend = cv2.resize(random.standard_normal(cells), (width, height), interpolation=cv2.INTER_CUBIC)
        else:
            blend = 0.6 * u
        blend = np.clip(0.5 + (0.5 if texture == "gradient" else 1.5) * blend, 0, 1)[..., None]
        palette = _photograph(name).reshape(-1, 3)
        first, second = palette[random.integers(len(palette), size=2)].astype(np.float32)  # colours of the real world
        surface = first + (second - first) * blend
    shade = 1 + random.uniform(0.1, 0.4) * np.clip(np.cos(light) * x + np.sin(light) * y, -1, 1)[..., None]
    return np.clip(surface * shade + random.uniform(-10, 10), 0, 255).astype(np.float32), name


def compose(index: int, split: str, seed: int, size_px: int) -> Picture:
    """Picture ``index`` of a split; it depends on these arguments alone.

    ``size_px`` is the short side; the long side is 1 to 4/3 of it, lying or standing.
    """
    random = np.random.default_rng([seed, SPLITS.index(split), index])
    names = photographs_of(split)
    sides = [size_px, round(size_px * random.uniform(1, 4 / 3))]
    height, width = sides if random.random() < 0.6 else sides[::-1]
    background = str(random.choice(names))
    image = _crop(random, background, height, width)
    others = [name for name in names if name != background]

    shown: list[tuple[_Object, np.ndarray]] = []
    while not shown:  # a single tiny object may have been left out
        shown = _visible([_place(random, height, width) for _ in range(random.integers(1, MAX_OBJECTS + 1))])
    used, light = {background}, random.uniform(0, 2 * np.pi)
    for item, _ in shown:
        surface, name = _surface(random, item, others, light)
        image = image + item.alpha[..., None] * (surface - image)
        used.add(name)
    pixels = np.round(image).astype(np.uint8)
    return Picture(pixels, [mask for _, mask in shown], [item.kind for item, _ in shown], frozenset(used))


def mask_to_polygons(mask: np.ndarray) -> list[list[int]]:
    """A mask [H, W] bool as COCO polygons ``[[x0, y0, x1, y1, ...], ...]`` that decode to exactly this mask.

    One polygon for each part that is 4-connected and has a 4-connected outside, which makes it free of holes and of
    points where it touches itself (Detectron2's cropping of polygons would fill the hole of a self-touching one).
    """
    n, parts = cv2.connectedComponents(mask.astype(np.uint8), connectivity=4)
    polygons = []
    for part in (parts == k for k in range(1, n)):
        _, outside = cv2.connectedComponents(np.pad(~part, 1, constant_values=True).astype(np.uint8), connectivity=4)
        holes = (outside[1:-1, 1:-1] > 1) & ~part  # outside[0, 0] is 1
        if holes.any():
            cut = int(np.flatnonzero((outside[1:-1, 1:-1] == outside.max()).any(0))[0])  # the hole's first column
            left, right = part.copy(), part.copy()
            left[:, cut:], right[:, :cut] = False, False
            polygons += mask_to_polygons(left) + mask_to_polygons(right)
        else:
            polygons.append(_border(part))
    return polygons


def _border(part: np.ndarray) -> list[int]:
    """The border of a part without holes, corner by corner: x0, y0, x1, y1, ... in whole pixels."""
    padded = np.pad(part, 1).astype(np.int8)
    around = padded[:-1, :-1] + padded[:-1, 1:] + padded[1:, :-1] + padded[1:, 1:]  # [H + 1, W + 1] pixels at a point
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
                   size_px: int = 160, seed: int = 0, overwrite: bool = False) -> dict[str, Any]:  # fmt: skip
    """Write ``folder/{images,coco,ade,toy.json}`` and return toy.json's content, with ``written`` added.

    ``written`` is False when the folder already held the data of these arguments and was left as it is. toy.json
    comes last: without it a folder is unfinished and is begun anew.

    Raises :class:`UserError` for a folder with data of other arguments (unless ``overwrite``) or with folders of
    these names that are not ours (always), for a negative number, and for ``size_px`` below 64.
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
        raise UserError(f"{folder} holds toy data of other arguments ({told}); another folder, or --overwrite")
    photographs()  # a missing package is told before anything is removed or written
    record = {
        **request,
        "classes": dict(zip(CLASSES, CATEGORY_IDS)),
        "photographs": {split: photographs_of(split) for split in SPLITS},
        "packages": {name: importlib.metadata.version(name) for name in ("numpy", "scikit-image", "scikit-learn")}
        | {"opencv": cv2.__version__},
    }
    unfinished = _begin(folder, ours=existing is not None)
    for index in range(n_images):
        _write_jpeg(folder / "images" / f"{index:08d}.jpg", compose(index, "pretrain", seed, size_px).image)
    _write_labelled(folder, "train", n_train, seed, size_px)
    _write_labelled(folder, "val", n_val, seed, size_px)
    unfinished.write_text(json.dumps(record, indent=2) + "\n")
    os.replace(unfinished, folder / "toy.json")
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
        raise UserError(f"{path} is damaged or was not written by make_toy_data: remove it or give another folder")
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
    finished.unlink(missing_ok=True)
    for path in present:
        shutil.rmtree(path)
    (folder / "images").mkdir()
    return unfinished


def _write_labelled(folder: Path, split: str, n: int, seed: int, size_px: int) -> None:
    """The same pictures as COCO (``coco/``) and as ADE20K (``ade/ADEChallengeData2016/``)."""
    coco, ade = folder / "coco", folder / "ade" / "ADEChallengeData2016"
    ade_split = {"train": "training", "val": "validation"}[split]
    targets = [coco / f"{split}2017", ade / "images" / ade_split, ade / "annotations" / ade_split, coco / "annotations"]
    for target in targets:
        target.mkdir(parents=True, exist_ok=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in range(n):
        picture = compose(index, split, seed, size_px)
        image_id = 2 * index + (1 if split == "train" else 2)  # odd and even: no id is in both files, as in COCO
        height, width = picture.image.shape[:2]
        images.append({"id": image_id, "file_name": f"{image_id:012d}.jpg", "height": height, "width": width,
                       "license": 1})  # fmt: skip
        for mask, kind in zip(picture.masks, picture.classes):
            annotations.append(_annotation(mask, kind, image_id, len(annotations) + 1))
        _write_jpeg(targets[0] / f"{image_id:012d}.jpg", picture.image)
        _write_jpeg(targets[1] / f"ADE_{split}_{index + 1:08d}.jpg", picture.image)
        _write_encoded(targets[2] / f"ADE_{split}_{index + 1:08d}.png", ade_labels(picture), [])
    (ade / "classes.txt").write_text("\n".join(("background", *CLASSES)) + "\n")  # without it, a reader has but numbers
    categories = [{"id": k, "name": name, "supercategory": "shape"} for name, k in zip(CLASSES, CATEGORY_IDS)]
    content = {"info": {"description": "posfield toy data", "version": str(GENERATOR_VERSION)},
               "licenses": [{"id": 1, "name": "as the photographs in scikit-image and scikit-learn", "url": ""}],
               "images": images, "annotations": annotations, "categories": categories}  # fmt: skip
    (targets[3] / f"instances_{split}2017.json").write_text(json.dumps(content, separators=(",", ":")))


def _write_jpeg(path: Path, image: np.ndarray) -> None:
    _write_encoded(path, cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])


def _write_encoded(path: Path, pixels: np.ndarray, options: list[int]) -> None:
    path.write_bytes(cv2.imencode(path.suffix, pixels, options)[1].tobytes())  # cv2.imwrite would fail silently
