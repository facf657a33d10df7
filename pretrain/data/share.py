"""A validation split from a set that has none: ``--val-share 0.2``, of detection and of masks.

An image is drawn by a hash of its name, never by its place: it stands at :func:`place`, from 0 to 1, and is of the
validation below the share. So a larger share contains a smaller one, other files in the folder move nothing, and
every run has the same split. Versions of one photograph as Roboflow exports them (``a.rf.1.jpg``, ``a.rf.2.jpg``)
have one place: they would otherwise be learned and tested.
"""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

from pretrain.errors import UserError
from pretrain.files import read_mapping, write_json

FILE_NAME = "split.json"
SEED = 0


def place(name: str, seed: int = SEED) -> float:
    """Where an image stands, from 0 to 1: by its name below the folder of images, and the seed."""
    photograph = name.split(".rf.")[0]
    digest = hashlib.sha256(f"{seed}/{photograph}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def of_validation(places: Iterable[float], share: float, classes: Sequence[set[float]] = ()) -> set[float]:
    """The places that are of the validation.

    Args:
        places: of all images.
        classes: places of the images of each class. They are looked at, the rarest first. One that is owed an image
            of the validation (its images times the share, rounded) and has none gets that of its lowest place; one
            without an image of training gets that of its highest place back. This alone depends on the other
            images, and only in classes of a few.

    Raises:
        UserError: there are not two photographs to divide.
    """
    ordered = sorted(set(places))
    if len(ordered) < 2:
        raise UserError(f"--val-share: {len(ordered)} images cannot be divided; give more")
    chosen = {at for at in ordered if at < share}
    rarest_first = sorted(classes, key=lambda own: (len(own), min(own)))
    for own in rarest_first:
        if not own & chosen and len(own) > 1 and int(len(own) * share + 0.5) >= 1:
            chosen.add(min(own))
    for own in rarest_first:
        if own <= chosen:
            chosen.remove(max(own))
    chosen = chosen or {ordered[0]}
    return chosen if len(chosen) < len(ordered) else chosen - {ordered[-1]}


def leave_split(output: Path, share: float, train: Iterable[str], val: Iterable[str]) -> Path:
    """Write the names of both sides' images into a run's folder; returns the file."""
    names = {"train": sorted(train), "val": sorted(val)}
    return write_json(output / FILE_NAME, {"val_share": share, "seed": SEED, **names})


def share_of(run: Path) -> float:
    """The ``val_share`` of a run, by what it left; 0 of one that divided nothing."""
    file = run / FILE_NAME
    return float(read_mapping(file, "run")["val_share"]) if file.is_file() else 0.0
