"""The table of dense evaluations without fine-tuning: set by set, published numbers above measured ones.

The rules of :mod:`pretrain.results.tables` hold: a measured row has a †, a scaled-down one ‡ and a foot note.
"""

import re
from collections.abc import Iterable, Mapping, Sequence

from pretrain.errors import UserError
from pretrain.results.merge import Measured, Score, alike, backbone_label, ranked
from pretrain.results.published import PublishedDense, published_dense
from pretrain.results.schema import Result
from pretrain.results.tables import (
    MEASURED,
    NONE,
    SCALED,
    SEEDS,
    FootNotes,
    Line,
    Table,
    epochs_text,
    method_fields,
    numbers_of,
    signed,
)

DIFFERENCE = "Δ"
PREFIX = "dense-"  # of the protocols' names, before the set's
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
OVERCLUSTERED = re.compile(r"clustering_k(\d+)_miou")


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
    rows = [
        Measured((runs,), before)
        for part, before in alike(results, "dense")
        for runs in ranked(part, "linear_miou")
    ]
    rows.sort(key=lambda row: row.run.method != against)  # stable
    methods = {row.run.method for row in rows}
    if against and against not in methods:
        there = ", ".join(sorted(methods)) or "none at all"
        raise UserError(f"no dense result is of the method {against!r}; there are {there}")
    printed = [
        row
        for row in (published_dense() if published is None else published)
        if not rows or row.set in _sets(rows)
    ]
    if not rows and not printed:
        return None
    heads = _heads(rows, printed)
    columns = ["source", "method", "backbone", "eff. epochs"]
    for head in heads.values():
        columns += [head, *[DIFFERENCE] * bool(against)]
    numeric = frozenset(range(3, len(columns)))
    columns += ["protocol", "seeds", "note"]
    notes, groups, records = FootNotes(), [], []
    for name in _sets(rows) or dict.fromkeys(row.set for row in printed):
        lines = [Line("heading", False, (SETS.get(name, name), *[""] * (len(columns) - 1)))]
        for row in (row for row in printed if row.set == name):
            lines.append(_published_line(row, heads, bool(against)))
            records.append(_published_record(row, heads, bool(against)))
        for found in (row for row in rows if _set(row) == name):
            gains = _gains(found, rows, heads, against)
            alone = [other.identity for other in rows].count(found.identity) == 1
            lines.append(_measured_line(found, heads, gains, notes, alone))
            records.append(_measured_record(found, heads, gains))
        groups.append(tuple(lines))
    return Table(
        title="Dense evaluation without fine-tuning",
        columns=tuple(columns),
        groups=tuple(groups),
        notes=(
            *_notes(rows, printed, heads, against),
            *notes.texts("Not comparable with the published numbers."),
        ),
        numeric=numeric,
        records=tuple(records),
    )


def _set(row: Measured) -> str:
    return row.run.protocol.name.removeprefix(PREFIX)


def _scores(row: Measured, heads: Iterable[str]) -> dict[str, Score | None]:
    return {name: Score.of(row.runs, name) for name in heads}


def _sets(rows: Sequence[Measured]) -> list[str]:
    """Of the rows: first the known sets in their order, then the others by name."""
    names = {_set(row) for row in rows}
    return [*(name for name in SETS if name in names), *sorted(names - set(SETS))]


def _heads(rows: Sequence[Measured], printed: Sequence[PublishedDense]) -> dict[str, str]:
    """{metric: column} of those that any row has; after clustering its versions with more clusters."""
    present = {name for row in rows for run in row.runs for name in run.metrics} | {
        name for row in printed for name in row.scores
    }
    more = sorted(int(match[1]) for match in map(OVERCLUSTERED.fullmatch, present) if match)
    heads: dict[str, str] = {}
    for name, head in METRICS.items():
        heads |= {name: head} if name in present else {}
        heads |= (
            {f"clustering_k{k}_miou": f"clustering mIoU, K = {k}" for k in more}
            if name == "clustering_miou"
            else {}
        )
    return heads


def _gains(
    row: Measured, rows: Sequence[Measured], heads: Mapping[str, str], against: str
) -> dict[str, float | None] | None:
    """Differences of the means to those of the method ``against``, in points; None in a table without it."""
    if not against:
        return None
    like = (
        row.run.backbone,
        row.run.protocol.identity,
    )  # the config also says from which kind of file, which may differ
    bases = [
        other
        for other in rows
        if other.run.method == against and (other.run.backbone, other.run.protocol.identity) == like
    ]
    before = (
        _scores(bases[0], heads) if len(bases) == 1 and row.run.method != against else dict.fromkeys(heads)
    )
    pairs = {name: (after, before[name]) for name, after in _scores(row, heads).items()}
    return {name: after.mean - base.mean if after and base else None for name, (after, base) in pairs.items()}


# --- cells: what md, latex and html show ------------------------------------------------------------------


def _published_line(row: PublishedDense, heads: Mapping[str, str], has_gains: bool) -> Line:
    scores: list[str] = []
    for name in heads:
        scores += [f"{row.scores[name]:.1f}" if name in row.scores else NONE, *[""] * has_gains]
    return Line(
        "published", False, ("published", row.method, row.backbone, NONE, *scores, NONE, NONE, row.note)
    )


def _measured_line(
    row: Measured,
    heads: Mapping[str, str],
    gains: Mapping[str, float | None] | None,
    notes: FootNotes,
    alone: bool,
) -> Line:
    run, scores = row.run, list[str]()
    epochs = epochs_text(run.effective_epochs) + notes.mark(row.pretraining)
    for name, score in _scores(row, heads).items():
        scores += [NONE if score is None else f"{score}{notes.mark(row.pretraining, run.protocol)}"]
        scores += [] if gains is None else ["" if (gain := gains[name]) is None else signed(gain)]
    who = (f"measured {MEASURED}", run.method, backbone_label(run.backbone), epochs)
    about = (notes.label(run.protocol), row.seeds, "" if alone else f"config {row.configs}")
    return Line("measured", bool(row.scaled), (*who, *scores, *about))


def _notes(
    rows: Sequence[Measured], printed: Sequence[PublishedDense], heads: Mapping[str, str], against: str
) -> list[str]:
    texts = ["mIoU and accuracy in percent, of features that were not fine-tuned."]
    if "in_context_hungarian_miou" in heads:
        texts.append(
            "In-context mIoU: of the classes as retrieved; Hungarian: after the one-to-one matching that suits it best."
        )
    if "clustering_miou" in heads:
        texts.append("Clustering: as many clusters as classes, matched one to one (Hungarian).")
    if any(map(OVERCLUSTERED.fullmatch, heads)):
        texts.append("K clusters, more than classes: each counts as the class that it fits best.")
    if printed:
        texts.append(
            "Published: as the methods' authors or later comparisons report; in-context mIoU stands under "
            "Hungarian, for the public Hummingbird evaluation matches classes before it counts."
        )
    if rows:
        others = "; every other row is published" if printed else ""
        texts.append(f"{MEASURED} Measured with this code, by the runs given{others}.")
    if any(score is not None and score.n > 1 for row in rows for score in _scores(row, heads).values()):
        texts.append(SEEDS)
    if against:
        alike_alone = "where backbone and evaluation are the same"
        texts.append(f"{DIFFERENCE}: mean minus that of {against}, in points, {alike_alone}.")
    if len({row.identity for row in rows}) < len(rows):
        texts.append(
            "Rows with a config in their note differ in their configuration or weights and are not averaged."
        )
    return texts


# --- records: what csv holds ------------------------------------------------------------------------------


def _published_record(row: PublishedDense, heads: Mapping[str, str], has_gains: bool) -> dict[str, str]:
    scores = {name: Score(row.scores[name], None, 1) if name in row.scores else None for name in heads}
    return (
        {"source": "published", "mark": "", "protocol_is_full": "true", "set": row.set}
        | method_fields(row.method, row.backbone, None)
        | numbers_of(scores, counted=False)
        | ({f"{name}_difference": "" for name in heads} if has_gains else {})
        | dict.fromkeys(("pretraining_protocol", "protocol", "deviations", "seeds", "config"), "")
        | {"note": row.note}
    )


def _measured_record(
    row: Measured, heads: Mapping[str, str], gains: Mapping[str, float | None] | None
) -> dict[str, str]:
    run, scaled = row.run, {protocol.identity: protocol.text for protocol in row.scaled}
    differences = {
        f"{name}_difference": "" if gain is None else repr(round(gain, 6))
        for name, gain in (gains or {}).items()
    }
    return (
        {
            "source": "measured",
            "mark": MEASURED + SCALED * bool(scaled),
            "protocol_is_full": str(not scaled).lower(),
            "set": _set(row),
        }
        | method_fields(run.method, backbone_label(run.backbone), run.effective_epochs)
        | numbers_of(_scores(row, heads), counted=True)
        | differences
        | {
            "pretraining_protocol": "" if row.pretraining is None else row.pretraining.label,
            "protocol": run.protocol.label,
        }
        | {"deviations": " | ".join(scaled.values()), "seeds": row.seeds, "config": row.configs, "note": ""}
    )
