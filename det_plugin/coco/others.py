"""Labels of formats that are not read: each is told by its name, with the way to one that is."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from det_plugin.coco.content import is_image, listed
from pretrain.data.box_sets import read_xml
from pretrain.files import read_plain

MOST_BYTES, TRIED_FILES = 2**24, 20
COCO = "export it as COCO"
# Keys of a .json file's mapping, or of the first entry of its list or mapping
JSON = (
    ({"shapes", "imagePath"}, "labelme's json", "convert it to COCO (labelme2coco)"),
    ({"_via_img_metadata"}, "a project of VIA's", "choose Annotation > Export annotations (COCO format)"),
    ({"filename", "regions"}, "VIA's json", "choose Annotation > Export annotations (COCO format)"),
    ({"asset", "regions"}, "VoTT's json", "export it as Pascal VOC"),
    ({"assets", "tags"}, "VoTT's json", "export it as Pascal VOC"),
    ({"image", "annotations"}, "CreateML's json", COCO),
    (
        {"image_id", "bbox", "score"},
        "a list of COCO's results",
        "a set needs images, annotations and categories",
    ),
    ({"image", "id", "label"}, "Label Studio's own json", "choose COCO or YOLO when you export"),
    ({"data", "annotations"}, "Label Studio's own json", "choose COCO or YOLO when you export"),
    ({"classTitle"}, "Supervisely's json", COCO),
    ({"objects", "size"}, "Supervisely's json", COCO),
    ({"classes", "tags"}, "Supervisely's json", COCO),
    ({"data_row", "projects"}, "Labelbox's json", COCO),
    ({"items", "categories"}, "Datumaro's json", COCO),
    ({"images", "licenses"}, "COCO's json without instances", "export it with boxes or masks"),
)
OTHER = {
    ".csv": "a table, perhaps of boxes",
    ".tfrecord": "a file of TensorFlow records",
    ".ndjson": "a file of lines of JSON",
    ".zip": "an archive",
}
WAY = {".zip": "unpack it"}
LINE = re.compile(r"\d+( -?\d*\.\d+([eE]-?\d+)?){4,}")
# Of a .txt file with other labels, in one of its first lines
LINES = (
    (re.compile(r"(-?[\d.]+ ){8}\S+ [012]"), "a file of DOTA's oriented boxes"),
    (re.compile(r"[A-Za-z]\S*( -?[\d.]+){14,15}"), "a file of KITTI's labels"),
    (re.compile(r".+?( \d+,\d+,\d+,\d+,\d+)+"), "a list of images with corners"),
)


def others_told(root: Path) -> str:
    """What a folder holds in place of labels that are known, and the way on; empty where nothing is known."""
    names = list(listed(root))
    for name in _some(names, ".json"):
        for keys in _keys(root / name):
            for own, what, way in JSON:
                if own <= keys:
                    return f"{root / name} is {what}, which is not read: {way}"
    for name in _some(names, ".xml"):
        try:
            tree = read_xml(root / name)
        except ValueError:
            continue
        if tree.tag == "annotations" and (tree.find("image") is not None or tree.find("track") is not None):
            return f"{root / name} is CVAT's own xml, which is not read: export it as COCO 1.0"
    for name in _some(names, ".txt"):
        lines = _first_lines(root / name)
        if lines and LINE.fullmatch(lines[0]) and not any(map(is_image, names)):
            return f"{root / name} is YOLO's, but {root} has no images: put them in images/, and the .txt files in labels/"
        for pattern, what in LINES:
            if any(map(pattern.fullmatch, lines)):
                return f"{root / name} is {what}, which is not read: convert it to COCO"
    for suffix, what in OTHER.items():
        for name in _some(names, suffix):
            return f"{root / name} is {what}, which is not read: {WAY.get(suffix, 'export or convert it to COCO')}"
    return ""


def _some(names: list[str], suffix: str) -> list[str]:
    return [name for name in names if name.lower().endswith(suffix)][:TRIED_FILES]


def _keys(file: Path) -> Iterator[set[str]]:
    """The keys of a .json file's mapping, and those of the first entry of its list or mapping."""
    try:
        content: Any = json.loads(read_plain(file, MOST_BYTES))
    except (OSError, ValueError, RecursionError):
        return
    if isinstance(content, dict):
        yield {*content}
        content = list(content.values())
    if isinstance(content, list) and content and isinstance(content[0], dict):
        yield {*content[0]}


def _first_lines(file: Path) -> list[str]:
    with open(file, "rb") as opened:
        return [line.strip() for line in opened.read(2000).decode("utf-8", "replace").splitlines()[:3]]
