"""The demo's images: textured shapes composed on photographs (:mod:`pretrain.data.toy_sets` writes them as
data sets).

The photographs lie inside the installed packages scikit-image and scikit-learn and are read by path (nothing
is imported from them or downloaded). ``chelsea``, ``flower``, ``camera`` and ``brick`` are held out:
validation images are made of these alone, background and surfaces of objects alike; the training and
pre-training images never use them.
"""

import importlib.util
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import cv2
import numpy as np

from pretrain.errors import UserError

SPLITS = ("pretrain", "train", "val")

# A shape is one or two outlines: the distances of its corners from the center, at equal angles. Two outlines:
# a hole.
SHAPES = {
    "disc": [[1.0] * 64],
    "square": [[1.0] * 4],
    "triangle": [[1.0] * 3],
    "star": [[1.0, 0.45] * 5],
    "ring": [[1.0] * 64, [0.55] * 64],
}
CLASSES = tuple(SHAPES)

# scikit-learn's photographs lie in another package; the motorcycles are one scene, so both stay in one set.
TRAIN_PHOTOGRAPHS = ("astronaut.png", "china.jpg", "coffee.png", "grass.png", "gravel.png", "hubble_deep_field.jpg",
                     "motorcycle_left.png", "motorcycle_right.png", "rocket.jpg")  # fmt: skip
VAL_PHOTOGRAPHS = ("brick.png", "camera.png", "chelsea.png", "flower.jpg")
SKLEARN_PHOTOGRAPHS = ("china.jpg", "flower.jpg")

SIZE_RANGE = (0.2, 0.65)  # of an object, in short sides of the image
MAX_OBJECTS = 5
MIN_VISIBLE = 0.3  # of the part of an object that lies inside the image
MIN_AREA_PX = 40
TEXTURES = ("stripes", "checks", "noise", "gradient", "photograph")
FAVOURITE_TEXTURE = 0.4  # chance of the class's own texture (the k-th of class k); otherwise any
# Chance of the class's own hue; otherwise two colors of a photograph. Minutes of training learn this much
FAVOURITE_HUE = 0.75


@dataclass(frozen=True)
class Picture:
    """A composed image and what is visible in it; objects from back to front."""

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
    """The names that the images of a split ("pretrain", "train" or "val") are made of."""
    return [Path(file).stem for file in (VAL_PHOTOGRAPHS if split == "val" else TRAIN_PHOTOGRAPHS)]


def _locate(file: str) -> Path:
    of_sklearn = "sklearn", "scikit-learn", "datasets/images"
    package, name, inside = of_sklearn if file in SKLEARN_PHOTOGRAPHS else ("skimage", "scikit-image", "data")
    spec = importlib.util.find_spec(package)  # finds the folder without the cost of the import
    if spec is None or not spec.submodule_search_locations:
        told = f"the toy data is made of photographs in {name}, not installed"
        raise UserError(f"{told}: pip install 'posfield[demo]'")
    path = Path(spec.submodule_search_locations[0]) / inside / file
    if not path.is_file():
        raise UserError(f"{path} is missing in the installed {name}: pip install --force-reinstall {name}")
    return path


@cache
def _photograph(name: str) -> np.ndarray:
    """[H, W, 3] uint8 RGB; gray photographs with three equal channels."""
    path = photographs()[name]
    bgr = cv2.imread(str(path), cv2.IMREAD_COLOR)
    if bgr is None:
        raise UserError(f"{path} is not a readable picture")
    return cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB)


def _crop(random: np.random.Generator, name: str, height: int, width: int) -> np.ndarray:
    """[height, width, 3] float32 in 0..255: a random part of a photograph, perhaps mirrored, recolored."""
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
    for points in map(_outline, SHAPES[CLASSES[kind]]):
        bend = 1 + depth * np.sin(waves * np.arctan2(points[:, 1], points[:, 0]) + phase)
        # OpenCV: 1/16 pixel
        outlines.append(np.round((points * bend[:, None] @ to_picture.T + center) * 16).astype(np.int32))

    canvas = np.zeros((height, width), np.uint8)
    # even-odd: the second outline is a hole
    cv2.fillPoly(canvas, outlines, 255, lineType=cv2.LINE_AA, shift=4)
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
    """The objects worth drawing, back to front, each with its visible part [H, W] bool."""
    covered = np.zeros(objects[0].alpha.shape, bool)
    kept = []
    for item in reversed(objects):
        mask = item.alpha >= 0.5
        seen = mask & ~covered
        if seen.sum() >= max(MIN_AREA_PX, MIN_VISIBLE * mask.sum()):
            kept.append((item, seen))
            covered |= mask
    return kept[::-1]


def _surface(
    random: np.random.Generator, item: _Object, names: list[str], light: float
) -> tuple[np.ndarray, str]:
    """The texture of an object over the whole image, [H, W, 3] float32 in 0..255, and its photograph."""
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
        # colors of the real world
        first, second = palette[random.integers(len(palette), size=2)].astype(np.float32)
        own = _colors(random, item.kind)
        if random.random() < FAVOURITE_HUE:
            first, second = own
        surface = first + (second - first) * blend
    shade = 1 + random.uniform(0.1, 0.4) * np.clip(np.cos(light) * x + np.sin(light) * y, -1, 1)[..., None]
    return np.clip(surface * shade + random.uniform(-10, 10), 0, 255).astype(np.float32), name


def _colors(random: np.random.Generator, kind: int) -> np.ndarray:
    """[2, 3] float32 RGB in 0..255: a light and a dark color of the class's hue."""
    hue = (180 * (kind + random.uniform(-0.2, 0.2)) / len(CLASSES)) % 180  # OpenCV: 180 is the full circle
    lights = random.uniform(190, 255), random.uniform(70, 140)
    hsv = np.array([[[hue, random.uniform(150, 255), light] for light in lights]])
    return cv2.cvtColor(hsv.astype(np.uint8), cv2.COLOR_HSV2RGB)[0].astype(np.float32)


def compose(index: int, split: str, seed: int, size_px: int) -> Picture:
    """Image ``index`` of a split; it depends on these arguments alone.

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
