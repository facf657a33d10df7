"""`result.json`: what every run leaves behind, and the only thing that the tables read.

A run that deviates from its protocol says so wherever it is shown: :attr:`Protocol.label` is all that tables print.
"""

import json
import math
import re
import sys
import typing
from collections.abc import Callable, Iterable
from datetime import datetime, timedelta, timezone
from numbers import Integral, Real
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import ValidationError, ValidationInfo, field_validator, model_validator

from pretrain.errors import UserError
from pretrain.files import write_text
from pretrain.results import renamed
from pretrain.results.folder import leave_readme
from pretrain.results.untrusted import LARGEST, is_plain, read_json
from pretrain.settings import Settings, ours, problem, validated

SCHEMA_VERSION = 1
Kind = Literal["pretrain", "detection", "segmentation", "dense", "analysis"]
KINDS: tuple[str, ...] = typing.get_args(Kind)
FILE_NAME = "result.json"
PERCENT_METRICS = re.compile(r"box_ap|mask_ap|(\w+_)?miou|knn_top1(_k\d+)?")
# Of files without `loss_terms` (commit 2c21771): the names of the losses, and those of post-training.
FORMER_TERMS = ("image", "content", "position", "koleo", "cka", "frobenius", "gram", "overlaps")
FORMER_POST_TRAINING = frozenset({"cka", "frobenius", "gram"})
OF_NUMBERS = ("effective_epochs", "metrics", "packages", "hardware", "wall_time_s", "peak_memory_mib")
# Not written where empty: older readers do not know them.
NEW_KEYS = ("loss_terms", "post_training", "labels", "patch_px")


def now() -> str:
    """UTC, ISO 8601."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


class _Record(Settings):
    """Settings that are made by keyword: what is wrong is a UserError of one line, which begins with `what`."""

    what: ClassVar[str] = ""

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise UserError(f"{self.what}{problem(error)}") from error


class Protocol(_Record):
    """The recipe that a run followed, and every field in which it did not."""

    what = "protocol: "
    name: str = ours(..., 'the recipe, such as "coco-12ep"')
    version: int = ours(..., "of the recipe, from 1 on", ge=1, lt=2**31)
    full: bool = ours(..., "true exactly when `deviations` is empty")
    deviations: dict[str, list[Any]] = ours(..., "{field: [value in the protocol, value in the run]}")

    @field_validator("deviations", mode="before")
    @classmethod
    def _as_json(cls, value: Any) -> Any:
        pairs = _plain(value, "deviations")
        is_dict = isinstance(pairs, dict)
        return {renamed.deviation(key): pair for key, pair in pairs.items()} if is_dict else pairs

    @model_validator(mode="after")
    def _agree(self) -> "Protocol":
        if not self.name.strip():
            raise ValueError("name is empty; name the recipe")
        for key, pair in self.deviations.items():
            if len(pair) != 2 or pair[0] == pair[1]:
                told = f"deviations.{key} should be [protocol value, other run value]"
                raise ValueError(f"{told}, not {pair!r}")
        if self.full != (not self.deviations):
            raise ValueError(f"full is {self.full}, but {self.name!r} has {len(self.deviations)} deviations")
        return self

    @property
    def label(self) -> str:
        """The name under which the protocol may be shown: the bare one only for the full protocol."""
        name = self.name if self.version == 1 else f"{self.name} v{self.version}"
        count = len(self.deviations)  # beside `full`, for a dict can be changed after construction
        scaled = f", scaled down ({count} change{'s' * (count != 1)})"
        return name if self.full and not count else name + scaled

    @property
    def changes(self) -> str:
        """The deviations on one line: "batch_size 64 → 2; iterations 22128 → 200"."""
        pairs = sorted(self.deviations.items())
        return "; ".join(f"{key} {_short(a)} → {_short(b)}" for key, (a, b) in pairs)

    @property
    def text(self) -> str:
        """The label and all that it stands for: "coco-12ep, scaled down (1 change): batch_size 64 → 2"."""
        return f"{self.label}: {self.changes}" if self.deviations else self.label

    @property
    def identity(self) -> str:
        """Equal for two runs exactly when both followed the same recipe with the same deviations."""
        return json.dumps(self.model_dump(), sort_keys=True)

    def __str__(self) -> str:
        return self.label


class Result(_Record):
    """One run."""

    kind: Kind = ours(..., "what the run did")
    method: str = ours(..., "of the pre-training, as tables show it")
    backbone: str = ours(..., "registry name")
    patch_px: int | None = ours(None, "side of its patches; null: the one that `backbone` names", ge=1)
    effective_epochs: float | None = ours(
        ...,
        "of the pre-training, in epochs of two crops of 224 px; null: unknown",
        ge=0,
        source="paper, Table 1",
    )
    protocol: Protocol = ours(..., "the recipe, and how the run deviates from it")
    metrics: dict[str, Any] = ours(
        ...,
        "{name: number or dict of these}. Detection: box_ap, mask_ap, box_ap50, ...; segmentation: miou, "
        "...; dense: linear_miou, ... in percent. A metric that is undefined (no ground truth) is left out",
    )
    labels: str = ours("", "of a set with a label a pixel: how many classes, who names them")
    seed: int = ours(
        ...,
        "of this run, not its pre-training's; of a dense evaluation that, unless told",
        gt=-(2**64),
        lt=2**64,
    )
    config_hash: str = ours(..., "equal for runs that differ in the seed alone: only these are averaged")
    weights_hash: str | None = ours(
        ..., "of the backbone's file that a pre-training left, or another run read"
    )
    git_commit: str | None = ours(..., "of this code, with +dirty where files differ from it")
    packages: dict[str, Any] = ours(..., "{distribution: version}")
    hardware: dict[str, Any] = ours(..., "cpu, cores, memory_gib, gpus, processes")
    wall_time_s: float = ours(..., "seconds", ge=0)
    peak_memory_mib: float | None = ours(..., "MiB of the GPU used, else of the process; null: unknown", ge=0)
    loss_terms: tuple[str, ...] = ours((), "of the logged addends of the loss, in order", strict=False)
    post_training: bool = ours(False, "whether it trained a backbone that was pre-trained before")
    created: str = ours(now, "end of the run, UTC, ISO 8601")
    schema_version: Literal[1] = ours(SCHEMA_VERSION, "of this file")

    @field_validator(*OF_NUMBERS, mode="wrap")
    @classmethod
    def _as_json(cls, value: Any, check: Callable[[Any], Any], info: ValidationInfo) -> Any:
        """Whole numbers stay whole, and NumPy's become Python's."""
        value = _plain(value, str(info.field_name))
        check(value)
        return value

    @field_validator("patch_px")
    @classmethod
    def _unless_named(cls, value: int | None, info: ValidationInfo) -> int | None:
        return None if re.search(rf"_patch{value}(?!\d)", str(info.data.get("backbone"))) else value

    @model_validator(mode="after")
    def _agree(self) -> "Result":
        _check_metrics(self.metrics, "metrics")
        for name, value in self.metrics.items():
            if PERCENT_METRICS.fullmatch(name) and not 0 <= value <= 100:
                raise ValueError(f"metrics.{name} is {value}, not a percentage")
            if PERCENT_METRICS.fullmatch(name):
                _check_seeds(self.metrics, f"{name}_by_seed")
        try:
            is_utc = datetime.fromisoformat(self.created.replace("Z", "+00:00")).utcoffset() == timedelta(0)
        except ValueError:
            is_utc = False
        if not is_utc:
            told = "should be a UTC time in ISO 8601, such as 2026-01-31T12:00:00+00:00"
            raise ValueError(f"created={self.created!r} {told}")
        return self

    def with_changes(self, **changes: Any) -> "Result":
        """The same run with some fields changed; all is checked again."""
        return Result(**{**dict(self), **changes})

    @property
    def network(self) -> str:
        """`backbone` with its real patch: the ViT-S/14 that is built as "vit_small_patch16" is none of 16 px."""
        patch = "" if self.patch_px is None else f"_patch{self.patch_px}"
        return re.sub(r"_patch\d+", patch, self.backbone) if patch else self.backbone

    @property
    def stage(self) -> str:
        """Its kind, or "posttrain" for a pretrain result of a post-training."""
        former = not self.loss_terms and not FORMER_POST_TRAINING.isdisjoint(self.metrics)
        return "posttrain" if self.kind == "pretrain" and (self.post_training or former) else self.kind

    @property
    def terms(self) -> tuple[str, ...]:
        """`loss_terms`, or what they were called before the runs said it."""
        return self.loss_terms or FORMER_TERMS


def ordered_terms(results: Iterable[Result], present: Iterable[str]) -> list[str]:
    """The names that are losses of these runs: their sum first, then its addends as the runs name them."""
    names = dict.fromkeys(["loss", *(term for result in results for term in result.terms)])
    return [name for name in names if name in set(present)]


def to_json(result: Result) -> str:
    """The text of a `result.json`: sorted keys, two spaces, no NaN; equal results give equal text."""
    content = {key: value for key, value in result.model_dump().items() if value or key not in NEW_KEYS}
    return json.dumps(content, indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n"


def planned(folder: Path, **fields: Any) -> None:
    """Build and serialize the result of a run that has only begun: what it would be refused for, it is refused
    for before the work. Leaves the folder's ``README.txt``.

    Args:
        fields: of :class:`Result`, as far as they are known.

    Raises:
        UserError: names the field and the value.
    """
    left: list[str] = []
    for key, value in fields.items():
        _writable(value, key, left)
    if left:
        raise UserError(f"{FILE_NAME}: {left[0]}, so the run could not write its result; mend it first")
    to_json(
        validated(Result, {**fields, "metrics": fields.get("metrics", {}), "wall_time_s": 0.0}, FILE_NAME)
    )
    leave_readme(folder, fields["kind"])


def finished(**fields: Any) -> Result:
    """The result of a run that is over. What cannot be written is left out and named, since the work is done."""
    left: list[str] = []
    clean = {key: _writable(value, key, left) for key, value in fields.items()}
    for key in ("effective_epochs", "peak_memory_mib"):
        value = clean.get(key)
        if value is _LEFT or (value is not None and value < 0):
            clean[key] = None
    if clean["wall_time_s"] is _LEFT or clean["wall_time_s"] < 0:
        left.append(f"wall_time_s={fields['wall_time_s']} is no time")
        clean["wall_time_s"] = 0.0
    metrics = clean["metrics"]
    for name in [name for name in metrics if PERCENT_METRICS.fullmatch(name)]:
        if not isinstance(metrics[name], int | float) or not 0 <= metrics[name] <= 100:
            left.append(f"metrics.{name}={metrics.pop(name)!r} is no percentage")
    for told in left:
        print(f"warning: {FILE_NAME} is written without this: {told}", file=sys.stderr)
    return Result(**clean)


def write_result(result: Result, folder: str | Path) -> Path:
    """Write `folder/result.json` in one step (no reader ever sees half of it) and return its path."""
    text = to_json(result)
    if result.kind != "analysis":  # whose folder has one for each file of weights below it
        leave_readme(Path(folder), result.kind)
    return write_text(Path(folder) / FILE_NAME, text)


def read_result(path: str | Path) -> Result:
    """Read a `result.json`, given the file or its folder.

    Raises:
        UserError: no plain file in its folder, no JSON, a missing or unknown key, a wrong type or value; names
            file and key.
    """
    path = Path(path)
    path = path / FILE_NAME if path.is_dir() else path
    content = read_json(path, path.parent)
    if not isinstance(content, dict):
        raise UserError(f"{path}: no mapping, as a {FILE_NAME} is")
    return validated(Result, content, str(path))


_LEFT = object()


def _writable(value: Any, key: str, left: list[str]) -> Any:
    """A copy that JSON in UTF-8 can hold. The rest is named in ``left``: of a mapping it is left out, in a list it
    becomes text, and alone it is :data:`_LEFT`."""
    if isinstance(value, Settings):
        value = value.model_dump()
    if isinstance(value, dict):
        pairs = (
            (_writable(n, f"{key}.{n}", left), _writable(v, f"{key}.{n}", left)) for n, v in value.items()
        )
        return {name: item for name, item in pairs if item is not _LEFT}
    if isinstance(value, list | tuple):
        items = ((_writable(item, f"{key}[{n}]", left), item) for n, item in enumerate(value))
        made = [str(item) if kept is _LEFT else kept for kept, item in items]
        return made if isinstance(value, list) else tuple(made)
    if isinstance(value, str):
        clean = value.encode("utf-8", "backslashreplace").decode()
        if clean != value:
            left.append(f"{ascii(key)[1:-1]}={ascii(value)} is no UTF-8 text")
        return clean
    try:
        return _plain(value, key)
    except ValueError as error:
        left.append(str(error))
        return _LEFT


def _plain(value: Any, key: str) -> Any:
    """A deep copy that holds nothing but JSON types; NaN, infinity and foreign types are refused by name."""
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, Real):  # NumPy's scalars are registered as these
        if not is_plain(value):
            is_finite = isinstance(value, Integral) or math.isfinite(value)
            told = f"beyond {LARGEST:g}" if is_finite else f"{float(value)}, not a finite number"
            raise ValueError(f"{key} is {told}")
        return int(value) if isinstance(value, Integral) else float(value)
    if isinstance(value, list | tuple):
        return [_plain(item, f"{key}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, dict):
        if wrong := [name for name in value if not isinstance(name, str)]:
            raise ValueError(f"{key} has the key {wrong[0]!r}, which is not a string")
        return {name: _plain(item, f"{key}.{name}") for name, item in value.items()}
    raise ValueError(f"{key} is {type(value).__name__}, which JSON cannot hold")


def _check_metrics(metrics: dict[str, Any], key: str) -> None:
    for name, value in metrics.items():
        if isinstance(value, dict) and not PERCENT_METRICS.fullmatch(name):
            _check_metrics(value, f"{key}.{name}")
        elif isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{key}.{name} should be a number, not {value!r}")


def _check_seeds(metrics: dict[str, Any], name: str) -> None:
    """Of a sweep: {seed: percentage}, which means and spreads are taken of."""
    values = metrics.get(name, {})
    is_named = isinstance(values, dict) and all(seed.removeprefix("-").isdecimal() for seed in values)
    if not is_named or not all(isinstance(v, int | float) and 0 <= v <= 100 for v in values.values()):
        raise ValueError(f"metrics.{name} should be a percentage for each seed, not {str(values)[:60]}")


def _short(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
