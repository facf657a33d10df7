"""A tiny COCO data set whose every pixel is known: plain rectangles and discs, made on the spot."""

import json
from pathlib import Path

import cv2
import numpy as np

CATEGORIES = {3: "rectangle", 7: "disc", 90: "bar"}  # ids with gaps, as in COCO
COLORS = {3: (220, 60, 60), 7: (60, 200, 90), 90: (70, 90, 230)}
SIZES = ((96, 64), (64, 96), (128, 100), (80, 80), (100, 128), (72, 120))  # width, height in turns


def polygon_of(kind: int, x: int, y: int, w: int, h: int) -> list[float]:
    """Corners in pixels; discs and bars are polygons, too."""
    if kind == 7:
        angles = np.linspace(0, 2 * np.pi, 24, endpoint=False)
        points = np.stack([x + w / 2 + w / 2 * np.cos(angles), y + h / 2 + h / 2 * np.sin(angles)], axis=1)
    else:
        points = np.array([(x, y), (x + w, y), (x + w, y + h), (x, y + h)], float)
    return points.round(2).ravel().tolist()


def shapes(index: int, width: int, height: int) -> list[tuple[int, int, int, int, int]]:
    """Two objects (category, x, y, w, h) of the image ``index``, apart from each other."""
    rng = np.random.default_rng([7, index])
    found = []
    for half, kind in enumerate(rng.permutation(list(CATEGORIES))[:2].tolist()):
        w, h = rng.integers(14, width // 2 - 6), rng.integers(14, height - 8)
        h = max(h // 3, 6) if kind == 90 else h
        x, y = half * (width // 2) + rng.integers(2, width // 2 - w - 1), rng.integers(2, height - h - 2)
        found.append((kind, int(x), int(y), int(w), int(h)))
    return found


def write_coco(root: Path, n_train: int = 6, n_val: int = 4) -> Path:
    """Write the set. The last image of each split is empty; the first has a crowd (RLE) and an RLE in
    place of a polygon."""
    (root / "annotations").mkdir(parents=True)
    for split, n, first_id in (("train", n_train, 1), ("val", n_val, 1001)):
        (root / f"{split}2017").mkdir()
        images, annotations = [], []
        for i in range(n):
            width, height = SIZES[i % len(SIZES)]
            image = np.full((height, width, 3), 40 + 10 * (i % 8), np.uint8)
            objects = shapes(first_id + i, width, height) if i < n - 1 else []
            for number, (kind, x, y, w, h) in enumerate(objects):
                polygon = polygon_of(kind, x, y, w, h)
                cv2.fillPoly(image, [np.array(polygon).reshape(-1, 2).round().astype(np.int32)], COLORS[kind])
                segmentation = (
                    rle_of_box(width, height, x, y, w, h) if i == number == 0 and kind != 7 else [polygon]
                )
                annotations.append(
                    annotation(len(annotations) + 1, first_id + i, kind, (x, y, w, h), segmentation)
                )
            if i == 0:
                crowd = rle_of_box(width, height, 0, 0, 8, 8)
                annotations.append(
                    {**annotation(len(annotations) + 1, first_id, 3, (0, 0, 8, 8), crowd), "iscrowd": 1}
                )
            name = f"{first_id + i:012d}.png"
            assert cv2.imwrite(str(root / f"{split}2017" / name), image[:, :, ::-1])
            images.append({"id": first_id + i, "file_name": name, "width": width, "height": height})
        categories = [{"id": id, "name": name} for id, name in CATEGORIES.items()]
        content = {"images": images, "annotations": annotations, "categories": categories}
        annotation_file(root, split).write_text(json.dumps(content))
    return root


def annotation(
    id: int, image_id: int, category_id: int, box: tuple[int, int, int, int], segmentation
) -> dict:
    """One COCO annotation; the area is the box's."""
    area = box[2] * box[3]
    named = {
        "id": id,
        "image_id": image_id,
        "category_id": category_id,
        "bbox": list(box),
        "area": area,
        "iscrowd": 0,
    }
    return {**named, "segmentation": segmentation}


def annotation_file(root: Path, split: str) -> Path:
    """Where the annotations of a split lie."""
    return root / "annotations" / f"instances_{split}2017.json"


def rle_of_box(width: int, height: int, x: int, y: int, w: int, h: int) -> dict:
    """An uncompressed RLE (column by column) of a rectangle."""
    mask = np.zeros((height, width), np.uint8)
    mask[y : y + h, x : x + w] = 1
    flat = mask.ravel(order="F")
    edges = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff([0, *edges, len(flat)]).tolist()
    return {"size": [height, width], "counts": [0, *counts] if flat[0] else counts}


def edit(file: Path, change) -> None:
    """Let ``change`` change an annotation file's content in place."""
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def relayout(root: Path, layout: str) -> Path:
    """Rename a fresh set's files into another layout; what ``locate`` takes for it."""
    for split in ("train", "val"):
        folder, file = root / f"{split}2017", annotation_file(root, split)
        if layout == "roboflow":
            folder = folder.rename(root / ("valid" if split == "val" else split))
            file.rename(folder / "_annotations.coco.json")
        elif layout in ("plain", "plain instances"):
            folder.rename(root / split)
            file.rename(file.with_name(f"{split}.json" if layout == "plain" else f"instances_{split}.json"))
        elif layout == "yaml":
            (root / "mine").mkdir(exist_ok=True)
            folder.rename(root / "mine" / f"pictures {split}")
            file.rename(root / "mine" / f"{split}ing.json")
    if layout != "yaml":
        return root
    lines = (f"{s}: {{annotations: mine/{s}ing.json, images: mine/pictures {s}}}\n" for s in ("train", "val"))
    (root / "data.yaml").write_text("".join(lines))
    return root / "data.yaml"
