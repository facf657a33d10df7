"""What a start costs before its first batch: a folder of small files, and annotations of COCO's size, made up.

Each part is measured in a process of its own, on files that were just written, so the system holds them in
memory: from a disk that has not read them, and from one on a network, all of it takes longer.
"""

import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from det_plugin.coco.annotations import Data, read_split
from det_plugin.coco.metrics import check_evaluation
from det_plugin.protocol import protocol
from pretrain.benchmark.turns import Work, in_turns
from pretrain.data.sources import DataSettings, open_source

FOLDER_FILES = 1000  # files of a folder, about as many as an ImageNet class has
# Of COCO 2017: images, and annotations
SPLITS = {"train": (118_287, 860_001), "val": (5_000, 36_781)}
N_CLASSES, SIZE_PX, N_POINTS = 80, (640, 480), (4, 40)


def measure(files: int = 200_000, shrink: int = 1) -> dict[str, Any]:
    """Seconds and peak memory of the parts of a start.

    Args:
        files: of the folder that a pre-training lists.
        shrink: divides the sizes of COCO's splits, for a quick look.

    Returns:
        ``seconds`` and ``peak_mib`` (above the imports) of ``list`` (open a folder of ``files`` images),
        ``digest`` (and look for all sizes), ``train`` and ``val`` (read and check annotations), ``evaluation``
        (the trial before the first iteration) and ``data`` (both splits with the headers and ends of all images).
    """
    with tempfile.TemporaryDirectory() as folder:
        root, coco = Path(folder) / "files", Path(folder) / "coco"
        write_files(root, files)
        for split, counts in SPLITS.items():
            write_split(coco, split, *(max(1, n // shrink) for n in counts))
        parts: dict[str, tuple[Callable[..., Work], tuple[Any, ...]]] = {
            "list": (listing, (str(root), False)),
            "digest": (listing, (str(root), True)),
            "train": (annotations, (str(coco), "train")),
            "val": (annotations, (str(coco), "val")),
            "evaluation": (evaluation, (str(coco),)),
            "data": (whole_data, (str(coco),)),
        }
        found = {name: in_turns({name: how}, "cpu", 1, warm_up=0)[name] for name, how in parts.items()}
    told: dict[str, Any] = {"files": files, "shrink": shrink}
    told["seconds"] = {name: round(figures.seconds[0], 3) for name, figures in found.items()}
    return told | {"peak_mib": {name: round(figures.peak_mib, 1) for name, figures in found.items()}}


def listing(root: str, with_digest: bool) -> Work:
    """Open a folder of images, as a pre-training does; with the digest, whose sizes it need not wait for."""

    def work() -> None:
        source = open_source(DataSettings(root=root))
        if with_digest:
            source.digest().values()

    return work


def annotations(root: str, split: str) -> Work:
    """Read and check a split's annotations."""
    return partial(read_split, root, split, num_classes=N_CLASSES, training=split == "train")


def evaluation(root: str) -> Work:
    """The trial of the evaluation."""
    split = read_split(root, "val", num_classes=N_CLASSES, training=False)
    return lambda: check_evaluation(split, protocol("coco-12ep", "vit_small_patch16"))


def whole_data(root: str) -> Work:
    """All that a detector's training reads before its first batch."""
    return lambda: Data.read(Path(root), protocol("coco-12ep", "vit_small_patch16"))


def write_files(root: Path, n: int) -> None:
    """``n`` files of about a kilobyte that are called images, in folders of :data:`FOLDER_FILES`."""
    for first in range(0, n, FOLDER_FILES):
        folder = root / f"n{first:08d}"
        folder.mkdir(parents=True)
        for i in range(first, min(n, first + FOLDER_FILES)):
            (folder / f"{folder.name}_{i:06d}.JPEG").write_bytes(
                b"\xff\xd8" + bytes(900 + i % 100) + b"\xff\xd9"
            )


def write_split(root: Path, split: str, n_images: int, n_objects: int) -> None:
    """A split of gray images of :data:`SIZE_PX`, and annotations with a polygon of 4 to 40 points each."""
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    (root / f"{split}2017").mkdir()
    rng, (width, height) = np.random.default_rng(n_images), SIZE_PX
    gray = cv2.imencode(".jpg", np.full((height, width, 3), 128, np.uint8))[1].tobytes()
    images = []
    for id in range(1, n_images + 1):
        name = f"{id:012d}.jpg"
        (root / f"{split}2017" / name).write_bytes(gray)
        images.append({"id": id, "file_name": name, "width": width, "height": height})
    corners = rng.uniform(0, (width - 100, height - 100), (n_objects, 2)).round(2)
    sides, points = rng.uniform(5, 100, (n_objects, 2)).round(2), rng.integers(*N_POINTS, n_objects)
    owners, classes = rng.integers(1, n_images + 1, n_objects), rng.integers(1, N_CLASSES + 1, n_objects)
    angles = {n: np.linspace(0, 2 * np.pi, n, endpoint=False) for n in range(*N_POINTS)}
    circles = {n: (1 + np.stack([np.cos(a), np.sin(a)], axis=1)) / 2 for n, a in angles.items()}
    objects = []
    for k, (corner, side, n) in enumerate(zip(corners, sides, points.tolist())):
        polygon = (corner + side * circles[n]).round(2).ravel().tolist()
        whose = {"id": k + 1, "image_id": int(owners[k]), "category_id": int(classes[k]), "iscrowd": 0}
        mask = {"segmentation": [polygon], "area": float(side.prod())}
        objects.append({**whose, "bbox": [*corner.tolist(), *side.tolist()], **mask})
    categories = [{"id": id, "name": f"class {id}"} for id in range(1, N_CLASSES + 1)]
    content = {"images": images, "annotations": objects, "categories": categories}
    file = root / "annotations" / f"instances_{split}2017.json"
    file.write_text(json.dumps(content), encoding="utf-8")
