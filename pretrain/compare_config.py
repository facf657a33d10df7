"""What is compared, as ``configs/compare/*.yaml`` says it: the rows, and how each of them is fine-tuned.

An unknown key, a value of another type and a name that nothing has are errors that name the file and the key.
"""

import json
import math
import re
import reprlib
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from pretrain.build import backbone_names
from pretrain.errors import UserError
from pretrain.results.published import published_rows, rows_of_tables
from pretrain.settings import split_words
from pretrain.weights import source_names

NONE, SWEEP, POINT = "none", "sweep", "point"


@dataclass(frozen=True)
class Entry:
    """One row of the comparison.

    Attributes:
        method, effective_epochs: as tables write them; a file that one of our pre-trainings left says its epochs itself, if these
            are none.
        backbone: registry name.
        file: in the comparison's folder of weights; or a folder there, as Hugging Face leaves it.
        name: the folder of its runs; "": made of method and backbone.
        source, subnet, patch_size: those of :func:`pretrain.build.build_backbone`; none: as the file says.
        detection, segmentation: those of :class:`Comparison`, where this row's are others.
        origin: where the file is from, for whoever lacks it.
        note: for the reader of the yaml.
    """

    method: str
    backbone: str
    file: str
    name: str = ""
    effective_epochs: float | None = None
    source: str | None = None
    subnet: str | None = None
    patch_size: int | None = None
    detection: str | None = None
    segmentation: str | None = None
    origin: str = ""
    note: str = ""


@dataclass(frozen=True)
class Comparison:
    """What a yaml says, every key of it.

    Attributes:
        tables: the published tables beside which the results are shown: ``"1"``, ``"1,2"``.
        weights, coco, ade: folders.
        detection: name of a protocol, or ``none``.
        segmentation: ``sweep`` (the protocol: the best of its grid) | ``point`` (its first setting alone) | ``none``.
        seeds: of every detection, and of every segmentation that is no sweep.
        accumulate: micro-batches of a detection step on one GPU; on n GPUs an n-th of it.
        engine, device, workers, checkpointing: options of ``tools/train_det.py`` and ``train_seg.py``.
        detection_overrides, segmentation_overrides: fields of the protocols, ``backbone.KEY`` flags: {key: text}.
    """

    entries: tuple[Entry, ...]
    tables: str = "1"
    weights: str = "weights"
    coco: str = "coco"
    ade: str = "ADEChallengeData2016"
    detection: str = "coco-12ep"
    segmentation: str = SWEEP
    seeds: tuple[int, ...] = (0,)
    accumulate: int = 1
    engine: str = "auto"
    device: str = "auto"
    workers: int | None = None
    checkpointing: bool = False
    detection_overrides: dict[str, str] = field(default_factory=dict)
    segmentation_overrides: dict[str, str] = field(default_factory=dict)


# --- reading ---------------------------------------------------------------------------------------------------------


def load_comparison(path: str | Path, words: Sequence[str] = (), detections: Collection[str] = ()) -> Comparison:
    """Read a comparison.

    Args:
        path: a yaml file; ``base: OTHER.yaml`` in it stands for all keys of the other, of which it changes some.
        words: ``key=value``, of any key but ``entries``; ``detection_overrides.KEY=VALUE`` sets one of a group. ``detection`` and
            ``segmentation`` are then those of every row.
        detections: names of detection protocols; none given: any.

    Raises:
        UserError: names the file, and the key that is unknown, missing or of a wrong value.
    """
    values = _read(Path(path))
    for key, text in split_words(words).items():
        group, dot, inner = key.partition(".")
        if dot and group in ("detection_overrides", "segmentation_overrides"):
            values[group] = {**(values.get(group) or {}), inner: text}
        elif key == "entries":
            raise UserError("entries: name the rows in a yaml file, which may have a base; --only chooses among them")
        else:
            values[key] = text if typing.get_type_hints(Comparison).get(key) is str else _value(key, text)
    comparison = _record(Comparison, values, str(path))
    of_all = {key: None for key in ("detection", "segmentation") if any(word.startswith(f"{key}=") for word in words)}
    comparison = replace(comparison, entries=tuple(replace(entry, **of_all) for entry in comparison.entries))
    _check(comparison, str(path), detections)
    return comparison


def _value(key: str, text: str) -> Any:
    """A word's value, as YAML reads it; ``0,1`` is a list of seeds."""
    try:
        return yaml.safe_load(f"[{text}]" if key == "seeds" and "[" not in text else text)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"{key}={text!r:.60} cannot be read") from error


def words_of(settings: Mapping[str, str]) -> list[str]:
    """``key=value`` words of a command line."""
    return [f"{key}={value}" for key, value in settings.items()]


def _read(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:  # ValueError: no UTF-8, a date of month 13
        raise UserError(f"{path}: no readable YAML ({str(error).splitlines()[0]})") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: no mapping of keys")
    if (base := values.pop("base", None)) is None:
        return values
    if not isinstance(base, str) or path.resolve() in seen:
        raise UserError(f"{path}: base: {_shown(base)} is no other file")
    return {**_read(path.parent / base, (*seen, path.resolve())), **values}


def _record(kind: type, values: Any, where: str) -> Any:
    """A dataclass from a mapping: its keys are the fields, and the annotations the types."""
    if not isinstance(values, Mapping):
        raise UserError(f"{where}: must be a mapping of keys, not {_shown(values)}")
    hints = typing.get_type_hints(kind)
    for key in values:
        if key not in hints:
            raise UserError(f"{where}: unknown key {key!r}; there are {', '.join(hints)}")
    if absent := [f.name for f in fields(kind) if f.default is f.default_factory is MISSING and f.name not in values]:
        raise UserError(f"{where}: {absent[0]} is missing")
    return kind(**{key: _typed(value, hints[key], f"{where}: {key}") for key, value in values.items()})


def _typed(value: Any, kind: Any, where: str) -> Any:
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:
        return None if value is None else _typed(value, parts[0], where)
    if origin is tuple and isinstance(value, list):
        return tuple(_typed(item, parts[0], f"{where}[{i}]") for i, item in enumerate(value))
    if kind is Entry:
        return _record(Entry, value, where)
    if origin is dict and isinstance(value, Mapping):
        return {str(key): _text(item, where) for key, item in value.items()}
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(kind, type) and type(value) is kind:
        return value
    what = {tuple: "a list", dict: "a mapping of keys"}.get(origin) or kind.__name__  # type: ignore[arg-type]
    raise UserError(f"{where}={_shown(value)} should be {what}")


def _text(value: Any, where: str) -> str:
    """As on a command line: a number or a word, or a list of them."""
    items = value if isinstance(value, list) else [value]
    if any(isinstance(item, list | dict) for item in items):
        raise UserError(f"{where}: {_shown(value)} is no number, no word and no list of them")
    return ",".join(json.dumps(item) if isinstance(item, bool) or item is None else str(item) for item in items)


def _shown(value: Any) -> str:
    """For an error; what refers to itself, or to one thing a billion times, is cut short."""
    return f"{reprlib.repr(value):.120}"


def _check(comparison: Comparison, path: str, detections: Collection[str]) -> None:
    """Values of the right type that no run can follow."""
    try:
        rows_of_tables(published_rows(), comparison.tables)
    except UserError as error:
        raise UserError(f"{path}: tables: {error}") from error
    demands: list[tuple[str, Any, Collection[Any]]] = [
        ("segmentation", comparison.segmentation, (SWEEP, POINT, NONE)),
        ("engine", comparison.engine, ("auto", "detectron2", "torchvision")),
        ("device", comparison.device, ("auto", "cpu", "cuda")),
    ]
    if detections:
        demands.append(("detection", comparison.detection, (*detections, NONE)))
    for i, entry in enumerate(comparison.entries):
        allowed: dict[str, Collection[Any]] = {
            "backbone": backbone_names(),
            "source": (None, *source_names()),
            "subnet": (None, "teacher", "student"),
            "segmentation": (None, SWEEP, POINT, NONE),
        }
        if entry.effective_epochs is not None and not 0 <= entry.effective_epochs < math.inf:
            raise UserError(f"{path}: entries[{i}]: effective_epochs={entry.effective_epochs} should be a number, at least 0")
        if not entry.method.strip():
            raise UserError(f"{path}: entries[{i}]: method is empty")
        if detections:
            allowed["detection"] = (None, *detections, NONE)
        demands += [(f"entries[{i}]: {key}", getattr(entry, key), values) for key, values in allowed.items()]
    for where, value, values in demands:
        if value not in values:
            raise UserError(f"{path}: {where}={_shown(value)} is none of {', '.join(str(v) for v in values if v is not None)}")
    if comparison.accumulate < 1 or not comparison.entries:
        raise UserError(f"{path}: accumulate is at least 1, and there is at least one entry")
    seeds = comparison.seeds
    if not seeds or min(seeds) < 0 or max(seeds) >= 2**32 or len(set(seeds)) < len(seeds):
        raise UserError(f"{path}: seeds={_shown([*seeds])} should be one or more different numbers, at least 0, below 2 ** 32")
    names = [name_of(entry) for entry in comparison.entries]
    for name in names:
        if not re.fullmatch(r"[A-Za-z0-9][\w-]*", name) or name in ("weights", "jobs"):
            raise UserError(f"{path}: name={name!r} is no name of a folder here: letters, digits, _ and -, and not weights or jobs")
        if names.count(name) > 1:
            raise UserError(f"{path}: two entries are called {name!r}; give one another name")


def name_of(entry: Entry) -> str:
    """The folder of an entry's runs, ``dino_vitb16``: its name, else one of its method and backbone."""
    if entry.name:
        return entry.name
    size = re.sub(r"^vit_(.)[a-z]*_patch", r"vit\1", entry.backbone)
    return re.sub(r"[^a-z0-9]+", "-", entry.method.lower()).strip("-") + "_" + size
