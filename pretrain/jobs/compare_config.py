"""What is compared, as ``configs/compare/*.yaml`` says it: the rows, and how each of them is fine-tuned."""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pydantic import model_validator

from pretrain.build import backbone_names
from pretrain.errors import UserError
from pretrain.results import renamed
from pretrain.results.published import published_rows, rows_of_tables
from pretrain.settings import Layer, Settings, build, flat, ours, read_layers, read_words, setting, shown
from pretrain.weights import source_names

NONE, SWEEP = "none", "sweep"
# {group: old names}
OVERRIDES = {"detection_overrides": renamed.DETECTION, "segmentation_overrides": renamed.SEGMENTATION}


class Entry(Settings):
    """One row of the comparison."""

    method: str = ours(..., "as tables write it")
    backbone: str = ours(..., "registry name")
    file: str = ours(..., "in the folder of weights; or a folder there, as Hugging Face leaves it")
    name: str = ours("", "the folder of its runs; empty: made of method and backbone")
    effective_epochs: float | None = ours(None, "as tables write them; null: as a file of ours says", ge=0)
    source: str | None = ours(None, "whose file it is, as build_backbone takes it; null: found out")
    subnet: Literal["teacher", "student"] | None = ours(None, "which network of the file")
    patch_size: int | None = ours(None, "px, to which patches are resampled; null: the file's", ge=1)
    detection: str = ours("", "this row's own protocol; empty: the comparison's")
    segmentation: Literal["", "sweep", "point", "none"] = ours("", "this row's own; empty: the comparison's")
    origin: str = ours("", "where to get the file")
    note: str = ours("", "for the reader of the file")

    @model_validator(mode="after")
    def _can_be_run(self) -> "Entry":
        if not self.method.strip():
            raise ValueError("method is empty; name the row as tables should")
        for key, known in (("backbone", backbone_names()), ("source", source_names())):
            if (value := getattr(self, key)) not in known and value is not None:
                raise ValueError(f"{key}={shown(value)} is none of {', '.join(known)}")
        if not re.fullmatch(r"(?!(weights|jobs)$)[A-Za-z0-9][\w-]*", name := name_of(self)):
            rule = "letters, digits, _ and -, and not weights or jobs"
            raise ValueError(f"name={name!r} is no name of a folder here: {rule}")
        return self


class Comparison(Settings):
    """All that a file of ``configs/compare`` says."""

    entries: tuple[Entry, ...] = ours(..., "the rows", min_length=1)
    tables: str = ours("1", "the published tables beside which the results stand: 1, or 1,2")
    weights: str = ours("weights", "folder of the files that the rows name")
    coco: str = ours("coco", "folder of COCO")
    ade: str = ours("ADEChallengeData2016", "folder of ADE20K")
    detection: str = setting("coco-12ep", "name of a protocol, or none", source="Table 1")
    segmentation: Literal["sweep", "point", "none"] = setting(
        SWEEP, "sweep: the best of the protocol's grid; point: its first setting alone", source="appendix B.3"
    )
    seeds: tuple[int, ...] = ours((0,), "of a detection, and of a segmentation that is no sweep")
    accumulate: int = ours(1, "micro-batches of a detection step; on n GPUs an n-th of it", ge=1)
    engine: Literal["auto", "detectron2", "torchvision"] = ours("auto", "of the detection")
    device: Literal["auto", "cpu", "cuda"] = ours("auto", "of all runs")
    workers: int | None = ours(None, "processes that load images, of a run; null: the tool's", ge=0)
    checkpointing: bool = ours(False, "whether the detection computes activations twice")
    detection_overrides: dict[str, str] = ours(dict, "{field of the protocol, or backbone.KEY: value}")
    segmentation_overrides: dict[str, str] = ours(dict, "the same of the segmentation")

    @model_validator(mode="after")
    def _agree(self) -> "Comparison":
        try:
            rows_of_tables(published_rows(), self.tables)
        except UserError as error:
            raise ValueError(f"tables: {error}") from error
        seeds = self.seeds
        if not seeds or min(seeds) < 0 or max(seeds) >= 2**32 or len(set(seeds)) < len(seeds):
            rule = "one or more different numbers, at least 0, below 2 ** 32"
            raise ValueError(f"seeds={shown(seeds)} should be {rule}")
        names = [name_of(entry) for entry in self.entries]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"two entries are called {twice!r}; give one another name")
        return self


def load_comparison(
    path: str | Path, words: Sequence[str] = (), detections: Collection[str] = ()
) -> Comparison:
    """Read a comparison.

    Args:
        path: a YAML file; ``base: OTHER.yaml`` in it stands for all keys of the other; it changes some.
        words: ``key=value``, of any key but ``entries``; ``detection_overrides.KEY=VALUE`` sets one of a
            group. ``detection`` and ``segmentation`` are then those of every row.
        detections: names of detection protocols; none given: any.

    Raises:
        UserError: names the file, and the key that is unknown, missing or of a wrong value.
    """
    given = read_words(words)
    if "entries" in given.values:
        instead = "name the rows in a YAML file, which may have a base; --only chooses among them"
        raise UserError(f"entries: {instead}")
    layers = [_with_texts(layer) for layer in (*read_layers(path), given)]
    comparison = build(Comparison, layers, str(path))
    of_all = {key: "" for key in ("detection", "segmentation") if key in given.values}
    rows = tuple(entry.model_copy(update=of_all) for entry in comparison.entries)
    asked = {f"entries[{i}].detection": entry.detection for i, entry in enumerate(rows) if entry.detection}
    for key, value in {"detection": comparison.detection, **asked}.items():
        if detections and value not in (*detections, NONE):
            raise UserError(f"{path}: {key}={shown(value)} is none of {', '.join([*detections, NONE])}")
    return comparison.model_copy(update={"entries": rows})


def _with_texts(layer: Layer) -> Layer:
    """The overrides as a command line writes them: ``backbone.KEY``, ``8,16`` for a list; today's names."""

    def text(value: Any) -> Any:
        plain_list = isinstance(value, list) and all(isinstance(item, str) for item in value)
        return ",".join(value) if plain_list else value

    values = dict(layer.values)
    for group, new in OVERRIDES.items():
        if isinstance(values.get(group), Mapping):
            values[group] = {new.get(key, key): text(value) for key, value in flat(values[group]).items()}
    return replace(layer, values=values)


def words_of(settings: Mapping[str, str]) -> list[str]:
    """``key=value`` words of a command line."""
    return [f"{key}={value}" for key, value in settings.items()]


def name_of(entry: Entry) -> str:
    """The folder of an entry's runs, ``dino_vitb16``: its name, else one of its method and backbone."""
    if entry.name:
        return entry.name
    size = re.sub(r"^vit_(.)[a-z]*_patch", r"vit\1", entry.backbone)
    return re.sub(r"[^a-z0-9]+", "-", entry.method.lower()).strip("-") + "_" + size
