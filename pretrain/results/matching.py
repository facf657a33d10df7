"""Which row of the paper a run stands beside: by its pre-training's recipe where that is known, else by name.

A pre-training is known where its own result is given, too: it left the weights (by their hash) that the run
read. Then its protocol decides, whatever the run is called. Every setting that the paper's rows vary must be
the row's; what else deviates is reported. ``published_results.csv`` names the recipe of a row, and the
ablation that changes it: a file of ``pretrain/recipes/ablation``, the same that a run of this row reads.

Otherwise the names of the csv decide, and effective epochs that contradict the row's keep the two apart:

* "dinov2" of as many effective epochs as the paper's baseline is that baseline; of none it is the official
  file, which does not say them (Table 7, LVD-142M).
* The baseline (Table 1: 41.9 / 37.7) is not the method with both parts off (Table 3: 41.3 / 37.2).
"""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pretrain.results.published import PublishedRow, published_rows
from pretrain.results.rows import Measured, backbone_label
from pretrain.results.schema import Protocol, Result
from pretrain.settings import flat, plain, read_yaml

METHOD = "intertwined-100ep"  # the recipe that the paper's ablations change
NEAR = 0.05  # of the printed effective epochs, which are rounded: 346.9 is "350"


def same_name(one: str, other: str) -> bool:
    """Whether two names differ at most in upper case and in "_" for "-"."""
    return _folded(one) == _folded(other)


def belongs(measured: Measured, pretraining: Protocol | None, row: PublishedRow) -> bool:
    """Whether a measured row stands beside a published one.

    Args:
        pretraining: the protocol of the pre-training, where it is known.
    """
    run = measured.run
    registers = f", {row.registers} registers" if row.registers else ""
    if backbone_label(run.network) not in (row.backbone, row.backbone + registers):
        return False
    if pretraining is None:
        return _is_named(run, row)
    varied = {key: pair[1] for key, pair in pretraining.deviations.items() if key in varied_keys()}
    if pretraining.name != row.recipe or varied != changed_settings(row.changes):
        return False
    return _folded(run.method) in _our_names() or further_deviations(pretraining) is None


def further_deviations(pretraining: Protocol | None) -> Protocol | None:
    """In what a pre-training deviates beside what the paper's rows vary; None: in nothing, or unknown."""
    pairs = pretraining.deviations if pretraining else {}
    rest = {key: pair for key, pair in pairs.items() if key not in varied_keys()}
    return pretraining.model_copy(update={"deviations": rest}) if pretraining and rest else None


@functools.cache
def changed_settings(ablation: str) -> Mapping[str, Any]:
    """{dotted key: value} that an ablation's file changes in its recipe; nothing for "".

    The group ``run``, its name and its folder, does not count.
    """
    if not ablation:
        return {}
    values = read_yaml(Path(__file__).parents[1] / "recipes" / "ablation" / f"{ablation}.yaml").values
    changed = flat({group: value for group, value in values.items() if group not in ("base", "run")})
    return {key: plain(v) if isinstance(v, str) else [*map(plain, v)] for key, v in changed.items()}


@functools.cache
def varied_keys() -> frozenset[str]:
    """Of all settings that the paper's ablations change."""
    return frozenset(key for row in published_rows() for key in changed_settings(row.changes))


@functools.cache
def _our_names() -> frozenset[str]:
    """Those of recipes: such a run may fall short of it. Any other name is a method of its own."""
    ours = [row for row in published_rows() if row.recipe]
    return frozenset(_folded(name) for row in ours for name in (row.method, *row.names))


def _folded(name: str) -> str:
    return name.strip().casefold().replace("_", "-")


def _is_named(run: Result, row: PublishedRow) -> bool:
    own = same_name(run.method, row.method)
    alias = any(same_name(run.method, name) for name in row.names)
    if row.registers and not own:  # another name says nothing of registers: the backbone must
        alias = alias and backbone_label(run.network) != row.backbone
    if row.effective_epochs is None:
        return (own or alias) and run.effective_epochs is None
    if run.effective_epochs is None:
        return own  # public files do not say them; a name that stands for several rows is not enough then
    return (own or alias) and abs(run.effective_epochs - row.effective_epochs) <= NEAR * row.effective_epochs
