"""The table of dense evaluations without fine-tuning: set by set, published numbers above measured ones.

The rules of :mod:`pretrain.results.tables` hold: a measured row has a †, a scaled-down one ‡ and a foot note.
"""

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pretrain.errors import UserError
from pretrain.results import tables
from pretrain.results.published import PublishedDense, published_dense
from pretrain.results.rows import Measured, alike, backbone_label, ranked
from pretrain.results.schema import Result
from pretrain.results.tables import DIFFERENCE, Table

SETS = {
    "voc2012": "Pascal VOC 2012",
    "ade20k": "ADE20K",
    "coco_things": "COCO-Things",
    "coco_stuff": "COCO-Stuff",
    "knn": "Image classification",
}
METRICS = {
    "linear_miou": "linear mIoU",
    "in_context_miou": "in-context mIoU",
    "in_context_hungarian_miou": "in-context mIoU, Hungarian",
    "clustering_miou": "clustering mIoU",
    "knn_top1": "k-NN top-1",
}
MORE_CLUSTERS = re.compile(r"clustering_k(\d{1,9})_miou")


def dense_table(
    results: Sequence[Result], published: Sequence[PublishedDense] | None = None, against: str = ""
) -> Table | None:
    """Dense results beside the published ones of their sets; without any, all published ones; None: no row.

    Args:
        published: the rows to choose from; None: the package's own.
        against: a method. Each score is followed by its difference to this method's, where the two have one
            backbone and were evaluated alike: what a post-training brought, when this is where it started.

    Raises:
        UserError: no result is of the method ``against``.
    """
    parts = alike(results, "dense")
    rows = [Measured((runs,), before) for part, before in parts for runs in ranked(part, "linear_miou")]
    rows.sort(key=lambda row: row.run.method != against)  # stable
    methods = {row.run.method for row in rows}
    if against and against not in methods:
        there = ", ".join(sorted(methods)) or "none at all"
        raise UserError(f"no dense result is of the method {against!r}; there are {there}")
    measured = {tables.set_of(row) for row in rows}  # first the known sets in their order, then by name
    sets = [*(name for name in SETS if name in measured), *sorted(measured - set(SETS))]
    published = published_dense() if published is None else published
    printed = [row for row in published if not rows or row.set in sets]
    if not rows and not printed:
        return None
    heads = _heads(rows, printed)
    keys = ["source", "mark", "protocol_is_full", "set", *tables.METHOD_FIELDS, *tables.score_keys(heads)]
    keys += [f"{name}_difference" for name in heads if against]
    keys += ["pretraining_protocol", "protocol", "deviations", "seeds", "config", "note"]
    groups = []
    for name in sets or dict.fromkeys(row.set for row in printed):
        found = [row for row in rows if tables.set_of(row) == name]
        groups.append((SETS.get(name, name), [row for row in printed if row.set == name], found))
    gains = functools.partial(_gains, rows=rows, heads=heads, against=against) if against else None
    alike_in = "in points, where backbone, patch size, labels and evaluation are the same."
    more = [f"{DIFFERENCE}: mean minus that of {against}, {alike_in}"] * bool(against)
    more += _reasons(rows, against) if against else []
    title, what = "Dense evaluation without fine-tuning", "configuration or weights"
    texts = _notes(heads, bool(printed))
    return tables.side_by_side(title, groups, heads, ["protocol"], keys, texts, what, gains, more)


def _heads(rows: Sequence[Measured], printed: Sequence[PublishedDense]) -> dict[str, str]:
    """{metric: column} of those that any row has; after clustering its versions with more clusters."""
    present = {name for row in rows for run in row.runs for name in run.metrics}
    present |= {name for row in printed for name in row.scores}
    more = sorted(int(match[1]) for match in map(MORE_CLUSTERS.fullmatch, present) if match)
    heads: dict[str, str] = {}
    for name, head in METRICS.items():
        heads |= {name: head} if name in present else {}
        if name == "clustering_miou":
            heads |= {f"clustering_k{k}_miou": f"clustering mIoU, K = {k}" for k in more}
    return heads


def _gains(
    row: Measured, *, rows: Sequence[Measured], heads: Mapping[str, str], against: str
) -> dict[str, float | None]:
    """Differences of the means to those of the method ``against``, in points; None without one to compare."""
    base = _base(row, rows, against)
    gains: dict[str, float | None] = {}
    for name in heads:
        after, before = row.score(name), base.score(name) if isinstance(base, Measured) else None
        gains[name] = after.mean - before.mean if after and before else None
    return gains


def _base(row: Measured, rows: Sequence[Measured], against: str) -> Measured | str:
    """The row of the method ``against`` that a row is compared with; else why there is none, "" of its own."""
    if row.run.method == against:
        return ""
    bases = [
        base for base in rows if base.run.method == against and tables.set_of(base) == tables.set_of(row)
    ]
    networks = sorted({backbone_label(base.run.network) for base in bases})
    if backbone_label(row.run.network) not in networks:
        return f"{against} is {' and '.join(networks)}" if networks else f"{against} is not measured there"
    # The config also says from which kind of file, which may differ.
    bases = [base for base in bases if _compared(base.run) == _compared(row.run)]
    if not bases:
        return f"{against} was evaluated otherwise"
    return bases[0] if len(bases) == 1 else f"{len(bases)} rows of {against} are like it"


def _compared(run: Result) -> tuple[Any, ...]:
    """Equal for runs on the same labels by the same evaluation. Sets of one's own may share a name."""
    return run.network, run.protocol.identity, run.labels, run.metrics.get("images")


def _reasons(rows: Sequence[Measured], against: str) -> list[str]:
    """Which rows have no difference, and why: one note."""
    whys = [(row, _base(row, rows, against)) for row in rows]
    told = dict.fromkeys(
        f"{row.run.method}, {backbone_label(row.run.network)} on {SETS.get(tables.set_of(row), tables.set_of(row))}"
        f" ({why})"
        for row, why in whys
        if why and isinstance(why, str)
    )
    return [f"No {DIFFERENCE}: {'; '.join(told)}."] if told else []


def _notes(heads: Mapping[str, str], has_published: bool) -> list[str]:
    kinds = {
        "In-context mIoU: of the classes as retrieved; Hungarian: after the one-to-one matching that suits it best.":
            "in_context_hungarian_miou" in heads,
        "Clustering: as many clusters as classes, matched one to one (Hungarian).": "clustering_miou" in heads,
        "K clusters, more than classes: each counts as the class that it fits best.":
            any(map(MORE_CLUSTERS.fullmatch, heads)),
        "Published: as the methods' authors or later comparisons report; in-context mIoU stands under Hungarian, "
        "for the public Hummingbird evaluation matches classes before it counts.": has_published,
    }  # fmt: skip
    texts = [text for text, is_shown in kinds.items() if is_shown]
    return ["mIoU and accuracy in percent, of features that were not fine-tuned.", *texts]
