"""Which row of the paper a run stands beside: by how its backbone was pre-trained where that is known, else by its name.

Known is a pre-training whose own result is given too: it left the weights (by their hash) that the run read. Then its protocol
decides, whatever the run is called: every setting that the paper's rows vary must be the row's, and what else departs is reported.
Otherwise the names below decide, and effective epochs that contradict the row's keep the two apart:

* "dinov2" of so many effective epochs as the paper's baseline is that baseline; of none it is the official file, which does not say
  (Table 7, LVD-142M).
* The baseline (Table 1: 41.9 / 37.7) and the method with both parts off (Table 3: 41.3 / 37.2) are two recipes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pretrain.results.merge import Measured, backbone_label
from pretrain.results.published import PublishedRow
from pretrain.results.schema import Protocol, Result

METHOD, BASELINE = "intertwined-100ep", "dinov2-100ep"  # the names of our pre-training protocols
NEAR = 0.05  # of the printed effective epochs, which are rounded: 346.9 is "350"


@dataclass(frozen=True)
class Recipe:
    """How a published row was pre-trained.

    Attributes:
        names: under which a run may report it, beside the row's own; upper case and "_" for "-" make no difference.
        protocol: our pre-training protocol; "" where we have none (the public files).
        settings: {key: value} that it sets otherwise than this protocol.
        registers: of the backbone; the label that a row prints does not tell them.
    """

    names: tuple[str, ...] = ()
    protocol: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    registers: int = 0


_NO_SAMPLING = {"positions.encoding": "standard", "positions.augment": False}
_NO_LOSS = {"masks.position_share": 0.0, "losses.position": 0.0}
_CONTENT_ALONE = {"masks.content_share": 1.0, **_NO_LOSS}
_POSITIONS_ALONE = {"masks.content_share": 0.0, "masks.position_share": 1.0, "losses.content": 0.0}
DEFAULT = Recipe(("intertwined",), METHOD)
RECIPES = {  # by the name in published_results.csv; a row that is not here is known by that name alone
    "Intertwined": DEFAULT,
    "DINOv2 (ImageNet-1K)": Recipe(("dinov2", "dinov2-dagger"), BASELINE),
    "DINOv2-reg": Recipe(("dinov2", "dinov2-registers"), registers=4),
    # Table 3
    "no position sampling no L_pos": Recipe(("intertwined, no sampling, no L_pos",), METHOD, {**_NO_SAMPLING, **_NO_LOSS}),
    "position sampling": Recipe(("intertwined, no L_pos",), METHOD, _NO_LOSS),
    "L_pos": Recipe(("intertwined, no sampling",), METHOD, _NO_SAMPLING),
    "position sampling + L_pos": DEFAULT,
    # Table 4
    "s constant": Recipe(("intertwined, s constant",), METHOD, {"positions.scale": "constant"}),
    "s uniform": Recipe(("intertwined, s uniform",), METHOD, {"positions.scale": "uniform"}),
    "s Beta(2,5)": DEFAULT,
    "P 19x19": Recipe(("intertwined, P 19x19",), METHOD, {"positions.grid": 19}),
    "P 50x50": DEFAULT,
    # Table 5
    "box-wise position mask": Recipe(("intertwined, box-wise position masks",), METHOD, {"masks.position_shape": "box"}),
    "cross-wise position mask": DEFAULT,
    "100% content": Recipe(("intertwined, 100% content masks",), METHOD, _CONTENT_ALONE),
    "100% position": Recipe(("intertwined, 100% position masks",), METHOD, _POSITIONS_ALONE),
    "50% each": DEFAULT,
}
VARIED = frozenset(key for recipe in RECIPES.values() for key in recipe.settings)


def same_name(one: str, other: str) -> bool:
    """Whether two names differ at most in upper case and in "_" for "-"."""
    return _plain(one) == _plain(other)


def belongs(measured: Measured, pretraining: Protocol | None, row: PublishedRow) -> bool:
    """Whether a measured row stands beside a published one.

    Args:
        pretraining: the protocol of the pre-training, where it is known.
    """
    run, recipe = measured.run, RECIPES.get(row.method, Recipe())
    if not _same_backbone(run.backbone, recipe, row):
        return False
    if pretraining is None:
        return _is_named(run, recipe, row)
    varied = {key: pair[1] for key, pair in pretraining.deviations.items() if key in VARIED}
    if pretraining.name != recipe.protocol or varied != recipe.settings:
        return False
    return _is_ours(run.method) or further_departures(pretraining) is None


def further_departures(pretraining: Protocol | None) -> Protocol | None:
    """What a pre-training departs in beside the settings that the paper's rows vary; None for nothing, or nothing known."""
    if pretraining is None:
        return None
    rest = {key: pair for key, pair in pretraining.deviations.items() if key not in VARIED}
    if not rest:
        return None
    return Protocol(name=pretraining.name, version=pretraining.version, full=False, deviations=rest)


def _plain(name: str) -> str:
    return name.strip().casefold().replace("_", "-")


def _is_ours(name: str) -> bool:
    """Whether it is a recipe's: such a run may fall short of the recipe. One of another name is a method of its own."""
    names = [name for row, recipe in RECIPES.items() if recipe.protocol for name in (row, *recipe.names)]
    return any(same_name(name, other) for other in names)


def _same_backbone(name: str, recipe: Recipe, row: PublishedRow) -> bool:
    suffix = f", {recipe.registers} registers" if recipe.registers else ""
    return backbone_label(name) in (row.backbone, row.backbone + suffix)


def _is_named(run: Result, recipe: Recipe, row: PublishedRow) -> bool:
    own = same_name(run.method, row.method)
    alias = any(same_name(run.method, name) for name in recipe.names)
    if recipe.registers and not own:  # another name says nothing of registers: the backbone must
        alias = alias and backbone_label(run.backbone) != row.backbone
    if row.effective_epochs is None:
        return (own or alias) and run.effective_epochs is None
    if run.effective_epochs is None:
        return own  # public files do not say them; a name that stands for several rows is not enough then
    return (own or alias) and abs(run.effective_epochs - row.effective_epochs) <= NEAR * row.effective_epochs
