"""Images with a label for each pixel, read in place: public sets, and folders of one's own.

Labels are 1 .. C, and 0 for pixels that do not count, whatever the files store.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from pretrain.data.datasets import coco, folder, layout, public
from pretrain.data.datasets.folder import MaskRule, mask_rule
from pretrain.data.datasets.label_set import LabelSet
from pretrain.errors import UserError

__all__ = ["SETS", "Kind", "LabelSet", "MaskRule", "kinds", "mask_rule", "open_label_set", "open_label_sets"]


class Kind(NamedTuple):
    """A kind of labeled set: what it looks like, whether a folder holds one, and how its part ``train`` or ``val`` is
    opened."""

    layout: str
    is_there: Callable[[Path], bool]
    open_part: Callable[[Path, str], LabelSet]


# {kind: itself}; a module that POSFIELD_IMPORT names adds to it
SETS: dict[str, Kind] = {
    "voc2012": Kind(
        public.VOC_LAYOUT,
        lambda root: public.voc_home(root) is not None and not layout.is_cvat(root),
        public.open_voc,
    ),
    "voc2012_train": Kind(public.VOC_LAYOUT, lambda root: False, partial(public.open_voc, own_train=True)),
    "ade20k": Kind(public.ADE_LAYOUT, public.is_ade, public.open_ade),
    "cityscapes": Kind(
        public.CITYSCAPES_LAYOUT, lambda root: (root / "leftImg8bit").is_dir(), public.open_cityscapes,
    ),
    **{
        kind: Kind(coco.LAYOUT, partial(coco.has, kind=kind), partial(coco.open_part, kind=kind))
        for kind in ("coco_things", "coco_stuff")
    },
}  # fmt: skip
RESERVED = (*SETS, "folder", "knn")  # names of public protocols, which a user's folder must not take


def kinds() -> tuple[str, ...]:
    """All kinds; ``folder``, masks of one's own, last."""
    return (*SETS, "folder")


def open_label_set(
    root: str | Path, part: str, kind: str = "auto", n_classes: int = 0, masks: MaskRule | None = None
) -> LabelSet:
    """The ``train`` or ``val`` part of a set. Files are listed but not read, except for ``n_classes=0`` of a
    ``folder`` without names.

    Args:
        root: the set's folder, or the one that usually contains it.
        kind: one of :func:`kinds`; ``auto``: the layout tells it, pairs of folders last.
        n_classes: of a ``folder``: how many classes count; 0: as many as are named, or else as the masks of both
            parts hold (each is read). For other kinds 0 or their number.
        masks: how masks of a ``folder`` are read.

    Raises:
        UserError: names the missing folder, list, map of an image or image of a map.
    """
    if part not in layout.PARTS:
        raise UserError(f"part {part!r} of {root}: it is train or val")
    root, kind = Path(root), kind_of(root, kind)
    if kind == "folder":
        return _own_name(folder.open_part(root, part, n_classes, masks or MaskRule()))
    has_rule = masks not in (None, MaskRule())
    if has_rule or (root / folder.LABELS).is_file():
        what = "a rule for masks" if has_rule else root / folder.LABELS
        told = f"if {root} holds masks of your own, the set is folder"
        raise UserError(f"{what} has no effect on {kind}; {told}")
    found = SETS[kind].open_part(root, part)
    if n_classes not in (0, len(found.classes)):
        raise UserError(f"n_classes={n_classes}: {kind} in {root} has {len(found.classes)}")
    return found


def open_label_sets(
    root: str | Path, kind: str = "auto", n_classes: int = 0, masks: MaskRule | None = None
) -> tuple[LabelSet, LabelSet]:
    """Both parts, as :func:`open_label_set`. Of a ``folder`` every mask is read, and checked.

    Raises:
        UserError: as :func:`open_label_set`, and :func:`pretrain.data.datasets.folder.open_parts`.
    """
    if kind_of(root, kind) != "folder":
        train, val = (open_label_set(root, part, kind, n_classes, masks) for part in layout.PARTS)
        return train, val
    train, val = folder.open_parts(Path(root), n_classes, masks or MaskRule())
    return _own_name(train), _own_name(val)


def kind_of(root: str | Path, kind: str = "auto") -> str:
    """A kind, or for ``auto`` the one whose layout a folder has.

    Raises:
        UserError: no such folder or kind; the layout is none that is known, or of several.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"no folder {root}")
    if kind != "auto":
        if kind not in kinds():
            raise UserError(f"kind {kind!r} of {root}: it is auto or one of {', '.join(kinds())}")
        return kind
    found = [kind for kind, own in SETS.items() if own.is_there(root)]
    found = found or ["folder"] * layout.has(root)
    if not found:
        layouts = "; ".join(dict.fromkeys([*(own.layout for own in SETS.values()), layout.LAYOUT]))
        raise UserError(f"{root} holds no labeled set that is known: looked for {layouts}")
    if len(found) > 1:
        raise UserError(f"{root} holds several labeled sets: say which kind, {' or '.join(found)}")
    return found[0]


def _own_name(found: LabelSet) -> LabelSet:
    return replace(found, name=f"folder-{found.name}") if found.name in RESERVED else found
