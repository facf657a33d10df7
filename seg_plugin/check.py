"""What is in a set of masks, and everything odd in it; nothing is changed.

It reads what a training reads (:mod:`seg_plugin.data`), but goes on where a training ends, and decodes every image
and mask of both parts.
"""

import io
import logging
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

from pretrain.analysis.colors import distinct_colors
from pretrain.analysis.dense_figures import labels_figure
from pretrain.analysis.figures import as_array
from pretrain.data.check import Odd, Report, Size, common, in_two_splits
from pretrain.data.datasets import LabelSet, MaskRule, folder, kind_of, layout
from pretrain.data.datasets.maps import UNKNOWN, read_map
from pretrain.data.images import in_threads, read_picture
from pretrain.errors import UserError
from seg_plugin.data import PARTS, check_parts, in_words, label_set, recipe_for, section

OWN = "folder"  # the kind of masks of one's own
TRIED_SHARE = 0.2  # of a set that nothing divides
STRAY = 8  # so many values, and half of a mask's, that nowhere fill 2 x 2 pixels: nobody drew them
ALONE, UNMASKED = "masks without an image", "images without a mask"
BROKEN, BAD = "unreadable images", "masks that cannot be read"
JPEG = "masks that are JPEGs (lossy: they hold values that nobody drew)"
NO_PNG = "images among the masks that are no PNG, which are not read"
COLORED = "colored masks, which are no label maps (labels.yaml may say what colors mean)"
OTHER_SIZE, BEYOND = "masks of another size than their image", "masks with values that are no class"
STRAYS = "masks with stray values, as JPEG or smooth resizing leaves them"
VOID = "masks of which no pixel counts"
DRAWN_FIRST = (BEYOND, STRAYS, OTHER_SIZE, VOID)  # samples of these
# A training begins with these among its masks, and ends where it meets one
FATAL = (BAD, JPEG, COLORED, OTHER_SIZE, BEYOND)


@dataclass(frozen=True)
class Seen:
    """What one pair of files holds.

    Attributes:
        size: of the image; None: it cannot be read.
        values: {stored value of the mask: pixels}; empty: it cannot be read.
        faults: {kind: more on it}.
    """

    size: Size | None
    values: dict[int, int]
    faults: dict[str, str]


@dataclass
class Split:
    """One part, as far as it is there.

    Attributes:
        found: how it lies there, of masks of one's own.
        labels: the pairs that are there.
        seen: of each pair.
        pixels: [N, 1 + C] of each pair and label, 0: not counted.
    """

    name: str
    found: folder.Found | None
    labels: LabelSet
    seen: list[Seen]
    pixels: NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        self.pixels = np.zeros((len(self.seen), 1 + len(self.labels.classes)), np.int64)
        for row, seen in zip(self.pixels, self.seen):
            for value, n in seen.values.items():
                if (label := self.label(value)) != UNKNOWN:
                    row[label] += n
                    continue
                unknown = [str(v) for v in sorted(seen.values) if self.label(v) == UNKNOWN]
                seen.faults[BEYOND] = f" ({', '.join(unknown[:5])}{', ...' * (len(unknown) > 5)})"
            if row[0] and not row[1:].any() and BEYOND not in seen.faults:
                seen.faults[VOID] = ""

    def label(self, value: int) -> int:
        """Of a stored value."""
        return int(self.labels.table[value]) if value < len(self.labels.table) else UNKNOWN

    @property
    def images(self) -> dict[str, Path]:
        """{name: file}."""
        return {name.lstrip("/"): Path(path) for name, path in self.labels.named.items()}


def check(data: Path, masks: MaskRule | None = None, n_classes: int = 0) -> Report:
    """Look at a set.

    Args:
        masks, n_classes: as of a training; 0: what the set says.

    Raises:
        UserError: there is none, or what describes it cannot be read.
    """
    rule, kind = masks or MaskRule(), kind_of(data)
    splits = _own(data, rule, n_classes) if kind == OWN else _public(data, rule)
    odd = [each for split in splits for each in [*_of_names(split), *_of_files(split)]]
    odd += [*_unlisted(splits), *_of_classes(splits)]
    odd += in_two_splits({split.name: split.images for split in splits})
    odd = [each for each in odd if each.names]
    refused, notes = _tried(data, rule, n_classes)
    stops = [f"it would end in the first epoch: {each}" for each in odd if each.what in FATAL]
    sizes = common(seen.size for split in splits for seen in split.seen if seen.size)
    told = f"masks ({kind}): {in_words([split.labels for split in splits])}"
    table = _counts(splits)
    return Report(
        data, "posfield segment", splits, told, *table, f"images {sizes} pixels" if sizes else "no image can be read", odd,
        refused or "".join(stops[:1]), notes,
    )  # fmt: skip


def _own(data: Path, rule: MaskRule, n_classes: int) -> list[Split]:
    """The parts that are there, however bad they are; of one part that is both, as --val-share would divide it."""
    found, errors = list[folder.Found](), list[UserError]()
    for part in layout.PARTS:
        try:
            found.append(folder.find(data, part, n_classes, rule))
        except UserError as error:
            errors.append(error)
    if not found and not rule.val_share:
        try:
            return _own(data, rule.model_copy(update={"val_share": TRIED_SHARE}), n_classes)
        except UserError:
            raise errors[0] from None
    if not found:
        raise errors[0]
    none = [each.label_set((), n_classes) for each in found]
    seen = [_seen(labels) for labels in none]
    values = {value for part in seen for pair in part for value in pair.values}
    return [Split(f.part, f, f.label_set(values, n_classes), own) for f, own in zip(found, seen)]


def _public(data: Path, rule: MaskRule) -> list[Split]:
    recipe = recipe_for(data, None, {}, rule)
    parts = [label_set(section(recipe, data, part, (), rule)) for part in PARTS.values()]
    return [Split(labels.part, None, labels, _seen(labels)) for labels in parts]


def _tried(data: Path, rule: MaskRule, n_classes: int) -> tuple[str, list[str]]:
    """What a training's own checks say: why not, or its notes."""
    logging.disable(logging.INFO)  # of which this report is the longer form
    try:
        recipe = recipe_for(data, None, {"num_classes": n_classes} if n_classes else {}, rule)
        train, val = (label_set(section(recipe, data, part, (), rule)) for part in PARTS.values())
        check_parts(train, val)
    except UserError as error:
        return str(error), []
    finally:
        logging.disable(logging.NOTSET)
    sizes = f"a training takes {len(train)} images, its evaluation {len(val)}"
    return "", [f"{sizes}, of {recipe.num_classes} classes"]


# --- files ------------------------------------------------------------------------------------------------


def _seen(labels: LabelSet) -> list[Seen]:
    return list(in_threads(lambda pair: _look(Path(pair[0]), Path(pair[1]), labels.colors), labels.files))


def _look(image: Path, mask: Path, colors: tuple[int, ...]) -> Seen:
    faults, size, values = dict[str, str](), None, dict[int, int]()
    try:
        height, width = read_picture(image).shape[:2]
        size = width, height
    except UserError:
        faults[BROKEN] = ""
    mode = _mode(mask)
    try:
        stored = read_map(mask, colors)
    except UserError as error:
        return Seen(size, {}, faults | _why(mask, mode, bool(colors), error))
    values = dict(zip(*(of.tolist() for of in np.unique(stored, return_counts=True))))
    if size and stored.shape[::-1] != size:
        turned = ", as EXIF turns it" if stored.shape == size else ""
        faults[OTHER_SIZE] = f" ({stored.shape[1]} x {stored.shape[0]}, not {size[0]} x {size[1]}{turned})"
    if not colors:
        faults |= (
            {"palette masks (the labels are their indices, not their colors)": ""} if mode == "P" else {}
        )
        faults |= {"masks of 16 bits": ""} if mode.startswith("I") else {}
        if (n := _strays(stored, list(values))) >= max(STRAY, len(values) / 2):
            faults[STRAYS] = f" ({n} of {len(values)} values)"
    return Seen(size, values, faults)


def _mode(mask: Path) -> str:
    """PIL's word for a PNG; ``JPEG``, or nothing of what is no image."""
    try:
        with open(mask, "rb") as file:
            if file.read(2) == b"\xff\xd8":
                return "JPEG"
            file.seek(0)
            with PngImagePlugin.PngImageFile(file) as image:
                return image.mode
    except (OSError, SyntaxError, ValueError):
        return ""


def _why(mask: Path, mode: str, has_colors: bool, error: UserError) -> dict[str, str]:
    """What is odd about a mask that is no label map."""
    if mode == "JPEG":
        return {JPEG: ""}
    if error.__cause__ is not None or not mode:  # the decoder's own
        return {BAD: f" ({error.__cause__ or 'no file'})"}
    if has_colors:
        return {BEYOND: f" ({str(error).removeprefix(str(mask)).strip()})"}
    with open(mask, "rb") as file, PngImagePlugin.PngImageFile(file) as image:
        red, green, blue = np.moveaxis(np.asarray(image.convert("RGB"), np.uint32), -1, 0)
    is_gray = bool(((red == green) & (green == blue)).all())
    n_colors = len(np.unique(red << 16 | green << 8 | blue))
    return {COLORED: " (gray: keep one channel)" if is_gray else f" ({n_colors} colors)"}


def _strays(stored: np.ndarray, values: Sequence[int]) -> int:
    """How many values of a map [H, W] nowhere fill 2 x 2 pixels."""
    corner = stored[:-1, :-1]
    fill = (corner == stored[1:, :-1]) & (corner == stored[:-1, 1:]) & (corner == stored[1:, 1:])
    return len(set(values) - set(np.unique(corner[fill]).tolist()))


def _of_names(split: Split) -> Iterable[Odd]:
    """What has no partner, of masks of one's own; of other sets a training's own error names it."""
    if (found := split.found) is None:
        return
    yield Odd(UNMASKED, split.name, [stem for stem in found.wanted if stem not in found.masks])
    yield Odd(ALONE, split.name, [stem for stem in found.wanted if stem not in found.images])
    others = [str(Path(path).relative_to(found.folder)) for path in found.others]
    yield Odd("PNG files that are called otherwise than the masks", split.name, others)
    others = [str(Path(path).relative_to(found.folder)) for path in found.no_png]
    lossy = (" (JPEG: lossy)" if name.lower().endswith((".jpg", ".jpeg")) else "" for name in others)
    yield Odd(NO_PNG, split.name, [f"{name}{more}" for name, more in zip(others, lossy)])


def _of_files(split: Split) -> Iterable[Odd]:
    kinds = defaultdict[str, list[str]](list)
    for (image, mask), seen in zip(split.labels.files, split.seen):
        for kind, more in seen.faults.items():
            kinds[kind].append(f"{Path(image if kind == BROKEN else mask).name}{more}")
    for kind in sorted(kinds):
        yield Odd(kind, split.name, kinds[kind])


def _unlisted(splits: Sequence[Split]) -> Iterable[Odd]:
    own = [split.found for split in splits if split.found and split.found.stems is not None]
    listed = {stem for found in own for stem in found.stems or ()}
    there = {stem for found in own for stem in found.images}
    yield Odd("images that no list names", "+".join(found.part for found in own), sorted(there - listed))


# --- classes ----------------------------------------------------------------------------------------------


def _of_classes(splits: Sequence[Split]) -> Iterable[Odd]:
    classes, both = splits[0].labels.classes, " and ".join(split.name for split in splits)
    has = [split.pixels.any(axis=0) for split in splits]  # [1 + C] each

    def named(chosen: Any) -> list[str]:
        return [classes[k - 1] for k in np.flatnonzero(chosen) if k]

    yield Odd("classes that never occur", both, named(~np.any(has, axis=0)))
    if len(splits) > 1:
        train, val = has
        yield Odd("classes of validation that training never has", splits[1].name, named(val & ~train))
        yield Odd("classes of training that validation never has", splits[0].name, named(train & ~val))


def _counts(splits: Sequence[Split]) -> tuple[list[str], list[list[Any]]]:
    """Heads and rows of a table: images and masks; of each class its share of the pixels that count, and its images;
    of what does not count, the share of all pixels."""
    heads = [""]
    rows: list[list[Any]] = [["images"], ["masks"], ["not counted"]]
    rows += [[f"class {name.removeprefix('class ')}"] for name in splits[0].labels.classes]
    for split in splits:
        heads += [f"{split.name}: pixels", "images"]
        found, totals = split.found, split.pixels.sum(axis=0)
        n_images = len(found.images) if found and found.stems is None else len(split.seen)
        n_masks = len(found.masks) if found and found.stems is None else len(split.seen)
        shares = [totals[0] / max(totals.sum(), 1), *(totals[1:] / max(totals[1:].sum(), 1))]
        cells: list[tuple[str, int]] = [("", n_images), ("", n_masks)]
        cells += [(f"{share:.2%}", int(n)) for share, n in zip(shares, (split.pixels > 0).sum(axis=0))]
        for row, pair in zip(rows, cells):
            row += pair
    return heads, rows


# --- samples ----------------------------------------------------------------------------------------------


def pictures(report: Report, count: int) -> list[dict[str, Any]]:
    """``count`` pairs of all parts, evenly, and the first with an odd mask of each kind; drawn."""
    all_of = [(split, i) for split in report.splits for i, seen in enumerate(split.seen) if _can_draw(seen)]
    if not all_of or not count:
        return []
    places = np.unique(np.linspace(0, len(all_of) - 1, count).round().astype(int)).tolist()
    first = [
        next(((split, i) for split, i in all_of if kind in split.seen[i].faults), None)
        for kind in DRAWN_FIRST
    ]
    chosen = {
        (split.name, i): (split, i) for split, i in [*filter(None, first), *(all_of[k] for k in places)]
    }
    return list(_drawn(report.splits, list(chosen.values())))


def _can_draw(seen: Seen) -> bool:
    return seen.size is not None and bool(seen.values)


def _drawn(splits: Sequence[Split], chosen: Sequence[tuple[Split, int]]) -> Iterator[dict[str, Any]]:
    """The image beside its mask over it, with a legend; a class has one color on all of them."""
    totals = Counter[int]()
    for split in splits:
        totals.update(dict(enumerate(split.pixels.sum(axis=0).tolist())))
    labels = [k for k, n in totals.most_common() if k and n]
    names = *splits[0].labels.classes, "no class"
    colors = dict(zip([*labels, len(names)], distinct_colors(len(labels) + 1)))
    for split, i in chosen:
        image, mask = map(Path, split.labels.files[i])
        stored, table = read_map(mask, split.labels.colors), split.labels.table
        known = table[np.minimum(stored, len(table) - 1)]
        drawn = np.where((stored >= len(table)) | (known == UNKNOWN), len(names), known).astype(np.int32)
        figure, file = labels_figure([read_picture(image)], [drawn], {}, names, colors), io.BytesIO()
        Image.fromarray(as_array(figure)).save(file, "PNG")
        faults = "; ".join(f"{kind}{more}" for kind, more in split.seen[i].faults.items())
        n = int((split.pixels[i, 1:] > 0).sum())
        caption = f"{split.name}, {n} {'class' if n == 1 else 'classes'}{faults and f'; {faults}'}"
        yield {"title": image.name, "caption": caption, "png": file.getvalue()}
