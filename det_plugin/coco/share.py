"""COCO content without a split, divided by :mod:`pretrain.data.share`."""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from pretrain.data import share as shares
from pretrain.data.share import SEED, place
from pretrain.errors import UserError


def of_validation(content: Mapping[str, Any], share: float, seed: int = SEED) -> set[str]:
    """Names of the images that the validation gets. Damaged entries are of no class and no image.

    Raises:
        UserError: there are not two images to divide.
    """
    images = [each for each in content["images"] if isinstance(each, dict)]
    ids = {each["id"]: each.get("file_name") for each in images if isinstance(each.get("id"), int)}
    names = {id: name for id, name in ids.items() if isinstance(name, str)}
    places = {name: place(name, seed) for name in names.values()}
    if len(names) < min(len(images), 2):
        told = "images need an id that is a whole number and a file_name, to be divided"
        raise UserError(f"--val-share: {len(images) - len(names)} of {len(images)} {told}")
    classes = defaultdict[str, set[float]](set)
    for each in content["annotations"]:
        if isinstance(each, dict) and isinstance(each.get("image_id"), int) and each["image_id"] in names:
            if each.get("iscrowd") in (0, None, False):
                classes[str(each.get("category_id"))].add(places[names[each["image_id"]]])
    chosen = shares.of_validation(places.values(), share, [classes[key] for key in sorted(classes)])
    return {name for name, at in places.items() if at in chosen}


def divided(content: dict[str, Any], side: str, share: float) -> dict[str, Any]:
    """One side, ``train`` | ``val``, of COCO content. Entries that are of no image stay, to be named as damaged."""
    chosen = of_validation(content, share)

    def is_other(image: Any) -> bool:
        known = isinstance(image, dict) and isinstance(image.get("file_name"), str)
        return known and (image["file_name"] in chosen) != (side == "val")

    gone = {
        image["id"] for image in content["images"] if is_other(image) and isinstance(image.get("id"), int)
    }
    images = [image for image in content["images"] if not is_other(image)]
    kept = [
        each
        for each in content["annotations"]
        if not (isinstance(each, dict) and isinstance(each.get("image_id"), int) and each["image_id"] in gone)
    ]
    return {**content, "images": images, "annotations": kept}
