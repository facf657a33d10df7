"""COCO's json as tools write it: what can be said in one way alone is put right while it is read.

Whether a list needs it is told by its first entry, since a tool writes all in one way; a file as COCO writes it costs
nothing. What is put right: ids, sizes and boxes as text, or whole numbers with a point; annotations without ids;
boxes that are missing where there are polygons; a polygon that stands alone and not in a list (VIA), and a list of
empty ones. A box that CVAT has turned becomes the upright one around it, which is said.
"""

from collections.abc import Callable
from typing import Any

from det_plugin.coco.content import ROTATED_BOXES, Content, around_rotated

IDS = {
    "images": ("id", "width", "height"),
    "categories": ("id",),
    "annotations": ("id", "image_id", "category_id"),
}


def mend(content: Content) -> None:
    """Put images, annotations and categories right, in place; ``faults`` says what changes an object."""
    for key, names in IDS.items():
        entries = content[key]
        first = entries[0] if entries and isinstance(entries[0], dict) else {}
        for name in names:
            if type(first.get(name)) in (str, float):
                _change(entries, name, _whole)
        if key == "annotations" and first:
            _mend_objects(content, entries, first)


def _mend_objects(content: Content, annotations: list[Any], first: dict[str, Any]) -> None:
    if "id" not in first and all(isinstance(each, dict) and "id" not in each for each in annotations):
        for number, each in enumerate(annotations, 1):
            each["id"] = number
    shape, box = first.get("segmentation"), first.get("bbox")
    if isinstance(shape, list) and shape and not (isinstance(shape[0], list) and shape[0]):
        _change(annotations, "segmentation", _polygons)
    if isinstance(box, list) and any(isinstance(value, str) for value in box):
        _change(annotations, "bbox", _numbers)
    elif box is None or box == []:
        for each in annotations:
            if isinstance(each, dict) and not each.get("bbox"):
                each["bbox"] = _extent(each.get("segmentation"))
    if isinstance(first.get("attributes"), dict):
        _turn(content, annotations)


def _change(entries: list[Any], key: str, change: Callable[[Any], Any]) -> None:
    for each in entries:
        if isinstance(each, dict) and key in each:
            each[key] = change(each[key])


def _whole(value: Any) -> Any:
    """A whole number that stands as text or with a point; anything else as it is, to be named as damaged."""
    if isinstance(value, str) and value.isascii() and value.strip().isdigit() and len(value) < 20:
        return int(value)
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _numbers(box: Any) -> Any:
    try:
        return [float(value) for value in box]
    except (TypeError, ValueError):
        return box


def _polygons(shape: Any) -> Any:
    """Polygons in a list, none of them empty."""
    if not isinstance(shape, list):
        return shape
    polygons = [shape] if shape and not isinstance(shape[0], list) else shape
    return [polygon for polygon in polygons if polygon != []]


def _extent(shape: Any) -> Any:
    """The box around polygons, as it is where there are none."""
    try:
        xs, ys = ([value for polygon in shape for value in polygon[axis::2]] for axis in (0, 1))
        return [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]
    except (TypeError, ValueError, KeyError):
        return []


def _turn(content: Content, annotations: list[Any]) -> None:
    """Boxes that CVAT has turned; their polygons, where it writes any, are turned already."""
    told = list[str]()
    for each in annotations:
        own = each.get("attributes") if isinstance(each, dict) else None
        box = each.get("bbox") if own and not each.get("segmentation") else None
        if isinstance(own, dict) and isinstance(box, list) and len(box) == 4:
            if (upright := around_rotated(box, own.get("rotation"))) is not None:
                each["bbox"], each["area"] = upright, upright[2] * upright[3]
                told.append(f"annotation {each.get('id')}")
    if told:
        content["faults"] = {ROTATED_BOXES: told}
