"""Detect objects in your own images, or segment them, with a run of posfield detect or posfield segment.

posfield predict --run runs/det --images photos/ --output found

OUTPUT/predictions.json is one COCO file: images (id, file_name, width, height), categories (id, name), and
annotations with image_id, category_id, bbox, area, segmentation (RLE; none where the run learned boxes alone),
iscrowd 0 and score; pycocotools reads it as it is. OUTPUT/pictures/ holds the images with masks, boxes, names
and scores. Of a segmenter, OUTPUT/labels/ holds a PNG an image, stored as the masks of its training data are,
and OUTPUT/classes.txt says what the values mean. Images that cannot be read are named and skipped.
"""

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from det_plugin.coco.masks import coco_api
from det_plugin.coco.metrics import Prediction
from det_plugin.figures import draw_prediction
from det_plugin.predict import Detections, Detector, load_detector
from det_plugin.run import engine_of
from pretrain.cli import command_parser
from pretrain.data.sources.files import hidden, is_image, left_out
from pretrain.errors import TRUST_HELP, UserError
from pretrain.files import put_in_place
from pretrain.log import ProgressLine, log


def listed(given: list[Path], output: Path) -> list[tuple[Path, str]]:
    """Each image's path, and its name in the results: relative to a single given folder, otherwise as given.

    Images in the output folder are left out; other files of a folder are counted and named in a line of the log.
    """
    found: list[tuple[Path, str]] = []
    for root in given:
        if root.is_dir():
            inside = [Path(folder) / name for folder, _, names in os.walk(root) for name in names]
            for path in sorted(path for path in inside if is_image(os.fsencode(path.name))):
                found.append((path, (path.relative_to(root) if len(given) == 1 else path).as_posix()))
            names = [os.fsencode(path.relative_to(root)) for path in inside if output not in path.parents]
            others = [name for name in names if not is_image(name) and not hidden(name)]
            if others:
                log(left_out(others, root))
        elif root.is_file():
            found.append((root, root.name if len(given) == 1 else root.as_posix()))
        else:
            raise UserError(f"--images: no file or folder {root}")
    own = Path(os.path.realpath(output))  # Path.resolve fails where links point at each other
    found = [(at, name) for at, name in dict(found).items() if own not in Path(os.path.realpath(at)).parents]
    if not found:
        raise UserError(f"--images: no images in {', '.join(map(str, given))}")
    return found


class Results:
    """``predictions.json``. Annotations go to disk as they come. The file gets its name once whole."""

    def __init__(self, folder: Path, classes: dict[int, str]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self.partial = folder / "predictions.json", folder / ".predictions.json.partial"
        self.classes, self.images, self.annotations = classes, list[dict[str, object]](), 0
        self.file = open(self.partial, "w")
        self.file.write('{"annotations": [')

    def add(self, name: str, found: Detections) -> None:
        """Add what was found in an image."""
        number, (height, width, _) = len(self.images) + 1, found.image.shape
        self.images.append({"id": number, "file_name": name, "height": height, "width": width})
        for prediction in found.results:
            whole = {"id": self.annotations + 1, "image_id": number, **prediction}
            whole |= {"area": area_of(prediction), "iscrowd": 0}
            self.file.write((",\n" if self.annotations else "\n") + json.dumps(whole))
            self.annotations += 1

    def close(self) -> None:
        """Write the rest and give the file its name. Without an image nothing stays."""
        images = json.dumps(self.images)
        categories = json.dumps([{"id": id, "name": name} for id, name in self.classes.items()])
        self.file.write(f'\n], "images": {images}, "categories": {categories}}}\n')
        self.file.close()
        if self.images:
            put_in_place(self.partial, self.path)
        else:
            self.partial.unlink()


def area_of(prediction: Prediction) -> float:
    """In pixels: of the mask, or of the box of a prediction without one."""
    if "segmentation" in prediction:
        return int(coco_api().mask.area(prediction["segmentation"]))
    return float(prediction["bbox"][2] * prediction["bbox"][3])


def picture_paths(names: list[str], folder: Path, suffix: str = ".jpg") -> Iterator[Path]:
    """A path for a picture of each image: always below ``folder``, and no two are the same."""
    taken = set()
    for number, name in enumerate(names, 1):
        parts = [part for part in Path(name).parts if part not in ("..", Path(name).anchor)]
        path = folder.joinpath(*parts)
        kept = path.suffix.lower() in {suffix, ".jpeg" if suffix == ".jpg" else suffix}
        path = path if kept else path.with_name(f"{path.name}{suffix}")
        path = path if path not in taken else path.with_name(f"{path.stem}_{number}{suffix}")
        taken.add(path)
        yield path


def detected(
    detector: Detector, images: list[tuple[Path, str]], output: Path, min_score: float, pictures: bool
) -> str:
    """Detect in one image after another. Returns what to say at the end."""
    results = Results(output, detector.classes)

    def detect(path: Path, name: str) -> np.ndarray | None:
        found = detector.predict(path, min_score)
        results.add(name, found)
        return draw_prediction(found.image, found.results, detector.classes) if pictures else None

    try:
        told = over_images(detect, images, output / "pictures")
    except UserError:
        results.close()
        raise
    results.close()
    return f"{results.annotations} objects in {told}: {results.path}"


def segmented(
    run: Path, device: str, trust: bool, images: list[tuple[Path, str]], output: Path, pictures: bool
) -> str:
    """Segment one image after another. Returns what to say at the end."""
    from seg_plugin.figures import blended, palette_of, save_labels
    from seg_plugin.predict import load_segmenter, read_rgb

    segmenter = load_segmenter(run, device, trust)
    palette, values = palette_of(segmenter.metainfo), segmenter.metainfo["values"]
    names = [name for _, name in images]
    as_png = [str(Path(name).with_suffix(".png")) for name in names]
    maps = dict(zip(names, picture_paths(as_png, output / "labels", ".png")))

    def segment(path: Path, name: str) -> np.ndarray | None:
        pixels = read_rgb(path)
        labels = segmenter.predict(pixels).labels
        save_labels(maps[name], labels, palette, values)
        return blended(pixels, labels, palette) if pictures else None

    told = over_images(segment, images, output / "pictures")
    meaning = [f"{value}: {name}\n" for value, name in zip(values, segmenter.classes)]
    (output / "classes.txt").write_text("".join(meaning))
    return f"label maps of {told}: {output / 'labels'}"


def over_images(
    predict: Callable[[Path, str], np.ndarray | None], images: list[tuple[Path, str]], pictures: Path
) -> str:
    """Call ``predict(path, name)`` for each image, and save the picture that it gives, if any, into ``pictures``. An
    image that cannot be read is named and skipped.

    Returns:
        ``N images, K skipped``.

    Raises:
        UserError: none can be read.
    """
    skipped, line, started = 0, ProgressLine("predict", len(images), 0), time.monotonic()
    paths = picture_paths([name for _, name in images], pictures)
    try:
        for done, ((path, name), file) in enumerate(zip(images, paths), 1):
            try:
                picture = predict(path, name)
            except UserError as error:
                plain = dict[str, Any](style=None, markup=False, highlight=False, soft_wrap=True)
                line.console.print(f"skipped: {error}", **plain)
                skipped += 1
                continue
            if picture is not None:
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(picture).save(file, quality=92)
            left_s = (time.monotonic() - started) / done * (len(images) - done)
            line.update(done, f"{done - skipped} images", left_s)
    finally:
        line.close()
    if skipped == len(images):
        raise UserError(f"--images: none of {len(images)} files could be read as an image")
    return f"{len(images) - skipped} images" + (f", {skipped} skipped" if skipped else "")


def main(arguments: list[str]) -> None:
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("--run", type=Path, required=True, metavar="DIR", help="run folder of a fine-tuning")
    add("--images", type=Path, required=True, nargs="+", metavar="PATH", help="images, or folders of them")
    add("--output", type=Path, required=True, metavar="DIR", help="predictions.json and pictures/")
    add("--min-score", type=float, default=0.5, metavar="S", help="of an object, at least (%(default)s)")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="(%(default)s)")
    add("--no-pictures", action="store_true", help="predictions.json alone")
    add("--trust", action="store_true", help=TRUST_HELP)
    options = parser.parse_args(arguments)
    images = listed(options.images, options.output)
    pictures = not options.no_pictures
    if engine_of(options.run) is None and list(options.run.glob("*.py")):
        print(segmented(options.run, options.device, options.trust, images, options.output, pictures))
        return
    detector = load_detector(options.run, options.device, options.trust)
    print(detected(detector, images, options.output, options.min_score, pictures))
