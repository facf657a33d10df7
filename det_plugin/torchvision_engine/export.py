"""A run's detector as one ONNX file: a uint8 image of any size in; boxes, scores, labels and masks out.

All that a detector does stands in the graph: Pillow's resizing, to the bit; normalization and padding; the
ViT, whose positions at the test size are constants; RoIAlign; and NMS, with the rounding of torchvision's.

Masks come as the head makes them, [N, s, s] under their boxes, as in the Mask R-CNN of the ONNX Model Zoo:
100 pasted masks of a 12-megapixel photo take 1.2 GB, and most of them score below what a user keeps. The
code that :func:`usage` gives pastes those that are kept.
"""

import contextlib
import copy
import json
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL
import torch
from torch import Tensor, nn
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import nms

from det_plugin.augment import evaluation_geometry
from det_plugin.features import detection_features
from det_plugin.loader import to_tensor
from det_plugin.protocol import DetectionProtocol
from det_plugin.torchvision_engine import folder
from det_plugin.torchvision_engine.predict import Size, in_own_pixels, load_model
from pretrain.errors import ensure
from pretrain.export.fixed_size import require
from pretrain.export.programs import INPUT, OPSET
from pretrain.files import replacing
from pretrain.log import log

MIN_SCORE = "min_score"  # name of the threshold in the file
OUTPUTS = ("boxes", "scores", "labels", "masks")
PACKAGES = ("posfield", "torch", "torchvision", "pillow", "onnx", "onnxscript", "onnxruntime")
LARGEST_PX = 2**15  # of an image's side: weights of resizing are exact up to here
WEIGHT_BITS = 22  # of Pillow's weights
# Pillow resizes columns first; from this version on rows, if these shrink more than twice as much
ROWS_FIRST_FROM = 13
# torchvision shifts the boxes of each class out of the others' way, up to this number of boxes on a CPU
SHIFTED_BOXES = 1000

# A landscape, a portrait and a small image: height, width in pixels
CHECKED_SIZES = ((240, 320), (400, 150), (40, 56))
TOLERANCE = 1e-3  # of scores and probabilities, and of boxes as a share of the image's longer side
# Rounding may lift a detection over a threshold, or one box over another's IoU. A wrong level of the pyramid
# may change no more than a twentieth.
MAY_BE_MISSED = 0.02


class Check(NamedTuple):
    """What the comparison of a file with its detector found: the largest difference (see :data:`TOLERANCE`),
    and how many detections there are, and how many of them in both."""

    difference: float
    total: int
    matched: int


def export_detector(run: Path, path: Path, told: Mapping[str, Any]) -> Check:
    """Write the last checkpoint of a run as an ONNX file, and compare the file with the detector.

    Args:
        path: ``*.onnx``; it is replaced atomically.
        told: JSON values that the file will contain: method, effective epochs, ...

    Raises:
        UserError: no run or no checkpoint; a wrong suffix; a package is not installed.
        RuntimeError: the file finds something else than the detector.
    """
    ensure(path.suffix == ".onnx", f"output: a file of format onnx ends in .onnx, {path} does not")
    ensure(not path.is_dir(), f"output: format onnx is a file, and {path} is a folder")
    require("onnx", "onnx", "onnxscript", "onnxruntime")
    model, config, _ = load_model(run)
    log(f"{run}: the detector is traced, written and compared, which takes a minute or more")
    model.eval()
    protocol, classes = folder.protocol_of(config), folder.classes_of(run, config)
    with replacing(path, path.with_name(f".partial-{path.name}")) as partial:
        about = _description(model, protocol, classes, told, path.name)
        write_onnx(Exported(model, protocol, list(classes)), partial, about)
        check = compare(model, protocol, list(classes), partial)
        if check.matched < (1 - MAY_BE_MISSED) * check.total:
            found = f"{check.matched} of {check.total} of the detector's detections"
            raise RuntimeError(f"{path}: the file finds {found}, within {TOLERANCE:.0e}")
    return check


class Exported(nn.Module):
    """The network that is traced. It shares all weights with the model, which stays as it is."""

    category_ids: Tensor

    def __init__(self, model: GeneralizedRCNN, protocol: DetectionProtocol, category_ids: list[int]) -> None:
        super().__init__()
        self.pad, self.image_size_px = model.transform, protocol.image_size_px
        self.options, self.pyramid = model.backbone.options, model.backbone.pyramid
        self.rpn, self.heads, self.vit = (
            copy.copy(m) for m in (model.rpn, model.roi_heads, model.backbone.vit)
        )
        self.rpn.batched_nms = traceable_nms(len(protocol.anchor_sizes_px))
        self.heads.batched_nms = traceable_nms(protocol.num_classes)
        grid = self.vit.grid_of((self.pad.size, self.pad.size))
        with torch.no_grad():
            positions, geometry = self.vit.positions(grid).clone(), self.vit.geometry(grid)
        self.vit.positions = lambda grid, boxes, flips: positions
        self.vit.geometry = lambda grid: geometry
        self.register_buffer("category_ids", torch.tensor(category_ids))  # [K]

    def forward(self, image: Tensor, min_score: Tensor) -> tuple[Tensor, ...]:
        """uint8 RGB [1, 3, H, W] and [1] -> boxes [N, 4] in pixels (x0, y0, x1, y1), scores [N], category ids
        [N], and of a mask head probabilities [N, s, s] under the boxes; best first."""
        height, width = image.shape[2:]
        resized = resized_sides((height, width), self.image_size_px)
        levels = resize(image[0].double(), resized, self.pad.size).float()
        place = torch.arange(self.pad.size)
        is_image = (place < resized[0])[:, None] & (place < resized[1])
        batch = torch.where(is_image, (levels - self.pad.mean) / self.pad.std, 0.0)[None]
        shape = _number(resized[0], self.pad.size), _number(resized[1], self.pad.size)
        maps = self.pyramid(detection_features(self.vit, batch, self.options))
        proposals, _ = self.rpn(ImageList(batch, [shape]), maps)
        heads = copy.copy(self.heads)
        heads.score_thresh = min_score
        (found,), _ = heads(maps, proposals, [shape])

        boxes, kept = in_own_pixels(found["boxes"], resized, _sides((height, width)))
        outputs = boxes[kept], found["scores"][kept], self.category_ids[found["labels"][kept] - 1]
        return (*outputs, found["masks"][kept, 0]) if "masks" in found else outputs


def _sides(size: Size) -> Tensor:
    """[2] float64 of sides that may be symbols."""
    return torch.stack([torch.scalar_tensor(side, dtype=torch.float64) for side in size])


def _number(side: Tensor, most: int) -> Any:
    """A symbol for a side, from 1 to ``most``."""
    number = side.item()
    torch._check(number >= 1)
    torch._check(number <= most)
    return number


def resized_sides(size: Size, image_size_px: int) -> Tensor:
    """:func:`evaluation_geometry` of a size that may be symbols: [2] int64, height and width."""
    sides = _sides(size)
    least = sides.min()
    sides = torch.where(sides == least, float(image_size_px), sides * (image_size_px / least))
    back = (image_size_px / sides.max()).clamp(max=1.0)
    return (sides * back + 0.5).floor().long().clamp(min=1)


def resize(levels: Tensor, resized: Tensor, frame: int) -> Tensor:
    """Pillow's bilinear resizing, antialiased, to the bit.

    Args:
        levels: [C, H, W] float64, whole numbers from 0 to 255.
        resized: [2] int64, height and width.
        frame: side of the square whose upper left corner the resized image takes; elsewhere values mean
            nothing.

    Returns:
        [C, frame, frame] float64, whole numbers.
    """
    height, width = levels.shape[1:]
    rows = resize_weights(height, resized[0], frame)
    columns = resize_weights(width, resized[1], frame).T

    def columns_first(levels: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        return _rounded(rows @ _rounded(levels @ columns))

    def rows_first(levels: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        return _rounded(_rounded(rows @ levels) @ columns)

    if int(PIL.__version__.split(".")[0]) < ROWS_FIRST_FROM:
        return columns_first(levels, rows, columns)
    shrink = torch.stack([torch.scalar_tensor(side, dtype=torch.int64) for side in (height, width)]) - resized
    shrinks_rows = shrink[0] > 2 * shrink[1].clamp(min=0)
    return torch.cond(shrinks_rows, rows_first, columns_first, (levels, rows, columns))  # type: ignore[no-any-return]


def resize_weights(source: int, resized: Tensor, frame: int) -> Tensor:
    """Pillow's weights of a side's pixels in each pixel of the resized side, [frame, source] float64.

    They are whole numbers, shares of 2 ** 22: Pillow rounds floats to them, and here quotients of integers
    are rounded, which is the same, as no share of such sides lies halfway between two.
    """
    at = 2 * torch.arange(source) + 1
    wanted = 2 * torch.arange(frame)[:, None] + 1
    share = (2 * resized.clamp(min=source) - (at * resized - wanted * source).abs()).clamp(min=0)
    total = share.sum(1, keepdim=True).clamp(min=1)
    return ((2 ** (WEIGHT_BITS + 1) * share + total) // (2 * total)).double()


def _rounded(sums: Tensor) -> Tensor:
    """Sums of levels, weighted by shares of 2 ** 22 -> levels."""
    return ((sums + 2 ** (WEIGHT_BITS - 1)) / 2**WEIGHT_BITS).floor()


@torch.library.custom_op("posfield::nms_of_each", mutates_args=())
def nms_of_each(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """NMS within each class: boxes [N, 4], scores [K, N] (-inf: not of this class) -> kept [M], by class."""
    members = [torch.where(own > -torch.inf)[0] for own in scores]
    return torch.cat([here[nms(boxes[here], own[here], threshold)] for here, own in zip(members, scores)])


@nms_of_each.register_fake
def _(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    return boxes.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.int64)


def _onnx_nms_of_each(boxes: Any, scores: Any, threshold: float) -> Any:
    """:func:`nms_of_each` as ONNX's operator, which gives rows (image, class, box)."""
    from onnxscript import opset18 as imported

    opset18: Any = imported  # its stub knows other arguments

    def ints(*values: int) -> Any:
        return opset18.Constant(value_ints=values)

    limits = (opset18.Constant(value_floats=[v]) for v in (threshold, torch.finfo(torch.float32).min))
    each = (opset18.Unsqueeze(x, ints(0)) for x in (boxes, scores))
    found = opset18.NonMaxSuppression(*each, ints(2**31 - 1), *limits)
    return opset18.Squeeze(opset18.Slice(found, ints(2), ints(3), ints(1)), ints(1))


def traceable_nms(n_classes: int) -> Callable[[Tensor, Tensor, Tensor, float], Tensor]:
    """torchvision's ``batched_nms`` of boxes on a CPU. It depends on the number of boxes, which a trace does not
    know: few boxes are shifted, class by class, and so rounded; many are not."""

    def batched_nms(boxes: Tensor, scores: Tensor, classes: Tensor, threshold: float) -> Tensor:
        # Boxes are clipped, so that none is below 0; there may be no box
        largest = torch.cat([boxes.flatten(), boxes.new_zeros(1)]).max()
        shift = classes.to(boxes) * (largest + 1)
        are_few = torch.scalar_tensor(boxes.shape[0], dtype=torch.int64) <= SHIFTED_BOXES
        boxes = boxes + torch.where(are_few, shift, 0.0)[:, None]
        is_own = classes == torch.arange(n_classes)[:, None]  # [K, N]
        kept = nms_of_each(boxes, torch.where(is_own, scores, -torch.inf), threshold)
        return kept[scores[kept].sort(descending=True)[1]]

    return batched_nms


@torch.no_grad()
def write_onnx(network: Exported, path: Path, about: Mapping[str, Any]) -> None:
    """Trace and write the network. Its threshold becomes a constant, the one of the description."""
    import onnx_ir

    example = torch.zeros(1, 3, 60, 80, dtype=torch.uint8), torch.tensor([about["score_threshold"]])
    height, width = (torch.export.Dim(side, min=2, max=LARGEST_PX) for side in ("height", "width"))
    shapes = {INPUT: {2: height, 3: width}, MIN_SCORE: None}
    traced = torch.export.export(network, example, dynamic_shapes=shapes, strict=False)
    names = list(OUTPUTS[: len(traced.graph_signature.user_outputs)])
    program = torch.onnx.export(
        traced,
        input_names=[INPUT, MIN_SCORE],
        output_names=names,
        opset_version=OPSET,
        dynamo=True,
        dynamic_shapes={INPUT: {2: "height", 3: "width"}, MIN_SCORE: None},  # here only the names
        custom_translation_table={torch.ops.posfield.nms_of_each.default: _onnx_nms_of_each},
        verbose=False,
    )
    assert program is not None
    graph = program.model.graph
    for output in graph.outputs:
        assert output.shape is not None
        output.shape = onnx_ir.Shape(["objects", *output.shape[1:]])
    threshold = graph.inputs.pop()
    threshold.const_value = onnx_ir.tensor(example[1].numpy(), name=MIN_SCORE)
    graph.register_initializer(threshold)
    program.model.metadata_props["posfield"] = json.dumps(about, sort_keys=True)
    program.save(path, external_data=False)


def _description(
    model: GeneralizedRCNN,
    protocol: DetectionProtocol,
    classes: Mapping[int, str],
    told: Mapping[str, Any],
    name: str,
) -> dict[str, Any]:
    """What a user of the file must know, for its metadata."""
    return {
        "detector": "Mask R-CNN" if protocol.has_masks else "Faster R-CNN",
        "image": "uint8 RGB [1, 3, height, width], upright; resized, normalized and padded inside",
        "classes": {str(label): word for label, word in classes.items()},
        "score_threshold": protocol.score_threshold,
        "image_size_px": protocol.image_size_px,
        "backbone": model.backbone.vit.model_kwargs,
        "provenance": dict(told),
        "versions": _versions(),
        "usage": usage(name),
    }


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):  # a checkout that is not installed
            found[package] = metadata.version(package)
    return found


def usage(path: str) -> str:
    """Python that runs the file on a photo with onnxruntime, NumPy and Pillow alone."""
    return f"""import json

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

session = onnxruntime.InferenceSession({path!r}, providers=["CPUExecutionProvider"])
classes = json.loads(session.get_modelmeta().custom_metadata_map["posfield"])["classes"]
photo = np.asarray(ImageOps.exif_transpose(Image.open("photo.jpg")).convert("RGB"))
outputs = session.run(None, {{"image": photo.transpose(2, 0, 1)[None]}})
kept = outputs[1] >= 0.5
boxes, scores, labels, *masks = (output[kept] for output in outputs)  # [N, 4] pixels, [N], [N], perhaps [N, s, s]
names = [classes[str(label)] for label in labels]


def paste(mask, box, height, width):
    \"\"\"Probabilities [s, s] under a box -> [height, width] bool.\"\"\"

    def weights(low, high, length):
        at = (np.arange(length) + 0.5 - low) / (high - low) * len(mask) - 0.5
        return (1 - abs(at[:, None] - np.arange(len(mask)))).clip(0)

    return weights(box[1], box[3], height) @ mask @ weights(box[0], box[2], width).T >= 0.5


pasted = [paste(mask, box, *photo.shape[:2]) for own in masks for mask, box in zip(own, boxes)]"""


@torch.no_grad()
def compare(
    model: GeneralizedRCNN, protocol: DetectionProtocol, category_ids: list[int], path: Path
) -> Check:
    """Compare a file with its detector on images of blurred noise. A trained detector sees nothing there, so
    that both give their best detections, whatever the scores."""
    rng, checks, heads = np.random.default_rng(0), [], copy.copy(model.roi_heads)
    heads.score_thresh = 0.0
    reference = GeneralizedRCNN(model.backbone, model.rpn, heads, model.transform).eval()
    images, expected = [], []
    for size in CHECKED_SIZES:
        noise = rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)
        images.append(np.asarray(PIL.Image.fromarray(noise).resize(size[::-1], PIL.Image.Resampling.BICUBIC)))
        expected.append(expected_outputs(reference, images[-1], protocol.image_size_px, category_ids))
    # What scores less changes none of these
    least = min(scores.min(initial=1.0) for _, scores, *_ in expected) * 0.999
    session = open_onnx(path, least)
    found = [session.run(None, {INPUT: to_tensor(image)[None].numpy()}) for image in images]
    checks = [matches(own, its, max(size)) for own, its, size in zip(expected, found, CHECKED_SIZES)]
    differences, totals, matched = zip(*checks)
    return Check(max(differences), sum(totals), sum(matched))


def open_onnx(path: Path, min_score: float | None = None) -> Any:
    """An onnxruntime session on the CPU, with the file's own threshold or another one."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    if min_score is not None:
        value = onnxruntime.OrtValue.ortvalue_from_numpy(np.array([min_score], np.float32))
        options.add_initializer(MIN_SCORE, value)
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def expected_outputs(
    model: GeneralizedRCNN, image: np.ndarray, image_size_px: int, category_ids: list[int]
) -> list[np.ndarray]:
    """The detector's own outputs for uint8 RGB [H, W, 3], as :meth:`Exported.forward` gives them."""
    geometry = evaluation_geometry((image.shape[1], image.shape[0]), image_size_px)
    (found,) = model([to_tensor(geometry.pixels(image))])
    boxes, kept = in_own_pixels(found["boxes"], _sides(geometry.resized[::-1]), _sides(image.shape[:2]))
    labels = torch.tensor(category_ids)[found["labels"][kept] - 1]
    outputs = [boxes[kept], found["scores"][kept], labels]
    outputs += [found["masks"][kept, 0]] if "masks" in found else []
    return [output.numpy() for output in outputs]


def matches(expected: list[np.ndarray], found: list[np.ndarray], side_px: int) -> Check:
    """Match detections of one image, each with the most similar one of its label."""
    differences = []
    total = max(len(expected[0]), len(found[0]))
    for i in range(len(expected[0])):
        own = np.flatnonzero(found[2] == expected[2][i])
        each = [abs(found[0][own] - expected[0][i]).max(1, initial=0) / side_px]
        each += [
            abs(y[own] - x[i]).reshape(len(own), -1).max(1, initial=0)
            for x, y in zip(expected[1::2], found[1::2])
        ]
        differences.append(np.max(each, axis=0).min(initial=np.inf))
    near = [difference for difference in differences if difference <= TOLERANCE]
    return Check(max(near, default=0.0), total, len(near))
