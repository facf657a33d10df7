"""Scores as bars: a chart for each score and protocol, the best of its runs marked."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from pretrain.results.curves import style_of
from pretrain.results.dense import METRICS, SETS
from pretrain.results.rows import Measured, alike, backbone_label, merge, ranked
from pretrain.results.schema import Protocol, Result, to_json
from pretrain.results.tables import set_of

FINE_TUNED = {"box_ap": "Box AP", "mask_ap": "Mask AP", "miou": "mIoU"}


class Bar(NamedTuple):
    """One row of runs: its names, mean and deviation as text, width in percent of the chart, color."""

    names: tuple[str, ...]
    text: str
    width: float
    color: str
    is_best: bool


@dataclass(frozen=True)
class Chart:
    """One score of rows that were measured alike, the best first."""

    title: str
    protocol: str
    bars: tuple[Bar, ...]


def charts(results: Sequence[Result], names: Sequence[str]) -> list[Chart]:
    """Detections, segmentations and dense evaluations; what was measured otherwise has a chart of its own.

    The best of a chart is marked where it has several bars, and all that are shown as the same number.

    Args:
        names: of the results.
    """
    called = {to_json(result): name for result, name in zip(results, names)}
    methods = sorted({result.method for result in results})
    together: dict[tuple[str, str], list[tuple[Measured, str]]] = {}
    protocols: dict[tuple[str, str], Protocol] = {}
    for row, score, title, protocol in _scores(results):
        if row.score(score) is not None:
            protocols.setdefault(key := (title, protocol.identity), protocol)
            together.setdefault(key, []).append((row, score))
    return [
        Chart(key[0], protocols[key].label, tuple(_bars(rows, called, methods)))
        for key, rows in together.items()
    ]


def _scores(results: Sequence[Result]) -> Iterator[tuple[Measured, str, str, Protocol]]:
    """Rows, names and titles of scores, and the protocols by which they were measured."""
    fine_tuned = merge(results)
    for score, title in FINE_TUNED.items():
        for row in fine_tuned:
            if (protocol := row.protocol(score)) is not None:
                yield row, score, title, protocol
    parts = alike(results, "dense")
    dense = [Measured((runs,), before) for part, before in parts for runs in ranked(part, "linear_miou")]
    for score, title in METRICS.items():
        for row in dense:
            name = set_of(row)
            yield row, score, f"{SETS.get(name, name)}: {title}", row.run.protocol


def _bars(
    rows: Sequence[tuple[Measured, str]], called: Mapping[str, str], methods: Sequence[str]
) -> Iterator[Bar]:
    found = [(found, row, row.runs_of(score)) for row, score in rows if (found := row.score(score))]
    found.sort(key=lambda each: -each[0].mean)  # stable
    most = found[0][0].mean
    best = f"{most:.1f}" if len(found) > 1 and most > 0 else ""
    has_backbones = len({row.run.network for _, row, _ in found}) > 1
    for score, row, runs in found:
        names = [called[to_json(run)] for run in runs]
        names += [backbone_label(row.run.network)] * has_backbones
        color, _ = style_of(row.run.method, methods, 0)
        width = round(100 * score.mean / most, 2) if most > 0 else 0.0
        yield Bar(tuple(names), str(score), width, color, f"{score.mean:.1f}" == best)
