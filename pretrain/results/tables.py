"""Results and published numbers side by side, as text cells that `render.py` draws.

Two rules hold in every table. A measured row is never mixed with the published ones without a mark (†, and
the column `source`). A run that was scaled down, or whose pre-training was, never stands under the bare name
of its protocol: the label says so, its numbers carry a ‡, and a foot note lists every deviation.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pretrain.results.published import PublishedDense, PublishedRow, published_rows, rows_of_tables
from pretrain.results.rows import Measured, Score, backbone_family, backbone_label, merge
from pretrain.results.schema import Protocol, Result, ordered_terms

NONE, MEASURED, SCALED, DIFFERENCE = "–", "†", "‡", "Δ"
ABOUT = ("source", "method", "backbone", "eff. epochs")
SCORES = {"box_ap": "box AP", "mask_ap": "mask AP", "ade20k_miou": "ADE20K mIoU"}
PROTOCOL_FIELDS = ("pretraining_protocol", "detection_protocol", "segmentation_protocol")
ADE20K = "ade20k"  # how the names of its protocols begin: other data sets' mIoU has a table of its own
SEEDS = "a ± b (n=c): mean and sample standard deviation over c runs that differ in their seed."
NOT_COMPARABLE = "Not comparable with the published numbers."


@dataclass(frozen=True)
class Line:
    """One row: its source ("published", "measured", "plain", "heading"), whether it was scaled down, its cells."""

    source: str
    scaled: bool
    cells: tuple[str, ...]

    def is_bold(self, i: int) -> bool:
        """Whether a cell is bold in md, latex and html: the first two of a measured row."""
        return self.source == "measured" and i < 2 and bool(self.cells[i])


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

    @classmethod
    def of(
        cls, title: str, columns: Iterable[str], groups: Iterable[Iterable[Line]], notes: Iterable[str],
        numeric: Iterable[int], records: Iterable[dict[str, str]], **more: Any,
    ) -> "Table":  # fmt: skip
        """A table of lists."""
        parts = (tuple(columns), tuple(map(tuple, groups)), tuple(notes), frozenset(numeric), tuple(records))
        return cls(title, *parts, **more)


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

    def score(self, score: Score | None, *protocols: Protocol | None) -> str:
        """A measured score, marked where one of its protocols is scaled down."""
        return NONE if score is None else f"{score}{self.mark(*protocols)}"

    def texts(self, consequence: str = NOT_COMPARABLE) -> list[str]:
        """One note a scaled-down protocol: its deviations, and what follows from them."""
        return [f"{SCALED}{i} {p.text}. {consequence}" for i, p in enumerate(self.scaled.values(), 1)]


# --- cells and records that several tables have -----------------------------------------------------------

# Differences to another method by score, in points; none: the table has none.
Gains = Mapping[str, float | None] | None


def published_line(
    row: PublishedRow | PublishedDense, scores: Iterable[str], has_gains: bool = False
) -> Line:
    """What md, latex and html show of a published row: :data:`ABOUT`, scores, protocols, no seeds, note."""
    cells = ["published", row.method, row.backbone, epochs_text(row.effective_epochs)]
    for value in map(row.scores.get, scores):
        cells += [NONE if value is None else f"{value:.1f}", *[""] * has_gains]
    cells += [text or NONE for key, text in row.labels.items() if key.endswith("protocol")]
    return Line("published", False, (*cells, NONE, row.about))


def measured_line(
    row: Measured, scores: Iterable[str], notes: FootNotes, rows: Sequence[Measured], gains: Gains = None
) -> Line:
    """The same of a measured one; the note names the config where only this sets it apart from other rows."""
    epochs = epochs_text(row.run.effective_epochs) + notes.mark(row.pretraining)
    cells = [f"measured {MEASURED}", row.run.method, backbone_label(row.run.network), epochs]
    for name in scores:
        cells.append(notes.score(row.score(name), row.pretraining, row.protocol(name)))
        if gains is not None:
            cells.append("" if (gain := gains[name]) is None else signed(gain))
    cells += [notes.label(protocol) for protocol in row.protocols[1:]]
    is_alone = [other.identity for other in rows].count(row.identity) == 1
    cells += [row.seeds, "" if is_alone else f"config {row.configs}"]
    return Line("measured", bool(row.scaled), tuple(cells))


def record(keys: Iterable[str], values: Mapping[str, str]) -> dict[str, str]:
    """A row of a csv; "" for what it does not have."""
    return {key: values.get(key, "") for key in keys}


def score_keys(scores: Iterable[str]) -> list[str]:
    """Keys of a record: mean, standard deviation and count of each score."""
    return [f"{name}{end}" for name in scores for end in ("", "_std", "_n")]


def published_values(row: PublishedRow | PublishedDense) -> dict[str, str]:
    """What a record may say of a published row."""
    values = {"source": "published", "protocol_is_full": "true", "note": row.note, **row.labels}
    values |= {name: number_text(value) for name, value in row.scores.items()}
    return values | method_fields(row.method, row.backbone, row.effective_epochs)


def measured_values(row: Measured, scores: Iterable[str], gains: Gains = None) -> dict[str, str]:
    """What a record may say of a measured row; of runs of one kind alone, by `protocol`, too."""
    scaled = {protocol.identity: protocol.text for protocol in row.scaled}
    labels = ["" if protocol is None else protocol.label for protocol in row.protocols]
    values = {"source": "measured", "mark": MEASURED + SCALED * bool(scaled), "seeds": row.seeds}
    values |= {"protocol_is_full": str(not scaled).lower(), "deviations": " | ".join(scaled.values())}
    values |= method_fields(row.run.method, backbone_label(row.run.network), row.run.effective_epochs)
    values |= {"config": row.configs, "protocol": row.run.protocol.label} | dict(zip(PROTOCOL_FIELDS, labels))
    for name in scores:
        values |= score_values(name, row.score(name))
    differences = {f"{name}_difference": number_text(gain) for name, gain in (gains or {}).items()}
    return values | differences | {"set": set_of(row)}


def set_of(row: Measured) -> str:
    """Of a dense evaluation: the set with labels."""
    return row.run.protocol.name.removeprefix("dense-")


def score_values(name: str, score: Score | None, mean: str = "") -> dict[str, str]:
    """Of a record: mean (under ``name + mean``), standard deviation and count."""
    if score is None:
        return {}
    ends = {mean: number_text(score.mean), "_std": number_text(score.std), "_n": str(score.n)}
    return {name + end: text for end, text in ends.items()}


def method_fields(method: str, backbone: str, epochs: float | None) -> dict[str, str]:
    """Of a record: what was pre-trained, and for how long."""
    epochs_exact = "" if epochs is None else f"{epochs:g}"
    return {"method": method, "backbone": backbone, "effective_epochs": epochs_exact}


METHOD_FIELDS = tuple(method_fields("", "", None))


def side_by_side(
    title: str, parts: Iterable[tuple[str, Sequence[PublishedRow | PublishedDense], Sequence[Measured]]],
    scores: Mapping[str, str], heads: Sequence[str], keys: Iterable[str], texts: Iterable[str], what: str,
    gains: Callable[[Measured], Gains] | None = None, more: Iterable[str] = (),
) -> Table:  # fmt: skip
    """Published rows above measured ones, group by group.

    Args:
        parts: of each group its heading ("": none), its published and its measured rows.
        scores: {score: its column}; heads: columns of the protocols.
        keys: of the records.
        texts, more: foot notes before and after those on marks and seeds.
        what: in which measured rows differ that look alike.
        gains: of a measured row.
    """
    parts, has_gains = list(parts), gains is not None
    printed, rows = [row for part in parts for row in part[1]], [row for part in parts for row in part[2]]
    columns = [*ABOUT]
    for head in scores.values():
        columns += [head, *[DIFFERENCE] * has_gains]
    numeric = range(3, len(columns))
    columns += [*heads, "seeds", "note"]
    notes, groups, records = FootNotes(), [], []
    for heading, of_paper, found in parts:
        lines = [heading_line(heading, columns)] if heading else []
        lines += [published_line(row, scores, has_gains) for row in of_paper]
        values = [*map(published_values, of_paper)]
        for row in found:
            own = None if gains is None else gains(row)
            lines.append(measured_line(row, scores, notes, rows, own))
            values.append(measured_values(row, scores, own))
        groups.append(lines)
        records += [record(keys, each) for each in values]
    others = "; every other row is published" if printed else ""
    told = [f"{MEASURED} Measured with this code, by the runs given{others}."] if rows else []
    told += [*seeds_note(rows, scores), *more]
    if len({row.identity for row in rows}) < len(rows):
        told.append(f"Rows with a config in their note differ in their {what} and are not averaged.")
    return Table.of(title, columns, groups, [*texts, *told, *notes.texts()], numeric, records)


def heading_line(text: str, columns: Sequence[str]) -> Line:
    """A line of one cell, as wide as the columns."""
    return Line("heading", False, (text, *[""] * (len(columns) - 1)))


def seeds_note(rows: Sequence[Measured], scores: Iterable[str]) -> list[str]:
    """What a ± b (n=c) means, where any of the rows has it."""
    found = [row.score(name) for row in rows for name in scores]
    return [SEEDS] if any(score is not None and score.n > 1 for score in found) else []


def number_text(value: float | None) -> str:
    """Not rounded to a decimal; "" for None."""
    return "" if value is None else repr(round(value, 6) + 0.0)


def signed(difference: float) -> str:
    """ "+2.1", "−0.3", "0.0"."""
    return f"{difference:+.1f}".replace("-", "−") if round(difference, 1) else "0.0"


def epochs_text(epochs: float | None) -> str:
    """ "1600", "347", "0.35"; a dash for None."""
    return NONE if epochs is None else f"{epochs:.0f}" if epochs >= 10 else f"{epochs:.2g}"


def memory_text(mib: float | None, unit: str = "") -> str:
    """ "1,234"; a dash for None."""
    return NONE if mib is None else f"{mib:,.0f}{unit}"


def duration_text(seconds: float) -> str:
    """ "42 s", "3 min 20 s", "5 h 03 min"."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes == 0:
        return f"{seconds:.2g} s" if seconds < 10 else f"{rest} s"
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def comparison_table(
    results: Sequence[Result], published: Sequence[PublishedRow] | None = None, table: str = "1"
) -> Table:
    """The published rows beside the measured detections and segmentations of ADE20K, grouped by backbone.

    published  the rows to choose from; None: the package's own. `table`: "1", "1,2,7" or "all".
    Raises UserError for an unknown table.
    """
    printed = rows_of_tables(published_rows() if published is None else list(published), table)
    measured = merge([r for r in results if not is_elsewhere(r)])
    families = dict.fromkeys([row.backbone for row in printed])
    families |= dict.fromkeys(sorted(backbone_family(row.run.network) for row in measured))
    keys = ["source", "mark", "protocol_is_full", *METHOD_FIELDS, *score_keys(SCORES), *PROTOCOL_FIELDS]
    keys += ["deviations", "seeds", "config", "table", "note"]
    parts = []
    for family in families:
        found = [row for row in measured if backbone_family(row.run.network) == family]
        parts.append(("", [row for row in printed if row.backbone == family], found))
    texts = ["AP and mIoU in percent."]
    texts += ["Published: as printed in the paper, in the table that the note names."] * bool(printed)
    heads = ("detection protocol", "segmentation protocol")
    values = [{name: row.score(name) for name in SCORES} for row in measured]
    scores = shown_scores(SCORES, [*(row.scores for row in printed), *values])
    return side_by_side("COCO and ADE20K", parts, scores, heads, keys, texts, "configuration")


def shown_scores(scores: Mapping[str, str], rows: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """{score: its column}, without the masks' where all detectors of a table find boxes alone.

    Args:
        rows: each {score: value, or None}.
    """
    present = {name for row in rows for name, value in row.items() if value is not None}
    are_boxes_alone = "box_ap" in present and "mask_ap" not in present
    return {name: head for name, head in scores.items() if name != "mask_ap" or not are_boxes_alone}


def is_elsewhere(result: Result) -> bool:
    """Whether it is a segmentation of another data set than ADE20K."""
    return result.kind == "segmentation" and not result.protocol.name.startswith(ADE20K)


def segmentation_table(results: Sequence[Result]) -> Table | None:
    """Segmentation on other data sets than ADE20K, one row per protocol and configuration; None without any.

    No published number stands beside them: the published mIoU is ADE20K's.
    """
    # Pre-trainings say which weights are of a scaled-down one.
    rows = merge([result for result in results if result.kind == "pretrain" or is_elsewhere(result)])
    if not rows:
        return None
    rows.sort(key=lambda row: row.run.protocol.name)  # stable: within one as merged
    keys = ("protocol", "protocol_is_full", *METHOD_FIELDS, *score_keys(["miou"]), "seeds", "config")
    notes, lines = FootNotes(), []
    for row in rows:
        line = measured_line(row, ["miou"], notes, rows)
        _, *about, miou, _, label, seeds, _ = line.cells
        lines.append(replace(line, cells=(label, *about, miou, seeds, row.configs)))
    columns = ("protocol", *ABOUT[1:], "mIoU", "seeds", "config")
    texts = ["mIoU in percent, measured with this code."]
    texts += notes.texts("Not comparable with the full protocol's numbers.")
    records = [record(keys, measured_values(row, ["miou"])) for row in rows]
    return Table.of("Segmentation on other data sets", columns, [lines], texts, {3, 4}, records)


def pretraining_table(results: Sequence[Result]) -> Table | None:
    """Every pre-training but the post-trainings: its losses, then its other plain metrics; None: no run."""
    return _training_table("Pre-training", results, "pretrain")


def posttraining_table(results: Sequence[Result]) -> Table | None:
    """The same for post-trainings. The total loss is left out where every run has only one term."""
    return _training_table("Post-training", results, "posttrain")


def _training_table(name: str, results: Sequence[Result], stage: str) -> Table | None:
    runs = [result for result in results if result.stage == stage]
    runs.sort(key=lambda r: (backbone_label(r.network), r.method, r.seed, r.created))
    if not runs:
        return None
    names = {key for run in runs for key, value in run.metrics.items() if not isinstance(value, dict)}
    summed = [run for run in runs if "loss" in run.metrics]
    # Of a post-training with one term of the loss: the loss is this term.
    if all(r.stage == "posttrain" and r.metrics["loss"] in map(r.metrics.get, r.terms) for r in summed):
        names.discard("loss")
    losses = ordered_terms(runs, names)
    metrics = losses + sorted(names - set(losses))
    notes, lines, records = FootNotes(), [], []
    for run in runs:
        values: list[Any] = [run.metrics.get(key) for key in metrics]
        cells = [run.method, backbone_label(run.network), epochs_text(run.effective_epochs)]
        cells += [notes.label(run.protocol), str(run.seed)]
        cells += [NONE if value is None else f"{value:.4g}" for value in values]
        cells += [duration_text(run.wall_time_s), memory_text(run.peak_memory_mib)]
        lines.append(Line("measured", bool(run.protocol.deviations), tuple(cells)))
        about = {"protocol": run.protocol.label, "protocol_is_full": str(not run.protocol.deviations).lower()}
        exact = {key: "" if value is None else repr(value) for key, value in zip(metrics, values)}
        fields = method_fields(run.method, run.network, run.effective_epochs)
        records.append(fields | about | {"seed": str(run.seed)} | exact)
    columns = (*ABOUT[1:], "protocol", "seed", *metrics, "wall time", "peak memory (MiB)")
    texts = notes.texts(f"Not the full {name.lower()}.")
    return Table.of(f"{name} runs", columns, [lines], texts, {2, *range(4, len(columns))}, records)
