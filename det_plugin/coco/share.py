"""A validation split from a set that has none: ``--val-share 0.2``.

An image is drawn by a hash of its name, never by its place: it stands at :func:`place`, from 0 to 1, and is of the
validation below the share. So a larger share contains a smaller one, other files in the folder move nothing, and
every run has the same split. Versions of one photograph as Roboflow exports them (``a.rf.1.jpg``, ``a.rf.2.jpg``)
have one place: they would otherwise be learned and tested.

Then each class is looked at, the rarest first. One that is owed an image of the validation (its images times the
share, rounded) and has none gets that of its lowest place; one without an image of training gets that of its
highest place back. This alone depends on the other images, and only in classes of a few.
"""

import hashlib
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pretrain.errors import UserError
from pretrain.files import read_mapping, write_json

FILE_NAME = "split.json"
SEED = 0


def place(name: str, seed: int = SEED) -> float:
    """Where an image stands, from 0 to 1: by its name below the folder of images, and the seed."""
    photograph = name.split(".rf.")[0]
    digest = hashlib.sha256(f"{seed}/{photograph}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


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
    if len(set(places.values())) < 2:
        raise UserError(f"--val-share: {len(set(places.values()))} images cannot be divided; give more")
    classes = defaultdict[str, set[float]](set)
    for each in content["annotations"]:
        if isinstance(each, dict) and isinstance(each.get("image_id"), int) and each["image_id"] in names:
            if each.get("iscrowd") in (0, None, False):
                classes[str(each.get("category_id"))].add(places[names[each["image_id"]]])
    chosen = _chosen(sorted(set(places.values())), [classes[key] for key in sorted(classes)], share)
    return {name for name, at in places.items() if at in chosen}


def _chosen(places: list[float], classes: list[set[float]], share: float) -> set[float]:
    """The places that are of the validation, of photographs and of those of each class."""
    chosen = {at for at in places if at < share}
    rarest_first = sorted(classes, key=lambda own: (len(own), min(own)))
    for own in rarest_first:
        if not own & chosen and len(own) > 1 and int(len(own) * share + 0.5) >= 1:
            chosen.add(min(own))
    for own in rarest_first:
        if own <= chosen:
            chosen.remove(max(own))
    chosen = chosen or {places[0]}
    return chosen if len(chosen) < len(places) else chosen - {places[-1]}


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


def leave_split(output: Path, share: float, train: Mapping[str, Any], val: Mapping[str, Any]) -> Path:
    """Write the names of both sides' images into a run's folder; returns the file."""
    names = {
        side: sorted(image["file_name"] for image in content["images"])
        for side, content in (("train", train), ("val", val))
    }
    return write_json(output / FILE_NAME, {"val_share": share, "seed": SEED, **names})


def share_of(run: Path) -> float:
    """The ``val_share`` of a run, by what it left; 0 of one that divided nothing."""
    file = run / FILE_NAME
    return float(read_mapping(file, "run")["val_share"]) if file.is_file() else 0.0
