"""Images with a label for each pixel, read in place: Pascal VOC, ADE20K, COCO-Things and -Stuff, pairs of
folders.

Labels are 1 .. C, and 0 for pixels that do not count, whatever the files store. Each data set has its own
module.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from pretrain.data.datasets import ade20k, coco, folder, voc2012
from pretrain.data.datasets.label_set import LabelSet
from pretrain.errors import UserError

__all__ = ["KINDS", "LabelSet", "open_label_set"]

# Of each kind: what it looks for, whether it is there, and how its parts are opened.
_KINDS: dict[str, tuple[str, Callable[[Path], bool], Callable[[Path, str], LabelSet]]] = {
    "voc2012": (voc2012.LAYOUT, lambda root: voc2012.find(root) is not None, voc2012.open_part),
    "ade20k": (ade20k.LAYOUT, ade20k.is_named, ade20k.open_part),
    "coco_things": (
        coco.LAYOUT,
        lambda root: coco.has(root, "coco_things"),
        lambda r, p: coco.open_part(r, p, "coco_things"),
    ),
    "coco_stuff": (
        coco.LAYOUT,
        lambda root: coco.has(root, "coco_stuff"),
        lambda r, p: coco.open_part(r, p, "coco_stuff"),
    ),
    "folder": (folder.LAYOUT, folder.has, folder.open_part),
}
KINDS = tuple(_KINDS)
RESERVED = (*KINDS, "knn")  # names of public protocols, which a user's folder must not take


def open_label_set(root: str | Path, part: str, kind: str = "auto", n_classes: int = 0) -> LabelSet:
    """The ``train`` or ``val`` part of a set. Files are listed but not read, except for ``n_classes=0`` of a
    ``folder``.

    Args:
        root: the set's folder, or the one that usually contains it.
        kind: one of :data:`KINDS`; ``auto``: the layout tells it, pairs of folders last.
        n_classes: of a ``folder``: labels 1 .. n; 0: as many as ``classes.txt`` names, or else the largest
            label in the maps of the training part (each is read). For other kinds 0 or their number.

    Raises:
        UserError: names the missing folder, list, map of an image or image of a map.
    """
    root = Path(root)
    if part not in ("train", "val"):
        raise UserError(f"part {part!r} of {root}: it is train or val")
    if not root.is_dir():
        raise UserError(f"no folder {root}")
    if kind == "auto":
        kind = _kind_of(root)
    if kind == "folder":
        own = folder.open_part(root, part, n_classes)
        return replace(own, name=f"folder-{own.name}") if own.name in RESERVED else own
    if kind not in KINDS:
        raise UserError(f"kind {kind!r} of {root}: it is auto or one of {', '.join(KINDS)}")
    found = _KINDS[kind][2](root, part)
    if n_classes not in (0, len(found.classes)):
        raise UserError(f"n_classes={n_classes}: {kind} in {root} has {len(found.classes)}")
    return found


def _kind_of(root: Path) -> str:
    found = [kind for kind, (_, is_there, _) in _KINDS.items() if is_there(root)]
    if len(found) > 1 and "folder" in found:
        found.remove("folder")
    if not found:
        layouts = "; ".join(dict.fromkeys(f"{layout}" for layout, _, _ in _KINDS.values()))
        raise UserError(f"{root} holds no labeled set that is known: looked for {layouts}")
    if len(found) > 1:
        raise UserError(f"{root} holds several labeled sets: say which kind, {' or '.join(found)}")
    return found[0]
