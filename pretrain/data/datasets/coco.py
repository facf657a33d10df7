"""COCO 2017's pixels by supercategory: COCO-Stuff (15 classes), COCO-Things (12). Others do not count.

This is Leopart's evaluation, which NeCo, CrIBo and PaKA follow. *Stuff* comes from the maps of the stuff
annotations, without the class "other"; *things* come from the panoptic annotations, drawn as category ids. If
these maps are missing, both are read from COCO-Stuff 164k (``stuffthingmaps``, category - 1). There stuff is
the same, but things are instance masks, which overlap in another way than the panoptic ones. The classes are
in alphabetical order, as in Leopart.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pretrain.data.datasets.label_set import LabelSet
from pretrain.data.datasets.listing import MAP_SUFFIXES, by_stem, first_folder, paired
from pretrain.data.datasets.maps import UNKNOWN
from pretrain.errors import UserError

LAYOUT = "COCO's {train,val}2017 (or images/, coco/images/) and stuffthingmaps/{train,val}2017 (or in annotations/)"
# Category ids by supercategory: `categories` of COCO's own stuff_val2017.json and panoptic_val2017.json.
SUPERCATEGORIES: dict[str, dict[str, tuple[int, ...]]] = {
    "coco_stuff": {
        "building": (95, 96, 128, 151, 158, 166),
        "ceiling": (102, 103),
        "floor": (101, 114, 115, 116, 117, 118),
        "food-stuff": (121, 122, 153, 170),
        "furniture-stuff": (98, 107, 108, 110, 112, 123, 130, 133, 156, 161, 165),
        "ground": (111, 125, 126, 136, 140, 144, 145, 147, 149, 154, 159),
        "plant": (94, 97, 119, 124, 129, 134, 142, 163, 169),
        "raw-material": (100, 132, 139, 143),
        "sky": (106, 157),
        "solid": (127, 135, 150, 160, 162, 182),
        "structural": (99, 113, 138, 146, 164),
        "textile": (92, 93, 104, 105, 109, 131, 137, 141, 152, 167, 168),
        "wall": (171, 172, 173, 174, 175, 176, 177),
        "water": (120, 148, 155, 178, 179),
        "window": (180, 181),
    },
    "coco_things": {
        "accessory": (27, 28, 31, 32, 33),
        "animal": (16, 17, 18, 19, 20, 21, 22, 23, 24, 25),
        "appliance": (78, 79, 80, 81, 82),
        "electronic": (72, 73, 74, 75, 76, 77),
        "food": (52, 53, 54, 55, 56, 57, 58, 59, 60, 61),
        "furniture": (62, 63, 64, 65, 67, 70),
        "indoor": (84, 85, 86, 87, 88, 89, 90),
        "kitchen": (44, 46, 47, 48, 49, 50, 51),
        "outdoor": (10, 11, 13, 14, 15),
        "person": (1,),
        "sports": (34, 35, 36, 37, 38, 39, 40, 41, 42, 43),
        "vehicle": (2, 3, 4, 5, 6, 7, 8, 9),
    },
}
# Ids; 183: "other" of the stuff annotations, 184 .. 200: merged classes of the panoptic ones
LAST_STUFF, LAST_MERGED = 182, 200
VOID = 255

IMAGES = ("{}2017", "images/{}2017", "coco/images/{}2017")
STUFF_THING_MAPS = (
    "stuffthingmaps/{}2017",
    "stuffthingmaps_pixelmaps/{}2017",
    "annotations/stuffthingmaps/{}2017",
    "annotations/stuffthingmaps_pixelmaps/{}2017",
    "annotations/{}2017",  # as MMSegmentation unpacks them
)
PUBLISHED_MAPS = {  # first as COCO's archives unpack, then as Leopart and NeCo lay them out
    "coco_stuff": (
        "annotations/stuff_{}2017_pixelmaps",
        "annotations/stuff_annotations/stuff_{}2017_pixelmaps",
        "annotations/annotations/stuff_annotations/stuff_{}2017_pixelmaps",
    ),
    "coco_things": (
        "annotations/semantic_segmentation_{}2017",
        "annotations/panoptic_annotations/semantic_segmentation_{}2017",
    ),
}
DEPARTURE = {"coco_stuff": "", "coco_things": "things of stuffthingmaps in place of the panoptic annotations"}


def has(root: Path, kind: str) -> bool:
    """Whether the images and some maps of ``coco_stuff`` or ``coco_things`` are there."""
    return all(_folder(root, at, "val") for at in (IMAGES, PUBLISHED_MAPS[kind] + STUFF_THING_MAPS))


def open_part(root: Path, part: str, kind: str) -> LabelSet:
    """One part of ``coco_stuff`` or ``coco_things``, by the images' names; errors: ``open_label_set``."""
    images = _folder(root, IMAGES, part)
    if images is None:
        raise UserError(f"{root} holds no COCO images: none of {_any(IMAGES, part)}")
    classes = tuple(SUPERCATEGORIES[kind])
    if (folder := _folder(root, PUBLISHED_MAPS[kind], part)) is not None:
        source, departure, shift = folder.name, "", 0
    elif (folder := _folder(root, STUFF_THING_MAPS, part)) is not None:
        source, departure, shift = "stuffthingmaps", DEPARTURE[kind], 1
    else:
        places = _any(PUBLISHED_MAPS[kind] + STUFF_THING_MAPS, part)
        raise UserError(f"{root} has no maps of {kind}: none of {places}")
    found = by_stem(folder, MAP_SUFFIXES)
    # without MMSegmentation's, beside what they are made of
    maps = {stem: file for stem, file in found.items() if not stem.endswith("_labelTrainIds")}
    if not maps:
        told = f"holds only maps of train ids ({next(iter(found))}.png): the original ones are needed"
        raise UserError(f"{folder} {told}")
    files = paired(by_stem(images), maps)
    return LabelSet(kind, part, classes, files, label_table(kind, shift), source, departure, str(images))


def label_table(kind: str, shift: int) -> NDArray[np.int32]:
    """[256] the class of each value of a map; ids without a category are unknown.

    Args:
        shift: what the maps subtract from a category's id: 1 in ``stuffthingmaps``, where 255 is void; else
            0, where 0 is void.
    """
    table = np.full(256, UNKNOWN, np.int32)
    ids = [id for classes in SUPERCATEGORIES.values() for members in classes.values() for id in members]
    if shift == 0:
        ids += [0, *range(LAST_STUFF + 1, LAST_MERGED + 1)]
    table[np.array(ids) - shift] = 0
    table[VOID] = 0
    for label, members in enumerate(SUPERCATEGORIES[kind].values(), 1):
        table[np.array(members) - shift] = label
    return table


def _folder(root: Path, places: tuple[str, ...], part: str) -> Path | None:
    return first_folder(root, (place.format(part) for place in places))


def _any(places: tuple[str, ...], part: str) -> str:
    return ", ".join(place.format(part) for place in places)
