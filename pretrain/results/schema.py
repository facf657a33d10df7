"""`result.json`: what every run leaves behind, and the only thing that the tables read.

The rule that this file guards: a run that departs from a protocol in any field says so wherever it is shown. Its
protocol carries the list of departures, and :attr:`Protocol.label` is the only name that a table or report prints.
"""

import json
import math
import os
import re
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime, timedelta, timezone
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from pretrain.errors import UserError
from pretrain.results import renamed

SCHEMA_VERSION = 1
KINDS = ("pretrain", "detection", "segmentation", "dense", "analysis")
FILE_NAME = "result.json"
PERCENT_METRICS = re.compile(r"box_ap|mask_ap|(\w+_)?miou|knn_top1(_k\d+)?")


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """The recipe that a run followed, and every field in which it did not.

    name, version  the recipe, for example "coco-12ep", 1.
    full           true exactly when `deviations` is empty; anything else is a UserError.
    deviations     {field: [value in the protocol, value in the run]}.
    """

    name: str
    version: int
    full: bool
    deviations: dict[str, list[Any]]

    def __post_init__(self) -> None:
        _check_types(self, {"name": str, "version": int, "full": bool, "deviations": dict})
        if not self.name.strip():
            raise UserError("protocol.name is empty")
        deviations = _plain(self.deviations, "protocol.deviations")
        deviations = {renamed.DEVIATIONS.get(key, key): pair for key, pair in deviations.items()}
        object.__setattr__(self, "deviations", deviations)
        for key, pair in deviations.items():
            if not isinstance(pair, list) or len(pair) != 2 or pair[0] == pair[1]:
                raise UserError(f"protocol.deviations.{key} must be [protocol value, other run value], not {pair!r}")
        if self.full != (not deviations):
            raise UserError(f"protocol.full is {self.full}, but {self.name!r} has {len(deviations)} deviations")

    @property
    def label(self) -> str:
        """The name under which the protocol may be shown: the bare one only for the full protocol."""
        name = self.name if self.version == 1 else f"{self.name} v{self.version}"
        count = len(self.deviations)  # beside `full`, for a dict can be changed after construction
        return name if self.full and not count else f"{name}, scaled down ({count} change{'s' * (count != 1)})"

    @property
    def changes(self) -> str:
        """The departures on one line: "batch_size 64 → 2; iterations 22128 → 200"."""
        return "; ".join(f"{field} {_short(a)} → {_short(b)}" for field, (a, b) in sorted(self.deviations.items()))

    @property
    def identity(self) -> str:
        """Equal for two runs exactly when both followed the same recipe with the same departures."""
        return json.dumps(asdict(self), sort_keys=True)

    def __str__(self) -> str:
        return self.label


@dataclass(frozen=True, kw_only=True)
class Result:
    """One run. Wrong types, NaN and values out of range are a UserError that names the key.

    metrics          {name: number or dict}. Detection: box_ap, mask_ap, box_ap50, ..., segmentation: miou, ... and dense:
                     linear_miou, ... in percent; a metric that is undefined (no ground truth) is left out.
    seed             of this run, not of the pre-training that it starts from; a dense evaluation takes that one's, unless told.
    config_hash      `provenance.config_hash`; equal for runs that differ in the seed alone: only such are averaged.
    weights_hash     `provenance.file_hash` of the backbone file that a pretrain run left, or another run read.
    wall_time_s      seconds; `peak_memory_mib` MiB of the GPU where one was used, else of the process.
    created          end of the run (the moment of construction when left out), UTC, ISO 8601.
    """

    kind: str
    method: str
    backbone: str
    effective_epochs: float | None
    protocol: Protocol
    metrics: dict[str, Any]
    seed: int
    config_hash: str
    weights_hash: str | None
    git_commit: str | None
    packages: dict[str, Any]
    hardware: dict[str, Any]
    wall_time_s: float
    peak_memory_mib: float | None
    created: str = field(default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="seconds"))
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        _check_types(self, _RESULT_TYPES)
        if self.schema_version != SCHEMA_VERSION:
            raise UserError(f"schema_version {self.schema_version} is not {SCHEMA_VERSION}, the one that this code reads")
        if self.kind not in KINDS:
            raise UserError(f"kind {self.kind!r} is none of {', '.join(KINDS)}")
        for name in ("metrics", "packages", "hardware", "effective_epochs", "wall_time_s", "peak_memory_mib"):
            object.__setattr__(self, name, _plain(getattr(self, name), name))
        for name in ("effective_epochs", "wall_time_s", "peak_memory_mib"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise UserError(f"{name} is {value}, below zero")
        _check_metrics(self.metrics, "metrics")
        for name, value in self.metrics.items():
            if PERCENT_METRICS.fullmatch(name) and not 0 <= value <= 100:
                raise UserError(f"metrics.{name} is {value}, not a percentage")
        _check_utc(self.created)


_TEXT, _OPTIONAL_TEXT, _OPTIONAL_NUMBER = str, (str, type(None)), (Real, type(None))
_RESULT_TYPES: dict[str, Any] = {
    "kind": _TEXT,
    "method": _TEXT,
    "backbone": _TEXT,
    "effective_epochs": _OPTIONAL_NUMBER,
    "protocol": Protocol,
    "metrics": dict,
    "seed": int,
    "config_hash": _TEXT,
    "weights_hash": _OPTIONAL_TEXT,
    "git_commit": _OPTIONAL_TEXT,
    "packages": dict,
    "hardware": dict,
    "wall_time_s": Real,
    "peak_memory_mib": _OPTIONAL_NUMBER,
    "created": _TEXT,
    "schema_version": int,
}


def to_json(result: Result) -> str:
    """The text of a `result.json`: sorted keys, two spaces, no NaN; equal results give equal text."""
    return json.dumps(asdict(result), indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n"


def write_result(result: Result, folder: str | Path) -> Path:
    """Write `folder/result.json` in one step (no reader ever sees half of it) and return its path."""
    path = Path(folder) / FILE_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{FILE_NAME}.{os.getpid()}.partial")
    partial.write_text(to_json(result), encoding="utf-8")
    os.replace(partial, path)
    return path


def read_result(path: str | Path) -> Result:
    """Read a `result.json`, given the file or its folder.

    Raises UserError, naming the file and the key, for a missing file, text that is not JSON, a missing or unknown
    key, a wrong type, or a value that :class:`Result` refuses.
    """
    path = Path(path)
    path = path / FILE_NAME if path.is_dir() else path
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise UserError(f"{path}: not JSON ({error})") from error
    try:
        _check_keys(content, Result, "")
        _check_keys(content["protocol"], Protocol, "protocol.")
        return Result(**{**content, "protocol": Protocol(**content["protocol"])})
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _check_keys(content: Any, record: type, prefix: str) -> None:
    """Exactly the fields of a record, no more and no fewer."""
    if not isinstance(content, dict):
        raise UserError(f"{prefix.rstrip('.') or 'the file'} must hold a JSON object, not {_type_name(content)}")
    known = {field.name for field in fields(record)}
    for what, keys in (("missing", known - set(content)), ("unknown", set(content) - known)):
        if keys:
            raise UserError(f"{what} key {', '.join(repr(prefix + key) for key in sorted(keys))}")


def _check_types(record: Any, types: dict[str, Any]) -> None:
    prefix = "protocol." if isinstance(record, Protocol) else ""
    for name, wanted in types.items():
        value = getattr(record, name)
        if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):  # True is an int to Python
            names = " or ".join(w.__name__ for w in (wanted if isinstance(wanted, tuple) else (wanted,)))
            names = names.replace("Real", "a number").replace("NoneType", "null")
            raise UserError(f"{prefix}{name} must be {names}, not {_type_name(value)} {value!r}")


def _plain(value: Any, key: str) -> Any:
    """A deep copy that holds nothing but JSON types; NaN, infinity and foreign types are refused by name."""
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):  # NumPy's scalars are registered as these
        if not math.isfinite(value):
            raise UserError(f"{key} is {float(value)}, not a finite number")
        return float(value)
    if isinstance(value, list | tuple):
        return [_plain(item, f"{key}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, dict):
        for name in value:
            if not isinstance(name, str):
                raise UserError(f"{key} has the key {name!r}, which is not a string")
        return {name: _plain(item, f"{key}.{name}") for name, item in value.items()}
    raise UserError(f"{key} is {_type_name(value)}, which JSON cannot hold")


def _check_metrics(metrics: dict[str, Any], key: str) -> None:
    for name, value in metrics.items():
        if isinstance(value, dict) and not PERCENT_METRICS.fullmatch(name):
            _check_metrics(value, f"{key}.{name}")
        elif isinstance(value, bool) or not isinstance(value, int | float):
            raise UserError(f"{key}.{name} must be a number, not {_type_name(value)} {value!r}")


def _check_utc(text: str) -> None:
    try:
        offset = datetime.fromisoformat(text.replace("Z", "+00:00")).utcoffset()
    except ValueError:
        offset = None
    if offset != timedelta(0):
        raise UserError(f"created {text!r} is not a UTC time in ISO 8601, such as 2026-01-31T12:00:00+00:00")


def _short(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _type_name(value: Any) -> str:
    return "null" if value is None else type(value).__name__
