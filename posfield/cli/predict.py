"""Detect objects in your own images, or segment them, with a run of posfield detect or posfield segment.

posfield predict --run runs/det --images photos/ --output found
posfield predict --run runs/det --images aerial.tif --output found --tile 1024      (small objects in large images)
posfield predict --run runs/seg --images drive.mp4 --output found --every 10        (every tenth frame of a video)

OUTPUT/predictions.json is one COCO file: images (id, file_name, width, height), categories (id, name), and
annotations with image_id, category_id, bbox, area, segmentation (RLE; none where the run learned boxes alone),
iscrowd 0 and score; pycocotools reads it as it is. OUTPUT/predictions.jsonl has a line an image with its objects.
OUTPUT/pictures/ holds the images with masks, boxes, names and scores. Of a segmenter, OUTPUT/labels/ holds a PNG an
image, stored as the masks of its training data are, OUTPUT/classes.txt says what the values mean, and a line of
predictions.jsonl how many pixels each class has. A frame of a video is an image called NAME#FRAME, its pictures are a
video again. Images that cannot be read are named and skipped.
"""

import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from det_plugin.coco.masks import coco_api
from det_plugin.coco.metrics import Prediction
from det_plugin.figures import draw_prediction
from det_plugin.predict import Detections, Detector, load_detector
from det_plugin.run import engine_of
from pretrain.cli import at_least, command_parser
from pretrain.data.images import AnyImage
from pretrain.data.sources.files import hidden, is_image, left_out
from pretrain.errors import TRUST_HELP, UserError, one_line
from pretrain.files import put_in_place, replacing, write_text, writing
from pretrain.log import ProgressLine, log

VIDEOS = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v")
FRAME = "#"  # between a video's name and a frame's number


def listed(given: list[Path], output: Path) -> list[tuple[Path, str]]:
    """Each image's path, and its name in the results: relative to a single given folder, otherwise as given.

    Images in the output folder are left out; other files of a folder are counted and named in a line of the log.
    """
    found: list[tuple[Path, str]] = []
    for root in given:
        if root.is_dir():
            inside = [Path(folder) / name for folder, _, names in os.walk(root) for name in names]
            for path in sorted(path for path in inside if is_image(os.fsencode(path.name)) or is_video(path)):
                found.append((path, (path.relative_to(root) if len(given) == 1 else path).as_posix()))
            names = [os.fsencode(path.relative_to(root)) for path in inside if output not in path.parents]
            seen = (name for name in names if not is_video(Path(os.fsdecode(name))) and not hidden(name))
            others = [name for name in seen if not is_image(name)]
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


class Lines:
    """``predictions.jsonl``: a line an image, as they come. The file gets its name once whole."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self.partial = folder / "predictions.jsonl", folder / ".predictions.jsonl.partial"
        self.n, self.file = 0, open(self.partial, "w")

    def add(self, name: str, image: np.ndarray, **found: object) -> None:
        """Add what was found in an image [H, W, 3]."""
        height, width = image.shape[:2]
        with writing(self.path):
            self.file.write(json.dumps({"file_name": name, "width": width, "height": height, **found}) + "\n")
        self.n += 1

    def close(self) -> None:
        """Give the file its name. Without an image nothing stays."""
        with writing(self.path):
            self.file.close()
            if self.n:
                put_in_place(self.partial, self.path)
        self.partial.unlink(missing_ok=True)


class Results:
    """``predictions.json``. Annotations go to disk as they come. The file gets its name once whole."""

    def __init__(self, folder: Path, classes: dict[int, str]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self.partial = folder / "predictions.json", folder / ".predictions.json.partial"
        self.classes, self.images, self.annotations = classes, list[dict[str, object]](), 0
        self.lines = Lines(folder)
        self.file = open(self.partial, "w")
        self.file.write('{"annotations": [')

    def add(self, name: str, found: Detections) -> None:
        """Add what was found in an image."""
        number, (height, width, _) = len(self.images) + 1, found.image.shape
        self.images.append({"id": number, "file_name": name, "height": height, "width": width})
        for prediction in found.results:
            whole = {"id": self.annotations + 1, "image_id": number, **prediction}
            whole |= {"area": area_of(prediction), "iscrowd": 0}
            with writing(self.path):
                self.file.write((",\n" if self.annotations else "\n") + json.dumps(whole))
            self.annotations += 1
        objects = [{"label": label, **p} for label, p in zip(found.labels, found.results)]
        self.lines.add(name, found.image, objects=objects)

    def close(self) -> None:
        """Write the rest and give the file its name. Without an image nothing stays."""
        images = json.dumps(self.images)
        categories = json.dumps([{"id": id, "name": name} for id, name in self.classes.items()])
        with writing(self.path):
            self.file.write(f'\n], "images": {images}, "categories": {categories}}}\n')
            self.file.close()
            if self.images:
                put_in_place(self.partial, self.path)
        self.partial.unlink(missing_ok=True)
        self.lines.close()


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


@dataclass(frozen=True)
class Options:
    """How images are looked at and drawn: :func:`main`'s."""

    min_score: float
    tile_px: int
    overlap: float
    every: int
    pictures: bool


def detected(detector: Detector, images: list[tuple[Path, str]], output: Path, options: Options) -> str:
    """Detect in one image after another. Returns what to say at the end."""
    results = Results(output, detector.classes)

    def detect(image: AnyImage, name: str) -> np.ndarray | None:
        found = detector.predict(image, options.min_score, options.tile_px, options.overlap)
        results.add(name, found)
        return draw_prediction(found.image, found.results, detector.classes) if options.pictures else None

    try:
        told = over_images(detect, images, output / "pictures", options.every)
    except UserError:
        results.close()
        raise
    results.close()
    return f"{results.annotations} objects in {told}: {results.path}"


def segmented(
    run: Path, device: str, trust: bool, images: list[tuple[Path, str]], output: Path, options: Options
) -> str:
    """Segment one image after another. Returns what to say at the end."""
    from seg_plugin.figures import blended, palette_of, save_labels
    from seg_plugin.predict import load_segmenter, read_rgb

    segmenter = load_segmenter(run, device, trust)
    palette, values = palette_of(segmenter.metainfo), segmenter.metainfo["values"]
    names = [name for _, name in images]
    as_png = [str(Path(name).with_suffix(".png")) for name in names]
    maps = dict(zip(names, picture_paths(as_png, output / "labels", ".png")))
    lines = Lines(output)

    def segment(image: AnyImage, name: str) -> np.ndarray | None:
        pixels = read_rgb(image)
        labels = segmenter.predict(pixels).labels
        video, _, frame = name.rpartition(FRAME)
        path = maps[name] if name in maps else maps[video].with_suffix("") / f"{int(frame):06d}.png"
        save_labels(path, labels, palette, values)
        counts = np.bincount(labels.ravel(), minlength=len(segmenter.classes))
        found = {kind: int(n) for kind, n in zip(segmenter.classes, counts) if n}
        lines.add(name, pixels, label_map=path.relative_to(output).as_posix(), pixels=found)
        return blended(pixels, labels, palette) if options.pictures else None

    try:
        told = over_images(segment, images, output / "pictures", options.every)
    finally:
        lines.close()
    meaning = [f"{value}: {name}\n" for value, name in zip(values, segmenter.classes)]
    write_text(output / "classes.txt", "".join(meaning))
    return f"label maps of {told}: {output / 'labels'}"


def is_video(path: Path) -> bool:
    """Whether a file is a video, by its name."""
    return path.suffix.lower() in VIDEOS


class Video:
    """Frames of a video file, uint8 RGB [H, W, 3].

    Args:
        every: take each n-th frame, from the first.

    Raises:
        UserError: it cannot be read.
    """

    def __init__(self, path: Path, every: int) -> None:
        self.path, self.every, self.source = path, every, cv2.VideoCapture(str(path))
        if not self.source.isOpened():
            raise UserError(
                f"{path} cannot be read as a video; other containers: ffmpeg -i {path.name} video.mp4"
            )
        n = int(self.source.get(cv2.CAP_PROP_FRAME_COUNT))  # as the file says, often a guess
        self.fps, self.n_frames = self.source.get(cv2.CAP_PROP_FPS) or 25.0, max(-(-n // every), 1)

    def __iter__(self) -> Iterator[tuple[int, np.ndarray]]:
        """Numbers of the frames, from 0, and their pixels."""
        try:
            for number in count():
                if not self.source.grab():
                    break
                if number % self.every == 0:
                    is_whole, pixels = self.source.retrieve()
                    if is_whole:
                        yield number, np.ascontiguousarray(pixels[..., ::-1])
        finally:
            self.source.release()


class VideoPictures:
    """A video of drawn frames, all as large as the first, with its name once whole: ``clip.avi.mp4`` for ``clip.avi.jpg``."""

    def __init__(self, path: Path, fps: float) -> None:
        self.path, self.fps = path.with_suffix(""), fps
        self.writer: cv2.VideoWriter | None = None
        if self.path.suffix.lower() != ".mp4":
            self.path = self.path.with_name(f"{self.path.name}.mp4")
        self.partial = self.path.with_name(f".{self.path.stem}.partial.mp4")

    def add(self, picture: np.ndarray) -> None:
        """Add a frame, uint8 RGB [H, W, 3]."""
        if self.writer is None:
            self.size = picture.shape[1], picture.shape[0]
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.writer = cv2.VideoWriter(
                str(self.partial), cv2.VideoWriter.fourcc(*"mp4v"), self.fps, self.size
            )
        self.writer.write(cv2.resize(picture[..., ::-1], self.size))

    def close(self) -> None:
        """Give the file its name."""
        if self.writer is not None:
            self.writer.release()
            put_in_place(self.partial, self.path)


def over_images(
    predict: Callable[[AnyImage, str], np.ndarray | None],
    images: list[tuple[Path, str]],
    pictures: Path,
    every: int = 1,
) -> str:
    """Call ``predict(image, name)`` for each image and each frame of a video, and save the picture that it gives, if
    any, into ``pictures``. What cannot be read is named and skipped.

    Returns:
        ``N images, K skipped``.

    Raises:
        UserError: none can be read.
    """
    told, started = Tally(ProgressLine("predict", len(images), 0), len(images)), time.monotonic()
    paths = picture_paths([name for _, name in images], pictures)
    try:
        for (path, name), file in zip(images, paths):
            try:
                if is_video(path):
                    over_video(predict, Video(path, every), name, file, told)
                    continue
                picture = predict(path, name)
            except UserError as error:
                told.skip(error)
                continue
            if picture is not None:
                with replacing(file) as partial:
                    Image.fromarray(picture).save(partial, "JPEG", quality=92)
            told.add(time.monotonic() - started)
    finally:
        told.line.close()
    if not told.n_seen:
        raise UserError(f"--images: none of {len(images)} files could be read as an image")
    return f"{told.n_seen} images" + (f", {told.n_skipped} skipped" if told.n_skipped else "")


def over_video(
    predict: Callable[[AnyImage, str], np.ndarray | None], video: Video, name: str, file: Path, told: "Tally"
) -> None:
    """The same for the frames of a video.

    Raises:
        UserError: it has none that can be read.
    """
    drawn, n_seen, started = VideoPictures(file, video.fps / video.every), 0, time.monotonic()
    told.expect(video.n_frames - 1)
    try:
        for number, pixels in video:
            picture, n_seen = predict(pixels, f"{name}{FRAME}{number}"), n_seen + 1
            if picture is not None:
                drawn.add(picture)
            told.add(time.monotonic() - started)
    finally:
        drawn.close()
    if not n_seen:
        raise UserError(f"{video.path} has no frame that can be read")


class Tally:
    """Counts of images, and their progress line."""

    def __init__(self, line: ProgressLine, total: int) -> None:
        self.line, self.n_seen, self.n_skipped = line, 0, 0
        self.line.total = total

    def expect(self, more: int) -> None:
        """There are more images than thought."""
        self.line.total += more

    def skip(self, error: UserError) -> None:
        """Name what could not be read."""
        how = dict[str, Any](style=None, markup=False, highlight=False, soft_wrap=True)
        self.line.console.print(f"skipped: {one_line(error)}", **how)
        self.n_skipped += 1

    def add(self, seconds: float) -> None:
        """An image is done, ``seconds`` after the first began."""
        self.n_seen += 1
        done = self.n_seen + self.n_skipped
        self.line.update(done, f"{self.n_seen} images", seconds / done * max(self.line.total - done, 0))


def main(arguments: list[str]) -> None:
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("--run", type=Path, required=True, metavar="DIR", help="run folder of a fine-tuning")
    add("--images", type=Path, required=True, nargs="+", metavar="PATH", help="images, or folders of them")
    add("--output", type=Path, required=True, metavar="DIR", help="predictions.json and pictures/")
    add("--min-score", type=float, default=0.5, metavar="S", help="of an object, at least (%(default)s)")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="(%(default)s)")
    add(
        "--tile",
        type=int,
        default=0,
        metavar="PX",
        help="of a detector: look at tiles of this side too; 0: none",
    )
    add(
        "--overlap",
        type=float,
        default=0.2,
        metavar="S",
        help="share that neighboring tiles repeat (%(default)s)",
    )
    add("--every", type=int, default=1, metavar="N", help="of a video: every N-th frame (%(default)s)")
    add("--no-pictures", action="store_true", help="predictions alone")
    add("--trust", action="store_true", help=TRUST_HELP)
    options = parser.parse_args(arguments)
    at_least(options, tile=0, every=1)
    if not 0 <= options.overlap < 1:
        raise UserError(f"--overlap: {options.overlap} is not from 0 to below 1")
    images = listed(options.images, options.output)
    how = Options(options.min_score, options.tile, options.overlap, options.every, not options.no_pictures)
    if engine_of(options.run) is None and list(options.run.glob("*.py")):
        if options.tile:
            raise UserError("--tile: a segmenter looks at whole images; leave it out")
        print(segmented(options.run, options.device, options.trust, images, options.output, how))
        return
    detector = load_detector(options.run, options.device, options.trust)
    print(detected(detector, images, options.output, how))
