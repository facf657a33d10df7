"""From single runs to the rows of a table: which results belong together, and the mean over their seeds."""

import re
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from pretrain.results.schema import Protocol, Result, to_json


@dataclass(frozen=True)
class Score:
    """Mean of a metric over n runs, and its sample standard deviation (n - 1; None for one run).

    A sweep counts as its seeds.
    """

    mean: float
    std: float | None
    n: int

    @classmethod
    def of(cls, runs: Iterable[Result], metric: str) -> "Score | None":
        """The score over the runs that have the metric; None when none has."""
        return cls.over([value for run in runs for value in by_seed(run, metric).values()])

    @classmethod
    def over(cls, values: Sequence[float]) -> "Score | None":
        """The score over some values; None without any."""
        if not values:
            return None
        std = statistics.stdev(values) if len(values) > 1 else None
        return cls(statistics.fmean(values), std, len(values))

    def __str__(self) -> str:
        return f"{self.mean:.1f}" + ("" if self.std is None else f" ± {self.std:.1f} (n={self.n})")


@dataclass(frozen=True)
class Measured:
    """One measured row: runs of one method and backbone. Those of a group differ in their seed alone.

    Attributes:
        groups: detection and segmentation, of which one may be empty; or the one group of a dense evaluation.
        pretraining: the protocol of the pre-training, where it is known to have been scaled down; else None.
    """

    groups: tuple[list[Result], ...]
    pretraining: Protocol | None

    @property
    def runs(self) -> list[Result]:
        """Those of all groups."""
        return [run for runs in self.groups for run in runs]

    @property
    def run(self) -> Result:
        """Any of the runs: for what all of them share."""
        return self.runs[0]

    @property
    def protocols(self) -> list[Protocol | None]:
        """Of the pre-training (if scaled down) and of each group."""
        return [self.pretraining] + [runs[0].protocol if runs else None for runs in self.groups]

    @property
    def scaled(self) -> list[Protocol]:
        """The protocols from which these runs deviate; empty: the row may be compared with published ones."""
        return [protocol for protocol in self.protocols if protocol is not None and protocol.deviations]

    @property
    def identity(self) -> tuple:
        """What a reader sees of the row beside its numbers and seeds."""
        protocols = [None if protocol is None else protocol.identity for protocol in self.protocols]
        return self.run.method, self.run.network, self.run.effective_epochs, *protocols

    @property
    def configs(self) -> str:
        """The config hash of each group."""
        return " / ".join(runs[0].config_hash for runs in self.groups if runs)

    @property
    def seeds(self) -> str:
        """ "0, 1, 2", or both lists where detection and segmentation differ."""
        texts = [seeds_of(runs) for runs in self.groups if runs]
        return texts[0] if len(set(texts)) == 1 else "detection {}; segmentation {}".format(*texts)

    def score(self, name: str) -> Score | None:
        """A score by the name that the published csv has for it."""
        return Score.of(self.runs_of(name), name.removeprefix("ade20k_"))

    def runs_of(self, name: str) -> list[Result]:
        """The runs that a score is of."""
        return self.groups[_group(name)]

    def protocol(self, name: str) -> Protocol | None:
        """The protocol that a score was measured by."""
        return self.protocols[1 + _group(name)]


def _group(score: str) -> int:
    return int(score in ("miou", "ade20k_miou"))


def by_seed(run: Result, metric: str) -> dict[str, float]:
    """{seed: value} of a sweep's best setting, else of the run's own seed; nothing without the metric."""
    if metric not in run.metrics:
        return {}
    values = run.metrics.get(f"{metric}_by_seed", {str(run.seed): run.metrics[metric]})
    return {seed: float(value) for seed, value in values.items()}


def seeds_of(runs: Sequence[Result]) -> str:
    """ "0, 1, 2"."""
    return ", ".join(seed for run in runs for seed in by_seed(run, "miou") or (str(run.seed),))


def merge(results: Sequence[Result]) -> list[Measured]:
    """Detections and segmentations as rows, sorted by backbone, method and epochs; other kinds make no rows.

    A detection group and a segmentation group of one method, backbone and number of epochs share a row when
    both are full or both are scaled down: a row is one or the other. Of several groups the best comes first.
    """
    merged = []
    for runs, before in alike(results, "detection", "segmentation"):
        detections = ranked([run for run in runs if run.kind == "detection"], "box_ap")
        segmentations = ranked([run for run in runs if run.kind == "segmentation"], "miou")
        pairs = zip_longest(detections, segmentations, fillvalue=list[Result]())
        merged += [Measured(pair, before) for pair in pairs]
    return merged


def alike(results: Sequence[Result], *kinds: str) -> list[tuple[list[Result], Protocol | None]]:
    """The results of these kinds, grouped and sorted by method, backbone, number of epochs and pre-training.

    * A run counts as scaled down, too, when its weights hash is that of a scaled-down pretrain result. Full
      and scaled-down runs are never together.
    * A copy of a run counts once. Where runs of equal protocol and config hash have the same seed, they are
      of several pre-trainings of one name: each of these is apart.

    Returns:
        each group, with the protocol of its pre-training where that is known to have been scaled down.
    """
    results = list({to_json(result): result for result in results}.values())
    scaled_down = (r for r in results if r.kind == "pretrain" and r.protocol.deviations and r.weights_hash)
    pretraining: dict[str | None, Protocol] = {r.weights_hash: r.protocol for r in scaled_down}
    together: dict[tuple, list[Result]] = {}
    for r in sorted(results, key=lambda r: (r.seed, to_json(r))):
        if r.kind in kinds:
            before = pretraining.get(r.weights_hash)
            epochs = -1.0 if r.effective_epochs is None else r.effective_epochs
            scaled = before is not None or bool(r.protocol.deviations)
            key = (backbone_label(r.network), r.method, epochs, scaled, before.identity if before else "")
            together.setdefault(key, []).append(r)
    parts = [part for key in sorted(together) for part in _apart(together[key])]
    return [(runs, pretraining.get(runs[0].weights_hash)) for runs in parts]


def _apart(runs: list[Result]) -> list[list[Result]]:
    """Runs of one method, backbone and number of epochs; by their weights, where a seed occurs twice."""
    seen = Counter((r.kind, r.protocol.identity, r.config_hash, r.seed) for r in runs)
    if max(seen.values()) == 1:
        return [runs]
    hashes = dict.fromkeys(r.weights_hash for r in runs)
    return [[r for r in runs if r.weights_hash == weights] for weights in hashes]


def ranked(runs: Sequence[Result], metric: str) -> list[list[Result]]:
    """Groups of runs that differ in their seed alone (equal protocol and config hash).

    They are sorted by the protocol's label; within a protocol the best mean of the metric comes first.
    """
    groups: dict[tuple[str, str], list[Result]] = {}
    for r in runs:
        groups.setdefault((r.protocol.identity, r.config_hash), []).append(r)

    def rank(key: tuple[str, str]) -> tuple:
        score = Score.of(groups[key], metric)
        return groups[key][0].protocol.label, key[0], -score.mean if score else 0.0, key[1]

    return [groups[key] for key in sorted(groups, key=rank)]


def backbone_label(name: str) -> str:
    """ "vit_small_patch16_reg4" -> "ViT-S/16, 4 registers", as the paper writes it; others as they are."""
    match = re.fullmatch(r"vit_(tiny|small|base|large)_patch(\d+)(?:_reg(\d+))?", name)
    if match is None:
        return name
    size, patch, registers = match.groups()
    return f"ViT-{size[0].upper()}/{patch}" + (f", {registers} registers" if registers else "")


def backbone_family(name: str) -> str:
    """The label without the registers: the rows of one family stand together."""
    return backbone_label(name).split(",")[0]
