"""Results and published numbers side by side, as text cells that `render.py` draws.

Two rules hold in every table. A measured row is never mixed with the published ones without a mark (†, and
the column `source`). A run that was scaled down, or whose pre-training was, never stands under the bare name
of its protocol: the label says so, its numbers carry a ‡, and a foot note lists every deviation.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pretrain.results.merge import Measured, Score, backbone_family, backbone_label, merge
from pretrain.results.published import PublishedRow, published_rows, rows_of_tables
from pretrain.results.schema import Protocol, Result, ordered_terms

NONE, MEASURED, SCALED = "–", "†", "‡"
COLUMNS = (
    *("source", "method", "backbone", "eff. epochs", "box AP", "mask AP", "ADE20K mIoU"),
    *("detection protocol", "segmentation protocol", "seeds", "note"),
)
PROTOCOL_FIELDS = ("pretraining_protocol", "detection_protocol", "segmentation_protocol")
ADE20K = "ade20k"  # how the names of its protocols begin: other data sets' mIoU has a table of its own
SEEDS = "a ± b (n=c): mean and sample standard deviation over c runs that differ in their seed."


@dataclass(frozen=True)
class Line:
    """One row: its source ("published", "measured", "heading"), whether it was scaled down, its cells."""

    source: str
    scaled: bool
    cells: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """A title, column heads, groups of rows, foot notes, and the same rows as records for csv.

    numeric  indices of the columns to align on the right.
    records  one dict a row, keys in column order, numbers not rounded to a decimal.
    heads    (text, number of columns) of a line above the columns that covers all; latex and html have it.
    measured indices of columns that hold measured values beside published ones.
    """

    title: str
    columns: tuple[str, ...]
    groups: tuple[tuple[Line, ...], ...]
    notes: tuple[str, ...]
    numeric: frozenset[int]
    records: tuple[dict[str, str], ...]
    heads: tuple[tuple[str, int], ...] = ()
    measured: frozenset[int] = frozenset()


@dataclass
class FootNotes:
    """Numbers the scaled-down protocols in the order in which a table meets them."""

    scaled: dict[str, Protocol] = field(default_factory=dict)

    def mark(self, *protocols: Protocol | None) -> str:
        """ " ‡1" or " ‡1,2" for those of the protocols that are scaled down; "" when none is."""
        marked = {p.identity: p for p in protocols if p is not None and p.deviations}
        for identity, protocol in marked.items():
            self.scaled.setdefault(identity, protocol)
        numbers = [str(i) for i, identity in enumerate(self.scaled, 1) if identity in marked]
        return f" {SCALED}{','.join(numbers)}" if numbers else ""

    def label(self, protocol: Protocol | None) -> str:
        """The only way in which a protocol's name enters a table."""
        return NONE if protocol is None else protocol.label + self.mark(protocol)

    def texts(self, consequence: str) -> list[str]:
        """One note a scaled-down protocol: its deviations, and what follows from them."""
        return [f"{SCALED}{i} {p.text}. {consequence}" for i, p in enumerate(self.scaled.values(), 1)]


def comparison_table(
    results: Sequence[Result], published: Sequence[PublishedRow] | None = None, table: str = "1"
) -> Table:
    """The published rows beside the measured detections and segmentations of ADE20K, grouped by backbone.

    published  the rows to choose from; None: the package's own. `table`: "1", "1,2,7" or "all".
    Raises UserError for an unknown table.
    """
    printed = rows_of_tables(published_rows() if published is None else list(published), table)
    measured = merge([r for r in results if not is_elsewhere(r)])
    twins = [row.identity for row in measured]
    families = dict.fromkeys([row.backbone for row in printed])
    families |= dict.fromkeys(sorted(backbone_family(row.run.backbone) for row in measured))
    notes, groups, records = FootNotes(), [], []
    for family in families:
        lines = [_published_line(row) for row in printed if row.backbone == family]
        records += [_published_record(row) for row in printed if row.backbone == family]
        for row in measured:
            if backbone_family(row.run.backbone) == family:
                lines.append(_measured_line(row, notes, alone=twins.count(row.identity) == 1))
                records.append(_measured_record(row))
        groups.append(tuple(lines))
    return Table(
        title="COCO and ADE20K",
        columns=COLUMNS,
        groups=tuple(groups),
        notes=tuple(_notes(printed, measured) + notes.texts("Not comparable with the published numbers.")),
        numeric=frozenset({3, 4, 5, 6}),
        records=tuple(records),
    )


def _notes(printed: list[PublishedRow], measured: list[Measured]) -> list[str]:
    texts = ["AP and mIoU in percent."]
    if printed:
        texts.append("Published: as printed in the paper, in the table that the note names.")
    if measured:
        others = "; every other row is published" if printed else ""
        texts.append(f"{MEASURED} Measured with this code, by the runs given{others}.")
    texts += seeds_note(measured)
    if len({row.identity for row in measured}) < len(measured):
        texts.append("Rows with a config in their note differ in their configuration and are not averaged.")
    return texts


def seeds_note(measured: Sequence[Measured]) -> list[str]:
    """What a ± b (n=c) means, where any of the rows has it."""
    several = any(score is not None and score.n > 1 for row in measured for score in scores_of(row).values())
    return [SEEDS] if several else []


# --- cells: what md, latex and html show ------------------------------------------------------------------


def _published_line(row: PublishedRow) -> Line:
    scores = [
        NONE if value is None else f"{value:.1f}" for value in (row.box_ap, row.mask_ap, row.ade20k_miou)
    ]
    protocols = [text or NONE for text in _published_protocols(row)]
    note = f"Table {row.table}" + (f": {row.note}" if row.note else "")
    cells = (row.method, row.backbone, epochs_text(row.effective_epochs), *scores, *protocols, NONE, note)
    return Line("published", False, ("published", *cells))


def _published_protocols(row: PublishedRow) -> tuple[str, str]:
    """By the paper's own schedules (appendix B), not by our protocols' names: ours are a reading of them."""
    detection = f"{50 if row.table == '2' else 12} epochs" if row.box_ap is not None else ""
    return detection, "160k iterations" if row.ade20k_miou is not None else ""


def _measured_line(row: Measured, notes: FootNotes, alone: bool) -> Line:
    pretraining, detection, segmentation = row.protocols
    epochs = epochs_text(row.run.effective_epochs) + notes.mark(pretraining)
    scores = []
    for score, protocol in zip(scores_of(row).values(), (detection, detection, segmentation)):
        scores.append(NONE if score is None else f"{score}{notes.mark(pretraining, protocol)}")
    method = (row.run.method, backbone_label(row.run.backbone), epochs)
    protocols = (notes.label(detection), notes.label(segmentation))
    note = "" if alone else f"config {row.configs}"
    return Line(
        "measured", bool(row.scaled), (f"measured {MEASURED}", *method, *scores, *protocols, row.seeds, note)
    )


def scores_of(row: Measured) -> dict[str, Score | None]:
    """The scores of a measured row by the published csv's names."""
    return {
        "box_ap": Score.of(row.groups[0], "box_ap"),
        "mask_ap": Score.of(row.groups[0], "mask_ap"),
        "ade20k_miou": Score.of(row.groups[1], "miou"),
    }


def signed(difference: float) -> str:
    """ "+2.1", "−0.3", "0.0"."""
    return f"{difference:+.1f}".replace("-", "−") if round(difference, 1) else "0.0"


def epochs_text(epochs: float | None) -> str:
    """ "1600", "347", "0.35"; a dash for None."""
    return NONE if epochs is None else f"{epochs:.0f}" if epochs >= 10 else f"{epochs:.2g}"


# --- records: what csv holds ------------------------------------------------------------------------------


def _published_record(row: PublishedRow) -> dict[str, str]:
    scores = {
        name: None if value is None else Score(value, None, 1)
        for name, value in (
            ("box_ap", row.box_ap),
            ("mask_ap", row.mask_ap),
            ("ade20k_miou", row.ade20k_miou),
        )
    }
    return (
        {"source": "published", "mark": "", "protocol_is_full": "true"}
        | method_fields(row.method, row.backbone, row.effective_epochs)
        | numbers_of(scores, counted=False)
        | dict(zip(PROTOCOL_FIELDS, ("", *_published_protocols(row))))
        | {"deviations": "", "seeds": "", "config": "", "table": row.table, "note": row.note}
    )


def _measured_record(row: Measured) -> dict[str, str]:
    labels = ["" if protocol is None else protocol.label for protocol in row.protocols]
    scaled = {protocol.identity: protocol.text for protocol in row.scaled}
    mark = MEASURED + (SCALED if scaled else "")
    return (
        {"source": "measured", "mark": mark, "protocol_is_full": "false" if scaled else "true"}
        | method_fields(row.run.method, backbone_label(row.run.backbone), row.run.effective_epochs)
        | numbers_of(scores_of(row), counted=True)
        | dict(zip(PROTOCOL_FIELDS, labels))
        | {"deviations": " | ".join(scaled.values()), "seeds": row.seeds, "config": row.configs}
        | {"table": "", "note": ""}
    )


def method_fields(method: str, backbone: str, epochs: float | None) -> dict[str, str]:
    """Of a record: what was pre-trained, and for how long."""
    return {
        "method": method,
        "backbone": backbone,
        "effective_epochs": "" if epochs is None else f"{epochs:g}",
    }


def numbers_of(scores: dict[str, Score | None], counted: bool) -> dict[str, str]:
    """Mean, standard deviation and count of each score; the count only where we know it."""
    row = {}
    for name, score in scores.items():
        row[name] = "" if score is None else repr(round(score.mean, 6))
        row[f"{name}_std"] = "" if score is None or score.std is None else repr(round(score.std, 6))
        row[f"{name}_n"] = str(score.n) if score is not None and counted else ""
    return row


# --- segmentation on other data sets ----------------------------------------------------------------------


def is_elsewhere(result: Result) -> bool:
    """Whether it is a segmentation of another data set than ADE20K."""
    return result.kind == "segmentation" and not result.protocol.name.startswith(ADE20K)


def segmentation_table(results: Sequence[Result]) -> Table | None:
    """Segmentation on other data sets than ADE20K, one row per protocol and configuration; None without any.

    No published number stands beside them: the published mIoU is ADE20K's.
    """
    pretraining = [
        result for result in results if result.kind == "pretrain"
    ]  # they say which weights are of a scaled-down one
    rows = merge([*pretraining, *(result for result in results if is_elsewhere(result))])
    if not rows:
        return None
    rows.sort(key=lambda row: row.run.protocol.name)  # stable: within one as merged
    notes, lines, records = FootNotes(), [], []
    for row in rows:
        run, score = row.run, Score.of(row.runs, "miou")
        miou = NONE if score is None else f"{score}{notes.mark(row.pretraining, run.protocol)}"
        epochs = epochs_text(run.effective_epochs) + notes.mark(row.pretraining)
        who = (run.method, backbone_label(run.backbone), epochs)
        lines.append(
            Line(
                "measured", bool(row.scaled), (notes.label(run.protocol), *who, miou, row.seeds, row.configs)
            )
        )
        records.append(
            {"protocol": run.protocol.label, "protocol_is_full": str(not row.scaled).lower()}
            | method_fields(run.method, backbone_label(run.backbone), run.effective_epochs)
            | numbers_of({"miou": score}, counted=True)
            | {"seeds": row.seeds, "config": row.configs}
        )
    return Table(
        title="Segmentation on other data sets",
        columns=("protocol", "method", "backbone", "eff. epochs", "mIoU", "seeds", "config"),
        groups=(tuple(lines),),
        notes=(
            "mIoU in percent, measured with this code.",
            *notes.texts("Not comparable with the full protocol's numbers."),
        ),
        numeric=frozenset({3, 4}),
        records=tuple(records),
    )


# --- the pre-training runs --------------------------------------------------------------------------------


def pretraining_table(results: Sequence[Result]) -> Table | None:
    """Every pre-training but the post-trainings: its losses, then its other plain metrics; None: no run."""
    return _training_table("Pre-training runs", [result for result in results if result.stage == "pretrain"])


def posttraining_table(results: Sequence[Result]) -> Table | None:
    """The same for post-trainings. The total loss is left out where every run has only one term."""
    return _training_table(
        "Post-training runs", [result for result in results if result.stage == "posttrain"]
    )


def _training_table(title: str, runs: list[Result]) -> Table | None:
    runs.sort(key=lambda r: (backbone_label(r.backbone), r.method, r.seed, r.created))
    if not runs:
        return None
    names = {name for run in runs for name, value in run.metrics.items() if not isinstance(value, dict)}
    if all(run.stage == "posttrain" and _is_one_term(run) for run in runs if "loss" in run.metrics):
        names.discard("loss")
    losses = ordered_terms(runs, names)
    metrics = losses + sorted(names - set(losses))
    notes, lines, records = FootNotes(), [], []
    for run in runs:
        values: list[Any] = [run.metrics.get(name) for name in metrics]
        who = (
            run.method,
            backbone_label(run.backbone),
            epochs_text(run.effective_epochs),
            notes.label(run.protocol),
        )
        cost = (
            duration_text(run.wall_time_s),
            NONE if run.peak_memory_mib is None else f"{run.peak_memory_mib:,.0f}",
        )
        numbers = tuple(NONE if value is None else f"{value:.4g}" for value in values)
        lines.append(Line("measured", bool(run.protocol.deviations), (*who, str(run.seed), *numbers, *cost)))
        records.append(
            method_fields(run.method, run.backbone, run.effective_epochs)
            | {"protocol": run.protocol.label, "protocol_is_full": str(not run.protocol.deviations).lower()}
            | {"seed": str(run.seed)}
            | {name: "" if value is None else repr(value) for name, value in zip(metrics, values)}
        )
    columns = (
        "method",
        "backbone",
        "eff. epochs",
        "protocol",
        "seed",
        *metrics,
        "wall time",
        "peak memory (MiB)",
    )
    return Table(
        title=title,
        columns=columns,
        groups=(tuple(lines),),
        notes=tuple(notes.texts(f"Not the full {title.split()[0].lower()}.")),
        numeric=frozenset({2, *range(4, len(columns))}),
        records=tuple(records),
    )


def _is_one_term(run: Result) -> bool:
    """Whether one term of the loss equals the loss: the only one."""
    return run.metrics["loss"] in [run.metrics.get(term) for term in run.terms]


def duration_text(seconds: float) -> str:
    """ "42 s", "3 min 20 s", "5 h 03 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.2g} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
