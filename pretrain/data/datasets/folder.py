"""Images with masks of one's own. One rule for training, evaluation, probes and pictures: labels are what the
file says.

Folders: ``images|img|JPEGImages`` with ``annotations|masks|labels|SegmentationClass``, in or around
``train|training`` and ``val|validation|valid|test``; or both without parts, and the lists ``train.txt`` and
``val.txt``; or what tools and people make of it (:mod:`pretrain.data.datasets.layout`). A mask is a PNG of 8 or 16 bits
or with a palette, called ``NAME.png``, ``NAME_mask.png``, ``NAME_L.png`` or by ``mask_name``. A set that has one part
is divided by ``val_share`` (:mod:`pretrain.data.share`).

Line k of an optional ``classes.txt`` names label k, from 0. Without it, and without ``labels.yaml``, a tool's own file
does (:mod:`pretrain.data.datasets.exports`). An optional ``labels.yaml`` holds a :class:`MaskRule`, to merge, rename or
ignore::

    classes: [road, car]              # in their order; left out: as map names them first
    map: {0: road, 7: car, 8: car}    # any other value is an error; a color is '#804080' or '128,64,128'
    void: [255]                       # not counted
    mask_name: '{stem}_seg.png'
"""

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pretrain.data import share as shares
from pretrain.data.datasets import exports, layout
from pretrain.data.datasets.label_set import LabelSet
from pretrain.data.datasets.listing import (
    IMAGE_SUFFIXES,
    MAP_SUFFIXES,
    Pairs,
    below,
    by_stem,
    named,
    paired,
)
from pretrain.data.datasets.maps import UNKNOWN, read_map
from pretrain.data.images import in_threads
from pretrain.errors import UserError
from pretrain.files import breaks_line, read_lines
from pretrain.settings import Settings, build, read_yaml, replaced, setting, split_words

MASK_NAMES = ("{stem}", "{stem}_mask", "{stem}_L")
CLASSES, LABELS, NUMBERS = "classes.txt", "labels.yaml", "their numbers"
VOID, NO_CLASS = 255, "void"
MAX_NAME = 255  # characters of a class's name
MAX_VALUE, COLOR = 2**16 - 1, 1 << 24  # a color 0xRRGGBB is told from a value by the bit above
HINT = f"; give --map VALUE=LABEL or --void VALUE, or say what it means in {LABELS}"


class MaskRule(Settings):
    """How masks of one's own are read. What options say goes before what ``labels.yaml`` says."""

    classes: tuple[str, ...] = setting((), "names of the labels 0, 1, ...")
    map: dict[str, str] = setting(dict, "{value or color in the mask: label, its name, or void}")
    void: tuple[str, ...] = setting((), "values that do not count; none given: 255")
    mask_name: str = setting(
        "", "of an image's mask, {stem}_seg.png", pattern=r"^([^/{}]*\{stem\}[^/{}]*\.png)?$"
    )
    val_share: float = setting(0.0, "of the images, for validation, of a set that has one part", ge=0, lt=1)


def mask_rule(void: str = "", map: str = "", mask_name: str = "", val_share: float = 0.0) -> MaskRule:
    """A rule from words: ``0,255``, ``255=1,7=2`` and ``{stem}_seg.png``. Raises UserError, which names the word."""
    pairs = split_words([word for word in map.split(",") if word])
    values = {"void": void, "map": pairs, "mask_name": mask_name, "val_share": val_share}
    return replaced(MaskRule(), values, "masks")


@dataclass(frozen=True)
class _Meaning:
    """What the values of a folder's masks mean.

    Attributes:
        map: value -> label; ``is_closed``: there are no values but those of ``map`` and ``void``, otherwise any
            other is its own label.
        names: of the labels 0, 1, ..., if anyone says them.
        closed_by: the file to which ``is_closed`` is due.
        colors: of masks whose colors are labels; a value is a place among them.
        val_share: of a set that has one part.
    """

    map: Mapping[int, int]
    void: tuple[int, ...]
    is_closed: bool
    names: tuple[str, ...]
    named_by: str
    closed_by: str
    mask_name: str
    colors: tuple[int, ...]
    val_share: float

    def counted(self, n_labels: int) -> list[int]:
        """Those of the labels 0 .. n - 1 that count."""
        targets = set(self.map.values())
        return [k for k in range(n_labels) if self.is_closed or k not in self.void or k in targets]

    def labels(self, seen: Mapping[int, str]) -> dict[int, int]:
        """{value: label} of those values that count."""
        counts = [v for v in seen if v in self.map or not (self.is_closed or v in self.void)]
        return {v: self.map.get(v, v) for v in counts}

    def table(self, n_labels: int) -> np.ndarray:
        """[V] int32, as :class:`LabelSet` has it."""
        number = {k: i for i, k in enumerate(self.counted(n_labels), 1)}
        table = np.full(max(n_labels, VOID, *self.map, *self.void) + 1, UNKNOWN, np.int32)
        if not self.is_closed:
            table[list(number)] = list(number.values())
        table[list(self.void)] = 0
        for value, label in self.map.items():
            table[value] = number.get(label, UNKNOWN)  # one that no mask holds may lead beyond all labels
        return table


@dataclass(frozen=True)
class Found:
    """A part as it lies there, neither paired nor read.

    Attributes:
        images, masks: {stem: path}.
        others: further PNG files among the masks, which are called otherwise.
        stems: those of a list, in its order, or of a divided set; None: all.
    """

    root: Path
    part: str
    meaning: _Meaning
    images: dict[str, str]
    masks: dict[str, str]
    others: Sequence[str]
    stems: Sequence[str] | None
    place: layout.Place

    @property
    def folder(self) -> Path:
        """Of the masks."""
        return self.place.masks

    @property
    def wanted(self) -> Sequence[str]:
        """Stems of which both an image and a mask should be there."""
        return sorted(self.images.keys() | self.masks.keys()) if self.stems is None else self.stems

    @property
    def no_png(self) -> Sequence[str]:
        """Other images among the masks; sorted."""
        if self.place.images == self.folder:
            return []
        return sorted(path for _, path in below(self.folder, set(IMAGE_SUFFIXES) - set(MAP_SUFFIXES)))

    def pairs(self) -> Pairs:
        """Image and mask of each. Raises UserError: one is missing; names it."""
        if not self.masks and self.others:
            raise UserError(f"no mask is called {self.meaning.mask_name}; one is {self.others[0]}")
        if not self.masks:
            raise UserError(f"no *.png in {self.folder}")
        return paired(self.images, self.masks, self.stems, self.place.listed or "")

    def label_set(self, values: Iterable[int], n_classes: int = 0) -> LabelSet:
        """Of the pairs that are there, whatever their masks hold; errors: only what ``n_classes`` contradicts.

        Args:
            values: that the masks of all parts hold: how many labels there are, if nothing else says it.
        """
        held = self.meaning.labels(dict.fromkeys(values, "")).values()
        n_labels = _n_labels(self.root, self.meaning, n_classes) or 1 + max(held, default=0)
        both = [stem for stem in self.wanted if stem in self.images and stem in self.masks]
        files = [(self.images[stem], self.masks[stem]) for stem in both]
        return _label_set(self, files, n_labels)


def find(root: Path, part: str, n_classes: int, rule: MaskRule) -> Found:
    """What there is of one part, for a check that goes on where :func:`open_part` ends.

    Raises:
        UserError: there is no such part; what describes it cannot be read.
    """
    return _find(root, part, _meaning(root, rule, n_classes))


def has_masks(root: Path) -> bool:
    """Whether there are images among what may be masks of a training part; of other labels there are none."""
    return any(any(below(at, IMAGE_SUFFIXES)) for at in layout.mask_folders(root))


def open_part(root: Path, part: str, n_classes: int, rule: MaskRule) -> LabelSet:
    """One part, sorted by name or in the order of its list; errors as for ``open_label_set``.

    Args:
        n_classes: as of ``open_label_set``.
    """
    meaning = _meaning(root, rule, n_classes)
    if not (n_labels := _n_labels(root, meaning, n_classes)):
        seen = _seen([pair for each in layout.PARTS for pair in _find(root, each, meaning).pairs()], meaning)
        n_labels = 1 + max(meaning.labels(seen).values(), default=0)
    found = _find(root, part, meaning)
    return _label_set(found, found.pairs(), n_labels)


def open_parts(root: Path, n_classes: int, rule: MaskRule) -> tuple[LabelSet, LabelSet]:
    """Both parts. Every mask is read, and what they hold is compared with what is said of them.

    Raises:
        UserError: fewer than two classes are ever seen; a label without a name, or names without a label.
    """
    meaning = _meaning(root, rule, n_classes)
    n_labels = _n_labels(root, meaning, n_classes)
    parts = [_find(root, part, meaning) for part in layout.PARTS]
    train, val = (found.pairs() for found in parts)
    seen = _seen([*train, *val], meaning)
    labels, n_masks = meaning.labels(seen), len(train) + len(val)
    if unknown := seen.keys() - labels.keys() - set(meaning.void):
        value = min(unknown)
        raise UserError(
            f"{seen[value]} holds the value {value}, which {meaning.closed_by} does not name{HINT}"
        )
    if len(set(labels.values())) < 2:
        if set(seen) == {0, VOID} and VOID not in labels:
            told = "its masks hold 0 and 255 alone, and 255 is not counted"
            raise UserError(f"{root}: {told}; if 255 is the foreground, it must be 1: give --map 255=1")
        told = f"fewer than two classes are ever seen in its {n_masks} masks, which hold {sorted(seen)[:9]}"
        raise UserError(f"{root}: {told}; say what they mean by --map VALUE=LABEL, --void VALUE or {LABELS}")
    largest, n_names, named_by = max(labels.values()), len(meaning.names), root / meaning.named_by
    if n_names and largest >= n_names:
        value = next(value for value, label in labels.items() if label == largest)
        told = f"{named_by} names {n_names} labels, 0 to {n_names - 1}, but {seen[value]} holds {value}"
        raise UserError(f"{told}: name it (line k names label k, from 0){HINT}")
    counted = meaning.counted(n_names)
    if not n_classes and not meaning.is_closed and max(counted, default=0) > largest:
        n, told = (
            len(counted),
            f"but the largest in {n_masks} masks is {largest}; take out the names that are too much",
        )
        way = f"if that is right, say so by --classes {n} (posfield segment: num_classes={n})"
        raise UserError(f"{named_by} names the labels 0 to {n_names - 1}, {told}, or {way}")
    if VOID in seen and largest > VOID and not (n_labels or rule.void):
        told = f"is 255 a label, as its masks hold {largest}, too? Give --void 255 or --void 65535"
        raise UserError(f"{root}: {told}")
    n_labels = n_labels or largest + 1
    made = [_label_set(found, files, n_labels) for found, files in zip(parts, (train, val))]
    return made[0], made[1]


def _label_set(found: Found, files: Pairs, n_labels: int) -> LabelSet:
    root, part, meaning = found.root, found.part, found.meaning
    names, said = meaning.names or [f"class {k}" for k in range(n_labels)], [part]
    share = meaning.val_share if found.place.is_whole else 0.0
    void = [f"#{meaning.colors[v]:06x}" if meaning.colors else str(v) for v in sorted(meaning.void)]
    said += [f"not counted: {void}"] * (void != [str(VOID)]) + [f"map: {meaning.map}"] * bool(meaning.map)
    said += [f"divided by --val-share {share:g}"] * bool(share)
    return LabelSet(
        root.resolve().name, part, tuple(names[k] for k in meaning.counted(n_labels)), files,
        meaning.table(n_labels), source=", ".join(said), folder=str(found.place.images),
        named_by=meaning.named_by, void=", ".join(void), colors=meaning.colors, hint=HINT, val_share=share,
    )  # fmt: skip


def _n_labels(root: Path, meaning: _Meaning, n_classes: int) -> int:
    """0: only the masks say it."""
    if not meaning.names:
        return next(n for n in range(n_classes, 2 * MAX_VALUE) if len(meaning.counted(n)) == n_classes)
    if n_classes not in (0, n := len(meaning.counted(len(meaning.names)))):
        told = f"{root / meaning.named_by} names {n} that count"
        raise UserError(f"{told}, not {n_classes} classes, as is asked for; change one of them")
    return len(meaning.names)


def _seen(files: Pairs, meaning: _Meaning) -> dict[int, str]:
    """{value: the first file that holds it}."""
    values = in_threads(lambda pair: np.unique(read_map(Path(pair[1]), meaning.colors)).tolist(), files)
    found: dict[int, str] = {}
    for of_file, (_, file) in zip(values, files):
        found = dict.fromkeys(of_file, file) | found
    return found


# --- the files --------------------------------------------------------------------------------------------


def _find(root: Path, part: str, meaning: _Meaning) -> Found:
    rules = (meaning.mask_name.removesuffix(".png"),) if meaning.mask_name else MASK_NAMES
    place = layout.find(root, part, rules, is_divided=meaning.val_share > 0)
    images, masks = by_stem(place.images), by_stem(place.masks, MAP_SUFFIXES, may_be_empty=True)
    is_beside, stems = place.images == place.masks, place.stems(root)
    by_rule = [named(masks, rule) for rule in rules if rule != "{stem}" or not is_beside]
    best = max(by_rule, key=lambda masks: len(masks.keys() & images.keys()))  # the one that fits most
    taken = set(best.values())
    if is_beside:
        images = {stem: path for stem, path in images.items() if path not in taken}
    others = [] if is_beside else [path for path in masks.values() if path not in taken]
    if place.is_whole:
        stems = _side(part, meaning.val_share, images, place, stems or sorted(images.keys() | best.keys()))
    return Found(root, part, meaning, images, best, others, stems, place)


def _side(
    part: str, share: float, images: dict[str, str], place: layout.Place, stems: list[str]
) -> list[str]:
    """Those of one part."""
    names = {stem: os.path.relpath(images[stem], place.images) if stem in images else stem for stem in stems}
    at = {stem: shares.place(name.replace(os.sep, "/")) for stem, name in names.items()}
    val = shares.of_validation(at.values(), share)
    return [stem for stem in stems if (at[stem] in val) == (part == "val")]


# --- what their values mean -------------------------------------------------------------------------------


def _meaning(root: Path, rule: MaskRule, n_classes: int) -> _Meaning:
    file = root / LABELS
    said = build(MaskRule, [read_yaml(file)], str(file)) if os.path.lexists(file) else MaskRule()
    if not (os.path.lexists(file) or os.path.lexists(root / CLASSES)) and (told := exports.told(root)):
        file, said = told.file, _of_tool(told)
    closed_by = str(file.relative_to(root))
    if twice := [v for v in rule.map if v in rule.void]:
        raise UserError(f"{twice[0]} stands in --map and in --void; take it out of one of them")
    pairs = {_value(v, "--void" if rule.void else file): NO_CLASS for v in rule.void or said.void}
    pairs |= {_value(v, file): target for v, target in said.map.items()}
    pairs |= {_value(v, "--map"): target for v, target in rule.map.items()}
    targets = list(dict.fromkeys(target for target in said.map.values() if target != NO_CLASS))
    by_name = bool(targets) and not all(target.isdecimal() for target in targets)
    _check_names(said.classes, file)
    names, named_by = said.classes or (tuple(targets) if by_name else ()), closed_by
    if not names:
        names, named_by = _names(root / CLASSES), CLASSES
    elif said.map and (absent := [n for k, n in enumerate(names) if not {n, str(k)} & {*targets}]):
        raise UserError(f"{file}: no value of map is class {absent[0]!r}; name one, or take the class out")
    if said.map and not names:
        names, named_by = tuple(f"class {k}" for k in range(1 + max(map(int, targets), default=0))), NUMBERS
    labels = {v: _label(target, names, v) for v, target in pairs.items() if target != NO_CLASS}
    not_counted = [v for v, target in pairs.items() if target == NO_CLASS]
    colors = tuple(sorted(v - COLOR for v in pairs if v >= COLOR))
    if colors and len(colors) < len(pairs):
        raise UserError(f"{file}: values and colors are both named; the masks hold one of them")
    if not (not_counted or colors or VOID in labels or max(len(names), n_classes) > VOID):
        not_counted = [VOID]
    place = {color + COLOR: i for i, color in enumerate(colors)}
    labels = {place.get(v, v): label for v, label in labels.items()}
    void, named_by = tuple(place.get(v, v) for v in not_counted), named_by if names else NUMBERS
    mask_name = rule.mask_name or said.mask_name
    share, is_closed = rule.val_share or said.val_share, bool(said.map or colors)
    return _Meaning(labels, void, is_closed, names, named_by, closed_by, mask_name, colors, share)


def _of_tool(told: exports.Told) -> MaskRule:
    """A tool's file as a rule; the void is not counted, nor is 255 where it is no class."""
    targets = {v: NO_CLASS if name.lower() == NO_CLASS else name for v, name in told.names.items()}
    classes = tuple(name for name in targets.values() if name != NO_CLASS)
    is_255 = bool(told.void) and str(VOID) not in (*told.names, *told.void)
    return MaskRule(classes=classes, map=targets, void=(*told.void, *[str(VOID)] * is_255))


def _value(text: str, where: object) -> int:
    """A stored value, or a color with the bit ``COLOR``."""
    try:
        if text.startswith("#") and len(text) == 7:
            return COLOR + int(text[1:], 16)
        numbers = [int(part) for part in text.split(",")]
        if len(numbers) == 1 and 0 <= numbers[0] <= MAX_VALUE:
            return numbers[0]
        return COLOR + int.from_bytes(bytes(numbers), "big") if len(numbers) == 3 else int("")
    except ValueError as error:
        told = f"{text!r} is no value from 0 to {MAX_VALUE}, and no color such as '#804080'"
        raise UserError(f"{where}: {told}") from error


def _label(target: str, names: tuple[str, ...], value: int) -> int:
    label = names.index(target) if target in names else int(target) if target.isdecimal() else MAX_VALUE
    if label >= (len(names) or MAX_VALUE):
        known = f"0 to {len(names) - 1}, {', '.join(names)}" if names else "0, 1, ..."
        raise UserError(f"map: value {value} has the label {target!r}; there are {known}, and {NO_CLASS}")
    return label


def _check_names(names: tuple[str, ...], file: Path) -> None:
    """Of ``labels.yaml``, as lines of ``classes.txt`` are checked."""
    for name, times in Counter(names).items():
        told = "" if name else "a class has no name"
        told = f"a class has more than {MAX_NAME} characters" if len(name) > MAX_NAME else told
        told = "a class has control characters" if any(map(breaks_line, name)) else told
        if told or times > 1:
            raise UserError(f"{file}: {told or f'two of its classes are called {name!r}'}")


def _names(file: Path) -> tuple[str, ...]:
    if not os.path.lexists(file):
        return ()
    try:
        names = read_lines(file)
    except (OSError, ValueError) as error:
        told = getattr(error, "strerror", None) or error
        raise UserError(f"{file} is no readable list of classes ({told})") from error
    lines = dict[str, int]()
    for number, name in enumerate(names, 1):
        if not name or len(name) > MAX_NAME:
            told = f"more than {MAX_NAME} characters" if name else "empty"
            raise UserError(f"{file}: line {number} is {told}; line k names label k, from 0")
        if lines.setdefault(name, number) != number:
            raise UserError(
                f"{file}: the lines {lines[name]} and {number} name one class; give each its own name"
            )
    return tuple(names)
